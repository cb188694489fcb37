"""Row filters."""

import pyarrow as pa
import pytest
from support.made import make_pair

from safer_ray import schema
from safer_ray.config.where import Condition, parse_where, where_mask

ROWS = schema.table(
    [
        make_pair("a", "p", "c", "r", section="safety", source="pku", labels=[("kind", "benign")]),
        make_pair("b", "p", "c", "r", section="chat", source="hh", labels=[("kind", "harmful")]),
        make_pair("c", "p", "c", "r", section=None, source="pku", labels=None),
    ],
    schema.PAIRS,
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (None, "abc"),
        ("section == safety", "a"),
        ("section != safety", "bc"),
        ('section == "safety"', "a"),
        ("section=='safety'", "a"),
        ("source == pku and section == safety", "a"),
        ("labels.kind == benign", "a"),
        ("labels.kind != benign", "bc"),
        ("labels.other == x", ""),
        ("pair_id != a and pair_id != c", "b"),
    ],
)
def test_conditions_keep_the_rows_that_meet_all_of_them(text, kept):
    ids = [key for key, inside in zip("abc", where_mask(ROWS, text), strict=True) if inside]
    assert "".join(ids) == kept


def test_a_table_without_rows_has_an_empty_mask():
    assert where_mask(schema.PAIRS.empty_table(), "section == safety and labels.kind == benign").tolist() == []


def test_quoted_values_may_hold_spaces():
    assert parse_where('section == "two words"') == (Condition("section", "==", "two words"),)


@pytest.mark.parametrize("text", ["section", "section = safety", "section == ", "== safety", "section == a b"])
def test_what_does_not_parse_is_named(text):
    with pytest.raises(ValueError, match=r"cannot read the condition.*section == safety"):
        parse_where(text)


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_condition_is_no_condition_that_all_rows_meet(text):
    with pytest.raises(ValueError, match="the condition is empty"):
        parse_where(text)


def test_an_unknown_column_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown column 'score'.*section.*labels\.KEY"):
        parse_where("score == 1")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("label_margin < 0", ["a"]),
        ("label_margin <= 0", ["a", "b"]),
        ("label_margin > 0.5", ["c"]),
        ("label_margin >= 1 and section == chat", ["c"]),
        ("label_margin == 0", ["b"]),
        ("label_margin != 0", ["a", "c", "d"]),
    ],
)
def test_a_number_is_compared_as_one_and_a_null_is_in_no_order(text, kept):
    table = pa.table({"pair_id": ["a", "b", "c", "d"], "label_margin": [-1.5, 0, 1, None], "section": ["chat"] * 4})
    assert table.filter(pa.array(where_mask(table, text)))["pair_id"].to_pylist() == kept


@pytest.mark.parametrize(("text", "told"), [("section < chat", "section is text"), ("label_margin < low", "no number")])
def test_what_cannot_be_ordered_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        parse_where(text)
