"""Rows in odd forms: read as what they say, refused by name, or noted."""

import contextlib
import time

import pytest
from support.layout_rows import ASKED, GOOD, ROWS, SIDES

from safer_ray.data.rows import parse_row
from safer_ray.formats.declaration import Refused
from safer_ray.formats.notes import ALIKE, CONTINUED
from safer_ray.formats.registry import expanded, read_pair, row_format
from safer_ray.formats.transcripts import BLANKS, CUT, JOINED


def row_of(prompt="q", chosen="g", rejected="b", **others):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def dialogue(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def told(answer):
    """A transcript that repeats the prompt."""
    return f"\n\nHuman: q\n\nAssistant: {answer}"


ADDRESS, PARSED = '{"from": "alice@x", "value": "5 USD"}', '{"role": "user", "content": "hi"} Parse it'
TOOL = {"role": "tool", "content": "", "tool_call_id": "c"}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        (row_of("q1", dialogue("q1", "a1", "q2", "g"), dialogue("q1", "a1", "q2", "b")), ["q1", "a1", "q2"], "g"),
        (row_of(dialogue("q", "g")), ["q"], "g"),
        (row_of("q", told("g"), told("b")), ["q"], "g"),
        (row_of("\n\nHuman: q", "\n\nAssistant: g", "\n\nAssistant: b"), ["q"], "g"),
        (row_of("Human: q1\nAssistant: a1\nHuman: q2\nAssistant:"), ["q1", "a1", "q2"], "g"),
        (row_of("\r\n\r\nHuman: q1\r\n\r\nAssistant: a1\r\n\r\nHuman: q2"), ["q1", "a1", "q2"], "g"),
        (row_of("Assistant: is that a good title?"), ["Assistant: is that a good title?"], "g"),
        (row_of("Human: The Musical - whose?"), ["Human: The Musical - whose?"], "g"),
        (row_of(chosen="It is </s>", rejected="It is <eos>"), ["q"], "It is </s>"),
        (row_of(chosen="It is so</s>", rejected="It is not</s>"), ["q"], "It is so"),
        (row_of(ADDRESS), [ADDRESS], "g"),
        (row_of(PARSED), [PARSED], "g"),
        (row_of("q1<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2"), ["q1", "a1", "q2"], "g"),
        (row_of(None, question="q"), ["q"], "g"),
        (row_of([{"role": "User", "content": "q"}], [{"role": "Assistant", "content": "g"}]), ["q"], "g"),
        (row_of([{"role": "user", "content": "", "value": "q"}]), ["q"], "g"),
        (row_of([*dialogue("q", "a"), TOOL]), ["q", "a", ""], "g"),
        (row_of([{"role": "user", "parts": [{"text": "q"}]}]), ["q"], "g"),
    ],
)
def test_texts_in_odd_forms_are_read_as_what_they_say(row, prompt, chosen):
    pair = read_pair(row, "canonical")
    assert [m["content"] for m in pair.prompt] == prompt
    assert [m["content"] for m in pair.chosen] == [chosen]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_of("Fix the spelling", "Hello world", "Hello wrld", input="Hello wrld"), "two prompts: input"),
        (row_of("Is this a prime?", input="a"), "two prompts: input"),
        (row_of("Copy it.", "Shake it", context="Shake"), "two prompts: context"),
        (row_of(image="a.png"), "unread column: image"),
        (row_of("q1", dialogue("q1", "a1", "q2", "g"), dialogue("q1", "b1", "q3", "b")), "prompts differ"),
        (row_of([{"role": "user", "text_id": 3}]), "message without content"),
        (row_of("[{'id': 1, 'role': 'user', 'content': 'q'}]"), "not JSON: prompt holds"),
        (row_of(chosen=[{**GOOD, "id": 1}], rejected=[{**GOOD, "id": 2}]), "equal responses"),
    ],
)
def test_what_would_be_dropped_is_refused_by_name(row, reason):
    with pytest.raises(Refused, match=reason):
        read_pair(row, "canonical")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llmbar", {"label": 0}, "unknown label: label is 0"),
        ("pku_saferlhf", {"safer_response_id": 2}, "unknown label: safer_response_id is 2"),
        ("shp", {"labels": 2}, "unknown label: labels is 2"),
        ("arena_conversations", {"winner": "left"}, "unknown label: winner is left"),
        ("helpsteer2", {"preference_strength": -100}, "unknown label: preference_strength is -100"),
        ("arena", {"winner_model_a": 1}, "unknown label: winner_model_a and winner_model_b are both set"),
        ("arena", {"winner_tie": True}, "unknown label: winner_model_b and winner_tie are both set"),
        ("arena", {"winner_model_b": "yes"}, "unknown label: winner_model_b is yes"),
        ("arena", {"winner": "model_a"}, "unknown label: winner is model_a, but winner_model_a, .* say otherwise"),
        ("arena", {"winner": "tie"}, "unknown label: winner is tie, but"),
        (
            "named_responses",
            {"answer_a": "Bye.", "answer_b": "Hi."},
            "unknown label: chosen and rejected may name response_a, response_b or answer_a, answer_b",
        ),
    ],
)
def test_labels_that_are_not_known_are_damage_and_no_ties(name, changes, reason):
    with pytest.raises(Refused, match=reason):
        [read_pair(row, name) for row in expanded(ROWS[name] | changes, name)]


