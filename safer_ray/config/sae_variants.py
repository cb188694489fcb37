"""Which latents of an autoencoder stay: the variants that a config can name. Imports neither torch nor ray."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class TopKVariant(BaseModel, frozen=True, extra="forbid"):
    """The k largest of each vector."""

    kind: Literal["topk"] = "topk"


class BatchTopKVariant(BaseModel, frozen=True, extra="forbid"):
    """The k n largest of a batch of n vectors; where vectors are read one by one, those above a threshold."""

    kind: Literal["batch_topk"] = "batch_topk"
    threshold_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # of the threshold's running mean, a batch


SaeVariant = Annotated[TopKVariant | BatchTopKVariant, Field(discriminator="kind")]
