"""Reward models: the forward pass, with hidden layers on the way, or from one on."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import UserError
from safer_ray.packing import Packed, alone, ends, micro_batches, pack, pack_batch, packs, pad_batch, smallest_window
from safer_ray.text import PairTokenizer, PairTokens
from safer_ray.trunk import States, memory

CPU_BUDGET, GPU_BUDGET = 2048, 16_384  # padded tokens of a micro-batch; a CPU's cache holds few
LAYER_LISTS = ("layers", "encoder.layer", "transformer.layer", "h", "decoder.layers")


class Ask(NamedTuple):
    """What a forward pass is for."""

    layers: tuple[int, ...] = ()  # blocks, 1-based, whose outputs are wanted, side by side
    rewards: bool = True
    heads: bool = False  # what the reward head reads
    states: bool = False  # what the last block gives at every token, for the part of the model behind this one

    @property
    def whole(self) -> bool:
        """Whether all blocks run."""
        return self.rewards or self.heads


class Forward(NamedTuple):
    """Of a batch of sequences, or of the sides of pairs: what was asked for, in input order."""

    rewards: Float[Tensor, " n"] | None
    hidden: list[Float[Tensor, "m d"]] | None
    heads: Float[Tensor, "n d"] | None = None
    states: list[States] | None = None  # of every pair: of one row where it was packed, else of two


class _Pass(NamedTuple):
    """Of a micro-batch: what blocks give, and of each side the reward and what the head reads."""

    blocks: dict[int, Float[Tensor, "n width d"]]
    rewards: Float[Tensor, " sides"] | None = None
    heads: Float[Tensor, "sides d"] | None = None


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer wanted."""


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, its tokenizer, and how text is rendered for it; or a part of one."""

    model: Any
    pairs: PairTokenizer
    name: str
    frozen_layers: int = 0  # blocks whose weights are the base's
    before: int = 0  # blocks that run before those here, in another part
    window: int | None = None  # of the whole model's shortest-sighted layer, where this is a part

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad(self) -> int:
        return int(self.pairs.tokenizer.pad_token_id)

    @property
    def budget(self) -> int:
        """Padded tokens of a micro-batch, where nobody says how many."""
        return CPU_BUDGET if self.device.type == "cpu" else GPU_BUDGET

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
        """Raises UserError unless 1 <= layer <= number of blocks, up to the last one here."""
        count = self.before + len(self.blocks())
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

    def _trunk(self, sequences: Sequence[np.ndarray]) -> States:
        running = replace(self, frozen_layers=0)  # blocks that nobody remembers
        places = [np.arange(len(s)) for s in sequences]
        found = running.forward(sequences, layers=(self.frozen_layers,), positions=places, rewards=False).hidden
        assert found is not None
        return [states.clone() for states in found]

    def _shortcut(self, sequences: Sequence[np.ndarray], ask: Ask) -> contextlib.AbstractContextManager[None]:
        """Passes inside begin behind the frozen blocks, where these are remembered and no earlier one is asked for."""
        if (
            memory() is None
            or not self.frozen_layers
            or min(ask.layers, default=self.frozen_layers) < self.frozen_layers
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

    def forward(
        self,
        sequences: Sequence[np.ndarray],
        *,
        layers: Sequence[int] = (),
        positions: Sequence[np.ndarray] | None = None,
        rewards: bool = True,
        heads: bool = False,
        budget: int | None = None,
    ) -> Forward:
        """Rewards of token sequences, and the outputs of blocks `layers` (1-based) at `positions` of each.

        Sequences are sorted by length and cut into micro-batches of at most `budget` padded tokens; results come back
        in input order. Without `rewards` and `heads`, the blocks after the last of `layers` do not run.

        Raises:
            UserError: a sequence that does not fit the memory.
        """
        names = [f"sequence {i}" for i in range(len(sequences))]
        ask = Ask(tuple(layers), rewards, heads)
        return self._read([alone(ids) for ids in sequences], names, ask, positions, budget)[0]

    def packs(self, pair: PairTokens) -> bool:
        """Whether a pair runs as one sequence: a causal model whose every layer sees all of a side.

        Where the frozen blocks' outputs are remembered, by sequence, no pair does.
        """
        config = self.model.config
        if not packs(config) or (memory() is not None and self.frozen_layers):
            return False
        window = self.window or smallest_window(config)
        return window is None or max(len(pair.chosen.ids), len(pair.rejected.ids)) <= window

    def forward_pairs(
        self,
        pairs: Sequence[PairTokens],
        *,
        layers: Sequence[int] = (),
        positions: Sequence[np.ndarray] | None = None,
        rewards: bool = True,
        heads: bool = False,
        budget: int | None = None,
        before: Forward | None = None,
        states: bool = False,
    ) -> Forward:
        """`forward` of both sides of pairs, chosen then rejected of each in turn; `positions` are by side.

        Pairs that can be packed run as one sequence each, the others as two. Of a model in parts, each goes on from
        what the part `before` gave, and all but the last are asked for `states`.

        Raises:
            UserError: a pair that does not fit the memory.
        """
        rows: list[list[Packed]] = []
        for i, pair in enumerate(pairs):
            ids = pair.chosen.ids, pair.rejected.ids
            packed = self.packs(pair) if before is None or before.states is None else len(before.states[i]) == 1
            rows.append([pack(*ids)] if packed else [alone(side) for side in ids])
        names = [f"pair {pair.pair_id!r}" for pair, own in zip(pairs, rows, strict=True) for _ in own]
        given = [state for own in before.states for state in own] if before and before.states is not None else None
        ask = Ask(tuple(layers), rewards, heads, states)
        found, last = self._read([row for own in rows for row in own], names, ask, positions, budget, given)
        if states:
            each = iter(last)
            found = found._replace(states=[[next(each) for _ in own] for own in rows])
        if before is not None and before.hidden is not None and found.hidden is not None:
            both = zip(before.hidden, found.hidden, strict=True)
            found = found._replace(hidden=[torch.cat([early, late], dim=-1) for early, late in both])
        return found

    def _read(
        self,
        rows: Sequence[Packed],
        names: Sequence[str],
        ask: Ask,
        positions: Sequence[np.ndarray] | None,
        budget: int | None,
        given: Sequence[Tensor] | None = None,
    ) -> tuple[Forward, States]:
        """What is asked of all sides of rows, in their order, and what the last block gives of each row."""
        first = np.cumsum([0, *(len(row.lengths) for row in rows)]).tolist()  # number of each row's first side
        count, width = first[-1], self.hidden_size
        rewards, heads = torch.zeros(count), torch.zeros(count, width if ask.heads else 0)
        hidden = [torch.empty(0, 0)] * count
        states = [torch.empty(0)] * len(rows)
        for chunk, found in self._passes(rows, names, ask, budget or self.budget, given):
            sides = [(j, i, side) for j, i in enumerate(chunk) for side in range(len(rows[i].lengths))]
            numbers = [first[i] + side for _, i, side in sides]
            if found.rewards is not None:
                rewards[numbers] = found.rewards.float().cpu()
            if ask.heads and found.heads is not None:
                heads[numbers] = found.heads.float().cpu()
            wanted = [found.blocks[layer] for layer in sorted(ask.layers) if layer in found.blocks]
            if positions is not None:
                places = [rows[i].places(side, np.asarray(positions[first[i] + side])) for _, i, side in sides]
                row = np.repeat([j for j, _, _ in sides], [len(at) for at in places])
                at = torch.from_numpy(np.concatenate(places).astype(np.int64)).to(self.device)
                read = [block[torch.from_numpy(row).to(self.device), at] for block in wanted]
                values = torch.cat(read, dim=-1).float().cpu() if read else torch.empty(len(row), 0)
                for number, value in zip(numbers, values.split([len(place) for place in places]), strict=True):
                    hidden[number] = value
            if ask.states:
                last = found.blocks[self.before + len(self.blocks())]
                for j, i in enumerate(chunk):
                    states[i] = last[j, : len(rows[i].ids)].cpu()
        return Forward(
            rewards if ask.rewards else None, hidden if ask.layers else None, heads if ask.heads else None
        ), states

    def _passes(
        self, rows: Sequence[Packed], names: Sequence[str], ask: Ask, budget: int, given: Sequence[Tensor] | None
    ) -> Iterator[tuple[list[int], _Pass]]:
        """Micro-batches of rows, and their passes; one that does not fit the memory is cut to half the budget, once."""

        def run(chunk: list[int]) -> _Pass:
            return self._pass([rows[i] for i in chunk], ask, [given[i] for i in chunk] if given is not None else None)

        for sides in (1, 2):
            alike = [i for i, row in enumerate(rows) if len(row.lengths) == sides]
            for chunk in _cut(rows, alike, budget):
                found = _unless_too_large(run, chunk)
                if found is not None:
                    yield chunk, found
                    continue
                for part in _cut(rows, chunk, budget // 2):
                    found = _unless_too_large(run, part)
                    if found is None:
                        raise UserError(
                            f"{names[part[-1]]} has {len(rows[part[-1]].ids)} tokens, which do not fit the memory "
                            f"beside {self.name}; lower max_length, leave the pair out, or raise reward.shards"
                        )
                    yield part, found

    @torch.inference_mode()
    def _pass(self, rows: list[Packed], ask: Ask, given: list[Tensor] | None) -> _Pass:
        """One micro-batch of rows that all have as many sides."""
        ids, device, dtype = [row.ids for row in rows], self.device, self.model.dtype
        packed = len(rows[0].lengths) > 1
        batch = pack_batch(rows, self.pad, device, dtype) if packed else pad_batch(ids, self.pad, device)
        if given is not None:
            states = pad_sequence(given, batch_first=True).to(device, dtype)
            batch = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": states}
        with contextlib.ExitStack() as stack:
            if given is not None:
                stack.enter_context(self._enter(states))
            elif not packed:
                stack.enter_context(self._shortcut(ids, ask))
            if packs(self.model.config):
                blocks, output = self._through(self.model.base_model, batch | {"use_cache": False}, ask)
                heads = None if output is None else ends(output.last_hidden_state, rows, self.pad)
                return _Pass(blocks, None if heads is None else self.model.score(heads)[:, 0], heads)
            with self._head_inputs() as read:
                blocks, output = self._through(self.model, batch, ask)
            if output is None:
                return _Pass(blocks)
            values = read.pop()  # a decoder's head reads every token
            heads = values if values.ndim == 2 else ends(values, rows, self.pad)
            return _Pass(blocks, output.logits[:, 0], heads)

    def _through(self, module: Any, batch: dict[str, Any], ask: Ask) -> tuple[dict[int, Tensor], Any]:
        """What the blocks asked for give, and what the module does: None where it ends at one of them."""
        caught: dict[int, Tensor] = {}
        blocks = dict(enumerate(self.blocks(), self.before + 1))
        wanted = {layer for layer in ask.layers if layer in blocks} | ({max(blocks)} if ask.states else set())
        end = None if ask.whole and not ask.states else max(wanted)

        def catch(number: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                caught[number] = output[0] if isinstance(output, tuple) else output
                if number == end:
                    raise _LayerReachedError

            return hook

        handles = [blocks[number].register_forward_hook(catch(number)) for number in wanted]
        try:
            return caught, module(**batch)
        except _LayerReachedError:
            return caught, None
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _enter(self, states: Tensor) -> Iterator[None]:
        """Forward passes inside begin at the first block here, which is given states; some models scale embeddings."""
        handle = self.blocks()[0].register_forward_pre_hook(
            lambda _module, inputs, named: ((states, *inputs[1:]), named), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _head_inputs(self) -> Iterator[list[Tensor]]:
        """What the last linear layer, the reward head, reads in forward passes inside."""
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise UserError(f"{self.name}: cannot find the reward head of a {type(self.model).__name__}")
        read: list[Tensor] = []
        handle = heads[-1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        try:
            yield read
        finally:
            handle.remove()


def _cut(rows: Sequence[Packed], numbers: Sequence[int], budget: int) -> Iterator[list[int]]:
    for chunk in micro_batches([len(rows[i].ids) for i in numbers], budget):
        yield [numbers[j] for j in chunk]


def _unless_too_large(run: Callable[[list[int]], _Pass], chunk: list[int]) -> _Pass | None:
    """The pass of a micro-batch; None where the memory did not suffice."""
    try:
        return run(chunk)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # as torch says it of a CPU's
            raise
    return None
