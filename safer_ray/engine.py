"""The one forward pass: pairs in, layer vectors or sparse codes and rewards out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from safer_ray import schema
from safer_ray.checkpoints import load_reward_model
from safer_ray.errors import UserError
from safer_ray.reward import RewardModel
from safer_ray.sae import SparseCodes, Standardised, TopKSae, load_sae, sae_layer, standardise
from safer_ray.text import PairTokens, Side, both_sides
from safer_ray.tokens import TEXTS, read_tokens


class Encoded(NamedTuple):
    """What one forward pass leaves of a batch of pairs; lists hold chosen then rejected of each pair in turn."""

    tokens: list[PairTokens]
    rewards: np.ndarray | None  # float32 [2 n]
    vectors: list[Standardised]  # [2 n], each over that side's positions
    codes: list[SparseCodes] | None


class Engine:
    """A reward model read at one layer, and an SAE on it if codes are wanted."""

    def __init__(self, reward: RewardModel, layer: int, sae: TopKSae | None = None, *, rewards: bool = True) -> None:
        reward.check_layer(layer)
        if sae is not None and sae.d != reward.hidden_size:
            raise UserError(
                f"the SAE reads {sae.d} dimensions, {reward.name} has {reward.hidden_size}; "
                "train an SAE on this model's activations"
            )
        self.reward = reward
        self.layer = layer
        self.sae = sae
        self.rewards = rewards

    @classmethod
    def load(cls, reward: Path, layer: int | None = None, sae: Path | None = None, *, rewards: bool = True) -> "Engine":
        """From directories; the layer is the SAE's where it is not given. Without rewards, no later one is loaded."""
        if layer is None:
            if sae is None:
                raise UserError("an Engine without an SAE needs the layer to read")
            layer = sae_layer(sae)
        model = load_reward_model(reward, layers=None if rewards else layer)
        return cls(model, layer, load_sae(sae) if sae else None, rewards=rewards)

    def encode(self, pairs: Sequence[dict[str, Any]], *, all_tokens: bool = False) -> Encoded:
        """Layer vectors at sentence ends (or at all tokens), their codes and both rewards.

        Raises:
            UserError: the model gives a NaN or infinite activation or reward; the pair is named.
        """
        return self.encode_tokens(self.reward.pairs(pairs), all_tokens=all_tokens)

    def encode_rows(self, rows: pa.Table, *, all_tokens: bool = False) -> Encoded:
        """As `encode`, of a table of pairs, tokenised already (`TokenisePairs`) or not."""
        return self.encode_tokens(tokens_of(self.reward, rows), all_tokens=all_tokens)

    def encode_tokens(self, tokens: list[PairTokens], *, all_tokens: bool = False) -> Encoded:
        """As `encode`, of tokenised pairs."""
        sides = both_sides(tokens)
        places = [np.arange(len(s.ids)) if all_tokens else s.token for s in sides]
        output = self.reward.forward_pairs(tokens, layer=self.layer, positions=places, rewards=self.rewards)
        assert output.hidden is not None
        for i, raw in enumerate(output.hidden):
            reward = output.rewards[i] if output.rewards is not None else torch.zeros(())
            if not (torch.isfinite(raw).all() and torch.isfinite(reward)):
                raise UserError(
                    f"pair {tokens[i // 2].pair_id!r}: layer {self.layer} of {self.reward.name} gives NaN or infinite "
                    "values; retrain with a lower learning rate, or load the model in float32"
                )
        vectors = [standardise(raw) for raw in output.hidden]
        rewards = output.rewards.numpy() if output.rewards is not None else None
        return Encoded(tokens, rewards, vectors, self.codes_of(vectors) if self.sae is not None else None)

    @torch.inference_mode()
    def codes_of(self, vectors: list[Standardised]) -> list[SparseCodes]:
        assert self.sae is not None
        together = self.sae.encode(torch.cat([v.x for v in vectors]))
        lengths = [len(v.x) for v in vectors]
        features, values = together.features.split(lengths), together.values.split(lengths)
        return [SparseCodes(f, v) for f, v in zip(features, values, strict=True)]


def tokens_of(reward: RewardModel, rows: pa.Table) -> list[PairTokens]:
    """The tokens of a table of pairs, read where they are there, made where they are not."""
    if "chosen_ids" in rows.column_names:
        return read_tokens(rows)
    return reward.pairs(rows.select(["pair_id", *TEXTS]).to_pylist())


def _active(codes: SparseCodes) -> tuple[list[list[int]], list[list[float]]]:
    """Positive activations of each entry, by rising feature id."""
    features, values = [], []
    for f, v in zip(codes.features.numpy(), codes.values.numpy(), strict=True):
        kept = np.flatnonzero(v > 0)
        kept = kept[np.argsort(f[kept], kind="stable")]
        features.append(f[kept].tolist())
        values.append(v[kept].tolist())
    return features, values


def codes_table(encoded: Encoded) -> pa.Table:
    """Encoded pairs in the CODES schema."""
    assert encoded.codes is not None
    rows = []
    for i, pair in enumerate(encoded.tokens):
        row: dict[str, Any] = {
            "pair_id": pair.pair_id,
            "n_prompt_tokens": pair.n_prompt_tokens,
            "truncated": pair.truncated,
        }
        for j, (name, side) in enumerate(zip(schema.SIDES, (pair.chosen, pair.rejected), strict=True)):
            features, values = _active(encoded.codes[2 * i + j])
            row |= {
                f"{name}_token": side.token.tolist(),
                f"{name}_end": side.end.tolist(),
                f"{name}_features": features,
                f"{name}_values": values,
                f"{name}_fallback": side.fallback,
                f"{name}_reward": None if encoded.rewards is None else float(encoded.rewards[2 * i + j]),
            }
        rows.append(row)
    return schema.table(rows, schema.CODES)


