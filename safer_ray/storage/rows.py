"""Rows of one file of any kind as JSON text, a range at a time; and the ranges that a file is cut into."""

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray import schema
from safer_ray.errors import UserError
from safer_ray.schema import RAW_LIMIT
from safer_ray.storage.columnar import UTF8, RawRow, checked, columnar_rows, extent, source_of
from safer_ray.storage.csv_rows import CsvRows
from safer_ray.storage.heads import HEAD, Recoded, check_head, encoding_of, explain_head
from safer_ray.storage.json_values import JsonValues, layout_of
from safer_ray.storage.reader_cache import OpenReader, cached_reader
from safer_ray.storage.remote import BUFFER, Remote
from safer_ray.storage.unpacked import Unpacked

MAX_ROW = 32 * 2**20  # bytes; a longer line is refused unread
MAX_SKIPPED = 2**30  # bytes of such a line, behind which nothing of its file is read
ENDINGS = ".jsonl, .json, .csv (these also .gz or .zst), .parquet, .arrow"

_KINDS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
_BETWEEN_ROWS = re.compile(rb"\}[ \t]{0,9}\r[ \t]{0,9}\{")  # stands in no line of JSON
_BARE_RETURN = re.compile(rb"\r[^\r\n]")
_UNPACKING = re.compile(r"\b(zlib|ZSTD|compressed)\b")  # what failed, where an object cannot be unpacked


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """Kind and compression by the name; the kind is None where the name says nothing known."""
    *_, before, last = ["", "", *path.name.lower().split(".")]
    compression = _COMPRESSIONS.get(last)
    kind = _KINDS.get(before if compression else last)
    return (None, None) if compression and kind in ("parquet", "arrow") else (kind, compression)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Damage of a whole file as one line, and what an object store does not give."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(path, Remote) and isinstance(error, OSError) and not _UNPACKING.search(str(error)):
            _explain_object(path, error)
        _explain_head(path)
        cause = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read {path}: {cause}; the file is damaged or incomplete, write it again") from error


def _explain_object(path: Remote, error: OSError) -> None:
    """Raises UserError where an object is not there, SaferError where it cannot be had."""
    if isinstance(error, FileNotFoundError):
        raise UserError(f"{path} is gone; put it back, then run the same command again") from error
    with path.explained("read"):
        raise error


def _explain_head(path: Path) -> None:
    """Raises UserError where a file that cannot be read as its name says is something else."""
    kind, compression = kind_of(path)
    wanted = compression or (kind if kind in ("parquet", "arrow") else None)
    head = None
    with contextlib.suppress(OSError):
        head = _head(path)
    if wanted and head is not None:
        explain_head(head, path, wanted)


def _head(path: Path) -> bytes:
    """The first bytes of a file as they lie there."""
    with path.open("rb") as stream:
        return bytes(stream.read(HEAD))


def _open(path: Path, encoding: str | None, offset: int = 0) -> io.BufferedReader:
    """Open what a file holds, unpacked and in UTF-8, from byte `offset` on.

    Raises:
        UserError: it holds no text.
    """
    kind, compression = kind_of(path)
    source: Any = Unpacked(path, compression) if compression else source_of(path)
    in_store = isinstance(path, Remote) and not compression
    opened = io.BufferedReader(pa.OSFile(str(source)) if source is path else source, BUFFER if in_store else 2**20)
    if encoding or not offset:
        head = opened.peek(HEAD)[:HEAD]
        check_head(head, path, rows=kind is not None)
        encoding = None if head.startswith(codecs.BOM_UTF8) else encoding_of(head) or encoding
    if offset:
        opened.seek(offset)
    return io.BufferedReader(Recoded(opened, encoding), 2**20) if encoding else opened


def _encoding(stream: Any) -> str:
    """The encoding that a stream of `_open` was read from."""
    return getattr(stream.raw, "encoding", UTF8)


def _skip_lines(stream: io.BufferedReader, count: int) -> None:
    while count and (block := stream.peek()):
        lines = block.count(b"\n")
        if lines < count:
            stream.read(len(block))
            count -= lines
        else:
            for _ in range(count):
                stream.readline()
            return


class _Array:
    """The rows of a file that is JSON over several lines: arrays, or objects."""

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self.encoding = _encoding(stream)
        self.text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
        self.rows = JsonValues(self.text, path, MAX_ROW).rows()
        self.close = self.text.close


