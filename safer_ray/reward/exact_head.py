"""The reward head in float32, behind a trunk that computes in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn

from safer_ray.reward.loaded import is_of_head


def lower_trunk(model: Any, dtype: torch.dtype) -> Any:
    """Return a model with its trunk's weights in a dtype, as one of `pretrained.with_exact_head` has them."""
    for name, parameter in model.named_parameters():
        if not is_of_head(name, model):
            parameter.data = parameter.data.to(dtype)
    return model


def hand_in_float32(model: Any) -> None:
    """Have what the head of a model reads put into the dtype of its weights: the trunk before it gives 16 bits."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(is_of_head(f"{name}.{weight}", model) for weight in own):
            module.register_forward_pre_hook(_in_dtype_of_weights)


def _in_dtype_of_weights(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters(recurse=False)).dtype
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )
