"""Open configs, tokenizers and models of checkpoints, and decide whose Python may run.

A checkpoint can bring code of its own, which `auto_map` in its JSON names. It runs where its user said so, and nowhere
else: no other module calls `from_pretrained` of transformers' Auto classes, which would ask whoever sits at a terminal.
"""

import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.data.hub import what_the_hub_said
from safer_ray.errors import UserError
from safer_ray.reward.blocks import keep_blocks, lies_behind
from safer_ray.reward.folder import CONFIG, TOKENIZER_CONFIG, check_values, check_vocabulary, has_vocabulary, words_of
from safer_ray.reward.gguf import gguf_config, gguf_options, gguf_tokenizer, is_gguf, open_gguf, strange_tensors

CLASSIFIER = "AutoModelForSequenceClassification"
TOKEN_CLASSIFIER = "AutoModelForTokenClassification"
ANY_MODEL = "AutoModel"
NO_ADAPTER = {"subfolder": "no-adapter"}  # where transformers looks for one of peft, which it loads unasked
PAIRWISE = re.compile(r"PairRM|PairRanker|[Pp]airwise")  # classes of models that read two responses at once
FAMILIES = (  # causal, and checked to take such a mask
    *("arcee", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "hunyuan_v1_dense", "llama"),
    *("ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A folder, a GGUF file or a name on the hub, what errors call it, and whether its user trusts the code in it."""

    name: str
    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    bin_weights: bool = False  # whether pickled ones are read where there are no others
    adapter: Path | None = None  # the folder of one, that is merged into it
    base: str = ""  # what an adapter's base is called

    @property
    def is_plain(self) -> bool:
        """Return whether it is a folder of one whole model in safetensors, or a name on the hub."""
        return not (self.is_gguf or self.adapter or self.reads_bin)

    @property
    def reads_bin(self) -> bool:
        return self.bin_weights and Path(self.path).is_dir() and not any(Path(self.path).glob("*.safetensors"))

    @property
    def vocabulary(self) -> tuple[str, str | None]:
        """Return where its tokenizer is, and of which revision: an adapter may bring one."""
        if self.adapter is not None and has_vocabulary(self.adapter):
            return str(self.adapter), None
        return self.path, self.revision

    @property
    def is_gguf(self) -> bool:
        return is_gguf(self.path)


class OwnCode(NamedTuple):
    """The classes of its own that a checkpoint needs, as `module.Class`; None: transformers' class opens it."""

    config: str | None
    tokenizer: str | None
    classifier: str | None


def open_config(checkpoint: Checkpoint, failed: str = "cannot read the config of") -> Any:
    """The config of a checkpoint.

    Raises:
        UserError: there is none that can be read, which begins with `failed`; or the checkpoint brings code that is not
            trusted.
    """
    from transformers import AutoConfig

    if checkpoint.is_gguf:
        return _explained(checkpoint, failed, lambda: gguf_config(AutoConfig, Path(checkpoint.path)))
    return _open(AutoConfig, checkpoint, failed, bool(check_trusted(checkpoint).config))


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint; raises as `open_config`, and where there is none."""
    from transformers import AutoTokenizer

    failed = "cannot read the tokenizer of"
    path, revision = checkpoint.vocabulary
    if is_gguf(path):
        return _explained(checkpoint, failed, lambda: gguf_tokenizer(AutoTokenizer, Path(path)))
    config, own = open_config(checkpoint, failed), check_trusted(checkpoint)
    if Path(path).is_dir() and not own.tokenizer:
        check_vocabulary(Path(path))
    reader = checkpoint._replace(path=path, revision=revision)
    return _open(AutoTokenizer, reader, failed, bool(own.tokenizer), config=config)


def open_classifier(
    checkpoint: Checkpoint, outputs: int | None = 1, *, blocks: int | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The classifier of so many outputs in a checkpoint (None: as many as its config says), of its first `blocks` alone
    if they are given, and what transformers says of loading it.

    Weights are safetensors, or a GGUF file's; raises as `open_config`.
    """
    import transformers

    config, own = open_config(checkpoint), check_trusted(checkpoint)
    if blocks is not None:
        config = keep_blocks(config, 0, blocks)
    if outputs is not None:
        set_outputs(config, outputs)
    check_config_runs(checkpoint.name, config)
    auto = getattr(transformers, _auto_class(config))
    if not own.classifier and type(config) not in auto._model_mapping:
        raise UserError(
            f"cannot load a reward model from {checkpoint.name}: transformers has no {_auto_class(config)} of a "
            f"{config.model_type}; pass a model of another family, or one whose own code is one (trust_remote_code)"
        )
    # None: transformers takes pickled weights where there are no others, and reads them with weights_only=True.
    options |= {"config": config, "use_safetensors": None if checkpoint.bin_weights else True}
    options |= {"adapter_kwargs": NO_ADAPTER}
    dtype = options.get("dtype")
    if checkpoint.adapter is not None:
        options["dtype"] = "float32"  # in which it is merged
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # whoever called looks at them
    options |= gguf_options() if checkpoint.is_gguf else {}
    if checkpoint.adapter is None and is_mixed(config, dtype):
        auto = in_16_bits(auto._model_mapping[type(config)], config)
    model, found = _open(auto, checkpoint, "cannot load a reward model from", bool(own.classifier), **options)
    strange = set(found["unexpected_keys"])
    if checkpoint.is_gguf:
        strange |= strange_tensors(Path(checkpoint.path), model)
    if blocks is not None:
        strange = {tensor for tensor in strange if not lies_behind(tensor, blocks)}
    found = {**found, "unexpected_keys": strange}
    if checkpoint.adapter is None:
        return model, found
    from safer_ray.reward.adapters import merge_adapter  # here, since it imports torch

    model, found = merge_adapter(checkpoint.name, checkpoint.base, model, found, checkpoint.adapter, blocks)
    if dtype is None:
        return model, found
    return lower_trunk(model, dtype) if is_mixed(config, dtype) else model.to(dtype), found


def is_mixed(config: Any, dtype: Any) -> bool:
    """Return whether a part of a model stays in float32 (`mixed.py`) where it is loaded in a dtype of torch: one of 16
    bits, and the model is of a class of transformers' own, and not quantised."""
    halves = dtype is not None and dtype.itemsize < 4
    return halves and not runs_own_code(config) and not getattr(config, "quantization_config", None)


def in_16_bits(kind: Any, config: Any) -> Any:
    """Return a class of models that is this one, but loads its head, and in a checked family the norms of blocks, in
    float32 whatever dtype it is asked for."""
    kept = {*(kind._keep_in_fp32_modules_strict or ()), *exact_names(kind.base_model_prefix, config)}
    return type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": kept, "__module__": kind.__module__})


def without_weights(checkpoint: Checkpoint, blocks: int | None = None) -> Any:
    """Return the classifier in a checkpoint, of its first `blocks` alone if they are given, on the meta device: its
    modules and no numbers; None where it runs code of the checkpoint's own. Raises as `open_config`."""
    import torch
    import transformers

    config = open_config(checkpoint)
    if runs_own_code(config):
        return None
    if blocks is not None:
        config = keep_blocks(config, 0, blocks)
    auto = getattr(transformers, _auto_class(config))
    if type(config) not in auto._model_mapping:  # told when it is opened
        return None
    with torch.device("meta"):
        return auto.from_config(config)


def exact_names(trunk: str, config: Any) -> tuple[str, ...]:
    """Return patterns of the names of weights that stay in float32, in a model that calls its trunk so."""
    head = rf"^(?!{trunk}\.)", r"\.pooler\."
    # Without an asterisk, of which transformers makes `.*`; norms inside of attention read no states.
    return (*head, rf"^{trunk}\.(?:layers\.\d+\.)?[^.]{{0,}}norm\.") if is_known(config) else head


def lower_trunk(model: Any, dtype: Any) -> Any:
    """Return a model with its trunk's weights in a dtype, as one that was loaded in it has them."""
    exact = re.compile("|".join(exact_names(model.base_model_prefix, model.config)))
    for name, parameter in model.named_parameters():
        if not exact.search(name):
            parameter.data = parameter.data.to(dtype)
    return model


def is_known(config: Any) -> bool:
    """Return whether a model is of a checked family, whose head is one layer behind the last block's norm."""
    # A checkpoint may bring a class of its own under a known model_type, whose attention nobody has checked.
    return config.model_type in FAMILIES and not runs_own_code(config)


def set_outputs(config: Any, outputs: int) -> None:
    """Give a config so many outputs, and no kind of loss: training here has its own, and transformers opens no config
    that calls one output classes of a single label."""
    config.problem_type = None
    config.num_labels = outputs


def _auto_class(config: Any) -> str:
    own = _own_classifier(getattr(config, "auto_map", None), type(config).__module__.startswith("transformers."))
    if own:
        return own[0]
    return TOKEN_CLASSIFIER if reads_every_token(config) else CLASSIFIER


def reads_every_token(config: Any) -> bool:
    """Return whether a checkpoint holds a classifier of tokens, of which the last one's output is the reward."""
    kinds = getattr(config, "architectures", None) or ()
    return any(kind.endswith("ForTokenClassification") for kind in kinds) and not runs_own_code(config)


def check_config_runs(name: str, config: Any) -> None:
    """See that a model of this config can be run here, as one that reads a response.

    Raises:
        UserError: it asks for an attention that takes no masks of packed pairs, or for a package that is not here to
            read its quantised weights; or it compares responses.
    """
    kinds = [str(kind) for kind in getattr(config, "architectures", None) or ()]
    if getattr(config, "ranker_type", None) or any(PAIRWISE.search(kind) for kind in kinds):
        raise UserError(
            f"{name} compares two responses with each other ({', '.join(kinds)}), and gives none a reward of its own; "
            "pass a model that reads one response"
        )
    asked = getattr(config, "_attn_implementation", None)
    if asked not in (None, "eager", "sdpa"):
        raise UserError(
            f"{name}: its config.json asks for the attention {asked}, which is not read here; delete "
            "attn_implementation from it: the attention that comes with torch gives the same rewards"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        from transformers.quantizers import AutoHfQuantizer

        tree = quantised if isinstance(quantised, dict) else quantised.to_dict()
        kind = tree.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in tree or "load_in_8bit" in tree else "?")
        try:
            AutoHfQuantizer.from_config(dict(tree), pre_quantized=True).validate_environment(device_map=None)
        except Exception as error:  # noqa: BLE001 - each method's package raises its own
            words = " ".join(str(error).split())[:200].rstrip(".")
            raise UserError(
                f"{name}: its weights are quantised ({getattr(kind, 'value', kind)}): {words}; or pass the model as it "
                "was before"
            ) from None


def runs_own_code(config: Any) -> bool:
    """Return whether a model of this config is of a class that came with its checkpoint, of which nothing is known."""
    known = type(config).__module__.startswith("transformers.")
    return _own_classifier(getattr(config, "auto_map", None), known) is not None


def _own_classifier(auto_map: Any, known: bool) -> tuple[str, str] | None:
    """Return the Auto class under which a checkpoint names a reward model of its own, and what it names there; `known`
    is whether transformers has the family itself, whose class is then read unless this one says that it gives rewards.
    """
    named = auto_map if isinstance(auto_map, dict) else {}
    if CLASSIFIER in named:
        return CLASSIFIER, named[CLASSIFIER]
    if ANY_MODEL in named and (not known or "Reward" in str(named[ANY_MODEL])):
        return ANY_MODEL, named[ANY_MODEL]
    return None


def own_code(checkpoint: Checkpoint) -> list[str]:
    """The classes of its own without which a checkpoint cannot be opened, as `module.Class`; nothing is run."""
    return [name for name in _own_code(checkpoint) if name]


def _open(auto: Any, checkpoint: Checkpoint, failed: str, own_code: bool, **options: Any) -> Any:
    def opened() -> Any:
        if checkpoint.is_gguf:
            return open_gguf(auto, Path(checkpoint.path), **options)
        return auto.from_pretrained(
            checkpoint.path, revision=checkpoint.revision, trust_remote_code=own_code, **options
        )

    return _explained(checkpoint, failed, opened)


def _explained(checkpoint: Checkpoint, failed: str, opened: Callable[[], Any]) -> Any:
    try:
        return opened()
    except Exception as error:  # code of a checkpoint's own may raise anything
        raise UserError(_said(checkpoint, error) or f"{failed} {checkpoint.name}: {words_of(error)}") from error


def _said(checkpoint: Checkpoint, error: BaseException) -> str | None:
    """Return what the hub said of a checkpoint that is looked for there."""
    return None if Path(checkpoint.path).exists() else what_the_hub_said(checkpoint.name, error)


def check_trusted(checkpoint: Checkpoint) -> OwnCode:
    """The code that opening a checkpoint runs.

    Raises:
        UserError: there is some, and its user did not say that it may run.
    """
    own = _own_code(checkpoint)
    if any(own) and not checkpoint.trust_remote_code:
        names = ", ".join(filter(None, own))
        raise UserError(
            f"{checkpoint.name} brings Python code of its own ({names}); none of it was run, since trust_remote_code "
            "is off: set it (reward.trust_remote_code, --trust-remote-code) only if you trust that code"
        )
    return own


def _own_code(checkpoint: Checkpoint) -> OwnCode:
    """Return what the JSON of a checkpoint says; nothing of it is run.

    A class that transformers has itself is preferred to one of the same family in the checkpoint, whether that is
    trusted or not, so that trust never changes a number; but a classifier or a tokenizer of its own is another one.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name, path, revision = checkpoint.name, checkpoint.path, checkpoint.revision
    place, own_revision = checkpoint.vocabulary
    config: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    try:
        if not checkpoint.is_gguf:
            config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if not is_gguf(place):
            tokenizer = get_tokenizer_config(place, revision=own_revision)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(_said(checkpoint, error) or f"cannot read the config of {name}: {words}") from None
    check_values(f"{name}/{CONFIG}", config)
    check_values(f"{name}/{TOKENIZER_CONFIG}", tokenizer)
    named = _mapping(config.get("auto_map"), "AutoConfig")
    kind = str(config.get("model_type"))
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind].__module__.startswith("transformers.")
    own = _own_classifier(named, known)
    classifier = own[1] if own else None
    reader = _mapping(tokenizer.get("auto_map"), "AutoTokenizer").get("AutoTokenizer")
    if isinstance(reader, list | tuple):  # slow and fast
        reader = next(filter(None, reversed(reader)), None)
    if known and named and not classifier:
        _say_known(name, kind)
    return OwnCode(None if known and not classifier else named.get("AutoConfig"), reader, classifier)


def _mapping(value: Any, alone: str) -> dict[str, Any]:
    """`auto_map`, which in older files is what stands at the key `alone` of newer ones."""
    return value if isinstance(value, dict) else {alone: value} if value else {}


@cache
def _say_known(name: str, kind: str) -> None:
    log.warning("%s names Python code of its own for a %s; transformers' own class is used", name, kind)
