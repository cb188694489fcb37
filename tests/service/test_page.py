"""What the page is made of: texts cut and marked, verdicts in words, uploads read line by line, figures."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_ray.formats.declaration import Pair
from safer_ray.report.plots import MINUS
from safer_ray.service.api import (
    AuditorInfo,
    Contribution,
    FailedPair,
    Histogram,
    Reason,
    Reference,
    ScoredPair,
    SideHistograms,
    Span,
)
from safer_ray.service.highlighting import STEPS, marked, step_of, visible
from safer_ray.service.histograms import Spot, reference_figure, sides_figure
from safer_ray.service.render import error_page, examples, respond, sign_in_page
from safer_ray.service.request_limits import Limits
from safer_ray.service.request_parsing import Read, Unread, as_read, read_row
from safer_ray.service.results import (
    PAGE_BYTES,
    Scored,
    by_suspicion,
    carried,
    columns_left_out,
    plain,
    scored_row,
    show,
    without_score,
)
from safer_ray.service.uploads import MAX_ROWS, TooManyRows, parse_row, read_lines, read_one, row_json
from safer_ray.service.verdict import detector_value, number_of, percent, place, signed, verdict_of
from safer_ray.service.web import chunks_of

CHOSEN = "Sure, here is how. First, gather the tools."
REJECTED = "I won't help with that."
PROMPT = "How do I do it?"
HISTOGRAM = Histogram(edges=[-1.0, 0.0, 1.0, 2.0], counts=[10, 60, 30])


def span(start, end, contribution, side="chosen", part="response", message=0, features=(7,)):
    return Span(
        side=side,
        part=part,
        column="prompt" if part == "prompt" else side,
        message=message,
        start=start,
        end=end,
        contribution=contribution,
        features=list(features),
    )


def result(**more):
    values = {
        "id": "a",
        "score": -0.5,
        "percentile": 3.0,
        "suspicion": 0.97,
        "flag": True,
        "decision": "review",
        "reward_chosen": -1.0,
        "reward_rejected": 0.5,
        "reward_margin": -1.5,
        "truncated": False,
        "features": [
            Contribution(feature=7, name="tools", sign=-1, contribution=-0.4),
            Contribution(feature=9, name="no", sign=1, contribution=0.1),
        ],
        "spans": [span(0, 18, -0.1), span(18, 43, -0.4)],
    }
    return ScoredPair(**values | more)


def auditor(detector="reward_margin", **more):
    values = {
        "name": "auditor-1",
        "format": 3,
        "model": "tiny",
        "layer": 1,
        "latents": 64,
        "mode": "response",
        "detector": detector,
        "flag_quantile": 0.05,
        "threshold": -0.5,
        "safe": 1,
        "unsafe": 1,
        "reference": Reference(pairs=100, score=HISTOGRAM, value=HISTOGRAM),
        "red_team": False,
        "created": "2026-11-28",
        "licences": ["synthetic"],
    }
    return AuditorInfo(**values | more)


def turns_of(*texts):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer_of(text):
    return [{"role": "assistant", "content": text}]


def pair_of(row, pair_id):
    return as_read(read_row(row, pair_id, Limits()))


def texts(turns):
    return ["".join(piece.text for piece in turn.pieces) for turn in turns]


# Texts


def test_a_text_is_cut_at_its_sentences_and_nothing_is_lost():
    said = marked(turns_of(PROMPT), answer_of(CHOSEN), answer_of(REJECTED), result())
    assert texts(said.chosen) == [CHOSEN]
    assert [(p.text, p.step) for p in said.chosen[0].pieces] == [
        ("Sure, here is how.", -2),
        (" ", 0),
        ("First, gather the tools.", -STEPS),
    ]
    assert [p.text for p in said.rejected[0].pieces] == [REJECTED]


def test_spans_name_messages_and_sides():
    turns = turns_of("Hi.", "Hello. You?")
    spans = [span(0, 6, 0.3, part="prompt", message=1), span(0, 6, -0.1, side="rejected", part="prompt", message=1)]
    spans.append(span(0, 23, 0.2, side="rejected"))
    said = marked(turns, answer_of(CHOSEN), answer_of(REJECTED), result(spans=spans))
    assert [turn.role for turn in said.prompt] == ["user", "assistant"]
    assert said.prompt[1].pieces[0].contribution == pytest.approx(0.2)
    assert said.prompt[1].pieces[0].step == said.rejected[0].pieces[0].step > 0


@given(
    st.text(max_size=40),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(-2, 2)), max_size=6),
)
def test_whatever_spans_come_the_text_stays_whole(text, cuts):
    spans = [span(start, end, amount) for start, end, amount in cuts]
    assert "".join(texts(marked(turns_of("q"), answer_of(text), answer_of("r"), result(spans=spans)).chosen)) == text


def test_shades_are_signed_and_the_strongest_is_darkest():
    assert [step_of(x, 1.0) for x in (-1.0, -0.5, -0.01, 0.0, 0.2, 0.3, 0.8, 1.0)] == [-4, -3, 0, 0, 1, 2, 4, 4]
    assert step_of(0.0, 0.0) == 0


def test_control_characters_show_and_other_writing_is_kept():
    assert visible("a\u202eb\u2066c\x00\x07\ud800") == "a[U+202E]b[U+2066]c\u2400\u2407\ufffd"
    kept = "שלום \u200f مرحبا\n\tπ 👩\u200d🔬"
    assert visible(kept) == kept


# Words


def test_a_verdict_says_whether_and_why():
    flagged = verdict_of(result(), auditor())
    assert flagged.title == "Flagged for review"
    assert flagged.sentences == (
        "It looks more suspicious than 97% of the auditor's 100 reference pairs; what lies among the most suspicious "
        "5% is flagged.",
        f"The flag goes by the reward margin: {MINUS}1.5, below the threshold {MINUS}0.5.",
        "The reward model prefers the rejected response, against the label.",
        f"Of the features, 7 pulls most towards suspicion, by {MINUS}0.40.",
    )
    calm = verdict_of(result(flag=False, suspicion=0.1, reward_margin=2.0, score=0.3), auditor("safer"))
    assert calm.title == "Not flagged"
    assert "less suspicious than 90%" in calm.sentences[0]
    assert calm.sentences[1:] == (
        f"The flag goes by the SAFER score: 0.3, not below the threshold {MINUS}0.5.",
        "Of the features, 9 pulls most towards safety, by +0.10.",
    )


def test_a_pair_on_which_no_feature_fires_is_told_so():
    said = verdict_of(result(features=[]), auditor())
    assert said.sentences[-1] == "No selected feature fires on it, so the score says little."


@pytest.mark.parametrize(("suspicion", "value"), [(1.0, -1.0), (0.95, -0.5), (0.6, 0.5), (0.0, 2.0)])
def test_a_value_that_is_not_answered_is_read_off_the_reference(suspicion, value):
    assert detector_value(result(suspicion=suspicion), auditor("combined")) == pytest.approx(value)


def test_numbers_read_well():
    assert [signed(x) for x in (0.5, -0.5, 0.001, -0.001)] == ["+0.50", f"{MINUS}0.50", "0.00", "0.00"]
    assert number_of(-1.25, 1) == f"{MINUS}1.2"
    assert [percent(x) for x in (0.05, 0.973, 1.0)] == ["5%", "97.3%", "100%"]
    assert [place(x) for x in (0.4, 1, 2, 3, 11, 12, 21, 99.6)] == [
        "below the 1st percentile",
        "1st percentile",
        "2nd percentile",
        "3rd percentile",
        "11th percentile",
        "12th percentile",
        "21st percentile",
        "above the 99th percentile",
    ]
    assert "than nearly all of the auditor's" in verdict_of(result(suspicion=0.9999), auditor()).sentences[0]


# Uploads


def test_each_line_gets_a_pair_or_a_reason():
    rows = [
        {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r", "note": "mine"},
        {"prompt": "p", "chosen": "c"},
        {"pair_id": 7, "chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"text": "x"},
        {"id": "x" * 201, "prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    content = "\n".join([*map(json.dumps, rows[:3]), "", "{broken", *map(json.dumps, rows[3:]), "[1]"]).encode()
    lines = read_lines(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert [line.number for line in lines] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert [line.pair and line.pair.id for line in lines] == ["a", None, "7", None, None, None, None, None]
    assert [line.error and line.error.detail for line in lines] == [
        None,
        "missing column: rejected",
        None,
        "not JSON: Expecting property name enclosed in double quotes at character 2",
        "equal responses",
        "wanted prompt, chosen and rejected, or another preference format; got the keys text",
        "id of 201 characters, at most 200 are allowed",
        "not a JSON object",
    ]
    assert lines[2].pair.pair.prompt == turns_of("p")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 40_000, "nested deeper than 12 levels"),
        ('{"a": [' + "[]," * 60_000 + "0]}", "more than 50,000 lists and objects"),
        ('{"a": [' + "0," * 150_000 + "0]}", "more than 100,000 items and keys"),
        ('{"a": NaN}', "not JSON: NaN is no JSON number"),
        ('{"a": -1e999}', "not JSON: -1e999 is no JSON number"),
        (b"\xff{}", "not UTF-8|not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
        ("7", "not a JSON object"),
    ],
    ids=["nesting", "values", "items", "nan", "infinity", "bytes", "digits", "number"],
)
def test_what_is_no_row_is_refused(text, reason):
    with pytest.raises(Unread, match=reason):
        parse_row(text)


@pytest.mark.parametrize("turn", ["\n\nHuman: a", "\n\nAssistant:", "<|user|>a", "[INST]a[/INST]", '{"role":"user"},'])
def test_a_text_of_too_many_turns_is_refused_before_messages_are_made_of_it(turn, monkeypatch):
    """A file of 16 MB held the service for seconds, to be told that its text is too long."""
    row = {"prompt": turn * 50_001, "chosen": "c", "rejected": "r"}
    monkeypatch.setattr("safer_ray.service.request_parsing.read_pair", None)
    assert read_lines(json.dumps(row).encode())[0].error.detail == "more than 50,000 turns of a conversation"
    with pytest.raises(Unread, match="more than 50,000 turns"):
        read_one(row, Limits())


def test_a_line_may_be_a_row_that_names_its_columns_otherwise():
    answers = [{"answer": "yes", "model": "a", "rank": 2}, {"answer": "no", "model": "b", "rank": 1}]
    ranked = pair_of({"prompt": "p", "answers": answers}, "1")
    assert (ranked.pair.chosen, ranked.pair.rejected) == (answer_of("no"), answer_of("yes"))
    judged = pair_of({"input": "p", "output_1": "a", "output_2": "b", "label": 2}, "2")
    assert (judged.pair.chosen, judged.pair.rejected) == (answer_of("b"), answer_of("a"))
    many = {"id": 1, "prompt": "p", "chosen": ["a"] * 20_000, "rejected": ["b"] * 20_000, "subset": "Ties"}
    with pytest.raises(Unread, match="a row of format rewardbench2 holds several pairs, wanted one"):
        pair_of(many, "3")


def test_a_file_of_too_many_rows_is_refused_by_name():
    row = b'{"prompt":"p","chosen":"c","rejected":"r"}\n'
    assert len(read_lines(row * MAX_ROWS)) == MAX_ROWS
    with pytest.raises(TooManyRows, match="more than 1,000 rows; split the file"):
        read_lines(row * (MAX_ROWS + 1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": [' + b"{}," * 20_000 + b"{}]}\n", "more than 50,000 lists, objects and turns"),
        (json.dumps({"chosen": "\n\nHuman: a" * 20_000}).encode() + b"\n", "more than 50,000 lists, objects and turns"),
        (b'{"a": [' + b"0," * 40_000 + b"0]}\n", "or 100,000 items; split the file"),
        (b"\n" * 100_000, "more than 100,000 lines"),
    ],
    ids=["values", "turns", "items", "blank lines"],
)
def test_what_a_whole_file_may_hold_is_limited(content, reason):
    read_lines(content[:50_000])
    with pytest.raises(TooManyRows, match=reason):
        read_lines(content * 3)


def test_a_scored_file_keeps_its_pairs_and_their_order():
    lines = read_lines(b'{"id":"a","prompt":"p","chosen":"c","rejected":"r","note":1}\n{"b":1}\nx')
    failed = FailedPair(id="b", error=Reason(code="refused", detail="too long"))
    first, second, third = [
        scored_row(line, scored, "auditor-1") for line, scored in zip(lines, [result(), failed, None], strict=True)
    ]
    assert [first[name] for name in ("id", "prompt", "chosen", "rejected")] == ["a", "p", "c", "r"]
    assert columns_left_out(lines) == ["note"]
    assert "note" not in first
    assert (first["safer_ray"]["suspicion"], first["safer_ray"]["features"][0]["feature"]) == (0.97, 7)
    assert second == {"safer_ray": {"auditor": "auditor-1", "line": 2, **failed.model_dump()}}
    assert third["safer_ray"]["error"]["detail"].startswith("not JSON")
    assert [row.line for row in without_score(lines, [result(), failed, None])] == [2, 3]


TEXT_AND_MESSAGES = [
    {"prompt": "p", "chosen": " c ", "rejected": "r"},
    {"prompt": "\n\nHuman: p\n\nAssistant: q\n\nHuman: s\n\nAssistant:", "chosen": "c", "rejected": "r"},
    {"prompt": [{"role": "system", "content": "Human: p"}], "chosen": "c", "rejected": "r"},
    {"prompt": [{"role": "user", "content": "Human: p"}], "chosen": "Human: c", "rejected": "r"},
    {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
    {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 1},
    {
        "prompt": "p",
        "chosen": [
            {"role": "user", "content": "p"},
            {"role": "tool", "content": "x"},
            {"role": "assistant", "content": "y"},
        ],
        "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "z"}],
    },
]


@pytest.mark.parametrize("row", TEXT_AND_MESSAGES)
def test_a_row_of_a_scored_file_reads_as_the_pair_that_was_scored(row):
    read = read_one(row, Limits())
    again = read_one(json.loads(row_json(plain(read))), Limits())
    for name in ("prompt", "chosen", "rejected"):
        assert getattr(again.pair, name) == getattr(read.pair, name)


def test_half_a_surrogate_pair_goes_out_as_json_says_it():
    text = '\\ \ud83d \U0001f600 \u2028 " \x00'
    assert json.loads(row_json({text: text})) == {text: text}
    assert row_json({"a": "\ud83d"}) == '{"a":"\\ud83d"}'


def test_a_page_carries_rows_that_fit_it_the_most_suspicious_first():
    lines = read_lines(json.dumps({"prompt": "<" * 9_000, "chosen": "c", "rejected": "r"}).encode() + b"\n")
    rows = [scored_row(lines[0]._replace(number=number), result(), "auditor-1") for number in range(100)]
    first = [Scored(line, result(), "") for line in reversed(range(100))]
    held = carried(rows, first)
    assert not held.whole
    assert held.rows == len(json.loads(held.json))
    assert PAGE_BYTES - 60_000 < len(held.json) <= PAGE_BYTES + 2
    assert [row["safer_ray"]["line"] for row in json.loads(held.json)] == [*reversed(range(100 - held.rows, 100))]
    few = carried(rows[:5], first[-3:])
    assert (few.whole, json.loads(few.json)) == (True, rows[:5])


def test_columns_that_are_left_out_are_told_by_name_as_far_as_a_page_holds_them():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"} | {f"{number}{'x' * 1000}": 1 for number in range(12)}
    told = columns_left_out(read_lines(json.dumps(row).encode()))
    assert (len(told), told[-1], max(map(len, told))) == (9, "4 more", 40)


def test_a_reason_is_short_whatever_a_row_holds():
    rows = [
        {"x" * 10_000: 1},
        {"prompt": "p", "chosen": [{"role": "x" * 10_000, "content": "c"}], "rejected": "r"},
    ]
    lines = read_lines("\n".join(map(json.dumps, rows)).encode())
    assert [(line.pair, len(line.error.detail)) for line in lines] == [(None, 300)] * 2


def test_chunks_of_a_file_hold_no_more_than_a_request_may():
    pairs = [pair_of({"prompt": "p" * size, "chosen": "c", "rejected": "r"}, str(size)) for size in range(1, 100)]
    chunks = [*chunks_of(pairs, 32, 300)]
    assert [pair for chunk in chunks for pair in chunk] == pairs
    assert max(map(len, chunks)) <= 32
    sizes = [[sum(len(turn["content"]) for turn in pair.pair.prompt) for pair in chunk] for chunk in chunks]
    assert all(sum(chunk) < 300 for chunk in sizes)


def test_the_most_suspicious_rows_come_first():
    row = b'{"prompt":"p","chosen":"c","rejected":"r"}\n'
    results = [result(suspicion=s, score=x) for s, x in ((0.2, 1.0), (0.9, 0.0), (0.9, -1.0))]
    assert [row.line for row in by_suspicion(read_lines(row * 3), results)] == [3, 2, 1]


# Figures and templates


def svg(text):
    """An SVG as a tree, with nothing that the page's policy forbids."""
    assert not re.search(r"\bstyle=|<script|\bon\w+=", text)
    return ElementTree.fromstring(text)


