"""Jobs that runners are given: a batch function over fragments, or a training loop.

A *batch function* is a class with `__init__` (load) and `__call__(table) -> table`. Rows that it refuses carry the
reason in a `refused` column (and what it knows of `position` and `raw`); the runner moves them to the quarantine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from safer_ray.storage.artifacts import Fragment

BatchFn = Callable[[pa.Table], pa.Table]


class Part(NamedTuple):
    """One of several batch functions that rows go through in turn; each holds a range of a model's blocks."""

    number: int = 0
    of: int = 1

    @property
    def last(self) -> bool:
        return self.number == self.of - 1

    def blocks(self, count: int) -> tuple[int, int]:
        """Its range (start, stop) of so many blocks; lengths differ by one at most."""
        return count * self.number // self.of, count * (self.number + 1) // self.of


WHOLE = Part()


@dataclass(frozen=True)
class MapJob:
    """A batch function over fragments, into a directory of parts.

    `make` builds the batch function once a process; `read` gives a fragment's input rows, `prepare` the function that
    makes them ready (tokenised) without the model, on a cluster in processes apart; `schema` is that of the rows
    written, `folder` where they go below the artifact's directory. A job that `loads_model` gets actors that live as
    long as the stage, others run as tasks. One of several `shards` is made in as many parts, `make(part=…)`, and rows
    go from each to the next, `piece_tokens` at a time on a cluster. A job that writes more than a part of each fragment
    has `write(rows, directory, name)`, which gives facts for the fragment's `done` entry; one that writes one part may
    have `facts(rows)`, and columns `unwritten` that these alone read.
    """

    stage: str
    read: Callable[[Fragment], pa.Table]
    make: Callable[..., BatchFn]
    schema: pa.Schema
    prepare: Callable[[], BatchFn] | None = None
    loads_model: bool = False
    folder: str = "."
    batch_rows: int = 512
    shards: int = 1
    piece_tokens: int = 16_384  # of both sides
    metadata: dict[str, str] | None = None  # of the Parquet files
    group_rows: int | None = None  # of a row group in them, where it matters
    write: Callable[[pa.Table, Path, str], dict[str, Any]] | None = None  # instead of one part in `folder`
    facts: Callable[[pa.Table], dict[str, Any]] | None = None
    unwritten: tuple[str, ...] = ()

    def parts(self, directory: Path) -> Path | None:
        """Return where every fragment has a part; None where it may have several, or none."""
        return directory / self.folder if self.write is None else None

    def as_written(self, rows: pa.Table) -> pa.Table:
        """Rows in the schema that they are written in."""
        return rows.select(self.schema.names).cast(self.schema)


@dataclass(frozen=True)
class TrainJob:
    """A training loop, `loop(out=…, workers=…, **arguments)`, that writes to `out` and returns its metrics."""

    stage: str
    loop: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    out: Path


class Work(NamedTuple):
    """A job over fragments, into a directory."""

    job: MapJob
    fragments: Sequence[Fragment]
    directory: Path
