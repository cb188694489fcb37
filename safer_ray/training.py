"""Pure training steps, schedules, and the small adapter to whatever engine applies the gradients."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safer_ray.errors import SaferError, explain_disk_errors
from safer_ray.reward import RewardModel, pad_batch
from safer_ray.sae import SparseCodes, TopKSae, decode_sparse
from safer_ray.text import PairTokens


class RewardStep(NamedTuple):
    """Of a batch of pairs: the loss, and the reward margins (chosen - rejected; > 0 is right)."""

    loss: Float[Tensor, ""]
    margin: Float[Tensor, " n"]


class SaeStep(NamedTuple):
    """The loss terms and which latents fired."""

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    features: Int[Tensor, "n k"]
    values: Float[Tensor, "n k"]


def bradley_terry(margin: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """-log sigmoid(r_chosen - r_rejected), the mean over pairs."""
    return -nn.functional.logsigmoid(margin).mean()


def reward_step(reward: RewardModel, batch: list[PairTokens]) -> RewardStep:
    """Both sides of a batch through the model at once."""
    sequences = [p.chosen.ids for p in batch] + [p.rejected.ids for p in batch]
    logits = reward.model(**pad_batch(sequences, reward.pad, reward.device)).logits[:, 0].float()
    margin = logits[: len(batch)] - logits[len(batch) :]
    return RewardStep(bradley_terry(margin), margin.detach())


def sae_step(sae: TopKSae, x: Float[Tensor, "n d"], dead: Tensor, aux_coefficient: float) -> SaeStep:
    """Normalised reconstruction loss, plus the auxiliary loss of dead latents (Gao et al. 2024, arXiv 2406.04093, A.2).

    `dead` marks latents [latents] that have not fired for long; they reconstruct the detached residual, without a bias.
    """
    pre = sae.pre_activations(x)
    codes = sae.sparsify(pre)
    residual = x - sae.decode(codes)
    nmse = (residual.square().sum(-1) / x.square().sum(-1)).mean()
    aux = x.new_zeros(())
    n_dead = int(dead.sum())
    if aux_coefficient > 0 and n_dead > 0:
        target = residual.detach()
        values, features = pre.masked_fill(~dead, -torch.inf).topk(min(n_dead, max(1, sae.d // 2)), dim=-1)
        guess = decode_sparse(SparseCodes(features, values.relu()), sae.W_dec)
        aux = ((guess - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()
    return SaeStep(nmse + aux_coefficient * aux, nmse.detach(), aux.detach(), codes.features, codes.values.detach())


def remove_parallel_gradient(sae: TopKSae) -> None:
    """Keep decoder directions on the unit sphere to first order: drop the gradient's radial component."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        with torch.no_grad():
            gradient -= (gradient * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate in [0, 1]: linear up over the share `warmup`, then a half cosine down to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def warmup_decay(step: int, total: int, warmup: float, decay: float) -> float:
    """Factor in [0, 1]: linear up over `warmup`, flat, linear down over the last share `decay`; continuous."""
    rise, fall = max(1, round(total * warmup)), max(1, round(total * decay))
    return min(1.0, (step + 1) / rise, (total - step) / fall)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def bucketed_batches(lengths: np.ndarray, size: int, seed: int, epoch: int, window: int = 16) -> Iterator[np.ndarray]:
    """An epoch's batches: a seeded permutation, sorted by length inside windows of batches, batches shuffled again.

    Every index comes exactly once; the last batch may be short.
    """
    order = permutation(len(lengths), seed, epoch)
    batches = []
    for start in range(0, len(order), size * window):
        chunk = order[start : start + size * window]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    for i in np.random.default_rng([seed, epoch, 1]).permutation(len(batches)):
        yield batches[i]


class TrainEngine(Protocol):
    """What applies gradients: plain torch here, DeepSpeed on a cluster."""

    def backward(self, loss: Tensor) -> None: ...

    def step(self, factor: float) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class TorchEngine:
    """AdamW in one process; the learning rate of a step is `learning_rate * factor`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        decayed = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.module = module
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, foreach=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write beside, then rename; the RNG state goes along."""
    temporary = path.with_name(f".{path.name}")
    with explain_disk_errors(path.parent):
        try:
            torch.save({**state, "rng": torch.get_rng_state()}, temporary)
            temporary.replace(path)
        except RuntimeError as error:  # torch's own writer reports a full disk this way
            raise SaferError(f"cannot write {path}: {str(error).splitlines()[0]}; free some space") from error
        finally:
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The last checkpoint, with its RNG state set again; None where there is none."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["rng"])
    return state