@pytest.mark.parametrize("value", [-30.0, -1.0, 0.4, 2.0, 55.5])
def test_a_pair_is_marked_within_the_figure_wherever_it_lies(value):
    tree = svg(reference_figure("k", "Scores", HISTOGRAM, Spot(value, "this <pair>"), -0.5, "score"))
    width = float(tree.get("viewBox").split()[2])
    [line] = [node for node in tree.iter("line") if node.get("class") == "spot"]
    assert 0 <= float(line.get("x1")) <= width
    assert f"this <pair>. Pairs below {MINUS}0.5 are flagged." in tree.find("desc").text


def test_a_histogram_of_one_value_is_drawn():
    svg(reference_figure("k", "Scores", Histogram(edges=[1.0, 1.0], counts=[5]), Spot(1.0, "x"), None, "score"))


def test_the_sides_of_a_feature_point_apart():
    tree = svg(sides_figure("k", "Strength", SideHistograms(edges=[0.0, 1.0, 2.0], chosen=[4, 0], rejected=[1, 2])))
    bars = {name: [n for n in tree.iter("rect") if n.get("class") == f"bar {name}"] for name in ("chosen", "rejected")}
    assert [len(found) for found in bars.values()] == [1, 2]
    assert float(bars["chosen"][0].get("y")) < float(bars["rejected"][0].get("y"))


