"""What reads a stranger's text takes time in proportion to its length, whatever the text is."""

import contextlib
import gc
import json
import re
import signal
import time

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from safer_ray.audit import leftovers
from safer_ray.config import where
from safer_ray.data.places import Piece, pieces_of, sent_span
from safer_ray.errors import UserError
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import read_pair
from safer_ray.formats.transcripts import is_transcript
from safer_ray.reward import blocks, parts, sentence_ends, templates, text
from safer_ray.reward.sentences import SideSentences
from safer_ray.service import access, auth, keys, request_limits, uploads, web
from safer_ray.service.api import ScoreRequest
from safer_ray.service.highlighting import parted, visible
from safer_ray.service.http import create_api
from safer_ray.service.problems import Problem
from safer_ray.service.request_limits import Limits, check_nesting, read_json
from safer_ray.service.service import LocalService
from safer_ray.storage import json_values
from safer_ray.storage.rows import read_rows

SMALL, LARGE = 2**16, 2**20
RATIO = 40  # linear gives 16, quadratic 256
MEASURABLE_S = 0.002
NOTHING_S = 2e-3  # what takes less for LARGE, a million characters, is no danger; to copy them takes up to 5e-4
TRIES = 3  # others on the machine change what a cache holds from one moment to the next; a square stays one
HOPELESS_S = 1.0  # for SMALL; what is linear takes milliseconds
ROOMY = Limits(body_bytes=2**30, values=2**30, members=2**30)


class TooSlow(BaseException):
    """No Exception, so that what is measured does not catch it."""


def processor_seconds(call, at_most, enough=0.0):
    """The least of five, each long enough to be measured, or the first that is less than enough; garbage waits
    meanwhile, as with timeit."""
    found, times = [], 1
    signal.signal(signal.SIGPROF, _give_up)
    while len(found) < 5:
        gc.disable()
        signal.setitimer(signal.ITIMER_PROF, at_most * times + 1)
        try:
            began = time.process_time()
            for _ in range(times):
                call()
            took = time.process_time() - began
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            gc.enable()
        if took < MEASURABLE_S and times < 1000:
            times *= 4
            found.clear()
        else:
            found.append(took / times)
            if found[-1] < enough:
                break
    return min(found)


def _give_up(*_):
    raise TooSlow


def assert_linear(call, unit, head="", tail=""):
    """`call` on a text of SMALL and of LARGE characters that repeats `unit` between head and tail."""

    def made(size):
        return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail

    small, large = made(SMALL), made(LARGE)
    found = []
    for _ in range(TRIES):
        try:
            quick = processor_seconds(lambda: call(small), HOPELESS_S)
            enough = max(RATIO * quick, NOTHING_S)
            slow = processor_seconds(lambda: call(large), RATIO * quick, enough)
        except TooSlow:
            found.append("given up")
            continue
        if slow < enough:
            return
        found.append(f"{quick:.5f} s and {slow:.5f} s")
    pytest.fail(f"{head[:20]!r} + {unit!r} * n + {tail[:20]!r} takes more than linear time: {', '.join(found)}")


def refusing(call, *refusals):
    """A call whose refusal is an answer like any other."""

    def called(given):
        with contextlib.suppress(*refusals):
            call(given)

    return called


# Bodies of requests


def as_json(given):
    body = given.encode("utf-8", "surrogatepass")
    try:
        return read_json(body, ROOMY)
    except Problem:
        return None


BODIES = [
    ("", '"', ""),
    ("", '\\"', ""),
    ('"', '\\"', ""),
    ('"', "\\\\", ""),
    ('"', "\\\\", "\\"),
    ('{"pairs": "', "\\u0041", '"}'),
    ('"', '"\\', ""),
    ("", '""', ""),
    ("", '"a', ""),
    ("", '"\\"', ""),
    ("", '["', ""),
    ("", "[]", ""),
    ("[", '"]",', '""]'),
    ("[", "[],", "0]"),
    ("[", "0,", "0]"),
    ("[", "1e5,", "0]"),
    ("", "]", ""),
    ("", "{", ""),
    ("", ",", ""),
    ("", " ", ""),
    ("", "\n", "x"),
    ("", "a", ""),
    ('{"x": 0.', "9", "}"),
    ('{"x": 1', "0", ".0}"),
]


@pytest.mark.parametrize(("head", "unit", "tail"), BODIES)
def test_bodies_are_counted_and_parsed(head, unit, tail):
    assert_linear(as_json, unit, head, tail)


def test_errors_of_a_body_are_counted_no_further_than_the_first_of_a_list():
    def check(given):
        with pytest.raises(ValueError, match="1 validation error"):
            ScoreRequest.model_validate({"pairs": [0], "carried": json.loads(given)})

    assert_linear(check, "0,", "[", "0]")


