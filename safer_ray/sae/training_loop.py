"""The loop that trains an SAE: data parallel, in micro-batches, resumed to the bit at the same number of workers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from safer_ray.config.sections import SaeConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward.ending import saves_first
from safer_ray.reward.training_steps import OptimizerOptions, Workers, warmup_decay
from safer_ray.sae.data import Batch, Order, held_out_vectors
from safer_ray.sae.log import Clock, SaeLog
from safer_ray.sae.loss import sae_step
from safer_ray.sae.model import TopKSae
from safer_ray.sae.optimizer import SaeOptimizer
from safer_ray.sae.quality import sae_quality

CHECKPOINT_STEPS = 250  # between two, where there is time for them
REFERENCE_LEARNING_RATE = 2e-4  # at REFERENCE_LATENTS, by the 1/sqrt(latents) rule
REFERENCE_LATENTS = 2**14
MAX_GRAD_NORM = 1.0
CURVE = 100  # points of the training curves
HELD_CURVE = 20  # points of the held-out curve
HELD_CURVE_VECTORS = 2048  # that it is measured on
MICRO_BATCH_SLACK = 1 / 8  # of a micro-batch, that may be in it beyond its size


@dataclass
class SaeProgress:
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def reference_rate(latents: int) -> float:
    """2e-4 / sqrt(latents / 2^14) (Gao et al. 2024, arXiv 2406.04093)."""
    return REFERENCE_LEARNING_RATE / math.sqrt(latents / REFERENCE_LATENTS)


class _Training:
    """The state of a training: all that a step needs, and what of it is in the checkpoint."""

    def __init__(self, sae: TopKSae, order: Order, config: SaeConfig, workers: Workers) -> None:
        self.sae, self.order, self.config, self.workers = sae, order, config, workers
        rate = config.learning_rate or reference_rate(config.latents)
        options = OptimizerOptions(rate, max_grad_norm=MAX_GRAD_NORM, bfloat16=config.dtype == "bfloat16")
        self.engine = SaeOptimizer(sae, options, workers)
        self.progress = SaeProgress()
        self.idle = torch.zeros(sae.latents, dtype=torch.int64, device=workers.device)  # vectors since a latent fired
        checkpoint = workers.load(self.engine)
        if checkpoint is not None:
            # The order of batches is a permutation of as many rows: with others, step n would be on other vectors.
            if checkpoint["vectors"] != order.rows:
                raise UserError(
                    f"sae: the unfinished training was on {checkpoint['vectors']} vectors, {order.vectors.source} has "
                    f"{order.rows}; put back what it began with, or start again with --fresh"
                )
            self.progress, self.idle = SaeProgress(**checkpoint["progress"]), checkpoint["idle"].to(workers.device)

    def save(self) -> None:
        state = {"progress": vars(self.progress), "idle": self.idle, "vectors": self.order.rows}
        self.workers.save(self.engine, state)

    def step(self, batch: Batch) -> dict[str, float]:
        """One step on a batch; the loss terms over all workers.

        Raises:
            SaferError: the loss is no number.
        """
        # One reduction carries gradients, losses and who fired: all workers see the same, and decide alike.
        sums = self.engine.reduce_gradients(self._gradients(batch))
        loss, nmse, aux = (float(value) for value in sums[:3])
        step, config = self.progress.step, self.config
        # Before the step: the weights, and the checkpoint of them, are still those of the last good step.
        if not math.isfinite(loss):
            raise SaferError(f"sae: the loss is {loss} at step {step}; lower sae.learning_rate")
        factor = warmup_decay(step, config.steps, config.warmup, config.decay)
        self.engine.step(factor)
        # In vectors and over all workers, so that neither the batch size nor their number changes who counts as dead.
        self.idle += batch.rows
        self.idle[sums[3:] > 0] = 0
        self.progress.step += 1
        rate = self.engine.options.learning_rate * factor
        dead = float((self.idle >= config.dead_vectors).double().mean())
        return {"step": self.progress.step, "nmse": nmse, "aux": aux, "dead": dead, "learning_rate": rate}

    def _gradients(self, batch: Batch) -> Tensor:
        """This worker's share of the gradients; of loss, nmse and aux, then which latents fired, [3 + latents]."""
        dead = self.idle >= self.config.dead_vectors
        losses = torch.zeros(3, device=self.workers.device)
        fired = torch.zeros_like(dead)
        cut = _pieces(batch.x, self.config.micro_batch_size or len(batch.x))
        pieces = [x.to(self.workers.device).float() for x in cut]
        device = self.workers.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.engine.autocast):
            self.sae.decide(pieces, None if self.workers.size == 1 and len(pieces) == 1 else self.workers)
        for x in pieces:
            with torch.autocast(device, torch.bfloat16, enabled=self.engine.autocast):
                found = sae_step(self.sae, x, dead, self.config.aux_coefficient)
            # Of the whole batch, not of this worker's part: over pieces and workers it sums to the batch's mean.
            share = len(x) / batch.rows
            self.engine.backward(found.loss * share)
            losses += torch.stack([found.loss.detach(), found.nmse, found.aux]) * share
            fired |= found.fired
        return torch.cat([losses, fired.float()])


def _pieces(x: np.ndarray, size: int) -> Iterator[Tensor]:
    """Equal shares of `size` vectors, or an eighth more: a worker's share of a batch varies, and a piece of a few
    vectors would cost as much as any where all latents' gradients are written."""
    count = math.ceil(len(x) / max(1, size) - MICRO_BATCH_SLACK)
    return map(torch.from_numpy, np.array_split(x, max(1, count)) if len(x) else [])


def fit(sae: TopKSae, order: Order, config: SaeConfig, workers: Workers, out: Path) -> tuple[SaeProgress, Clock]:
    """Train `sae` in place, from the last checkpoint on where there is one; the first worker writes curves to `out`.

    Raises:
        UserError: the checkpoint is of another shape, or of other vectors.
        SaferError: the loss became NaN, or the disk is full.
    """
    training = _Training(sae, order, config, workers)
    progress = training.progress
    log = SaeLog(out, config.tensorboard, progress.step) if workers.rank == 0 else None
    # From the step of the checkpoint on: the order is a function of seed and step, nothing of it is stored.
    with saves_first(), order.batches(progress.step) as batches:
        held = _held_sample(order, config.seed) if log else None
        clock = Clock()
        while progress.step < config.steps:
            entry = training.step(clock.take(batches))
            workers.on_step(progress.step, config.steps)
            if log is not None and held is not None and is_mark(progress.step, config.steps, HELD_CURVE):
                entry["held_out_nmse"] = sae_quality(sae, [held]).nmse
            if is_mark(progress.step, config.steps, CURVE):
                progress.history.append(entry)
                if log is not None:
                    log.add(entry)
            # `due` first: it is a collective, which every worker has to enter at the same step.
            if workers.due(wanted=progress.step % CHECKPOINT_STEPS == 0):
                training.save()
                if log is not None:
                    log.write(progress.history)
    clock.stop()
    if log is not None:
        log.close()
    return progress, clock


def is_mark(step: int, steps: int, count: int) -> bool:
    """Return whether a step is the last of one of `count` equal shares of all steps."""
    return step * count // steps > (step - 1) * count // steps


def _held_sample(order: Order, seed: int) -> np.ndarray:
    found = list(held_out_vectors(order.vectors, seed, HELD_CURVE_VECTORS))
    return np.concatenate(found)[:HELD_CURVE_VECTORS]
