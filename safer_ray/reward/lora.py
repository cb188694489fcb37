"""Train low-rank additions to a reward model's blocks (LoRA) in place of its weights: put them in, merge them, and
export them as peft has them."""

import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safer_ray.config.reward import ALL_LINEAR, LoraConfig, RewardConfig
from safer_ray.data.hub import PREFIX, split_name
from safer_ray.errors import UserError
from safer_ray.reward.adapters import PREFIX as ADAPTED
from safer_ray.reward.bases import checkpoint_of
from safer_ray.reward.folder import ADAPTER, ADAPTER_WEIGHTS
from safer_ray.reward.gguf import is_gguf
from safer_ray.reward.loaded import is_of_head
from safer_ray.reward.model import LORA, RewardModel
from safer_ray.reward.pretrained import without_weights
from safer_ray.storage.files import read_json, write_json

NAME = "default"  # of an adapter in a model, in peft
SHOWN = 12  # names of layers in an error
log = logging.getLogger(__name__)


def add_lora(reward: RewardModel, lora: LoraConfig, seed: int) -> RewardModel:
    """Return this model with additions to the linear layers of its unfrozen blocks, which alone are trained, beside the
    head. They begin as nothing: B is 0, and A is drawn by the seed.

    Raises:
        UserError: a target that no such block has.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    layers = target_layers(reward, lora)
    heads = [name for name, _ in reward.model.named_parameters() if _of_head(name, reward)]
    torch.manual_seed(seed)
    # Every layer by its full name: what a name ends in may be that of a frozen block's layer, too.
    said: dict[str, Any] = {"task_type": "SEQ_CLS", "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": layers}
    with warnings.catch_warnings(action="ignore"):  # peft's, of Conv1D and of names in transformers
        inject_adapter_in_model(PeftConfig(**said), reward.model, NAME)
    for name, parameter in reward.model.named_parameters():
        if name in heads:
            parameter.requires_grad_(True)
    whole = sorted({name.rpartition(".")[0] for name in heads})
    said |= {"inference_mode": True, "modules_to_save": whole, **base_named(reward.name)}
    return replace(reward, adapter=PeftConfig(**said))


def check_targets(config: RewardConfig) -> None:
    """See that what the additions are to be put into is there, before any weight is read.

    Raises:
        UserError: no block is left, or a target is the name of none of their layers; or there is no such base.
    """
    if config.lora is None or not isinstance(config.base, str):
        return
    checkpoint = checkpoint_of(config.base, config)
    if checkpoint.adapter is not None:
        log.warning(
            "reward.lora: %s is an adapter itself, and the one that is trained opens on what it makes of its base: "
            "name a folder of that with adapter_base",
            config.base,
        )
    model = without_weights(checkpoint, config.blocks)
    if model is not None:  # else its own code would run, which it does when training begins
        target_layers(RewardModel(model, None, config.base, config.frozen_layers), config.lora)  # type: ignore[arg-type]


def target_layers(reward: RewardModel, lora: LoraConfig) -> list[str]:
    """Return the full names of the linear layers that get additions: those of unfrozen blocks that `lora` targets.

    Raises:
        UserError: no block is left, or a target is the name of none of their layers.
    """
    blocks = list(reward.blocks())
    names = {id(module): name for name, module in reward.model.named_modules()}
    found: dict[str, str] = {}  # full name, and name in the block
    for block in blocks[reward.frozen_layers :]:
        found |= {f"{names[id(block)]}.{name}": name for name, module in block.named_modules() if _is_linear(module)}
    if not found:
        raise UserError(
            f"reward.lora: {reward.name} has no linear layer in the blocks behind frozen_layers {reward.frozen_layers} "
            f"of {len(blocks)}; lower it, or leave lora out"
        )
    if lora.targets == ALL_LINEAR:
        return list(found)
    for target in lora.targets:
        if not any(_ends_in(name, target) for name in found):
            own = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in found.values()))
            more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            raise UserError(
                f"reward.lora.targets: blocks {reward.frozen_layers + 1} to {len(blocks)} of {reward.name} have no "
                f"linear layer {target!r}; choose among {', '.join(own[:SHOWN])}{more}, or all-linear"
            )
    return [name for name in found if any(_ends_in(name, target) for target in lora.targets)]


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_linear(module: nn.Module) -> bool:
    """Return whether peft adds to a layer as to a matrix of numbers; one that is quantised holds none."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point()


def _of_head(name: str, reward: RewardModel) -> bool:
    in_blocks = {id(parameter) for parameter in reward.blocks().parameters()}
    return is_of_head(name, reward.model) and id(reward.model.get_parameter(name)) not in in_blocks


def base_named(base: str) -> dict[str, str | None]:
    """Return by what name and revision an adapter says which model it was trained on."""
    if not base.startswith(PREFIX) or is_gguf(base):
        return {"base_model_name_or_path": base, "revision": None}
    name, revision = split_name(base)
    return {"base_model_name_or_path": name, "revision": revision}


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model with its additions in them, by the names that it has without: W + alpha/r B A."""
    from peft.tuners.lora import LoraLayer

    found = dict(weights)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        down, up = (found.pop(f"{name}{LORA}{side}.{NAME}.weight").float() for side in "AB")
        addition = layer.scaling[NAME] * (up @ down)
        matrix = found.pop(f"{name}.base_layer.weight")
        # A Conv1D of transformers (GPT-2) holds its matrix the other way round.
        whole = matrix.float() + (addition.T if layer.fan_in_fan_out else addition)  # type: ignore[attr-defined]
        found[f"{name}.weight"] = whole.to(matrix.dtype)
        bias = found.pop(f"{name}.base_layer.bias", None)
        if bias is not None:
            found[f"{name}.bias"] = bias
    return found


def save_adapter(reward: RewardModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the additions and the head alone, in the form in which peft reads them on the base."""
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if LORA in name:
            own[f"{ADAPTED}{name.replace(f'.{NAME}.', '.')}"] = tensor.contiguous()
        elif any(name.startswith(f"{module}.") for module in reward.adapter.modules_to_save):
            own[f"{ADAPTED}{name}"] = tensor.contiguous()
    save_file(own, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    reward.adapter.save_pretrained(str(folder))
    said = read_json(folder / ADAPTER)
    # peft writes them in another order in every process.
    write_json(said | {name: sorted(said[name]) for name in ("target_modules", "modules_to_save")}, folder / ADAPTER)
