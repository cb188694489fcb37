"""The loop that trains an SAE on harvested activations, and its quality on held-out prompts."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from safer_ray.artifacts import part_files
from safer_ray.config import SaeConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.files import read_parquet
from safer_ray.sae import TopKSae, new_sae
from safer_ray.sae_formats import save_sae
from safer_ray.sae_loss import remove_parallel_gradient, sae_step
from safer_ray.train_reward import validation_split
from safer_ray.training import (
    EngineOptions,
    TorchEngine,
    Workers,
    my_share,
    permutation,
    warmup_decay,
)

CHECKPOINT_STEPS = 250
REFERENCE_LEARNING_RATE = 2e-4  # at REFERENCE_LATENTS, by the 1/sqrt(latents) rule
REFERENCE_LATENTS = 2**14


class Vectors(NamedTuple):
    """Standardised vectors in memory as float16, and how many outliers were left out."""

    train: np.ndarray
    held_out: np.ndarray
    outliers: int


@dataclass
class SaeProgress:
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def read_vectors(directory: Path, config: SaeConfig) -> Vectors:
    """Activations split by pair, outliers (raw norm over `norm_limit` medians) left out.

    Raises:
        UserError: NaN or infinite values, or fewer vectors than a batch.
    """
    tables = [read_parquet(path, ["pair_id", "norm", "x"]) for path in part_files(directory)]
    table = pa.concat_tables(tables).combine_chunks()
    column = table["x"].combine_chunks()
    x = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    norm = table["norm"].to_numpy()
    bad = ~(np.isfinite(norm) & np.isfinite(x).all(axis=1))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"activations: row {row} (pair {table['pair_id'][row].as_py()!r}) is NaN or infinite; "
            "rebuild stage `activations` with a sound reward model"
        )
    inside = norm <= config.norm_limit * np.median(norm) if len(norm) else np.zeros(0, dtype=bool)
    held = validation_split(table["pair_id"].to_pylist(), config.validation_percent, config.seed)
    train, held_out = x[inside & ~held], x[inside & held]
    if len(train) < config.batch_size or not len(held_out):
        raise UserError(
            f"sae: {len(train)} training and {len(held_out)} held-out vectors in {directory}, wanted at least "
            f"{config.batch_size} and 1; lower sae.batch_size or harvest more pairs"
        )
    return Vectors(train, held_out, int((~inside).sum()))


def _tensor(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.float32))


@torch.inference_mode()
def sae_quality(sae: TopKSae, vectors: np.ndarray) -> dict[str, float]:
    """Normalised MSE, mean-centred explained variance, L0 and dead share on held-out vectors.

    nmse is the mean of ||x_hat - x||^2 / ||x||^2 (0 is perfect); explained_variance is 1 - SSE / SS about the mean
    vector (1 is perfect); l0 counts positive activations a vector; dead_share is the share of latents that never fire
    here.
    """
    mean = _tensor(vectors.mean(axis=0, dtype=np.float64)[None])
    ratio = errors = spread = active = 0.0
    fired = torch.zeros(sae.latents, dtype=torch.bool)
    for start in range(0, len(vectors), 4096):
        x = _tensor(vectors[start : start + 4096])
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).double().square().sum(-1)
        ratio += float((error / x.double().square().sum(-1)).sum())
        errors += float(error.sum())
        spread += float((x - mean).double().square().sum())
        active += float((codes.values > 0).sum())
        fired[codes.features[codes.values > 0]] = True
    return {
        "nmse": ratio / len(vectors),
        "explained_variance": 1 - errors / spread,
        "l0": active / len(vectors),
        "dead_share": 1 - float(fired.float().mean()),
    }


def train_sae(
    activations: Path, out: Path, config: SaeConfig, workers: Workers, *, model: str, layer: int
) -> dict[str, Any]:
    """Train on harvested vectors, write a SAELens directory to `out`; returns held-out metrics.

    Exact resume, as in `train_reward`.

    Raises:
        UserError: unusable activations.
        SaferError: the loss became NaN.
    """
    if workers.size > config.batch_size:
        raise UserError(f"sae: a batch of {config.batch_size} cannot be shared by {workers.size} workers; enlarge it")
    vectors = read_vectors(activations, config)
    sae = new_sae(vectors.train.shape[1], config)
    sample = permutation(len(vectors.train), config.seed, 2**31 - 1)[:8192]
    sae.initialise(_tensor(vectors.train[sample]), config.seed)
    progress = _fit(sae, vectors.train, config, workers)
    if workers.rank == 0:
        save_sae(sae, out, model=model, layer=layer)
    return {
        **sae_quality(sae, vectors.held_out),
        "train_vectors": len(vectors.train),
        "held_out_vectors": len(vectors.held_out),
        "outliers": vectors.outliers,
        "steps": progress.step,
        "workers": workers.size,
        "history": progress.history,
    }


def _fit(sae: TopKSae, x: np.ndarray, config: SaeConfig, workers: Workers) -> SaeProgress:
    rate = config.learning_rate or REFERENCE_LEARNING_RATE / math.sqrt(config.latents / REFERENCE_LATENTS)
    engine = TorchEngine(sae, EngineOptions(learning_rate=rate, max_grad_norm=1.0), workers)
    progress, idle = SaeProgress(), torch.zeros(sae.latents, dtype=torch.int64)
    checkpoint = workers.load(engine)
    if checkpoint is not None:
        progress, idle = SaeProgress(**checkpoint["progress"]), checkpoint["idle"]
    per_epoch = len(x) // config.batch_size
    order, order_epoch = np.empty(0, dtype=np.int64), -1
    while progress.step < config.steps:
        epoch, number = divmod(progress.step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = permutation(len(x), config.seed, epoch), epoch
        rows = order[number * config.batch_size : (number + 1) * config.batch_size]
        mine = my_share(rows, workers)
        result = sae_step(sae, _tensor(x[mine]), idle >= config.dead_after, config.aux_coefficient)
        share = len(mine) / len(rows)
        engine.backward(result.loss * share)
        losses = torch.stack([result.loss.detach(), result.nmse, result.aux]) * share
        sums = workers.sum(torch.cat([losses, result.fired.float()]))
        loss, nmse, aux = (float(value) for value in sums[:3])
        if not math.isfinite(loss):
            raise SaferError(f"sae: the loss is {loss} at step {progress.step}; lower sae.learning_rate")
        remove_parallel_gradient(sae)
        engine.step(warmup_decay(progress.step, config.steps, config.warmup, config.decay))
        sae.normalise_decoder()
        idle += len(rows)
        idle[sums[3:] > 0] = 0
        progress.step += 1
        workers.on_step(progress.step, config.steps)
        if progress.step % 50 == 0 or progress.step == config.steps:
            progress.history.append({"step": progress.step, "nmse": nmse, "aux": aux})
        if workers.due() or progress.step % CHECKPOINT_STEPS == 0:
            workers.save(engine, {"progress": vars(progress), "idle": idle})
    return progress