def test_examples_are_pairs_that_can_be_scored():
    assert len({example.name for example in examples()}) == len(examples()) >= 4
    for example in examples():
        pair = pair_of({name: getattr(example, name) for name in ("prompt", "chosen", "rejected")}, "pair")
        assert pair.pair.chosen[-1]["role"] == "assistant"
    assert len(pair_of(examples()[-1]._asdict() | {"name": ""}, "pair").pair.prompt) == 3


def test_errors_and_the_sign_in_are_pages():
    busy = error_page(429, "Too many <at once>.", 2.4)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "2")
    assert "Too many &lt;at once&gt;." in busy.body.decode()
    for page in (sign_in_page(), sign_in_page(failed=True, next_path='/"><script>')):
        text = page.body.decode()
        assert page.headers["cache-control"] == "no-store"
        assert '<label for="key">' in text
        assert 'value="/"' in text or 'value="/&#34;&gt;&lt;script&gt;"' in text


def test_a_result_is_shown_with_all_that_decided():
    pair = pair_of({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, "pair")
    shown = show(pair, result(), auditor())
    assert [sentence.piece.contribution for sentence in shown.sentences] == [-0.4, -0.1]
    assert [feature.feature for feature in shown.features] == [7, 9]
    assert shown.detector_figure is not None
    assert show(pair, result(), auditor("safer")).detector_figure is None
    assert respond("error.html", title="x", detail="y", here="", signed_in=False).status_code == 200


# Hostile texts


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))


