"""Vectors made from a known dictionary, on which autoencoders are trained."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from safer_ray import schema
from safer_ray.config.sections import SaeConfig
from safer_ray.sae.model import standardise
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.files import write_parquet

WIDTH = 24


CONFIG = SaeConfig(
    latents=64, k=4, steps=120, batch_size=64, learning_rate=5e-3, validation_percent=10, dead_after=2000
)


def dictionary_vectors(n, seed=0):
    """Sums of 3 of 32 directions with positive weights."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(32, WIDTH))
    raw = np.zeros((n, WIDTH))
    for row in raw:
        row += generator.uniform(0.5, 2, 3) @ directions[generator.choice(32, 3, replace=False)]
    return raw.astype(np.float32)


def activations(raw):
    made = standardise(torch.from_numpy(raw))
    n = len(raw)
    x = pa.FixedSizeListArray.from_arrays(pa.array(made.x.numpy().astype(np.float16).reshape(-1)), WIDTH)
    columns = {
        "pair_id": [f"p{i // 4}" for i in range(n)],
        "group": [f"g{i // 8}" for i in range(n)],
        "side": ["chosen"] * n,
        "token": np.arange(n, dtype=np.int32),
    }
    columns |= {"end": np.full(n, -1, dtype=np.int32), "norm": made.norm.numpy(), "mean": made.mean.numpy()}
    return pa.table({**columns, "std": made.std.numpy(), "x": x}, schema=schema.activations(WIDTH))


def write(table, directory, rows=500):
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), directory / part_name(number), 64)
    return directory


@pytest.fixture(scope="module")
def vectors_dir(tmp_path_factory):
    return write(activations(dictionary_vectors(1500)), tmp_path_factory.mktemp("activations"))
