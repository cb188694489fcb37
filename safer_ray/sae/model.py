"""Sparse autoencoders: TopK, and what its variants in `safer_ray.sae.variants` share with it.

z = ReLU(TopK_k(W_enc^T (x - b_dec) + b_enc)), x_hat = W_dec^T z + b_dec, on x standardised over the hidden dimension.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safer_ray.config.sections import SaeConfig
from safer_ray.errors import UserError
from safer_ray.sae.sparse import MEMORY_BUDGET, Decode, Encode, Entries, SparseCodes, gathered_sum
from safer_ray.sae.topk import Found, above, largest, padded

if TYPE_CHECKING:
    from safer_ray.reward.training_steps import Workers

EPSILON = 1e-5  # as SAELens' layer_norm has it
PUBLISHED_EPSILON = 1e-6  # as the published SAFER code has it


class Standardised(NamedTuple):
    x: Float[Tensor, "n d"]
    norm: Float[Tensor, " n"]  # of the raw vector
    mean: Float[Tensor, " n"]
    std: Float[Tensor, " n"]


def standardise(raw: Float[Tensor, "n d"], epsilon: float = EPSILON) -> Standardised:
    """(x - mean) / (std + eps) over the hidden dimension, with the unbiased std."""
    raw = raw.float()
    mean = raw.mean(-1, keepdim=True)
    std = raw.std(-1, keepdim=True)
    x = (raw - mean) / (std + epsilon)
    return Standardised(x, raw.norm(dim=-1), mean.squeeze(-1), std.squeeze(-1))


class TopKSae(nn.Module):
    """`d` inputs, `latents` features of which the `k` largest stay, if they are positive.

    A variant is a subclass: it says what fires (`firing`, `encode`), and how it is saved (`layout`), known again
    (`reads`), restored and told of on its card.
    """

    epsilon = EPSILON
    warning: ClassVar[str] = ""  # to those who open it with SAELens

    def __init__(self, d: int, latents: int, k: int) -> None:
        super().__init__()
        if not 0 < k <= latents:
            raise UserError(f"k {k} must lie in 1..{latents} latents; lower k or widen the SAE")
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(latents, d).T)  # a latent's weights lie side by side
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))

    @classmethod
    def of(cls, d: int, config: SaeConfig) -> Self:
        """A new one, all weights zero."""
        return cls(d, config.latents, config.k)

    @classmethod
    def reads(cls, saved: Mapping[str, Any]) -> bool:
        """Return whether a `cfg.json` is of this variant."""
        return bool(saved.get("architecture") == "topk")

    def layout(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what `cfg.json` says of it as SAELens reads it, and what of that stands under `metadata`."""
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}, {}

    def saved_weights(self) -> dict[str, Tensor]:
        """The tensors on disk, by the names that SAELens has for them."""
        return self.state_dict()

    @classmethod
    def restored(cls, weights: dict[str, Tensor], k: int) -> Self:
        """One of weights from disk.

        Raises:
            RuntimeError: a tensor is missing, unknown or of another shape.
        """
        latents, d = weights["W_dec"].shape
        sae = cls(d, latents, k)
        sae.load_state_dict(weights)
        return sae

    @classmethod
    def told(cls, saved: Mapping[str, Any]) -> str:
        """Return its kind in words, for its model card."""
        return f"TopK, {saved['k']} active latents a vector"

    @property
    def d(self) -> int:
        return self.W_dec.shape[1]

    @property
    def latents(self) -> int:
        return self.W_dec.shape[0]

    def pre_activations(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n latents"]:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def active(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> Found:
        """Return what fires of standardised vectors while training, with gradients."""
        with torch.no_grad():
            codes = largest(x - self.b_dec, self.W_enc.T, self.b_enc, self.k, budget)
        return self.with_gradient(x, Entries.of(codes.features, self.latents), self._cut(codes.values.view(-1)))

    def decide(self, pieces: Sequence[Float[Tensor, "n d"]], workers: "Workers | None") -> None:
        """Decide, before a training step, what the whole batch decides of which `pieces` are this worker's; here
        nothing. `workers` is None where the batch is one piece."""

    def firing(self, x: Float[Tensor, "n d"], budget: int = MEMORY_BUDGET) -> tuple[Found, Float[Tensor, ""]]:
        """Return what is active in training, and the mean over vectors that the loss gets for it, here nothing."""
        return self.active(x, budget), x.new_zeros(())

    def _cut(self, values: Tensor) -> Tensor:
        return values.relu()

    def with_gradient(self, x: Tensor, entries: Entries, values: Tensor) -> Found:
        """Pre-activations that were found without a gradient, with that of the encoder; none where a value is 0."""
        return Found(entries, Encode.apply(x, self.b_dec, self.W_enc, self.b_enc, values, entries))

    def encode(self, x: Float[Tensor, "n d"]) -> SparseCodes:
        """Codes of standardised vectors."""
        entries, values = self.active(x)
        return SparseCodes(entries.features.view(-1, self.k), values.view(-1, self.k))

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n d"]:
        entries = Entries.of(codes.features, self.latents)
        return Decode.apply(codes.values.reshape(-1), self.W_dec, entries, MEMORY_BUDGET) + self.b_dec

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d"], seed: int) -> None:
        """Unit-norm random decoder, encoder its transpose but for one factor, decoder bias a sample's geometric median.

        Directions that are not orthogonal add up to too much: the factor makes the first reconstruction of the sample
        as close as one can.
        """
        generator = torch.Generator().manual_seed(seed)
        decoder = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(decoder / decoder.norm(dim=-1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(sample))
        centred = sample - self.b_dec
        codes = largest(centred, self.W_enc.T, self.b_enc, self.k)
        guess = gathered_sum(Entries.of(codes.features, self.latents), codes.values.relu().view(-1), self.W_dec)
        # Least squares: the factor c that minimises |c guess - centred|^2.
        self.W_enc.mul_((guess * centred).sum() / guess.square().sum().clamp_min(1e-12))

    @torch.no_grad()
    def project(self) -> None:
        """Put parameters other than the decoder back to where they may be, after each step of training."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale each feature's direction back to unit norm."""
        normalise_rows(self.W_dec)


class ThresholdSae(TopKSae):
    """Read vector by vector: what exceeds its latent's threshold is active, so that vectors have unlike numbers."""

    threshold: Tensor

    def encode(self, x: Float[Tensor, "n d"]) -> SparseCodes:
        """Codes of standardised vectors, as many places as the fullest needs."""
        with torch.no_grad():
            found = above(x - self.b_dec, self.W_enc.T, self.b_enc, self.threshold)
        return padded(self.with_gradient(x, *found), 0.0, 1)


def normalise_rows(directions: Float[Tensor, "n d"]) -> None:
    """Scale each to unit norm, in place."""
    directions.div_(directions.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def geometric_median(sample: Float[Tensor, "n d"], rounds: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point of least summed distance to all vectors (Weiszfeld's iteration, from the mean), in float32.

    Ends when a round moves it by less than `tolerance` of the mean distance.
    """
    point = sample.mean(0)
    for _ in range(rounds):
        # A sample that the point has come to lie on would weigh infinitely much, and hold it there.
        distance = torch.cdist(sample, point[None])[:, 0].clamp_min(1e-12)
        weight = 1 / distance
        moved = (weight @ sample) / weight.sum()
        step = (moved - point).norm()
        point = moved
        if step < tolerance * distance.mean():
            break
    return point
