"""Training loops on a Ray Train worker group: data parallel, resumed from checkpoints in the run's own directory.

Checkpoints lie where the artifact is made, on storage that all nodes see, so that a new group, a new driver or a person
finds them without asking Ray.
"""

import contextlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor, nn

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.deepspeed_engine import DeepSpeedEngine
from safer_ray.distributed.process_group import GroupConfig
from safer_ray.distributed.ray_internals import needed_callbacks
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline.runner import OnProgress
from safer_ray.reward.ending import asked_to_end, end
from safer_ray.reward.training_steps import Checkpointable, Checkpoints, OptimizerAdapter, OptimizerOptions, share
from safer_ray.storage.accounts import close_training, trained_already
from safer_ray.storage.background import heartbeat
from safer_ray.storage.digests import record_digests
from safer_ray.storage.files import write_json
from safer_ray.storage.work import TrainJob

PROGRESS_SECONDS = 1.0
START_TRIES = 30  # of a minute each, for a worker group to find room; Ray itself would wait for ever
ABORT_SECONDS = 30.0  # until an interrupted group has ended
ERROR = "error.json"
PROGRESS = "progress.json"


class GroupWorker:
    """One process of a Ray Train group; see `safer_ray.reward.training_steps.Workers`."""

    def __init__(self, state: Path, config: RayConfig) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.config = config
        self.partitions = config.deepspeed.stage == 3
        self.state = state
        self.device = get_device() if config.worker_gpus else torch.device("cpu")
        self.checkpoints = Checkpoints(state, self.rank, {"workers": self.size, "engine": "torch zero 1"})
        self.told = 0.0
        self.ending = False  # whether one of the workers was told to
        self.open: DeepSpeedEngine | None = None
        self.received: list[list[Tensor]] = []

    def engine(self, module: nn.Module, options: OptimizerOptions) -> OptimizerAdapter:
        stage = self.config.deepspeed.stage
        self.checkpoints.group |= {"engine": f"deepspeed zero {stage}", "dtype": _dtype(options)}
        self.checkpoints.expect(module, self.size)
        self.open = DeepSpeedEngine(module, options, self.config.deepspeed, self.size, self.device)
        return self.open

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As `Workers` says; of the tensors themselves only this worker's share is of use afterwards."""
        rows = [[tensor[share(len(tensor), rank, self.size)] for rank in range(self.size)] for tensor in tensors]
        others = [rank for rank in range(self.size) if rank != self.rank]  # none, where one works alone
        # Kept over steps, since their sizes never change.
        if not self.received:
            self.received = [[torch.empty_like(own[self.rank]) for _ in others] for own in rows]
        # Every worker adds what it receives in a fixed order, so that the sum is the same to the bit in every run.
        calls = []
        for tag, (own, received) in enumerate(zip(rows, self.received, strict=True)):
            for rank, there in zip(others, received, strict=True):
                calls += [
                    dist.P2POp(dist.isend, own[rank], rank, tag=tag),
                    dist.P2POp(dist.irecv, there, rank, tag=tag),
                ]
        for under_way in dist.batch_isend_irecv(calls) if calls else []:
            under_way.wait()
        for own, received in zip(rows, self.received, strict=True):
            for there in received:
                own[self.rank] += there
        return [own[self.rank] for own in rows]

    def all_gather(self, tensors: Sequence[Tensor]) -> None:
        under_way = [
            dist.broadcast(tensor[share(len(tensor), rank, self.size)], rank, async_op=True)
            for tensor in tensors
            for rank in range(self.size)
        ]
        for each in under_way:
            each.wait()

    def due(self, wanted: bool = False) -> bool:
        """The first worker's clock decides for all, and whichever is told to end."""
        own = [float(self.rank == 0 and self.checkpoints.due(wanted)), float(asked_to_end())]
        due, self.ending = (bool(found) for found in self.sum(torch.tensor(own)))
        return due or self.ending

    def save(self, engine: Checkpointable, state: dict[str, Any]) -> None:
        # The barriers: nobody writes into a folder that is not there, digests are of files that are whole, and the
        # checkpoint counts when all of it is there.
        self.checkpoints.begin()
        dist.barrier()
        written = self.checkpoints.write(engine, state)
        dist.barrier()
        record_digests(written, self.rank, self.size)
        dist.barrier()
        self.checkpoints.close(state["progress"]["step"])
        dist.barrier()
        if self.ending:
            if asked_to_end():
                end()
            # All end, and the next group goes on from here.
            raise RuntimeError("a worker was told to end (SIGTERM), and a checkpoint was saved")

    def load(self, engine: Checkpointable) -> dict[str, Any] | None:
        return self.checkpoints.load(engine, self)

    def on_step(self, done: int, total: int) -> None:
        # Through a file, since the driver may be another after this one was killed.
        if self.rank == 0 and (done == total or time.monotonic() - self.told >= PROGRESS_SECONDS):
            self.told = time.monotonic()
            write_json({"done": done, "total": total}, self.state / PROGRESS, durable=False)

    def close(self) -> None:
        if self.open is not None:
            self.open.close()


def _dtype(options: OptimizerOptions) -> str:
    return "bfloat16" if options.bfloat16 else "float32"


def work(given: dict[str, Any]) -> None:
    """Run, in every worker of the group, the jobs, one after another."""
    config: RayConfig = given["config"]
    torch.set_num_threads(config.worker_threads)
    for job in given["jobs"]:
        state = job.out / "state"
        known, explained = trained_already(state), (state / ERROR).exists()
        dist.barrier()  # all have looked before one of them writes
        if known is not None:
            continue
        if explained:
            return  # by the group before this one
        began = time.monotonic()
        worker = GroupWorker(state, config)
        try:
            metrics = job.loop(out=job.out, workers=worker, **job.arguments)
        except SaferError as error:
            write_json([isinstance(error, UserError), str(error)], state / ERROR)
            raise  # Ray Train ends the others, which may wait for this worker; the next group finds it explained
        worker.close()
        if worker.rank == 0:
            metrics["train_seconds"] = round(time.monotonic() - began, 3)
            close_training(metrics, state)
        ray.train.report({"stage": job.stage, "artifact": job.out.name})  # a barrier: all have finished this job


def train(jobs: Sequence[TrainJob], config: RayConfig, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Run the jobs on one worker group; lost workers and nodes are replaced `ray.max_failures` times.

    Raises:
        UserError: what a loop explained, in the input or the config.
        SaferError: the group failed too often.
    """
    states = [job.out / "state" for job in jobs]
    for state in states:
        state.mkdir(parents=True, exist_ok=True)
        (state / ERROR).unlink(missing_ok=True)
    if any(trained_already(state) is None for state in states):
        with heartbeat(PROGRESS_SECONDS, lambda: _tell(jobs, on_progress)):
            _fit(jobs, config, states[0])
    for state in states:
        if (state / ERROR).exists():
            is_users, message = json.loads((state / ERROR).read_text(encoding="utf-8"))
            raise (UserError if is_users else SaferError)(message)
    metrics = [trained_already(state) for state in states]
    missing = [job.out.name for job, found in zip(jobs, metrics, strict=True) if found is None]
    if missing:
        raise SaferError(f"training of {missing[0]} ended without a result; run the same command again")
    return [found for found in metrics if found is not None]


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C alone: Ray Train's own handler stays for the rest of the process, and exits without a word. Starts
    no process that a group does without."""

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        return needed_callbacks(super()._create_default_callbacks())  # type: ignore[misc]  # as for FailureConfig

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller


def _fit(jobs: Sequence[TrainJob], config: RayConfig, state: Path) -> None:
    storage = state / "ray"  # the group's own books; nothing in them is needed to go on
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir()
    resources = {"CPU": config.worker_cpus} | ({"GPU": config.worker_gpus} if config.worker_gpus else {})
    trainer = _Trainer(
        work,
        train_loop_config={"jobs": list(jobs), "config": config},
        torch_config=GroupConfig(backend="nccl" if config.worker_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train_workers, use_gpu=bool(config.worker_gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(storage),
            failure_config=FailureConfig(  # type: ignore[call-arg]  # mypy sees the class of the former version
                max_failures=config.max_failures,
                controller_failure_limit=START_TRIES + math.ceil(config.wait_seconds / 60),
            ),
        ),
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if trainer.controller is not None:
            with contextlib.suppress(RayError):
                ray.get(trainer.controller.abort.remote(), timeout=ABORT_SECONDS)
        raise
    except ControllerError as error:
        raise SaferError(
            f"{jobs[0].stage}: no group of {config.train_workers} workers of {config.worker_cpus:g} CPU and "
            f"{config.worker_gpus:g} GPU could be started: …{_end(error)}; see `ray status` for lost nodes and for "
            "work that holds the others, then run the same command again: it goes on from the last checkpoint"
        ) from error
    except TrainingFailedError as error:
        if any((job.out / "state" / ERROR).exists() for job in jobs):
            return  # what a loop explained; `train` tells it
        raise SaferError(
            f"{jobs[0].stage}: the worker group failed {config.max_failures + 1} times: …{_end(error)}; "
            "run the same command again: it goes on from the last checkpoint"
        ) from error
    except RayError as error:  # of the group's controller
        raise SaferError(
            f"{jobs[0].stage}: the cluster failed: …{_end(error)}; "
            "run the same command again: it goes on from the last checkpoint"
        ) from error


def _end(error: BaseException) -> str:
    return " ".join(str(error).split())[-400:]


def _tell(jobs: Sequence[TrainJob], on_progress: OnProgress) -> None:
    """Hand on what the first worker wrote about its steps."""
    job = next((job for job in jobs if trained_already(job.out / "state") is None), None)
    if job is not None:
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((job.out / "state" / PROGRESS).read_text(encoding="utf-8"))
            on_progress(job.stage, said["done"], said["total"], 0)
