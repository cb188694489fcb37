"""The stages' runner on a Ray cluster: same rows as `LocalRunner`, by Ray Data; training by Ray Train."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import UserCodeException

from safer_ray.artifacts import Fragment
from safer_ray.config import RayConfig
from safer_ray.distributed.data import map_fragments
from safer_ray.distributed.session import check_shared
from safer_ray.distributed.train import train
from safer_ray.errors import SaferError
from safer_ray.runner import Counts, MapJob, OnProgress, TrainJob, count, no_progress, pending, plan

TRIES = 3  # of a stage, when the cluster fails it in a way that Ray Data does not mend
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayRunner:
    """Everything on the cluster that `ray_session` joined or started."""

    config: RayConfig = field(default_factory=RayConfig)
    on_progress: OnProgress = field(default=no_progress)

    def map(self, job: MapJob, fragments: Sequence[Fragment], directory: Path) -> Counts:
        """As `LocalRunner.map`; what is committed when the cluster fails is not done again.

        Raises:
            SaferError: the cluster failed `TRIES` times, or did nothing for half an hour.
        """
        check_shared(directory)
        planned, todo = plan(job, fragments, directory)
        for attempt in range(1, TRIES + 1):
            if not todo:
                break
            try:
                self._once(job, todo, directory, len(planned))
            except ExecutionTimeoutError as error:
                raise SaferError(
                    f"{job.stage}: the cluster finished nothing for long; see `ray status` for lost nodes and for work "
                    "that holds the others, then run the same command again: finished work is kept"
                ) from error
            except ray.exceptions.RayError as error:
                if isinstance(getattr(error, "cause", None), UserCodeException):
                    raise  # no fault of the cluster
                if attempt == TRIES:
                    raise SaferError(
                        f"{job.stage}: the cluster failed {TRIES} times, last with {_reason(error)}; "
                        "run the same command again: finished work is kept"
                    ) from error
                log.warning("%s: %s; going on with what is not done", job.stage, _reason(error))
            todo = pending(planned, directory)
        return count(directory)

    def _once(self, job: MapJob, todo: Sequence[Fragment], directory: Path, total: int) -> None:
        for number, rows in enumerate(map_fragments(job, todo, directory, self.config), total - len(todo) + 1):
            self.on_progress(job.stage, number, total, rows)

    def train(self, jobs: Sequence[TrainJob]) -> list[dict[str, Any]]:
        check_shared(jobs[0].out)
        return train(jobs, self.config, self.on_progress)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
