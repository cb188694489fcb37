"""Measure how good an SAE is: on vectors that it was not trained on, and by what its reconstructions cost the reward
model."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import UserError
from safer_ray.reward.batches import cut
from safer_ray.reward.execution import rewards_of
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import Packed, alike, unpacked
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.reward.trunk import start_after
from safer_ray.sae.model import TopKSae, standardise

DENSITY_EDGES = np.linspace(-6, 0, 25)  # log10 of the share of vectors that a latent fires on
ALIKE = 0.9  # cosine from which two decoder directions are one cluster
COMPARED = 4096  # latents, at most, that are compared with all others
ROWS = 4096  # of a pass
PAIRS = 64  # whose states are in memory at once


class Quality(NamedTuple):
    """Figures over n held-out vectors; all but the last two are means."""

    nmse: float  # ||x_hat - x||^2 / ||x||^2; 0 is perfect
    explained_variance: float  # 1 - SSE / SS about the mean vector; 1 is perfect
    l0: float  # positive activations of a vector
    dead_share: float  # of the latents, those that fire on none of the vectors
    fired: np.ndarray  # int64 [latents], vectors that each fires on
    vectors: int

    def figures(self) -> dict[str, float]:
        """The four that sum it up."""
        return {name: getattr(self, name) for name in ("nmse", "explained_variance", "l0", "dead_share")}


@torch.inference_mode()
def sae_quality(sae: TopKSae, blocks: Iterable[np.ndarray]) -> Quality:
    """Measured over blocks of standardised vectors [m, d]; sums are float64."""
    device = sae.W_dec.device
    ratio = errors = squares = active = 0.0
    total = torch.zeros(sae.d, dtype=torch.float64, device=device)
    fired = torch.zeros(sae.latents, dtype=torch.int64, device=device)
    n = 0
    for block in blocks:
        for start in range(0, len(block), ROWS):
            x = torch.from_numpy(block[start : start + ROWS]).to(device).float()
            codes = sae.encode(x)
            error = (x - sae.decode(codes)).double().square().sum(-1)
            square = x.double().square().sum(-1)
            ratio += float((error / square).sum())
            errors, squares = errors + float(error.sum()), squares + float(square.sum())
            total += x.double().sum(0)
            on = codes.features[codes.values > 0]
            active += len(on)
            fired += torch.bincount(on.flatten(), minlength=sae.latents)
            n += len(x)
    # SS about the mean is the sum of squares less n |mean|^2, in float64: it cancels where vectors have a large mean in
    # common.
    spread = squares - float(total.square().sum()) / n
    dead = 1 - float((fired > 0).double().mean())
    return Quality(ratio / n, 1 - errors / spread, active / n, dead, fired.cpu().numpy(), n)


def density_histogram(quality: Quality) -> dict[str, list[float]]:
    """Return how many latents fire on which share of the vectors: `edges` of bins of its log10, and `counts`; those
    that fire on none are in no bin, rarer ones in the first."""
    alive = quality.fired[quality.fired > 0]
    shares = np.clip(np.log10(alive / quality.vectors), DENSITY_EDGES[0], 0) if len(alive) else np.empty(0)
    counts, _ = np.histogram(shares, DENSITY_EDGES)
    return {"edges": DENSITY_EDGES.tolist(), "counts": counts.tolist()}


class Clusters(NamedTuple):
    """Latents whose decoder directions nearly coincide."""

    share: float  # of the latents compared, those with another one in reach
    number: int  # groups of two and more


@torch.inference_mode()
def decoder_clusters(sae: TopKSae, cosine: float = ALIKE, compared: int = COMPARED) -> Clusters:
    """Groups of latents linked by a cosine above `cosine`; of a wide SAE a share of the latents, evenly spread, is
    compared with all."""
    directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    chosen = torch.linspace(0, sae.latents - 1, min(compared, sae.latents), device=directions.device).long()
    near = 0
    rows, columns = [], []
    # By parts: all cosines of 4,096 latents with 65,536 at once would be a gigabyte.
    for part in chosen.split(1024):
        alike = directions[part] @ directions.T > cosine
        alike[torch.arange(len(part), device=part.device), part] = False
        near += int(alike.any(-1).sum())
        row, column = alike.nonzero(as_tuple=True)
        rows.append(part[row].cpu().numpy())
        columns.append(column.cpu().numpy())
    pairs = np.concatenate(rows), np.concatenate(columns)
    links = sp.coo_matrix((np.ones(len(pairs[0])), pairs), shape=(sae.latents, sae.latents))
    _, label = connected_components(links, directed=False)
    return Clusters(near / len(chosen), int((np.bincount(label) > 1).sum()))


class Spliced(NamedTuple):
    """Changes of reward and ranking when the layer's output at some tokens is replaced by its reconstruction."""

    pairs: int
    reward_mse: float  # mean squared change of a reward
    reward_nmse: float  # the same over the variance of the rewards
    accuracy: float  # share of pairs with r_chosen > r_rejected, before
    accuracy_change: float  # after minus before
    sign_flips: float  # share of pairs whose margin changes its sign


