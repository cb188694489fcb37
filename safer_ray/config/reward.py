"""The section `reward` of a config: which model is trained, and how. Imports neither torch nor ray."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from safer_ray.config.reading import ENDS, PRECISION, Reading
from safer_ray.config.values import Frozen, LocalName, OrLocalName, Share


class TinyLlamaConfig(Frozen):
    """A Llama made on the spot, with a byte-level BPE tokenizer trained on the pairs."""

    hidden: Annotated[int, Field(gt=0)] = 96
    """Width."""
    layers: Annotated[int, Field(gt=0)] = 4
    """Blocks."""
    heads: Annotated[int, Field(gt=0)] = 4
    """Attention heads; `hidden` is an even multiple."""
    intermediate: Annotated[int, Field(gt=0)] = 256
    """Width of the feed-forward layers."""
    vocabulary: Annotated[int, Field(ge=300)] = 2000
    """Tokens of the tokenizer."""
    positions: Annotated[int, Field(gt=0)] = 512
    """Longest sequence, in tokens."""

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} must be an even multiple of heads {self.heads}")
        return self


ALL_LINEAR: Literal["all-linear"] = "all-linear"
LORA_RATE = 2e-4  # learning rate of low-rank additions, which want about ten times that of whole matrices


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != ALL_LINEAR:
        raise ValueError(f"write a list of names, as [{value}], or {ALL_LINEAR}")
    return value


class LoraConfig(Frozen):
    """Train low-rank additions to matrices (LoRA, Hu et al. 2022, arXiv 2106.09685), and the reward head in full; all
    other weights stay the base's."""

    rank: Annotated[int, Field(gt=0)] = 16
    """Of an addition B A to a matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """An addition is scaled by alpha / rank."""
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_listed)
    ] = ALL_LINEAR
    """Which linear layers of the blocks: how their names end, as `[q_proj, v_proj]`, or all of them, which any family
    has, and which comes closest to full training (Dettmers et al. 2023, arXiv 2305.14314)."""


class RewardConfig(Reading):
    """Choose how a reward model is trained, after Bradley and Terry, and read."""

    # `use` is what a model is made of that is not trained, an input.
    unrecorded: ClassVar = frozenset(
        {
            "micro_batch_size",
            "gradient_checkpointing",
            "frozen_states_gb",
            "shards",
            "adapter_base",
            "bin_weights",
            ENDS,
            PRECISION,
            "use",
        }
    )

    use: LocalName | None = Field(default=None, exclude_if=lambda value: value is None)
    """A finished reward model, named as `base` is, which is read as it is and not trained. The settings of training
    are then of the heads that `cross_fit`, `lab`, `sweep` and `curate` train on its blocks: `frozen_layers` is all of
    these unless you say less, `learning_rate` 1e-3 unless you say otherwise, and `new_head` holds."""
    base: Annotated[TinyLlamaConfig | LocalName, OrLocalName] = TinyLlamaConfig()
    """A Hugging Face folder, `hub:OWNER/NAME[@REVISION]`, `package:MODULE/FOLDER` (a checkpoint inside an installed
    package), a GGUF file (FILE.gguf, `hub:OWNER/NAME/FILE.gguf[@REVISION]`, `package:MODULE/FILE.gguf`), or the sizes
    of a tiny Llama."""
    blocks: Annotated[int | None, Field(gt=0, exclude_if=lambda value: value is None)] = None
    """Of a pretrained base, only the first so many blocks are kept; the reward head stands behind the last of them."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a side; see `truncation` for longer ones."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the pairs; also parts of one."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Pairs a step."""
    micro_batch_size: Annotated[int, Field(gt=0)] = 32
    """Pairs a forward pass; divides `batch_size`."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Highest learning rate of AdamW; with `lora`, 2e-4 unless you say otherwise."""
    warmup: Share = 0.05
    """Share of the steps in which it rises; a half cosine to 0 follows."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; biases and norms have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of a larger norm are scaled down to it."""
    validation_percent: Annotated[float, Field(ge=0, le=50)] = 5
    """Percent of the prompts held out of training."""
    evaluations: Annotated[int, Field(gt=0)] = 4
    """How often held-out accuracy is measured; the weights of lowest held-out loss are kept."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    """Embeddings and blocks 1 to n stay as they are, and run only once."""
    lora: LoraConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Train low-rank additions to the blocks behind `frozen_layers`, and the head, in place of all weights: `lora: {}`
    has the defaults. The model is exported with the additions merged, and they alone, as peft has them, in its folder
    `adapter`."""
    loss: Literal["bradley_terry", "smoothed", "margin"] = Field(
        default="bradley_terry", exclude_if=lambda value: value == "bradley_terry"
    )
    """Of a pair: -log sigmoid(r_chosen - r_rejected); the same where a share `label_smoothing` of the labels is taken
    to be wrong; or the chosen reward is to be higher by the pair's `label_margin`, in units of the reward and 0 where
    it has none: -log sigmoid(r_chosen - r_rejected - label_margin) (Llama 2). Held-out loss is always the first."""
    label_smoothing: float | None = Field(default=None, gt=0, lt=0.5, exclude_if=lambda value: value is None)
    """Below 0.5; of `loss: smoothed`, which needs it."""
    centre: float = Field(default=0, ge=0, exclude_if=lambda value: not value)
    """Coefficient of (r_chosen + r_rejected)^2 in the loss, which keeps rewards around 0, say 0.01."""
    frozen_states_gb: Annotated[float | None, Field(gt=0)] = None
    """Disk that the states behind frozen blocks may take while a model is trained, in GB; they are computed once, and
    kept in half precision beside the checkpoints. Default: nine tenths of what is free there."""
    disable_dropout: bool = True
    """Put both sides of a pair through the same network; a model made on the spot has no dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass of training; `inference_dtype` is of all others."""
    shards: Annotated[int, Field(gt=0)] = 1
    """Ranges of blocks, each in processes of its own, to read activations."""
    new_head: bool = Field(default=False, exclude_if=lambda value: not value)
    """Begin with a new reward head in the place of the base's own."""
    seed: int = 0
    """Seed of the weights that are new, of the order of pairs and of what is held out."""

    @model_validator(mode="before")
    @classmethod
    def _rate_of_lora(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("lora") is not None:
            return {"learning_rate": LORA_RATE} | given
        return given

    @model_validator(mode="after")
    def _micro(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.use is not None and "base" in self.model_fields_set:
            raise ValueError("use names a finished model, base one that is trained on; keep one of both")
        if self.use is not None and self.blocks is not None:
            raise ValueError("blocks cuts a base that is trained on; a finished model is read whole")
        if self.loss == "smoothed" and self.label_smoothing is None:
            raise ValueError("loss smoothed needs label_smoothing, the share of labels taken to be wrong, say 0.1")
        if self.loss != "smoothed" and self.label_smoothing is not None:
            raise ValueError(f"label_smoothing is of loss smoothed, and loss is {self.loss}; leave one out")
        if self.use is not None:
            return self
        if self.new_head and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("new_head needs a pretrained base; the head of a model made on the spot is new")
        if self.head is not None and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("head needs a pretrained base; a model made on the spot has one output")
        if (self.adapter_base is not None or self.bin_weights) and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("adapter_base and bin_weights need a pretrained base")
        if self.blocks is not None and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("blocks needs a pretrained base; of a model made on the spot, choose base.layers")
        if self.blocks is not None and self.frozen_layers > self.blocks:
            raise ValueError(f"frozen_layers {self.frozen_layers} lies past the {self.blocks} blocks that are kept")
        if self.frozen_layers and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("frozen_layers needs a pretrained base; a model made on the spot has nothing to keep")
        return self

    @model_validator(mode="after")
    def _adaptable(self) -> Self:
        if self.lora is None:
            return self
        if self.use is None and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("lora needs a pretrained base; a model made on the spot is trained whole")
        if self.use is not None and "frozen_layers" not in self.model_fields_set:
            raise ValueError(
                "lora adapts blocks, and all of a finished model's (use) are frozen; set frozen_layers to fewer of them"
            )
        if self.blocks is not None and self.frozen_layers == self.blocks:
            raise ValueError(
                f"lora adapts the blocks behind frozen_layers, and all {self.blocks} are frozen; set it lower"
            )
        return self