@pytest.mark.parametrize(
    "changes",
    [
        {"winner_model_a": False, "winner_model_b": True, "winner_tie": False},
        {"winner_model_a": "False", "winner_model_b": "True", "winner_tie": "False"},
        {"winner": None},
        {"winner": "response_b"},
        {"winner": "Response B", "winner_tie": None},
    ],
)
def test_a_winner_is_read_in_every_spelling(changes):
    (row,) = expanded(ROWS["arena"] | changes, "arena")
    assert read_pair(row, "arena").chosen == [GOOD]


def test_a_battle_without_any_winner_is_no_preference():
    row = {name: value for name, value in ROWS["arena"].items() if not name.startswith("winner")}
    for more in ({}, {"winner": None}, {"winner_model_a": None, "winner_model_b": None}):
        with pytest.raises(Refused, match="no preference: winner is null"):
            expanded(row | more, "arena")


def test_sides_that_are_named_decide_whatever_else_a_row_says():
    row = ROWS["arena"] | {"prompt": ASKED, **SIDES}
    assert row_format(row) == "canonical"
    assert row_format(ROWS["pku_saferlhf"] | SIDES) == "canonical"
    named = ROWS["arena_conversations"] | {"winner": "gpt-4", "model_a": "gpt-4", "model_b": "other"}
    assert read_pair(expanded(named, "arena_conversations")[0], "arena_conversations").chosen == [GOOD]


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"score_chosen": "4,5", "score_rejected": "2,0"}, "score_chosen is no number, and not read"),
        ({"tools": [{"name": "f"}]}, "definitions of tools ride along, and no model reads them"),
        (
            {"prompt": "What is 1+1?", "chosen": "What is 1+1? It is 2.", "rejected": "What is 1+1? 3."},
            "both responses begin with the prompt",
        ),
        ({"prompt": "### Human: hi\n### Assistant:"}, "chat markup left in a text: ### Human:"),
        ({"prompt": "USER: hi ASSISTANT:"}, "chat markup left in a text: USER:"),
        ({"chosen": "<\uff5cUser\uff5c>hi"}, "chat markup left in a text: <\uff5cUser\uff5c>"),
        *(
            ({"prompt": text}, f"chat markup left in a text: {mark}")
            for text, mark in (
                ("<|begin_of_text|>hi", "<|begin_of_text|>"),
                ("<s>hi</s>", "<s>"),
                ("<bos>hi", "<bos>"),
                ("<|User|>:hi<eoh>\n<|Bot|>:", "<|User|>"),
                ("hi<eoh>", "<eoh>"),
                ("<|prompter|>hi<|endoftext|><|assistant|>", "<|prompter|>"),
                ("<|start|>user<|message|>hi<|end|>", "<|start|>"),
                ("<|start_of_role|>tool {}<|end_of_role|>hi<|end_of_text|>", "<|start_of_role|>"),
                ("[|Human|]hi[|AI|]", "[|Human|]"),
                ("[|user|]hi[|endofturn|]\n[|assistant|]", "[|user|]"),
                ("[SYSTEM_PROMPT]Be[/SYSTEM_PROMPT]hi", "[SYSTEM_PROMPT]"),
                ("[gMASK]<sop>hi", "[gMASK]"),
                ("<BOS_TOKEN>hi", "<BOS_TOKEN>"),
                ("<\uff5cbegin\u2581of\u2581sentence\uff5c>hi", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
                ("<reserved_106>hi<reserved_107>", "<reserved_106>"),
                ("### System:\nBe\n\n### User:\nhi\n", "### System:"),
                ("### User:\nhi", "### User:"),
                ("User: hi\n\nAssistant: hello\n\nUser: bye\n\nAssistant:", "User:"),
                ("The log says\nHuman: hi\nAssistant: yo", "Human:"),
                ("Human: hi\nAI: yo", "Human:"),
            )
        ),
    ],
)
def test_what_should_be_known_is_noted(columns, note):
    assert note in read_pair({"prompt": ASKED, **SIDES, **columns}, "canonical").notes


