"""An uploaded file of pairs: JSON lines in any preference format that the library reads, an error a line at most."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from safer_ray.formats.canonical import PROMPTS, SIDES, SYSTEMS
from safer_ray.service.api import Reason
from safer_ray.service.problems import Problem
from safer_ray.service.request_limits import Limits, check_nesting, texts_in
from safer_ray.service.request_parsing import Read, Unread, as_read, id_of, read_row

MAX_ROWS = 1000
MAX_LINES = 100 * MAX_ROWS  # blank ones included
LIMITS = Limits()  # of nesting, and of lists, objects and items in the whole file
TURNS = (  # each opens a message, of a transcript, of template markup, or of messages as JSON text
    *("\n\nHuman:", "\n\nAssistant:", "<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<start_of_turn>"),
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", '"role', '"from'),
)
IDS = ("id", "pair_id")
RESPONSES = ("response_0", "response_1")  # that a format reads without another name for them
ANSWER_BYTES = 2**16  # of a scored file, that are made at a time


class Line(NamedTuple):
    """A line of the file: its pair, or why there is none."""

    number: int  # from 1, as editors count
    pair: Read | None
    error: Reason | None
    left_out: tuple[str, ...] = ()  # columns that the scored file lacks


class TooManyRows(Exception):  # noqa: N818  # a verdict on a file, no error
    """A file of more rows than one upload may hold."""


def read_lines(content: bytes, limits: Limits = LIMITS) -> list[Line]:
    """The lines of a file that are not blank.

    Raises:
        TooManyRows: more than MAX_ROWS, or more in them than a service has time for.
    """
    if content.count(b"\n") > MAX_LINES:
        raise TooManyRows(f"more than {MAX_LINES:,} lines")
    lines: list[Line] = []
    values = members = 0
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if raw.strip():
            if len(lines) == MAX_ROWS:
                raise TooManyRows(f"more than {MAX_ROWS:,} rows; split the file, or use safer-ray audit")
            line, counts = _line(number, raw, limits)
            lines.append(line)
            values, members = values + counts[0], members + counts[1]
            if values > LIMITS.values or members > LIMITS.members:
                raise TooManyRows(
                    f"more than {LIMITS.values:,} lists, objects and turns, or {LIMITS.members:,} items; split the "
                    "file, or use safer-ray audit"
                )
    return lines


def turns_in(row: dict[str, Any]) -> int:
    """Return about how many messages are made of the row's texts, which may hold conversations.

    Raises:
        Unread: more than a request may hold, so that none are made.
    """
    turns = sum(text.count(mark) for text in texts_in(row) for mark in TURNS)
    if turns > LIMITS.values:
        raise Unread("too_long", f"more than {LIMITS.values:,} turns of a conversation")
    return turns


def read_one(row: dict[str, Any], limits: Limits) -> Read:
    """Return the row that a form holds as a pair, with its places in its own messages.

    Raises:
        Unread: it is no usable pair; the reason says why.
    """
    turns_in(row)
    return as_read(read_row(row, _id(row, "pair"), limits))


def _id(row: dict[str, Any], default: str) -> str:
    return default if (own := id_of(row, *IDS)) is None else own


def columns_besides(read: Read) -> tuple[str, ...]:
    """Return the columns of a row of which nothing is said in its pair's texts."""
    texts = {*PROMPTS, *SYSTEMS, *SIDES, *RESPONSES} & read.pair.used
    return tuple(name for name in read.sent if name in read.row and name not in texts and name not in IDS)


def parse_row(text: str | bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        Unread: it is something else, or nests deeper or holds more than a request may.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _counted(raw)
    try:
        row = json.loads(text, parse_constant=_no_number, parse_float=_number)
    except RecursionError:
        raise Unread("refused", "nested too deeply") from None
    except UnicodeDecodeError:
        raise Unread("not_unicode", "not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Unread("refused", f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise Unread("refused", f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Unread("refused", "not a JSON object")
    return row


def row_json(row: dict[str, Any]) -> str:
    """Return a row in one line; it takes hardly more bytes than it came in, as text beyond ASCII is not escaped."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair as JSON has it: \\udXXX


def scored_lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Return rows as JSON lines, many at a time."""
    made = bytearray()
    for row in rows:
        made += row_json(row).encode() + b"\n"
        if len(made) >= ANSWER_BYTES:
            yield bytes(made)
            made.clear()
    if made:
        yield bytes(made)


def _counted(raw: bytes) -> tuple[int, int]:
    """Return how many lists and objects, and items, a row holds; raises Unread where one row may not hold so many."""
    try:
        return check_nesting(raw, LIMITS)
    except Problem as problem:
        raise Unread("refused", str(problem.detail)) from None


def _line(number: int, raw: bytes, limits: Limits) -> tuple[Line, tuple[int, int]]:
    """Return a line, and what it counts against the limits of the file; one over them is not parsed, and counts not."""
    counts = (0, 0)
    try:
        counts = _counted(raw)
        row = parse_row(raw)
        counts = counts[0] + turns_in(row), counts[1]
        read = read_row(row, _id(row, f"line {number}"), limits)
        return Line(number, as_read(read), None, columns_besides(read)), counts
    except Unread as error:
        return Line(number, None, error.reason), counts


def _number(text: str) -> float:
    """A number; one too large for it would go out as an infinity, which is no JSON."""
    return number if math.isfinite(number := float(text)) else _no_number(text)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
