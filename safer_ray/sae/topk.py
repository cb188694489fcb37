"""The largest pre-activations of each vector, or of a whole batch, without sorting all of them.

Latents are cut into groups; the k-th best of the groups' bests is a floor under the k-th largest, and hardly anything
else reaches it. Where a processor multiplies bfloat16 in tiles, a product in bfloat16 screens first, several times
faster than float32: rounding moves a pre-activation by at most a bound that follows from the norms of what was
rounded, so what lies further below the floor cannot be among the largest. Only what is left is computed in float32.
The result is that of a product in float32.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safer_ray.sae.sparse import MEMORY_BUDGET, Entries, SparseCodes, dot_products, row_slices

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # positive floats order as the integers of their bits
ROUNDING = 2.0**-9  # largest relative error of rounding to bfloat16
SCREENED = 1024  # latents from which screening pays
CROWD = 8  # times as many left as wanted: then looking at all of them in float32 costs no more


class Found(NamedTuple):
    """Entries of a sparse matrix with their pre-activations."""

    entries: Entries
    values: Float[Tensor, " entries"]


class Products(Protocol):
    """Pre-activations x @ weight.T + bias of some rows, exact or nearly."""

    row_bytes: int  # of what a row needs for a while

    def of(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n latents"], Float[Tensor, " n"]]:
        """The products, and by how much a row's may be wrong."""
        ...

    def exact(self, entries: Entries, x: Float[Tensor, "n d"], pre: Float[Tensor, "n latents"]) -> Tensor:
        """Those at the entries, in float32."""
        ...


