"""Which latents of an autoencoder stay: the variants that a config can name. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safer_ray.config.values import Frozen


class TopKVariant(Frozen):
    """The k largest of each vector."""

    title: ClassVar[str] = "TopK"
    kind: Literal["topk"] = "topk"
    """Names this variant."""


class BatchTopKVariant(Frozen):
    """The k n largest of a batch of n vectors; where vectors are read one by one, those above a threshold."""

    title: ClassVar[str] = "BatchTopK"
    kind: Literal["batch_topk"] = "batch_topk"
    """Names this variant."""
    threshold_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share by which a batch moves the threshold's running mean."""


class JumpReluVariant(Frozen):
    """Those above a threshold that each latent learns; `sae.k` is the number that training aims at."""

    title: ClassVar[str] = "JumpReLU"
    kind: Literal["jumprelu"] = "jumprelu"
    """Names this variant."""
    bandwidth: Annotated[float, Field(gt=0)] = 0.5
    """Width about a threshold within which activations move it."""
    sparsity_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of (L0 / k - 1)^2, beside the reconstruction's nmse."""


SaeVariant = Annotated[TopKVariant | BatchTopKVariant | JumpReluVariant, Field(discriminator="kind")]
