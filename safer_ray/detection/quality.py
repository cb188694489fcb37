"""Measure how well suspicion finds planted errors: ranks, budgets, intervals over prompts, and paired differences."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from safer_ray.detection.grouped import group_numbers

BUDGETS = (0.01, 0.02, 0.05, 0.10)
CURVE = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, *(round(0.05 * i, 2) for i in range(2, 21)))  # budgets of a recall curve
DRAWS = 1000


class Measures(NamedTuple):
    """Figures of one detector on pairs of which some are planted errors; all in [0, 1], higher is better."""

    auroc: float  # P(a planted pair is more suspicious than a clean one), ties half; 0.5: chance
    auprc: float  # average precision; the planted share: chance
    precision_at_planted: float  # share of planted ones among as many most suspicious pairs as were planted
    recall_1: float  # share of planted ones among the most suspicious 1% of all pairs
    recall_2: float
    recall_5: float
    recall_10: float


class Interval(NamedTuple):
    """An estimate with its 95% bootstrap percentile interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """P(positive > negative) + P(equal) / 2 of each column; 0.5 is chance and what an empty side gives."""
    from scipy.stats import rankdata  # here, since it takes half a second, and most stages rank nothing

    n, m = len(positive), len(negative)
    if not n or not m:
        return np.full(positive.shape[1:], 0.5)
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)[:n].sum(axis=0)
    return (ranks - n * (n + 1) / 2) / (n * m)


def measure(suspicion: np.ndarray, planted: np.ndarray, weights: np.ndarray | None = None) -> Measures:
    """Measures of `suspicion` (high: suspect) [n] against `planted` (bool) [n]; `weights` count pairs several times.

    Pairs of equal suspicion share: ranks, precision and recall are expectations over their order.
    """
    w = np.ones(len(planted)) if weights is None else weights
    return Measures(*(float(column[0]) for column in weighted_measures(suspicion, planted, w[None])))


def recall_curve(suspicion: np.ndarray, planted: np.ndarray) -> Float[ndarray, " budgets"]:
    """Share of the planted pairs among the most suspicious ones, at every budget of CURVE."""
    ranking = _ranked(suspicion, planted, np.ones((1, len(planted)), dtype=np.float32))
    return np.array([float(_found_within(ranking, budget * ranking.n)[0]) for budget in CURVE]) / planted.sum()


def weighted_measures(
    suspicion: np.ndarray, planted: np.ndarray, weights: Float[ndarray, "draws n"]
) -> Float[ndarray, "7 draws"]:
    """`Measures` under each row of weights (a bootstrap draw counts a pair as often as it was drawn); NaN where a draw
    has only planted or only clean pairs."""
    r = _ranked(suspicion, planted, weights)
    n_bad = r.found[:, -1]
    clean = r.every - r.bad
    with np.errstate(divide="ignore", invalid="ignore"):
        # Clean weight below each group, and half of that in it: ties count half, as in the rank statistic of Mann and
        # Whitney.
        cleaner_below = (r.n - n_bad)[:, None] - np.cumsum(clean, axis=1) + clean / 2
        auroc = (r.bad * cleaner_below).sum(axis=1) / (n_bad * (r.n - n_bad))
        auprc = np.nansum(r.bad * r.found / r.seen, axis=1) / n_bad
        shares = [_found_within(r, n_bad) / n_bad]
        shares += [_found_within(r, budget * r.n) / n_bad for budget in BUDGETS]
    auprc = np.where(n_bad > 0, auprc, np.nan)
    return np.stack([auroc, auprc, *shares])


class _Ranking(NamedTuple):
    """Weights by falling suspicion, pairs of equal suspicion together: [draws, groups]."""

    bad: np.ndarray  # of planted pairs
    every: np.ndarray
    found: np.ndarray  # `bad` so far
    seen: np.ndarray  # `every` so far

    @property
    def n(self) -> np.ndarray:
        return np.asarray(self.seen[:, -1])


