"""Measure what changed: accuracy by section with intervals, paired tests between models, and detection of planted
swaps."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtri

from safer_ray.config.sections import StrategyName
from safer_ray.detection.quality import auroc
from safer_ray.errors import UserError
from safer_ray.schema import NO_PROMPT
from safer_ray.strategies import STRATEGIES, StrategyInput


class Accuracy(NamedTuple):
    """Share of pairs with r_chosen > r_rejected (a tie is wrong), in [0, 1], with its 95% Wilson interval, which counts
    pairs of one prompt as what they are worth (`effective_count`)."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Exact two-sided McNemar test of a model against a base on the same pairs."""

    n: int
    gained: int  # right here, wrong in the base
    lost: int  # wrong here, right in the base
    p: float


def wilson(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri(0.5 + confidence / 2))
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def section_accuracy(rewards: pa.Table) -> dict[str, Accuracy]:
    """Accuracy by section of a REWARDS table, sections by name."""
    right = rewards["reward_margin"].to_numpy() > 0
    groups = np.array(rewards["group"].to_pylist(), dtype=object)
    return {name: _accuracy(right[mask], groups[mask]) for name, mask in _sections(rewards)}


def _accuracy(right: np.ndarray, groups: np.ndarray) -> Accuracy:
    n, correct = len(right), int(right.sum())
    share, worth = correct / n if n else 0.0, effective_count(right, groups)
    return Accuracy(n, correct, share, *wilson(share * worth, worth))


def effective_count(right: np.ndarray, groups: np.ndarray) -> float:
    """Return how many independent pairs tell as much of a share as these, in [1, n]: n where each has a prompt of its
    own, or none is known; fewer where pairs of one prompt are right or wrong together (n over Kish's design effect,
    with the linearised variance of a ratio; where all or none are right, the number of prompts)."""
    alone = np.array([group is None or group == NO_PROMPT for group in groups], dtype=bool)
    names = np.where(alone, [f"pair {i}" for i in range(len(groups))], groups.astype(str))
    _, group = np.unique(names, return_inverse=True)
    n, count, share = len(right), int(group.max(initial=-1)) + 1, float(right.mean()) if len(right) else 0.0
    if count == n or share in (0.0, 1.0):
        return float(count)
    sums = np.bincount(group, weights=right - share)
    if count == 1:
        return 1.0
    # Linearised variance of a ratio of sums over clusters (Cochran 1977, 2.11), with count / (count - 1) for few of
    # them.
    variance = float((sums**2).sum()) / n**2 * count / (count - 1)
    return float(np.clip(share * (1 - share) / variance, 1, n)) if variance > 0 else float(n)


def _sections(rewards: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    names = np.array([name or "unnamed" for name in rewards["section"].to_pylist()], dtype=object)
    for name in sorted(set(names)):
        yield name, names == name


def on_the_same(one: pa.Table, other: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Two REWARDS tables on the pairs that both have: either model may have quarantined some."""
    ids = [set(table["pair_id"].to_pylist()) for table in (one, other)]
    if ids[0] == ids[1]:
        return one, other
    both = pa.array(sorted(ids[0] & ids[1]), pa.string())
    return one.filter(pc.is_in(one["pair_id"], both)), other.filter(pc.is_in(other["pair_id"], both))


def mcnemar(rewards: pa.Table, base: pa.Table) -> dict[str, McNemar]:
    """By section, whether a model differs from the base; pairs are matched by id.

    Raises:
        UserError: the two tables hold different pairs.
    """
    theirs = dict(zip(base["pair_id"].to_pylist(), base["reward_margin"].to_pylist(), strict=True))
    ids = rewards["pair_id"].to_pylist()
    if set(ids) != set(theirs):
        raise UserError("evaluate: the models were measured on different pairs; evaluate both on the same set")
    here = rewards["reward_margin"].to_numpy() > 0
    there = np.array([theirs[key] for key in ids]) > 0
    return {name: paired_test(here[mask], there[mask]) for name, mask in _sections(rewards)}


def paired_test(here: np.ndarray, there: np.ndarray) -> McNemar:
    """McNemar's exact test on two vectors of right and wrong answers to the same pairs."""
    from scipy.stats import binomtest  # here, since it takes half a second, and most stages test nothing

    gained, lost = int((here & ~there).sum()), int((~here & there).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(len(here), gained, lost, p)


class Detection(NamedTuple):
    """Figures of how well a suspicion (high: the label looks wrong) finds planted swaps."""

    auroc: float  # P(a planted pair is more suspicious than a clean one), 0.5: chance
    precision_at_planted: float  # share of planted ones among the `planted` most suspicious


def detection(joined: pa.Table, planted: np.ndarray, strategy: StrategyName, seed: int) -> Detection:
    """Return the figures of one curation strategy on pairs joined with their scores."""
    suspicion = STRATEGIES[strategy](StrategyInput(joined, seed))
    ids = np.array(joined["pair_id"].to_pylist(), dtype=object).astype(str)
    highest = np.lexsort((ids, -suspicion))[: int(planted.sum())]
    score = auroc(suspicion[planted][:, None], suspicion[~planted][:, None])[0]
    return Detection(float(score), float(planted[highest].mean()) if len(highest) else 0.0)
