"""The training loss of an autoencoder: normalised reconstruction, and the auxiliary loss of dead latents.

Exact gradients without a dense [n, latents] matrix: see `safer_ray.sae.sparse`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safer_ray.sae.model import TopKSae
from safer_ray.sae.sparse import MEMORY_BUDGET, Decode, Encode, Entries
from safer_ray.sae.topk import largest

DENSE_SHARE = 1 / 10  # of dead latents that are active: above it, dense products of them alone are faster


class SaeStep(NamedTuple):
    """The loss terms and which latents fired."""

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    fired: Bool[Tensor, " latents"]


class RelativeError(torch.autograd.Function):
    """Mean over vectors of ||guess - target||^2 / ||target||^2."""

    @staticmethod
    def forward(ctx: Any, guess: Tensor, target: Tensor) -> Tensor:
        error = guess - target
        # A vector of zeros would divide by nothing: it counts as a large error, and stays finite.
        weight = 1 / target.square().sum(-1, keepdim=True).clamp_min(1e-12)
        ctx.save_for_backward(error, weight, target)
        return (error.square().sum(-1, keepdim=True) * weight).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        error, weight, target = ctx.saved_tensors
        scale = weight * (2 * gradients[0] / len(target))
        of_guess = error * scale
        if not ctx.needs_input_grad[1]:
            return of_guess, None
        # d/dt of ||g - t||^2 / ||t||^2: the numerator gives -2 (g - t) / ||t||^2, the denominator the second term.
        return of_guess, -of_guess - target * (scale * weight * error.square().sum(-1, keepdim=True))


def sae_step(
    sae: TopKSae,
    x: Float[Tensor, "n d"],
    dead: Bool[Tensor, " latents"],
    aux_coefficient: float,
    budget: int = MEMORY_BUDGET,
) -> SaeStep:
    """Normalised reconstruction loss, plus the auxiliary loss of dead latents (Gao et al. 2024, arXiv 2406.04093, A.2).

    `dead` marks latents that have not fired for long; they reconstruct the detached residual, without a bias. A
    variant may add a penalty. Temporary
    memory that grows with vectors x latents stays under `budget` bytes.
    """
    codes, penalty = sae.firing(x, budget)
    reconstruction = Decode.apply(codes.values, sae.W_dec, codes.entries, budget) + sae.b_dec
    nmse = RelativeError.apply(reconstruction, x)
    aux = x.new_zeros(())
    # The residual is detached: dead latents learn what the living leave over, these are not pushed to leave more of it.
    if aux_coefficient > 0 and bool(dead.any()):
        aux = auxiliary_loss(sae, x, (x - reconstruction).detach(), dead, budget)
    fired = torch.zeros_like(dead).index_fill_(0, codes.entries.features[codes.values > 0], True)
    return SaeStep(nmse + aux_coefficient * aux + penalty, nmse.detach(), aux.detach(), fired)


def auxiliary_loss(
    sae: TopKSae, x: Float[Tensor, "n d"], residual: Float[Tensor, "n d"], dead: Bool[Tensor, " latents"], budget: int
) -> Float[Tensor, ""]:
    """Return how well the d / 2 largest dead latents of each vector give its residual; 0 is perfect."""
    chosen = dead.nonzero()[:, 0]
    W_enc, b_enc, W_dec = sae.W_enc.T[chosen], sae.b_enc[chosen], sae.W_dec[chosen]
    # Gao et al. take k_aux = d / 2, a power of two near it; fewer where fewer are dead.
    k = min(len(chosen), max(1, sae.d // 2))
    if k >= DENSE_SHARE * len(chosen):
        pre = torch.addmm(b_enc, x - sae.b_dec, W_enc.T)
        if k < len(chosen):
            # By the k-th largest value, which needs no index of all entries; ties let through are a few entries more.
            least = pre.detach().topk(k, dim=-1).values[:, -1:]
            pre = pre.masked_fill(pre < least, 0)
        return RelativeError.apply(pre.relu() @ W_dec, residual)
    # The choice of latents has no gradient, as with TopK itself; their values get theirs from `Encode`.
    with torch.no_grad():
        found = largest(x - sae.b_dec, W_enc, b_enc, k, budget)
    entries = Entries.of(found.features, len(chosen))
    values = Encode.apply(x, sae.b_dec, W_enc.T, b_enc, found.values.relu().view(-1), entries)
    return RelativeError.apply(Decode.apply(values, W_dec, entries, budget), residual)


@torch.no_grad()
def remove_parallel_gradient(directions: Float[Tensor, "n d"]) -> None:
    """Keep decoder directions on the unit sphere to first order: drop the gradient's radial component."""
    gradient = directions.grad
    if gradient is not None:
        # Adam's moments would else hold what only changes lengths, which stay 1 (Bricken et al. 2023).
        gradient.addcmul_((gradient * directions).sum(-1, keepdim=True), directions, value=-1)
