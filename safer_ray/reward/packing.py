"""Micro-batches: a pair as one sequence, in which what its sides begin with runs once and the two responses do not see
each other, or as two; and where in them a reward is read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from safer_ray.reward.pretrained import runs_own_code

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")  # causal, and checked to take such a mask


Index = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]  # row and place of tokens in a micro-batch


class Packed(NamedTuple):
    """The chosen side's tokens, then those of the rejected side behind the fork; or one side alone."""

    ids: np.ndarray  # int64 [n]
    position: np.ndarray  # int64 [n], of each token in its own side
    fork: int  # tokens that both sides begin with
    chosen: int  # length of the chosen side
    lengths: tuple[int, ...]  # of the sides

    def places(self, side: int, index: np.ndarray) -> np.ndarray:
        """Return where tokens of a side (0 chosen, 1 rejected) lie in the packed sequence."""
        return index if side == 0 else np.where(index < self.fork, index, index - self.fork + self.chosen)

    def side(self, side: int) -> np.ndarray:
        """The token ids of a side."""
        return self.ids[self.places(side, np.arange(self.lengths[side]))]


def fork_of(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Return how many tokens both sides begin with."""
    shorter = min(len(chosen), len(rejected))
    different = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    return int(different[0]) if len(different) else shorter


def pack(chosen: np.ndarray, rejected: np.ndarray) -> Packed:
    """Token ids of both sides as one sequence."""
    fork = fork_of(chosen, rejected)
    ids = np.concatenate([chosen, rejected[fork:]])
    position = np.concatenate([np.arange(len(chosen)), np.arange(fork, len(rejected))])
    return Packed(ids, position, fork, len(chosen), (len(chosen), len(rejected)))


def alone(ids: np.ndarray) -> Packed:
    """One side as a sequence of its own."""
    return Packed(ids, np.arange(len(ids)), len(ids), len(ids), (len(ids),))


def pack_batch(packed: Sequence[Packed], pad: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
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
    """Return how far back the shortest-sighted layer of a model looks; None: to the beginning."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", None) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def packs(config: Any) -> bool:
    """Whether pairs of a model can be packed: it is causal, and known to take a mask and positions of its caller's."""
    known = config.model_type in FAMILIES and not runs_own_code(config)
    return known and not getattr(config, "use_bidirectional_attention", None)


def has_dropout(model: nn.Module) -> bool:
    """Whether a model in training would drop what it computes at random."""
    return any(
        getattr(module, "p", 0) > 0 if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0) > 0
        for module in model.modules()
        if isinstance(module, nn.Dropout) or isinstance(getattr(module, "attention_dropout", None), float)
    )


def how_pairs_run(config: Any) -> str:
    """Return whether pairs are packed, in a line."""
    if not packs(config):
        return f"the sides of a pair run apart, since a {config.model_type} is not known to take them as one sequence"
    window = smallest_window(config)
    return f"pairs run packed, as one sequence each{f' up to {window} tokens a side' if window else ''}"


def last_token(ids: np.ndarray, pad: int | None) -> int:
    """Whose state the reward is read from: the last token that is not the pad token, as transformers finds it; where a
    model has none, the last."""
    if pad is None:
        return max(0, len(ids) - 1)
    real = np.flatnonzero(ids != pad)
    return int(real[-1]) if len(real) else 0


def pad_batch(sequences: Sequence[np.ndarray], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`."""
    width = max(1, *(len(s) for s in sequences))
    ids = np.full((len(sequences), width), pad, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def place_index(rows: Sequence[Packed], positions: Sequence[Sequence[np.ndarray]], device: torch.device) -> Index:
    """Return where positions, of every row and side, lie in a micro-batch."""
    each = [
        (j, row.places(side, at)) for j, row in enumerate(rows) for side, at in enumerate(positions[j]) if len(at) > 0
    ]
    row = np.repeat([j for j, _ in each], [len(at) for _, at in each]).astype(np.int64)
    place = np.concatenate([at for _, at in each]) if each else row
    return torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)


def end_index(rows: Sequence[Packed], pad: int | None, device: torch.device) -> Index:
    """Return where the token of each side lies that its reward is read from."""
    ends = [[np.array([last_token(row.side(side), pad)]) for side in range(len(row.lengths))] for row in rows]
    return place_index(rows, ends, device)
