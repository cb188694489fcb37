"""TopK sparse autoencoder in SAELens' layout (DESIGN 2.5).

z = ReLU(TopK_k(W_enc^T (x - b_dec) + b_enc)), x_hat = W_dec^T z + b_dec, on x standardised over the hidden dimension.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.files import write_json

WEIGHTS = "sae_weights.safetensors"
EPSILON = 1e-5  # as SAELens' layer_norm has it


class Standardised(NamedTuple):
    x: Float[Tensor, "n d"]
    norm: Float[Tensor, " n"]  # of the raw vector
    mean: Float[Tensor, " n"]
    std: Float[Tensor, " n"]


class SparseCodes(NamedTuple):
    """The k largest latents of each vector; values are >= 0."""

    features: Int[Tensor, "n k"]
    values: Float[Tensor, "n k"]


def standardise(raw: Float[Tensor, "n d"], epsilon: float = EPSILON) -> Standardised:
    """(x - mean) / (std + eps) over the hidden dimension, with the unbiased std."""
    raw = raw.float()
    mean = raw.mean(-1, keepdim=True)
    std = raw.std(-1, keepdim=True)
    x = (raw - mean) / (std + epsilon)
    return Standardised(x, raw.norm(dim=-1), mean.squeeze(-1), std.squeeze(-1))


class TopKSae(nn.Module):
    """`d` inputs, `latents` features of which the `k` largest stay."""

    def __init__(self, d: int, latents: int, k: int) -> None:
        super().__init__()
        if not 0 < k <= latents:
            raise UserError(f"k {k} must lie in 1..{latents} latents; lower k or widen the SAE")
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(d, latents))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, d))
        self.b_dec = nn.Parameter(torch.zeros(d))

    @property
    def d(self) -> int:
        return self.W_dec.shape[1]

    @property
    def latents(self) -> int:
        return self.W_dec.shape[0]

    def pre_activations(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n latents"]:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def sparsify(self, pre: Float[Tensor, "n latents"]) -> SparseCodes:
        values, features = pre.topk(self.k, dim=-1)
        return SparseCodes(features, values.relu())

    def encode(self, x: Float[Tensor, "n d"]) -> SparseCodes:
        """Codes of standardised vectors."""
        return self.sparsify(self.pre_activations(x))

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n d"]:
        return decode_sparse(codes, self.W_dec) + self.b_dec

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d"], seed: int) -> None:
        """Unit-norm random decoder, encoder its transpose, decoder bias the median of a sample."""
        generator = torch.Generator().manual_seed(seed)
        decoder = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(decoder / decoder.norm(dim=-1, keepdim=True))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(sample.median(dim=0).values)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale each feature's direction back to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def decode_sparse(codes: SparseCodes, weight: Float[Tensor, "latents d"]) -> Float[Tensor, "n d"]:
    """Sum of the active features' directions, by gathering k rows; no bias."""
    return nn.functional.embedding_bag(codes.features, weight, per_sample_weights=codes.values, mode="sum")


def save_sae(sae: TopKSae, directory: Path, *, model: str, layer: int) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAELens 6 reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous().cpu() for name, value in sae.state_dict().items()}
    with explain_disk_errors(directory):
        save_file(weights, directory / WEIGHTS)
    config = {
        "architecture": "topk",
        "d_in": sae.d,
        "d_sae": sae.latents,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"model_name": model, "hook_name": f"model.layers.{layer - 1}", "safer_ray_layer": layer},
    }
    write_json(config, directory / "cfg.json")


def load_sae(directory: Path) -> TopKSae:
    """The SAE in a SAELens directory, ready to encode.

    Raises:
        UserError: files missing, corrupt, of another architecture or normalisation.
    """
    config = _read_config(directory)
    if config.get("architecture") != "topk" or config.get("normalize_activations") != "layer_norm":
        raise UserError(
            f"{directory}: architecture {config.get('architecture')!r} with normalize_activations "
            f"{config.get('normalize_activations')!r} is not supported; wanted 'topk' with 'layer_norm'"
        )
    k = config.get("k")
    if not isinstance(k, int):
        raise UserError(f"corrupt SAE in {directory}: cfg.json has k {k!r}, wanted a whole number")
    try:
        weights = load_file(directory / WEIGHTS)
        latents, d = weights["W_dec"].shape
        sae = TopKSae(d, latents, k)
        sae.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"no SAE in {directory}: {WEIGHTS} is missing") from None
    except (ValueError, KeyError, RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"corrupt SAE in {directory}: {reason}; train or copy it again") from None
    return sae.eval().requires_grad_(False)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / "cfg.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no SAE in {directory}: cfg.json is missing") from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"corrupt SAE in {directory}: cfg.json: {error}; train or copy it again") from None


def sae_layer(directory: Path) -> int:
    """The 1-based layer that the SAE in `directory` was trained on."""
    metadata = _read_config(directory).get("metadata") or {}
    if "safer_ray_layer" not in metadata:
        raise UserError(f"{directory}/cfg.json does not say its layer; add metadata.safer_ray_layer (1-based)")
    return int(metadata["safer_ray_layer"])