@pytest.mark.parametrize(
    ("before", "answer", "note"),
    [
        ("\n\nHuman: q\n\nAssistant:", "  g", "blanks around an answer"),
        ("\n\nHuman: q\n\nAssistant:", " g \n", "blanks around an answer"),
        ("\n\nHuman: q\n\nAssistant:", "\n    g", "blanks around an answer"),
        ("\n\nHuman: Mend:\n\nHuman: hi\n\nAssistant: ", "g", "turns of a transcript are joined"),
        ("\n\nHuman: q\n\nAssistant: Sure:\n\nAssistant: ", "g", "the prompt ends with words of the assistant"),
        ("\n\nHuman: q\n\nAssistant: ", "g", None),
        ("\n\nHuman: q\n\nAssistant:", "g", None),
    ],
)
def test_what_is_changed_in_a_transcript_is_noted(before, answer, note):
    notes = read_pair({"chosen": before + answer, "rejected": before.rstrip(" ") + " no"}, "hh_rlhf").notes
    assert [known.startswith(note) for known in notes] == [True] if note else notes == ()


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        (row_of("Human: hi\nAssistant: yes\n\nSummarise this."), (CUT, CONTINUED)),
        (row_of("Human: q1\nAssistant: a1\nHuman: q2\nAssistant:"), (CUT,)),
        (row_of("\n\nHuman: q1\n\nHuman: q2\n\nAssistant:"), (CUT, JOINED)),
        (row_of("q", told("g"), told("b")), (CUT,)),
        (row_of("q", told("  g"), told("b")), (CUT, BLANKS)),
        (row_of("\n\nHuman: q", "g"), (CUT,)),
        (row_of("Human: The Musical - whose?"), ()),
    ],
)
@pytest.mark.parametrize("name", ["canonical", "pku_saferlhf"])
def test_a_text_that_is_cut_into_turns_is_noted(row, notes, name):
    if name == "pku_saferlhf":
        if row["chosen"] != "g":
            return  # its responses are never cut
        row = {"prompt": row["prompt"], "response_0": "g", "response_1": "b", "safer_response_id": 0}
    assert sorted(read_pair(row, name).notes) == sorted(notes)


@pytest.mark.parametrize(
    "text", ["Assistant: is that a title?", "User: nobody", "The User: see Assistant: below", "USER: x", "a <| b |> c"]
)
def test_what_is_no_markup_is_not_noted(text):
    assert read_pair({"prompt": text, **SIDES}, "canonical").notes == ()


