"""Sparse products: decoding by gathering rows, dot products at chosen places, and gradients summed by latent.

Entries of a sparse matrix z [n, latents] are kept row by row (`Entries`). Nothing here makes a dense [n, latents]
matrix; plain PyTorch operations on any device. Weights are read by rows, one a latent: `W_enc.T` and `W_dec`.
"""

import warnings
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MEMORY_BUDGET = 2**25  # bytes of any temporary that grows with rows x latents or entries x width; malloc keeps these


class SparseCodes(NamedTuple):
    """Active latents of each vector, as many places for all of them; a place that is not used has value 0."""

    features: Int[Tensor, "n k"]
    values: Float[Tensor, "n k"]


class Groups(NamedTuple):
    """Entries in the order of their latents: entry `order[i]` is in row `rows[i]`; latent j's begin at `start[j]`."""

    order: Int[Tensor, " entries"]
    rows: Int[Tensor, " entries"]
    start: Int[Tensor, " latents+1"]


class Entries:
    """The entries at which a sparse [n, latents] matrix is not zero: row i has `features[start[i] : start[i + 1]]`."""

    def __init__(self, start: Int[Tensor, " n+1"], features: Int[Tensor, " entries"], latents: int) -> None:
        self.start = start
        self.features = features
        self.latents = latents

    @classmethod
    def of(cls, features: Int[Tensor, "n k"], latents: int) -> "Entries":
        """As many in every row."""
        n, k = features.shape
        return cls(torch.arange(0, n * k + 1, k, device=features.device), features.reshape(-1), latents)

    @property
    def n(self) -> int:
        return len(self.start) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " entries"]:
        """The row of each entry."""
        numbers = torch.arange(self.n, device=self.features.device)
        return numbers.repeat_interleave(self.start.diff(), output_size=len(self.features))

    @cached_property
    def groups(self) -> Groups:
        """The same entries by latent, sorted once for all gradients."""
        # As int32 the sort moves half the bytes. Stable, so that a latent's rows are summed in one order, and a run
        # repeats to the bit.
        order = self.features.int().sort(stable=True).indices
        counts = torch.bincount(self.features, minlength=self.latents)
        start = torch.zeros(self.latents + 1, dtype=torch.long, device=counts.device)
        torch.cumsum(counts, 0, out=start[1:])
        return Groups(order, self.rows[order], start)


def row_slices(n: int, row_bytes: int, budget: int) -> list[slice]:
    """Consecutive rows in chunks of at most `budget` bytes, one row at least."""
    size = max(1, budget // max(1, row_bytes))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def gathered_sum(
    entries: Entries, values: Float[Tensor, " entries"], weight: Float[Tensor, "latents d"]
) -> Float[Tensor, "n d"]:
    """z @ weight: for each row, the sum of its latents' rows of `weight`."""
    return nn.functional.embedding_bag(
        entries.features, weight, entries.start, per_sample_weights=values, mode="sum", include_last_offset=True
    )


def summed_by_latent(
    entries: Entries, values: Float[Tensor, " entries"], table: Float[Tensor, "n d"]
) -> Float[Tensor, "latents d"]:
    """z.T @ table: for each latent, the sum of the rows of `table` in which it is active."""
    order, rows, start = entries.groups
    return nn.functional.embedding_bag(
        rows, table, start, per_sample_weights=values[order], mode="sum", include_last_offset=True
    )


def counted_by_latent(entries: Entries, values: Float[Tensor, " entries"]) -> Float[Tensor, " latents"]:
    """The sum of each column of z."""
    # Differences of a running sum; in float64, since those of a long float32 sum would lose what small columns hold.
    order, _, start = entries.groups
    total = values.new_zeros(len(order) + 1, dtype=torch.float64)
    torch.cumsum(values[order], 0, dtype=torch.float64, out=total[1:])
    return total[start].diff().to(values.dtype)


def dot_products(
    entries: Entries, table: Float[Tensor, "n d"], weight: Float[Tensor, "latents d"], budget: int = MEMORY_BUDGET
) -> Float[Tensor, " entries"]:
    """table @ weight.T at the entries alone."""
    if table.device.type == "cpu":
        places = _csr(entries, values=table.new_zeros(len(entries.features)))
        return torch.sparse.sampled_addmm(places, table, weight.T, beta=0.0).values()
    return gathered_products(entries, table, weight, budget)


def gathered_products(
    entries: Entries, table: Float[Tensor, "n d"], weight: Float[Tensor, "latents d"], budget: int
) -> Float[Tensor, " entries"]:
    """The same on any device, by gathering the rows of both."""
    # In chunks: the gathered rows of both are entries x width, which would be the largest tensor of a step.
    found = table.new_empty(len(entries.features))
    for part in row_slices(len(found), 2 * table.shape[1] * table.element_size(), budget):
        found[part] = (table[entries.rows[part]] * weight[entries.features[part]]).sum(-1)
    return found


def _csr(entries: Entries, values: Tensor) -> Tensor:
    shape = (entries.n, entries.latents)
    with warnings.catch_warnings():  # it calls itself a beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(entries.start, entries.features, values, shape, check_invariants=False)


class Decode(torch.autograd.Function):
    """z @ W_dec with the gradients of both; neither makes a dense z."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, entries: Entries, budget: int) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.entries, ctx.budget = entries, budget
        return gathered_sum(entries, values, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        # Autograd may hand an expanded view, of a mean say; the products below go through its rows several times.
        gradient = gradients[0].contiguous()
        of_values = dot_products(ctx.entries, gradient, weight, ctx.budget) if ctx.needs_input_grad[0] else None
        of_weight = summed_by_latent(ctx.entries, values, gradient) if ctx.needs_input_grad[1] else None
        return of_values, of_weight, None, None


class Encode(torch.autograd.Function):
    """Gradients of activations that were chosen without one: (x - b_dec) W_enc + b_enc at the entries, or 0 where the
    activation is cut off.

    The decoder bias gets what the centred inputs get, summed over rows: W_enc applied to the encoder bias's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_dec: Tensor, weight: Tensor, b_enc: Tensor, values: Tensor, entries: Entries
    ) -> Tensor:
        ctx.save_for_backward(x, b_dec, weight, values)
        ctx.entries = entries
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, b_dec, weight, values = ctx.saved_tensors
        # The ReLU: a place whose value was cut off passes nothing on.
        gradient, entries = gradients[0] * (values != 0), ctx.entries
        of_x = gathered_sum(entries, gradient, weight.T.contiguous()) if ctx.needs_input_grad[0] else None
        of_b_enc = counted_by_latent(entries, gradient)
        of_b_dec = -(weight @ of_b_enc) if ctx.needs_input_grad[1] else None
        of_weight = summed_by_latent(entries, gradient, x - b_dec).T if ctx.needs_input_grad[2] else None
        return of_x, of_b_dec, of_weight, of_b_enc, None, None
