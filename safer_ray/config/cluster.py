"""The section `ray` of a config: the cluster that a run works on. Imports neither torch nor ray."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from safer_ray.config.values import Frozen


class DeepSpeedConfig(Frozen):
    """Options by which DeepSpeed spreads a reward model over the workers; changes no result beyond rounding."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO: 1 partitions optimiser state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the memory of the host."""
    offload_parameters: bool = False
    """Keep the weights there too; stage 3 alone."""


class PoolConfig(Frozen):
    """Processes that hold a reward model, or one part of it; their number follows the work."""

    min_actors: Annotated[int, Field(gt=0)] = 1
    """Processes that hold a reward model, at least."""
    max_actors: Annotated[int, Field(gt=0)] = 2
    """Processes that hold a reward model, at most."""
    actor_cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPUs that each of them asks for."""
    actor_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that each of them asks for."""
    threads: Annotated[int, Field(gt=0)] = 1
    """Torch threads of each of them."""

    @model_validator(mode="after")
    def _actors(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is larger than max_actors {self.max_actors}")
        return self


class RayConfig(PoolConfig):
    """The cluster that `--runner ray` works on, and how wide. Never part of a recipe."""

    address: str | None = None
    """Address of the cluster. Default: `RAY_ADDRESS`, or a Ray of its own on this machine."""
    shard_pools: tuple[PoolConfig, ...] = ()
    """One pool for each of `reward.shards`. Default: all alike, as said here."""
    task_cpus: Annotated[float, Field(gt=0)] = 0.25
    """CPUs of a task that reads, counts or commits."""
    tasks: Annotated[int, Field(gt=0)] | None = None
    """Tasks of each kind at once. Default: half as many as the cluster has CPUs."""
    train_workers: Annotated[int, Field(gt=0)] = 2
    """Processes that train."""
    worker_cpus: Annotated[float, Field(gt=0)] = 0.75
    """CPUs that each of them asks for."""
    worker_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that each of them asks for."""
    worker_threads: Annotated[int, Field(gt=0)] = 1
    """Torch threads of each of them."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures of a worker group before a training is given up."""
    wait_seconds: Annotated[float, Field(ge=0)] = 0
    """Time for an autoscaler to bring what is missing."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """How DeepSpeed trains a reward model."""

    def pools(self, shards: int) -> list[PoolConfig]:
        """The pool of every part of a reward model; `shard_pools` say it for a run in as many."""
        return list(self.shard_pools) if len(self.shard_pools) == shards else [self] * shards

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.deepspeed.offload_parameters and self.deepspeed.stage != 3:
            raise ValueError(f"offload_parameters needs deepspeed.stage 3, got {self.deepspeed.stage}")
        return self

    @model_validator(mode="after")
    def _gpus(self) -> Self:
        if 0 < self.worker_gpus < 1 < self.train_workers:
            raise ValueError(
                f"worker_gpus {self.worker_gpus:g} for {self.train_workers} train_workers: NCCL refuses two workers on "
                "one GPU; give each a whole one, or train with one worker"
            )
        return self
