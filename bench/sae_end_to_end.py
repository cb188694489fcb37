"""How fast the trainer is from Parquet on: `python -m bench.sae_end_to_end [--vectors 98304] [--json OUT]`.

One training of the same batches on one worker of a Ray Train group and on two, one thread each, in turns. A step's time
includes the wait for its vectors; the rate is that of the median step over all rounds. A machine that does other work,
too, slows two workers more than one: `workers_2_undisturbed` compares the fastest tenth of the steps, and
`workers_2_cpu` the time that a process worked in a step, exchange of gradients and reading included. Starting Ray, the
split and the 20 steps behind which held-out figures are measured, by one worker, stay out.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench.common import write
from safer_ray import schema
from safer_ray.artifacts import part_name
from safer_ray.config import RayConfig, SaeConfig
from safer_ray.distributed.runner import RayRunner
from safer_ray.distributed.session import ray_session
from safer_ray.files import write_parquet
from safer_ray.runner import TrainJob
from safer_ray.sae import standardise
from safer_ray.sae_fit import HELD_CURVE, is_mark
from safer_ray.train_sae import train_sae
from safer_ray.training import Workers

WIDTH, LATENTS, K, BATCH, MICRO = 512, 8192, 32, 16_384, 8192
DIRECTIONS = 2048  # of which a vector is a sum of a few
PART = 16_384
TIMES = ("seconds", "cpu_seconds")  # of each step


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


def measure(vectors: Path, out: Path, config: SaeConfig, workers: int) -> dict[str, Any]:
    """A training on so many workers: seconds of each step, the share of the wait, and how good the SAE became."""
    out.mkdir()
    arguments = {"activations": vectors, "config": config, "model": "none", "layer": 1}
    runner = RayRunner(RayConfig(train_workers=workers, worker_threads=1))
    (found,) = runner.train([TrainJob("sae", timed, arguments, out)])
    return {name: found[name] for name in ("workers", *TIMES, "read_share", "nmse")}


def timed(out: Path, workers: Workers, **arguments: Any) -> dict[str, Any]:
    """`train_sae`, which also tells how long each step took, and how long the first worker's process computed in it."""
    ends: list[tuple[float, float]] = []
    on_step = workers.on_step

    def note(done: int, total: int) -> None:
        ends.append((time.perf_counter(), time.process_time()))
        on_step(done, total)

    workers.on_step = note  # type: ignore[method-assign]
    found = train_sae(out=out, workers=workers, **arguments)
    plain = [not is_mark(done, len(ends), HELD_CURVE) for done in range(1, len(ends))]
    return found | dict(zip(TIMES, np.diff(np.array(ends), axis=0)[plain].T.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=98_304)
    parser.add_argument("--steps", type=int, default=44)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name; workers are what is measured
    config = SaeConfig(
        latents=LATENTS,
        k=K,
        steps=given.steps,
        batch_size=given.batch,
        micro_batch_size=MICRO,
        dead_after=10**9,
    )
    rows = []
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig()):
        folder = Path(name)
        write_vectors(folder / "vectors", given.vectors)
        for number, workers in itertools.product(range(given.rounds), (1, 2)):
            row = measure(folder / "vectors", folder / f"sae-{number}-{workers}", config, workers)
            row["vectors_per_s"] = config.batch_size / median(row["seconds"])
            rows.append(row)
            told = {name: value for name, value in row.items() if name not in TIMES}
            print(", ".join(f"{name} {value:.4g}" for name, value in told.items()), flush=True)
    one, two = ({name: [t for row in rows if row["workers"] == n for t in row[name]] for name in TIMES} for n in (1, 2))
    step = [median(found["seconds"]) for found in (one, two)]
    figures = {
        "read_share": max(row["read_share"] for row in rows),
        "workers_2": step[0] / step[1],
        "workers_2_undisturbed": quantiles(one["seconds"], n=10)[0] / quantiles(two["seconds"], n=10)[0],
        "workers_2_cpu": median(one["cpu_seconds"]) / median(two["cpu_seconds"]),
        "vectors_per_s_1": config.batch_size / step[0],
        "vectors_per_s_2": config.batch_size / step[1],
    }
    for figure, value in figures.items():
        print(f"{figure:<22} {value:.3f}")
    write(given.json, dict(figures), rows)


if __name__ == "__main__":
    main()
