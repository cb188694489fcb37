"""Pair scores, suspicion and reasons."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from support.made import make_codes

from safer_ray import schema
from safer_ray.errors import UserError
from safer_ray.features.bundle import read_features
from safer_ray.features.scoring import Features, ScoreCodes, pair_reasons, pair_scores, parse_features, suspicion

ROWS = [
    {
        "n_prompt_tokens": 10,
        "chosen": [(5, {0: 8.0}), (12, {0: 1.0, 1: 2.0}), (20, {0: 4.0, 7: 9.0})],
        "rejected": [(5, {0: 8.0}), (12, {2: 4.0})],
        "chosen_reward": 1.5,
        "rejected_reward": -0.5,
    },
    {"n_prompt_tokens": 10, "chosen": [(15, {1: 3.0})], "chosen_fallback": True, "rejected": []},
]
RESPONSE = Features([0], [1, 2], "response")
PAPER = Features([0], [1, 2], "paper")


def test_scores_are_means_over_ends_of_safe_minus_unsafe():
    codes = make_codes(ROWS)
    # response: chosen ((1 - 2) + 4) / 2, rejected -4 / 1; the fallback counts
    assert pair_scores(codes, RESPONSE).tolist() == [1.5 + 4, -3]
    # paper: chosen (8 - 1 + 4) / 3, rejected (8 - 4) / 2; the fallback does not count
    assert pair_scores(codes, PAPER).tolist() == pytest.approx([11 / 3 - 2, 0])


def test_no_pair_and_no_activation_give_no_score():
    assert pair_scores(schema.CODES.empty_table(), PAPER).tolist() == []
    assert pair_scores(make_codes([{}, {}]), PAPER).tolist() == [0, 0]


def test_a_selected_feature_that_never_fires_changes_nothing():
    codes = make_codes(ROWS)
    assert pair_scores(codes, Features([0, 5000], [1, 2], "paper")).tolist() == pair_scores(codes, PAPER).tolist()


entries = st.dictionaries(st.integers(0, 5), st.floats(0.125, 8, width=32), max_size=4)
sides = st.lists(entries, max_size=4).map(lambda found: [(6 * (i + 1), values) for i, values in enumerate(found)])
rows = st.lists(
    st.fixed_dictionaries({"n_prompt_tokens": st.sampled_from([0, 7, 13]), "chosen": sides, "rejected": sides}),
    min_size=1,
    max_size=6,
)
selections = st.sampled_from([Features([0, 3], [1], "paper"), Features([2], [4, 5], "response"), RESPONSE])


@settings(deadline=None, max_examples=60)
@given(rows, selections)
def test_swapping_the_responses_negates_the_score(found, features):
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in found]
    assert pair_scores(make_codes(swapped), features) == pytest.approx(-pair_scores(make_codes(found), features))


@settings(deadline=None, max_examples=60)
@given(rows, selections)
def test_reasons_sum_to_the_score(found, features):
    codes = make_codes(found)
    reasons = pair_reasons(codes, features, 100)
    assert [sum(r["contribution"] for r in row) for row in reasons] == pytest.approx(pair_scores(codes, features))


def test_reasons_name_the_largest_contributions_and_where_they_fire_most():
    reasons = pair_reasons(make_codes(ROWS), RESPONSE, 2)
    assert reasons[0] == [
        {"feature": 2, "sign": -1, "contribution": 4.0, "side": "rejected", "end": 120},
        {"feature": 0, "sign": 1, "contribution": 2.5, "side": "chosen", "end": 200},
    ]
    assert reasons[1] == [{"feature": 1, "sign": -1, "contribution": -3.0, "side": "chosen", "end": 150}]
    assert pair_reasons(make_codes(ROWS), RESPONSE, 0) == [[], []]


def test_suspicion_is_the_mid_rank_complement():
    reference = np.array([3.0, 1.0, 1.0, 2.0])
    assert suspicion(np.array([0, 1, 1.5, 2, 3, 9]), reference).tolist() == [1, 0.75, 0.5, 0.375, 0.125, 0]


@given(st.lists(st.integers(-3, 3), min_size=1), st.lists(st.integers(-4, 4), max_size=20))
def test_suspicion_falls_with_the_score_inside_the_unit_interval(reference, scores):
    reference, scores = np.array(reference, dtype=float), np.array(scores, dtype=float)
    found = suspicion(scores, reference)
    assert ((found >= 0) & (found <= 1)).all()
    order = np.argsort(scores)
    assert (np.diff(found[order]) <= 0).all()
    wanted = 1 - (rankdata(reference) - 0.5) / len(reference)
    assert suspicion(reference, reference) == pytest.approx(wanted)


def test_scored_rows_have_flags_and_null_margins_where_rewards_are_missing():
    codes = make_codes(ROWS)
    table = ScoreCodes(RESPONSE, np.array([-3.0, 0.0, 1.0, 5.5]), 0.2, 3)(codes)
    assert table.schema == schema.SCORES
    first, second = table.to_pylist()
    assert (first["reward_margin"], second["reward_margin"]) == (2.0, None)
    assert second["reward_chosen"] is None
    assert (first["suspicion"], second["suspicion"]) == (0.125, 0.875)
    assert (first["flag"], second["flag"]) == (False, True)
    assert (first["decision"], second["decision"]) == ("keep", "review")
    assert first["row_key"] is None


def test_columns_of_the_pairs_ride_along():
    codes = make_codes(ROWS)
    for name in ("row_key", "extra"):
        codes = codes.append_column(name, [[f"{name}0", f"{name}1"]])
    table = ScoreCodes(RESPONSE, np.array([0.0]), 0.05, 1)(codes)
    assert table["row_key"].to_pylist() == ["row_key0", "row_key1"]
    assert table["extra"].to_pylist() == ["extra0", "extra1"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "wanted"),
        ({"safe": [1]}, "wanted"),
        ({"safe": [], "unsafe": []}, "at least one"),
        ({"safe": [1], "unsafe": [1]}, "distinct"),
        ({"safe": [-1], "unsafe": []}, "ids >= 0"),
        ({"safe": ["1"], "unsafe": []}, "ids >= 0"),
        ({"safe": [1], "unsafe": [], "mode": "both"}, "mode 'both' is neither"),
    ],
)
def test_selections_that_are_none_are_refused(tree, message):
    with pytest.raises(UserError, match=message):
        parse_features(tree)


def test_the_files_mode_holds_unless_another_is_asked_for():
    tree = {"safe": [1], "unsafe": [], "mode": "paper"}
    assert parse_features(tree).mode == "paper"
    assert parse_features(tree, "response").mode == "response"
    assert parse_features({"safe": [1], "unsafe": []}).mode == "response"


def test_missing_and_damaged_feature_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no features at .*run stage `select`"):
        read_features(tmp_path / "features.json")
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(UserError, match=r"features.json is not JSON"):
        read_features(tmp_path / "features.json")