def _begin_json(path: Path, offset: int, encoding: str | None) -> io.BufferedReader | _Array:
    stream = _open(path, encoding, offset)
    if not offset:
        head = stream.peek()
        _check_lines(head, path)
        is_array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        if kind_of(path)[0] == "json" and (is_array or layout_of(head)):
            return _Array(stream, path)
    return stream


def _check_lines(head: bytes, path: Path) -> None:
    """Raises UserError where a file whose name says that it holds a row a line begins otherwise."""
    if kind_of(path)[0] == "jsonl" and (found := layout_of(head)):
        raise UserError(f"{path} is {found}, and not a row a line; give it a name that ends in .json")


def _json_rows(path: Path, start: int, stop: int, offset: int, encoding: str | None) -> Iterator[RawRow]:
    offset = offset if _is_named_lines(path) else 0
    begin = partial(_begin_json, offset=offset, encoding=encoding)
    with cached_reader(path, start, stop, begin, start if offset else 0, encoding) as at:
        if isinstance(at.reader, _Array):
            yield from _array_rows(at, at.reader, start, stop)
            return
        _skip_lines(at.reader, start - at.position)
        at.position = start
        yield from _lines(at, at.reader, path.name, stop)


def _array_rows(at: OpenReader[Any], array: _Array, start: int, stop: int) -> Iterator[RawRow]:
    while at.position < stop and (text := next(array.rows, None)) is not None:
        if at.position >= start:
            yield at.position, *checked(text, array.encoding)
        at.position += 1


def _refuse_bare_returns(line: bytes, name: str) -> None:
    """Raises UserError where what was read as the one line of a file is several, of which each ends with a CR alone."""
    plain = kind_of(Path(name))[0] is None
    if not line.endswith(b"\n") and (_BARE_RETURN if plain else _BETWEEN_ROWS).search(line[: 2**20]):
        raise UserError(
            f"{name}: its lines end with a CR alone; write them with LF, say by tr '\\r' '\\n' < FILE > OTHER"
        )


def _lines(at: OpenReader[Any], stream: io.BufferedReader, name: str, stop: int) -> Iterator[RawRow]:
    encoding = _encoding(stream)
    while at.position < stop and (line := stream.readline(MAX_ROW + 1)):
        if at.position == 0:
            _refuse_bare_returns(line, name)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_ROW and not line.endswith(b"\n"):
            length, line = len(line), line[:RAW_LIMIT]
            while length <= MAX_SKIPPED and (rest := stream.readline(2**20)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            told = f"too long: {length} bytes, limit {MAX_ROW}"
            if length > MAX_SKIPPED:  # what a small file may unpack to
                yield at.position, line.decode(errors="replace"), f"{told}; the rest of {name} is left unread"
                return
            yield at.position, line.decode(errors="replace"), told
        elif line.strip():
            yield at.position, *checked(line.decode(errors="surrogateescape").rstrip("\r\n"), encoding)
        at.position += 1


class _Csv:
    """The rows of a CSV file behind its header."""

    def __init__(self, path: Path, encoding: str | None) -> None:
        csv.field_size_limit(MAX_ROW)
        stream = _open(path, encoding)
        self.encoding = _encoding(stream)
        self.text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        rows = CsvRows(self.text, path)
        self.header, self.rows = rows.header, iter(rows)
        self.close = self.text.close


def _csv_rows(path: Path, start: int, stop: int, encoding: str | None) -> Iterator[RawRow]:
    with cached_reader(path, start, stop, partial(_Csv, encoding=encoding), variant=encoding) as at:
        header = at.reader.header
        while at.position < stop and (record := next(at.reader.rows, None)) is not None:
            cells, text, refused = record
            if at.position >= start and (cells or refused):
                whole = schema.to_json(dict(zip(header, cells, strict=False))) if cells else text[:RAW_LIMIT]
                raw, bad = checked(whole, at.reader.encoding)
                yield at.position, raw, bad or refused
            at.position += 1


def read_rows(path: Path, start: int, stop: int, offset: int = 0, encoding: str | None = None) -> Iterator[RawRow]:
    """The rows of a file with start <= position < stop, the first at byte `offset` where it is known; blank ones count
    but do not come. Text in `encoding`, where its first bytes do not tell another.

    Raises:
        UserError: the file is damaged, or something else than its name says.
    """
    kind = kind_of(path)[0]
    with explained(path):
        if kind in ("parquet", "arrow"):
            yield from columnar_rows(path, start, stop, kind)
        elif kind == "csv":
            yield from _csv_rows(path, start, stop, encoding)
        else:
            yield from _json_rows(path, start, stop, offset, encoding)


class Cut(NamedTuple):
    """A range of rows of a file."""

    start: int
    stop: int
    offset: int = 0  # byte of the first, where the file can be entered there
    end: int = 0  # byte behind the last, where it is known


BEGIN = Cut(0, 0)


def _cut_lines(
    stream: IO[bytes],
    rows: int,
    size: int,
    limit: int,
    after: Cut,
    length: int,
    *,
    whole_lines: bool,
    encoding: str | None,
) -> Iterator[Cut]:
    """Lines behind `after`, of the first `length` bytes of a file; of a last line without an end, see `_is_whole`."""
    start, offset, at = after.stop, after.end, after.end
    ends = np.empty(0, dtype=np.int64)  # of the lines from `start` on
    stream.seek(offset)
    while start < limit:
        block = stream.read(min(2**23, length - at))
        ends = np.concatenate([ends, at + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))])
        at += len(block)
        last = not block or at >= length
        begun = int(ends[-1]) if len(ends) else offset
        if last and at > begun and (not whole_lines or _is_whole(stream, begun, at, encoding or "utf-8")):
            ends = np.append(ends, at)
        while len(ends) and start < limit and (last or len(ends) >= rows or ends[-1] - offset > size):
            taken = max(1, min(rows, limit - start, int(np.searchsorted(ends, offset + size, "right"))))
            taken = min(taken, len(ends))
            end = int(ends[taken - 1])
            yield Cut(start, start + taken, offset, end)
            start, offset, ends = start + taken, end, ends[taken:]
        if last:
            return


