"""Accuracy, intervals, paired tests and detection of planted swaps."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from safer_ray import schema
from safer_ray.detection.evaluation import detection, paired_test, paired_tests, section_accuracy, wilson
from safer_ray.errors import UserError


def rewards(margins, sections=None, ids=None):
    rows = [
        {"pair_id": f"p{i}", "section": "one", "reward_chosen": m, "reward_rejected": 0.0, "reward_margin": m}
        for i, m in enumerate(margins)
    ]
    for row, section in zip(rows, sections or [], strict=False):
        row["section"] = section
    for row, key in zip(rows, ids or [], strict=False):
        row["pair_id"] = key
    return schema.table(rows, schema.REWARDS)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168)],
)
def test_wilsons_interval_has_the_textbook_numbers(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_inside_the_unit_interval(given_counts):
    correct, n = given_counts
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1
    assert wilson(0, 0) == (0, 1)


def test_wilsons_interval_narrows_with_more_pairs_and_widens_with_confidence():
    assert np.ptp(wilson(80, 100)) < np.ptp(wilson(8, 10))
    assert np.ptp(wilson(8, 10, 0.99)) > np.ptp(wilson(8, 10))


def test_ties_are_wrong_and_sections_apart():
    table = rewards([1.0, 0.0, -1.0, 2.0, 3.0], ["b", "b", "b", "a", None])
    found = section_accuracy(table)
    assert list(found) == ["a", "b", "unnamed"]
    assert (found["b"].n, found["b"].correct, found["b"].accuracy) == (3, 1, 1 / 3)
    assert (found["b"].low, found["b"].high) == wilson(1, 3)
    assert found["unnamed"].accuracy == 1


def test_of_prompts_with_one_pair_each_the_test_is_mcnemars():
    here = np.array([True] * 9 + [False] * 2 + [True] * 5)
    there = np.array([False] * 9 + [True] * 2 + [True] * 5)
    found = paired_test(here, there, [f"p{i}" for i in range(16)])
    assert found == paired_test(here, there, [None] * 16)
    assert found[:6] == (16, 9, 2, 16, 11, 7 / 16)
    assert found.low < 7 / 16 < found.high
    assert found.p == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert found.p == pytest.approx(0.0654297, abs=1e-6)


def test_a_prompt_that_gains_and_loses_alike_does_not_differ():
    found = paired_test(np.array([True, False, True]), np.array([False, True, False]), ["a", "a", "b"])
    assert (found.gained, found.lost, found.groups, found.differ, found.p) == (2, 1, 2, 1, 1.0)


def test_nine_pairs_of_one_prompt_that_are_gained_together_are_one_change():
    here, there = np.array([True] * 54), np.array([False] * 54)
    found = paired_test(here, there, np.repeat([f"p{i}" for i in range(6)], 9))
    assert (found.gained, found.differ) == (54, 6)
    assert found.p == pytest.approx(2 / 2**6)
    assert found.low < 0.5


def test_models_that_never_differ_have_p_one():
    found = paired_test(np.array([True, False]), np.array([True, False]), ["a", "b"])
    assert found[:6] == (2, 0, 0, 2, 0, 0)
    assert found.p == 1
    assert found.low == -found.high < -0.5


def test_models_are_compared_by_pair_not_by_position():
    base = rewards([1.0, -1.0, 1.0], ids=["x", "y", "z"])
    other = rewards([1.0, -1.0, -1.0], ["s", "s", "t"], ids=["y", "z", "x"])
    found = paired_tests(other, base)
    assert found["s"][:3] == (2, 1, 1)
    assert found["t"][:3] == (1, 0, 1)


def test_a_model_measured_on_other_pairs_is_refused():
    with pytest.raises(UserError, match="measured on different pairs; evaluate both on the same set"):
        paired_tests(rewards([1.0]), rewards([1.0], ids=["other"]))


def joined(scores):
    ids = [f"p{i}" for i in range(len(scores))]
    return pa.table({"pair_id": ids, "score": pa.array(scores, pa.float64())})


def test_detection_on_a_hand_made_example():
    planted = np.array([True, False, False, True])
    found = detection(joined([1.0, 2.0, 0.0, 1.5]), planted, "safer", 0)
    assert found.auroc == 0.5  # of four comparisons two are won
    assert found.precision_at_planted == 0.5
    best = detection(joined([-5.0, 2.0, 0.0, -1.0]), planted, "safer", 0)
    assert best == (1.0, 1.0)


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60))
def test_auroc_equals_sklearns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, planted = np.array([float(s) for s, _ in rows]), np.array([p for _, p in rows])
    found = detection(joined(scores.tolist()), planted, "safer", 0)
    if planted.all() or not planted.any():
        assert found.auroc == 0.5
    else:
        assert found.auroc == pytest.approx(metrics.roc_auc_score(planted, -scores))


def test_the_interval_of_dependent_pairs_is_that_of_their_prompts():
    rows = [
        {"pair_id": f"{i}/{j}", "section": "a", "group": f"p{i}", "reward_margin": 1.0 if i % 3 else -1.0}
        for i in range(12)
        for j in range(9)
    ]
    found = section_accuracy(schema.table(rows, schema.REWARDS))["a"]
    alone = section_accuracy(schema.table([{**row, "group": None} for row in rows], schema.REWARDS))["a"]
    assert (found.n, found.accuracy) == (alone.n, alone.accuracy) == (108, 8 / 12)
    assert found.high - found.low > 2.5 * (alone.high - alone.low)
