"""SAEs on disk: SAELens' layout out and in, and the published SAFER checkpoint in."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.sae.model import TopKSae
from safer_ray.sae.model_card import write_model_card
from safer_ray.sae.variants.registry import variant_of
from safer_ray.sae.variants.signed_topk import SignedTopKSae
from safer_ray.storage.files import write_json

WEIGHTS = "sae_weights.safetensors"
PUBLISHED = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}


def save_sae(sae: TopKSae, directory: Path, *, model: str, layer: int) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAELens 6 reads them, and a model card."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous().cpu() for name, value in sae.saved_weights().items()}
    with explain_disk_errors(directory):
        save_file(weights, directory / WEIGHTS)
    metadata: dict[str, Any] = {
        "model_name": model,
        "hook_name": f"model.layers.{layer - 1}",
        "safer_ray_layer": layer,
    }
    layout, more = sae.layout()
    config: dict[str, Any] = {
        **layout,
        "d_in": sae.d,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
    }
    write_json({**config, "metadata": metadata | more}, directory / "cfg.json")
    write_model_card(directory, {})


def load_sae(directory: Path) -> TopKSae:
    """The SAE in a SAELens directory, ready to encode; ours, or a TopK, BatchTopK or JumpReLU one that SAELens saved.

    Raises:
        UserError: files missing, corrupt, of another architecture or normalisation.
    """
    config = _read_config(directory)
    variant = variant_of(config)
    if variant is None or config.get("normalize_activations") != "layer_norm":
        raise UserError(
            f"{directory}: architecture {config.get('architecture')!r} with normalize_activations "
            f"{config.get('normalize_activations')!r} is not supported; wanted 'topk' or 'jumprelu' with 'layer_norm'"
        )
    k = _k(directory, config)
    try:
        weights = {name: value.float() for name, value in load_file(directory / WEIGHTS).items()}
        if config.get("d_sae", len(weights["W_dec"])) != len(weights["W_dec"]):
            raise ValueError(f"cfg.json says {config['d_sae']} latents, W_dec has {len(weights['W_dec'])}")
        sae = _sae_of(variant, config, weights, k)
    except FileNotFoundError:
        raise UserError(f"no SAE in {directory}: {WEIGHTS} is missing") from None
    except (ValueError, KeyError, RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"corrupt SAE in {directory}: {reason}; train or copy it again") from None
    return sae.eval().requires_grad_(False)


def _k(directory: Path, config: dict[str, Any]) -> int:
    """Active latents a vector; 1 where a threshold decides and the file does not say, since only training asks then."""
    details = _metadata(config).get("training_architecture_details") or {}
    fallback = 1 if config["architecture"] == "jumprelu" else None
    k = config.get("k", details.get("k", fallback))
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k):
        raise UserError(f"corrupt SAE in {directory}: cfg.json has k {k!r}, wanted a whole number")
    return int(k)


def _sae_of(variant: type[TopKSae], config: dict[str, Any], weights: dict[str, Tensor], k: int) -> TopKSae:
    if config.get("rescale_acts_by_decoder_norm", config["architecture"] == "batchtopk"):
        # The same map with directions of unit norm: activations times the norms that these had, by which SAELens ranks
        # them.
        norm = weights["W_dec"].norm(dim=-1)
        weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    if not config.get("apply_b_dec_to_input", True):
        # x W + b is (x - b_dec) W + (b + b_dec W).
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    sae = variant.restored(weights, k)
    _check_finite(weights)
    return sae


def _check_finite(weights: dict[str, Tensor]) -> None:
    """Raises ValueError: with such a weight a latent fires never or always, without a word."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / "cfg.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no SAE in {directory}: cfg.json is missing") from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"corrupt SAE in {directory}: cfg.json: {error}; train or copy it again") from None


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("metadata") or {})


def sae_layer(directory: Path) -> int:
    """The 1-based layer that the SAE in `directory` was trained on."""
    metadata = _metadata(_read_config(directory))
    if "safer_ray_layer" not in metadata:
        raise UserError(f"{directory}/cfg.json does not say its layer; add metadata.safer_ray_layer (1-based)")
    return int(metadata["safer_ray_layer"])


def read_published(path: Path, k: int) -> SignedTopKSae:
    """The SAE in a `stage1.pt` or `stage2.pt` of the published SAFER code, of which only tensors are read.

    It keeps negative activations among its k largest and standardises with an epsilon of 1e-6. The file says neither k
    (64 as published) nor layer.

    Raises:
        UserError: no such file, something else in it, or tensors that do not fit each other.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        weights = {ours: state[theirs].float() for ours, theirs in PUBLISHED.items()}
        _check_finite(weights)
        latents, d = weights["W_enc"].shape
        sae = SignedTopKSae(d, latents, k)
        sae.load_state_dict(weights | {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"].T})
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except (
        torch.serialization.pickle.UnpicklingError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OSError,
        EOFError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or "it is empty"
        raise UserError(
            f"{path} is no SAE of the published code: {reason}; wanted the tensors "
            f"{', '.join(sorted(PUBLISHED.values()))}"
        ) from None
    return sae.eval().requires_grad_(False)
