"""Nectar: a prompt with ranked answers of several models, as one pair or as many."""

import json
import re

import pytest
from pydantic import ValidationError
from support.messages import short

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import NormalisePairs, plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.formats.declaration import NOTED
from safer_ray.formats.registry import FORMATS, row_format
from safer_ray.pipeline.inspection import inspect

ROW = {
    "prompt": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant: ",
    "answers": [
        {"answer": "So so.", "model": "b", "rank": 2.0},
        {"answer": "Fine, thanks.", "model": "a", "rank": 1.0},
        {"answer": "Go away.", "model": "c", "rank": 7.0},
    ],
    "turns": 2,
    "num_responses": 3,
    "source": ["sharegpt"],
    "good_natured": True,
}


def pairs_of(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(path), **settings)
    normalise = NormalisePairs([source], 10_000)
    return [short(row) for f in plan_sources([source]) for row in normalise(read_raw(f, source)).to_pylist()]


@pytest.mark.parametrize("settings", [{}, {"format": "nectar"}, {"pairs": "best_worst"}])
def test_the_best_answer_is_paired_with_the_worst(tmp_path, settings):
    (pair,) = pairs_of(tmp_path, ROW, **settings)
    assert pair["refused"] is None
    assert [turn["content"] for turn in pair["prompt"]] == ["Hello", "Hi!", "How are you?"]
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["Fine, thanks.", "Go away."]
    assert dict(pair["labels"]) == {
        "chosen_model": "a",
        "chosen_rank": "1.0",
        "rejected_model": "c",
        "rejected_rank": "7.0",
    }
    assert json.loads(pair["extra"]).keys() == {"turns", "num_responses", "source", "good_natured"}


def test_all_pairs_of_unequal_ranks_have_ids_of_their_own(tmp_path):
    row = ROW | {"id": "x", "answers": [*ROW["answers"], {"answer": "Hm.", "model": "d", "rank": 2}]}
    pairs = pairs_of(tmp_path, row, pairs="all")
    assert {pair["pair_id"] for pair in pairs} == {"x/1-0", "x/1-3", "x/1-2", "x/0-2", "x/3-2"}
    assert all(pair["refused"] is None and pair["row_key"] == "rows.jsonl#0" for pair in pairs)
    without = pairs_of(tmp_path, ROW, pairs="all")
    assert len({pair["pair_id"] for pair in without}) == 3


@pytest.mark.parametrize(
    "key", [{"pair_id": "k"}, {"uid": "k"}, {"id": 1.5}, {"id": ""}, {"id": True}, {"id": 7, "uid": "k"}]
)
def test_all_pairs_of_several_rows_have_ids_of_their_own_by_whatever_key(tmp_path, key):
    rows = [
        ROW | {name: f"{value}{i}" if value and value is not True else value for name, value in key.items()}
        for i in range(3)
    ]
    rows = [row | {"prompt": f"{row['prompt']}{i} "} for i, row in enumerate(rows)]
    pairs = pairs_of(tmp_path, *rows, pairs="all")
    assert len(pairs) == len({pair["pair_id"] for pair in pairs}) == 9


def test_labels_of_the_row_stay_beside_those_of_its_sides(tmp_path):
    (pair,) = pairs_of(tmp_path, ROW | {"labels": {"harm": "x"}})
    assert dict(pair["labels"])["harm"] == "x"
    assert dict(pair["labels"])["chosen_model"] == "a"


def test_a_row_that_would_be_cut_into_too_many_pairs_is_refused(tmp_path):
    answers = [{"answer": f"a {i}", "rank": i} for i in range(150)]
    (pair,) = pairs_of(tmp_path, ROW | {"answers": answers}, pairs="all")
    assert pair["refused"] == "too many pairs in a row: 11175, limit 10000"
    row = {"prompt": "p", "chosen": ["a"] * 200, "rejected": ["b"] * 200, "subset": "Ties", "id": 1}
    (pair,) = pairs_of(tmp_path, row)
    assert pair["refused"] == "too many pairs in a row: 40000, limit 10000"


