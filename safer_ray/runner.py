"""Mapping a batch function over fragments, with commit, resume and quarantine; training loops on workers.

A *batch function* is a class with `__init__` (load) and `__call__(table) -> table`. Rows that it refuses carry the
reason in a `refused` column (and what it knows of `position` and `raw`); the runner moves them to the quarantine.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safer_ray.artifacts import Fragment, part_name, read_parquet, save_plan, write_json, write_parquet
from safer_ray.errors import SaferError, UserError
from safer_ray.schema import QUARANTINE, RAW_LIMIT, to_json

BatchFn = Callable[[pa.Table], pa.Table]
TRIES = 2  # of a row range before it is halved, and of a single row before it is quarantined


@dataclass(frozen=True)
class MapJob:
    """A batch function over fragments, into a directory of parts.

    `make` builds the batch function once a process; `read` gives a fragment's input rows; `schema` is that of the rows
    written, `folder` where they go below the artifact's directory.
    """

    stage: str
    read: Callable[[Fragment], pa.Table]
    make: Callable[[], BatchFn]
    schema: pa.Schema
    folder: str = "."
    batch_rows: int = 512
    metadata: dict[str, str] | None = None  # of the Parquet files


class Runner(Protocol):
    """Where stages run: in this process, or on a cluster."""

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> "Counts": ...

    def train(self, loop: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Counts:
    """Accounts of a mapped stage; input rows = written + quarantined + left out by the source's `part`."""

    read: int
    written: int
    quarantined: int
    reasons: dict[str, int]


def _refuse(rows: pa.Table, stage: str) -> pa.Table:
    """Refused rows in the QUARANTINE schema."""
    refused = []
    for row in rows.to_pylist():
        raw = row.get("raw") or to_json({k: v for k, v in row.items() if k not in ("refused", "raw") and v is not None})
        source, _, position = (row.get("row_key") or "").rpartition("#")
        refused.append(
            {
                "row_key": row.get("row_key"),
                "pair_id": row.get("pair_id"),
                "source": row.get("source") or source,
                "position": row.get("position") if row.get("position") is not None else _number(position),
                "stage": stage,
                "reason": row["refused"],
                "raw": raw[:RAW_LIMIT],
            }
        )
    return pa.Table.from_pylist(refused, schema=QUARANTINE)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _is_about_a_row(error: Exception) -> bool:
    """Whether halving can help: not when the user, the disk or the memory is the trouble."""
    return not isinstance(error, SaferError | OSError | MemoryError)


class FragmentWork:
    """One fragment through one batch function, and its commit. The same for every runner."""

    def __init__(self, job: MapJob, directory: Path) -> None:
        self.job = job
        self.directory = directory
        self.function = job.make()

    def run(self, fragment: Fragment) -> None:
        """Map the fragment and commit its part, its quarantine and its `done` entry, in that order."""
        rows = self.job.read(fragment)
        good, refused = [], []
        for start in range(0, len(rows), self.job.batch_rows):
            for output in self._attempt(fragment, rows.slice(start, self.job.batch_rows), start):
                if "refused" not in output.column_names:
                    good.append(output)
                    continue
                bad = pc.is_valid(output["refused"])
                refused.append(_refuse(output.filter(bad), self.job.stage))
                good.append(output.filter(pc.invert(bad)))
        table = pa.concat_tables(
            [t.select(self.job.schema.names).cast(self.job.schema) for t in good] or [self._empty()]
        )
        if self.job.metadata:
            table = table.replace_schema_metadata(self.job.metadata)
        write_parquet(table, self.directory / self.job.folder / part_name(fragment.number))
        quarantined = pa.concat_tables(refused) if refused else pa.table({n: [] for n in QUARANTINE.names}, QUARANTINE)
        if len(quarantined):
            write_parquet(quarantined, self.directory / "quarantine" / part_name(fragment.number))
        done = {
            "read": len(rows),
            "written": len(table),
            "quarantined": len(quarantined),
            "reasons": dict(Counter(reason.split(":")[0] for reason in quarantined["reason"].to_pylist())),
        }
        write_json(done, self.directory / "done" / f"{fragment.number:08}.json")

    def _empty(self) -> pa.Table:
        return self.job.schema.empty_table()

    def _attempt(self, fragment: Fragment, rows: pa.Table, start: int) -> Iterator[pa.Table]:
        """The rows through the function; a range that fails twice is halved, a single row that does is refused."""
        if len(rows) == 0:
            return
        key = f"{fragment.number:08}-{start}-{len(rows)}"
        journal = self.directory / "journal" / f"{key}.json"
        failures = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else []
        while len(failures) < TRIES:
            write_json([*failures, "the process ended while it worked on these rows"], journal)
            try:
                output = self.function(rows)
            except Exception as error:
                if not _is_about_a_row(error):
                    journal.unlink(missing_ok=True)
                    raise
                failures.append(f"{type(error).__name__}: {error}")
                write_json(failures, journal)
                continue
            journal.unlink(missing_ok=True)
            yield output
            return
        if len(rows) == 1:
            yield self._refused_row(rows, f"failed twice: {failures[-1]}")
            return
        half = len(rows) // 2
        yield from self._attempt(fragment, rows.slice(0, half), start)
        yield from self._attempt(fragment, rows.slice(half), start + half)

    def _refused_row(self, row: pa.Table, reason: str) -> pa.Table:
        columns = {name: pa.nulls(1, self.job.schema.field(name).type) for name in self.job.schema.names}
        for name in ("row_key", "pair_id", "source", "raw", "position"):
            if name in row.column_names:
                columns[name] = row[name].combine_chunks()
        return pa.table({**columns, "refused": pa.array([reason])})


def pending(fragments: Sequence[Fragment], directory: Path) -> list[Fragment]:
    """Plan minus done."""
    return [f for f in fragments if not (directory / "done" / f"{f.number:08}.json").exists()]


def count(directory: Path) -> Counts:
    """Sum of the `done` entries."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for path in sorted((directory / "done").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        totals.update({name: entry[name] for name in ("read", "written", "quarantined")})
        reasons.update(entry["reasons"])
    return Counts(totals["read"], totals["written"], totals["quarantined"], dict(reasons))


def quarantine_rows(directory: Path) -> pa.Table:
    """The quarantine of a stage, in fragment order; empty where nothing was refused."""
    tables = [read_parquet(path) for path in sorted((directory / "quarantine").glob("*.parquet"))]
    return pa.concat_tables([QUARANTINE.empty_table(), *tables])


def progress(description: str, quiet: bool) -> Progress:
    """A progress bar that appears on a terminal only."""
    columns = (TextColumn(f"{description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True)
    bar.disable = quiet or not bar.console.is_terminal
    return bar


@dataclass(frozen=True)
class LocalRunner:
    """Everything in this process, one fragment after another."""

    quiet: bool = True

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> Counts:
        """Map every fragment that is not done yet; accounts over all of them."""
        if not fragments:
            raise UserError(f"stage {job.stage}: no input rows; check the sources and filters")
        planned = save_plan(list(fragments), directory)
        todo = pending(planned, directory)
        if todo:
            work = FragmentWork(job, directory)
            with progress(job.stage, self.quiet) as bar:
                task = bar.add_task(job.stage, total=len(planned), completed=len(planned) - len(todo))
                for fragment in todo:
                    work.run(fragment)
                    bar.advance(task)
        return count(directory)

    def train(self, loop: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a training loop in this process; what it returns is the stage's metrics."""
        began = time.time()
        metrics = loop(**arguments)
        return {**metrics, "train_seconds": round(time.time() - began, 3)}
