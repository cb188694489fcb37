"""Rows of a micro-batch: a pair as one sequence, in which what its sides begin with runs once and the two responses do
not see each other, or a side as one; and where in them a reward is read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from safer_ray.reward.pretrained import is_known

Index = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]  # row and column of tokens in a micro-batch


class Packed(NamedTuple):
    """The chosen side's tokens, then those of the rejected side behind the fork; or one side alone."""

    ids: np.ndarray  # int64 [n]
    position_ids: np.ndarray  # int64 [n], of each token in its own side
    fork: int  # tokens that both sides begin with
    chosen: int  # length of the chosen side
    lengths: tuple[int, ...]  # of the sides
    types: np.ndarray | None = None  # int64 [n], token types, of a row that is one side

    def columns(self, side: int, positions: np.ndarray) -> np.ndarray:
        """Return where tokens of a side (0 chosen, 1 rejected), given by their positions in it, lie in this row."""
        # The chosen side lies as it is; of the rejected one only what follows the fork was laid behind it.
        if side == 0:
            return positions
        return np.where(positions < self.fork, positions, positions - self.fork + self.chosen)

    def side_ids(self, side: int) -> np.ndarray:
        """Return the token ids of a side."""
        return self.ids[self.columns(side, np.arange(self.lengths[side]))]


def fork_of(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Return how many tokens both sides begin with."""
    shorter = min(len(chosen), len(rejected))
    different = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    return int(different[0]) if len(different) else shorter


def pack(chosen: np.ndarray, rejected: np.ndarray) -> Packed:
    """Return both sides as one sequence."""
    fork = fork_of(chosen, rejected)
    ids = np.concatenate([chosen, rejected[fork:]])
    # The rejected tokens go on counting at the fork, as if the chosen ones were not there.
    position_ids = np.concatenate([np.arange(len(chosen)), np.arange(fork, len(rejected))])
    return Packed(ids, position_ids, fork, len(chosen), (len(chosen), len(rejected)))


def unpacked(ids: np.ndarray, types: np.ndarray | None = None) -> Packed:
    """Return one side as a sequence of its own."""
    return Packed(ids, np.arange(len(ids)), len(ids), len(ids), (len(ids),), types)


def pack_batch(packed: Sequence[Packed], pad: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return right-padded inputs of a causal backbone.

    The mask is a float one, 0 and the dtype's minimum, [n, 1, width, width]: models with soft-capped attention read a
    boolean mask wrongly.
    """
    width = max(len(p.ids) for p in packed)
    ids = np.full((len(packed), width), pad, dtype=np.int64)
    position_ids = np.zeros((len(packed), width), dtype=np.int64)
    for row, pair in enumerate(packed):
        ids[row, : len(pair.ids)] = pair.ids
        position_ids[row, : len(pair.ids)] = pair.position_ids
    column = torch.arange(width, device=device)
    fork = torch.tensor([p.fork for p in packed], device=device)[:, None]
    chosen = torch.tensor([p.chosen for p in packed], device=device)[:, None]
    # Three kinds of columns: shared (before the fork), the chosen side's own, the rejected side's own. A causal mask
    # already keeps chosen tokens from rejected ones, which lie behind; what is missing is the other direction.
    of_rejected = column >= chosen  # the rejected side's own tokens, and padding
    of_chosen = (column >= fork) & ~of_rejected  # the chosen side's own
    causal = column[:, None] >= column
    seen = causal & ~(of_rejected[:, :, None] & of_chosen[:, None, :])
    # Not minus infinity: a row that sees nothing would be NaN under softmax. No row here does, but a backbone may add
    # its own mask to this one.
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "position_ids": torch.from_numpy(position_ids).to(device),
        "attention_mask": mask[:, None],
    }


def smallest_window(config: Any) -> int | None:
    """Return the smallest attention window of any layer of a model, in tokens; None: every layer sees all."""
    # Qwen2 names a window that it does not use, Gemma mixes layers with and without: the settings differ by family.
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", None) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def can_pack(config: Any) -> bool:
    """Return whether pairs of a model can be packed: it is causal, and known to take masks and positions."""
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", None)
    return bool(is_known(config) and causal)


def alike(config: Any, row: Packed) -> tuple[int, int]:
    """Return what rows must have in common to run side by side: how many sides they have, and, where a model may read
    at the last EOS token, how many of these, since such models take no batch in which that differs."""
    ends = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    return len(row.lengths), 0 if ends is None else int(np.isin(row.ids, ends).sum())


def how_pairs_run(config: Any) -> str:
    """Return whether pairs are packed, in a line."""
    if not is_known(config):
        return f"the sides of a pair run apart, since a {config.model_type} is not known to take them as one sequence"
    if not can_pack(config):
        return "the sides of a pair run apart, since every token of this model sees those behind it"
    window = smallest_window(config)
    return f"pairs run packed, as one sequence each{f' up to {window} tokens a side' if window else ''}"


def last_token(ids: np.ndarray, pad: int | None) -> int:
    """Return the position of the token that the reward is read at: the last that is not the pad token, as transformers
    finds it; where a model has none, the last."""
    if pad is None:
        return max(0, len(ids) - 1)
    # Not the length: a response that itself ends with the pad token is read before it, which transformers does too.
    real = np.flatnonzero(ids != pad)
    return int(real[-1]) if len(real) else 0


def pad_batch(
    sequences: Sequence[np.ndarray],
    pad: int,
    device: torch.device,
    types: Sequence[np.ndarray | None] = (),
) -> dict[str, Tensor]:
    """Return right-padded `input_ids` and `attention_mask`, and `token_type_ids` where sequences have types."""
    # One column at least, since models fail on inputs without any.
    width = max(1, *(len(s) for s in sequences))
    ids = np.full((len(sequences), width), pad, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if any(own is not None for own in types):
        batch["token_type_ids"] = np.zeros_like(ids)
        for row, own in enumerate(types):
            if own is not None:
                batch["token_type_ids"][row, : len(own)] = own
    return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}


def token_index(rows: Sequence[Packed], positions: Sequence[Sequence[np.ndarray]], device: torch.device) -> Index:
    """Return where tokens lie in a micro-batch, given by their positions in every side of every row."""
    row_numbers, columns = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for number, (row, by_side) in enumerate(zip(rows, positions, strict=True)):
        for side, own in enumerate(by_side):
            columns.append(row.columns(side, own))
            row_numbers.append(np.full(len(own), number, dtype=np.int64))
    return torch.from_numpy(np.concatenate(row_numbers)).to(device), torch.from_numpy(np.concatenate(columns)).to(
        device
    )


def end_index(rows: Sequence[Packed], pad: int | None, device: torch.device) -> Index:
    """Return where the token of each side lies that its reward is read from."""
    ends = []
    for row in rows:
        sides = [row.side_ids(side) for side in range(len(row.lengths))]
        ends.append([np.array([last_token(ids, pad)]) for ids in sides])
    return token_index(rows, ends, device)
