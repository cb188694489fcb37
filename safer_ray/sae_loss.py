"""The training loss of an autoencoder: normalised reconstruction, and the auxiliary loss of dead latents."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safer_ray.sae import SparseCodes, TopKSae, decode_sparse


class SaeStep(NamedTuple):
    """The loss terms and which latents fired."""

    loss: Float[Tensor, ""]
    nmse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    fired: Bool[Tensor, " latents"]


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
    fired = torch.zeros_like(dead).index_fill_(0, codes.features[codes.values > 0], True)
    return SaeStep(nmse + aux_coefficient * aux, nmse.detach(), aux.detach(), fired)


def remove_parallel_gradient(sae: TopKSae) -> None:
    """Keep decoder directions on the unit sphere to first order: drop the gradient's radial component."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        with torch.no_grad():
            gradient -= (gradient * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec
