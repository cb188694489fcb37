"""The section `sae` of a config: how an SAE is trained. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safer_ray.config.sae_variants import SaeVariant, TopKVariant
from safer_ray.config.values import Frozen, LocalName, Share

MOST_LATENTS = 2**26  # more than any SAE that is known has; what counts them takes about 100 bytes each
DEAD_AFTER = 10_000_000  # vectors, at most (Gao et al. 2024, arXiv 2406.04093, have 10 million tokens)


class WarmStartConfig(Frozen):
    """A first stage of training an SAE, on the vectors of all tokens of general text, from which the second goes on."""

    text: LocalName
    """A file with a text a line, or JSONL rows with a `text` (these also .gz or .zst)."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Only so many first texts. Default: all."""
    steps: Annotated[int, Field(gt=0)] = 1000
    """Steps of the first stage."""
    batch_size: Annotated[int, Field(gt=0)] = 1024
    """Vectors a step."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate. Default: 2e-4 / sqrt(latents / 2^14)."""
    warmup: Share = 0.05
    """Share of the steps in which it rises."""
    decay: Share = 0.2
    """Share of the steps, the last, in which it falls to 0."""


class SaeConfig(Frozen):
    """Choose how the autoencoder is trained."""

    # What `warm_start` makes is an input.
    unrecorded: ClassVar = frozenset({"micro_batch_size", "tensorboard", "warm_start"})

    variant: SaeVariant = TopKVariant()
    """Which latents of a vector stay."""
    latents: Annotated[int, Field(gt=0, le=MOST_LATENTS)] = 1024
    """Width of the autoencoder."""
    k: Annotated[int, Field(gt=0)] = 16
    """Latents of a vector that stay."""
    steps: Annotated[int, Field(gt=0)] = 1000
    """Steps of training."""
    batch_size: Annotated[int, Field(gt=0)] = 1024
    """Vectors a step."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate. Default: 2e-4 / sqrt(latents / 2^14)."""
    warmup: Share = 0.05
    """Share of the steps in which it rises."""
    decay: Share = 0.2
    """Share of the steps, the last, in which it falls to 0."""
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the auxiliary loss, by which dead latents come back."""
    dead_after: Annotated[int, Field(gt=0)] | None = None
    """Vectors without firing after which a latent counts as dead. Default: a tenth of those trained on, at most ten
    million."""
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Vectors of a pass. Default: a worker's share of a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass."""
    validation_percent: Annotated[float, Field(gt=0, le=50)] = 5
    """Percent of the prompts held out of training."""
    norm_limit: Annotated[float, Field(gt=1)] = 10
    """Vectors whose raw norm is more than so many medians are left out."""
    spliced_pairs: Annotated[int, Field(ge=0)] = 500
    """Held-out pairs that the reward model reads by reconstructions."""
    warm_start: WarmStartConfig | None = None
    """A first stage on general text."""
    tensorboard: bool = False
    """Write event files beside the metrics."""
    seed: int = 0
    """Seed of the weights, of the order of vectors and of what is held out."""

    @property
    def dead_vectors(self) -> int:
        """Return the vectors without firing after which a latent counts as dead."""
        return self.dead_after or max(1, min(DEAD_AFTER, self.steps * self.batch_size // 10))

    @model_validator(mode="after")
    def _k(self) -> Self:
        if self.k > self.latents:
            raise ValueError(f"k {self.k} is larger than the {self.latents} latents; lower k or widen the SAE")
        return self
