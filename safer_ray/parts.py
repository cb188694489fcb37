"""A part of a reward model: the blocks of a range, and no weight of any other is read."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from safer_ray.errors import UserError
from safer_ray.packing import FAMILIES

ENCODERS = ("bert",)  # of which only the first blocks can be a part: the others want more than states
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def splits_up(config: Any, start: int = 0) -> bool:
    """Whether a part from block `start` + 1 on can be loaded alone."""
    return config.model_type in FAMILIES or (config.model_type in ENCODERS and start == 0)


def part_config(config: Any, start: int, stop: int) -> Any:
    """The config of a model that is blocks start+1..stop of this one."""
    part = type(config)(**config.to_dict())
    part.num_hidden_layers = stop - start
    if getattr(part, "layer_types", None):
        part.layer_types = list(config.layer_types[start:stop])
    if start:  # it is handed states, and looks nothing up
        part.vocab_size, part.pad_token_id = 1, None
    return part


def load_part(directory: Path, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Any:
    """A sequence classifier that is blocks start+1..stop of the one in `directory`; the first part has its embeddings,
    the last its final norm and head. What a part lacks is made anew, and of no use.

    Raises:
        UserError: no safetensors there, no such blocks, or a model that is not known to split up.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    config = AutoConfig.from_pretrained(str(directory))
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
    model = classifier.from_pretrained(None, config=part_config(config, start, stop), state_dict=found, dtype=dtype)
    return model.eval()


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
    """What a tensor of the whole model is called in its part; None where it is not in it."""
    block = _BLOCK.search(name)
    if block:
        number = int(block[1])
        return f"{name[: block.start(1)]}{number - start}{name[block.end(1) :]}" if start <= number < stop else None
    embeds = "embed" in name
    return name if (embeds and start == 0) or (not embeds and stop == count) else None
