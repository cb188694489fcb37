"""A pair as one sequence: what its sides begin with runs once, and the two responses do not see each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")  # causal, and checked to take such a mask


class PackedPair(NamedTuple):
    """The chosen side's tokens, then those of the rejected side behind the fork."""

    ids: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n], of each token in its own side
    fork: int  # tokens that both sides begin with
    chosen: int  # length of the chosen side

    def places(self, side: int, index: np.ndarray) -> np.ndarray:
        """Where tokens of a side (0 chosen, 1 rejected) lie in the packed sequence."""
        return index if side == 0 else np.where(index < self.fork, index, index - self.fork + self.chosen)


def pack(chosen: np.ndarray, rejected: np.ndarray) -> PackedPair:
    """Token ids of both sides as one sequence."""
    shorter = min(len(chosen), len(rejected))
    different = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    fork = int(different[0]) if len(different) else shorter
    ids = np.concatenate([chosen, rejected[fork:]])
    return PackedPair(ids, np.concatenate([np.arange(len(chosen)), np.arange(fork, len(rejected))]), fork, len(chosen))


def pack_batch(packed: Sequence[PackedPair], pad: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Right-padded inputs of a causal backbone. The mask is a float one, 0 and the dtype's minimum, [n, 1, width,
    width]: models with soft-capped attention read a boolean mask wrongly."""
    width = max(len(p.ids) for p in packed)
    ids = np.full((len(packed), width), pad, dtype=np.int64)
    position = np.zeros((len(packed), width), dtype=np.int64)
    for row, pair in enumerate(packed):
        ids[row, : len(pair.ids)] = pair.ids
        position[row, : len(pair.ids)] = pair.position
    place = torch.arange(width, device=device)
    fork = torch.tensor([p.fork for p in packed], device=device)[:, None]
    chosen = torch.tensor([p.chosen for p in packed], device=device)[:, None]
    behind = place >= chosen  # the rejected side's own tokens, and padding
    hidden = (place >= fork) & ~behind  # the chosen side's own
    seen = (place[:, None] >= place) & ~(behind[:, :, None] & hidden[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "position_ids": torch.from_numpy(position).to(device),
        "attention_mask": mask[:, None],
    }


def smallest_window(config: Any) -> int | None:
    """How far back the shortest-sighted layer of a model looks; None: to the beginning."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", None) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def packs(config: Any) -> bool:
    """Whether pairs of a model can be packed: it is causal, and known to take a mask and positions of its caller's."""
    return config.model_type in FAMILIES and not getattr(config, "use_bidirectional_attention", None)
