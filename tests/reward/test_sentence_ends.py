"""Where sentences end in texts of any script; in ASCII, as the method was published."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_ray.config.reading import ASCII_ENDS, EVERY_SCRIPT
from safer_ray.data.corpus import write_corpus
from safer_ray.reward.sentence_ends import UNSPACED, sentence_ends
from safer_ray.reward.templates import Rendered, Span

PUBLISHED = re.compile(r"[.,?!;\n]+(\s+[.,?!;\n]+)*")
THAI, CHINESE = "\u0e01\u0e32", "\u4f60\u597d"


def rendered(text):
    return Rendered(text, (Span(0, len(text), 0, 0),))


def ends(text, rule=EVERY_SCRIPT):
    return sentence_ends([rendered(text)], rule)[1].tolist()


def published(text):
    return [match.end() for match in PUBLISHED.finditer(text)]


@given(st.text(st.characters(max_codepoint=127)))
def test_in_ascii_sentences_end_as_published(text):
    assert ends(text) == ends(text, ASCII_ENDS) == published(text)


@given(st.text(st.sampled_from("ab .,?!;\n\u4f60\u3002\u0e01\ue000"), max_size=300))
def test_the_rule_of_ascii_is_as_published_in_every_script(text):
    assert ends(text, ASCII_ENDS) == published(text)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = f(1)\ny = 2\n```\n",
        "- one\n- two\n- three",
        "1. First\n2. Second",
        "Points:\n  1. a\n  2. b",
        "e.g. 3.14, i.e. pi",
    ],
)
def test_code_and_lists_end_as_they_did(text):
    assert ends(text) == published(text)
    assert ends(text + "\u2019") == published(text)  # and beside a letter of no script's marks


def test_the_texts_of_the_demo_end_as_they_did(tmp_path):
    write_corpus(tmp_path, train_per_section=60, heldout_per_section=90, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in (row["prompt"][0]["content"], row["chosen"], row["rejected"])]
    assert len(texts) > 300
    number, end = sentence_ends([rendered(text) for text in texts])
    assert list(zip(number.tolist(), end.tolist(), strict=True)) == [
        (i, end) for i, text in enumerate(texts) for end in published(text)
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", [3, 6]),  # Chinese
        ("\u4f60\u597d\uff0c\u518d\u89c1\u3002\u3000\uff1f", [3, 8]),  # a run over an ideographic space
        ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964 \u0915", [7]),  # a danda
        ("\u0645\u0631\u062d\u0628\u0627\u060c \u0643\u061f", [6, 9]),  # Arabic comma and question mark
        ("\u0561\u0562\u0589 \u0563", [3]),  # Armenian
        ("\u1208\u1209\u1362 \u1208", [3]),  # Ethiopic
        ("caf\u00e9: no end - here", []),  # what ASCII does not end at ends nothing
        ("\u201cWell\u201d\u2026 \u2018a\u2019", []),  # quotes and ellipsis are no marks
    ],
)
def test_sentences_end_behind_the_marks_of_every_script(text, told):
    assert ends(text) == told
    assert ends(text, ASCII_ENDS) == []


@pytest.mark.parametrize(
    "word", [THAI, "\u0e81\u0eb2", "\u1780\u17b6", "\u1000\u102c", "\u0f40\u0f72", CHINESE, "\u306f\u3044"]
)
def test_a_long_stretch_of_a_script_without_spaces_ends_at_spaces(word):
    phrase = word * 10  # 20 characters
    text = " ".join([phrase] * 12)
    found = ends(text)
    assert found == [83, 167]  # four phrases each, and the rest is too short for one more
    assert all(text[end] == " " for end in found)
    assert ends(" ".join([phrase] * 3)) == []  # no longer than a sentence


def test_a_stretch_without_spaces_has_no_end_of_its_own():
    assert ends(THAI * 200) == []
    assert ends(THAI * 200 + " " + THAI) == [400]


def test_words_between_spaces_are_not_cut():
    assert ends("\u00e9t\u00e9 " * 100) == []
    assert ends("\uc548\ub155 " * 100) == []  # Korean parts its words by spaces


def test_stretches_are_counted_from_the_end_before():
    text = THAI * 20 + "." + " " + THAI * 20 + " " + THAI * 25 + " " + THAI + "\n"
    assert ends(text) == [41, 133, 137]
    assert ends(THAI * 50 + " \n") == [102]  # a space before an end is none


@given(st.lists(st.text(st.sampled_from("a .\n\u4f60\u3002\u0e01 \ue000"), max_size=200), max_size=5))
def test_one_sweep_finds_the_ends_of_every_text_alone(texts):
    number, end = sentence_ends([rendered(text) for text in texts])
    alone = [(i, end) for i, text in enumerate(texts) for end in ends(text)]
    assert list(zip(number.tolist(), end.tolist(), strict=True)) == alone


def test_the_space_of_a_stretch():
    assert UNSPACED == 80  # docs/own-data.md says it
