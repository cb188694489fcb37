"""The short ways that most rows take through the readers: each gives what the long one does."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import RAW, plan_file, read_raw
from safer_ray.formats import markup, messages
from safer_ray.formats.declaration import Refused, as_text, parsed_json
from safer_ray.formats.markup import markup_in
from safer_ray.formats.messages import as_messages, same_beginning, say_the_same, spoken
from safer_ray.formats.tables import Table
from safer_ray.formats.transcripts import marks_of
from safer_ray.schema import to_json

BLANKS = ("", " ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", "\xa0", "\x1c")
TURNS = ("Human:", "Assistant:", "Human: ", "said", "Human", *BLANKS)
MARKS = (
    *(
        "<|im_end|>",
        "</s>",
        "<eos>",
        "<|start_header_id|>",
        "<start_of_turn>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
    ),
    *(
        "<|user|>",
        "### Response:",
        "<extra_id_1>",
        "<|END_OF_TURN_TOKEN|>",
        "<\uff5cUser\uff5c>",
        "GPT4 Correct User:",
    ),
    *(
        "<s>",
        "<bos>",
        "<eoh>",
        "<sop>",
        "<BOS_TOKEN>",
        "<reserved_1>",
        "[|AI|]",
        "[gMASK]",
        "[/SYSTEM_PROMPT]",
        "### User:",
    ),
    *("<|IM_START|>", "<end_of_turn>", "<|endoftext|>", "<|eot|>", "<|header_end|>"),
)


def joined(parts):
    return st.lists(st.sampled_from(parts), max_size=8).map("".join)


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant")), "content": st.sampled_from(("a", " a", "a\n", "b"))},
    optional={"more": st.sampled_from(('{"id":"1"}', '{"id":"2"}', '{"tool_calls":[1]}', '{"tool_calls":[2]}', ""))},
)


@given(st.lists(MESSAGE, max_size=3), st.lists(MESSAGE, max_size=3))
def test_messages_agree_as_far_as_they_say_the_same(one, two):
    left, right = spoken(one), spoken(two)
    same = same_beginning(one, two)
    assert left[:same] == right[:same]
    assert same == min(len(one), len(two)) or left[same] != right[same]
    assert say_the_same(one, two) == (left == right)


@pytest.mark.parametrize("role", ["user", "User", "human", "", None, 1, [], {}])
@pytest.mark.parametrize("content", ["a", " a\n", "", " ", "\x1c", None, [], ["a"], 1])
@pytest.mark.parametrize("others", [{}, {"name": "n"}, {"name": None}])
def test_plain_messages_are_what_any_message_is(role, content, others, monkeypatch):
    def read():
        try:
            return as_messages([{"role": role, "content": content, **others}], "prompt")
        except Refused as reason:
            return str(reason)

    short = read()
    monkeypatch.setattr(messages, "_plain_message", lambda item: None)
    assert read() == short


@given(joined(TURNS))
def test_turns_begin_where_one_pattern_for_all_finds_them(text):
    behind = r"\r\n\r\n" if "\r\n\r\n" in text else r"\n\n"

    def found(behind):
        return [mark.span() for mark in re.finditer(rf"(?:\A\s*|{behind})(Human|Assistant):[ \t]*", text)]

    wanted = found(behind)
    if len(wanted) == 1 and text.lstrip().startswith(("Human:", "Assistant:")):
        wanted = found(r"\r?\n")
    assert [mark.span() for mark in marks_of(text)] == wanted


@pytest.mark.parametrize("mark", MARKS)
def test_no_mark_is_overlooked(mark):
    assert markup_in(f"Yes.\n{mark} no") is not None


@given(joined((*MARKS, "\n", "a", "#", "USER: ", "<", "[")))
def test_a_text_without_any_part_of_a_mark_holds_none(text):
    found = markup._ANYWHERE.search(text)
    assert markup_in(text) == (found and found[0])


@given(
    st.sampled_from(("", " ", "\n")),
    st.sampled_from(("{}", '{"a": [1.5, "b"]}', "[]", "1", '"x"', "{", '{"a": 1', "", "NaN")),
    st.sampled_from(("", " ", "\r\n", "x", "{}", " {}", "]")),
)
def test_a_row_is_parsed_as_json_parses_it(before, value, behind):
    text = before + value + behind
    try:
        wanted = json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        with pytest.raises(Refused, match=f"^not JSON: {re.escape(str(error))}$"):
            parsed_json(text)
    else:
        assert parsed_json(text) == wanted


@pytest.mark.parametrize("half", [r"\ud800", r"\uDBFF", r"\udc00 \ud83d", r"\uDFFF", r"\\\udabc"])
def test_half_a_surrogate_pair_is_refused_in_any_spelling(half):
    with pytest.raises(Refused, match="bad UTF-8: a lone surrogate"):
        parsed_json(f'{{"prompt": "{half}"}}')


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\uD83D\uDE00", r"\\ud800", r"\u00e9", r"\ud7ff", r"\ue000"])
def test_other_escapes_are_read(text):
    assert parsed_json(f'{{"prompt": "{text}"}}') == {"prompt": json.loads(f'"{text}"')}


@pytest.mark.parametrize("value", [0, -5, 10**30, True, False, None, 1.0, [1], {"b": 1, "a": 2}])
def test_a_value_as_text_is_its_json(value):
    assert as_text(value) == to_json(value)


def test_raw_rows_have_their_columns_where_there_are_none(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n" * 3)
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), name="mine", format="canonical")
    (fragment,) = plan_file(tmp_path / "rows.jsonl", source, 100)
    assert read_raw(fragment, source).equals(RAW.empty_table())
    (tmp_path / "rows.jsonl").write_text('\n{"a": 1}\n\xff\n', encoding="latin-1")
    (fragment,) = plan_file(tmp_path / "rows.jsonl", source, 100)
    shared = {"source": "mine", "source_index": 0, "format": "canonical", "table": Table("canonical").to_json()}
    assert read_raw(fragment, source).to_pylist() == [
        {"row_key": "rows.jsonl#1", "position": 1, "raw": '{"a": 1}', "refused": None, **shared},
        {"row_key": "rows.jsonl#2", "position": 2, "raw": "\ufffd", "refused": "bad UTF-8: at character 0", **shared},
    ]