@torch.inference_mode()
def spliced(
    reward: RewardModel, layer: int, sae: TopKSae, pairs: Sequence[PairTokens], *, all_tokens: bool = False
) -> Spliced:
    """Held-out pairs read with the output of block `layer` replaced at their sentence ends, or at all tokens.

    Vectors go through the SAE standardised, and come back with the mean and the std that they had.
    """
    chunks = (pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS))
    rewards = [_before_and_after(reward, layer, sae, chunk, all_tokens) for chunk in chunks]
    before, after = (torch.cat(own).double() for own in zip(*rewards, strict=True))
    pair = torch.isfinite(before + after).view(-1, 2).all(1)  # others were quarantined when vectors were harvested
    if not pair.any():
        raise UserError(f"{reward.name} gives no finite reward on {len(pair)} held-out pairs; retrain it")
    before, after = (own[pair.repeat_interleave(2)] for own in (before, after))
    margins = [(own[0::2] - own[1::2]).numpy() for own in (before, after)]
    error = float((after - before).square().mean())
    right = [float((margin > 0).mean()) for margin in margins]
    flips = float((np.sign(margins[0]) != np.sign(margins[1])).mean())
    variance = max(float(before.var(unbiased=False)), 1e-12)
    return Spliced(int(pair.sum()), error, error / variance, right[0], right[1] - right[0], flips)


def _before_and_after(
    reward: RewardModel, layer: int, sae: TopKSae, pairs: Sequence[PairTokens], all_tokens: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Rewards of all sides, as the model gives them and behind reconstructions."""
    sides = both_sides(pairs)
    everywhere = [np.arange(len(side.ids)) for side in sides]
    found = forward_pairs(reward, pairs, layers=(layer,), positions=everywhere)
    assert found.hidden is not None
    assert found.rewards is not None
    at = everywhere if all_tokens else [side.token for side in sides]
    states = [_reconstructed(sae, *given) for given in zip(found.hidden, at, strict=True)]
    return found.rewards, _rewards_behind(reward, layer, [unpacked(side.ids, side.types) for side in sides], states)


def _reconstructed(sae: TopKSae, raw: Float[Tensor, "m d"], at: np.ndarray) -> Float[Tensor, "m d"]:
    states, places = raw.clone(), torch.from_numpy(np.asarray(at, dtype=np.int64))
    if len(places):
        made = standardise(raw[places], sae.epsilon)
        x = sae.decode(sae.encode(made.x.to(sae.W_dec.device))).cpu()
        # What the standardisation took away is given back: the blocks behind read raw states.
        states[places] = x * (made.std[:, None] + sae.epsilon) + made.mean[:, None]
    return states


def _rewards_behind(
    reward: RewardModel, layer: int, rows: Sequence[Packed], states: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    """Rewards of sequences of which the output of block `layer` is given."""
    rewards = torch.zeros(len(rows))
    most = reward.budget if reward.pads else 0
    for chunk in cut(rows, range(len(rows)), most, partial(alike, reward.model.config)):
        with start_after(reward, layer, pad_sequence([states[i] for i in chunk], batch_first=True)):
            rewards[chunk] = rewards_of(reward, [rows[i] for i in chunk]).float().cpu()
    return rewards
