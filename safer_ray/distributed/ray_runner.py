"""The stages' runner on a Ray cluster: same rows as `LocalRunner`, by Ray Data; training by Ray Train."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import UserCodeException

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.ray_data import map_fragments
from safer_ray.distributed.session import check_shared
from safer_ray.errors import SaferError
from safer_ray.pipeline.runner import OnProgress, no_progress, plan
from safer_ray.storage.accounts import Counts, close, pending, unfinished
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.work import MapJob, TrainJob, Work

TRIES = 3  # of a stage with nothing committed between, when the cluster fails it in a way that Ray Data does not mend
SEEN_SECONDS = 60.0  # for which a network file system may list a folder as it was before
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayRunner:
    """Everything on the cluster that `ray_session` joined or started."""

    config: RayConfig = field(default_factory=RayConfig)
    on_progress: OnProgress = field(default=no_progress)

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> Counts:
        """As `LocalRunner.map`; what is committed when the cluster fails is not done again."""
        return self.map_all([Work(job, fragments, directory)])[0]

    def on_gpu(self) -> bool:
        """Return whether the actors that hold models ask for GPUs."""
        pools = self.config.shard_pools or (self.config,)
        return all(pool.actor_gpus > 0 for pool in pools)

    def map_all(self, works: Sequence[Work]) -> list[Counts]:
        """As `LocalRunner.map_all`, one after another through the same actors, which start once.

        A failure counts while nothing is committed: one that comes after a fragment is the first again.

        Raises:
            SaferError: the cluster failed `TRIES` times and committed nothing between, or did nothing for half an hour.
        """
        for work in works:
            check_shared(work.directory)
        # Once, and before anything fails: what is tried again is what is left of this plan, never a new one.
        planned = [work._replace(fragments=plan(*work)[0]) for work in works]
        todo, total, failures = _pending(planned), _count(planned), 0
        while left := _count(todo):
            why = self._failed(todo, total)
            todo = _pending(planned)
            # Progress forgives: where machines are taken away at any time, hours of work see more than three failures.
            failures = failures + 1 if _count(todo) == left else 1
            if todo and failures == TRIES:
                missing = [fragment for work in todo for fragment in work.fragments]
                told = f": the cluster failed {TRIES} times, last with {why}"
                raise SaferError(unfinished(works[0].job.stage, missing, total, told))
            if todo:
                log.warning("%s: %s; going on with what is not done", works[0].job.stage, why)
        return [close(job.stage, made, directory, job.parts(directory)) for job, made, directory in planned]

    def _failed(self, todo: Sequence[Work], total: int) -> str:
        """Map fragments; why some of them may not be done.

        Raises:
            SaferError: no fault of the cluster, or one that it does not mend.
        """
        try:
            if self._once(todo, total) == _count(todo):
                _wait_until_seen(todo)
        except ExecutionTimeoutError as error:
            raise SaferError(
                f"{todo[0].job.stage}: the cluster finished nothing for long; see `ray status` for lost nodes and for "
                "work that holds the others, then run the same command again: finished work is kept"
            ) from error
        except ray.exceptions.RayError as error:
            # Our own code raised it: it would again, however often the cluster is asked.
            if isinstance(getattr(error, "cause", None), UserCodeException):
                raise  # no fault of the cluster
            return _reason(error)
        return "an end of its work before all of it was done"

    def _once(self, todo: Sequence[Work], total: int) -> int:
        """Map fragments; how many were said to be committed."""
        number, before = 0, total - _count(todo)
        self.on_progress(todo[0].job.stage, before, total, 0)
        for number, rows in enumerate(map_fragments(todo, self.config), 1):
            self.on_progress(todo[0].job.stage, before + number, total, rows)
        return number

    def train(self, jobs: Sequence[TrainJob]) -> list[dict[str, Any]]:
        from safer_ray.distributed.ray_train import train  # here, since a driver that only maps needs no torch

        check_shared(jobs[0].out)
        return train(jobs, self.config, self.on_progress)


def _pending(works: Sequence[Work]) -> list[Work]:
    """Return what is not done of works, those left out that are done."""
    left = [work._replace(fragments=pending(work.fragments, work.directory)) for work in works]
    return [work for work in left if work.fragments]


def _count(works: Sequence[Work]) -> int:
    return sum(len(work.fragments) for work in works)


def _wait_until_seen(works: Sequence[Work]) -> None:
    """Give a network file system time to list here what other nodes have committed."""
    end = time.monotonic() + SEEN_SECONDS
    while _pending(works) and time.monotonic() < end:
        time.sleep(1)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
