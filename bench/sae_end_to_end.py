"""Measure how fast the trainer is from Parquet on: `python -m bench.sae_end_to_end [--vectors 98304] [--json OUT]`.

One training of the same batches in one process and on the two workers of a Ray Train group, one thread each. Both are
under way at once and take turns of a few steps, so that a machine that is slower for a minute is slower for both. One
worker is no group, whose processes wake a hundred times a second in the other's turns, too. A step's time includes the
wait for its vectors; the rate is that of the median step. `workers_2_undisturbed` compares the fastest tenth of the
steps, and `workers_2_cpu` the time that a process worked in a step, exchange of gradients and reading included. What
stays out: starting Ray, the split, the first turn and the first step of each, and the 20 steps behind which held-out
figures are measured, by one worker.

`workers_2_bound` is what two workers would reach if exchanging and applying gradients took no time: the gradients of
a batch need those of the slower half. `noise` tells how evenly a core works before the trainings begin, near 1 where
nothing else uses it.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench.common import local_path, write
from safer_ray import schema
from safer_ray.config.sections import RayConfig, SaeConfig
from safer_ray.distributed.ray_runner import RayRunner
from safer_ray.distributed.session import ray_session
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.training_steps import Workers
from safer_ray.sae.model import standardise
from safer_ray.sae.train import train_sae
from safer_ray.sae.training_loop import HELD_CURVE, is_mark
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.files import write_parquet
from safer_ray.storage.work import TrainJob

WIDTH, LATENTS, K, BATCH, MICRO = 512, 8192, 32, 16_384, 8192
DIRECTIONS = 2048  # of which a vector is a sum of a few
PART = 16_384
TURN = 5  # steps
PATIENCE = 300  # seconds
TIMES = ("seconds", "cpu_seconds", "slowest_seconds")  # of each step; the last of the slowest worker's gradients alone


def write_vectors(directory: Path, count: int) -> None:
    """Vectors of a dictionary, as stage `activations` writes them."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)
    for number, start in enumerate(range(0, count, PART)):
        rows = min(PART, count - start)
        chosen = generator.integers(0, DIRECTIONS, size=(rows, 12))
        weights = generator.exponential(size=(rows, 12, 1)).astype(np.float32)
        raw = np.concatenate(
            [(directions[c] * w).sum(1) for c, w in zip(np.split(chosen, 16), np.split(weights, 16), strict=True)]
        )
        made = standardise(torch.from_numpy(raw))
        x = pa.array(made.x.to(torch.float16).numpy().reshape(-1))
        facts = {name: getattr(made, name).numpy() for name in ("norm", "mean", "std")}
        columns: dict[str, Any] = {
            "pair_id": [f"p{(start + i) // 10}" for i in range(rows)],
            "group": [f"g{(start + i) // 20}" for i in range(rows)],
            "side": ["chosen"] * rows,
            "token": np.arange(rows, dtype=np.int32),
            "end": np.arange(rows, dtype=np.int32),
            **facts,
            "x": pa.FixedSizeListArray.from_arrays(x, WIDTH),
        }
        table = pa.table(columns, schema=schema.activations(WIDTH))
        write_parquet(table, directory / part_name(number), schema.GROUP_ROWS)


