"""Measure what changed: accuracy by section with intervals, paired tests between models, and detection of planted
swaps."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import ndtri

from safer_ray.config.sections import StrategyName
from safer_ray.detection.grouped import difference_interval, effective_count, group_sums, sign_flip_p
from safer_ray.detection.quality import auroc
from safer_ray.errors import UserError
from safer_ray.strategies import STRATEGIES, StrategyInput


class Accuracy(NamedTuple):
    """Share of pairs with r_chosen > r_rejected (a tie is wrong), in [0, 1], with its 95% Wilson interval, which counts
    pairs of one prompt as what they are worth (`effective_count`): in simulations it holds the true share more often
    than a bootstrap over prompts does, above all where nearly all are right, or prompts are few."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """A model against a base on the same pairs, by group (prompt): is what it gained more than what it lost, or less?

    `p` is exact and two-sided: the chance of so large a difference where each group's could as well be the base's
    (`sign_flip_p`). `low` and `high` are the 95% interval of `change`, of groups drawn again (`difference_interval`).
    """

    n: int
    gained: int  # right here, wrong in the base
    lost: int  # wrong here, right in the base
    groups: int
    differ: int  # groups that gained more than they lost, or less
    change: float  # of accuracy, in [-1, 1]
    low: float
    high: float
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
    groups = _groups(rewards)
    return {name: _accuracy(right[mask], groups[mask]) for name, mask in _sections(rewards)}


def _accuracy(right: np.ndarray, groups: np.ndarray) -> Accuracy:
    n, correct = len(right), int(right.sum())
    share, worth = correct / n if n else 0.0, effective_count(right.astype(np.float64), groups)
    return Accuracy(n, correct, share, *wilson(share * worth, worth))


def _sections(rewards: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    names = np.array([name or "unnamed" for name in rewards["section"].to_pylist()], dtype=object)
    for name in sorted(set(names)):
        yield name, names == name


def _groups(rewards: pa.Table) -> np.ndarray:
    return np.array(rewards["group"].to_pylist(), dtype=object)


def on_the_same(one: pa.Table, other: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Two REWARDS tables on the pairs that both have: either model may have quarantined some."""
    ids = [set(table["pair_id"].to_pylist()) for table in (one, other)]
    if ids[0] == ids[1]:
        return one, other
    both = pa.array(sorted(ids[0] & ids[1]), pa.string())
    return one.filter(pc.is_in(one["pair_id"], both)), other.filter(pc.is_in(other["pair_id"], both))


def paired_tests(rewards: pa.Table, base: pa.Table) -> dict[str, PairedTest]:
    """Return by section whether a model differs from the base; pairs are matched by id.

    Raises:
        UserError: the two tables hold different pairs.
    """
    theirs = dict(zip(base["pair_id"].to_pylist(), base["reward_margin"].to_pylist(), strict=True))
    ids = rewards["pair_id"].to_pylist()
    if set(ids) != set(theirs):
        raise UserError("evaluate: the models were measured on different pairs; evaluate both on the same set")
    here = rewards["reward_margin"].to_numpy() > 0
    there = np.array([theirs[key] for key in ids]) > 0
    groups = _groups(rewards)
    return {name: paired_test(here[mask], there[mask], groups[mask]) for name, mask in _sections(rewards)}


def paired_test(here: np.ndarray, there: np.ndarray, groups: Sequence[str | None] | np.ndarray) -> PairedTest:
    """Return the test of two vectors of right and wrong answers (bool) [n] to the same pairs, of these groups [n]."""
    difference = here.astype(np.float64) - there
    totals = group_sums(difference, groups).totals
    return PairedTest(
        len(here),
        int((here & ~there).sum()),
        int((~here & there).sum()),
        len(totals),
        int(np.count_nonzero(totals)),
        float(difference.mean()) if len(difference) else 0.0,
        *difference_interval(difference, groups),
        sign_flip_p(totals),
    )


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
