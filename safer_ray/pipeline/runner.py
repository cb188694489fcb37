"""Mapping a batch function over fragments, with commit, resume and quarantine; training loops on workers.

A fragment goes through three steps: `ReadFragment` (and tokenise), `MapFragment` (the model), `commit`. `LocalRunner`
calls them one after another; on Ray they are the operators of a Ray Data pipeline.
"""

import errno
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline import alone
from safer_ray.reward.precision import has_gpu
from safer_ray.reward.tokens import token_count
from safer_ray.schema import QUARANTINE
from safer_ray.storage.accounts import (
    DONE,
    Counts,
    close,
    close_training,
    entry,
    entry_name,
    forget_torn,
    pending,
    rows_of,
    trained_already,
)
from safer_ray.storage.artifacts import Fragment, part_name, save_plan
from safer_ray.storage.files import remove, write_json, write_parquet
from safer_ray.storage.quarantine import KNOWN, refused_rows
from safer_ray.storage.work import BatchFn, MapJob, Part, TrainJob, Work

OnProgress = Callable[[str, int, int, int], None]  # stage, done, total, rows in what was done last
ENDED = "the process ended while it worked on these rows"
TRIES = 2  # of a row range before it is halved, and of a single row before it is quarantined
LOST_TRIES = 8  # processes that may be lost at a single row that does no harm to a watched one, or cannot be watched


class Runner(Protocol):
    """Runs stages: in this process, or on a cluster."""

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> Counts:
        """Map every fragment that is not done yet; accounts over all of them.

        Raises:
            SaferError: fragments are left that are not done, or entries of no planned fragment are there.
        """

    def map_all(self, works: Sequence[Work]) -> list[Counts]:
        """As `map`, of several jobs of one stage, in the same processes, which hold one job's model at a time."""

    def on_gpu(self) -> bool:
        """Return whether models run on GPUs."""

    def train(self, jobs: Sequence[TrainJob]) -> list[dict[str, Any]]:
        """Run training loops one after another on the same workers; the metrics of each."""


class Prepared(NamedTuple):
    """A fragment ready for the model: pieces of at most `batch_rows` rows, and what was refused on the way."""

    fragment: Fragment
    read: int
    pieces: list[pa.Table]
    refused: pa.Table
    tokens: int
    seconds: float
    restarts: int = 0


class Mapped(NamedTuple):
    """A fragment's results, to be committed."""

    fragment: Fragment
    read: int
    rows: pa.Table
    refused: pa.Table
    tokens: int
    seconds: float
    restarts: int = 0  # row ranges that were begun again, since a process ended at them


