"""Compare the weights of a checkpoint with those of its model: refuse what is missing, tell what is of no use."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch

from safer_ray.errors import UserError

SAMPLE = 4096  # entries of a tensor that are looked at before all are
WRAPPERS = {  # words in the names of tensors that a wrapper of the model leaves there
    "_orig_mod": "of a model that was compiled",
    "module": "of a model in DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "of a model in FSDP",
    "_checkpoint_wrapped_module": "of a model with wrapped activation checkpoints",
    "_forward_module": "of a model in Lightning Fabric",
}
ADAPTER_NAMES = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\b|\bbase_model\.model\.")
QUANTISED_NAMES = re.compile(r"\.(?:qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_scale|weight_packed|scales)\b")
MADE_AGAIN = re.compile(r"(?:inv_freq|position_ids|masked_bias|attn\.bias)$")  # by models themselves
LANGUAGE_HEAD = re.compile(r"^(?:lm_head|embed_out|cls\.|generator_predictions|vocab_|mlm)")
HEAD_NAMES = re.compile(r"score|head|classifier|regression|reward|logits|pooler|gating|out_proj")
log = logging.getLogger(__name__)


def is_of_head(weight: str, model: Any) -> bool:
    """Return whether a tensor belongs to what stands behind the blocks of a model, which training makes anew."""
    prefix = model.base_model_prefix
    if not prefix or getattr(model, prefix, None) is None:  # code of a checkpoint's own, which may say nothing
        return bool(HEAD_NAMES.search(weight))
    return not weight.startswith(f"{prefix}.") or ".pooler." in weight


def outputs_of_head(model: Any, found: dict[str, Any]) -> int | None:
    """Return how many outputs the head in a checkpoint has, where they are not those of its model."""
    for weight, has, wanted in sorted(found["mismatched_keys"]):
        if is_of_head(weight, model) and len(has) == len(wanted) and tuple(has[1:]) == tuple(wanted[1:]):
            return int(has[0])
    return None


def check_loaded(name: str, model: Any, found: dict[str, Any], *, whole: bool) -> None:
    """Compare what a checkpoint held with what its model has; of a head with other outputs nothing is said.

    Raises:
        UserError: weights would be drawn by chance: those of another shape, or missing ones; those of the head count
            only where it has to be `whole`. Or a tensor has no finite value.
    """
    outputs = outputs_of_head(model, found)
    for weight, has, wanted in sorted(found["mismatched_keys"]):
        if outputs and is_of_head(weight, model):
            continue
        if 0 in has:
            raise UserError(
                f"{name}: {weight} is empty, as DeepSpeed's stage 3 saves it; gather the weights, and save again"
            )
        raise UserError(f"{name}: {weight} is {tuple(has)}, by config.json {tuple(wanted)}; copy both files again")
    for weight, reason in sorted((found.get("conversion_errors") or {}).items()):
        raise UserError(f"{name}: {weight} cannot be converted: {' '.join(str(reason).split())[:200]}")
    missing = sorted(found["missing_keys"])
    strange = sorted(weight for weight in found["unexpected_keys"] if not MADE_AGAIN.search(weight))
    if inside := [weight for weight in missing if not is_of_head(weight, model)]:
        raise UserError(f"{name} has no weights for {inside[0]} ({len(inside)} such){_instead(inside, strange)}")
    if missing and whole:
        raise UserError(
            f"{name} is no reward model: it has no weights for {missing[0]}{_no_head(model.config, strange)}"
        )
    if missing:
        log.info("%s has no reward head: %s is new", name, missing[0])
    _tell_left_out(name, model, strange)
    for weight, tensor in _tensors(model):
        if not _any_finite(tensor):
            raise UserError(f"{name}: {weight} is NaN or infinite all over; copy the model again, or train it again")


def _instead(inside: list[str], strange: list[str]) -> str:
    """Return what stands in a checkpoint in the place of weights that it lacks, and the remedy."""
    if not strange:
        return "; copy all of its files again"
    first = strange[0]
    for weight in strange:
        if words := [word for word in weight.split(".") if word in WRAPPERS and f".{word}." not in f".{inside[0]}"]:
            return (
                f", but for {weight}: `{words[0]}.` is in the names {WRAPPERS[words[0]]}; load the file with "
                f"safetensors, take it off the names, and save it again"
            )
        if ADAPTER_NAMES.search(weight):
            return (
                f", but for {weight}, of an adapter of peft; merge it into the model (merge_and_unload), and save again"
            )
        if QUANTISED_NAMES.search(weight):
            return (
                f", but for {weight}, which is quantised, though config.json names no quantization_config; pass the "
                "model as it was before"
            )
    prefix = _prefix(inside, strange)
    return f", but for {first}" + (
        f": its names begin with `{prefix}`; take that off, and save it again" if prefix else "; rename them"
    )


def _prefix(inside: list[str], strange: list[str]) -> str | None:
    for weight in strange:
        for wanted in inside:
            tail = wanted.partition(".")[2]
            for end in (wanted, tail):
                if end and weight.endswith(f".{end}"):
                    return weight.removesuffix(end)
    return None


def _no_head(config: Any, strange: list[str]) -> str:
    """Return what a checkpoint without a reward head is, and the remedy."""
    (kind,) = getattr(config, "architectures", None) or (None,)
    heads = [weight for weight in strange if not LANGUAGE_HEAD.match(weight)]
    if heads:
        return f", but for {heads[0]}, which a {config.model_type} does not use; rename it if it is the head"
    end = "train one on it with stage `reward`"
    if kind and kind.endswith(("ForCausalLM", "LMHeadModel")):
        return f", since a {kind} writes text, and a judge that writes its verdict cannot be read; {end}"
    if kind and "ForConditionalGeneration" in kind:
        return f", since a {kind} writes text, which cannot be read as a reward; pass a sequence classifier"
    return f"; {end}"


def _tell_left_out(name: str, model: Any, strange: list[str]) -> None:
    expected = [weight for weight in strange if LANGUAGE_HEAD.match(weight)]
    other = [weight for weight in strange if not LANGUAGE_HEAD.match(weight)]
    kind = type(model).__name__
    if expected:
        log.info("%s: %s is not read, since a %s has no use for it", name, expected[0], kind)
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        log.warning("%s: tensors that a %s has no use for are left out: %s%s", name, kind, ", ".join(other[:3]), more)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for weight, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            yield weight, tensor.detach()


def _any_finite(tensor: torch.Tensor) -> bool:
    flat = tensor.reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLE)]
    return bool(torch.isfinite(sample).any()) or bool(torch.isfinite(flat).any())
