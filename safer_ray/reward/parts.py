"""A part of a reward model: the blocks of a range, and no weight of any other is read."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from safer_ray.errors import UserError
from safer_ray.reward.pretrained import Checkpoint, open_config, runs_own_code

DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
ENCODERS = ("bert",)  # of which only the first blocks can be a part: the others want more than states
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def splits_up(config: Any, start: int = 0) -> bool:
    """Return whether a part from block `start` + 1 on can be loaded alone."""
    known = config.model_type in DECODERS or (config.model_type in ENCODERS and start == 0)
    return known and not runs_own_code(config)


def part_config(config: Any, start: int, stop: int) -> Any:
    """The config of a model that is blocks start+1..stop of this one."""
    part = type(config)(**config.to_dict())
    part.num_hidden_layers = stop - start
    if getattr(part, "layer_types", None):
        part.layer_types = list(config.layer_types[start:stop])
    if start:  # it is handed states, and looks nothing up
        part.vocab_size, part.pad_token_id = 1, None
    return part


def load_part(
    directory: Path, start: int, stop: int, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> Any:
    """A sequence classifier that is blocks start+1..stop of the one in `directory`; the first part has its embeddings,
    the last its final norm and head. What a part lacks is made anew, and of no use.

    Raises:
        UserError: no safetensors there, no such blocks, weights missing or of another shape, or a model that is not
            known to split up.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    config = open_config(Checkpoint(str(directory), str(directory), None, trust_remote_code))
    count = int(config.num_hidden_layers)
    if not 0 <= start < stop <= count:
        raise UserError(f"{directory} has blocks 1..{count}; there are none from {start + 1} to {stop}")
    if not splits_up(config, start):
        raise UserError(f"{directory}: a {config.model_type} is not known to split up by layers; use reward.shards: 1")
    config.num_labels = 1
    found = {}
    for file, names in _files(directory).items():
        with safe_open(file, framework="pt") as tensors:
            for name in names or tensors.keys():
                renamed = _renamed(name, start, stop, count)
                if renamed is not None:
                    found[renamed] = tensors.get_tensor(name)
    classifier: Any = CLASSES[type(config)]
    model, loaded = classifier.from_pretrained(
        None,
        config=part_config(config, start, stop),
        state_dict=found,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    here = [name for name in loaded["missing_keys"] if _BLOCK.match(name) or _renamed(name, start, stop, count)]
    check_loaded(str(directory), model.base_model_prefix, {**loaded, "missing_keys": here}, whole=True)
    return model.eval()


def check_loaded(name: str, prefix: str, found: dict[str, Any], *, whole: bool) -> None:
    """Compare what a checkpoint held with what its model has; `prefix` is that of the weights behind the head.

    Raises:
        UserError: weights would be drawn by chance: those of another shape, or missing ones; those of the head count
            only where it has to be `whole`.
    """

    def of_head(weight: str) -> bool:
        return not prefix or not weight.startswith(f"{prefix}.") or ".pooler." in weight

    for weight, has, wanted in sorted(found["mismatched_keys"]):
        if of_head(weight):
            raise UserError(
                f"cannot load a reward model from {name}: it has {has[0]} outputs, and a reward model has 1"
            )
        raise UserError(f"{name}: {weight} is {tuple(has)}, by config.json {tuple(wanted)}; copy both files again")
    missing, strange = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    inside = [weight for weight in missing if not of_head(weight)]
    if inside:
        instead = f", but for {strange[0]}; rename them" if strange else "; copy all of its files again"
        raise UserError(f"{name} has no weights for {inside[0]} ({len(inside)} such){instead}")
    if missing and whole:
        raise UserError(
            f"{name} is no reward model: it has no weights for {missing[0]}; train one on it with stage `reward`"
        )


def _files(directory: Path) -> dict[Path, list[str]]:
    """Weight files, and the names of the tensors in each, where an index tells them."""
    if (directory / INDEX).is_file():
        where = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in where.items():
            files.setdefault(directory / file, []).append(name)
        return files
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory} has no {WEIGHTS}; export the model with safetensors")
    return {directory / WEIGHTS: []}


_BLOCK = re.compile(r"\blayers?\.(\d{1,9}+)(?=\.)")  # model.layers.3.…, bert.encoder.layer.3.…


def _renamed(name: str, start: int, stop: int, count: int) -> str | None:
    """Return what a tensor of the whole model is called in its part; None where it is not in it."""
    block = _BLOCK.search(name)
    if block:
        number = int(block[1])
        return f"{name[: block.start(1)]}{number - start}{name[block.end(1) :]}" if start <= number < stop else None
    embeds = "embed" in name
    return name if (embeds and start == 0) or (not embeds and stop == count) else None
