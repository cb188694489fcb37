"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a threshold for each latent, learned."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safer_ray.config.sae import SaeConfig
from safer_ray.config.sae_variants import JumpReluVariant
from safer_ray.sae.model import ThresholdSae
from safer_ray.sae.sparse import MEMORY_BUDGET
from safer_ray.sae.topk import Found, above, largest_of_batch


def through(surrogate: Tensor) -> Tensor:
    """Zero, with the gradient of `surrogate`: the straight-through estimator."""
    return surrogate - surrogate.detach()


class JumpReluSae(ThresholdSae):
    """z = pre H(pre - threshold), trained towards k active latents a vector.

    H has no gradient; in place of it stands a rectangle of width `bandwidth` about the threshold, which the threshold
    alone learns from. The penalty is `sparsity` (L0 / k - 1)^2 of each vector, the paper's form for a wanted L0.
    """

    def __init__(self, d: int, latents: int, k: int, bandwidth: float = 0.5, sparsity: float = 0.1) -> None:
        super().__init__(d, latents, k)
        self.bandwidth, self.sparsity = bandwidth, sparsity
        self.threshold = nn.Parameter(torch.zeros(latents))

    @classmethod
    def of(cls, d: int, config: SaeConfig) -> Self:
        assert isinstance(config.variant, JumpReluVariant)
        return cls(d, config.latents, config.k, config.variant.bandwidth, config.variant.sparsity_coefficient)

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d"], seed: int) -> None:
        """As TopK, with one threshold for all that leaves the sample k active latents a vector."""
        super().initialise(sample, seed)
        found = largest_of_batch(sample - self.b_dec, self.W_enc.T, self.b_enc, self.k * len(sample))
        if len(found.values):
            self.threshold.fill_(float(found.values.min()))

    def active(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> Found:
        return self.firing(x, budget)[0]

    def firing(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> tuple[Found, Float[Tensor, ""]]:
        """Return what fires, and latents within the rectangle below their threshold with the value 0; then the
        penalty."""
        with torch.no_grad():
            # Latents below their threshold by less give no activation, but the threshold learns from them.
            reach = self.threshold - self.bandwidth / 2
            entries, pre = above(x - self.b_dec, self.W_enc.T, self.b_enc, reach, budget)
        threshold = self.threshold.index_select(0, entries.features)
        distance = pre - threshold.detach()
        on = (distance > 0).to(pre.dtype)
        # Section 3 of the paper: the derivative of H(z) by the threshold is -K((pre - threshold) / bandwidth)
        # / bandwidth, and that of z is threshold times it; K is 1 within a half of 0.
        slope = (distance.abs() < self.bandwidth / 2).to(pre.dtype) / self.bandwidth
        gate = on + through(-threshold * slope)
        l0 = x.new_zeros(len(x)).index_add(0, entries.rows, gate)
        penalty = self.sparsity * (l0 / self.k - 1).square().mean()
        found = self.with_gradient(x, entries, pre * on)
        return Found(entries, found.values + through(-threshold * threshold.detach() * slope)), penalty

    @torch.no_grad()
    def project(self) -> None:
        """A threshold below zero would let no more through, and get no gradient."""
        self.threshold.clamp_(min=0)

    @classmethod
    def reads(cls, saved: Mapping[str, Any]) -> bool:
        trained = (saved.get("metadata") or {}).get("training_architecture")
        return saved.get("architecture") == trained == "jumprelu"

    def layout(self) -> tuple[dict[str, Any], dict[str, Any]]:
        details = {"training_architecture": "jumprelu", "training_architecture_details": {"k": self.k}}
        return {"architecture": "jumprelu"}, details

    @classmethod
    def told(cls, saved: Mapping[str, Any]) -> str:
        k = saved["metadata"]["training_architecture_details"]["k"]
        return f"JumpReLU, a threshold for each latent, trained towards {k} active latents a vector"
