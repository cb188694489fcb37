"""The rows of a text that is JSON arrays, or JSON objects that go over several lines, one behind the other.

A file that is no JSON at some place is refused as a whole: what comes behind it could not be told apart, nor counted.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from safer_ray.errors import UserError

BLOCK = 2**20  # characters that are read at a time
SHOWN = 40  # characters of what stands where it should not
_SPACE = re.compile(r"[ \t\n\r]*")
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # a whole string, or what opens or closes a value
_ARRAY_OF_ROWS = re.compile(rb"\[\s*[{\n]")
_OPEN_LINE = re.compile(rb'\{[^\n]*(?:[\[{][ \t\r]*\n|\n\s*["}])')  # no line of rows is followed by a key


def layout_of(head: bytes) -> str | None:
    """Return what the first bytes of a text tell of it where it is not a row a line; None where it may be that."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _ARRAY_OF_ROWS.match(start):
        return "one JSON array"
    return "JSON whose first row goes over several lines" if _OPEN_LINE.match(start) else None


class JsonValues:
    """Rows as they are written; values longer than `limit` characters are none."""

    def __init__(self, text: TextIO, path: Path, limit: int) -> None:
        self.text = text
        self.path = path
        self.limit = limit
        self.count = 0  # rows that were given
        self.buffer, self.at = "", 0
        self.lines = self.line_start = 0  # that end before the buffer, and where in the buffer its first line begins

    def rows(self) -> Iterator[str]:
        """Yield the elements of arrays, and objects that stand in none.

        Raises:
            UserError: something else stands in the text, or it ends too early.
        """
        while mark := self._next_mark():
            if mark == "[":
                self.at += 1
                yield from self._elements()
            elif mark == "{":
                yield self._value()
            else:
                shown = self.buffer[self.at : self.at + SHOWN]
                self._refuse(self.at, f"{shown!r} stands {'behind' if self.count else 'before'} the rows")

    def _elements(self) -> Iterator[str]:
        """Yield what is in an array, up to behind its end; a comma behind the last element is harmless."""
        while self._next_mark() != "]":
            yield self._value()
            if (mark := self._next_mark()) == ",":
                self.at += 1
            elif mark != "]":
                found = f"{self.buffer[self.at : self.at + SHOWN]!r} stands" if mark else "the file ends"
                self._refuse(self.at, f"{found} where a comma or the end of the array should be")
        self.at += 1

    def _value(self) -> str:
        """Return the next value as it is written; one that is nested too deeply to be read, too."""
        block = BLOCK
        while True:
            fault: tuple[int, str] = (self.at, "nested too deep, and not closed")
            end: int | None
            try:
                _, end = _DECODER.raw_decode(self.buffer, self.at)
            except RecursionError:
                end = _end_of_nested(self.buffer, self.at)
            except json.JSONDecodeError as error:
                end, fault = None, (error.pos, f"no JSON: {error.msg}")
            if end is None or end == len(self.buffer):  # a number may go on
                if len(self.buffer) - self.at > self.limit and end is None:
                    self._refuse(fault[0], f"{fault[1]}; or it is longer than {self.limit:,} characters")
                if self._read(block):
                    block *= 2
                    continue
                if end is None:
                    self._refuse(*fault)
            value = self.buffer[self.at : end]
            self.at, self.count = end, self.count + 1
            return value

    def _next_mark(self) -> str:
        """Go over blanks; the character that stands there, an empty text at the end."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it matches the empty text
            if self.at < len(self.buffer) or not self._read(BLOCK):
                return self.buffer[self.at : self.at + 1]

    def _read(self, block: int) -> bool:
        """Return whether there was more to read; what was given is let go."""
        more = self.text.read(block)
        if more:
            lines = self.buffer.count("\n", 0, self.at)
            if lines:
                self.lines += lines
                self.line_start = self.buffer.rindex("\n", 0, self.at) + 1
            self.line_start -= self.at
            self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)

    def _refuse(self, place: int, what: str) -> NoReturn:
        line = self.lines + self.buffer.count("\n", 0, place) + 1
        begin = self.buffer.rfind("\n", 0, place) + 1 or self.line_start
        raise UserError(
            f"{self.path}: row {self.count} (from 0), line {line}, column {place - begin + 1}: {what}; the rows behind "
            "it cannot be told apart: mend it there, or write a row a line (.jsonl), where a bad one is refused alone"
        )


_DECODER = json.JSONDecoder()


def _end_of_nested(text: str, at: int) -> int | None:
    """Return where a list or mapping that begins at `at` ends; None where it does not."""
    depth = 0
    for mark in _MARKS.finditer(text, at):
        if mark[0] in "[{":
            depth += 1
        elif mark[0] in "]}":
            depth -= 1
            if depth == 0:
                return mark.end()
    return None
