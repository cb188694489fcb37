"""What features and sentences add to a score, and where those sentences lie in the texts as they were sent."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layout_rows import ASKED, BAD, ROWS, USER
from support.made import make_codes, make_pair, messages
from support.templates import CHAT_TEMPLATE, LONG

from safer_ray.data.places import Piece, pieces_of, sent_span
from safer_ray.features.explain import explain
from safer_ray.features.scoring import Features, pair_scores
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import FORMATS, expanded, read_pair, row_format
from safer_ray.reward.sentence_ends import SENTENCE_END
from safer_ray.reward.sentences import SideSentences
from safer_ray.reward.text import PairTokenizer
from safer_ray.reward.tiny_llama import train_tokenizer
from safer_ray.schema import SIDES

FEATURES = Features([1, 2], [3], "response")
WORDS = st.text(st.sampled_from("ab .,?!;\n\u00e9\u4f60\U0001f600"), max_size=60)
ROLES = st.sampled_from(("user", "assistant", "system"))


@pytest.fixture(scope="module")
def tokenizers():
    """One that renders plainly, one by a chat template."""
    plain, templated = (train_tokenizer(lambda: [LONG], 350) for _ in range(2))
    templated.chat_template = CHAT_TEMPLATE
    return {"plain": PairTokenizer(plain, "plain", 400), "chat": PairTokenizer(templated, "chat", 400)}


def sentences(tokenizer, pair):
    """Side, end and cut of every sentence that a model reads of a pair."""
    (tokens,) = tokenizer([pair])
    for side in SIDES:
        cut = SideSentences(tokenizer, pair, side)
        for end in getattr(tokens, side).end.tolist():
            yield side, end, cut.ending_at(end)


def said(pair, side, spot):
    part = pair["prompt"] if spot.part == "prompt" else pair[side]
    return part[spot.message]["content"][spot.start : spot.stop]


@given(st.sampled_from(("plain", "chat")), st.lists(st.tuples(ROLES, WORDS), max_size=3), WORDS, WORDS)
def test_a_sentence_is_what_a_message_says_up_to_where_it_is_read(tokenizers, template, prompt, chosen, rejected):
    pair = make_pair("a", "", chosen if chosen.strip() else "x", rejected if rejected.strip() else "y")
    pair["prompt"] = [{"role": role, "content": content} for role, content in prompt if content.strip()]
    tokenizer = tokenizers[template]
    for side, end, sentence in sentences(tokenizer, pair):
        if sentence is None:
            continue
        assert sentence.text == said(pair, side, sentence) == sentence.text.strip() != ""
        assert tokenizer.rendered_side(pair, side)[:end].rstrip().endswith(sentence.text)
        runs = [run.end() for run in SENTENCE_END.finditer(sentence.text)]
        assert [end for end in runs if end < len(sentence.text)] == []  # one sentence, not two


def turns(*contents):
    roles = ("Human", "Assistant")
    return "".join(f"\n\n{roles[i % 2]}: {content}" for i, content in enumerate(contents))


TEXTS = st.one_of(
    WORDS,
    st.lists(WORDS, min_size=1, max_size=4).map(lambda c: f"{turns(*c)}\n\nAssistant:"),
    st.lists(WORDS, min_size=1, max_size=3).map(lambda c: f"Be kind. {turns('a', *c)}\n\nHuman: last"),
    st.lists(st.tuples(ROLES, WORDS), min_size=1, max_size=3).map(
        lambda rows: [{"role": role, "content": content} for role, content in rows]
    ),
)
RESPONSES = st.one_of(WORDS, WORDS.map(lambda text: [{"role": "assistant", "content": text}]))


@given(st.sampled_from(("plain", "chat")), TEXTS, RESPONSES, RESPONSES)
def test_a_span_of_what_was_sent_is_its_sentence(tokenizers, template, prompt, chosen, rejected):
    sent = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        read = read_pair(sent, "canonical")
    except Refused:
        return
    pair = {"pair_id": "a", "prompt": read.prompt, "chosen": read.chosen, "rejected": read.rejected}
    pieces = pieces_of(sent, sent, read)
    for side, _, spot in sentences(tokenizers[template], pair):
        if spot is None:
            continue
        name = "prompt" if spot.part == "prompt" else side
        found = sent_span(pieces[name], spot.message, spot.start, spot.stop)
        if found is None:  # it goes over the end of one of several turns that are read as one
            assert len(pieces[name][spot.message]) > 1, (sent, pair)
            continue
        column, message, start, stop = found
        assert column == name
        text = sent[name] if isinstance(sent[name], str) else sent[name][message]["content"]
        assert said(pair, side, spot) == text[start:stop]


def sent_text(row, column, message):
    """The text in a column of a row, or of its message of that number."""
    value = row[column]
    if isinstance(value, dict):
        assert message == 0
        value = [value]
    item = value if isinstance(value, str) else value[message]
    return item if isinstance(item, str) else item.get("content", item.get("value"))


def replaced(value, texts):
    """A row with other texts in place of those of the layouts' rows."""
    if isinstance(value, str):
        for old, new in zip((ASKED, "Fine, thanks.", "Go away."), texts, strict=True):
            value = value.replace(old, new)
        return value
    if isinstance(value, list):
        return [replaced(item, texts) for item in value]
    return {name: replaced(item, texts) for name, item in value.items()} if isinstance(value, dict) else value


