"""What `bench.precision` makes of two sets of values."""

import numpy as np

from bench.precision import change


def test_equal_values_differ_in_nothing():
    values = np.random.default_rng(0).normal(size=100)
    assert np.allclose(change(values, values.copy(), values < -1, values), (1, 0, 0, 0))


def test_what_differs_is_told_by_rank_by_area_by_flags_and_by_spread():
    values = np.arange(100.0)
    swapped = values < 20
    other = values.copy()
    other[[19, 20]] = other[[20, 19]]  # one of 20 x 80 orders of a swapped and a clean pair
    other[5] = 0.5  # flagged, among 100 of which 5 are
    found = change(values, other, swapped, values)
    assert 0.999 < found.spearman < 1
    assert np.isclose(found.auroc_change, 1 / 1600)
    assert found.flags_changed == 0.01
    assert np.isclose(found.largest, 4.5 / values.std())
