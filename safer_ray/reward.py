"""Reward models: the forward pass, with a hidden layer on the way, or from one on."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import UserError
from safer_ray.packing import pack, pack_batch, packs, smallest_window
from safer_ray.text import PairTokenizer, PairTokens, both_sides
from safer_ray.trunk import States, memory

Layers = int | tuple[int, ...] | None  # of which the output is wanted, side by side where they are several
LAYER_LISTS = ("layers", "encoder.layer", "transformer.layer", "h", "decoder.layers")


class Forward(NamedTuple):
    """Of a batch of sequences: rewards, and the raw layer vectors asked for, in input order."""

    rewards: Float[Tensor, " n"] | None
    hidden: list[Float[Tensor, "m d"]] | None
    heads: Float[Tensor, "n d"] | None = None  # what the reward head reads


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer wanted."""


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, its tokenizer, and how text is rendered for it."""

    model: Any
    pairs: PairTokenizer
    name: str
    frozen_layers: int = 0  # blocks whose weights are the base's

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad(self) -> int:
        return int(self.pairs.tokenizer.pad_token_id)

    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        backbone = self.model.base_model
        for path in LAYER_LISTS:
            try:
                found = backbone.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return found
        raise UserError(f"{self.name}: cannot find the layers of a {type(self.model).__name__}")

    def check_layer(self, layer: int) -> None:
        """Raises UserError unless 1 <= layer <= number of blocks."""
        count = len(self.blocks())
        if not 1 <= layer <= count:
            raise UserError(f"layer {layer} lies past the {count} layers of {self.name}; choose 1..{count}")

    def freeze(self, layers: int) -> "RewardModel":
        """This model with blocks 1..`layers` and all that runs before them left out of training.

        Raises:
            UserError: the model has fewer blocks.
        """
        self.check_layer(layers)
        frozen = replace(self, frozen_layers=layers)
        for parameter in frozen.trunk_parameters():
            parameter.requires_grad_(False)
        return frozen

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Of the frozen blocks and all that runs before them."""
        inside = {id(p) for block in list(self.blocks())[: self.frozen_layers] for p in block.parameters()}
        parameters = list(self.model.parameters())
        last = max((i for i, parameter in enumerate(parameters) if id(parameter) in inside), default=-1)
        return parameters[: last + 1]

    @cached_property
    def trunk_key(self) -> bytes:
        """Equal for models whose frozen blocks are equal."""
        digest = hashlib.sha256(str(self.frozen_layers).encode())
        for parameter in self.trunk_parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    def trunk(self, sequences: Sequence[np.ndarray]) -> States:
        """The output of the last frozen block at every token, remembered inside `trunk.remembered`."""
        known = memory()
        return self._trunk(sequences) if known is None else known.get(self.trunk_key, sequences, self._trunk)

    @torch.inference_mode()
    def _trunk(self, sequences: Sequence[np.ndarray]) -> States:
        found: States = [torch.empty(0)] * len(sequences)
        for chunk in micro_batches([len(s) for s in sequences], 16_384):
            _, states = self._run([sequences[i] for i in chunk], self.frozen_layers, rewards=False)
            assert states is not None
            for j, i in enumerate(chunk):
                found[i] = states[j, : len(sequences[i])].float().cpu().clone()
        return found

    def _shortcut(self, sequences: Sequence[np.ndarray], layer: Layers) -> contextlib.AbstractContextManager[None]:
        """Passes inside begin behind the frozen blocks, where these are remembered and `layer` is not among them."""
        if (
            memory() is None
            or not self.frozen_layers
            or min(_several(layer), default=self.frozen_layers) < self.frozen_layers
        ):
            return contextlib.nullcontext()
        return self.behind(self.frozen_layers, pad_sequence(self.trunk(sequences), batch_first=True))

    @contextlib.contextmanager
    def behind(self, layer: int, states: Float[Tensor, "n width d"]) -> Iterator[None]:
        """Forward passes inside begin behind block `layer`, whose output is given."""
        blocks = list(self.blocks())[:layer]
        patched = [vars(block).get("forward") for block in blocks]  # by whoever wrapped the model

        def known(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return states.to(hidden)

        for block in blocks:
            block.forward = known
        try:
            yield
        finally:
            for block, before in zip(blocks, patched, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before

    @torch.inference_mode()
    def forward(
        self,
        sequences: Sequence[np.ndarray],
        *,
        layer: Layers = None,
        positions: Sequence[np.ndarray] | None = None,
        rewards: bool = True,
        budget: int = 16_384,
    ) -> Forward:
        """Rewards of token sequences, and the output of block `layer` (1-based) at `positions` of each.

        Sequences are sorted by length and cut into micro-batches of at most `budget` padded tokens; results come back
        in input order. Without `rewards`, the blocks after `layer` do not run.
        """
        scores = torch.zeros(len(sequences)) if rewards else None
        hidden: list[Tensor] | None = [torch.empty(0)] * len(sequences) if layer is not None else None
        for chunk in micro_batches([len(s) for s in sequences], budget):
            rows = [sequences[i] for i in chunk]
            with self._shortcut(rows, layer):
                logits, states = self._run(rows, layer, rewards)
            for j, i in enumerate(chunk):
                if scores is not None and logits is not None:
                    scores[i] = logits[j]
                if hidden is not None and states is not None and positions is not None:
                    hidden[i] = states[j, torch.as_tensor(positions[i], dtype=torch.long)].float().cpu()
        return Forward(scores, hidden)

    def packs(self, pair: PairTokens) -> bool:
        """Whether a pair runs as one sequence: a causal model whose every layer sees all of a side.

        Where the frozen blocks' outputs are remembered, by sequence, no pair does.
        """
        config = self.model.config
        if not packs(config) or (memory() is not None and self.frozen_layers):
            return False
        window = smallest_window(config)
        return window is None or max(len(pair.chosen.ids), len(pair.rejected.ids)) <= window

    def forward_pairs(
        self,
        pairs: Sequence[PairTokens],
        *,
        layer: Layers = None,
        positions: Sequence[np.ndarray] | None = None,
        rewards: bool = True,
        heads: bool = False,
        budget: int = 16_384,
    ) -> Forward:
        """`forward` of both sides of pairs, chosen then rejected of each in turn; `positions` are by side.

        Pairs that can be packed run as one sequence each, the others as two. `heads` asks for what the reward head
        reads, too.
        """
        sides = both_sides(pairs)
        together = [i for i, pair in enumerate(pairs) if self.packs(pair)]
        packed = [2 * i + side for i in together for side in (0, 1)]
        apart = sorted({*range(len(sides))} - {*packed})

        def asked(rows: list[int]) -> list[np.ndarray] | None:
            return [positions[i] for i in rows] if positions is not None else None

        found = []
        if apart:
            ids = [sides[i].ids for i in apart]
            output = self.forward(ids, layer=layer, positions=asked(apart), rewards=rewards, budget=budget)
            found.append((apart, output._replace(heads=self.head_inputs(ids, budget) if heads else None)))
        if packed:
            rows = [pairs[i] for i in together]
            found.append((packed, self._packed(rows, layer, asked(packed), rewards or heads, budget)))

        def in_order(column: str) -> list[Tensor]:
            values = {i: v for where, output in found for i, v in zip(where, getattr(output, column), strict=True)}
            return [values[i] for i in range(len(sides))]

        return Forward(
            torch.stack(in_order("rewards")) if rewards and sides else torch.zeros(0) if rewards else None,
            in_order("hidden") if layer is not None else None,
            torch.stack(in_order("heads")) if heads else None,
        )

    @torch.inference_mode()
    def _packed(
        self,
        pairs: Sequence[PairTokens],
        layer: Layers,
        positions: Sequence[np.ndarray] | None,
        whole: bool,
        budget: int,
    ) -> Forward:
        """Both sides of pairs that are packed; the blocks after `layer` run where the `whole` model is asked for."""
        together = [pack(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
        scores, read = torch.zeros(2 * len(pairs)), torch.zeros(2 * len(pairs), self.hidden_size)
        hidden = [torch.empty(0)] * (2 * len(pairs))
        for chunk in micro_batches([len(p.ids) for p in together], budget):
            batch = pack_batch([together[i] for i in chunk], self.pad, self.device, self.model.dtype)
            last, states = self._through(self.model.base_model, batch | {"use_cache": False}, layer, whole)
            for j, i in enumerate(chunk):
                for side, tokens in enumerate((pairs[i].chosen, pairs[i].rejected)):
                    if states is not None and positions is not None:
                        at = together[i].places(side, np.asarray(positions[2 * i + side]))
                        hidden[2 * i + side] = states[j, torch.from_numpy(at).long()].float().cpu()
                    if last is not None:
                        end = together[i].places(side, np.array([last_token(tokens.ids, self.pad)]))
                        value = last.last_hidden_state[j, int(end[0])]
                        read[2 * i + side] = value.float().cpu()
                        scores[2 * i + side] = self.model.score(value)[0].float().cpu()
        return Forward(scores, hidden if layer is not None else None, read)

    @torch.inference_mode()
    def head_inputs(self, sequences: Sequence[np.ndarray], budget: int = 16_384) -> Float[Tensor, "n d"]:
        """What the last linear layer, the reward head, reads of each sequence; in input order."""
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise UserError(f"{self.name}: cannot find the reward head of a {type(self.model).__name__}")
        read: list[Tensor] = []
        found = [torch.empty(0)] * len(sequences)
        handle = heads[-1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        try:
            for chunk in micro_batches([len(s) for s in sequences], budget):
                rows = [sequences[i] for i in chunk]
                with self._shortcut(rows, None):
                    self.model(**pad_batch(rows, self.pad, self.device))
                values = read.pop().float().cpu()
                for j, i in enumerate(chunk):  # a decoder's head reads every token
                    found[i] = values[j] if values.ndim == 2 else values[j, last_token(sequences[i], self.pad)]
        finally:
            handle.remove()
        return torch.stack(found)

    def _run(self, sequences: list[np.ndarray], layer: Layers, rewards: bool) -> tuple[Tensor | None, Tensor | None]:
        output, states = self._through(self.model, pad_batch(sequences, self.pad, self.device), layer, rewards)
        return output.logits[:, 0].float().cpu() if output is not None else None, states

    def _through(self, module: Any, batch: dict[str, Any], layer: Layers, whole: bool) -> tuple[Any, Tensor | None]:
        """What a module gives, None where it ends at `layer`, and what block `layer` gives."""
        caught: list[Tensor] = []
        layers = _several(layer)

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)
            if len(caught) == len(layers) and not whole:
                raise _LayerReachedError

        handles = [self.blocks()[number - 1].register_forward_hook(catch) for number in layers]
        try:
            output = module(**batch)
        except _LayerReachedError:
            output = None
        finally:
            for handle in handles:
                handle.remove()
        return output, torch.cat(caught, dim=-1) if caught else None


def _several(layer: Layers) -> tuple[int, ...]:
    return () if layer is None else (layer,) if isinstance(layer, int) else layer


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by rising length, cut so that a micro-batch has at most `budget` padded tokens, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def last_token(ids: np.ndarray, pad: int) -> int:
    """Whose state the reward is read from: the last token that is no padding, as transformers finds it."""
    real = np.flatnonzero(ids != pad)
    return int(real[-1]) if len(real) else 0


def pad_batch(sequences: Sequence[np.ndarray], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`."""
    width = max(1, *(len(s) for s in sequences))
    ids = np.full((len(sequences), width), pad, dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
