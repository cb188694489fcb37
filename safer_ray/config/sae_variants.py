"""Which latents of an autoencoder stay: the variants that a config can name. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field


class TopKVariant(BaseModel, frozen=True, extra="forbid"):
    """The k largest of each vector."""

    title: ClassVar[str] = "TopK"
    kind: Literal["topk"] = "topk"


class BatchTopKVariant(BaseModel, frozen=True, extra="forbid"):
    """The k n largest of a batch of n vectors; where vectors are read one by one, those above a threshold."""

    title: ClassVar[str] = "BatchTopK"
    kind: Literal["batch_topk"] = "batch_topk"
    threshold_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the threshold's running mean, a batch


class JumpReluVariant(BaseModel, frozen=True, extra="forbid"):
    """Those above a threshold that each latent learns; `sae.k` is the number that training aims at."""

    title: ClassVar[str] = "JumpReLU"
    kind: Literal["jumprelu"] = "jumprelu"
    bandwidth: Annotated[float, Field(gt=0)] = 0.5  # about a threshold, within which activations move it
    sparsity_coefficient: Annotated[float, Field(ge=0)] = 0.1  # of (L0 / k - 1)^2, beside the reconstruction's nmse


SaeVariant = Annotated[TopKVariant | BatchTopKVariant | JumpReluVariant, Field(discriminator="kind")]