LAYOUTS = {name: row for name, row in ROWS.items() if not FORMATS[name].several} | {
    "common beginning": {"chosen": "Well? How are you? Fine, thanks.", "rejected": "Well? How are you? Go away."},
    "markup": {
        "prompt": f"<|im_start|>user\n{ASKED}<|im_end|>\n",
        "chosen": "Fine, thanks.</s>",
        "rejected": "Go away.",
    },
    "system": {"system": "Be kind. Be brief.", "prompt": ASKED, "chosen": "Fine, thanks.", "rejected": "Go away."},
    "JSON": {"prompt": json.dumps([USER]), "chosen": "Fine, thanks.", "rejected": json.dumps([BAD])},
    "parts": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Fine, thanks."}]}],
        "rejected": "Go away.",
    },
    "alpaca with input": {
        "instruction": ASKED,
        "input": "Today. Now.",
        "history": [],
        "chosen": "Fine, thanks.",
        "rejected": "Go away.",
    },
    "columns": {
        "chosen": {"role": ["user", "assistant"], "content": [ASKED, "Fine, thanks."]},
        "rejected": [USER, BAD],
    },
    "said twice": {
        "prompt": [USER, USER],
        "chosen": [USER, USER, {"role": "assistant", "content": ASKED}],
        "rejected": "No.",
    },
}
NOWHERE = {  # layouts in which some texts stand in no column as they are read: in nested lists, or as JSON
    "arena": {"prompt", "chosen", "rejected"},
    "hhh": {"chosen", "rejected"},
    "nectar": {"chosen", "rejected"},
    "ultrafeedback_raw": {"chosen", "rejected"},
    "JSON": {"prompt", "rejected"},
    "parts": {"chosen"},
    "columns": {"prompt", "chosen"},
}


def placed(tokenizer, name, row):
    """Of each sentence of a row of a layout, its part of the pair and whether it was placed; its text is checked."""
    format = "trl_implicit" if name == "common beginning" else row_format(LAYOUTS[name])
    try:
        (one,) = expanded(row, format)
        read = read_pair(one, format)
    except Refused:
        return
    pair = {"pair_id": "a", "prompt": read.prompt, "chosen": read.chosen, "rejected": read.rejected}
    pieces = pieces_of(row, one, read)
    for side, _, spot in sentences(tokenizer, pair):
        if spot is not None:
            part = "prompt" if spot.part == "prompt" else side
            found = sent_span(pieces[part], spot.message, spot.start, spot.stop)
            if found is not None:
                column, message, start, stop = found
                assert sent_text(row, column, message)[start:stop] == said(pair, side, spot)
            yield part, found


@pytest.mark.parametrize("name", LAYOUTS)
def test_sentences_are_placed_in_the_columns_of_every_layout(tokenizers, name):
    found = [*placed(tokenizers["plain"], name, LAYOUTS[name])]
    assert {part for part, _ in found} == {"prompt", "chosen", "rejected"}
    assert {part for part, where in found if where is None} == NOWHERE.get(name, set())


@given(st.sampled_from(("plain", "chat")), st.sampled_from([*LAYOUTS]), st.tuples(WORDS, WORDS, WORDS))
def test_a_span_is_its_sentence_in_every_layout(tokenizers, template, name, texts):
    assert all(placed(tokenizers[template], name, replaced(LAYOUTS[name], texts)))


