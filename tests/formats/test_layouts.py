"""Every layout of the registry: a made row of each, the pair that it is, and what is refused by name."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.layout_rows import ASKED, BAD, GOOD, MARGINS, MATCHED, ROWS, SIDES, SYSTEM, USER
from support.messages import short

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import NormalisePairs, plan_file, plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.formats.declaration import Refused
from safer_ray.formats.messages import messages_json
from safer_ray.formats.registry import FORMATS, detect_format, expanded, read_pair, row_format
from safer_ray.schema import to_json


def written(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **settings):
    """All rows of a source, pairs and refused ones."""
    source = SourceConfig(path=str(path), **settings)
    normalise = NormalisePairs([source], 10_000)
    return [short(row) for f in plan_sources([source]) for row in normalise(read_raw(f, source)).to_pylist()]


def test_every_format_has_its_row_here():
    assert ROWS.keys() | {*MATCHED, "trl_explicit"} == FORMATS.keys()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_each_layout_is_read_as_its_pair(tmp_path, name, suffix):
    found = read(written(tmp_path / f"rows{suffix}", [ROWS[name]]))
    assert row_format(ROWS[name]) == name
    assert found[0]["refused"] is None
    assert [found[0][side] for side in ("prompt", "chosen", "rejected")] == [[USER], [GOOD], [BAD]]
    assert found[0]["label_margin"] == MARGINS.get(name)


@pytest.mark.parametrize("column", ["question", "instruction", "query", "input", "context", "history", "messages"])
def test_a_column_that_looks_like_the_prompt_is_never_dropped(tmp_path, column):
    other = "Tell me of tides."
    value = [{"role": "user", "content": other}] if column == "messages" else other
    (pair,) = read(written(tmp_path / "rows.jsonl", [ROWS["trl_implicit"] | {column: value}]))
    assert pair["refused"].startswith(f"two prompts: {column} says what the prompt")
    (carried,) = read(tmp_path / "rows.jsonl", carried=(column,))
    assert (carried["refused"], carried["prompt"]) == (None, [USER])
    assert json.loads(carried["extra"]) == {column: value}
    same = [USER] if column == "messages" else ASKED
    (pair,) = read(written(tmp_path / "same.jsonl", [ROWS["trl_implicit"] | {column: same}]))
    assert (pair["refused"], pair["prompt"]) == (None, [USER])


def test_two_plain_texts_are_no_layout_unless_it_is_named(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"chosen": "Sure. Yes.", "rejected": "Sure. No.", "topic": "x"}])
    with pytest.raises(UserError, match=r"no column holds the prompt .*'topic'.*--format trl_implicit"):
        read(path)
    assert read(path, format="trl_implicit")[0]["prompt"] == [{"role": "user", "content": "Sure."}]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("name", ["canonical", "question", "alpaca", "helpsteer2", "trl_implicit", "nectar"])
def test_a_system_column_is_the_first_message(tmp_path, name, column):
    (pair,) = read(written(tmp_path / "rows.jsonl", [ROWS[name] | {column: "Be kind."}]))
    assert pair["prompt"] == [SYSTEM, USER]
    assert pair["extra"] is None or column not in json.loads(pair["extra"])


def test_two_system_messages_are_refused():
    row = {"prompt": [SYSTEM, USER], **SIDES, "system": "Be rude."}
    with pytest.raises(Refused, match="two system messages: system says other"):
        read_pair(row, "canonical")
    assert read_pair(row | {"system": "Be kind."}, "canonical").prompt == [SYSTEM, USER]


def test_an_instruction_is_followed_by_its_input_and_preceded_by_its_history():
    history = [["Hi", "Hello!"]]
    pair = read_pair({"instruction": "Translate", "input": "Guten Tag", "history": history, **SIDES}, "alpaca")
    assert [m["content"] for m in pair.prompt] == ["Hi", "Hello!", "Translate\nGuten Tag"]
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]


# Messages in other spellings


@pytest.mark.parametrize(
    "spelt",
    [
        json.dumps([USER, GOOD]),
        json.dumps(json.dumps([USER, GOOD])),
        json.dumps({"messages": [USER, GOOD]}),
        [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "Fine, thanks."}],
        {"role": ["user", "assistant"], "content": [ASKED, "Fine, thanks."]},
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "Fine, thanks."}]}],
        [{**USER, "name": None, "tool_calls": None}, {**GOOD, "tool_calls": []}],
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine, thanks.<|im_end|>\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFine, thanks.<|eot_id|>",
        "<bos><start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\nFine, thanks.<end_of_turn>\n",
        "<|user|>\nHow are you?</s>\n<|assistant|>\nFine, thanks.</s>",
        "<s>[INST] How are you? [/INST] Fine, thanks. </s>",
    ],
)
def test_messages_are_read_in_every_spelling(spelt):
    row = {"chosen": spelt, "rejected": [USER, BAD]}
    assert row_format(row) == "trl_implicit"
    pair = read_pair(row, "trl_implicit")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD], [BAD])


def test_llama_2_has_its_system_message_inside_the_first_turn():
    prompt = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHow are you? [/INST]"
    assert read_pair({"prompt": prompt, **SIDES}, "canonical").prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (repr([USER, GOOD]), "not JSON: chosen holds messages as Python's repr"),
        (json.dumps([USER, GOOD])[:-9], "not JSON: chosen begins as messages in JSON do, but"),
        ('[{"role": ' + "[" * 100_000, "not JSON: chosen begins as messages in JSON do, but nested too deep"),
        (
            '[{"role": "assistant", "x": ' + "[" * 900 + "]" * 900 + "}]",
            "not JSON: .* but nested too deep: more than 200",
        ),
        (json.dumps([{"role": "assistant", "content": "\ud800"}]), "not JSON: .* but bad UTF-8: a lone surrogate"),
        (
            [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "unread content: .*image_url",
        ),
        ([{**GOOD, "audio": {"id": 1}}], "unread field: chosen.0..audio"),
        ({"role": ["assistant"], "content": []}, "wrong type: chosen is a mapping of lists of different lengths"),
    ],
)
def test_what_only_looks_like_messages_is_refused(value, reason):
    with pytest.raises(Refused, match=reason):
        read_pair({"prompt": ASKED, "chosen": value, "rejected": "Go away."}, "canonical")


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "[1, 2]", '[{"x": 1}]', "[see] this", '"quoted"', "{'a': 1}", "<b>bold</b>"]
)
def test_texts_of_their_own_stay_texts(text):
    assert (
        read_pair({"prompt": ASKED, "chosen": text, "rejected": "Go away."}, "canonical").chosen[0]["content"] == text
    )


def test_markup_is_noted():
    unwrapped = read_pair({"prompt": "<|im_start|>user\nHow are you?<|im_end|>\n", **SIDES}, "canonical")
    assert (unwrapped.prompt, unwrapped.notes) == ([USER], ("chat markup unwrapped: <|im_start|>",))
    left = read_pair(
        {"prompt": ASKED, "chosen": "Fine.<|im_end|>\n<|im_start|>user\nAnd?", "rejected": "No"}, "canonical"
    )
    assert left.notes == ("chat markup left in a text: <|im_end|>",)
    assert read_pair({"prompt": ASKED, **SIDES}, "canonical").notes == ()


def test_what_else_messages_say_is_kept_and_told_apart(tmp_path):
    call = [{"type": "function", "function": {"name": "alarm", "arguments": '{"at": 6}'}}]
    other = [{"type": "function", "function": {"name": "siren", "arguments": "{}"}}]
    row = {
        "prompt": [USER],
        "chosen": [{**GOOD, "content": None, "tool_calls": call, "name": None}],
        "rejected": [{**GOOD, "content": None, "tool_calls": other, "name": None}],
    }
    for suffix in (".jsonl", ".parquet"):
        (pair,) = read(written(tmp_path / f"rows{suffix}", [row]))
        assert pair["chosen"][0]["content"] == ""
        assert json.loads(pair["chosen"][0]["more"]) == {"tool_calls": call}
    with pytest.raises(Refused, match="equal responses"):
        read_pair(row | {"rejected": row["chosen"]}, "canonical")
    again = read_pair({name: pair[name] for name in ("prompt", "chosen", "rejected")}, "canonical")
    assert again.chosen == pair["chosen"]  # what this package wrote is read as it was


# One response a row


KTO = [
    {"prompt": "Hi?", "completion": "Hello.", "label": True, "by": "p1"},
    {"prompt": ASKED, "completion": "Go away.", "label": False, "by": "p2"},
    {"prompt": ASKED, "completion": "Fine, thanks.", "label": True, "by": "p3"},
    {"prompt": f" {ASKED}", "completion": "Good.", "label": True, "by": "p4"},
    {"prompt": ASKED, "completion": "Hm.", "label": None, "by": "p5"},
]
WILDGUARD = [
    {
        "prompt": prompt,
        "response": f"{answer} {prompt}",
        "prompt_harm_label": harm,
        "response_refusal_label": answer,
        "response_harm_label": "unharmful",
        "subcategory": "others",
    }
    for answer in ("refusal", "compliance")
    for prompt, harm in (("bad?", "harmful"), ("good?", "unharmful"), ("odd?", None))
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("format", ["auto", "kto"])
def test_rows_of_one_prompt_and_two_labels_are_a_pair(tmp_path, caplog, suffix, format):
    path = written(tmp_path / f"rows{suffix}", KTO)
    found = read(path, format=format)
    (pair,) = [row for row in found if row["refused"] is None]
    assert [pair[side] for side in ("prompt", "chosen", "rejected")] == [[USER], [GOOD], [BAD]]
    assert dict(pair["labels"]) == {"matched": "kto", "chosen_position": "2", "rejected_position": "1"}
    assert json.loads(pair["extra"]) == {"chosen_by": "p3", "rejected_by": "p2"}
    reasons = sorted(row["refused"].partition(":")[0] for row in found if row["refused"])
    assert reasons == ["no preference", "no preference", "unknown label"]  # nothing is lost
    assert any("p4" in row["raw"] for row in found if row["refused"])
    assert "rows of one response each (format kto)" in caplog.text
    assert len([row for row in read(path, format=format, pairs="all") if row["refused"] is None]) == 2
    assert len([row for row in read(path, format=format, limit=3) if row["refused"] is None]) == 1


def test_what_belongs_to_the_prompt_tells_prompts_apart(tmp_path):
    rows = [
        {"prompt": "Sum up.", "completion": text, "label": label, "system": system}
        for text, label, system in (("a", True, "Be kind."), ("b", False, "Be kind."), ("c", False, "Be rude."))
    ]
    found = read(written(tmp_path / "rows.jsonl", rows))
    (pair,) = [row for row in found if row["refused"] is None]
    assert [m["content"] for m in pair["prompt"]] == ["Be kind.", "Sum up."]
    assert pair["rejected"][0]["content"] == "b"
    dropped = [{"prompt": "Sum up.", "completion": "a", "label": True, "context": "The text."}]
    (row,) = read(written(tmp_path / "dropped.jsonl", dropped))
    assert row["refused"].startswith("two prompts: context")


@pytest.mark.parametrize("label", [(1, 0), ("1", "0"), (True, False), ("true", "false"), (1.0, 0.0)])
def test_labels_of_kto_in_every_spelling(tmp_path, label):
    rows = [{"prompt": ASKED, "completion": text, "label": one} for text, one in zip(("a", "b"), label, strict=True)]
    (pair,) = read(written(tmp_path / "rows.jsonl", rows))
    assert pair["chosen"][0]["content"] == "a"


def test_a_refusal_is_chosen_where_the_prompt_is_harmful_alone(tmp_path):
    pairs = [row for row in read(written(tmp_path / "rows.jsonl", WILDGUARD)) if row["refused"] is None]
    found = {pair["prompt"][0]["content"]: pair["chosen"][0]["content"] for pair in pairs}
    assert found == {"bad?": "refusal bad?", "good?": "compliance good?"}
    labels = dict(pairs[0]["labels"])
    assert (labels["prompt_harm_label"], labels["matched"]) == ("harmful", "wildguardmix")


def test_what_is_done_to_rows_of_one_response_is_noted_on_their_pair(tmp_path):
    asked = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": asked, "completion": text, "label": good} for text, good in (("Fine.", True), ("Go.", False))]
    (pair,) = [row for row in read(written(tmp_path / "rows.jsonl", rows)) if row["refused"] is None]
    assert (pair["prompt"], pair["notes"]) == ([USER], ["chat markup unwrapped: <|im_start|>"])
    assert pair["extra"] is None


def test_many_rows_are_matched_as_one_by_one(tmp_path):
    rng = random.Random(0)
    rows = [{"prompt": f"p{rng.randrange(20)}", "completion": f"c{i}", "label": rng.random() < 0.5} for i in range(200)]
    pairs = [row for row in read(written(tmp_path / "rows.jsonl", rows), pairs="all") if row["refused"] is None]
    wanted = {
        (one["completion"], other["completion"])
        for one in rows
        for other in rows
        if one["prompt"] == other["prompt"] and one["label"] and not other["label"]
    }
    assert {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs} == wanted
    assert len(pairs) == len(wanted)


def test_an_audit_asks_for_the_pairs(tmp_path):
    path = written(tmp_path / "rows.jsonl", KTO)
    with pytest.raises(UserError, match=r"one response a row \(format kto\), which only `safer-ray pairs"):
        plan_file(path, SourceConfig(path=str(path)), 100)


@pytest.mark.parametrize("seed", range(5))
def test_messages_are_hashed_by_the_one_form_of_json(seed):
    rng = random.Random(seed)
    letters = [chr(i) for i in (*range(0x80), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F600)]
    texts = ["".join(rng.choices(letters, k=40)) for _ in range(30)]
    messages = [{"role": rng.choice(texts), "content": text} for text in texts]
    messages += [message | {"more": to_json({"name": message["content"]})} for message in messages]
    assert messages_json(messages) == to_json(messages)
    assert messages_json([]) == to_json([])


# Preferences that other columns say


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("helpsteer2", {"preference_strength": 0}, "no preference: preference_strength is 0"),
        ("helpsteer3", {"overall_preference": None}, "wrong type: overall_preference is null"),
        ("arena", {"winner_model_b": 0, "winner_tie": 1}, "no preference: winner_tie"),
        ("arena", {"prompt": json.dumps(["a", "b"])}, "several turns: prompt has 2"),
        ("arena_conversations", {"winner": "tie (bothbad)"}, r"no preference: winner is tie \(bothbad\)"),
        ("arena_conversations", {"conversation_a": [USER, GOOD] * 2}, "several turns: conversation_a has 2"),
        ("shp", {"labels": None}, "no preference: labels is null"),
        ("ultrafeedback_raw", {"completions": [{"response": "a", "overall_score": 1}] * 2}, "no preference: all 2"),
        ("distilabel", {"ratings": [1.0]}, "wrong type: ratings has 1 numbers of 2"),
    ],
)
def test_rows_that_prefer_nothing_are_refused(name, changes, reason):
    with pytest.raises(Refused, match=reason):
        [read_pair(row, name) for row in expanded(ROWS[name] | changes, name)]


@pytest.mark.parametrize(
    ("name", "column"), [("helpsteer2", "preference_strength"), ("helpsteer3", "overall_preference")]
)
def test_the_sign_says_which_response_is_better(name, column):
    row = ROWS[name] | {column: -ROWS[name][column]}
    (flipped,) = [read_pair(piece, name) for piece in expanded(row, name)]
    assert (flipped.chosen, flipped.rejected) == ([BAD], [GOOD])
    assert flipped.label_margin == MARGINS[name]


@pytest.mark.parametrize(
    "columns",
    [
        {"score_chosen": 1, "score_rejected": 3},
        {"chosen_rating": 1.0, "rejected_rating": "3"},
        {"chosen-rating": 1, "rejected-rating": 3},
        {"rating_chosen": 1, "rating_rejected": 3},
        {"votes_chosen": 2, "votes_rejected": 4},
        {"votes": {"chosen": 2, "rejected": 4}},
        {"generations": ["Fine, thanks.", "Go away."], "rating": [4.0, 6.0]},
        {"margin": -2},
    ],
)
def test_a_rows_own_numbers_give_its_margin(columns):
    assert read_pair({"prompt": ASKED, **SIDES, **columns}, "canonical").label_margin == -2


@pytest.mark.parametrize(("kind", "count"), [("best_worst", 1), ("adjacent", 2), ("all", 3)])
def test_ranked_rows_are_cut_into_the_pairs_that_were_asked_for(kind, count):
    answers = [{"answer": text, "rank": rank} for text, rank in (("c", 3), ("a", 1), ("b", 2))]
    rows = expanded({"prompt": ASKED, "answers": answers}, "nectar", {"pairs": kind})
    assert len(rows) == count
    assert all(row["chosen"] < row["rejected"] for row in rows)


# Formats that chance must not guess


def test_a_benchmark_is_known_by_its_subsets_and_ids(tmp_path):
    own = {"prompt": ASKED, **SIDES, "subset": "helpful", "chosen_model": "a", "rejected_model": "b", "annotator": "p1"}
    assert row_format(own) == "canonical"
    assert row_format(ROWS["rewardbench"] | {"id": None}) == "canonical"
    rows = [own | {"prompt": f"{ASKED} {i}"} for i in range(8)]
    pairs = read(written(tmp_path / "rows.jsonl", rows))
    assert len({pair["pair_id"] for pair in pairs}) == 8
    assert json.loads(pairs[0]["extra"])["annotator"] == "p1"
    (known,) = read(written(tmp_path / "known.jsonl", [ROWS["rewardbench"]]))
    assert known["pair_id"] == "rewardbench/hep-go/7"
    assert json.loads(known["extra"]) == {"subset": "hep-go", "chosen_model": "a", "rejected_model": "b"}


# Any row, in any layout


def words(rng):
    return (
        " ".join(rng.choice(["Zürich", "雨", "no", "yes.", "if", "\n", "{", "[1]", "'s", "“so”"]) for _ in range(6))
        + "x"
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_in_every_layout_are_read_back_equal(seed):
    rng = random.Random(seed)
    asked, good, bad = words(rng), words(rng) + "a", words(rng) + "b"
    wanted = tuple(
        [{"role": role, "content": text}] for role, text in (("user", asked), ("assistant", good), ("assistant", bad))
    )

    def replaced(value):
        if isinstance(value, str) and value[:1] != "\n":
            texts = {ASKED: asked, "Fine, thanks.": good, "Go away.": bad}
            return json.dumps([texts[json.loads(value)[0]]]) if value.startswith("[") else texts.get(value, value)
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        return [replaced(inner) for inner in value] if isinstance(value, list) else value

    for name, row in ROWS.items():
        if name in ("hh_rlhf", "nectar"):  # transcripts strip their turns
            continue
        made = replaced(row)
        pair = read_pair(expanded(made, name)[0], name)
        assert (pair.prompt, pair.chosen, pair.rejected) == wanted, name
        assert detect_format([made]) == name
