"""The section `sae` of a config: how an SAE is trained. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safer_ray.config.sae_variants import SaeVariant, TopKVariant
from safer_ray.config.values import Frozen, LocalName, Share

MOST_LATENTS = 2**26  # more than any SAE that is known has; what counts them takes about 100 bytes each


class WarmStartConfig(Frozen):
    """A first stage of training an SAE, on the vectors of all tokens of general text, from which the second goes on.

    `text` is a file with a text a line, or JSONL rows with a `text` (these also .gz or .zst).
    """

    text: LocalName
    limit: Annotated[int, Field(gt=0)] | None = None  # first texts
    steps: Annotated[int, Field(gt=0)] = 1000
    batch_size: Annotated[int, Field(gt=0)] = 1024
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: by the number of latents
    warmup: Share = 0.05
    decay: Share = 0.2


class SaeConfig(Frozen):
    # What `warm_start` makes is an input.
    unrecorded: ClassVar = frozenset({"micro_batch_size", "tensorboard", "warm_start"})

    variant: SaeVariant = TopKVariant()
    latents: Annotated[int, Field(gt=0, le=MOST_LATENTS)] = 1024
    k: Annotated[int, Field(gt=0)] = 16
    steps: Annotated[int, Field(gt=0)] = 1000
    batch_size: Annotated[int, Field(gt=0)] = 1024
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: 2e-4 / sqrt(latents / 2^14)
    warmup: Share = 0.05
    decay: Share = 0.2
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after: Annotated[int, Field(gt=0)] = 50_000  # vectors without firing
    micro_batch_size: Annotated[int, Field(gt=0)] | None = None  # vectors of a pass; None: a worker's share of a batch
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward and backward pass
    validation_percent: Annotated[float, Field(gt=0, le=50)] = 5
    norm_limit: Annotated[float, Field(gt=1)] = 10  # times the median raw norm; outliers are left out
    spliced_pairs: Annotated[int, Field(ge=0)] = 500  # held-out pairs that the reward model reads by reconstructions
    warm_start: WarmStartConfig | None = None
    tensorboard: bool = False  # event files beside the metrics
    seed: int = 0

    @model_validator(mode="after")
    def _k(self) -> Self:
        if self.k > self.latents:
            raise ValueError(f"k {self.k} is larger than the {self.latents} latents; lower k or widen the SAE")
        return self
