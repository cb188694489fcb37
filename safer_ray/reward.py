"""Reward models: find, load, check, forward (with a hidden layer on the way), export."""

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from safer_ray.config import RewardConfig, TinyLlamaConfig
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.text import PairTokenizer
from safer_ray.tiny_llama import make_tiny_llama

SETTINGS = "safer_ray.json"  # beside the weights: how this model reads text
LAYER_LISTS = ("layers", "encoder.layer", "transformer.layer", "h", "decoder.layers")


class Forward(NamedTuple):
    """Of a batch of sequences: rewards, and the raw layer vectors asked for, in input order."""

    rewards: Float[Tensor, " n"] | None
    hidden: list[Float[Tensor, "m d"]] | None


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer wanted."""


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, its tokenizer, and how text is rendered for it."""

    model: Any
    pairs: PairTokenizer
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad(self) -> int:
        return int(self.pairs.tokenizer.pad_token_id)

    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        backbone = self.model.base_model
        for path in LAYER_LISTS:
            try:
                found = backbone.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return found
        raise UserError(f"{self.name}: cannot find the layers of a {type(self.model).__name__}")

    def check_layer(self, layer: int) -> None:
        """Raises UserError unless 1 <= layer <= number of blocks."""
        count = len(self.blocks())
        if not 1 <= layer <= count:
            raise UserError(f"layer {layer} lies past the {count} layers of {self.name}; choose 1..{count}")

    def freeze(self, layers: int) -> None:
        """Leave blocks 1..`layers` and all that runs before them out of training.

        Raises:
            UserError: the model has fewer blocks.
        """
        self.check_layer(layers)
        inside = {id(p) for block in list(self.blocks())[:layers] for p in block.parameters()}
        parameters = list(self.model.parameters())
        last = max(i for i, parameter in enumerate(parameters) if id(parameter) in inside)
        for parameter in parameters[: last + 1]:
            parameter.requires_grad_(False)

    @contextlib.contextmanager
    def behind(self, layer: int, states: Float[Tensor, "n width d"]) -> Iterator[None]:
        """Forward passes inside begin behind block `layer`, whose output is given."""
        blocks = list(self.blocks())[:layer]
        patched = [vars(block).get("forward") for block in blocks]  # by whoever wrapped the model

        def known(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return states.to(hidden)

        for block in blocks:
            block.forward = known
        try:
            yield
        finally:
            for block, before in zip(blocks, patched, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before

    @torch.inference_mode()
    def forward(
        self,
        sequences: Sequence[np.ndarray],
        *,
        layer: int | None = None,
        positions: Sequence[np.ndarray] | None = None,
        rewards: bool = True,
        budget: int = 16_384,
    ) -> Forward:
        """Rewards of token sequences, and the output of block `layer` (1-based) at `positions` of each.

        Sequences are sorted by length and cut into micro-batches of at most `budget` padded tokens; results come back
        in input order. Without `rewards`, the blocks after `layer` do not run.
        """
        scores = torch.zeros(len(sequences)) if rewards else None
        hidden: list[Tensor] | None = [torch.empty(0)] * len(sequences) if layer is not None else None
        for chunk in micro_batches([len(s) for s in sequences], budget):
            logits, states = self._run([sequences[i] for i in chunk], layer, rewards)
            for j, i in enumerate(chunk):
                if scores is not None and logits is not None:
                    scores[i] = logits[j]
                if hidden is not None and states is not None and positions is not None:
                    hidden[i] = states[j, torch.as_tensor(positions[i], dtype=torch.long)].float().cpu()
        return Forward(scores, hidden)

    @torch.inference_mode()
    def head_inputs(self, sequences: Sequence[np.ndarray], budget: int = 16_384) -> Float[Tensor, "n d"]:
        """What the last linear layer, the reward head, reads of each sequence; in input order."""
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise UserError(f"{self.name}: cannot find the reward head of a {type(self.model).__name__}")
        read: list[Tensor] = []
        found = [torch.empty(0)] * len(sequences)
        handle = heads[-1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        try:
            for chunk in micro_batches([len(s) for s in sequences], budget):
                self.model(**pad_batch([sequences[i] for i in chunk], self.pad, self.device))
                values = read.pop().float().cpu()
                for j, i in enumerate(chunk):  # a decoder's head reads every token
                    found[i] = values[j] if values.ndim == 2 else values[j, len(sequences[i]) - 1]
        finally:
            handle.remove()
        return torch.stack(found)

    def _run(
        self, sequences: list[np.ndarray], layer: int | None, rewards: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        batch = pad_batch(sequences, self.pad, self.device)
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            if not rewards:
                raise _LayerReachedError

        handle = self.blocks()[layer - 1].register_forward_hook(catch) if layer is not None else None
        try:
            logits = self.model(**batch).logits[:, 0].float().cpu()
        except _LayerReachedError:
            logits = None
        finally:
            if handle is not None:
                handle.remove()
        return logits, caught[0] if caught else None


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by rising length, cut so that a micro-batch has at most `budget` padded tokens, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def pad_batch(sequences: Sequence[np.ndarray], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`."""
    width = max(1, *(len(s) for s in sequences))
    ids = np.full((len(sequences), width), pad, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def quiet_transformers() -> None:
    """Warnings about freshly made heads and the like are expected here; errors still show."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which warns otherwise
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def resolve_base(base: str) -> tuple[str, str | None]:
    """A checkpoint's folder or hub name, and its revision.

    Raises:
        UserError: no such folder or package.
    """
    if base.startswith("hub:"):
        name, _, revision = base.removeprefix("hub:").partition("@")
        return name, revision or None
    if base.startswith("package:"):
        module, _, folder = base.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(f"{base}: package {module!r} is not installed; install the extra that carries it (`real`)")
        return str(Path(spec.origin).parent / folder), None
    if not (Path(base) / "config.json").is_file():
        raise UserError(f"no model in {base} (config.json is missing); write hub:OWNER/NAME for one on the hub")
    return base, None


def _load_pretrained(base: str, dtype: torch.dtype, trust_remote_code: bool, *, whole: bool) -> tuple[Any, Any]:
    """A model and its tokenizer; `whole` refuses a checkpoint that lacks weights, say those of the reward head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet_transformers()
    path, revision = resolve_base(base)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load a reward model from {base}: {first}") from None
    if whole and found["missing_keys"]:
        raise UserError(
            f"{base} is no reward model: it has no weights for {sorted(found['missing_keys'])[0]}; "
            "train one on it with stage `reward`"
        )
    return model, tokenizer


def _pair_tokenizer(tokenizer: Any, template: str, limit: int, name: str) -> PairTokenizer:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer has neither a pad nor an EOS token; add a pad token to it")
        tokenizer.pad_token = tokenizer.eos_token
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    return PairTokenizer(tokenizer, template, limit)


def _limit(config: Any, max_length: int) -> int:
    """The longest sequence: what was asked for, or what the positions of the model in `config` allow."""
    return min(max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or max_length)


def _wrap(model: Any, tokenizer: Any, template: str, max_length: int, name: str) -> RewardModel:
    pairs = _pair_tokenizer(tokenizer, template, _limit(model.config, max_length), name)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest}, the embedding only {rows} rows; "
            "use the tokenizer that belongs to the model, or resize the embedding"
        )
    return RewardModel(model, pairs, name)


def new_reward_model(config: RewardConfig, texts: Callable[[], Any]) -> RewardModel:
    """The model that training starts from; `texts` yields the training texts, for a tokenizer made on the spot.

    Raises:
        UserError: no such model, or a tokenizer that does not fit it.
    """
    if isinstance(config.base, TinyLlamaConfig):
        model, tokenizer = make_tiny_llama(config.base, texts, config.seed)
        return _wrap(model, tokenizer, "plain", config.max_length, "tiny llama")
    torch.manual_seed(config.seed)
    model, tokenizer = _load_pretrained(config.base, torch.float32, config.trust_remote_code, whole=False)
    return _wrap(model, tokenizer, config.template, config.max_length, config.base)


def load_reward_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """A reward model from a Hugging Face directory, ours or anyone's; on the GPU where this process has one.

    Raises:
        UserError: missing or corrupt files, no reward head, more than one output, or a tokenizer that does not fit.
    """
    model, tokenizer = _load_pretrained(str(directory), dtype, trust_remote_code, whole=True)
    settings = _settings(directory)
    wrapped = _wrap(model, tokenizer, settings["template"], settings["max_length"], directory.name)
    wrapped.model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return wrapped


def _settings(directory: Path) -> dict[str, Any]:
    settings = {"template": "auto", "max_length": 10**9}
    if (directory / SETTINGS).is_file():
        settings |= json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    return settings


def hidden_size(directory: Path) -> int:
    """Width of the hidden states of the model in `directory`, from its config alone."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(str(directory)).get_text_config().hidden_size)


def layer_count(base: str) -> int:
    """Number of blocks of a checkpoint, from its config alone."""
    from transformers import AutoConfig

    path, revision = resolve_base(base)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {base}: {' '.join(str(error).split())[:200]}") from None
    return int(config.get_text_config().num_hidden_layers)


def load_pair_tokenizer(directory: Path) -> PairTokenizer:
    """How the model in `directory` reads pairs, without its weights.

    Raises:
        UserError: no model there, or one that cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    quiet_transformers()
    resolve_base(str(directory))
    settings = _settings(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        limit = _limit(AutoConfig.from_pretrained(str(directory)), settings["max_length"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the tokenizer of {directory}: {' '.join(str(error).split())[:300]}") from None
    return _pair_tokenizer(tokenizer, settings["template"], limit, directory.name)


def save_reward_model(reward: RewardModel, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """A directory that `AutoModelForSequenceClassification.from_pretrained` opens.

    `weights` are whole tensors by name where the model's own are partitioned over a process group.
    """
    settings = {"template": reward.pairs.template, "max_length": reward.pairs.limit}
    with explain_disk_errors(directory):
        reward.model.save_pretrained(directory, state_dict=weights, safe_serialization=True)
        reward.pairs.tokenizer.save_pretrained(directory)
        (directory / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