def without(name):
    first, *others = ROW["answers"]
    return ROW | {"answers": [{key: value for key, value in first.items() if key != name}, *others]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"answers": ROW["answers"][:1]}, "fewer than two answers: 1"),
        (ROW | {"answers": []}, "fewer than two answers: 0"),
        (ROW | {"answers": [a | {"rank": 3} for a in ROW["answers"]]}, "no preference: all 3 answers are equally good"),
        (without("rank"), r"missing rank: answers\[0\]"),
        (without("answer"), r"empty text: answers\[0\].answer"),
        (ROW | {"answers": [*ROW["answers"], "text"]}, r"wrong type: answers\[3\] is text"),
        (
            ROW | {"answers": [*ROW["answers"], {"answer": "a", "rank": "last"}]},
            r"wrong type: answers\[3\].rank is text",
        ),
        (ROW | {"answers": "none"}, "wrong type: answers is text, wanted a list"),
        (ROW | {"prompt": ""}, "empty text: prompt"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(tmp_path, row, reason):
    good, bad = pairs_of(tmp_path, ROW, row)
    assert good["refused"] is None
    assert re.match(reason, bad["refused"]), bad["refused"]
    assert bad["raw"]


def test_an_unknown_option_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValidationError, match="no pairs is called 'worst_best'; choose one of one, all, best_worst, adjacent"
    ):
        SourceConfig(path="x", pairs="worst_best")
    with pytest.raises(ValidationError, match="pairs: all means nothing in format hh_rlhf"):
        SourceConfig(path="x", format="hh_rlhf", pairs="all")
    with pytest.raises(UserError, match=r"rows.jsonl: pairs: all means nothing in format canonical"):
        pairs_of(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, pairs="all")


def test_an_option_that_is_not_set_is_in_no_recipe():
    assert "pairs" not in SourceConfig(path="x").model_dump(mode="json")
    assert SourceConfig(path="x", pairs="all").model_dump(mode="json")["pairs"] == "all"


def test_inspecting_nectar_names_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    found = inspect(str(path))
    assert (found.format, found.good, found.refused) == ("nectar", 1, {})


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_the_columns_that_it_declares(name):
    known = FORMATS[name]
    assert known.name == name
    assert row_format({}) is None
    assert known.options.keys() <= SourceConfig.model_fields.keys()
    assert not known.fits(dict.fromkeys(known.columns[1:]))


NAN = float("nan")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "completions": [{"response": f"{s}", "overall_score": s} for s in (NAN, 3, 5)]},
        {"input": "q", "generations": ["a", "b", "c"], "ratings": [None, 3, 5]},
    ],
    ids=["completions", "generations"],
)
@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_responses_without_a_score_are_told(tmp_path, row, pairs):
    (pair,) = pairs_of(tmp_path, row, pairs=pairs)
    assert pair["notes"] == ["1 of 3 responses have no score, and are in no pair"]
    assert pair["extra"] is None
    found = inspect(str(tmp_path / "rows.jsonl"))
    assert "1 of 1 pairs: 1 of 3 responses have no score, and are in no pair" in found.told
    assert NOTED not in (*found.columns, *found.used)


def test_a_row_with_too_few_scores_says_how_many_have_none(tmp_path):
    row = {"input": "q", "generations": ["a", "b", "c"], "ratings": [None, None, 5]}
    (pair,) = pairs_of(tmp_path, row)
    assert pair["refused"] == "fewer than two answers: 1, and 2 without a score"


def test_a_number_and_a_text_that_are_the_same_id_are_told(tmp_path):
    sides = {"chosen": "a", "rejected": "b"}
    rows = [{"id": 1, "prompt": "q", **sides}, {"id": "1", "prompt": "r", **sides}, {"id": 1.5, "prompt": "s", **sides}]
    assert [pair["pair_id"] for pair in pairs_of(tmp_path, *rows)] == ["1", "1", "1.5"]
    told = "1 of 3 pairs repeat an id, or all that another says: `pairs` quarantines these"
    assert told in inspect(str(tmp_path / "rows.jsonl")).told