def _ranked(suspicion: np.ndarray, planted: np.ndarray, weights: np.ndarray) -> _Ranking:
    order = np.argsort(-suspicion, kind="stable")
    ranked = suspicion[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, dtype=np.int64)
    sorted_weights = weights[:, order].astype(np.float64)
    bad = np.add.reduceat(sorted_weights * planted[order], starts, axis=1)
    every = np.add.reduceat(sorted_weights, starts, axis=1)
    return _Ranking(bad, every, np.cumsum(bad, axis=1), np.cumsum(every, axis=1))


def _found_within(r: _Ranking, budget: np.ndarray) -> np.ndarray:
    """Planted weight among the first `budget` [draws] of the ranking; of the tied group at its edge, its share."""
    # The group at which the budget ends; 1e-9 is for sums of weights that are whole numbers but for rounding.
    edge = np.minimum((r.seen < budget[:, None] - 1e-9).sum(axis=1), r.seen.shape[1] - 1)
    row = np.arange(len(r.seen))
    bad, width = r.bad[row, edge], r.every[row, edge]
    left = np.clip(budget - (r.seen[row, edge] - width), 0, width)
    return r.found[row, edge] - bad + bad * np.divide(left, width, out=np.zeros_like(left), where=width > 0)


def group_weights(groups: Sequence[str | None], draws: int = DRAWS, seed: int = 0) -> Float[ndarray, "draws n"]:
    """Bootstrap draws of prompts: how often each pair counts when as many groups as there are come with replacement;
    a pair without a prompt is a group of its own."""
    index = group_numbers(groups)
    count = int(index.max(initial=-1)) + 1
    # How often each prompt comes in a draw with replacement is multinomial; so no draw is ever written out.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return drawn[:, index].astype(np.float32)


class Comparison(NamedTuple):
    """Detectors on the same pairs, over several plantings."""

    intervals: dict[str, dict[str, Interval]]  # detector -> measure -> mean over plantings
    differences: dict[str, dict[str, dict[str, Interval]]]  # one of `against` -> rival -> measure -> it minus the rival
    seeds: dict[str, list[Measures]]  # detector -> one a planting
    curves: dict[str, list[float]]  # detector -> recall at each budget of CURVE, the mean over plantings


def compare(
    suspicions: Mapping[str, Sequence[np.ndarray]],
    planted: Sequence[np.ndarray],
    groups: Sequence[str | None],
    *,
    against: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Measures of every detector, each the mean over plantings, with intervals over prompts, and paired differences of
    those of `against` minus every other: all detectors and plantings see the same draws.

    Args:
        suspicions: detector -> one array [n] a planting, high: suspect.
        planted: one mask [n] a planting.
        groups: the prompt group of each pair [n].
    """
    weights = group_weights(groups, draws, seed)
    drawn, point, seeds = {}, {}, {}
    for name, arrays in suspicions.items():
        per_seed = [weighted_measures(values, mask, weights) for values, mask in zip(arrays, planted, strict=True)]
        seeds[name] = [measure(values, mask) for values, mask in zip(arrays, planted, strict=True)]
        drawn[name] = np.nanmean(np.stack(per_seed), axis=0)
        point[name] = np.mean(np.array(seeds[name]), axis=0)
    intervals = {name: _named(point[name], drawn[name]) for name in drawn}
    differences = {
        one: {name: _named(point[one] - point[name], drawn[one] - drawn[name]) for name in drawn if name != one}
        for one in against
    }
    curves = {
        name: np.mean([recall_curve(v, m) for v, m in zip(arrays, planted, strict=True)], axis=0).tolist()
        for name, arrays in suspicions.items()
    }
    return Comparison(intervals, differences, seeds, curves)


def _named(point: np.ndarray, drawn: np.ndarray) -> dict[str, Interval]:
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=1)
    return {name: Interval(float(point[i]), float(low[i]), float(high[i])) for i, name in enumerate(Measures._fields)}