def _is_about_a_row(error: Exception) -> bool:
    """Return whether halving can help: not when the user or the disk is the trouble. Fewer rows take less memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return not isinstance(error, SaferError)


class Attempts:
    """A batch function that survives rows it fails on: a range that fails twice is halved, a row that does is refused.

    Every attempt is written down first, so that a range which ends its process is found as well, by the process that
    takes its place. Nobody knows then what ended it: the row, want of memory elsewhere, a lost node, a kill. So a row
    that two processes were lost at is tried alone, in a child that is watched (`alone.py`), and refused only if
    it ends that by itself: by a crash, or by memory that it takes again and again. Ctrl-C and SIGTERM do not count. On
    a GPU, where no child can be made, a row is refused that `LOST_TRIES` processes were lost at.
    """

    def __init__(self, job: MapJob, directory: Path, function: BatchFn, step: str) -> None:
        self.job = job
        self.function = function
        self.journal = directory / "journal" / step
        self.restarts = 0  # ranges found that ended a process before

    def __call__(self, fragment: Fragment, rows: pa.Table, start: int) -> tuple[list[pa.Table], pa.Table]:
        """Return what became of the rows, and those refused, in the QUARANTINE schema; `start` names the range."""
        good, refused = [], [QUARANTINE.empty_table()]
        for output in self._outputs(fragment, rows, start):
            if "refused" not in output.column_names:
                good.append(output)
                continue
            bad = pc.is_valid(output["refused"])
            refused.append(refused_rows(output.filter(bad), self.job.stage))
            good.append(output.filter(pc.invert(bad)).drop_columns(["refused"]))
        return [table for table in good if len(table)], pa.concat_tables(refused)

    def _outputs(self, fragment: Fragment, rows: pa.Table, start: int) -> Iterator[pa.Table]:
        if len(rows) == 0:
            return
        journal = self.journal / f"{fragment.number:08}-{start}-{len(rows)}.json"
        failures = _attempted(journal)
        self.restarts += _lost(failures[-1:])
        while (reason := self._given_up(rows, failures, journal)) is None:
            # Written before the work: who takes this process's place finds what it was at when it ended.
            here = f"{ENDED} (process {os.getpid()} on {socket.gethostname()})"
            write_json([*failures, here], journal, durable=False)
            try:
                output = self.function(rows)
            except Exception as error:
                if not _is_about_a_row(error):
                    journal.unlink(missing_ok=True)
                    raise
                failures.append(f"{type(error).__name__}: {error}")
                write_json(failures, journal, durable=False)
                continue
            except BaseException:  # Ctrl-C or SIGTERM, of which no row is to blame
                if failures:
                    write_json(failures, journal, durable=False)
                else:
                    journal.unlink(missing_ok=True)
                raise
            journal.unlink(missing_ok=True)
            yield output
            return
        if len(rows) == 1:
            known = rows.select([name for name in KNOWN if name in rows.column_names])
            yield known.append_column("refused", pa.array([f"failed twice: {reason}"]))
            return
        half = len(rows) // 2
        yield from self._outputs(fragment, rows.slice(0, half), start)
        yield from self._outputs(fragment, rows.slice(half), start + half)

    def _given_up(self, rows: pa.Table, failures: list[str], journal: Path) -> str | None:
        """Return why a range is not tried again as it is; None where it is.

        Raises:
            SaferError: processes are lost at a row again and again that does nothing to them.
        """
        lost = _lost(failures)
        if len(failures) < TRIES:
            return None
        if len(rows) > 1 or len(failures) - lost >= TRIES:
            return failures[-1]
        name = f"row {rows['row_key'][0]}" if "row_key" in rows.column_names else "a row"
        if not alone.is_possible():
            return f"{ENDED}, {lost} times" if lost >= LOST_TRIES else None
        how = alone.how_it_ends(lambda: self.function(rows), name)
        if how is not None:
            return f"{ENDED}: {how}"
        if lost >= LOST_TRIES:
            journal.unlink(missing_ok=True)
            raise SaferError(
                f"{lost} processes were lost while they worked on {name}, which does no harm to one that is watched; "
                "see what ends them (memory, the kernel's log, lost nodes), then run the same command again"
            )
        return None


def _lost(failures: Sequence[str]) -> int:
    """Return how many attempts ended with their process."""
    return sum(failure.startswith(ENDED) for failure in failures)


def _attempted(journal: Path) -> list[str]:
    """Return how earlier attempts at a range of rows failed."""
    try:
        return list(json.loads(journal.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # torn by a power cut, of which no row is to blame
        return []


class ReadFragment:
    """Reads a fragment and makes its rows ready; needs no model."""

    def __init__(self, job: MapJob, directory: Path) -> None:
        self.job = job
        self.prepare = Attempts(job, directory, job.prepare(), "read") if job.prepare else None

    def __call__(self, fragment: Fragment) -> Prepared:
        began = time.monotonic()
        if self.prepare:
            self.prepare.restarts = 0
        rows = self.job.read(fragment)
        pieces, refused = [], [QUARANTINE.empty_table()]
        for start in range(0, len(rows), self.job.batch_rows):
            piece = rows.slice(start, self.job.batch_rows)
            if self.prepare is None:
                pieces.append(piece)
                continue
            ready, bad = self.prepare(fragment, piece, start)
            pieces += ready
            refused.append(bad)
        tokens = sum(map(token_count, pieces))
        seconds, again = time.monotonic() - began, self.prepare.restarts if self.prepare else 0
        return Prepared(fragment, len(rows), pieces, pa.concat_tables(refused), tokens, seconds, again)


def whole_function(job: MapJob) -> BatchFn:
    """The batch function of a job, its parts one behind the other."""
    if job.shards == 1:
        return job.make()
    functions = [job.make(part=Part(number, job.shards)) for number in range(job.shards)]
    return lambda rows: functools.reduce(lambda done, function: function(done), functions, rows)


class MapFragment:
    """Puts a prepared fragment through the batch function, which is built here, once."""

    def __init__(self, job: MapJob, directory: Path) -> None:
        self.job = job
        self.attempts = Attempts(job, directory, whole_function(job), "map")

    def __call__(self, prepared: Prepared) -> Mapped:
        began, start, self.attempts.restarts = time.monotonic(), 0, prepared.restarts
        made, refused = [self.job.schema.empty_table()], [prepared.refused]
        for piece in prepared.pieces:
            good, bad = self.attempts(prepared.fragment, piece, start)
            made += [self.job.as_written(table) for table in good]
            refused.append(bad)
            start += len(piece)
        seconds = prepared.seconds + time.monotonic() - began
        together = pa.concat_tables(made), pa.concat_tables(refused)
        return Mapped(prepared.fragment, prepared.read, *together, prepared.tokens, seconds, self.attempts.restarts)


def commit(job: MapJob, directory: Path, mapped: Mapped) -> dict[str, Any]:
    """Write a fragment's part, its quarantine and its `done` entry, in that order; the entry."""
    name = part_name(mapped.fragment.number)
    rows = mapped.rows.replace_schema_metadata(job.metadata) if job.metadata else mapped.rows
    facts: dict[str, Any] = {"of": rows_of(mapped.fragment)}
    if job.facts is not None:
        facts |= job.facts(rows)
    if job.write is None:
        write_parquet(rows.drop_columns(list(job.unwritten)), directory / job.folder / name, job.group_rows)
    else:
        facts |= job.write(rows, directory, name)
    quarantine = directory / "quarantine" / name
    if len(mapped.refused):
        digest = write_parquet(mapped.refused, quarantine).digest
        facts["parts"] = {**facts.get("parts", {}), "quarantine": digest}
    else:
        remove(quarantine)  # of an attempt that did not come to its end
    counted = {"tokens": mapped.tokens, "seconds": round(mapped.seconds, 3), "restarts": mapped.restarts}
    done = entry(mapped.read, len(rows), mapped.refused["reason"].to_pylist(), **counted, **facts)
    # Last: an entry says that all else of the fragment is on the disk.
    write_json(done, directory / DONE / entry_name(mapped.fragment))
    return done


