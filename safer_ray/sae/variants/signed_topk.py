"""TopK as the published SAFER code has it. It is read, never trained."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from safer_ray.sae.model import PUBLISHED_EPSILON, TopKSae


class SignedTopKSae(TopKSae):
    """As the published SAFER code has it: negative activations among the k largest stay."""

    epsilon = PUBLISHED_EPSILON
    warning = """
SAELens cuts negative activations off, which this SAE keeps; it also standardises with an epsilon of 1e-5 where this one
was trained with 1e-6.
"""

    @classmethod
    def reads(cls, saved: Mapping[str, Any]) -> bool:
        return super().reads(saved) and bool((saved.get("metadata") or {}).get("safer_ray_signed"))

    def layout(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return super().layout()[0], {"safer_ray_signed": True}

    @classmethod
    def told(cls, saved: Mapping[str, Any]) -> str:
        return f"{super().told(saved)}, negative ones kept"

    def _cut(self, values: Tensor) -> Tensor:
        return values