def test_marks_that_close_a_turn_are_left_where_what_opens_it_is():
    text = "<|start|>user<|message|>hi<|end|>"
    assert read_pair(row_of(text), "canonical").prompt == [{"role": "user", "content": text}]
    pair = read_pair(row_of(chosen=f"{text[:-7]} there<|end|>", rejected=text), "canonical")
    assert pair.rejected == [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("a b", "a  b", True),
        ("a\r\nb", "a\nb", True),
        ("a\xa0b", "a b", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("A b", "a b", False),
        ("ab", "a b", False),
        ("a b c d e", "a b c d f", False),
    ],
)
def test_responses_that_look_the_same_are_noted(one, other, alike):
    assert read_pair(row_of(chosen=one, rejected=other), "canonical").notes == ((ALIKE,) if alike else ())


def test_granite_is_unwrapped():
    ends = "<|end_of_text|>\n"
    turns = [f"<|start_of_role|>{role}<|end_of_role|>{said}" for role, said in (("system", "Be"), ("user", "q"))]
    pair = read_pair(row_of(ends.join([*turns, "<|start_of_role|>assistant<|end_of_role|>"])), "canonical")
    assert [(m["role"], m["content"]) for m in pair.prompt] == [("system", "Be"), ("user", "q")]
    assert pair.notes == ("chat markup unwrapped: <|start_of_role|>",)


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen_rewards": 1, "rejected_rewards": 3},
        {"rewards_chosen": 1, "rewards_rejected": 3},
        {"reward_chosen": 1, "reward_rejected": 3},
        {"score_diff": -2},
    ],
)
def test_margins_under_more_names_are_read(columns):
    assert read_pair({"prompt": ASKED, **SIDES, **columns}, "canonical").label_margin == -2


def test_scores_of_paired_answers_that_contradict_their_order_are_read():
    (row,) = expanded(ROWS["stack_exchange"] | {"score_j": 1, "score_k": 9}, "stack_exchange")
    pair = read_pair(row, "stack_exchange")
    assert (pair.label_margin, pair.labels) == (-8, {"chosen_score": "1", "rejected_score": "9"})


def test_of_two_margins_the_first_is_read_and_the_one_that_contradicts_it_told():
    pair = read_pair({"prompt": ASKED, **SIDES, "margin": 2, "score_chosen": 1, "score_rejected": 5}, "canonical")
    assert pair.label_margin == 2
    assert pair.notes == ("score_chosen and score_rejected contradicts margin, by which the margin is read",)


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 50_000 + "x",
        " " * 50_000 + "x",
        "</s>" * 20_000 + "x>",
        "</s> " * 20_000 + "x>",
        "<|im_start|>user\na" + "<|im_end|>" * 20_000 + "x",
        "<|im_start|>user\n" + " " * 100_000 + "x<|im_end|>" + " " * 100_000 + "y",
        "USER: " * 20_000,
        "ASSISTANT:" + "USER: " * 20_000,
        "Assistant:\n" + "\nUser:" * 20_000,
        "<|" * 20_000 + "a" * 50_000,
        "Human: " * 20_000,
        "\n\nHuman:" * 20_000,
        '[{"role":' * 1_200,
        "[INST]" * 20_000,
    ],
    ids=range(14),
)
def test_no_text_takes_more_than_its_length(text):
    began = time.process_time()
    with contextlib.suppress(Refused):
        read_pair({"prompt": text, "chosen": text + "a", "rejected": text + "b"}, "canonical")
    assert time.process_time() - began < 5  # seconds; what is quadratic takes minutes


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(Refused, match="key twice: chosen"):
        parse_row('{"prompt": "q", "chosen": "x", "chosen": "y", "rejected": "z"}')
    assert parse_row('{"prompt": "the \\"prompt\\"", "chosen": {"chosen": 1}}')["chosen"] == {"chosen": 1}
