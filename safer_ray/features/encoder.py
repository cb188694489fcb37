"""The one forward pass: pairs in, layer vectors or sparse codes and rewards out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import Forward, forward_pairs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.sae.formats import load_sae, sae_layer
from safer_ray.sae.model import EPSILON, Standardised, TopKSae, standardise
from safer_ray.sae.sparse import SparseCodes


class Encoded(NamedTuple):
    """The result of one forward pass over a batch of pairs; lists hold chosen then rejected of each pair in turn."""

    tokens: list[PairTokens]
    rewards: np.ndarray | None  # float32 [2 n]
    vectors: list[Standardised]  # [2 n], each over that side's positions
    codes: list[SparseCodes] | None


class Encoder:
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
    def load(
        cls,
        reward: Path,
        layer: int | None = None,
        sae: Path | None = None,
        *,
        rewards: bool = True,
        reading: Reading = AS_IT_COMES,
    ) -> "Encoder":
        """From directories; the layer is the SAE's where it is not given. Without rewards, no later one is loaded."""
        if layer is None:
            if sae is None:
                raise UserError("an Engine without an SAE needs the layer to read")
            layer = sae_layer(sae)
        model = load_reward_model(reward, layers=None if rewards else layer, reading=reading)
        return cls(model, layer, load_sae(sae) if sae else None, rewards=rewards)

    def encode(self, pairs: Sequence[dict[str, Any]], *, all_tokens: bool = False) -> Encoded:
        """Layer vectors at sentence ends (or at all tokens), their codes and both rewards.

        Raises:
            UserError: the model gives a NaN or infinite activation or reward; the pair is named.
        """
        return self.encode_tokens(self.reward.pairs(pairs), all_tokens=all_tokens)

    def encode_tokens(self, tokens: list[PairTokens], *, all_tokens: bool = False) -> Encoded:
        """As `encode`, of tokenised pairs."""
        positions = positions_of(tokens, all_tokens)
        found = forward_pairs(self.reward, tokens, layers=(self.layer,), positions=positions, rewards=self.rewards)
        return self.encoded(tokens, found)

    def encoded(self, tokens: list[PairTokens], found: Forward) -> Encoded:
        """Return what is made of a pass that was asked for this encoder's layer."""
        assert found.hidden is not None
        for i, raw in enumerate(found.hidden):
            reward = found.rewards[i] if found.rewards is not None else torch.zeros(())
            if not (torch.isfinite(raw).all() and torch.isfinite(reward)):
                raise UserError(
                    f"pair {tokens[i // 2].pair_id!r}: layer {self.layer} of {self.reward.name} gives NaN or infinite "
                    "values; retrain with a lower learning rate, or load the model in float32"
                )
        epsilon = EPSILON if self.sae is None else self.sae.epsilon
        vectors = [standardise(raw, epsilon) for raw in found.hidden]
        rewards = found.rewards.numpy() if found.rewards is not None else None
        return Encoded(tokens, rewards, vectors, self.codes_of(vectors) if self.sae is not None else None)

    @torch.inference_mode()
    def codes_of(self, vectors: list[Standardised]) -> list[SparseCodes]:
        assert self.sae is not None
        together = self.sae.encode(torch.cat([v.x for v in vectors]))
        lengths = [len(v.x) for v in vectors]
        features, values = together.features.split(lengths), together.values.split(lengths)
        return [SparseCodes(f, v) for f, v in zip(features, values, strict=True)]


def positions_of(tokens: list[PairTokens], all_tokens: bool = False) -> list[np.ndarray]:
    """Return the positions of the tokens read of every side: of its sentence ends, or of all its tokens."""
    return [np.arange(len(side.ids)) if all_tokens else side.token for side in both_sides(tokens)]


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
        row: dict[str, Any] = {"pair_id": pair.pair_id}
        for j, (name, side) in enumerate(zip(schema.SIDES, (pair.chosen, pair.rejected), strict=True)):
            features, values = _active(encoded.codes[2 * i + j])
            row |= {
                f"{name}_token": side.token.tolist(),
                f"{name}_end": side.end.tolist(),
                f"{name}_features": features,
                f"{name}_values": values,
                f"{name}_fallback": side.fallback,
                f"{name}_prompt_tokens": side.n_prompt,
                f"{name}_truncated": side.truncated,
                f"{name}_reward": None if encoded.rewards is None else float(encoded.rewards[2 * i + j]),
            }
        rows.append(row)
    return schema.table(rows, schema.CODES)
