"""Reward models: the forward pass, with hidden layers on the way, or from one on."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import TooLargeError, UserError
from safer_ray.reward import hooks
from safer_ray.reward.batches import passes
from safer_ray.reward.packing import (
    Index,
    Packed,
    alone,
    end_index,
    fork_of,
    has_dropout,
    pack,
    pack_batch,
    packs,
    pad_batch,
    place_index,
    smallest_window,
)
from safer_ray.reward.pretrained import runs_own_code
from safer_ray.reward.text import PairTokenizer, PairTokens
from safer_ray.reward.trunk import States, memory

CPU_BUDGET, GPU_BUDGET = 1024, 16_384  # padded tokens of a micro-batch; a CPU's cache holds few
MASK = 2**26  # entries of a micro-batch's mask where pairs are packed for training: 256 MB
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
    """Of a micro-batch: what was asked for of its sides in turn, and of its rows."""

    hidden: Float[Tensor, "places width"] | None
    rewards: Float[Tensor, " sides"] | None
    heads: Float[Tensor, "sides d"] | None
    states: States


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, its tokenizer, and how text is rendered for it; or a part of one."""

    model: Any
    pairs: PairTokenizer
    name: str
    frozen_layers: int = 0  # blocks whose weights are the base's
    before: int = 0  # blocks that run before those here, in another part
    window: int | None = None  # of the whole model's shortest-sighted layer, where this is a part
    unread: int | None = None  # the pad token of the checkpoint, behind which its rewards are read; None: it names none

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
            TooLargeError: sequences that do not fit the memory.
        """
        names = [f"sequence {i}" for i in range(len(sequences))]
        ask = Ask(tuple(layers), rewards, heads)
        return self._read([alone(ids) for ids in sequences], names, ask, positions, budget)[0]

    def packs(self, pair: PairTokens) -> bool:
        """Whether a pair runs as one sequence: a causal model whose every layer sees all of a side, and no more tokens
        than a micro-batch has, since its mask is their number squared.

        Where the frozen blocks' outputs are remembered, by sequence, no pair does.
        """
        config = self.model.config
        if not packs(config) or (memory() is not None and self.frozen_layers):
            return False
        chosen, rejected = pair.chosen.ids, pair.rejected.ids
        if len(chosen) + len(rejected) - fork_of(chosen, rejected) > self.budget:
            return False
        window = self.window or smallest_window(config)
        return window is None or max(len(chosen), len(rejected)) <= window

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
            TooLargeError: pairs that do not fit the memory, by their place.
        """
        rows: list[list[Packed]] = []
        for i, pair in enumerate(pairs):
            ids = pair.chosen.ids, pair.rejected.ids
            packed = self.packs(pair) if before is None or before.states is None else len(before.states[i]) == 1
            rows.append([pack(*ids)] if packed else [alone(side) for side in ids])
        owner = [i for i, own in enumerate(rows) for _ in own]
        names = [f"pair {pairs[i].pair_id!r}" for i in owner]
        given = [state for own in before.states for state in own] if before and before.states is not None else None
        ask = Ask(tuple(layers), rewards, heads, states)
        try:
            found, last = self._read([row for own in rows for row in own], names, ask, positions, budget, given)
        except TooLargeError as error:
            raise TooLargeError({owner[row]: reason for row, reason in error.reasons.items()}) from None
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
        """Return what is asked of all sides of rows, in their order, and what the last block gives of each row."""
        first = np.cumsum([0, *(len(row.lengths) for row in rows)]).tolist()  # number of each row's first side
        count, width = first[-1], self.hidden_size
        rewards, heads = torch.zeros(count), torch.zeros(count, width if ask.heads else 0)
        hidden = [torch.empty(0, 0)] * count
        states = [torch.empty(0)] * len(rows)
        wanted = [np.asarray(at, dtype=np.int64) for at in positions] if positions is not None else None

        def run(chunk: list[int]) -> _Pass:
            places = [wanted[first[i] : first[i + 1]] for i in chunk] if wanted is not None else None
            return self._pass([rows[i] for i in chunk], ask, places, [given[i] for i in chunk] if given else None)

        here = self.device.type == "cpu" and memory() is None  # what is remembered is this thread's
        threads = torch.get_num_threads() if here else 1
        beside = f"beside {self.name}; lower max_length, leave the pair out, or raise reward.shards"
        for chunk, found in passes(run, rows, names, budget or self.budget, threads, beside):
            numbers = [number for i in chunk for number in range(first[i], first[i + 1])]
            if found.rewards is not None:
                rewards[numbers] = found.rewards
            if found.heads is not None:
                heads[numbers] = found.heads
            if found.hidden is not None and wanted is not None:
                for number, value in zip(numbers, found.hidden.split([len(wanted[n]) for n in numbers]), strict=True):
                    hidden[number] = value
            for i, state in zip(chunk, found.states, strict=False):
                states[i] = state
        return Forward(
            rewards if ask.rewards else None, hidden if ask.layers else None, heads if ask.heads else None
        ), states

    @torch.inference_mode()
    def _pass(
        self,
        rows: list[Packed],
        ask: Ask,
        positions: Sequence[Sequence[np.ndarray]] | None,
        given: list[Tensor] | None,
    ) -> _Pass:
        """One micro-batch of rows that all have as many sides; `positions` are by row and side."""
        ids, device, dtype = [row.ids for row in rows], self.device, self.model.dtype
        packed = len(rows[0].lengths) > 1
        batch = pack_batch(rows, self.pad, device, dtype) if packed else pad_batch(ids, self.pad, device)
        read = place_index(rows, positions, device) if positions is not None else None
        ends = end_index(rows, self.unread, device)
        with contextlib.ExitStack() as stack:
            if given is not None:  # the first block here is handed them; some models scale embeddings before it
                states = pad_sequence(given, batch_first=True).to(device, dtype)
                batch = {name: value for name, value in batch.items() if name != "input_ids"}
                batch["inputs_embeds"] = states
                stack.enter_context(hooks.before(self.blocks()[0], lambda inputs: (states, *inputs[1:])))
            elif not packed:
                stack.enter_context(self._shortcut(ids, ask))
            if packs(self.model.config):
                blocks, output = self._through(self.model.base_model, batch | {"use_cache": False}, ask, read, ends)
                heads = None if output is None else output.last_hidden_state[ends]
                rewards = None if heads is None else self.model.score(heads)[:, 0]
            else:
                with self._read_by_head() as inputs:
                    blocks, output = self._through(self.model, batch, ask)
                heads, rewards = (None, None) if output is None else self._at_ends(inputs.pop(), output.logits, ends)
        layers = [blocks[layer][read].float().cpu() for layer in sorted(ask.layers) if layer in blocks and read]
        whole: Iterable[Tensor] = blocks[self.before + len(self.blocks())] if ask.states else ()
        return _Pass(
            torch.cat(layers, dim=-1) if layers else (torch.empty(len(read[0]), 0) if read else None),
            rewards.float().cpu() if rewards is not None and ask.rewards else None,
            heads.float().cpu() if heads is not None and ask.heads else None,
            [state[: len(row.ids)].cpu() for state, row in zip(whole, rows, strict=False)],
        )

    def packed(self, pairs: Sequence[PairTokens]) -> list[Packed] | None:
        """Return a micro-batch of pairs as one row each, to train on; None where not all can be packed, or where
        dropout acts on each side by itself."""
        if not all(self.packs(pair) for pair in pairs) or (self.model.training and has_dropout(self.model)):
            return None
        rows = [pack(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
        return rows if len(rows) * max(len(row.ids) for row in rows) ** 2 <= MASK else None

    def rewards_of(self, rows: Sequence[Packed], run: Callable[..., Any] | None = None) -> Float[Tensor, " sides"]:
        """Return the rewards of all sides of rows, each row's in turn; with gradients.

        The rows are one micro-batch, and all have as many sides. The whole model runs as it is patched now, by `run`
        where something wraps it.
        """
        ids, kind, config = [row.ids for row in rows], self.device.type, self.model.config
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype
        packed = len(rows[0].lengths) > 1
        batch = pack_batch(rows, self.pad, self.device, dtype) if packed else pad_batch(ids, self.pad, self.device)
        ends = end_index(rows, self.unread, self.device)
        outputs: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(hooks.after(self._head(), outputs.append))
            again = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
            if packs(config) and not again:  # blocks that backward runs a second time have lost their hooks by then
                stack.enter_context(hooks.only_at(self.blocks()[-1].get_submodule("mlp"), ends))
            logits = (run or self.model)(**batch).logits
        if runs_own_code(config):
            return logits[:, 0]
        output = outputs.pop()  # of a decoder's head, at every token
        return output[ends][:, 0] if output.ndim == 3 else output[:, 0]

    @contextlib.contextmanager
    def _read_by_head(self) -> Iterator[list[Tensor]]:
        """What the reward head reads inside."""
        inputs: list[Tensor] = []
        with hooks.before(self._head(), lambda given: inputs.append(given[0])):
            yield inputs

    def _at_ends(self, values: Tensor, logits: Tensor, ends: Index) -> tuple[Tensor, Tensor]:
        """What the head reads of each side, and the rewards; a decoder's head reads every token, and looks for the last
        that is not the pad token it is called with."""
        if values.ndim != 3:
            return values, logits[:, 0]
        by_itself = self.unread == self.pad or runs_own_code(self.model.config)
        return values[ends], logits[:, 0] if by_itself else self._head()(values[ends])[:, 0]

    def _through(
        self, module: Any, batch: dict[str, Any], ask: Ask, read: Index | None = None, ends: Index | None = None
    ) -> tuple[dict[int, Tensor], Any]:
        """Return what the blocks asked for give, and what the module does: None where it ends at one of them.

        Given where tokens are `read` and where sides end, the last block's feed-forward part, most of its work, runs
        there alone: nobody looks at what it makes of other tokens.
        """
        found: dict[int, Tensor] = {}
        blocks = dict(enumerate(self.blocks(), self.before + 1))
        last = max(blocks)
        wanted = {layer for layer in ask.layers if layer in blocks} | ({last} if ask.states else set())
        end = None if ask.whole and not ask.states else max(wanted)
        tokens = batch["attention_mask"].shape[0] * batch["attention_mask"].shape[-1]
        looked = [index for index, used in ((read, (end or last) in ask.layers), (ends, end is None)) if used and index]
        with contextlib.ExitStack() as stack:
            for number in wanted:
                stack.enter_context(hooks.caught(blocks[number], found, number, end=number == end))
            if looked and not ask.states and 2 * sum(len(row) for row, _ in looked) < tokens:
                row, place = (torch.cat(index) for index in zip(*looked, strict=True))
                stack.enter_context(hooks.only_at(blocks[end or last].get_submodule("mlp"), (row, place)))
            try:
                return found, module(**batch)
            except hooks.LayerReachedError:
                return found, None

    def _head(self) -> nn.Module:
        """The last linear layer, which gives the reward."""
        heads = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise UserError(f"{self.name}: cannot find the reward head of a {type(self.model).__name__}")
        return heads[-1]
