"""Measures of detection against plain definitions, and intervals that behave."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from safer_ray.detection.quality import BUDGETS, Interval, Measures, compare, group_weights, measure, weighted_measures
from safer_ray.schema import NO_PROMPT


def both_kinds(rows):
    return len({planted for _, planted in rows}) == 2


CASES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(both_kinds)


@given(CASES)
def test_ranks_are_scikit_learns(rows):
    suspicion, planted = (np.array(column) for column in zip(*rows, strict=True))
    found = measure(suspicion.astype(float), planted)
    assert found.auroc == pytest.approx(roc_auc_score(planted, suspicion))
    assert found.auprc == pytest.approx(average_precision_score(planted, suspicion))


def expected_recall(suspicion, planted, budget, draws=4000):
    """Of a ranking whose ties are broken at random, by trying."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        order = np.lexsort((rng.random(len(suspicion)), -suspicion))
        ranked = planted[order]
        whole = int(budget)
        found.append(ranked[:whole].sum() + (budget - whole) * (ranked[whole] if whole < len(ranked) else 0))
    return np.mean(found) / planted.sum()


def test_recall_within_a_budget_shares_ties_and_parts_of_a_pair():
    suspicion = np.array([3.0, 2, 2, 2, 1, 1, 0, 0, 0, 0] * 3)
    planted = np.array([True, False, True, False, False, True, False, False, False, False] * 3)
    found = measure(suspicion, planted)
    for budget, name in zip(BUDGETS, ("recall_1", "recall_2", "recall_5", "recall_10"), strict=True):
        wanted = expected_recall(suspicion, planted, budget * len(planted))
        assert getattr(found, name) == pytest.approx(wanted, abs=0.02)
    at_planted = expected_recall(suspicion, planted, planted.sum())
    assert found.precision_at_planted == pytest.approx(at_planted, abs=0.02)


def test_a_perfect_a_blind_and_a_contrary_detector():
    planted = np.arange(100) < 10
    perfect, blind, contrary = (measure(np.asarray(v, dtype=float), planted) for v in (planted, planted * 0, ~planted))
    assert perfect == Measures(1, 1, 1, 0.1, 0.2, 0.5, 1)
    assert blind == pytest.approx(Measures(0.5, 0.1, 0.1, 0.01, 0.02, 0.05, 0.1))
    assert (contrary.auroc, contrary.recall_10) == (0, 0)


@given(CASES, st.integers(0, 3))
def test_a_weight_counts_a_pair_as_often(rows, seed):
    suspicion, planted = (np.array(column) for column in zip(*rows, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, len(rows))
    often = np.repeat(np.arange(len(rows)), weights)
    if planted[often].all() or not planted[often].any():
        return
    found = measure(suspicion.astype(float), planted, weights.astype(float))
    assert found == pytest.approx(measure(suspicion[often].astype(float), planted[often]))


def test_a_draw_without_planted_pairs_says_nothing():
    found = weighted_measures(np.arange(4.0), np.array([True, False, False, False]), np.array([[0, 1, 1, 1.0]]))
    assert np.isnan(found[:2]).all()


def test_draws_take_whole_groups():
    weights = group_weights(["a", "b", "a", "c", "b", "a"], draws=50, seed=1)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] == weights[:, 5]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_pairs_without_a_prompt_are_drawn_one_by_one():
    weights = group_weights([None, NO_PROMPT, None, NO_PROMPT], draws=50, seed=1)
    assert (weights.sum(axis=1) == 4).all()
    assert (weights.std(axis=0) > 0).all()
    assert not (weights[:, 0] == weights[:, 2]).all()
    assert not (weights[:, 1] == weights[:, 3]).all()


def made(n=2000, seed=0):
    """Two plantings on one set of pairs, a good detector, a weaker one, and one that guesses."""
    rng = np.random.default_rng(seed)
    planted = [rng.random(n) < 0.05 for _ in range(2)]
    suspicions = {
        "good": [rng.normal(size=n) + 2 * mask for mask in planted],
        "weak": [rng.normal(size=n) + 0.7 * mask for mask in planted],
        "guess": [rng.random(n) for _ in planted],
    }
    return suspicions, planted, [f"g{i // 4}" for i in range(n)]


def test_detectors_are_compared_on_the_same_draws():
    found = compare(*made(), against=["good"], draws=300)
    assert found.intervals["good"]["auroc"].low < found.intervals["good"]["auroc"].value
    assert found.differences["good"]["weak"]["auroc"].excludes_zero
    assert found.differences["good"]["guess"]["recall_5"].low > 0
    assert found.intervals["guess"]["auroc"].low < 0.5 < found.intervals["guess"]["auroc"].high
    means = np.mean([m.auroc for m in found.seeds["good"]])
    assert found.intervals["good"]["auroc"].value == pytest.approx(means)
    assert "good" not in found.differences["good"]


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """The true AUROC of a shift of 0.7 standard deviations is Phi(0.7 / sqrt 2) = 0.690."""
    held = 0
    for seed in range(60):
        suspicions, planted, groups = made(600, seed)
        interval = compare({"weak": suspicions["weak"]}, planted, groups, against=["weak"], draws=200).intervals["weak"]
        held += interval["auroc"].low <= 0.690 <= interval["auroc"].high
    assert held >= 50


def test_the_same_seed_gives_the_same_intervals():
    assert compare(*made(), against=["good"], draws=50) == compare(*made(), against=["good"], draws=50)


@pytest.mark.parametrize(("low", "high", "excludes"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)])
def test_an_interval_excludes_zero(low, high, excludes):
    assert Interval(0.0, low, high).excludes_zero == excludes
