"""The work of one operator of a pipeline on a row: a fragment in, a fragment out, as Arrow IPC bytes."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray.distributed.metrics import count_fragment
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline.runner import MapFragment, Mapped, Prepared, ReadFragment, commit
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.work import MapJob, Work

Row = dict[str, Any]
COUNTED = ("read", "tokens", "seconds", "restarts")  # of a fragment, on its way


def to_bytes(tables: Sequence[pa.Table]) -> bytes:
    """Tables of one schema as an IPC stream, one record batch each."""
    # As bytes in one cell: Ray Data would take the tables apart into rows, and their schemas into its own.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks())  # nothing for a table without rows
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> list[pa.Table]:
    with pa.ipc.open_stream(data) as stream:
        return [pa.Table.from_batches([batch]) for batch in stream] or [stream.schema.empty_table()]


def fragment_row(work: int, fragment: Fragment) -> Row:
    """The row that a pipeline begins with: the number of the work, and a fragment of it."""
    return {"work": work, "fragment": json.dumps(vars(fragment))}


def next_row(row: Row, **facts: Any) -> Row:
    """The row for the next operator, of the same fragment."""
    return {"work": row["work"], "fragment": row["fragment"], "error": "", **facts}


def fragment_of(row: Row) -> Fragment:
    return Fragment(**json.loads(row["fragment"]))


def _failed(row: Row, error: SaferError) -> Row:
    """An error that is explained travels as a row: Ray would wrap it in its own and try again."""
    # By kind and text: a pickled exception would need its class on the driver, and Ray wraps it past recognition.
    kind = "user" if isinstance(error, UserError) else "safer"
    return next_row(row, error=json.dumps([kind, str(error)]))


def raise_explained(error: str) -> None:
    kind, message = json.loads(error)
    raise (UserError if kind == "user" else SaferError)(message)


def _prepared_row(row: Row, prepared: Prepared) -> Row:
    pieces = to_bytes(prepared.pieces) if prepared.pieces else b""
    facts = {name: getattr(prepared, name) for name in COUNTED}
    return next_row(row, **facts, rows=pieces, refused=to_bytes([prepared.refused]))


def _prepared(row: Row) -> Prepared:
    pieces = from_bytes(row["rows"]) if row["rows"] else []
    refused = pa.concat_tables(from_bytes(row["refused"]))
    return Prepared(fragment_of(row), pieces=pieces, refused=refused, **{name: row[name] for name in COUNTED})


def _mapped_row(row: Row, mapped: Mapped) -> Row:
    facts = {name: getattr(mapped, name) for name in COUNTED}
    return next_row(row, **facts, rows=to_bytes([mapped.rows]), refused=to_bytes([mapped.refused]))


def _mapped(row: Row) -> Mapped:
    rows, refused = (pa.concat_tables(from_bytes(row[name])) for name in ("rows", "refused"))
    return Mapped(fragment_of(row), rows=rows, refused=refused, **{name: row[name] for name in COUNTED})


class Step(ABC):
    """One operator: built in its process at the first row, and anew at the first of another work, whose model takes the
    place of the one before; passes on the errors of the operators before it."""

    def __init__(self, works: Sequence[Work], run: str) -> None:
        self.works, self.run = works, run
        self.number = 0  # of the work that it is built for
        self.built: Any = None

    @property
    def job(self) -> MapJob:
        return self.works[self.number].job

    @property
    def directory(self) -> Path:
        return self.works[self.number].directory

    def build(self) -> Any:
        return None

    @abstractmethod
    def work(self, row: Row) -> Row:
        """The row for the next operator."""

    def __call__(self, row: Row) -> Row:
        if row.get("error"):
            return row
        # Dropped before the next is built, so that two models are never held at once.
        if row["work"] != self.number:
            self.number, self.built = row["work"], None
        try:
            if self.built is None:
                self.built = self.build()
            return self.work(row)
        except SaferError as error:
            return _failed(row, error)


class Read(Step):
    def build(self) -> ReadFragment:
        return ReadFragment(self.job, self.directory)

    def work(self, row: Row) -> Row:
        return _prepared_row(row, self.built(fragment_of(row)))


class Map(Step):
    def __init__(self, works: Sequence[Work], run: str, threads: int) -> None:
        super().__init__(works, run)
        self.threads = threads

    def build(self) -> Any:
        built = self.build_function()
        if torch := sys.modules.get("torch"):  # a function that works with it has loaded it; to others it is seconds
            torch.set_num_threads(self.threads)
        return built

    def build_function(self) -> Any:
        return MapFragment(self.job, self.directory)

    def work(self, row: Row) -> Row:
        return _mapped_row(row, self.built(_prepared(row)))


class Commit(Step):
    def work(self, row: Row) -> Row:
        return self.close(row, _mapped(row))

    def close(self, row: Row, mapped: Mapped) -> Row:
        done = commit(self.job, self.directory, mapped)
        count_fragment(self.job.stage, self.run, done)
        return next_row(row, committed=True, read=done["read"])


class Whole(Commit):
    """All three steps at once, for jobs without a model."""

    def build(self) -> Callable[[Fragment], Mapped]:
        read, work = ReadFragment(self.job, self.directory), MapFragment(self.job, self.directory)
        return lambda fragment: work(read(fragment))

    def work(self, row: Row) -> Row:
        return self.close(row, self.built(fragment_of(row)))
