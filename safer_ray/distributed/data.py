"""Fragments through Ray Data: tasks read and tokenise, actors run the model, tasks commit.

A row between operators is one fragment, as Arrow IPC bytes: what is committed whole travels whole, and the driver sees
nothing but its accounts.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from safer_ray.artifacts import Fragment
from safer_ray.config import RayConfig
from safer_ray.distributed.metrics import count_fragment
from safer_ray.errors import SaferError, UserError
from safer_ray.progress import RUN_ID
from safer_ray.runner import MapFragment, MapJob, Mapped, Prepared, ReadFragment, commit

Row = dict[str, Any]


def _to_bytes(tables: Sequence[pa.Table]) -> bytes:
    """Tables of one schema as an IPC stream, one record batch each."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks())  # nothing for a table without rows
    return sink.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> list[pa.Table]:
    with pa.ipc.open_stream(data) as stream:
        return [pa.Table.from_batches([batch]) for batch in stream] or [stream.schema.empty_table()]


def _fragment_row(fragment: Fragment) -> Row:
    return {"fragment": json.dumps(vars(fragment))}


def _fragment(row: Row) -> Fragment:
    return Fragment(**json.loads(row["fragment"]))


def _failed(row: Row, error: SaferError) -> Row:
    """An error that is explained travels as a row: Ray would wrap it in its own and try again."""
    kind = "user" if isinstance(error, UserError) else "safer"
    return {"fragment": row["fragment"], "error": json.dumps([kind, str(error)])}


def _raise(error: str) -> None:
    kind, message = json.loads(error)
    raise (UserError if kind == "user" else SaferError)(message)


def _prepared_row(row: Row, prepared: Prepared) -> Row:
    pieces = _to_bytes(prepared.pieces) if prepared.pieces else b""
    facts = {"read": prepared.read, "tokens": prepared.tokens, "seconds": prepared.seconds}
    return {"fragment": row["fragment"], "error": "", **facts, "rows": pieces, "refused": _to_bytes([prepared.refused])}


def _prepared(row: Row) -> Prepared:
    pieces = _from_bytes(row["rows"]) if row["rows"] else []
    refused = pa.concat_tables(_from_bytes(row["refused"]))
    return Prepared(_fragment(row), row["read"], pieces, refused, row["tokens"], row["seconds"])


def _mapped_row(row: Row, mapped: Mapped) -> Row:
    facts = {"read": mapped.read, "tokens": mapped.tokens, "seconds": mapped.seconds}
    return {
        "fragment": row["fragment"],
        "error": "",
        **facts,
        "rows": _to_bytes([mapped.rows]),
        "refused": _to_bytes([mapped.refused]),
    }


def _mapped(row: Row) -> Mapped:
    rows, refused = (pa.concat_tables(_from_bytes(row[name])) for name in ("rows", "refused"))
    return Mapped(_fragment(row), row["read"], rows, refused, row["tokens"], row["seconds"])


class _Step(ABC):
    """One operator: built in its process at the first row, passes on the errors of the operators before it."""

    def __init__(self, job: MapJob, directory: Path, run: str) -> None:
        self.job, self.directory, self.run = job, directory, run
        self.built: Any = None

    def build(self) -> Any:
        return None

    @abstractmethod
    def work(self, row: Row) -> Row:
        """The row for the next operator."""

    def __call__(self, row: Row) -> Row:
        if row.get("error"):
            return row
        try:
            if self.built is None:
                self.built = self.build()
            return self.work(row)
        except SaferError as error:
            return _failed(row, error)


class _Read(_Step):
    def build(self) -> ReadFragment:
        return ReadFragment(self.job, self.directory)

    def work(self, row: Row) -> Row:
        return _prepared_row(row, self.built(_fragment(row)))


class _Map(_Step):
    def __init__(self, job: MapJob, directory: Path, run: str, threads: int) -> None:
        super().__init__(job, directory, run)
        self.threads = threads

    def build(self) -> MapFragment:
        import torch

        torch.set_num_threads(self.threads)
        return MapFragment(self.job, self.directory)

    def work(self, row: Row) -> Row:
        return _mapped_row(row, self.built(_prepared(row)))


class _Commit(_Step):
    def work(self, row: Row) -> Row:
        return self.close(row, _mapped(row))

    def close(self, row: Row, mapped: Mapped) -> Row:
        done = commit(self.job, self.directory, mapped)
        count_fragment(self.job.stage, self.run, done)
        return {"fragment": row["fragment"], "error": ""}


class _Whole(_Commit):
    """All three steps at once, for jobs without a model."""

    def build(self) -> Callable[[Fragment], Mapped]:
        read, work = ReadFragment(self.job, self.directory), MapFragment(self.job, self.directory)
        return lambda fragment: work(read(fragment))

    def work(self, row: Row) -> Row:
        return self.close(row, self.built(_fragment(row)))


def _as_task(step: type[_Step], *arguments: Any) -> Callable[[Row], Row]:
    """A step as a function for tasks; what it builds lives as long as a task."""

    def run(row: Row) -> Row:
        return step(*arguments)(row)

    return run


def _nothing(*_: Any) -> Any:
    raise AssertionError("another step's")


def _cluster_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 0))


def dataset(job: MapJob, fragments: Sequence[Fragment], directory: Path, config: RayConfig) -> Dataset:
    """The operators of a job over fragments; rows come out when they are committed."""
    rows = [_fragment_row(f) for f in fragments]
    source = ray.data.from_items(rows, override_num_blocks=len(rows))
    reading, mapping = replace(job, make=_nothing), replace(job, read=_nothing, prepare=None)
    committing = replace(mapping, make=_nothing)  # processes import only what their own step needs
    cpus, tasks = config.task_cpus, TaskPoolStrategy(size=config.tasks or max(2, int(_cluster_cpus() / 2)))
    if not job.loads_model:
        return source.map(_as_task(_Whole, job, directory, RUN_ID), num_cpus=cpus, compute=tasks)
    most = min(config.max_actors, len(rows))
    pool = ActorPoolStrategy(min_size=min(config.min_actors, most), max_size=most, max_tasks_in_flight_per_actor=2)
    apart = cpus + 0.001 * (cpus == config.actor_cpus)  # operators of equal shares are fused into one process
    read = source.map(_as_task(_Read, reading, directory, RUN_ID), num_cpus=apart, compute=tasks)
    mapped = read.map(
        _Map,  # type: ignore[arg-type]
        fn_constructor_args=(mapping, directory, RUN_ID, config.threads),
        compute=pool,
        num_cpus=config.actor_cpus,
        num_gpus=config.actor_gpus or None,
    )
    return mapped.map(_as_task(_Commit, committing, directory, RUN_ID), num_cpus=cpus, compute=tasks)


def map_fragments(job: MapJob, fragments: Sequence[Fragment], directory: Path, config: RayConfig) -> Iterator[Fragment]:
    """Map and commit fragments, each given when it is done.

    Raises:
        SaferError: what a step explained; fragments under way are dropped, those committed stay.
    """
    for row in dataset(job, fragments, directory, config).iter_rows():
        if row["error"]:
            _raise(row["error"])
        yield _fragment(row)
