"""The loop that trains a reward model on pairs: split by prompt, resume exactly, keep the best, export."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers, save_reward_model
from safer_ray.reward.forward import trunk_states
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import unpacked
from safer_ray.reward.split import validation_split
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.reward.training_steps import (
    KnownStates,
    OptimizerAdapter,
    OptimizerOptions,
    RewardStep,
    Workers,
    bradley_terry,
    bucketed_batches,
    my_share,
    reward_step,
    warmup_cosine,
)
from safer_ray.storage.artifacts import part_name, read_parts
from safer_ray.storage.files import write_parquet
from safer_ray.storage.quarantine import refuse, refused_rows

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """The progress of a training; all of it is in the checkpoint."""

    step: int = 0
    loss_sum: float = 0.0  # since the last evaluation
    loss_steps: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def pair_texts(pairs: pa.Table) -> Iterator[str]:
    """Every message of every pair, for a tokenizer made on the spot."""
    for column in ("prompt", "chosen", "rejected"):
        for messages in pairs[column].to_pylist():
            yield from (message["content"] for message in messages or [])


class _Batches:
    """Tokenised pairs, and what the frozen blocks make of them, computed once and without dropout."""

    def __init__(self, reward: RewardModel, tokens: list[PairTokens]) -> None:
        reward.model.eval()
        self.tokens = tokens
        self.layer = reward.frozen_layers
        self.states: list[Tensor] = []  # chosen, then rejected of each pair in turn; empty where nothing is frozen
        for start in range(0, len(tokens) if self.layer else 0, 1024):
            sides = both_sides(tokens[start : start + 1024])
            self.states += trunk_states(reward, [unpacked(side.ids, side.types) for side in sides])
        self.lengths = np.array([max(len(t.chosen.ids), len(t.rejected.ids)) for t in self.tokens], dtype=np.int64)

    def __getitem__(self, rows: np.ndarray) -> list[PairTokens]:
        return [self.tokens[i] for i in rows]

    def known(self, rows: np.ndarray) -> KnownStates | None:
        if not self.layer:
            return None
        return KnownStates(self.layer, [self.states[2 * i + side] for side in (0, 1) for i in rows])


def _tokenised(reward: RewardModel, table: pa.Table, out: Path, workers: Workers) -> tuple[pa.Table, list[PairTokens]]:
    """Return the pairs that can be put to a model, with their tokens; the others go to the quarantine in `out`."""
    rows = table.select(["pair_id", "prompt", "chosen", "rejected"])
    found: list[PairTokens | str] = []
    for start in range(0, len(rows), 1024):
        found += reward.pairs.read(rows.slice(start, 1024).to_pylist())
    bad = {i: tokens for i, tokens in enumerate(found) if isinstance(tokens, str)}
    if bad:
        first = next(iter(bad))
        log.warning(
            "reward: %d of %d pairs cannot be put to %s and are left out, the first is pair %r: %s",
            *(len(bad), len(rows), reward.name, rows["pair_id"][first].as_py(), bad[first]),
        )
        if workers.rank == 0:
            write_parquet(refused_rows(refuse(table, bad), "reward"), out / "quarantine" / part_name(0))
    good = [tokens for tokens in found if not isinstance(tokens, str)]
    return table.filter(pa.array([i not in bad for i in range(len(table))], pa.bool_())), good


@dataclass(frozen=True)
class _Training:
    """Everything that a step needs."""

    reward: RewardModel
    engine: OptimizerAdapter
    workers: Workers
    config: RewardConfig
    options: OptimizerOptions


def engine_options(config: RewardConfig, workers: int) -> OptimizerOptions:
    """One of `workers` takes every so-manieth pair of a batch, in equally many micro-batches each step."""
    share = -(-config.batch_size // workers)
    micro = min(config.micro_batch_size, share)
    return OptimizerOptions(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        micro_batches=-(-share // micro),
        micro_batch_size=micro,
        bfloat16=config.dtype == "bfloat16",
    )


@torch.no_grad()
def held_out(training: _Training, batches: _Batches) -> tuple[float, float]:
    """Pairwise accuracy (ties are wrong) and Bradley-Terry loss of held-out pairs, measured by all workers together."""
    workers, size = training.workers, training.config.micro_batch_size
    training.engine.model.eval()
    order = np.argsort(batches.lengths, kind="stable")
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    right = loss = 0.0
    for number in range(-(-len(chunks) // workers.size)):
        mine = number * workers.size + workers.rank
        # Where weights are partitioned (ZeRO 3), a forward pass is a collective: a worker without a chunk runs
        # another's, and does not count it.
        margin = _pass(training, batches, chunks[mine if mine < len(chunks) else 0]).margin
        if mine < len(chunks):
            right += float((margin > 0).sum())
            loss += float(bradley_terry(margin)) * len(margin)
    sums = workers.sum(torch.tensor([right, loss], dtype=torch.float64)) / len(order)
    return float(sums[0]), float(sums[1])


def _pass(training: _Training, batches: _Batches, rows: np.ndarray) -> RewardStep:
    engine = training.engine
    return reward_step(training.reward, batches[rows], engine.autocast, batches.known(rows), engine.model)


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


def _one_step(training: _Training, train: _Batches, rows: np.ndarray) -> float:
    """Forward and backward over this worker's micro-batches of a batch; the loss over all of it.

    Every worker runs equally many micro-batches, as partitioned weights and DeepSpeed's count of them demand; one
    without rows counts nothing.
    """
    share = my_share(rows, training.workers)
    total, size = 0.0, training.options.micro_batch_size
    for number in range(training.options.micro_batches):
        mine = share[number * size : (number + 1) * size]
        if not len(mine) and training.workers.size == 1 and not training.engine.counts_micro_batches:
            continue
        weight = len(mine) / len(rows)
        result = _pass(training, train, mine if len(mine) else rows[:1])
        training.engine.backward(result.loss * weight)
        total += float(result.loss.detach()) * weight
    return float(training.workers.sum(torch.tensor([total], dtype=torch.float64)))


def train_reward(pairs: Path, out: Path, config: RewardConfig, workers: Workers) -> dict[str, Any]:
    """Train on the pairs in `pairs`, export the best weights so far to `out`; returns metrics.

    Exact resume: a run killed anywhere continues from the last checkpoint and ends with the same weights on CPU.

    Raises:
        UserError: no pairs left to train on.
        SaferError: the loss became NaN.
    """
    quiet_transformers()
    table = read_parts(pairs, ["pair_id", "row_key", "prompt", "chosen", "rejected", "group"])
    reward = new_reward_model(config, lambda: pair_texts(table))
    given = len(table)
    table, tokens = _tokenised(reward, table, out, workers)
    held = validation_split(table["group"].to_pylist(), config.validation_percent, config.seed)
    if held.all() or len(table) < 2:
        raise UserError(
            f"reward: no pairs left to train on ({given} in {pairs}, {given - len(table)} of them cannot be put to the "
            "model); check sources and filters"
        )
    if config.frozen_layers:
        reward = reward.freeze(config.frozen_layers)
    train = _Batches(reward, [own for own, out_of in zip(tokens, held, strict=True) if not out_of])
    validation = _Batches(reward, [own for own, out_of in zip(tokens, held, strict=True) if out_of])
    validation = validation if held.any() else train
    if config.gradient_checkpointing:
        model = reward.model  # older versions of transformers know only the second name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    parameters = sum(p.numel() for p in reward.model.parameters())
    options = engine_options(config, workers.size)
    engine = workers.engine(reward.model, options)
    training = _Training(reward, engine, workers, config, options)
    progress = _fit(training, train, validation, out)
    return {
        "train_pairs": len(train.tokens),
        "validation_pairs": len(validation.tokens) if held.any() else 0,
        "refused_pairs": given - len(table),
        "steps": progress.step,
        "best_step": progress.best_step,
        "validation_accuracy": progress.best_accuracy,
        "validation_loss": progress.best_loss,
        "parameters": parameters,
        "frozen_layers": config.frozen_layers,
        "workers": workers.size,
        "history": progress.history,
    }


def _fit(training: _Training, train: _Batches, validation: _Batches, out: Path) -> Progress:
    config, workers, engine = training.config, training.workers, training.engine
    per_epoch, total = _schedule(config, len(train.tokens))
    # Another stream for each worker, since dropout of the same places would tie their gradients together; a checkpoint,
    # which holds its own, overrides it.
    torch.manual_seed(config.seed + 1 + workers.rank)
    checkpoint = workers.load(engine)
    progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()
    marks = {round(total * (i + 1) / config.evaluations) for i in range(config.evaluations)} | {total}
    for rows in _batch_rows(config, train.lengths, progress.step, per_epoch):
        if progress.step >= total:
            break
        engine.model.train()
        loss = _one_step(training, train, rows)
        # Before the step: the weights, and what is exported of them, are still good.
        if not np.isfinite(loss):
            raise SaferError(f"reward: the loss is {loss} at step {progress.step}; lower reward.learning_rate")
        engine.step(warmup_cosine(progress.step, total, config.warmup))
        progress.step += 1
        progress.loss_sum, progress.loss_steps = progress.loss_sum + loss, progress.loss_steps + 1
        workers.on_step(progress.step, total)
        if progress.step in marks:
            _evaluate(training, validation, progress, out)
        if workers.due() or progress.step in marks:
            workers.save(engine, {"progress": vars(progress)})
    return progress


def _evaluate(training: _Training, validation: _Batches, progress: Progress, out: Path) -> None:
    """Measure held-out pairs, and export the weights of lowest held-out loss: it is less noisy than the accuracy."""
    accuracy, held_loss = held_out(training, validation)
    loss = progress.loss_sum / max(1, progress.loss_steps)
    progress.loss_sum, progress.loss_steps = 0.0, 0
    progress.history.append(
        {"step": progress.step, "loss": loss, "validation_accuracy": accuracy, "validation_loss": held_loss}
    )
    if held_loss < progress.best_loss:
        progress.best_accuracy, progress.best_loss, progress.best_step = accuracy, held_loss, progress.step
        weights = training.engine.weights()
        if weights is not None:
            save_reward_model(training.reward, out, weights)
