"""Rows of Parquet and Arrow files as JSON text, a range at a time.

A reader is kept where a range ended, and the next range goes on there: what is read in order is decoded, and fetched
from an object store, once a process, however many ranges a row group is cut into. No large row group is ever held, but
`READ_AHEAD` bytes of the file at most, the page at hand of each column, and a batch of about `BATCH_BYTES`. Of an Arrow
file that lies in a store or is compressed a record batch is held, since there is no way into the middle of one.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from safer_ray import schema
from safer_ray.errors import UserError
from safer_ray.schema import RAW_LIMIT
from safer_ray.storage.reader_cache import cached_reader
from safer_ray.storage.remote import BUFFER, Remote
from safer_ray.storage.values import plain_rows

BATCH_ROWS, BATCH_BYTES = 500, 32 * 2**20  # decoded at a time
READ_AHEAD = 64 * 2**20  # bytes, of all columns together
SMALLEST = 2**16  # bytes that are read of a column at a time
UTF8 = "UTF-8"
SHARE = 128  # of a row group that is too large to be read at once: what is read of a column at a time

RawRow = tuple[int, str, str | None]  # position, JSON text, reason to refuse


def source_of(path: Path) -> Any:
    """Return what pyarrow reads a file from."""
    return path.native() if isinstance(path, Remote) else path


def checked(text: str, encoding: str = UTF8) -> tuple[str, str | None]:
    """Return a row's text and why it is refused: bytes that were no text have become lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        replaced = text.encode(errors="surrogateescape").decode(errors="replace")
        return replaced[:RAW_LIMIT], f"bad {encoding}: at character {error.start}"
    return text, None


def columnar_rows(path: Path, start: int, stop: int, kind: str) -> Iterator[RawRow]:
    """Yield the rows `start` to `stop` of a file of the kind `parquet` or `arrow`."""
    with cached_reader(path, start, stop, _Parquet if kind == "parquet" else _Arrow) as at:
        at.position = at.reader.enter(at.position, start)
        while at.position < stop and (batch := at.reader.read(stop - at.position)) is not None:
            skipped = max(0, start - at.position)
            yield from _batch_rows(batch.slice(skipped), at.position + skipped, str(path))
            at.position += batch.num_rows


def _batch_rows(batch: pa.RecordBatch, first: int, path: str) -> Iterator[RawRow]:
    check_names(batch.schema.names, path)
    # By hundreds: where one has bad bytes, few others are read once more, one by one.
    for i in range(0, batch.num_rows, 100):
        piece = batch.slice(i, 100)
        try:
            rows = [checked(schema.to_json(row)) for row in plain_rows(piece, path)]
        except (UnicodeDecodeError, RecursionError):
            rows = [_one_row(piece.slice(j, 1), path) for j in range(piece.num_rows)]
        yield from ((first + i + j, *row) for j, row in enumerate(rows))


def check_names(names: Sequence[str], path: str | Path) -> None:
    """Raises UserError where two columns have one name: a row could hold only one of them."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"{path}: {len(names)} columns, and more than one is called {twice[0]!r}; rename them")


def _one_row(row: pa.RecordBatch, path: str) -> tuple[str, str | None]:
    try:
        return checked(schema.to_json(plain_rows(row, path)[0]))
    except UnicodeDecodeError as error:
        text = error.object.decode(errors="replace")
        return text[:RAW_LIMIT], f"bad UTF-8: at byte {error.start}"
    except RecursionError:
        return "", "nested too deep"


class _Tables(ABC):
    """The rows of an open file in their order."""

    source: pa.NativeFile
    rest: pa.RecordBatch | None = None  # of a batch in which a range ended

    def enter(self, position: int, start: int) -> int:
        """Skip what can be skipped between two rows; the row that is read next."""
        return position

    def read(self, rows: int) -> pa.RecordBatch | None:
        """The next rows, so many at most; None behind the last one."""
        batch = self._next(rows) if self.rest is None else self.rest
        if batch is None:
            return None
        self.rest = batch.slice(rows) if batch.num_rows > rows else None
        return batch.slice(0, rows)

    @abstractmethod
    def _next(self, rows: int) -> pa.RecordBatch | None:
        """The next batch; `rows` is how many are asked for."""

    def close(self) -> None:
        self.source.close()


class _Parquet(_Tables):
    """Can be entered at every row group."""

    def __init__(self, path: Path) -> None:
        self.in_store = isinstance(path, Remote)
        self.source = path.native() if isinstance(path, Remote) else pa.OSFile(str(path))
        self.metadata = pq.ParquetFile(self.source).metadata
        groups = range(self.metadata.num_row_groups)
        self.ends = np.cumsum([self.metadata.row_group(i).num_rows for i in groups], dtype=np.int64)
        self.group = self.begun = 0  # the row group to be read next, and its first row
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def enter(self, position: int, start: int) -> int:
        if start < self.begun:
            return position
        # From the right: a row at which a group ends is the first of the next, and groups without rows are stepped
        # over.
        self.group = int(np.searchsorted(self.ends, start, "right"))
        self.begun = int(self.ends[self.group - 1]) if self.group else 0
        self.batches, self.rest = iter(()), None
        return self.begun

    def _next(self, rows: int) -> pa.RecordBatch | None:
        while (batch := next(self.batches, None)) is None:
            if self.group == len(self.ends):
                return None
            self._begin_groups(rows)
        return batch

    def _begin_groups(self, rows: int) -> None:
        """Begin with the row groups that the next rows lie in: at once where nearly all of them is asked for."""
        last = min(int(np.searchsorted(self.ends, self.begun + rows)), len(self.ends) - 1)
        numbers = range(self.group, last + 1)
        groups = [self.metadata.row_group(i) for i in numbers]
        count, decoded = (sum(getattr(group, name) for group in groups) for name in ("num_rows", "total_byte_size"))
        size = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
        at_once = self.in_store and size <= READ_AHEAD and count <= 2 * rows
        columns = max(1, self.metadata.num_columns)
        of_column = min(BUFFER, max(SMALLEST, size // SHARE), max(SMALLEST, READ_AHEAD // columns))
        file = pq.ParquetFile(
            self.source, metadata=self.metadata, pre_buffer=at_once, buffer_size=0 if at_once else of_column
        )
        batch = max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(1, decoded)))
        self.batches = file.iter_batches(batch, row_groups=list(numbers))
        self.group, self.begun = last + 1, int(self.ends[last])

    def close(self) -> None:
        self.batches = iter(())
        super().close()


class _Arrow(_Tables):
    """Is read from its beginning: only its batches say how many rows they have."""

    def __init__(self, path: Path) -> None:
        self.source = _mapped(path)
        self.batches = _arrow_batches(self.source)

    def _next(self, rows: int) -> pa.RecordBatch | None:
        return next(self.batches, None)


def _mapped(path: Path) -> pa.NativeFile:
    return path.native() if isinstance(path, Remote) else pa.memory_map(str(path))


def _arrow_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from pa.ipc.open_stream(source)


def extent(path: Path, kind: str) -> tuple[int, int]:
    """Return how many rows a file has, and how many bytes they take unpacked."""
    if kind == "parquet":
        metadata = pq.read_metadata(source_of(path))
        return metadata.num_rows, sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    with _mapped(path) as source:
        counts = [(batch.num_rows, batch.nbytes) for batch in _arrow_batches(source)]
    return sum(rows for rows, _ in counts), sum(size for _, size in counts)
