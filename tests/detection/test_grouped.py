"""Intervals and tests of pairs that come in groups, against simulations, textbook numbers and plain enumeration."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from safer_ray.detection.evaluation import wilson
from safer_ray.detection.grouped import (
    FEW,
    cautious_interval,
    difference_interval,
    effective_count,
    group_numbers,
    group_sums,
    half_width,
    holm,
    sign_flip_p,
    standard_error,
    student_p,
)
from safer_ray.schema import NO_PROMPT

GROUPS = 100


def drawn(rng, shares, together=0.9):
    """One evaluation of GROUPS prompts with 1 to 30 pairs each: values -1, 0 and 1 with these shares, which most
    prompts have for all their pairs at once; and the prompt of each pair."""
    sizes = rng.integers(1, 31, GROUPS)
    groups = np.repeat(np.arange(GROUPS), sizes)
    one, own = rng.choice([-1, 0, 1], p=shares, size=GROUPS), rng.choice([-1, 0, 1], p=shares, size=len(groups))
    values = np.where((rng.random(GROUPS) < together)[groups], one[groups], own)
    return values.astype(np.float64), groups.astype(str).astype(object)


def test_equally_good_models_are_told_apart_in_one_table_of_twenty():
    """And by the test that takes pairs of one prompt for independent ones in far more: the simulation bites."""
    rng = np.random.default_rng(0)
    alarms = {"by prompt": 0, "by pair": 0}
    for _ in range(2000):
        values, groups = drawn(rng, [0.2, 0.6, 0.2])
        alarms["by prompt"] += sign_flip_p(group_sums(values, groups).totals) < 0.05
        alarms["by pair"] += binomtest(int((values > 0).sum()), int((values != 0).sum())).pvalue < 0.05
    assert 0.04 <= alarms["by prompt"] / 2000 <= 0.06
    assert alarms["by pair"] / 2000 > 0.2


@pytest.mark.parametrize("shares", [(0.2, 0.6, 0.2), (0.1, 0.6, 0.3)])
def test_an_interval_of_a_difference_holds_the_true_one_as_often_as_it_says(shares):
    rng, held = np.random.default_rng(1), 0
    for _ in range(3000):
        low, high = difference_interval(*drawn(rng, shares), draws=400)
        held += low <= shares[2] - shares[0] <= high
    assert 0.93 <= held / 3000 <= 0.97


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_an_interval_of_an_accuracy_holds_the_true_one_as_often_as_it_says(share):
    rng, held = np.random.default_rng(2), 0
    for _ in range(2000):
        right, groups = drawn(rng, [0, 1 - share, share])
        worth = effective_count(right, groups)
        low, high = wilson(right.mean() * worth, worth)
        held += low <= share <= high
    assert 0.93 <= held / 2000 <= 0.97


@given(st.lists(st.integers(-6, 6), max_size=9))
def test_the_p_of_sign_flips_is_that_of_all_choices_of_signs(totals):
    sums = [
        sum(sign * total for sign, total in zip(signs, totals, strict=True))
        for signs in product((-1, 1), repeat=len(totals))
    ]
    assert sign_flip_p(totals) == pytest.approx(np.mean([abs(found) >= abs(sum(totals)) for found in sums]))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 5))
def test_of_groups_of_one_pair_it_is_mcnemars_exact_test(gained, lost, same):
    mcnemar = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert sign_flip_p([1] * gained + [0] * same + [-1] * lost) == pytest.approx(mcnemar, rel=1e-9)


def test_the_smallest_p_has_its_digits_and_many_groups_take_no_time():
    assert sign_flip_p([1] * 400) == pytest.approx(2 * 0.5**400, rel=1e-9)
    assert sign_flip_p([1] * 900 + [-1] * 600) == pytest.approx(2 * binom.cdf(600, 1500, 0.5), rel=1e-9)
    rng = np.random.default_rng(3)
    assert 0 < sign_flip_p(rng.integers(-9, 10, 20_000)) <= 1


def test_five_prompts_that_agree_are_no_proof():
    assert sign_flip_p([9] * 5) == pytest.approx(2 / 2**5)
    assert sign_flip_p([9] * 6) == pytest.approx(2 / 2**6)
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1


def test_holms_adjustment_of_a_table_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.02]) == pytest.approx([1, 1, 0.06])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_makes_a_p_smaller(p):
    adjusted = holm(p)
    assert all(one <= other <= 1 for one, other in zip(p, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))
    assert [adjusted[i] for i in np.argsort(p, kind="stable")] == sorted(adjusted)


def test_pairs_without_a_known_prompt_are_groups_of_their_own():
    found = group_numbers(["a", None, "b", NO_PROMPT, "a", None, NO_PROMPT, "None"])
    assert found[0] == found[4]
    assert len(set(found)) == 7
    assert sorted(set(found)) == list(range(7))
    assert len(group_numbers([])) == 0


def test_nothing_depends_on_the_order_of_the_pairs_and_all_repeats():
    values, groups = drawn(np.random.default_rng(4), [0.2, 0.5, 0.3])
    groups[::7] = None
    order = np.random.default_rng(5).permutation(len(values))
    for figure in (difference_interval, cautious_interval, effective_count):
        assert figure(values, groups) == figure(values, groups)
        assert figure(values[order], groups[order]) == pytest.approx(figure(values, groups), rel=1e-12)
    assert difference_interval(values, groups) != difference_interval(values, groups, seed=1)


def test_where_few_or_no_prompts_differ_an_interval_is_not_nothing():
    none = np.zeros(900), np.repeat(np.arange(100), 9).astype(str)
    low, high = difference_interval(*none)
    assert -0.04 < low < -0.02
    assert high == -low  # of 100 prompts: at most about three differ
    one = np.zeros(90), np.repeat("a", 90)
    assert difference_interval(*one)[1] > 0.9  # one prompt tells nothing of others
    assert difference_interval(np.zeros(0), []) == (-1, 1)
    values, groups = np.repeat([1.0] * (FEW - 1) + [0.0] * 21, 9), np.repeat(np.arange(40), 9).astype(str)
    assert difference_interval(values, groups) == cautious_interval(values, groups)
    low, high = difference_interval(np.repeat([1.0] * 8, 9), np.repeat(np.arange(8), 9).astype(str))
    assert low < 0.6 < high == 1


def test_half_an_interval_is_students_and_wider_for_few_groups():
    draws = np.array([-1.0, 1.0])  # of standard deviation 1
    error = standard_error(draws, 10)
    assert error == pytest.approx(np.sqrt(10 / 9))
    assert half_width(error, 10) == pytest.approx(2.262157 * error, rel=1e-6)
    assert student_p(half_width(error, 10), error, 10) == pytest.approx(0.05)
    assert half_width(standard_error(draws, 100_000), 100_000) == pytest.approx(1.959964, rel=1e-4)


def test_one_group_and_no_difference_are_no_finding():
    assert half_width(standard_error(np.zeros(9), 1), 1) == np.inf
    assert student_p(0.5, np.inf, 1) == student_p(0.0, 0.0, 9) == 1


def test_pairs_of_one_prompt_that_are_right_together_count_as_one():
    right = np.repeat([1.0, 0, 1, 1, 0, 1, 1, 1], 9)
    prompts = np.repeat([f"p{i}" for i in range(8)], 9).astype(object)
    # 7 of 8 prompts: one degree of freedom is the share's; and of 7 degrees Student's 2.365 for the normal 1.960.
    assert effective_count(right, prompts) == pytest.approx(7 * (1.95996 / 2.36462) ** 2, rel=1e-5)
    assert effective_count(right, np.array([f"p{i}" for i in range(72)], dtype=object)) == 72
    assert effective_count(right, [None] * 72) == 72
    assert effective_count(right, [NO_PROMPT] * 72) == 72
    assert effective_count(np.ones(72), prompts) == 8
    assert effective_count(right, ["a"] * 72) == 1
    assert effective_count(np.zeros(0), []) == 0
    rng = np.random.default_rng(0)
    independent = effective_count((rng.random(9000) < 0.7).astype(float), np.repeat(np.arange(1000), 9).astype(str))
    assert 8000 < independent <= 9000
