"""Open a checkpoint without holding its weights: they stay in their files, mapped into memory in the dtype they have.

transformers maps safetensors, and copies what it converts. What is opened here is converted later, tensor by tensor, by
whoever keeps a share of each (`safer_ray.distributed.partition`); only the layers behind the blocks are at once what
they are to be, since they are drawn anew, weighed and enlarged before that.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from safer_ray.errors import UserError
from safer_ray.reward.bases import folder_of
from safer_ray.reward.folder import weight_files
from safer_ray.reward.loaded import is_of_head
from safer_ray.reward.packing import can_pack
from safer_ray.reward.pretrained import Checkpoint, runs_own_code

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
WHOLE = ("F64", "F32")
log = logging.getLogger(__name__)


def mapped_dtype(checkpoint: Checkpoint, config: Any, *, runs: bool = False) -> torch.dtype:
    """Return the dtype to open a checkpoint in that is to be float32 later, and whose weights stay in their files
    until then: float32 where they are that, or where they cannot stay, as of one of which blocks run before."""
    kinds, why = set(WHOLE), None
    if checkpoint.is_gguf or checkpoint.adapter is not None or checkpoint.reads_bin:
        why = "its weights are not safetensors of a whole model"
    elif runs_own_code(config) or getattr(config, "quantization_config", None):
        why = "its code is its own, or its weights are quantised"
    elif not (kinds := _kinds(checkpoint)):
        why = "its files are not here yet"
    elif kinds <= set(WHOLE):
        pass
    elif runs or not can_pack(config):
        why = "its frozen blocks run before" if runs else "it has to be run to see how it reads a batch"
    elif len(kinds) > 1 or not kinds <= HALVES.keys():
        why = f"its weights are of several dtypes ({', '.join(sorted(kinds))})"
    if why is not None:
        log.warning("%s: every worker holds it whole while it is loaded, since %s", checkpoint.name, why)
    return torch.float32 if why or kinds <= set(WHOLE) else HALVES[kinds.pop()]


def _kinds(checkpoint: Checkpoint) -> set[str]:
    """Return the floating-point dtypes of a checkpoint's weights; none where its files are elsewhere."""
    found: set[str] = set()
    try:
        files = weight_files(folder_of(checkpoint))
    except UserError:
        return found
    for file, names in files.items():
        if not Path(file).is_file():
            return set()
        with safe_open(file, framework="pt") as tensors:
            found.update(tensors.get_slice(name).get_dtype() for name in names or tensors.keys())
    return {kind for kind in found if "F" in kind}


def head_in_float32(
    open_with: Callable[[int], tuple[Any, dict[str, Any]]],
) -> Callable[[int], tuple[Any, dict[str, Any]]]:
    """Return `open_with`, whose model then has the layers behind its blocks in float32, new ones drawn as they would be
    had all of it been opened in that."""

    def opened(outputs: int) -> tuple[Any, dict[str, Any]]:
        before = torch.get_rng_state()
        model, found = open_with(outputs)
        for name, parameter in model.named_parameters():
            if is_of_head(name, model):
                parameter.data = parameter.data.float()
        drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
        new = [name for name in model.state_dict() if name in drawn and is_of_head(name, model)]
        if new:
            torch.set_rng_state(before)
            _draw(model, new)
        return model, found

    return opened


@torch.no_grad()
def _draw(model: Any, names: list[str]) -> None:
    """Draw tensors again, by the model's own rule for the layers that hold them; others of these layers stay."""
    owners: dict[str, nn.Module] = {
        name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in names
    }
    for place, layer in owners.items():
        kept = {n: p.clone() for n, p in layer.named_parameters(recurse=False) if f"{place}.{n}" not in names}
        for parameter in layer.parameters(recurse=False):
            vars(parameter).pop("_is_hf_initialized", None)  # by which transformers leaves alone what it has read
        model._init_weights(layer)
        for name, tensor in kept.items():
            layer.get_parameter(name).copy_(tensor)
