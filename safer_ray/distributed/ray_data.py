"""Fragments through Ray Data: tasks read and tokenise, actors run the model, tasks commit.

A row between operators is one fragment: what is committed whole travels whole, and the driver sees nothing but its
accounts. Of a model in several parts, each has a pool of actors, and a row is a micro-batch of a fragment, with the
hidden states that go from part to part; the pieces meet again on disk, where they are committed.

A task reads fragments of one file that follow each other, since what they lie in (a row group, a compressed file) is
unpacked from its beginning; each goes on as soon as it is read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from safer_ray.config.cluster import PoolConfig, RayConfig
from safer_ray.distributed.operators import Commit, Map, Read, Row, Step, Whole, fragment_row, raise_explained
from safer_ray.distributed.sharded import CommitPiece, MapPiece, ReadPieces
from safer_ray.pipeline.progress import RUN_ID
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.work import Part, Work

LONGEST = 16  # fragments that a task reads one after another


def _as_task(step: type[Step], *arguments: Any) -> Callable[[Row], Row]:
    """A step as a function for tasks; what it builds lives as long as a task."""

    def run(row: Row) -> Row:
        return step(*arguments)(row)

    return run


def _one_by_one(step: type[Step], *arguments: Any) -> Callable[[Row], Iterator[Row]]:
    """A step as a function for tasks that are given several fragments."""

    def run(row: Row) -> Iterator[Row]:
        made = step(*arguments)
        yield from (made({"work": row["work"], "fragment": fragment}) for fragment in row["fragments"])

    return run


def following(fragments: Sequence[Fragment], tasks: int) -> list[list[Fragment]]:
    """Return fragments as runs of one file each, so short that every one of `tasks` gets several."""
    most = max(1, min(LONGEST, len(fragments) // (4 * tasks)))
    runs: list[list[Fragment]] = []
    for fragment in fragments:
        if runs and runs[-1][-1].path == fragment.path and len(runs[-1]) < most:
            runs[-1].append(fragment)
        else:
            runs.append([fragment])
    return runs


def _nothing(*_: Any) -> Any:
    raise AssertionError("another step's")


def _cluster_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 0))


def dataset(works: Sequence[Work], config: RayConfig) -> Dataset:
    """The operators of jobs that are alike, over the fragments of one after another; rows come out when they are
    committed."""
    job, given = works[0].job, [work._replace(fragments=()) for work in works]
    reading = [work._replace(job=replace(work.job, make=_nothing)) for work in given]
    mapping = [work._replace(job=replace(work.job, read=_nothing, prepare=None)) for work in given]
    # Processes import only what their own step needs.
    committing = [work._replace(job=replace(work.job, make=_nothing)) for work in mapping]
    size = config.tasks or max(2, int(_cluster_cpus() / 2))
    cpus, tasks = config.task_cpus, TaskPoolStrategy(size=size)
    rows = [fragment_row(number, f) for number, work in enumerate(works) for f in work.fragments]
    if job.shards == 1:
        runs = [
            {"work": number, "fragments": [fragment_row(number, f)["fragment"] for f in run]}
            for number, work in enumerate(works)
            for run in following(work.fragments, size)
        ]
        # A block each, since Ray Data schedules by block: a task is given one run, and loses no more than that.
        source = ray.data.from_items(runs, override_num_blocks=len(runs))
        source.context.target_max_block_size = 1  # byte: a block for each fragment
    else:
        source = ray.data.from_items(rows, override_num_blocks=len(rows))
    if not job.loads_model:
        return source.flat_map(_one_by_one(Whole, given, RUN_ID), num_cpus=cpus, compute=tasks)
    pools = config.pools(job.shards)
    apart = cpus + 0.001 * (cpus == pools[0].actor_cpus)  # operators of equal shares are fused into one process
    if job.shards == 1:
        read = source.flat_map(_one_by_one(Read, reading, RUN_ID), num_cpus=apart, compute=tasks)
        mapped = _in_pool(read, Map, (mapping, RUN_ID), pools[0], len(rows))
        return mapped.map(_as_task(Commit, committing, RUN_ID), num_cpus=cpus, compute=tasks)
    streamed = source.flat_map(_as_task(ReadPieces, reading, RUN_ID), num_cpus=apart, compute=tasks)
    for number, pool in enumerate(pools):
        streamed = _in_pool(streamed, MapPiece, (mapping, RUN_ID, Part(number, job.shards)), pool)
    return streamed.map(_as_task(CommitPiece, committing, RUN_ID), num_cpus=cpus, compute=tasks)


def _in_pool(
    rows: Dataset, step: type[Step], arguments: tuple[Any, ...], pool: PoolConfig, most: int | None = None
) -> Dataset:
    """A step on a pool of actors, of which there need not be more than `most`."""
    # An actor without a fragment would load the model for nothing.
    largest = min(pool.max_actors, most or pool.max_actors)
    return rows.map(
        step,  # type: ignore[arg-type]
        fn_constructor_args=(*arguments, pool.threads),
        # Two in flight: one that is worked on, and one that is there when it ends; more would wait while another idles.
        compute=ActorPoolStrategy(
            min_size=min(pool.min_actors, largest), max_size=largest, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=pool.actor_cpus,
        num_gpus=pool.actor_gpus or None,
    )


def map_fragments(works: Sequence[Work], config: RayConfig) -> Iterator[int]:
    """Map and commit fragments; the rows of each, when it is done.

    Raises:
        SaferError: what a step explained; fragments under way are dropped, those committed stay.
    """
    for row in dataset(works, config).iter_rows():
        if row["error"]:
            raise_explained(row["error"])
        if row["committed"]:
            yield row["read"]
