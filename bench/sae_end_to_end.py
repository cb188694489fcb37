"""How fast the trainer is from Parquet on: `python -m bench.sae_end_to_end [--vectors 98304] [--json OUT]`.

One training of the same batches on one worker of a Ray Train group and on two, one thread each. Rates are those of the
steps alone, the wait for vectors included; starting Ray, the split and the held-out figures stay out.
"""

import argparse
import tempfile
from pathlib import Path
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
from safer_ray.train_sae import train_sae

WIDTH, LATENTS, K, BATCH = 512, 8192, 32, 8192
DIRECTIONS = 2048  # of which a vector is a sum of a few
PART = 16_384


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
    """A training on so many workers: vectors a second, the share of the wait, and how good the SAE became."""
    out.mkdir()
    arguments = {"activations": vectors, "config": config, "model": "none", "layer": 1}
    runner = RayRunner(RayConfig(train_workers=workers, worker_threads=1))
    (found,) = runner.train([TrainJob("sae", train_sae, arguments, out)])
    rate = config.steps * config.batch_size / found["fit_seconds"]
    return {"workers": workers, "vectors_per_s": rate, "read_share": found["read_share"], "nmse": found["nmse"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=98_304)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    config = SaeConfig(latents=LATENTS, k=K, steps=given.steps, batch_size=given.batch, dead_after=10**9)
    rows = []
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig()):
        folder = Path(name)
        write_vectors(folder / "vectors", given.vectors)
        for workers in (1, 2):
            rows.append(measure(folder / "vectors", folder / f"sae-{workers}", config, workers))
            print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    figures = {
        "read_share": max(row["read_share"] for row in rows),
        "workers_2": rows[1]["vectors_per_s"] / rows[0]["vectors_per_s"],
    }
    for figure, value in figures.items():
        print(f"{figure:<12} {value:.3f}")
    write(given.json, dict(figures), rows)


if __name__ == "__main__":
    main()
