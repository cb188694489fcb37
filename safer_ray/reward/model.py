"""Reward models: the weights, the tokenizer, and the transformer blocks by number. `forward.py` runs them."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from safer_ray.errors import UserError
from safer_ray.reward.pretrained import reads_every_token
from safer_ray.reward.text import PairTokenizer

CPU_BUDGET, GPU_BUDGET = 1024, 16_384  # padded tokens of a micro-batch; a CPU's cache holds few
LORA = ".lora_"  # in the names of the additions that peft puts beside a layer
LAYER_LISTS = ("layers", "encoder.layer", "transformer.layer", "h", "decoder.layers", "blocks")


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, its tokenizer, and how text is rendered for it; or a part of one."""

    model: Any
    pairs: PairTokenizer
    name: str
    frozen_layers: int = 0  # blocks whose weights are the base's
    before: int = 0  # blocks that run before those here, in another part
    window: int | None = None  # smallest attention window of any layer of the whole model, where this is a part
    pad: int = 0  # fills up batches, where nothing is read
    pads: bool = True  # whether sequences of unlike length run side by side, which moves no reward of most models
    weights: tuple[float, ...] | None = None  # of the outputs of code of a checkpoint's own, where it gives several
    is_cut: bool = False  # of a base of which the first blocks alone are kept, which an adapter does not say
    adapter: Any = None  # peft's configuration of the additions that are trained on it, where there are any
    unread: int | None = None  # the pad token of the checkpoint, behind which its rewards are read; None: it names none

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def budget(self) -> int:
        """Padded tokens of a micro-batch, where nobody says how many."""
        return CPU_BUDGET if self.device.type == "cpu" else GPU_BUDGET

    @property
    def unread_at_end(self) -> int | None:
        """Return the token before which the reward is read where a sequence ends in it; None: none, as in a classifier
        of tokens, which knows no pad token."""
        return None if reads_every_token(self.model.config) else self.unread

    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks, first to last.

        Raises:
            UserError: they are in none of the places where models keep them.
        """
        backbone = self.model.base_model
        for path in LAYER_LISTS:
            try:
                found = backbone.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return found
        raise UserError(f"{self.name}: cannot find the layers of a {type(self.model).__name__}")

    def numbered_blocks(self) -> dict[int, nn.Module]:
        """Return the blocks by their 1-based number in the whole model; those of a later part do not begin at 1."""
        return dict(enumerate(self.blocks(), self.before + 1))

    def head(self) -> nn.Module:
        """Return the last linear layer of one output, which gives the reward.

        Raises:
            UserError: the model has none.
        """
        heads = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == 1 and LORA not in name  # one of rank 1
        ]
        if not heads:
            raise UserError(f"{self.name}: cannot find the reward head of a {type(self.model).__name__}")
        return heads[-1]

    def reads_states(self) -> nn.Module:
        """Return the module that tells what rewards are read from in code of a checkpoint's own: a last linear layer of
        one output, of what it is given; else the blocks' own module, of what it gives.
        """
        try:
            return self.head()
        except UserError:
            return self.model.base_model

    def check_layer(self, layer: int) -> None:
        """Raises UserError unless 1 <= layer <= number of blocks, up to the last one here."""
        count = self.before + len(self.blocks())
        if not 1 <= layer <= count:
            raise UserError(f"layer {layer} lies past the {count} layers of {self.name}; choose 1..{count}")

    def freeze(self, layers: int) -> "RewardModel":
        """Return this model with blocks 1..`layers` and all that runs before them left out of training.

        Raises:
            UserError: the model has fewer blocks, or its sequences run one by one.
        """
        if not self.pads:
            raise UserError(
                f"{self.name}: its sequences run one by one, so no layers can be frozen; set frozen_layers: 0"
            )
        self.check_layer(layers)
        frozen = replace(self, frozen_layers=layers)
        for parameter in frozen.trunk_parameters():
            parameter.requires_grad_(False)
        return frozen

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the frozen blocks and of all that runs before them.

        Models list their parameters in the order in which they run, so that these are all up to the last of a frozen
        block.
        """
        in_frozen_blocks: set[int] = set()
        for block in list(self.blocks())[: self.frozen_layers]:
            in_frozen_blocks.update(id(parameter) for parameter in block.parameters())
        parameters = list(self.model.parameters())
        count = 0
        for number, parameter in enumerate(parameters, 1):
            if id(parameter) in in_frozen_blocks:
                count = number
        return parameters[:count]

    @cached_property
    def trunk_key(self) -> bytes:
        """Equal for models whose frozen blocks are equal."""
        digest = hashlib.sha256(str(self.frozen_layers).encode())
        for parameter in self.trunk_parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()
