"""An uploaded file of pairs: JSON lines in any preference format that the library reads, an error a line at most."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import FORMATS, expanded, read_pair, row_format
from safer_ray.service.api import MAX_ID_CHARS, Message, Pair
from safer_ray.service.problems import Problem
from safer_ray.service.request_limits import Limits, check_nesting

MAX_ROWS = 1000
MAX_LINES = 100 * MAX_ROWS  # blank ones included
LIMITS = Limits()  # of nesting, and of lists, objects and items in the whole file
WANTED = "wanted prompt, chosen and rejected, or another preference format"
READ = {"id", "pair_id", "prompt", "chosen", "rejected", "response_0", "response_1"}  # what a scored row holds, too
ANSWER_BYTES = 2**16  # of a scored file, that are made at a time


class Line(NamedTuple):
    """A line of the file: its pair, or why there is none."""

    number: int  # from 1, as editors count
    pair: Pair | None
    error: str | None
    left_out: tuple[str, ...] = ()  # columns that the scored file lacks


class TooManyRows(Exception):  # noqa: N818  # a verdict on a file, no error
    """A file of more rows than one upload may hold."""


def read_lines(content: bytes) -> list[Line]:
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
            line, counts = _line(number, raw)
            lines.append(line)
            values, members = values + counts[0], members + counts[1]
            if values > LIMITS.values or members > LIMITS.members:
                raise TooManyRows(
                    f"more than {LIMITS.values:,} lists, objects and turns, or {LIMITS.members:,} items; split the "
                    "file, or use safer-ray audit"
                )
    return lines


def turns_in(row: dict[str, Any]) -> int:
    """Return about how many messages are made of the row's texts, which may be transcripts."""
    texts = [value for value in row.values() if isinstance(value, str)]
    return sum(text.count(mark) for text in texts for mark in ("\n\nHuman:", "\n\nAssistant:"))


def pair_of(row: dict[str, Any], default_id: str) -> Pair:
    """A row of any preference format as a pair of messages.

    Raises:
        Refused: it is no usable pair, or one of more messages than a request may hold; the text says why.
    """
    if turns_in(row) > LIMITS.values:
        raise Refused(f"more than {LIMITS.values:,} turns of Human: and Assistant:")
    format = row_format(row)
    if format is None and not {"prompt", "chosen", "rejected"} & row.keys():
        raise Refused(f"{WANTED}; got the keys {', '.join(sorted(row)[:8]) or '(none)'}")
    format = format or "canonical"
    if FORMATS[format].several:
        raise Refused(f"a row of format {format} holds several pairs, wanted one a line; use safer-ray audit")
    (one,) = expanded(row, format)
    read = read_pair(one, format)
    said = {"prompt": read.prompt, "chosen": read.chosen, "rejected": read.rejected}
    texts: dict[str, Any] = {name: [Message(**message) for message in turns] for name, turns in said.items()}
    try:
        return Pair(id=_id(row, default_id), **texts)
    except ValidationError as error:
        raise Refused(error.errors()[0]["msg"]) from None


def parse_row(text: str | bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        Refused: it is something else, or nests deeper or holds more than a request may.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _counted(raw)
    try:
        row = json.loads(text, parse_constant=_no_number, parse_float=_number)
    except RecursionError:
        raise Refused("nested too deeply") from None
    except UnicodeDecodeError:
        raise Refused("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Refused(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise Refused(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Refused("not a JSON object")
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
    """Return how many lists and objects, and items, a row holds; raises Refused where one row may not hold so many."""
    try:
        return check_nesting(raw, LIMITS)
    except Problem as problem:
        raise Refused(str(problem.detail)) from None


def _line(number: int, raw: bytes) -> tuple[Line, tuple[int, int]]:
    """Return a line, and what it counts against the limits of the file; one over them is not parsed, and counts not."""
    counts = (0, 0)
    try:
        counts = _counted(raw)
        row = parse_row(raw)
        if (turns := turns_in(row)) <= LIMITS.values:
            counts = counts[0] + turns, counts[1]
        return Line(number, pair_of(row, f"line {number}"), None, tuple(row.keys() - READ)), counts
    except Refused as reason:
        return Line(number, None, str(reason)), counts


def _id(row: dict[str, Any], default: str) -> str:
    found = next((row[name] for name in ("id", "pair_id") if isinstance(row.get(name), str | int)), default)
    text = str(found)
    if len(text) > MAX_ID_CHARS:
        raise Refused(f"id of {len(text):,} characters, at most {MAX_ID_CHARS} are allowed")
    return text


def _number(text: str) -> float:
    """A number; one too large for it would go out as an infinity, which is no JSON."""
    return number if math.isfinite(number := float(text)) else _no_number(text)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
