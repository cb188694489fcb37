"""Adapters of peft, merged into the model that they were trained on."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from safer_ray.errors import UserError
from safer_ray.reward.blocks import lies_behind
from safer_ray.reward.folder import ADAPTER_BIN, ADAPTER_WEIGHTS, adapter_settings, words_of
from safer_ray.reward.loaded import is_of_head

PREFIX = "base_model.model."  # of the names of all tensors in an adapter
WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)\.")  # in the name of a weight that is whole
UNTRAINED = ".original_module."  # of one that is there as it is in the base, too


def merge_adapter(
    name: str, base: str, model: Any, found: dict[str, Any], folder: Path, blocks: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return a classifier with the adapter in a folder merged into it, and what transformers says of loading it less
    what the adapter brings: a head, say, that the base does not have. Of a base cut to its first `blocks`, what is
    behind them is left out.

    Of a head with other outputs than the model's, the sizes are noted and nothing is read.

    Raises:
        UserError: the adapter is none that can be merged, or it was trained on another model than `base`.
    """
    try:
        weights = _weights(folder)
    except Exception as error:  # torch raises what it likes of a damaged pickle
        raise UserError(f"cannot read the weights of {name}: {words_of(error)}") from error
    weights = {key: tensor for key, tensor in weights.items() if UNTRAINED not in key}
    if blocks is not None:
        weights = {key: tensor for key, tensor in weights.items() if not lies_behind(key, blocks)}
    own = model.state_dict()
    whole = {_plain(key): tensor for key, tensor in weights.items() if _plain(key) in own}
    adapted = {key: tensor for key, tensor in weights.items() if _plain(key) not in whole}
    mismatched = {each for each in found["mismatched_keys"] if each[0] not in whole}
    for key, tensor in list(whole.items()):
        wanted = tuple(own[key].shape)
        if tuple(tensor.shape) == wanted:
            continue
        if is_of_head(key, model) and tensor.shape[1:] == own[key].shape[1:]:
            mismatched.add((key, tuple(tensor.shape), wanted))
            del whole[key]
        elif own[key] is model.get_input_embeddings().weight or key.endswith(_embedding_name(model)):
            _enlarge(name, base, model, key, tensor)
        else:
            raise UserError(
                f"{name} is no adapter of {base}: its {key} is {tuple(tensor.shape)}, that of the base {wanted}; "
                "name its own base with adapter_base"
            )
    model.load_state_dict(whole, strict=False)
    try:
        merged = _merged(model, folder, adapted)
    except UserError as error:
        raise UserError(f"{name} cannot be merged into {base}: {error}") from None
    missing = set(found["missing_keys"]) - set(whole)
    return merged, {**found, "missing_keys": missing, "mismatched_keys": mismatched}


def _plain(key: str) -> str:
    """Return what a weight is called in the model, of one that is whole."""
    return WRAPPED.sub(".", key.removeprefix(PREFIX))


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return load_file(folder / ADAPTER_WEIGHTS)
    weights: dict[str, Tensor] = torch.load(folder / ADAPTER_BIN, map_location="cpu", weights_only=True)
    return weights


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _enlarge(name: str, base: str, model: Any, key: str, tensor: Tensor) -> None:
    """Give a model the rows for tokens that its adapter adds."""
    rows, width = model.get_input_embeddings().weight.shape
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise UserError(
            f"{name} is no adapter of {base}: its {key} is {tuple(tensor.shape)}, that of the base {(rows, width)}; "
            "name its own base with adapter_base"
        )
    model.resize_token_embeddings(len(tensor), mean_resizing=False)


def _excluded(config: Any) -> Any:
    """Return which modules an adapter leaves alone, in peft's form: also those that it holds whole."""
    whole = list(config.modules_to_save or ())
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *(rf"(?:.*\.)?{re.escape(name)}" for name in whole)])
    return [*(excluded or ()), *whole] or None


def _merged(model: Any, folder: Path, weights: dict[str, Tensor]) -> Any:
    """Return the model with these adapted weights merged, in the precision that it has.

    Raises:
        UserError: peft does not merge them, or they are not those of this model.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    if adapter_settings(folder).get("megatron_config"):
        raise UserError("it names a module of Megatron to import; train it without megatron_config")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are compared below
            config = PeftConfig.from_pretrained(str(folder))
            tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
            if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
                raise UserError(
                    f"an adapter of type {getattr(config.peft_type, 'value', config.peft_type)} changes no weights; "
                    "pass one that does, say LORA"
                )
            config.inference_mode = True
            config.exclude_modules = _excluded(config)
            config.modules_to_save = None  # those are whole, and are in the model by now
            adapted = PeftModel(model, config)
            result: Any = set_peft_model_state_dict(adapted, weights)
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
            missing = [key for key in result.missing_keys if prefix and prefix in key]
            for keys, told in ((result.unexpected_keys, "the base has no place for"), (missing, "it has no")):
                if keys:
                    first = sorted(keys)[0].removeprefix(PREFIX)
                    raise UserError(
                        f"{told} {first} ({len(keys)} such); name its own base with adapter_base, or copy it again"
                    )
            return adapted.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except Exception as error:  # each method raises its own
        raise UserError(f"{words_of(error)}; name its own base with adapter_base, or copy it again") from error
