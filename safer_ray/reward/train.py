"""The loop that trains a reward model on pairs: split by prompt, resume exactly, keep the best, export."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers, save_reward_model
from safer_ray.reward.ending import saves_first
from safer_ray.reward.frozen_states import FrozenStates, frozen_states
from safer_ray.reward.lora import add_lora
from safer_ray.reward.loss import bradley_terry, label_margins, loss_of
from safer_ray.reward.model import RewardModel
from safer_ray.reward.text import PairTokens
from safer_ray.reward.training_pairs import TrainingPairs, all_texts, open_tokenised, tokenise
from safer_ray.reward.training_steps import (
    KnownStates,
    OptimizerAdapter,
    OptimizerOptions,
    RewardStep,
    Workers,
    bucketed_batches,
    my_share,
    reward_step,
    warmup_cosine,
)


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


class _Batches:
    """Tokenised pairs, and what the frozen blocks make of them, where there are any."""

    def __init__(self, pairs: TrainingPairs, layer: int = 0, states: FrozenStates | None = None) -> None:
        self.pairs, self.layer, self.states = pairs, layer, states
        self.lengths = pairs.lengths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: np.ndarray) -> list[PairTokens]:
        return self.pairs[rows]

    def known(self, rows: np.ndarray) -> KnownStates | None:
        return None if self.states is None else KnownStates(self.layer, self.states[self.pairs.numbers[rows]])


@dataclass(frozen=True)
class _Training:
    """Everything that a step needs."""

    reward: RewardModel
    engine: OptimizerAdapter
    workers: Workers
    config: RewardConfig
    options: OptimizerOptions
    label_margins: Tensor | None = None  # of the pairs that are trained on, where the loss reads them


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


def _pass(training: _Training, batches: _Batches, rows: np.ndarray, label_margins: Tensor | None = None) -> RewardStep:
    engine, loss = training.engine, loss_of(training.config)
    known = batches.known(rows)
    return reward_step(training.reward, batches[rows], engine.autocast, known, engine.model, loss, label_margins)


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
        run = mine if len(mine) else rows[:1]
        margins = training.label_margins[run] if training.label_margins is not None else None
        result = _pass(training, train, run, margins)
        training.engine.backward(result.loss * weight)
        total += float(result.loss.detach()) * weight
    return float(training.workers.sum(torch.tensor([total], dtype=torch.float64)))


def train_reward(pairs: Path, out: Path, config: RewardConfig, workers: Workers) -> dict[str, Any]:
    """Train on the pairs in `pairs`, export the best weights so far to `out`; returns metrics.

    Exact resume: a run killed anywhere continues from the last checkpoint and ends with the same weights on CPU.

    Raises:
        UserError: no pairs left to train on, fewer than there are workers, or no room for what frozen blocks give.
        SaferError: the loss became NaN.
    """
    quiet_transformers()
    reward = new_reward_model(config, lambda: all_texts(pairs), in_files=workers.partitions)
    tokenise(pairs, out, reward, config, workers)
    found, given = open_tokenised(pairs, workers.state, reward.name)
    trained, held = found.split()
    if not len(trained) or len(found) < 2:
        raise UserError(
            f"reward: no pairs left to train on ({given} in {pairs}, {given - len(found)} of them cannot be put to the "
            "model); check sources and filters"
        )
    if workers.size > len(trained):
        raise UserError(
            f"reward: {workers.size} workers for {len(trained)} pairs to train on: some would have none; lower "
            "ray.train_workers, or train on more pairs"
        )
    margins = None
    if config.loss == "margin":
        margins = label_margins(config, trained.columns(["pair_id", "label_margin"]))
    states = None
    if config.frozen_layers:
        reward = reward.freeze(config.frozen_layers)
        reward.model.eval()  # so that they are without dropout
        states = frozen_states(reward, found, workers, config.frozen_states_gb)
    if config.lora is not None:
        reward = replace(add_lora(reward, config.lora, config.seed), is_cut=config.blocks is not None)
    train = _Batches(trained, reward.frozen_layers, states)
    validation = _Batches(held, reward.frozen_layers, states) if len(held) else train
    if config.gradient_checkpointing:
        model = reward.model  # older versions of transformers know only the second name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    parameters = sum(p.numel() for p in reward.model.parameters())
    changed = sum(p.numel() for p in reward.model.parameters() if p.requires_grad)
    options = engine_options(config, workers.size)
    engine = workers.engine(reward.model, options)
    training = _Training(reward, engine, workers, config, options, margins)
    with saves_first():
        progress = _fit(training, train, validation, out)
    return {
        "train_pairs": len(trained),
        "validation_pairs": len(held),
        "refused_pairs": given - len(found),
        "steps": progress.step,
        "best_step": progress.best_step,
        "validation_accuracy": progress.best_accuracy,
        "validation_loss": progress.best_loss,
        "parameters": parameters,
        "trained_parameters": changed,
        "frozen_layers": config.frozen_layers,
        "workers": workers.size,
        "history": progress.history,
    }


def _fit(training: _Training, train: _Batches, validation: _Batches, out: Path) -> Progress:
    config, workers, engine = training.config, training.workers, training.engine
    per_epoch, total = _schedule(config, len(train))
    # Another stream for each worker, since dropout of the same places would tie their gradients together; a checkpoint,
    # which holds its own, overrides it.
    torch.manual_seed(config.seed + 1 + workers.rank)
    checkpoint = workers.load(engine)
    if checkpoint and checkpoint.get("pairs") not in (None, train.pairs.checksum):
        raise UserError(
            "reward: the unfinished training was on other pairs than are there now; put back those that it began with, "
            "or start again with --fresh"
        )
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
        if workers.due(wanted=progress.step in marks):
            workers.save(engine, {"progress": vars(progress), "pairs": train.pairs.checksum})
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
