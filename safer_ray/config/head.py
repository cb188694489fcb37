"""Which reward is read of a model with several outputs."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from safer_ray.config.values import Frozen

Output = Annotated[int, Field(ge=0)]


class HeadConfig(Frozen):
    """One of: the number of an `output` (from 0), the `weights` of a sum over all, or the `difference` [A, B]: output A
    minus output B, as of a classifier of two classes."""

    output: Output | None = None
    """Number of an output, from 0."""
    weights: tuple[float, ...] | None = Field(default=None, min_length=1)
    """A sum of all outputs, each times its weight."""
    difference: tuple[Output, Output] | None = None
    """[A, B]: output A minus output B, as of a classifier of two classes."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.output, self.weights, self.difference)) != 1:
            raise ValueError("write one of output: NUMBER, weights: [W0, W1, ...] and difference: [A, B]")
        if self.difference is not None and self.difference[0] == self.difference[1]:
            raise ValueError(f"difference {list(self.difference)} is always 0; name two outputs")
        if self.weights is not None and not (all(map(math.isfinite, self.weights)) and any(self.weights)):
            raise ValueError(f"weights {list(self.weights)}: wanted finite numbers, not all 0")
        return self

    def weights_of(self, outputs: int) -> tuple[float, ...]:
        """Return what each of so many outputs is multiplied by in the sum that is the reward.

        Raises:
            ValueError: there is no such output, or the weights are more or fewer.
        """
        if self.weights is not None:
            if len(self.weights) != outputs:
                raise ValueError(f"head.weights are {len(self.weights)}, and the model has {outputs} outputs")
            return self.weights
        plus, minus = (self.output, None) if self.difference is None else self.difference
        for number in (plus, minus):
            if number is not None and number >= outputs:
                raise ValueError(f"head names output {number}, and the model has {outputs}, from 0 on")
        return tuple(float(number == plus) - float(number == minus) for number in range(outputs))
