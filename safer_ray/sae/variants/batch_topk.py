"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from safer_ray.config.sae import SaeConfig
from safer_ray.config.sae_variants import BatchTopKVariant
from safer_ray.sae.model import ThresholdSae
from safer_ray.sae.sparse import MEMORY_BUDGET
from safer_ray.sae.topk import Found, above, largest_of_batch

if TYPE_CHECKING:
    from safer_ray.reward.training_steps import Workers


class BatchTopKSae(ThresholdSae):
    """The k n largest activations of a batch of n, however many pieces and workers share it.

    Read vector by vector, what exceeds a threshold is active: the running mean of the smallest activation that made it
    into a batch in training. SAELens calls such a one, once trained, `jumprelu`.
    """

    batches: Tensor

    def __init__(self, d: int, latents: int, k: int, rate: float = 0.01) -> None:
        super().__init__(d, latents, k)
        self.rate = rate
        self.cut: float | None = None  # least activation that is active in the batch under way, where it has pieces
        self.register_buffer("threshold", torch.zeros(latents))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @classmethod
    def of(cls, d: int, config: SaeConfig) -> Self:
        assert isinstance(config.variant, BatchTopKVariant)
        return cls(d, config.latents, config.k, config.variant.threshold_rate)

    @torch.no_grad()
    def decide(self, pieces: Sequence[Float[Tensor, "n d"]], workers: "Workers | None") -> None:
        """Find from which activation on latents are active in the whole batch; in training mode the threshold learns
        from it. The pieces are encoded twice for it; where the batch is one piece, `active` decides."""
        self.cut = None
        if workers is None:
            return
        rows = int(workers.sum(torch.tensor([float(sum(map(len, pieces)))], dtype=torch.float64))[0])
        best = self.b_enc.new_empty(0, dtype=torch.float32)
        for x in pieces:
            found = largest_of_batch(x - self.b_dec, self.W_enc.T, self.b_enc, self.k * rows)
            best = torch.cat([best, found.values.float()])
            best = best.topk(min(self.k * rows, len(best)), sorted=False).values
        self.cut = nth_largest(best, self.k * rows, workers.sum)
        if self.training and self.cut < torch.inf:
            self._learn(torch.tensor(self.cut, device=self.threshold.device))

    def active(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> Found:
        """Return what fires of a batch, or of a piece of the one that was decided on, with gradients; of a batch in
        training mode the threshold learns."""
        with torch.no_grad():
            if self.cut is not None:
                # Strictly above the float below it: from the cut itself on.
                below = torch.nextafter(torch.tensor(self.cut), torch.tensor(0.0)).to(self.threshold)
                found = above(x - self.b_dec, self.W_enc.T, self.b_enc, below.expand_as(self.threshold), budget)
            else:
                found = largest_of_batch(x - self.b_dec, self.W_enc.T, self.b_enc, self.k * len(x), budget)
                if self.training and len(found.values):
                    self._learn(found.values.min())
        return self.with_gradient(x, *found)

    def _learn(self, least: Tensor) -> None:
        self.batches += 1
        self.threshold.lerp_(least.to(self.threshold).expand_as(self.threshold), max(self.rate, 1 / int(self.batches)))

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


def nth_largest(values: Float[Tensor, " m"], n: int, total: Callable[[Tensor], Tensor]) -> float:
    """Return the n-th largest of the positive float32 values of all workers, of which `values` are this one's and
    `total` sums a tensor over all; the least of all, where there are fewer; infinity, where there are none.
    """
    # Positive floats order as their bits: eight of these are decided in a round, by a sum of histograms.
    bits, found = values.view(torch.int32).to(torch.int64), 0
    left = min(n, int(total(torch.tensor([float(len(bits))], dtype=torch.float64))[0]))
    if not left:
        return float("inf")
    for shift in (24, 16, 8, 0):
        alike = bits[bits >> (shift + 8) == found]
        counts = total(torch.bincount((alike >> shift) & 255, minlength=256).double().cpu())
        reached = counts.flip(0).cumsum(0)  # by the byte from above
        byte = 255 - int((reached < left).sum())
        left -= int(reached[255 - byte] - counts[byte])
        found = found << 8 | byte
    return float(torch.tensor([found], dtype=torch.int32).view(torch.float32))
