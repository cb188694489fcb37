"""Apply an SAE's gradients: AdamW under a bounded norm, with decoder directions kept on the unit sphere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safer_ray.reward.training_steps import TORCH, OptimizerOptions, Workers, check_shapes, save_tensors, share
from safer_ray.sae.loss import remove_parallel_gradient
from safer_ray.sae.model import TopKSae, normalise_rows


class SaeOptimizer:
    """Every worker holds the SAE whole and applies the gradients of its own range of latents, whose moments it alone
    keeps (ZeRO stage 1, Rajbhandari et al. 2020, arXiv 1910.02054); biases, and what else a variant
    trains, are updated by all alike.
    """

    def __init__(self, sae: TopKSae, options: OptimizerOptions, workers: Workers) -> None:
        self.sae, self.options, self.workers = sae, options, workers
        self.autocast = options.bfloat16
        mine = share(sae.latents, workers.rank, workers.size)
        self.encoder = nn.Parameter(sae.W_enc.data.T[mine])  # [own latents, d] in the SAE's own memory
        self.decoder = nn.Parameter(sae.W_dec.data[mine])
        self.alike = [value for name, value in sae.named_parameters() if name not in ("W_enc", "W_dec")]
        trained = [self.encoder, self.decoder, *self.alike]
        self.optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient; a step's losses sum to its share of the mean over the whole batch."""
        loss.backward()

    def reduce_gradients(self, others: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Sum over the workers what `backward` added up, for each of them its part, and `others` for all."""
        sae, sizes = self.sae, [len(others), *map(len, self.alike)]
        encoder, decoder, *alike = map(_gradient, (sae.W_enc, sae.W_dec, *self.alike))
        others, *alike = self.workers.sum(torch.cat([others, *alike])).split(sizes)
        self.encoder.grad, self.decoder.grad = self.workers.reduce_scatter([encoder.T, decoder])
        for parameter, gradient in zip(self.alike, alike, strict=True):
            parameter.grad = gradient
        sae.W_enc.grad = sae.W_dec.grad = None
        return others

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply the collected gradients at `learning_rate * factor`, on all workers."""
        remove_parallel_gradient(self.decoder)
        self._limit()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        normalise_rows(self.decoder)
        self.sae.project()
        # Transposed it is contiguous, [latents, d], so that a worker's latents are one block of memory to send.
        self.workers.all_gather([self.sae.W_enc.T, self.sae.W_dec])

    def _limit(self) -> None:
        """Scale the gradients down to `max_grad_norm`, as `nn.utils.clip_grad_norm_` does."""
        if self.options.max_grad_norm is None:
            return
        shared = [self.encoder, self.decoder]
        # Each worker has its rows of encoder and decoder, and all have the whole of what is alike: that counts once.
        norm = (self.workers.sum(_square(shared)) + _square(self.alike)).sqrt()
        if norm > self.options.max_grad_norm:
            for parameter in shared + self.alike:
                _gradient(parameter).mul_(self.options.max_grad_norm / norm)

    def save(self, directory: Path) -> None:
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.workers.rank == 0:
            state["module"] = self.sae.state_dict()
        save_tensors(state, _file(directory, self.workers.rank))

    def load(self, directory: Path) -> None:
        """Raises UserError: the checkpoint is of an SAE of another shape."""
        # The weights are in the first worker's file alone, since all hold the same; each has its own moments.
        for rank in {0, self.workers.rank}:
            state = torch.load(_file(directory, rank), weights_only=True, map_location="cpu")
            if "module" in state:
                check_shapes(self.sae, state["module"], directory.parent)
                self.sae.load_state_dict(state["module"])
            if rank == self.workers.rank:
                self.optimizer.load_state_dict(state["optimizer"])


def _gradient(parameter: Tensor) -> Tensor:
    """Zero where a worker had no vectors."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _square(parameters: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The squared norm of their gradients."""
    return torch.stack([_gradient(parameter).norm() for parameter in parameters]).square().sum()


def _file(directory: Path, rank: int) -> Path:
    return directory / (f"torch-{rank}.pt" if rank else TORCH)
