"""Cut a model's weights into one share for each worker (ZeRO stage 3), tensor by tensor.

Rajbhandari et al. 2020, arXiv 1910.02054. Of a model whose weights are mapped from files no worker ever holds more than
its shares and one whole tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class _Arriving(nn.Module):
    """Hands the parameters of a model over one by one, each whole and in one dtype: the first worker's, which the
    others are sent, comes from where it lies."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._parameters_of_model = [*model.parameters()]
        self._dtype = dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        first = torch.distributed.get_rank() == 0
        # All go through one piece of memory: pieces that come and go among shares that stay would leave holes, which
        # came to a quarter of a model. And what is written into a mapped tensor would stay as long as its file is open.
        whole = torch.empty(max((p.numel() for p in self._parameters_of_model), default=0), dtype=self._dtype)
        for parameter in self._parameters_of_model:
            place = whole[: parameter.numel()].view(parameter.shape)
            if first:
                place.copy_(parameter.data)
            parameter.data = place
            yield parameter


def partition(model: nn.Module, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Cut the parameters of a model in place, by a configuration of DeepSpeed; called by all workers, whose models are
    alike."""
    import deepspeed

    deepspeed.zero.Init(module=_Arriving(model, dtype), config_dict_or_path=config, dtype=dtype)