def _is_whole(stream: IO[bytes], begin: int, end: int, encoding: str) -> bool:
    """Return whether a last line without its newline is written to its end: then it is a JSON object, and a half is
    none."""
    if end - begin > MAX_ROW:
        return False
    stream.seek(begin)
    line = stream.read(end - begin).removeprefix(b"\xef\xbb\xbf" if begin == 0 else b"")
    try:
        return isinstance(json.loads(line.decode(encoding, "replace")), dict)
    except (ValueError, RecursionError):
        return False


def _is_named_lines(path: Path) -> bool:
    return kind_of(path) == ("jsonl", None)


def grows(path: Path) -> bool:
    """Return whether rows can be added to a file without changing what is there, and it can be entered at any of its
    lines: not where it is UTF-16, of which half a character may be there; an object is written anew."""
    if not _is_named_lines(path) or isinstance(path, Remote):
        return False
    try:
        return encoding_of(_head(path)) is None
    except OSError:  # who reads it next tells
        return True


def cut_rows(
    path: Path,
    rows: int,
    size: int,
    limit: int,
    after: Cut = BEGIN,
    length: int | None = None,
    *,
    whole_lines: bool = False,
    encoding: str | None = None,
) -> Iterator[Cut]:
    """Ranges of a file's rows, each of at most `rows` rows and about `size` bytes; of lines, those behind `after` in
    the first `length` bytes, with `whole_lines` but for a last one that is still being written.

    Raises:
        UserError: the file is damaged, or something else than its name says.
    """
    kind = kind_of(path)[0]
    if _is_named_lines(path):
        with explained(path), path.open("rb") as stream:
            head = stream.read(HEAD)
            check_head(head, path)
            if encoding_of(head) is None:
                _check_lines(head, path)
                length = path.stat().st_size if length is None else length
                whole = whole_lines and not isinstance(path, Remote)
                yield from _cut_lines(stream, rows, size, limit, after, length, whole_lines=whole, encoding=encoding)
                return
    if kind in ("parquet", "arrow"):
        with explained(path):
            total, held = extent(path, kind)
        step = max(1, min(rows, size * total // max(held, 1)))
        total = min(total, limit)
        yield from (Cut(start, min(start + step, total)) for start in range(0, total, step))
        return
    start = end = held = 0
    for position, raw, _ in read_rows(path, 0, limit, encoding=encoding):
        if end > start and (position - start >= rows or held + len(raw) > size):
            yield Cut(start, end)
            start, held = position, 0
        held += len(raw)
        end = position + 1
    if end > start:
        yield Cut(start, end)