def noise() -> float:
    """The slowest over the fastest tenth of equal bfloat16 products out of a core's own cache, nothing else running."""
    torch.set_num_threads(1)
    a, b = (torch.randn(256, 256, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(100):
        began = time.perf_counter()
        for _ in range(2000):
            torch.mm(a, b)
        found.append(time.perf_counter() - began)
    cuts = quantiles(found, n=10)
    return cuts[-1] / cuts[0]


class Turns:
    """One of two trainings that work in turns, seen from one of its processes.

    Turns are counted in a file that the first process of each training adds one to; even ones are the first training's.
    """

    def __init__(self, file: Path, *, second: bool, leads: bool) -> None:
        self.file, self.next, self.leads = file, int(second), leads

    def wait(self, turn: int) -> None:
        until = time.monotonic() + PATIENCE
        while int(self.file.read_text()) < turn:
            if time.monotonic() > until:
                raise TimeoutError(f"the other training has not ended its turn in {PATIENCE} s; it may have failed")
            time.sleep(0.02)

    def begin(self) -> None:
        self.wait(self.next)

    def end(self, *, last: bool) -> None:
        """Hand over; go on when it is this training's turn again, or, after its last, when the other is done, too."""
        self.next += 2
        if self.leads:
            replacement = self.file.with_suffix(f".{self.next % 2}")
            replacement.write_text(str(self.next - 1))
            replacement.replace(self.file)
        self.wait(self.next - self.next % 2 if last else self.next)


def measure(
    vectors: Path, out: Path, config: SaeConfig, runner: LocalRunner | RayRunner, turns: Path
) -> dict[str, Any]:
    """A training: seconds of each step, the share of the wait, and how good the SAE became."""
    out.mkdir()
    arguments = {"activations": vectors, "config": config, "model": "none", "layer": 1, "turns": turns}
    (found,) = runner.train([TrainJob("sae", timed, arguments, out)])
    waited = found["read_share"] * found["fit_seconds"]  # in which the other training's turns count, too
    share = {"read_share": waited / (config.steps * median(found["seconds"]))}
    return {name: found[name] for name in ("workers", *TIMES, "nmse")} | share


def timed(out: Path, workers: Workers, turns: Path, **arguments: Any) -> dict[str, Any]:
    """`train_sae` in turns, which also tells how long each step took, and the first worker's process computed in it."""
    taken: list[tuple[float, ...]] = []
    turn = Turns(turns, second=workers.size > 1, leads=workers.rank == 0)
    on_step, add = workers.on_step, workers.sum
    began: tuple[float, float] | None = None
    ready = 0.0  # when this worker had its gradients and first asked for the others'

    def noted_sum(values: torch.Tensor) -> torch.Tensor:
        nonlocal ready
        if values.numel() > 1:  # not the question whether a checkpoint is due
            ready = ready or time.perf_counter()
        return add(values)

    def note(done: int, total: int) -> None:
        nonlocal began, ready
        ended = time.perf_counter(), time.process_time()
        if began is not None:
            taken.append((*np.subtract(ended, began), ready - began[0]))
        on_step(done, total)
        over = done % TURN == 0
        if over:
            turn.end(last=done == total)
        usable = done >= TURN and not over and not is_mark(done, total, HELD_CURVE)
        began = (time.perf_counter(), time.process_time()) if usable else None
        ready = 0.0

    workers.on_step, workers.sum = note, noted_sum  # type: ignore[method-assign]
    turn.begin()
    found = train_sae(out=out, workers=workers, **arguments)
    times = torch.tensor(taken, dtype=torch.float64)
    everyones = torch.zeros(workers.size, len(times), dtype=torch.float64)
    everyones[workers.rank] = times[:, -1]
    times[:, -1] = add(everyones).amax(0)
    return found | dict(zip(TIMES, times.T.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=98_304)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    if given.turns * TURN < 2 * HELD_CURVE:
        parser.error(f"--turns {given.turns}: wanted {2 * HELD_CURVE // TURN} at least, or no step is left to time")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name; workers are what is measured
    config = SaeConfig(
        latents=LATENTS,
        k=K,
        steps=given.turns * TURN,
        batch_size=given.batch,
        micro_batch_size=MICRO,
        dead_after=10**9,
    )
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig()), ThreadPoolExecutor() as pool:
        folder = Path(name)
        vectors, turns = folder / "vectors", folder / "turns"
        write_vectors(vectors, given.vectors)
        noisy = noise()
        turns.write_text("0")
        runners = LocalRunner(), RayRunner(RayConfig(train_workers=2, worker_threads=1, worker_cpus=0.5))
        made = folder / "one", folder / "two"
        rows = list(pool.map(lambda out, runner: measure(vectors, out, config, runner, turns), made, runners))
    for row in rows:
        told = {name: median(value) if name in TIMES else value for name, value in row.items()}
        print(", ".join(f"{name} {value:.4g}" for name, value in told.items()), flush=True)
    step, best, cpu = zip(
        *((median(row["seconds"]), quantiles(row["seconds"], n=10)[0], median(row["cpu_seconds"])) for row in rows),
        strict=True,
    )
    figures = {
        "read_share": max(row["read_share"] for row in rows),
        "workers_2": step[0] / step[1],
        "workers_2_undisturbed": best[0] / best[1],
        "workers_2_cpu": cpu[0] / cpu[1],
        "workers_2_bound": step[0] / median(rows[1]["slowest_seconds"]),
        "noise": noisy,
        "vectors_per_s_1": config.batch_size / step[0],
        "vectors_per_s_2": config.batch_size / step[1],
    }
    for figure, value in figures.items():
        print(f"{figure:<22} {value:.3f}")
    write(given.json, dict(figures), rows)


if __name__ == "__main__":
    main()
