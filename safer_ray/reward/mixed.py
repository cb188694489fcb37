"""A reward model in 16 bits: its products are, while its head and, in the families that are checked, the states that
blocks add to and the norms that read these stay in float32, since errors there would add up over all blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from safer_ray.reward.loaded import is_of_head
from safer_ray.reward.model import RewardModel
from safer_ray.reward.pretrained import is_known


def keep_exact(reward: RewardModel) -> None:
    """Have what a model of 16 bits keeps in float32 handed on from module to module, each of which is given the dtype
    of its weights."""
    for name, module in reward.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(is_of_head(f"{name}.{weight}", reward.model) for weight in own):
            _give_own_dtype(module)
    if not is_known(reward.model.config):
        return
    reward.model.get_input_embeddings().register_forward_hook(_as_float32)
    for block in reward.blocks():
        for part in block.children():
            if any(weight.ndim > 1 for weight in part.parameters()):  # no norm
                _give_own_dtype(part)


def _as_float32(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _give_own_dtype(module: nn.Module) -> None:
    dtype = next(module.parameters()).dtype

    def change(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.float32:  # its minimum would be infinite
            named = named | {"attention_mask": mask.clamp(min=torch.finfo(dtype).min)}
        return _in_dtype(inputs, dtype), _in_dtype(named, dtype)

    module.register_forward_pre_hook(change, with_kwargs=True)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return what a module is given, its floats in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(_in_dtype(each, dtype) for each in value)
    return {name: _in_dtype(each, dtype) for name, each in value.items()} if isinstance(value, dict) else value
