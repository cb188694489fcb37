"""The loop that trains a reward model on pairs: split by prompt, resume exactly, keep the best, export."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from safer_ray.artifacts import read_parts
from safer_ray.config import RewardConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward import RewardModel, new_reward_model, quiet_transformers, save_reward_model
from safer_ray.text import PairTokens
from safer_ray.training import (
    TorchEngine,
    TrainEngine,
    bradley_terry,
    bucketed_batches,
    load_checkpoint,
    reward_step,
    save_checkpoint,
    warmup_cosine,
)

CHECKPOINT_SECONDS = 60.0
OnStep = Callable[[int, int], None]


@dataclass
class Progress:
    """Where training stands; all of it is in the checkpoint."""

    step: int = 0
    loss_sum: float = 0.0  # since the last evaluation
    loss_steps: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def validation_split(groups: list[str], percent: float, seed: int) -> np.ndarray:
    """True for held-out rows; all rows of a prompt group fall on the same side."""
    digests = [int(hashlib.sha256(f"{seed}:{g}".encode()).hexdigest()[:8], 16) % 10_000 for g in groups]
    return np.array(digests, dtype=np.int64) < percent * 100


def pair_texts(pairs: pa.Table) -> Iterator[str]:
    """Every message of every pair, for a tokenizer made on the spot."""
    for column in ("prompt", "chosen", "rejected"):
        for messages in pairs[column].to_pylist():
            yield from (message["content"] for message in messages or [])


class _Batches:
    """Tokenised pairs by row, tokenised once."""

    def __init__(self, reward: RewardModel, pairs: pa.Table) -> None:
        rows = pairs.select(["pair_id", "prompt", "chosen", "rejected"])
        self.tokens: list[PairTokens] = []
        for start in range(0, len(rows), 1024):
            self.tokens += reward.pairs(rows.slice(start, 1024).to_pylist())
        self.lengths = np.array([max(len(t.chosen.ids), len(t.rejected.ids)) for t in self.tokens], dtype=np.int64)

    def __getitem__(self, rows: np.ndarray) -> list[PairTokens]:
        return [self.tokens[i] for i in rows]


def held_out(reward: RewardModel, batches: _Batches) -> tuple[float, float]:
    """Pairwise accuracy (ties are wrong) and Bradley-Terry loss of held-out pairs."""
    reward.model.eval()
    sequences = [side.ids for pair in batches.tokens for side in (pair.chosen, pair.rejected)]
    rewards = reward.forward(sequences).rewards
    assert rewards is not None
    margin = rewards[0::2] - rewards[1::2]
    return float((margin > 0).float().mean()), float(bradley_terry(margin))


def _schedule(config: RewardConfig, rows: int) -> tuple[int, int]:
    per_epoch = max(1, -(-rows // config.batch_size))
    return per_epoch, max(1, round(per_epoch * config.epochs))


def _batch_rows(config: RewardConfig, lengths: np.ndarray, step: int, per_epoch: int) -> Iterator[np.ndarray]:
    """Batches from global `step` on, over epochs without end."""
    epoch, skip = divmod(step, per_epoch)
    while True:
        for number, rows in enumerate(bucketed_batches(lengths, config.batch_size, config.seed, epoch)):
            if number >= skip:
                yield rows
        epoch, skip = epoch + 1, 0


def _one_step(reward: RewardModel, engine: TrainEngine, config: RewardConfig, batch: list[PairTokens]) -> float:
    """Forward and backward over the micro-batches of a batch; the loss."""
    total = 0.0
    for start in range(0, len(batch), config.micro_batch_size):
        micro = batch[start : start + config.micro_batch_size]
        result = reward_step(reward, micro)
        engine.backward(result.loss * (len(micro) / len(batch)))
        total += float(result.loss.detach()) * len(micro) / len(batch)
    return total


def train_reward(
    pairs: Path, out: Path, state: Path, config: RewardConfig, on_step: OnStep = lambda step, total: None
) -> dict[str, Any]:
    """Train on the pairs in `pairs`, export to `out`, keep checkpoints in `state`; returns metrics.

    Exact resume: a run killed anywhere continues from the last checkpoint and ends with the same weights on CPU.

    Raises:
        UserError: no pairs left to train on.
        SaferError: the loss became NaN.
    """
    quiet_transformers()
    table = read_parts(pairs, ["pair_id", "prompt", "chosen", "rejected", "group"])
    reward = new_reward_model(config, lambda: pair_texts(table))
    held = validation_split(table["group"].to_pylist(), config.validation_percent, config.seed)
    if held.all() or len(table) < 2:
        raise UserError(f"reward: no pairs left to train on ({len(table)} in {pairs}); check sources and filters")
    train = _Batches(reward, table.filter(pa.array(~held)))
    validation = _Batches(reward, table.filter(pa.array(held))) if held.any() else train
    if config.gradient_checkpointing:
        model = reward.model  # older versions of transformers know only the second name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    engine = TorchEngine(
        reward.model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    progress = _fit(reward, engine, config, train, validation, state, on_step)
    best = torch.load(state / "best.pt", weights_only=True)
    reward.model.load_state_dict(best["module"])
    reward.model.eval()
    save_reward_model(reward, out)
    return {
        "train_pairs": len(train.tokens),
        "validation_pairs": len(validation.tokens) if held.any() else 0,
        "steps": progress.step,
        "best_step": progress.best_step,
        "validation_accuracy": progress.best_accuracy,
        "validation_loss": progress.best_loss,
        "parameters": sum(p.numel() for p in reward.model.parameters()),
        "history": progress.history,
    }


def _fit(
    reward: RewardModel,
    engine: TrainEngine,
    config: RewardConfig,
    train: _Batches,
    validation: _Batches,
    state: Path,
    on_step: OnStep,
) -> Progress:
    per_epoch, total = _schedule(config, len(train.tokens))
    progress = Progress()
    torch.manual_seed(config.seed + 1)
    checkpoint = load_checkpoint(state / "last.pt")
    if checkpoint is not None:
        engine.restore(checkpoint["engine"])
        progress = Progress(**checkpoint["progress"])
    marks = {round(total * (i + 1) / config.evaluations) for i in range(config.evaluations)} | {total}
    saved = time.monotonic()
    for rows in _batch_rows(config, train.lengths, progress.step, per_epoch):
        if progress.step >= total:
            break
        reward.model.train()
        loss = _one_step(reward, engine, config, train[rows])
        if not np.isfinite(loss):
            raise SaferError(f"reward: the loss is {loss} at step {progress.step}; lower reward.learning_rate")
        engine.step(warmup_cosine(progress.step, total, config.warmup))
        progress.step += 1
        progress.loss_sum, progress.loss_steps = progress.loss_sum + loss, progress.loss_steps + 1
        on_step(progress.step, total)
        if progress.step in marks:
            _evaluate(reward, engine, validation, progress, state)
        if progress.step in marks or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint({"engine": engine.state(), "progress": vars(progress)}, state / "last.pt")
            saved = time.monotonic()
    return progress


def _evaluate(reward: RewardModel, engine: TrainEngine, validation: _Batches, progress: Progress, state: Path) -> None:
    """Measure held-out pairs, and keep the weights of lowest held-out loss: it is less noisy than the accuracy."""
    accuracy, held_loss = held_out(reward, validation)
    loss = progress.loss_sum / max(1, progress.loss_steps)
    progress.loss_sum, progress.loss_steps = 0.0, 0
    progress.history.append(
        {"step": progress.step, "loss": loss, "validation_accuracy": accuracy, "validation_loss": held_loss}
    )
    if held_loss < progress.best_loss:
        progress.best_accuracy, progress.best_loss, progress.best_step = accuracy, held_loss, progress.step
        save_checkpoint({"module": engine.state()["module"]}, state / "best.pt")
