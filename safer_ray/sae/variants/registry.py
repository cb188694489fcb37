"""Every variant of the autoencoder: made as a config says, and known again by what stands beside its weights.

A variant is one file here, its settings in `safer_ray.config.sae_variants` (a config needs no torch), and an entry
below.
"""

from collections.abc import Mapping
from typing import Any

from safer_ray.config.sae import SaeConfig
from safer_ray.sae.model import TopKSae
from safer_ray.sae.variants.batch_topk import BatchTopKSae
from safer_ray.sae.variants.jumprelu import JumpReluSae
from safer_ray.sae.variants.signed_topk import SignedTopKSae

VARIANTS: dict[str, type[TopKSae]] = {"topk": TopKSae, "batch_topk": BatchTopKSae, "jumprelu": JumpReluSae}


def new_sae(d: int, config: SaeConfig) -> TopKSae:
    """An SAE of the configured variant, all weights zero."""
    return VARIANTS[config.variant.kind].of(d, config)


def variant_of(saved: Mapping[str, Any]) -> type[TopKSae] | None:
    """The variant that a `cfg.json` is of, None for none that is known."""
    known: tuple[type[TopKSae], ...] = (
        SignedTopKSae,
        *reversed(VARIANTS.values()),
    )  # a later one asks for more than those before it
    return next((variant for variant in known if variant.reads(saved)), None)
