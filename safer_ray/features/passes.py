"""Batch functions that are one forward pass over pairs, in one process or cut by layers into parts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.errors import TooLargeError
from safer_ray.features.encoder import Encoder, codes_table, positions_of
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import Forward, forward_pairs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.reward.tokens import TEXTS, read_tokens
from safer_ray.sae.formats import load_sae, sae_layer
from safer_ray.sae.model import Standardised
from safer_ray.schema import SIDES
from safer_ray.storage.quarantine import refuse
from safer_ray.storage.work import WHOLE, Part

# What a part of a model hands on of every pair, beside its tokens
TENSOR = pa.struct([("data", pa.large_binary()), ("shape", pa.list_(pa.int32())), ("dtype", pa.string())])
STATES = "states"  # of its rows after the part's last block: one where the pair was packed, else two
HIDDEN = "hidden"  # of its sides, what was wanted of the blocks so far


class ReadsPairs(ABC):
    """Batch function: pairs -> rows, by one forward pass through the model in `reward`.

    As one `part` of several it holds only its range of blocks: rows go from part to part with the columns `states` and
    `hidden`, and the last one makes of them what the whole model makes.
    """

    layers: tuple[int, ...] = ()  # blocks whose outputs are wanted
    rewards = False
    heads = False

    def __init__(self, reward: Path, part: Part = WHOLE, reading: Reading = AS_IT_COMES) -> None:
        needed = None if self.rewards or self.heads else max(self.layers)
        self.reward = load_reward_model(reward, layers=needed, part=part, reading=reading)
        self.part = part
        if part.last:
            for layer in self.layers:
                self.reward.check_layer(layer)

    def positions(self, tokens: list[PairTokens]) -> list[np.ndarray]:
        """Return the positions of the tokens of each side whose vectors are wanted."""
        return positions_of(tokens)

    @abstractmethod
    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        """Return what is made of a pass."""

    def __call__(self, pairs: pa.Table) -> pa.Table:
        pairs, refused = schema.split_refused(pairs)  # by a part before
        made, reasons = self.read(pairs)
        known = [refused, refuse(pairs, reasons)] if reasons else [refused] if len(refused) else []
        return pa.concat_tables([*([made] if made is not None else []), *known], promote_options="default")

    def read(self, pairs: pa.Table) -> tuple[pa.Table | None, dict[int, str]]:
        """Return what is made of the pairs that can be read, None of none, and by row why the others cannot: one that
        does not fit the memory, and one of which the model gives values that are not finite."""
        reasons: dict[int, str] = {}
        rows = np.arange(len(pairs))
        while True:
            tokens = tokens_of(self.reward, pairs)
            try:
                found = self._forward(pairs, tokens)
                break
            except TooLargeError as error:
                reasons |= {int(rows[i]): f"too large for the memory: {reason}" for i, reason in error.reasons.items()}
                kept = np.array([i for i in range(len(rows)) if i not in error.reasons], dtype=np.int64)
            if not len(kept):
                return None, reasons
            pairs, rows = pairs.take(kept), rows[kept]
        bad = self._not_finite(found) if self.part.last else {}
        if bad:
            reasons |= {int(rows[i]): reason for i, reason in bad.items()}
            kept = np.array([i for i in range(len(rows)) if i not in bad], dtype=np.int64)
            if not len(kept):
                return None, reasons
            pairs, tokens, found = pairs.take(kept), [tokens[i] for i in kept], _take(found, kept)
        return self.finish(pairs, tokens, found) if self.part.last else _hand_on(pairs, found), reasons

    def _forward(self, pairs: pa.Table, tokens: list[PairTokens]) -> Forward:
        return forward_pairs(
            self.reward,
            tokens,
            layers=self.layers,
            positions=self.positions(tokens) if self.layers else None,
            rewards=self.rewards,
            heads=self.heads,
            before=_handed_on(pairs),
            states=not self.part.last,
        )

    def _not_finite(self, found: Forward) -> dict[int, str]:
        """Pairs of which a value wanted is not finite, or a vector so long that its length is not."""
        read = {
            "the reward": found.rewards,
            "what the reward head reads": found.heads,
            f"layer {', '.join(map(str, self.layers))}": found.hidden,
        }
        reasons: dict[int, str] = {}
        for what, values in read.items():
            for side, value in enumerate(values if values is not None else ()):
                if not torch.isfinite(value.norm()):
                    reason = f"NaN or infinite values: {what} of {self.reward.name}; load it in float32, or retrain it"
                    reasons.setdefault(side // 2, reason)
        return reasons


def _take(found: Forward, pairs: np.ndarray) -> Forward:
    """Return what was found of some of the pairs."""
    sides = (2 * pairs[:, None] + np.arange(2)).ravel()
    rewards, heads = (None if values is None else values[sides] for values in (found.rewards, found.heads))
    hidden = None if found.hidden is None else [found.hidden[i] for i in sides]
    return Forward(rewards, hidden, heads)


def tokens_of(reward: RewardModel, rows: pa.Table) -> list[PairTokens]:
    """The tokens of a table of pairs, read where they are there, made where they are not."""
    if "chosen_ids" in rows.column_names:
        return read_tokens(rows)
    return reward.pairs(rows.select(["pair_id", *TEXTS]).to_pylist())


def _to_bytes(tensor: Tensor) -> dict[str, Any]:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"data": data, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _from_bytes(row: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, row["dtype"])
    # A copy that can be written to: torch warns of tensors over the bytes of Arrow, which cannot.
    flat = torch.frombuffer(bytearray(row["data"]), dtype=dtype) if row["data"] else torch.empty(0, dtype=dtype)
    return flat.reshape(row["shape"])


def _hand_on(pairs: pa.Table, found: Forward) -> pa.Table:
    """The pairs with what a part gave."""
    assert found.states is not None
    sides = [_to_bytes(side) for side in found.hidden or []]
    hidden = [sides[2 * i : 2 * i + 2] for i in range(len(pairs))]
    states = [[_to_bytes(row) for row in rows] for rows in found.states]
    pairs = pairs.drop_columns([name for name in (STATES, HIDDEN) if name in pairs.column_names])
    for name, values in ((STATES, states), (HIDDEN, hidden)):
        pairs = pairs.append_column(name, pa.array(values, pa.list_(TENSOR)))
    return pairs


def _handed_on(pairs: pa.Table) -> Forward | None:
    """Return what the part before gave of them."""
    if STATES not in pairs.column_names:
        return None
    states = [[_from_bytes(row) for row in rows] for rows in pairs[STATES].to_pylist()]
    hidden = [_from_bytes(side) for sides in pairs[HIDDEN].to_pylist() for side in sides]
    return Forward(None, hidden or None, None, states)


class EncodeActivations(ReadsPairs):
    """Batch function: pairs -> standardised layer vectors, one row a token."""

    sides: tuple[str, str] = SIDES  # what the column `side` says

    def __init__(
        self, reward: Path, layer: int, tokens: str, part: Part = WHOLE, reading: Reading = AS_IT_COMES
    ) -> None:
        self.layers = (layer,)
        self.all_tokens = tokens == "all"
        super().__init__(reward, part, reading)
        self.encoder = Encoder(self.reward, layer, rewards=False) if part.last else None

    def positions(self, tokens: list[PairTokens]) -> list[np.ndarray]:
        return positions_of(tokens, self.all_tokens)

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        assert self.encoder is not None
        vectors = self.encoder.encoded(tokens, found).vectors
        tables = [schema.activations(self.reward.hidden_size).empty_table()]
        groups = pairs["group"].to_pylist() if "group" in pairs.column_names else [None] * len(pairs)
        for i, (pair, group) in enumerate(zip(tokens, groups, strict=True)):
            for j, side in enumerate((pair.chosen, pair.rejected)):
                token = np.arange(len(side.ids), dtype=np.int32) if self.all_tokens else side.token
                end = np.full(len(token), -1, dtype=np.int32) if self.all_tokens else side.end
                tables.append(vector_rows(vectors[2 * i + j], pair.pair_id, group, self.sides[j], token, end))
        return pa.concat_tables(tables)


class EncodeTexts(EncodeActivations):
    """Batch function: texts, tokenised two by two -> standardised layer vectors of all their tokens."""

    sides = ("text", "text")

    def __init__(self, reward: Path, layer: int, part: Part = WHOLE, reading: Reading = AS_IT_COMES) -> None:
        super().__init__(reward, layer, "all", part, reading)


def vector_rows(
    vectors: Standardised, pair_id: str, group: str | None, side: str, token: np.ndarray, end: np.ndarray
) -> pa.Table:
    """The vectors of tokens in the activations schema; `end` is -1 where a token ends no sentence."""
    columns = {
        "pair_id": [pair_id] * len(token),
        "group": pa.array([group] * len(token), pa.string()),
        "side": [side] * len(token),
        "token": token,
        "end": end,
        "norm": vectors.norm.numpy(),
        "mean": vectors.mean.numpy(),
        "std": vectors.std.numpy(),
        "x": _lists(_half(vectors.x)),
    }
    return pa.table(columns, schema=schema.activations(vectors.x.shape[1]))


def _half(x: Tensor) -> np.ndarray:
    # The largest finite float16, beyond which values would become infinite.
    return x.clamp(-65504, 65504).to(torch.float16).numpy()


def _lists(matrix: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


class EncodePairs(ReadsPairs):
    """Batch function: pairs -> codes and rewards, and beside them the mean vectors of layers where some are asked for,
    all of one pass."""

    rewards = True

    def __init__(self, reward: Path, sae: Path, part: Part = WHOLE, reading: Reading = AS_IT_COMES) -> None:
        self.layer = sae_layer(sae)
        self.layers = (self.layer,)
        self.mean_layers: tuple[int, ...] = ()
        super().__init__(reward, part, reading)
        self.encoder = Encoder(self.reward, self.layer, load_sae(sae)) if part.last else None

    def add_means(self, layers: Sequence[int]) -> None:
        """Give the mean vectors of these layers, too, from now on: columns `response` and `prompt`, as `MeanVectors`
        has them.

        Raises:
            UserError: the model has no such layer.
        """
        if self.part.last:
            for layer in layers:
                self.reward.check_layer(layer)
        self.mean_layers = tuple(sorted(layers))
        self.layers = tuple(sorted({self.layer, *layers}))

    def positions(self, tokens: list[PairTokens]) -> list[np.ndarray]:
        return positions_of(tokens, all_tokens=bool(self.mean_layers))

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        assert self.encoder is not None
        if not self.mean_layers:
            return codes_table(self.encoder.encoded(tokens, found))
        assert found.hidden is not None
        own = self._columns((self.layer,))
        read = [h[:, own][ends] for h, ends in zip(found.hidden, positions_of(tokens), strict=True)]
        codes = codes_table(self.encoder.encoded(tokens, found._replace(hidden=read)))
        columns = self._columns(self.mean_layers)
        for name, values in mean_vectors(tokens, found.hidden, columns).items():
            codes = codes.append_column(name, _lists(values))
        return codes

    def _columns(self, layers: Sequence[int]) -> Tensor:
        """Return where the vectors of layers stand among those of all that are read."""
        width = self.reward.hidden_size
        return torch.cat([torch.arange(width) + self.layers.index(layer) * width for layer in layers])


def head_differences(reward: RewardModel, tokens: list[PairTokens]) -> np.ndarray:
    """Return what the reward head reads of the chosen response minus what it reads of the rejected one, float32 [n,
    d]."""
    return _differences(forward_pairs(reward, tokens, rewards=False, heads=True))


def _differences(found: Forward) -> np.ndarray:
    assert found.heads is not None
    return (found.heads[0::2] - found.heads[1::2]).numpy()


class HeadPairs(ReadsPairs):
    """Batch function: pairs -> the difference of what the reward head reads of chosen and rejected."""

    heads = True

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        difference = _differences(found)
        columns = {"pair_id": pairs["pair_id"], "head": _lists(difference)}
        return pa.table(columns, schema=schema.heads(difference.shape[1]))


class MeanVectors(ReadsPairs):
    """Batch function: pairs -> mean vectors of layers, side by side: what the chosen response's tokens have more than
    the rejected one's, and what the prompt's tokens have, over both sequences."""

    def __init__(self, reward: Path, layers: Sequence[int], part: Part = WHOLE, reading: Reading = AS_IT_COMES) -> None:
        self.layers = tuple(layers)
        super().__init__(reward, part, reading)

    def positions(self, tokens: list[PairTokens]) -> list[np.ndarray]:
        return positions_of(tokens, all_tokens=True)

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        width = self.reward.hidden_size * len(self.layers)
        means = mean_vectors(tokens, found.hidden or [], torch.arange(width))
        columns = {"pair_id": pairs["pair_id"], **{name: _lists(values) for name, values in means.items()}}
        return pa.table(columns, schema=schema.vectors(width))


def mean_vectors(tokens: list[PairTokens], hidden: Sequence[Tensor], columns: Tensor) -> dict[str, np.ndarray]:
    """Return of every pair what its chosen response's tokens have on average more than the rejected one's, `response`,
    and what its prompt's tokens have, `prompt`: float32 [n, columns]; `hidden` is of all tokens of both sides."""
    zero = torch.zeros(len(columns))
    starts = [side.n_prompt for side in both_sides(tokens)]
    prompt, response = (
        np.stack([(side.mean(0)[columns] if len(side) else zero).numpy() for side in part])
        for part in (
            [h[:start] for h, start in zip(hidden, starts, strict=True)],
            [h[start:] for h, start in zip(hidden, starts, strict=True)],
        )
    )
    return {"response": response[0::2] - response[1::2], "prompt": (prompt[0::2] + prompt[1::2]) / 2}


class RewardPairs(ReadsPairs):
    """Batch function: pairs -> both rewards."""

    rewards = True

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        assert found.rewards is not None
        rewards = found.rewards.numpy()
        chosen, rejected = rewards[0::2], rewards[1::2]
        columns = {
            "pair_id": pairs["pair_id"],
            "section": pairs["section"],
            "group": pairs["group"] if "group" in pairs.column_names else pa.nulls(len(pairs), pa.string()),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            **{f"{side}_truncated": [getattr(pair, side).truncated for pair in tokens] for side in SIDES},
        }
        return pa.table(columns, schema=schema.REWARDS)