class InFull:
    """Products in the precision of the inputs."""

    def __init__(self, weight: Float[Tensor, "latents d"], bias: Float[Tensor, " latents"]) -> None:
        self.weight, self.bias = weight, bias
        self.row_bytes = 5 * len(weight)

    def of(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        return torch.addmm(self.bias, x, self.weight.T).float(), x.new_zeros(len(x))

    def exact(self, entries: Entries, x: Tensor, pre: Tensor) -> Tensor:
        return pre[entries.rows, entries.features]


class Screened:
    """Products of inputs rounded to bfloat16."""

    def __init__(self, weight: Float[Tensor, "latents d"], bias: Float[Tensor, " latents"]) -> None:
        self.weight, self.bias = weight, bias
        self.row_bytes = 3 * len(weight)
        self.rounded, self.rounded_bias = weight.bfloat16(), bias.bfloat16()
        self.norm = weight.norm(dim=1).max()
        self.moved_bias = (bias - self.rounded_bias).abs().max()

    def of(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """As `Products` says; the bound is Cauchy and Schwarz's, before the products are rounded themselves."""
        rounded = x.bfloat16()
        size, moved = x.norm(dim=1), (x - rounded).norm(dim=1)
        # A sum of d products in float32 errs by at most d u |x| |w| with u = 2^-24 (Higham 2002, 3.1); twice that is
        # allowed.
        summing = size * x.shape[1] * 2.0**-23
        # |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|, with |x'| <= size + moved and |w - w'| <= ROUNDING |w|.
        error = (moved + (size + moved) * ROUNDING + summing) * self.norm + self.moved_bias
        return torch.addmm(self.rounded_bias, rounded, self.rounded.T), error

    def exact(self, entries: Entries, x: Tensor, pre: Tensor) -> Tensor:
        return dot_products(entries, x, self.weight) + self.bias[entries.features]


def products(weight: Float[Tensor, "latents d"], bias: Float[Tensor, " latents"], k: int) -> Products:
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older versions
    tiles = weight.device.type == "cpu" and known.get("amx_bf16", False)
    if tiles and weight.dtype == torch.float32 and len(weight) >= max(SCREENED, 4 * groups_for(k)):
        return Screened(weight, bias)
    return InFull(weight, bias)


def groups_for(k: int) -> int:
    """So many groups that the k-th best group's best lies hardly below the k-th best latent."""
    return max(128, 4 * k)


def largest(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    k: int,
    budget: int = MEMORY_BUDGET,
) -> SparseCodes:
    """The k largest of x @ weight.T + bias in each row, in no particular order, negative ones too."""
    look = products(weight, bias, k)
    cut = weight.device.type == "cpu" and len(weight) >= 4 * groups_for(k)
    codes = SparseCodes(x.new_empty((len(x), k), dtype=torch.long), x.new_empty((len(x), k)))
    for rows in row_slices(len(x), look.row_bytes, budget):
        part, features, values = x[rows], codes.features[rows], codes.values[rows]
        unsure = torch.arange(len(part), device=x.device)
        if cut:
            pre, error = look.of(part)
            entries, sure = survivors(pre, row_floor(pre, k), error, CROWD * k * len(part))
            found = largest_of(Found(entries, look.exact(entries, part, pre)), k)
            features.copy_(found.features)
            values.copy_(found.values)
            unsure = (~sure).nonzero()[:, 0]
            del pre
        if len(unsure):
            # Rows that screening cannot vouch for are done in full; they are few, or screening would not pay.
            plain = torch.addmm(bias, part[unsure], weight.T).topk(k, dim=-1, sorted=False)
            features[unsure], values[unsure] = plain.indices, plain.values.to(x.dtype)
    return codes


def largest_of_batch(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    count: int,
    budget: int = MEMORY_BUDGET,
) -> Found:
    """The `count` largest positive of x @ weight.T + bias in all rows together; fewer, where fewer are positive."""
    look = products(weight, bias, 1)
    parts: list[tuple[int, Found]] = []
    for rows in row_slices(len(x), look.row_bytes, budget):
        part = x[rows]
        found = _largest_of_part(look, InFull(weight, bias), part, count)
        parts.append((rows.start, _keep(found, count)))
    return _keep(_stacked(parts, len(x), len(weight)), count)


def _largest_of_part(look: Products, full: Products, x: Tensor, count: int) -> Found:
    for way in (look, full):
        pre, error = way.of(x)
        entries, sure = survivors(pre, batch_floor(pre, count), error, CROWD * count)
        if sure.all():
            return Found(entries, way.exact(entries, x, pre))
    positive = pre > 0
    entries = _entries(positive)
    return Found(entries, full.exact(entries, x, pre))


def row_floor(pre: Float[Tensor, "n latents"], k: int) -> Float[Tensor, " n"]:
    """Return what at least k latents of each row reach."""
    return _bests(pre, groups_for(k)).topk(k, dim=-1).values[:, -1]


def batch_floor(pre: Float[Tensor, "n latents"], count: int) -> Float[Tensor, " n"]:
    """Return what at least `count` latents of all rows together reach, told for each row; minus infinity if unknown."""
    bests = _bests(pre, max(1, min(pre.shape[1], groups_for(-(-count // len(pre)))))).flatten()
    if len(bests) < count:
        return bests.new_full((len(pre),), -torch.inf)
    return bests.topk(count).values[-1].expand(len(pre))


def _bests(pre: Float[Tensor, "n latents"], groups: int) -> Float[Tensor, "n groups"]:
    """The largest of every `groups`-th latent; those left over at the end are in none."""
    n, latents = pre.shape
    size = latents // groups
    # Negative floats come out as negative integers, in reverse order but below every positive one: the greatest is
    # right where it is positive, which is all that a floor is used for.
    bits = pre.view(BITS[pre.dtype])
    return bits[:, : size * groups].view(n, size, groups).amax(1).view(pre.dtype).float()


def survivors(
    pre: Float[Tensor, "n latents"], floor: Float[Tensor, " n"], error: Float[Tensor, " n"], most: int
) -> tuple[Entries, Bool[Tensor, " n"]]:
    """Entries that can reach the floor, and the rows for which this is sure; others have none.

    Rows whose floor is not positive are not sure, since only positive numbers order as their bits, nor is any if more
    than `most` entries are left.
    """
    # The bound is of exact products; those in bfloat16 were rounded once more when written, the floor's and the others.
    if pre.dtype == torch.bfloat16:
        floor = floor * (1 - 4 * ROUNDING)
    # Twice: the floor may be too high by the error, and a product too low by it. The rest is for rounding of the bound.
    floor = floor - 2.1 * error
    sure = floor > 0
    bits = pre.view(BITS[pre.dtype])
    limit = torch.where(sure, floor, torch.inf).to(pre.dtype).view(bits.dtype)[:, None]
    if pre.device.type == "cpu":  # numpy is several times faster at this
        mask = torch.from_numpy(bits.numpy() >= limit.numpy())
        left = int(np.count_nonzero(mask.numpy()))
    else:
        mask = bits >= limit
        left = int(mask.sum())
    # Nothing is certain of a crowd but that it costs more than doing all of them plainly.
    if left > most:
        sure, mask = torch.zeros_like(sure), mask.zero_()
    return _entries(mask), sure


def _entries(mask: Bool[Tensor, "n latents"]) -> Entries:
    n, latents = mask.shape
    if mask.device.type == "cpu":
        flat = torch.from_numpy(mask.view(-1).numpy().nonzero()[0])
    else:
        flat = mask.view(-1).nonzero()[:, 0]
    start = torch.searchsorted(flat, torch.arange(n + 1, device=mask.device) * latents)
    return Entries(start, flat % latents, latents)


def largest_of(found: Found, k: int) -> SparseCodes:
    """The k largest entries of each row; rows with fewer are filled up with minus infinity at latent 0."""
    codes = padded(found, -torch.inf, k)
    values, places = codes.values.topk(k, dim=-1, sorted=False)
    return SparseCodes(codes.features.gather(1, places), values)


def padded(found: Found, fill: float, least: int = 0) -> SparseCodes:
    """As many places in every row as the fullest needs, `least` at least; what is not used holds `fill` at latent 0."""
    entries, values = found
    width = max(least, int(entries.start.diff().max()) if entries.n else 0)
    places = entries.rows * width + torch.arange(len(values), device=values.device) - entries.start[entries.rows]
    filled = values.new_full((entries.n * width,), fill)
    features = entries.features.new_zeros(entries.n * width)
    filled[places], features[places] = values, entries.features
    return SparseCodes(features.view(entries.n, width), filled.view(entries.n, width))


def _keep(found: Found, count: int) -> Found:
    """Its `count` largest, in the order they had."""
    if len(found.values) <= count:
        return found
    # Back in the order of rows, which `start` is searched in.
    kept = found.values.topk(count, sorted=False).indices.sort().values
    rows = found.entries.rows[kept]
    start = torch.searchsorted(rows, torch.arange(found.entries.n + 1, device=rows.device))
    return Found(Entries(start, found.entries.features[kept], found.entries.latents), found.values[kept])


def _stacked(parts: list[tuple[int, Found]], n: int, latents: int) -> Found:
    """Parts of a batch, one below the other."""
    if len(parts) == 1:
        return parts[0][1]
    rows = torch.cat([found.entries.rows + first for first, found in parts])
    start = torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))
    features = torch.cat([found.entries.features for _, found in parts])
    return Found(Entries(start, features, latents), torch.cat([found.values for _, found in parts]))


def above(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"],
    budget: int = MEMORY_BUDGET,
) -> Found:
    """Those of x @ weight.T + bias that are positive and exceed their latent's threshold."""
    full = InFull(weight, bias)
    parts = []
    for rows in row_slices(len(x), full.row_bytes, budget):
        pre, _ = full.of(x[rows])
        entries = _entries((pre > threshold) & (pre > 0))
        parts.append((rows.start, Found(entries, full.exact(entries, x[rows], pre))))
    return _stacked(parts, len(x), len(weight)) if parts else Found(_nothing(weight), x.new_empty(0))


def _nothing(weight: Tensor) -> Entries:
    empty = torch.zeros(1, dtype=torch.long, device=weight.device)
    return Entries(empty, empty[:0], len(weight))
