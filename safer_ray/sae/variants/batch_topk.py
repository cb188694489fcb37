"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410)."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from safer_ray.config.sae import SaeConfig
from safer_ray.config.sae_variants import BatchTopKVariant
from safer_ray.sae.model import ThresholdSae
from safer_ray.sae.sparse import MEMORY_BUDGET
from safer_ray.sae.topk import Found, largest_of_batch


class BatchTopKSae(ThresholdSae):
    """The k n largest activations of a batch of n.

    Read vector by vector, what exceeds a threshold is active: the running mean of the smallest activation that made it
    into a batch in training. SAELens calls such a one, once trained, `jumprelu`.
    """

    batches: Tensor

    def __init__(self, d: int, latents: int, k: int, rate: float = 0.01) -> None:
        super().__init__(d, latents, k)
        self.rate = rate
        self.register_buffer("threshold", torch.zeros(latents))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @classmethod
    def of(cls, d: int, config: SaeConfig) -> Self:
        assert isinstance(config.variant, BatchTopKVariant)
        return cls(d, config.latents, config.k, config.variant.threshold_rate)

    def active(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> Found:
        """Return what fires of a batch while training, with gradients; in training mode the threshold learns from
        it."""
        with torch.no_grad():
            found = largest_of_batch(x - self.b_dec, self.W_enc.T, self.b_enc, self.k * len(x), budget)
            if self.training and len(found.values):
                self.batches += 1
                self.threshold.lerp_(
                    found.values.min().expand_as(self.threshold), max(self.rate, 1 / int(self.batches))
                )
        return self.with_gradient(x, *found)

    @classmethod
    def reads(cls, saved: Mapping[str, Any]) -> bool:
        """Also a checkpoint of SAELens' training, `batchtopk`, and thresholds whose training is unknown."""
        return saved.get("architecture") in ("jumprelu", "batchtopk")

    def layout(self) -> tuple[dict[str, Any], dict[str, Any]]:
        details = {"training_architecture": "batchtopk", "training_architecture_details": {"k": self.k}}
        return {"architecture": "jumprelu"}, details

    def saved_weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name != "batches"}

    @classmethod
    def restored(cls, weights: dict[str, Tensor], k: int) -> Self:
        if "topk_threshold" in weights:
            weights["threshold"] = weights.pop("topk_threshold").expand(len(weights["W_dec"]))
        return super().restored(weights | {"batches": torch.zeros((), dtype=torch.long)}, k)

    @classmethod
    def told(cls, saved: Mapping[str, Any]) -> str:
        k = saved["metadata"]["training_architecture_details"]["k"]
        return f"BatchTopK, {k} active latents a vector on average; saved as JumpReLU with its threshold"