class EncodeActivations:
    """Batch function: pairs -> standardised layer vectors, one row a token."""

    def __init__(self, reward: Path, layer: int, tokens: str) -> None:
        self.engine = Engine.load(reward, layer, rewards=False)
        self.all_tokens = tokens == "all"

    @property
    def width(self) -> int:
        return self.engine.reward.hidden_size

    def __call__(self, pairs: pa.Table) -> pa.Table:
        encoded = self.engine.encode_rows(pairs, all_tokens=self.all_tokens)
        tables = []
        for i, pair in enumerate(encoded.tokens):
            for j, side in enumerate((pair.chosen, pair.rejected)):
                tables.append(self._rows(pair.pair_id, schema.SIDES[j], side, encoded.vectors[2 * i + j]))
        return pa.concat_tables(tables)

    def _rows(self, pair_id: str, name: str, side: Side, vectors: Standardised) -> pa.Table:
        token = np.arange(len(side.ids), dtype=np.int32) if self.all_tokens else side.token
        end = np.full(len(token), -1, dtype=np.int32) if self.all_tokens else side.end
        x = pa.array(_half(vectors.x).reshape(-1))
        return pa.table(
            {
                "pair_id": [pair_id] * len(token),
                "side": [name] * len(token),
                "token": token,
                "end": end,
                "norm": vectors.norm.numpy(),
                "mean": vectors.mean.numpy(),
                "std": vectors.std.numpy(),
                "x": pa.FixedSizeListArray.from_arrays(x, self.width),
            },
            schema=schema.activations(self.width),
        )


def _half(x: Tensor) -> np.ndarray:
    return x.clamp(-65504, 65504).to(torch.float16).numpy()


class EncodePairs:
    """Batch function: pairs -> codes and rewards."""

    def __init__(self, reward: Path, sae: Path) -> None:
        self.engine = Engine.load(reward, sae=sae)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        return codes_table(self.engine.encode_rows(pairs))


def head_differences(reward: RewardModel, tokens: list[PairTokens]) -> np.ndarray:
    """What the reward head reads of the chosen response minus what it reads of the rejected one, float32 [n, d]."""
    read = reward.forward_pairs(tokens, rewards=False, heads=True).heads
    assert read is not None
    return (read[0::2] - read[1::2]).numpy()


class HeadPairs:
    """Batch function: pairs -> the difference of what the reward head reads of chosen and rejected."""

    def __init__(self, reward: Path) -> None:
        self.reward = load_reward_model(reward)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        difference = head_differences(self.reward, tokens_of(self.reward, pairs))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(difference.reshape(-1)), difference.shape[1])
        return pa.table({"pair_id": pairs["pair_id"], "head": lists}, schema=schema.heads(difference.shape[1]))


class MeanVectors:
    """Batch function: pairs -> mean vectors of layers, side by side: what the chosen response's tokens have more than
    the rejected one's, and what the prompt's tokens have, over both sequences."""

    def __init__(self, reward: Path, layers: Sequence[int]) -> None:
        self.reward = load_reward_model(reward, layers=max(layers))
        self.layers = tuple(sorted(layers))
        for layer in layers:
            self.reward.check_layer(layer)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        tokens = tokens_of(self.reward, pairs)
        response, prompt = self._means(tokens)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]) for x in (response, prompt)]
        columns = {"pair_id": pairs["pair_id"], "response": lists[0], "prompt": lists[1]}
        return pa.table(columns, schema=schema.vectors(response.shape[1]))

    def _means(self, tokens: list[PairTokens]) -> tuple[np.ndarray, np.ndarray]:
        sides = both_sides(tokens)
        starts = [n for pair in tokens for n in (pair.n_prompt_tokens,) * 2]
        places = [np.arange(len(side.ids)) for side in sides]
        hidden = self.reward.forward_pairs(tokens, layer=self.layers, positions=places, rewards=False).hidden
        assert hidden is not None
        zero = torch.zeros(self.reward.hidden_size * len(self.layers))
        parts = [(h[:start], h[start:]) for h, start in zip(hidden, starts, strict=True)]
        prompt, response = (
            torch.stack([side.mean(0) if len(side) else zero for side in column]).numpy()
            for column in zip(*parts, strict=True)
        )
        return response[0::2] - response[1::2], (prompt[0::2] + prompt[1::2]) / 2


class RewardPairs:
    """Batch function: pairs -> both rewards."""

    def __init__(self, reward: Path) -> None:
        self.reward = load_reward_model(reward)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        tokens = tokens_of(self.reward, pairs)
        rewards = self.reward.forward_pairs(tokens).rewards
        assert rewards is not None
        if not torch.isfinite(rewards).all():
            bad = tokens[int((~torch.isfinite(rewards)).nonzero()[0]) // 2].pair_id
            raise UserError(f"pair {bad!r}: {self.reward.name} gives a NaN or infinite reward; retrain it")
        chosen, rejected = rewards.numpy()[0::2], rewards.numpy()[1::2]
        return pa.table(
            {
                "pair_id": pairs["pair_id"],
                "section": pairs["section"],
                "reward_chosen": chosen,
                "reward_rejected": rejected,
                "reward_margin": chosen - rejected,
            },
            schema=schema.REWARDS,
        )