OLD_STRINGS, OLD_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL), re.compile(rb"[\[\]{}]")


@given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"a", b"\n", b"\xff"]), max_size=14))
def test_what_is_counted_are_the_brackets_outside_strings(pieces):
    body = b"".join(pieces)
    bare = OLD_STRINGS.sub(b"", body).partition(b'"')[0]  # behind a string that nothing ends all is its text
    found = [match[1] for match in request_limits.SIGN.finditer(body) if match[1] not in (b"", b",")]
    assert found == OLD_BRACKETS.findall(bare)
    assert sum(match[1] == b"," for match in request_limits.SIGN.finditer(body)) == bare.count(b",")


@given(st.recursive(st.text('a"\\[]{},', max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_depth_and_counts_are_those_of_the_tree(tree):
    def measured(node):
        inside = [measured(item) for item in node] if isinstance(node, list) else []
        depth = 1 + max((d for d, _, _ in inside), default=0) if isinstance(node, list) else 0
        values = sum(v for _, v, _ in inside) + isinstance(node, list)
        commas = sum(c for _, _, c in inside) + max(0, len(inside) - 1)
        return depth, values, commas

    depth, values, commas = measured(tree)
    body = json.dumps(tree).encode()
    fits = Limits(depth=max(1, depth), values=max(1, values), members=commas + 1)
    check_nesting(body, fits)
    for name, found in (("depth", depth), ("values", values), ("members", commas)):
        if found > 1 or (name == "members" and found):
            with pytest.raises(Problem):
                check_nesting(body, fits.model_copy(update={name: found - (name != "members")}))


UPLOADS = [
    ("", "\n"),
    ("", "\r\n"),
    ("", " \n"),
    ('{"a": "', '\\"'),
    ("", "["),
    ('{"a": [', "0,"),
    ("", '"'),
    ("", "{}\n"),
]


@pytest.mark.parametrize(("head", "unit"), UPLOADS)
def test_uploads_are_cut_into_lines_and_rows(head, unit):
    assert_linear(refusing(lambda given: uploads.read_lines(given.encode()), uploads.TooManyRows), unit, head)


class Unasked(LocalService):
    """Scores nothing; what comes before is what is looked at."""

    def __init__(self):
        pass

    async def score(self, pairs, explain):
        raise Problem(503, "no scorer")


@pytest.fixture(scope="module")
def client():
    app = create_api(Unasked(), ROOMY.model_copy(update={"upload_bytes": 2**30, "chars": 2**30, "text_chars": 2**30}))
    return TestClient(app, base_url="http://localhost")


KINDS = {"/v1/score": "application/json", "/": "application/x-www-form-urlencoded", "/upload": "multipart/form-data"}
PART = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
REQUESTS = [
    ("/v1/score", '{"pairs": [{"prompt": [', "null,", "0]}]}"),
    ("/v1/score", '{"pairs": [{"prompt": [', "{},", "0]}]}"),
    ("/v1/score", '{"pairs": [{"prompt": "', '\\"', '"}]}'),
    ("/v1/score", '{"pairs": [{"chosen": "a", "rejected": "b", "prompt": "', "\\n\\nHuman: a", '"}]}'),
    ("/", "row=", "&", ""),
    ("/", "row=", "a=&", ""),
    ("/upload", PART, "\r", "\r\n--x--\r\n"),
    ("/upload", PART, "\r\n--", "\r\n--x--\r\n"),
    ("/upload", "--x\r\n", "a: b\r\n", ""),
    ("/sign-in", "", "a=1&", ""),
]


@pytest.mark.parametrize(("path", "head", "unit", "tail"), REQUESTS)
def test_requests_are_answered(client, monkeypatch, path, head, unit, tail):
    monkeypatch.setattr(web, "PATIENCE_S", 0.0)
    kind = KINDS.get(path, KINDS["/"]) + ("; boundary=x" if path == "/upload" else "")

    def ask(given):
        answer = client.post(path, content=given.encode(), headers={"content-type": kind})
        assert answer.status_code >= 400

    assert_linear(ask, unit, head, tail)


# Texts of pairs

TURNS = ["\n\nHuman: a", "\n\nHuman:", "\n\nHuman: a\n\nAssistant: b", "Human:", "\n", " ", "\t", "a "]


@pytest.mark.parametrize("unit", TURNS)
@pytest.mark.parametrize("head", ["", "\n\nHuman:"])
def test_transcripts_are_read_and_their_turns_found(head, unit):
    def canonical(given):
        pair = {"prompt": given, "chosen": "a", "rejected": "b"}
        read = read_pair(pair, "canonical")
        found = pieces_of(pair, pair, read)["prompt"]
        assert len(found) == len(read.prompt)

    assert_linear(refusing(canonical, Refused), unit, head)
    assert_linear(is_transcript, unit, head)


MARKUP = [
    "",
    "<|im_start|>user\na<|im_end|>",
    "<|user|>a</s>",
    "[INST]",
    "[INST]<<SYS>>",
    '[{"role":"user","content":"',
]
UNITS = [
    " ",
    "\n",
    "</s>",
    "</s> ",
    "<|im_start|>user\n",
    "<|im_start|>a name=",
    "<|user|>a",
    "[INST]a[/INST]",
    "<<SYS>>",
]


@pytest.mark.parametrize("tail", ["x", "x>", "</s>"])
@pytest.mark.parametrize("unit", [*UNITS, '"},{"role":"user","content":"', "\\n"])
@pytest.mark.parametrize("head", MARKUP)
def test_markup_and_json_are_read(head, unit, tail):
    def read(given):
        pair = {"prompt": given, "chosen": given, "rejected": "b"}
        pieces_of(pair, pair, read_pair(pair, "canonical"))

    assert_linear(refusing(read, Refused), unit, head, tail)


@pytest.mark.parametrize("unit", TURNS)
@pytest.mark.parametrize("format", ["hh_rlhf", "trl_implicit"])
def test_two_texts_are_parted_where_they_begin_to_differ(format, unit):
    def read(given):
        read_pair({"chosen": given + "\n\nAssistant: a", "rejected": given + "\n\nAssistant: b"}, format)

    assert_linear(refusing(read, Refused), unit)


def test_a_place_among_many_pieces_is_found():
    def every_place(given):
        own = [Piece(i, "prompt", 0, 2 * i, 2 * i + 1) for i in range(len(given) // 16)]
        assert all(sent_span([own], 0, piece.at, piece.at + 1) for piece in own)

    assert_linear(every_place, "a")


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 30), st.integers(1, 5))
def test_a_place_among_pieces_is_that_of_the_first_that_holds_it(lengths, start, length):
    own, at = [], 0
    for number, each in enumerate(lengths):
        own.append(Piece(at, "prompt", number, 10 * number, 10 * number + each))
        at += each + 2
    holds = [piece for piece in own if piece.at <= start < piece.at + piece.stop - piece.start]
    wanted = None
    if holds:
        shift = holds[0].start - holds[0].at
        if start + length <= holds[0].stop - shift:
            wanted = "prompt", holds[0].message, start + shift, start + length + shift
    assert sent_span([own], 0, start, start + length) == wanted


SENTENCES = [".", ". ", " ", "\n", " \n", ".\n", "a. ", "a", ".  \n\n", "\u2003", "a \n"]
SENTENCES += ["\u3002", "\u3002 ", "\u4f60", "\u4f60 ", "\u0e01  ", "\u0e01 \u0e2f", "\u3000\u3001"]  # of other scripts


@pytest.mark.parametrize("unit", SENTENCES)
@pytest.mark.parametrize(("head", "tail"), [(".", "x"), ("x", ".")])
def test_sentence_ends_are_found(head, unit, tail):
    def ends(given):
        sentence_ends.sentence_ends([templates.Rendered(given, (templates.Span(0, len(given), 0, 0),))])

    assert_linear(ends, unit, head, tail)


@pytest.mark.parametrize("unit", SENTENCES)
def test_all_sentences_of_a_side_are_cut(unit):
    plain = text.PairTokenizer(None, "plain", 10**9)

    def sentences(given):
        pair = {"prompt": [], "chosen": [{"role": "assistant", "content": given}]}
        cut = SideSentences(plain, pair, "chosen")
        for end in sentence_ends.sentence_ends([plain.render([], pair["chosen"])])[1].tolist():
            if sentence := cut.ending_at(end):
                cut.around(sentence, 100)

    assert_linear(sentences, unit, "x", "x")


@pytest.mark.parametrize("unit", ["\ue000", "\ue0001", "1", "\ue000\ue001", "\ue0001\ue001"])
def test_marks_of_contents_are_told_from_markup(unit):
    assert_linear(templates.MARK.split, unit, "\ue000")


@pytest.mark.parametrize("unit", ["a", " a", "a ", "\n"])
def test_contents_are_found_in_a_rendered_conversation(unit):
    def spans(given):
        contents = [given[i : i + 8] for i in range(0, len(given), 8)]
        messages = [{"role": "user", "content": content} for content in contents]
        templates.render_plain([templates.Conversation(messages, messages[:1])])

    assert_linear(spans, unit)


@pytest.mark.parametrize("behind", ["<end>", "a<end>", "\n", "\nb"])
@pytest.mark.parametrize("unit", ["a", "\n", "<end", "<end>"])
def test_contents_that_a_template_rewrites_are_found_by_what_is_around_them(unit, behind):
    def spans(given):
        count = len(given) // 16
        messages = [{"role": "user", "content": f"{number:08}"} for number in range(count)]
        markup = templates._Markup([behind] * (count + 1), list(range(count)))
        templates._aligned(given, markup, templates.Conversation(messages[:-1], messages[-1:]))

    assert_linear(spans, unit, "x" * 64)


@given(st.text(".,\n a\u2003?", max_size=14))
def test_sentence_ends_are_the_same_runs_as_before(said):
    old = re.finditer(r"[.,?!;\n]+(\s+[.,?!;\n]+)*", said)
    assert [match.span() for match in sentence_ends.SENTENCE_END.finditer(said)] == [match.span() for match in old]


@pytest.mark.parametrize("unit", [" ", "\x00", "\u202e", "a", " a"])
def test_texts_are_shown(unit):
    assert_linear(lambda given: (parted(given), visible(given)), unit)


# Files


@pytest.mark.parametrize(
    ("name", "head", "unit"),
    [
        ("a.json", "[", " "),
        ("a.json", "[", ","),
        ("a.json", "[", '{"a": 0, "b": "cccccccccccccccc"},'),
        ("a.json", '["', '\\"'),
        ("a.json", "[", "["),
        ("a.json", "[", "[[],"),
        ("a.jsonl", "", "\n"),
        ("a.jsonl", "", '{"a": 0, "b": "cccccccccccccccc"}\n'),
        ("a.csv", "a,b\n", '"'),
        ("a.csv", "a,b\n", '"a""'),
        ("a.csv", "a,b\n", "1,22222222222222222222222222222222222\n"),
        ("a.csv", "a,b\n", ","),
        ("a.csv", "a,b\n", "\n"),
    ],
)
def test_rows_of_a_file_are_told_apart(tmp_path, name, head, unit):
    def read(given):
        path = tmp_path / str(len(given)) / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(given, encoding="utf-8")
        return sum(1 for _ in read_rows(path, 0, 2**40))

    assert_linear(refusing(read, UserError), unit, head)


@pytest.mark.parametrize("unit", ["layer.", "layers.1", "layer.1.", "1", "\n", "layer.1.\n"])
@pytest.mark.parametrize(("head", "tail"), [("", ""), ("layer.", ""), ("layer.1.", "\n\n")])
def test_names_of_tensors_are_read(head, unit, tail):
    assert_linear(lambda given: parts._renamed(given, 1, 2, 3), unit, head, tail)


OLD_BLOCK = re.compile(r"^(.*?\blayers?\.)(\d+)(\..*)$")


@given(st.lists(st.sampled_from(["layer", "layers", ".", "1", "2", "a", "_", "0"]), max_size=10).map("".join))
def test_blocks_are_told_from_names_as_before(name):
    found, old = blocks.BLOCK.search(name), OLD_BLOCK.match(name)
    assert (found and (name[: found.start(1)], found[1], name[found.end(1) :])) == (old and old.groups())


# Settings, names, headers


@pytest.mark.parametrize("unit", [" ", " and", " and ", "a", "=", '"', "section == a and ", "\t"])
@pytest.mark.parametrize(("head", "tail"), [("a", "b"), ("section == ", " x"), ('section == "', "")])
def test_conditions_are_parted(head, unit, tail):
    assert_linear(refusing(where.parse_where, ValueError), unit, head, tail)


@given(st.lists(st.sampled_from([" ", "\n", "and", "a", "d", "\u2003"]), max_size=12).map("".join))
def test_conditions_are_parted_as_before(given_text):
    assert where._AND.split(given_text.strip()) == re.split(r"\s+and\s+", given_text.strip())


@pytest.mark.parametrize("unit", ["a", ".", ":", " ", "=", "a.", "%", "&", "\\", "a=1&", "part-00000000"])
def test_names_and_headers_are_read(unit):
    opened = auth.Keys(listed=(keys.Key("a", "0" * 64),))
    for call in (
        access.host_of,
        access.own_path,
        auth.bearer_of,
        opened.session_of,
        lambda given: web.UNSAFE_NAME.sub("-", given),
        lambda given: web.errors_of(web.BLANK, given),
        leftovers.NAME.fullmatch,
        leftovers.TORN.fullmatch,
        refusing(lambda given: keys.parse_keys(given, "keys"), UserError),
        json_values._SPACE.match,
        json_values._MARKS.match,
        lambda given: json_values._ARRAY_OF_ROWS.match(given.encode()),
        lambda given: json_values._OPEN_LINE.match(given.encode()),
    ):
        assert_linear(call, unit)
