"""A part of a reward model: the blocks of a range, and no weight of any other is read."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from safer_ray.config.head import HeadConfig
from safer_ray.errors import UserError
from safer_ray.reward.blocks import BLOCK, keep_blocks
from safer_ray.reward.folder import weight_files
from safer_ray.reward.heads import open_with_head
from safer_ray.reward.pretrained import (
    Checkpoint,
    check_config_runs,
    in_16_bits,
    is_mixed,
    open_config,
    reads_every_token,
    runs_own_code,
    set_outputs,
)

DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
ENCODERS = ("bert",)  # of which only the first blocks can be a part: the others want more than states


def splits_up(config: Any, start: int = 0) -> bool:
    """Return whether a part from block `start` + 1 on can be loaded alone."""
    known = config.model_type in DECODERS or (config.model_type in ENCODERS and start == 0)
    return known and not runs_own_code(config) and not getattr(config, "quantization_config", None)


def check_blocks(name: str, config: Any, blocks: int | None) -> int:
    """Return how many blocks a model has of which the first `blocks` are kept; None: all.

    Raises:
        UserError: it has fewer, or is not known to be a model still when the others are left out.
    """
    count = int(config.get_text_config().num_hidden_layers)
    if blocks is None:
        return count
    if blocks > count:
        raise UserError(f"reward.blocks {blocks} lies past the {count} layers of {name}; choose 1..{count}")
    if not splits_up(config):
        raise UserError(
            f"reward.blocks: a {config.model_type} ({name}) is not known to split up by layers, as {_known()} are; "
            "leave it out"
        )
    return blocks


def _known() -> str:
    return ", ".join(sorted((*DECODERS, *ENCODERS)))


def part_config(config: Any, start: int, stop: int) -> Any:
    """The config of a model that is blocks start+1..stop of this one."""
    part = keep_blocks(config, start, stop)
    if start:  # it is handed states, and looks nothing up
        part.vocab_size, part.pad_token_id = 1, None
    return part


def load_part(
    directory: Path,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    head: HeadConfig | None = None,
) -> Any:
    """A classifier that is blocks start+1..stop of the one in `directory`; the first part has its embeddings, the last
    its final norm and head, of which `head` chooses. What a part lacks is made anew, and of no use.

    Raises:
        UserError: no safetensors there, no such blocks, weights missing or of another shape, or a model that is not
            known to split up.
    """
    from transformers.models.auto import modeling_auto as auto

    config = open_config(Checkpoint(str(directory), str(directory), None, trust_remote_code))
    count, outputs = int(config.num_hidden_layers), int(config.num_labels)
    if not 0 <= start < stop <= count:
        raise UserError(f"{directory} has blocks 1..{count}; there are none from {start + 1} to {stop}")
    if not splits_up(config, start):
        raise UserError(f"{directory}: a {config.model_type} is not known to split up by layers; use reward.shards: 1")
    check_config_runs(str(directory), config)
    found = {}
    for file, names in weight_files(directory).items():
        with safe_open(file, framework="pt") as tensors:
            for name in names or tensors.keys():
                renamed = _renamed(name, start, stop, count)
                if renamed is not None:
                    found[renamed] = tensors.get_tensor(name)
    classes: Any = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if reads_every_token(config):
        classes = auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    def open_with(outputs: int) -> tuple[Any, dict[str, Any]]:
        set_outputs(config, outputs)
        kind = classes[type(config)]
        kind = in_16_bits(kind, config) if is_mixed(config, dtype) else kind
        model, loaded = kind.from_pretrained(
            None,
            config=part_config(config, start, stop),
            state_dict=found,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        here = [name for name in loaded["missing_keys"] if BLOCK.match(name) or _renamed(name, start, stop, count)]
        return model, {**loaded, "missing_keys": here}

    head = head if stop == count else None
    model = open_with_head(str(directory), open_with, found.__getitem__, head, outputs=outputs, whole=True)
    return model.eval()


def _renamed(name: str, start: int, stop: int, count: int) -> str | None:
    """Return what a tensor of the whole model is called in its part; None where it is not in it."""
    block = BLOCK.search(name)
    if block:
        number = int(block[1])
        return f"{name[: block.start(1)]}{number - start}{name[block.end(1) :]}" if start <= number < stop else None
    embeds = "embed" in name
    return name if (embeds and start == 0) or (not embeds and stop == count) else None
