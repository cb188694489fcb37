"""Faults that show only over several rows: labels with names, names in place of responses, the prompt of a file."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.layout_rows import ASKED, BAD, GOOD, ROWS, SIDES, USER
from support.messages import short

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import NormalisePairs, plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.formats.notes import BEGUN, FOLLOWING, TOOLS
from safer_ray.formats.registry import look_at

ANSWERS = [
    ("Boil it for eight minutes.", "Boil it."),
    ("Lima is the capital.", "Cusco, of course."),
    ("Seven.", "Six?"),
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **settings):
    """All rows of a source, pairs and refused ones."""
    source = SourceConfig(path=str(path), **settings)
    normalise = NormalisePairs([source], 100_000)
    return [short(row) for f in plan_sources([source]) for row in normalise(read_raw(f, source)).to_pylist()]


def with_classes(path, columns, **features):
    """A Parquet file as `datasets` writes one with `ClassLabel`s."""
    described = {"info": {"features": features}}
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(described)}), path)
    return path


def names(*values):
    return {"_type": "ClassLabel", "names": list(values)}


# Labels that the schema gives names


@pytest.mark.parametrize(
    "classes", [("desirable", "undesirable"), ("good", "poor"), ("False", "True"), ("undesirable", "desirable")]
)
def test_a_label_is_the_name_that_the_schema_gives_it(tmp_path, classes):
    good = next(i for i, name in enumerate(classes) if name in ("desirable", "good", "True"))
    columns = {"prompt": [ASKED] * 2, "completion": list(SIDES.values()), "label": [good, 1 - good]}
    (pair,) = read(with_classes(tmp_path / "kto.parquet", columns, label=names(*classes)))
    assert (pair["chosen"], pair["rejected"]) == ([GOOD], [BAD])


def test_names_of_labels_are_read_in_lists_and_mappings_too(tmp_path):
    choices = {"choices": list(SIDES.values()), "labels": [1, 0]}
    features = {
        "choices": [{"dtype": "string", "_type": "Value"}],
        "labels": {"_type": "Sequence", "feature": names("1", "0")},
    }
    path = with_classes(tmp_path / "hhh.parquet", {"input": [ASKED], "targets": [choices]}, targets=features)
    assert read(path)[0]["chosen"] == [BAD]


def test_a_label_that_is_missing_or_has_no_name_is_refused(tmp_path):
    columns = {"prompt": [ASKED] * 3, "response_a": ["x"] * 3, "response_b": ["y"] * 3, "winner": [0, -1, 7]}
    path = with_classes(tmp_path / "arena.parquet", columns, winner=names("model_a", "model_b"))
    reasons = [row["refused"] for row in read(path)]
    assert reasons[:2] == [None, "no preference: winner is null"]
    assert reasons[2].startswith("unknown label: winner is 7 (of 2 names)")


@pytest.mark.parametrize(
    ("name", "column", "labels"), [("llmbar", "label", (0, 1)), ("pku_saferlhf", "safer_response_id", (1, 2))]
)
def test_numbers_that_may_count_from_another_one_are_refused_whole(tmp_path, name, column, labels):
    path = written(tmp_path / "rows.jsonl", [ROWS[name] | {column: label} for label in labels])
    with pytest.raises(UserError, match=f"{column} is one of {labels[0]}, {labels[1]}, wanted"):
        read(path)


# Names in place of responses


@pytest.mark.parametrize(
    ("sides", "columns"),
    [
        (("model_a", "model_b"), ("model_a_response", "model_b_response")),
        (("1", "2"), ("candidate_1", "candidate_2")),
        (("gpt-4", "llama"), ("gpt-4", "llama")),
        (("right", "left"), ("left", "right")),
        ((8.5, 3.0), ("chosen_text", "rejected_text")),
        (("8.5", "3.0"), ("chosen_text", "rejected_text")),
        (("True", "False"), ("one", "two")),
        (("resp_0a", "resp_0b"), ("chosen_text", "rejected_text")),
    ],
)
def test_sides_that_name_their_responses_are_refused(tmp_path, sides, columns):
    rows = [
        {"prompt": f"What is {i}?", "chosen": sides[0], "rejected": sides[1], **dict(zip(columns, both, strict=True))}
        for i, both in enumerate(ANSWERS[:2] * 2)
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=f"chosen and rejected are .*{columns[0]}") as told:
        read(path)
    assert "--format canonical" in str(told.value)
    if isinstance(sides[0], str):
        assert read(path, format="canonical")[0]["chosen"][0]["content"] == sides[0]


def test_sides_that_are_names_of_models_are_refused(tmp_path):
    row = ROWS["arena"] | {"model_a": "gpt-4", "model_b": "claude", "chosen": "claude", "rejected": "gpt-4"}
    with pytest.raises(UserError, match="'claude' and 'gpt-4' of the values of model_b and model_a"):
        read(written(tmp_path / "rows.jsonl", [row | {"prompt": ASKED}]))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Yes", "rejected": "No", "explanation": "Since it is so, and not otherwise."},
        {"chosen": "42", "rejected": "41"},
        {"chosen": "A", "rejected": "B", "subject": "History of Peru"},
        {
            "chosen": "Yes.",
            "rejected": "No, and that is final.",
            "one": "A long text here and there.",
            "two": "b c d e f g h",
        },
    ],
)
def test_short_answers_are_responses(tmp_path, row):
    found = read(written(tmp_path / "rows.jsonl", [row | {"prompt": f"Is it {i}?"} for i in range(5)]))
    assert [pair["chosen"][0]["content"] for pair in found] == [row["chosen"]] * 5


# Columns that are carried


def test_a_column_that_is_carried_is_no_part_of_the_prompt(tmp_path):
    row = {"instruction": ASKED, "input": "batch 7", "history": [["a", "b"]], "system_prompt": "guide v3", **SIDES}
    (pair,) = read(written(tmp_path / "a.jsonl", [row]), carried=("input", "history", "system_prompt"))
    assert pair["prompt"] == [USER]
    assert json.loads(pair["extra"]) == {name: row[name] for name in ("input", "history", "system_prompt")}


def test_a_layout_is_known_without_the_columns_that_are_carried(tmp_path):
    row = {"question": "Which is kinder?", "input": ASKED, **SIDES}
    assert read(written(tmp_path / "a.jsonl", [row]), carried=("question",))[0]["prompt"] == [USER]


def test_rows_of_one_response_carry_columns_too(tmp_path):
    rows = [
        row | {"context": "meta"}
        for row in ({"prompt": ASKED, "completion": text, "label": text == SIDES["chosen"]} for text in SIDES.values())
    ]
    path = written(tmp_path / "kto.jsonl", rows)
    assert {row["refused"].partition(":")[0] for row in read(path)} == {"two prompts"}
    (pair,) = read(path, carried=("context",))
    assert (pair["prompt"], pair["chosen"]) == ([USER], [GOOD])
    assert json.loads(pair["extra"]) == {"chosen_context": "meta", "rejected_context": "meta"}


# The prompt of a file


def test_a_row_without_its_prompt_takes_no_other_column_where_the_files_rows_have_one(tmp_path):
    rows = [{"prompt": "", "input": "en-US", **SIDES}, {"prompt": ASKED, "input": "", **SIDES}]
    assert [row["refused"] for row in read(written(tmp_path / "some.jsonl", rows))] == ["empty text: prompt", None]
    (pair,) = read(written(tmp_path / "none.jsonl", [{"prompt": None, "input": ASKED, **SIDES}]))
    assert pair["prompt"] == [USER]


def test_prompts_that_are_all_one_text_are_told_where_another_text_differs(tmp_path):
    rows = [{"prompt": "support_v3", "user_says": f"How is number {i}?", **SIDES} for i in range(3)]
    notes = [row["notes"] for row in read(written(tmp_path / "rows.jsonl", rows))]
    assert (
        notes
        == [["the first prompts of the file are all one text, while user_says differs: is that a part of the prompt?"]]
        * 3
    )


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "customer", "content": ASKED}],
        [{"speaker": "user", "utterance": ASKED}],
        {"system": "Be kind.", "user": ASKED},
        [{"type": "text", "text": ASKED}],
        {"turns": [ASKED]},
    ],
)
def test_a_dialogue_in_json_that_is_no_messages_is_refused_by_its_column(tmp_path, prompt):
    path = written(tmp_path / "rows.jsonl", [{"prompt": json.dumps(prompt), **SIDES}])
    with pytest.raises(UserError, match=r"prompt holds (lists of )?mappings .* as JSON text, and no messages"):
        read(path)


def test_json_that_is_asked_for_is_a_prompt(tmp_path):
    asked = json.dumps({"task": "Add", "numbers": [1, 2]})
    assert read(written(tmp_path / "rows.jsonl", [{"prompt": asked, **SIDES}]))[0]["prompt"][0]["content"] == asked


def test_lists_in_pythons_repr_are_refused_by_their_columns(tmp_path):
    rows = [{"prompt": "q", "chosen": str([f"good {i}"]), "rejected": str([f"bad {i}"])} for i in range(2)]
    with pytest.raises(UserError, match=r"lists as Python's repr writes them, say \"\['good 0'\]\""):
        read(written(tmp_path / "rows.jsonl", rows))


def test_an_answer_that_is_a_message_in_json_is_text_where_most_of_its_column_are(tmp_path):
    answer = json.dumps({"role": "assistant", "content": "Hello"})
    rows = [{"prompt": "Show me a message.", "chosen": answer, "rejected": "role=assistant"}] * 2
    pair = read(written(tmp_path / "rows.jsonl", rows))[0]
    assert pair["chosen"] == [{"role": "assistant", "content": answer}]
    assert pair["notes"] == ["chosen could be messages in JSON, and is taken as text, as most are in its file"]


# Margins


@pytest.mark.parametrize("name", ["arena", "arena_conversations", "pku_saferlhf", "named_responses", "llmbar"])
def test_a_margin_of_two_responses_in_an_order_is_carried_and_not_read(tmp_path, name):
    (pair,) = read(written(tmp_path / "rows.jsonl", [ROWS[name] | {"margin": -2}]))
    assert (pair["label_margin"], json.loads(pair["extra"])["margin"]) == (None, -2)
    assert pair["notes"] == ["margin is carried and not read: it may be the first response's less the second's"]


@pytest.mark.parametrize(
    "name", ["helpsteer2", "helpsteer3", "shp", "stack_exchange", "distilabel", "ultrafeedback_raw"]
)
def test_a_layouts_own_margin_holds_whatever_others_a_row_has(tmp_path, name):
    plain = read(written(tmp_path / "plain.jsonl", [ROWS[name]]))[0]["label_margin"]
    more = read(written(tmp_path / "more.jsonl", [ROWS[name] | {"margin": -9, "label_margin": -9}]))[0]
    assert plain == more["label_margin"] != -9


def test_the_margin_stands_in_one_column_of_a_file(tmp_path):
    rows = [{"prompt": ASKED, **SIDES, "margin": margin, "score_diff": -3} for margin in (0.5, None)]
    assert [row["label_margin"] for row in read(written(tmp_path / "rows.jsonl", rows))] == [0.5, None]


def test_a_rating_of_minus_one_is_none_where_no_other_is_below_zero(tmp_path):
    rows = [{"prompt": ASKED, **SIDES, "chosen_rating": one, "rejected_rating": 2} for one in (4, -1)]
    found = read(written(tmp_path / "rows.jsonl", rows))
    assert [row["label_margin"] for row in found] == [2, None]
    assert found[1]["notes"][0].startswith("a rating of chosen_rating or rejected_rating is -1")
    rewards = [row | {"rejected_rating": -0.5} for row in rows]
    assert [row["label_margin"] for row in read(written(tmp_path / "rewards.jsonl", rewards))] == [4.5, -0.5]


# Parts of the prompt, and what stands for none


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("chat_history", [USER, GOOD]),
        ("earlier_turns", json.dumps([USER, BAD, {"role": "user", "content": "And now?"}])),
        ("documents", ["The office opens at nine.", "It is shut at five."]),
        ("passage", "The office opens at nine."),
        ("user_message", "When do you open?"),
    ],
)
def test_a_part_of_the_prompt_in_a_column_of_its_own_is_refused_by_name(tmp_path, column, value):
    path = written(tmp_path / "rows.jsonl", [{"prompt": "Go on.", "chosen": "Yes.", "rejected": "No.", column: value}])
    assert read(path)[0]["refused"].startswith(f"two prompts: {column} says what the prompt")
    assert read(path, carried=(column,))[0]["refused"] is None


def test_documents_within_the_prompt_and_messages_of_judges_are_no_part_that_is_dropped(tmp_path):
    row = {"prompt": "Read this: it opens at nine. When?", "documents": ["it opens at nine."], **SIDES}
    (pair,) = read(
        written(tmp_path / "rows.jsonl", [row | {"labelling_prompt": [{"role": "user", "content": "Judge."}]}])
    )
    assert (pair["refused"], pair["notes"]) == (None, ["labelling_prompt holds messages, and is no part of the prompt"])


def test_a_system_instruction_is_the_first_message(tmp_path):
    (pair,) = read(written(tmp_path / "rows.jsonl", [{"prompt": ASKED, "system_instruction": "Be kind.", **SIDES}]))
    assert pair["prompt"] == [{"role": "system", "content": "Be kind."}, USER]


def test_marks_that_stand_for_no_text_are_left_out_and_told(tmp_path):
    row = {"instruction": ASKED, "input": "<noinput>", "system": "nan", **SIDES}
    (pair,) = read(written(tmp_path / "rows.jsonl", [row]))
    assert pair["prompt"] == [USER]
    assert pair["notes"] == ["input is '<noinput>', which is read as none", "system is 'nan', which is read as none"]


def test_lists_of_one_turn_are_unwrapped_where_the_prompt_and_both_responses_are_some(tmp_path):
    row = {name: json.dumps([text]) for name, text in {"prompt": ASKED, **SIDES}.items()}
    (pair,) = read(written(tmp_path / "rows.jsonl", [row]))
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([USER], [GOOD], [BAD])
    several = row | {"chosen": json.dumps(["a", "b"])}
    assert read(written(tmp_path / "several.jsonl", [several]))[0]["refused"].startswith("several turns: chosen has 2")


def test_a_list_that_is_an_answer_stays_one(tmp_path):
    row = {"prompt": "List the capital.", "response_a": '["Lima"]', "response_b": "Lima", "winner": "model_a"}
    assert read(written(tmp_path / "rows.jsonl", [row]))[0]["chosen"][0]["content"] == '["Lima"]'


def test_ties_of_named_responses_are_no_preference(tmp_path):
    tie = {"chosen": "tie", "rejected": "tie"}
    found = read(written(tmp_path / "rows.jsonl", [ROWS["named_responses"] | tie] * 2 + [ROWS["named_responses"]]))
    assert [row["refused"] for row in found] == ["no preference: chosen is tie"] * 2 + [None]


def test_messages_in_pythons_repr_are_refused_however_long_the_first_is(tmp_path):
    long = str([{"content": "x" * 20_000, "role": "user"}, {"content": "y", "role": "assistant"}])
    (pair,) = read(written(tmp_path / "rows.jsonl", [{"prompt": ASKED, "chosen": long, "rejected": "Go away."}]))
    assert pair["refused"].startswith("not JSON: chosen holds messages as Python's repr")


def test_one_side_alone_has_a_system_message(tmp_path):
    row = {"prompt": ASKED, "chosen": "Fine.", "rejected": [{"role": "system", "content": "Be rude."}, USER, BAD]}
    assert read(written(tmp_path / "rows.jsonl", [row]))[0]["refused"].startswith("prompts differ")


def test_empty_turns_and_repeated_prompts_are_told(tmp_path):
    prompt = [USER, {"role": "assistant", "content": ""}, USER]
    sides = {side: f"{ASKED} {text}" for side, text in SIDES.items()}
    (pair,) = read(written(tmp_path / "rows.jsonl", [{"prompt": prompt, **sides, "tools": [{"name": "f"}]}]))
    assert {BEGUN, FOLLOWING, TOOLS} == set(pair["notes"])


def test_rows_of_one_prompt_that_differ_in_another_text_are_told(tmp_path):
    rows = [
        {"prompt": "Sum it up.", "report": f"Report number {i}", "completion": text, "label": bool(i)}
        for i, text in enumerate(("bad", "good"))
    ]
    (pair,) = read(written(tmp_path / "kto.jsonl", rows))
    assert pair["notes"] == ["the two rows of a pair have one prompt, and differ in report, too"]


# Files that are of no layout


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (("prompt", "completion", "label", "x" * 200), "nearest is kto .*with other values"),
        (("prompt", "completion"), "nearest is kto .*, without label"),
        (tuple(f"column_{i}_{'x' * 100}" for i in range(99)), "and 91 more; the simplest is canonical: prompt, chosen"),
    ],
)
def test_columns_that_fit_no_layout_are_told_with_the_nearest_one(columns, told):
    with pytest.raises(UserError, match=told) as error:
        look_at([dict.fromkeys(columns, "x")])
    assert len(str(error.value)) < 500


def test_a_table_of_tabs_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "rows.tsv").write_text("prompt\tchosen\trejected\n")
    with pytest.raises(UserError, match=r"unknown kind of file.*sep='\\t'"):
        read(tmp_path / "rows.tsv")
