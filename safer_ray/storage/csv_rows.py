"""The rows of a CSV text as RFC 4180 has it; what is written otherwise, or swallowed by a stray quote, is refused."""

import csv
import re
from collections.abc import Iterator
from itertools import islice, tee
from pathlib import Path
from typing import TextIO

from safer_ray.errors import UserError
from safer_ray.storage.columnar import check_names

MISSING = frozenset(  # what programs write for an empty cell, and spreadsheets for one that they could not read
    {"nan", "NaN", "None", "NULL", "null", "NA", "<NA>", "\\N", "#N/A", "#NAME?", "#VALUE!", "#REF!"}
)
FEWEST = 2  # whole lines in a cell that look like rows, from which on they are taken for some
_SPACE = "; write no blanks behind commas (pandas reads such a file by skipinitialspace=True)"
_BLANKS = frozenset(" \t")
DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}
_TEXT_COLUMN = re.compile(  # names of columns that hold what is said
    r"((chosen|rejected)[_-])?(prompt|instruction|question|query|messages|conversations?|history|context|input|system"
    r"|system_prompt|system_message|chosen|rejected|response|completion|answer|output)[_-]?([0-9a-z]|one|two)?"
)


Record = tuple[list[str], str, str | None]  # a row's cells, or the text of one that is none, and why it is refused


class CsvRows:
    """The header of a CSV text and the rows behind it.

    Raises:
        UserError: the header is none: its cells are separated by something else, or two of them are the same.
    """

    def __init__(self, text: TextIO, path: Path) -> None:
        lines, self.behind = tee(text)
        self.reader = csv.reader(lines, strict=True)
        self.line = 0  # lines of the rows before the one at hand
        self.lines: list[str] = []  # of that one
        try:
            self.header = next(self.reader, [])
        except csv.Error as error:
            raise UserError(f"{path}: its header is no CSV: {error}; mend it") from None
        _check_header(self.header, path)
        self.names = frozenset(self.header)
        self.spoken = {i for i, name in enumerate(self.header) if _TEXT_COLUMN.fullmatch(name)}

    def __iter__(self) -> Iterator[Record]:
        """Yield the rows, blank ones without cells; of a refused one that goes over several lines each line, since
        nobody knows how many rows they were."""
        self._take_lines()
        while True:
            cells: list[str] = []
            fault = None
            try:
                cells = next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = str(error)
            self._take_lines()
            if fault is not None:
                yield from self._refused(f"not CSV: {fault}{_remedy(self.lines)}")
            elif len(self.lines) > 1 and (why := self._swallowed(cells)):
                yield from self._refused(why)
            else:
                yield cells, "", self._fault(cells)

    def _take_lines(self) -> None:
        before, self.line = self.line, self.reader.line_num
        self.first = before + 1
        self.lines = list(islice(self.behind, self.line - before))

    def _refused(self, why: str) -> Iterator[Record]:
        if len(self.lines) > 1:
            why += f" (a quote opens in line {self.first:,}, and what it holds goes on to line {self.line:,})"
        for line in self.lines:
            yield [], line.rstrip("\r\n"), why

    def _swallowed(self, cells: list[str]) -> str | None:
        """Return why a row over several lines is taken for several rows between two stray quotes."""
        if len(cells) != len(self.header):
            return f"stray quote: the row is {len(cells)} cells, wanted {len(self.header)} as in the header"
        if len(cells) > FEWEST and all(_has_cells(line, len(cells)) for line in self.lines):
            return f"stray quote: each of its {len(self.lines):,} lines has {len(cells)} cells, as rows have"
        for cell in cells:
            begin = cell.find("\n") + 1
            end = cell.find("\n", begin)
            if 0 < begin < end and cell.count(",", begin, end) >= len(cells) - 1 > 0:
                inside = cell.splitlines()[1:-1]  # whole lines, if it is several rows
                if len(inside) >= FEWEST and all(len(row) == len(cells) for row in csv.reader(inside)):
                    return f"stray quote: a cell holds {len(inside):,} lines of {len(cells)} cells each, as rows are"
        return None

    def _fault(self, cells: list[str]) -> str | None:
        """Return why a row of one line, or of proper cells, is refused."""
        if cells and _plain(cells[0]) in self.names and {_plain(cell) for cell in cells} == self.names:
            return "header again: the row holds the names of the columns, as where files are joined; delete it"
        if cells and len(cells) != len(self.header):
            short = "; write its empty cells, too" if len(cells) < len(self.header) else _remedy(self.lines)
            return f"wrong type: the row is {len(cells)} cells, wanted {len(self.header)} as in the header{short}"
        for cell in cells:
            if cell[:1] in _BLANKS and cell.lstrip(" \t")[:1] == '"' and f",{cell}" in "".join(self.lines):
                return f"not CSV: a space before a quote{_SPACE}"
        if not MISSING.isdisjoint(cells):
            for i in self.spoken:
                if i < len(cells) and cells[i] in MISSING:
                    return f"empty text: {self.header[i]}, written as {cells[i]!r}"
        return None


def _has_cells(line: str, count: int) -> bool:
    """Return whether a line is as many cells if its quotes are no more than characters, and its commas no prose."""
    return line.count(",") == count - 1 and ", " not in line


def _plain(cell: str) -> str:
    """Return a cell without the mark and the quotes that the first one of a file may have."""
    return cell.removeprefix("\ufeff").strip('"')


def _remedy(lines: list[str]) -> str:
    """Return what to do about a row that was written in another dialect, as far as it can be seen."""
    line = "".join(lines)
    if '\\"' in line:
        return '; write a quote in a cell twice ("") and not behind a backslash'
    return _SPACE if re.search(r',[ \t]+"', line) else '; a cell in quotes has each quote in it written twice ("")'


def _check_header(header: list[str], path: Path) -> None:
    if header and header[0].lower().startswith("sep=") and len(header) <= 2:
        raise UserError(f"{path}: its first line, {','.join(header)!r}, is no header; delete it")
    if len(header) == 1:
        for mark, name in DELIMITERS.items():
            if mark in header[0]:
                raise UserError(
                    f"{path}: its cells are separated by {name}, wanted commas; write it anew, say by "
                    f"pandas.read_csv(FILE, sep={mark!r}).to_csv(OTHER, index=False)"
                )
    check_names(header, path)