def test_a_text_that_is_said_twice_is_placed_where_it_was_said(tokenizers):
    places = {(where[0], where[1]) for part, where in placed(tokenizers["plain"], "said twice", LAYOUTS["said twice"])}
    assert places == {("prompt", 0), ("prompt", 1), ("chosen", 2), ("rejected", 0)}


@given(TEXTS)
def test_what_a_pair_says_was_sent_piece_by_piece(prompt):
    sent = {"prompt": prompt, "chosen": "one", "rejected": "two"}
    try:
        read = read_pair(sent, "canonical")
    except Refused:
        return
    for message, pieces in zip(read.prompt, pieces_of(sent, sent, read)["prompt"], strict=True):
        assert pieces
        for piece in pieces:
            text = prompt if isinstance(prompt, str) else prompt[piece.message]["content"]
            stop = piece.at + piece.stop - piece.start
            assert message["content"][piece.at : stop] == text[piece.start : piece.stop]


def test_a_response_behind_a_repeated_prompt_is_found_where_it_was_sent():
    prompt = turns("Hi there.") + "\n\nAssistant:"
    sent = {"prompt": prompt, "chosen": f"{prompt} Hello. ", "rejected": messages("assistant", "Go.")}
    read = read_pair(sent, "canonical")
    (piece,) = pieces_of(sent, sent, read)["chosen"][0]
    assert sent["chosen"][piece.start : piece.stop] == "Hello."


def test_a_side_that_repeats_the_prompt_as_messages_keeps_its_own_numbers():
    lead = [*messages("system", "Be kind."), *messages("user", "Hi.")]
    sent = {
        "prompt": "Hi.",
        "chosen": [*lead, *messages("assistant", "Yes.")],
        "rejected": [*lead, *messages("assistant", "No.")],
    }
    pieces = pieces_of(sent, sent, read_pair(sent, "canonical"))
    assert [piece.message for (piece,) in pieces["chosen"]] == [2]
    assert pieces["prompt"] == [[], [Piece(0, "prompt", 0, 0, 3)]]  # the side told more of it than was sent as that


@pytest.fixture
def codes():
    return make_codes(
        [
            {
                "n_prompt_tokens": 1,
                "chosen": [(1, {1: 2.0, 3: 1.0}), (2, {2: 0.5, 7: 9.0})],
                "rejected": [(1, {3: 4.0}), (3, {1: 1.0})],
            },
            {"n_prompt_tokens": 1, "chosen": [(1, {1: 1.0})], "rejected": [(2, {3: 1.0})]},
        ]
    )


class Words:
    """Renders a pair as its words, of ten characters each, so that an end at 10 n closes sentence n."""

    ends = "ascii"

    def render(self, prompt, response):
        from safer_ray.reward.templates import Rendered, Span

        text = "".join(m["content"] for m in response)
        return Rendered(text, (Span(0, len(text), 0, 0),))


def test_parts_of_features_and_of_sentences_sum_to_the_score(codes):
    pairs = [
        {
            "prompt": [],
            "chosen": messages("assistant", "a" * 9 + "." + "b" * 9 + "."),
            "rejected": messages("assistant", "c" * 9 + "." + "d" * 9 + "." + "e" * 9 + "."),
        }
    ] * 2
    found = explain(codes, FEATURES, pairs, Words(), 10)
    for row, score in zip(found, pair_scores(codes, FEATURES), strict=True):
        assert sum(part.contribution for part in row.features) == pytest.approx(score)
        assert sum(part.contribution for part in row.sentences) == pytest.approx(score)
    assert [(p.feature, p.sign) for p in found[0].features] == [(3, -1), (1, 1), (2, 1)]
    assert [(s.side, s.start, s.stop, s.features) for s in found[0].sentences] == [
        ("chosen", 0, 10, [1, 3]),
        ("chosen", 10, 20, [2]),
        ("rejected", 0, 10, [3]),
        ("rejected", 20, 30, [1]),
    ]


def test_only_the_largest_features_are_named(codes):
    pairs = [{"prompt": [], "chosen": messages("assistant", "a" * 40), "rejected": messages("assistant", "b" * 40)}] * 2
    named = [part.feature for part in explain(codes, FEATURES, pairs, Words(), 1)[0].features]
    totals = np.array([2.0 - 1.0, 0.5, -1.0 + 4.0]) / 2  # of features 1, 2, 3
    assert named == [[1, 2, 3][int(np.abs(totals).argmax())]]