def plan(job: MapJob, fragments: Sequence[Fragment], directory: Path) -> tuple[list[Fragment], list[Fragment]]:
    """The planned fragments, written down, and those of them that are not done.

    Raises:
        UserError: there are none, or an input changed since the plan was made.
    """
    if not fragments:
        raise UserError(f"stage {job.stage}: no input rows; check the sources and filters")
    planned = save_plan(list(fragments), directory)
    forget_torn(directory)
    return planned, pending(planned, directory)


def no_progress(stage: str, done: int, total: int, rows: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class LocalRunner:
    """Everything in this process, one fragment after another."""

    on_progress: OnProgress = field(default=no_progress)

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> Counts:
        planned, todo = plan(job, fragments, directory)
        if todo:
            self.on_progress(job.stage, len(planned) - len(todo), len(planned), 0)
            read, work = ReadFragment(job, directory), MapFragment(job, directory)
            for number, fragment in enumerate(todo, len(planned) - len(todo) + 1):
                done = commit(job, directory, work(read(fragment)))
                self.on_progress(job.stage, number, len(planned), done["read"])
        return close(job.stage, planned, directory, job.parts(directory))

    def map_all(self, works: Sequence[Work]) -> list[Counts]:
        return [self.map(*work) for work in works]

    def on_gpu(self) -> bool:
        return has_gpu()

    def train(self, jobs: Sequence[TrainJob]) -> list[dict[str, Any]]:
        return [self._train(job) for job in jobs]

    def _train(self, job: TrainJob) -> dict[str, Any]:
        from safer_ray.reward.training_steps import (
            OneProcess,  # here, since processes that read and commit start without torch
        )

        state = job.out / "state"
        known = trained_already(state)
        if known is not None:
            return known
        began = time.monotonic()
        workers = OneProcess(state, lambda done, total: self.on_progress(job.stage, done, total, 0))
        metrics = job.loop(out=job.out, workers=workers, **job.arguments)
        metrics["train_seconds"] = round(time.monotonic() - began, 3)
        close_training(metrics, state)
        return metrics