def page_of(prompt, chosen, rejected, name):
    """The page with a pair's result, with one sentence a text, and one feature."""
    said = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    texts = {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in said.items()}
    pair = Read("p", Pair(**texts), texts, texts)  # also of what no service would score
    spans = [span(0, len(chosen), -0.4), span(0, len(rejected), 0.4, side="rejected")]
    features = [Contribution(feature=7, name=name, sign=-1, contribution=-0.4)]
    answer = respond(
        "home.html",
        here="/",
        signed_in=False,
        info=auditor(name=name),
        form=said | {"row": name},
        errors={"row": name},
        notice=None,
        shown=show(pair, result(features=features, spans=spans), auditor()),
        examples=examples(),
        chosen_example=name,
        detectors={"reward_margin": "margin"},
        max_rows=10,
    )
    return answer.body.decode()


HARMLESS = Tags(page_of("p.", "c.", "r.", "n.")).found
HOSTILE = st.sampled_from(
    ["<script>", "</textarea>", '"', "'", ">", "<!--", "]]>", "&lt;", "{{", "\x00", "\u202e", "\ud800"]
)
TEXT = st.lists(HOSTILE | st.text(max_size=5), min_size=1, max_size=5).map("".join).filter(str.strip)


@given(TEXT, TEXT, TEXT, TEXT)
def test_no_text_of_a_pair_becomes_markup(prompt, chosen, rejected, name):
    assert Tags(page_of(prompt, f"a {chosen}", f"b {rejected}", name)).found == HARMLESS


@given(st.lists(TEXT, min_size=1, max_size=3))
def test_no_row_of_a_file_becomes_markup(texts):
    rows = [{"id": text, "safer_ray": {"line": line}, text: text} for line, text in enumerate(texts)]
    values = {"here": "/", "signed_in": False, "red_team": False, "scored": [], "flagged": 0, "errors": []}

    def page_of_rows(name, rows):
        told = {"filename": name, "download_name": name, "left_out": [name], "carried": carried(rows, [])}
        return respond("upload.html", **told, **values).body.decode()

    page = page_of_rows(texts[0], rows)
    assert Tags(page).found == Tags(page_of_rows("a", rows[:0])).found
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(block) == rows
