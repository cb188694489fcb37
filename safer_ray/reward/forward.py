"""Forward passes over sequences and pairs: which rows they run as, in which micro-batches, and results in input order.

`execution.py` runs one micro-batch, `packing.py` makes two sides one row, `trunk.py` keeps what frozen blocks give.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import TooLargeError
from safer_ray.reward.batches import run_micro_batches
from safer_ray.reward.dropout import has_dropout
from safer_ray.reward.execution import ForwardRequest, MicroBatchResult, run_micro_batch
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import Packed, alike, can_pack, fork_of, pack, smallest_window, unpacked
from safer_ray.reward.text import PairTokens
from safer_ray.reward.trunk import (
    States,
    can_start_after_trunk,
    outputs_noted,
    start_after,
    trunk_cache,
    uses_trunk_cache,
)

log = logging.getLogger(__name__)
TOLERANCE = {2: 0.03, 4: 1e-4, 8: 1e-4}  # of a reward, or of 1, by the bytes of a weight
MASK = 2**26  # entries of a micro-batch's mask where pairs are packed for training: 256 MB


class Forward(NamedTuple):
    """The results asked for of a batch of sequences, or of the sides of pairs, in input order."""

    rewards: Float[Tensor, " n"] | None
    hidden: list[Float[Tensor, "m d"]] | None
    heads: Float[Tensor, "n d"] | None = None
    states: list[States] | None = None  # of every pair: of one row where it was packed, else of two


def forward(
    reward: RewardModel,
    sequences: Sequence[np.ndarray],
    *,
    layers: Sequence[int] = (),
    positions: Sequence[np.ndarray] | None = None,
    rewards: bool = True,
    heads: bool = False,
    budget: int | None = None,
) -> Forward:
    """Return rewards of token sequences, and the outputs of blocks `layers` (1-based) at `positions` of each.

    Sequences are sorted by length and cut into micro-batches of at most `budget` padded tokens; results come back
    in input order. Without `rewards` and `heads`, the blocks after the last of `layers` do not run.

    Raises:
        TooLargeError: sequences that do not fit the memory.
    """
    rows = [unpacked(ids) for ids in sequences]
    names = [f"sequence {i}" for i in range(len(sequences))]
    return _run_rows(reward, rows, names, ForwardRequest(tuple(layers), rewards, heads), positions, budget)[0]


def forward_pairs(
    reward: RewardModel,
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
    """Return what `forward` does of both sides of pairs, chosen then rejected of each in turn; `positions` are by side.

    Pairs that can be packed run as one sequence each, the others as two. Of a model in parts, each goes on from
    what the part `before` gave, and all but the last are asked for `states`.

    Raises:
        TooLargeError: pairs that do not fit the memory, by their place.
    """
    rows: list[Packed] = []
    owner: list[int] = []  # number of each row's pair
    for number, pair in enumerate(pairs):
        if before is not None and before.states is not None:
            one_row = len(before.states[number]) == 1  # as the first part decided
        else:
            one_row = can_pack_pair(reward, pair)
        ids = pair.chosen.ids, pair.rejected.ids
        own = [pack(*ids)] if one_row else [unpacked(side.ids, side.types) for side in (pair.chosen, pair.rejected)]
        rows += own
        owner += [number] * len(own)
    given: States | None = None
    if before is not None and before.states is not None:
        given = []
        for states_of_pair in before.states:
            given += states_of_pair
    names = [f"pair {pairs[number].pair_id!r}" for number in owner]
    request = ForwardRequest(tuple(layers), rewards, heads, states)
    try:
        found, states_of_rows = _run_rows(reward, rows, names, request, positions, budget, given)
    except TooLargeError as error:
        raise TooLargeError({owner[row]: reason for row, reason in error.reasons.items()}) from None
    if states:
        by_pair: list[States] = [[] for _ in pairs]
        for number, state in zip(owner, states_of_rows, strict=True):
            by_pair[number].append(state)
        found = found._replace(states=by_pair)
    if before is not None and before.hidden is not None and found.hidden is not None:
        both = zip(before.hidden, found.hidden, strict=True)
        found = found._replace(hidden=[torch.cat([early, late], dim=-1) for early, late in both])
    return found


def trunk_states(reward: RewardModel, rows: Sequence[Packed]) -> States:
    """Return the output of the last frozen block at every token of rows of one side each; inside `cached_trunk` it is
    computed once a text.

    Raises:
        TooLargeError: sequences that do not fit the memory.
    """

    def compute(missing: Sequence[Packed]) -> States:
        unfrozen = replace(reward, frozen_layers=0)  # so that the pass is not looked for in the cache again
        everywhere = [np.arange(len(row.ids)) for row in missing]
        names = [f"sequence {i}" for i in range(len(missing))]
        request = ForwardRequest((reward.frozen_layers,), rewards=False)
        with outputs_noted(reward, reward.frozen_layers):
            found = _run_rows(unfrozen, missing, names, request, everywhere, None)[0].hidden
        assert found is not None
        return [states.clone() for states in found]  # each free of its micro-batch

    cache = trunk_cache()
    return compute(rows) if cache is None else cache.get(reward.trunk_key, rows, compute)


def check_padding(reward: RewardModel) -> RewardModel:
    """Return a model that runs sequences one by one where a longer one beside it moves a reward, or fails: some models
    do not mask what fills a batch up (FNet), read the last place of it (XLNet), or bring such code of their own."""
    if not reward.pads or can_pack(reward.model.config):  # told when it was loaded; checked to do neither
        return reward
    short, long = (np.array(reward.pairs.tokenizer(text)["input_ids"], dtype=np.int64) for text in ("a.", "a b. " * 8))
    whole, was_training = replace(reward, frozen_layers=0), reward.model.training
    reward.model.eval()
    try:
        alone = _rewards(whole, [short])[0]
        beside = _rewards(whole, [short, long])[0]
        pads = bool((beside - alone).abs() <= TOLERANCE[reward.model.dtype.itemsize] * alone.abs().clamp(min=1))
    except Exception:  # noqa: BLE001  # some refuse to run two; what fails alone will be told with the first pair
        pads = False
    finally:
        reward.model.train(was_training)
    if not pads:
        log.warning("%s: padding moves its rewards, so its sequences run one by one, which takes longer", reward.name)
    return replace(reward, pads=pads)


def _rewards(reward: RewardModel, sequences: Sequence[np.ndarray]) -> Float[Tensor, " n"]:
    """Return the rewards of sequences that run side by side."""
    rewards = forward(reward, sequences, budget=len(sequences) * max(len(ids) for ids in sequences)).rewards
    assert rewards is not None
    return rewards


def can_pack_pair(reward: RewardModel, pair: PairTokens) -> bool:
    """Return whether a pair runs as one sequence: the model is a known causal one, every layer of which sees all of a
    side, and whose sequences need not run one by one; and the pair has no more tokens than a micro-batch has, since
    its mask is their number squared.

    Where the frozen blocks' outputs are kept, by sequence, no pair does.
    """
    config = reward.model.config
    if not reward.pads or not can_pack(config) or uses_trunk_cache(reward):
        return False
    chosen, rejected = pair.chosen.ids, pair.rejected.ids
    if len(chosen) + len(rejected) - fork_of(chosen, rejected) > reward.budget:
        return False
    window = reward.window or smallest_window(config)
    return window is None or max(len(chosen), len(rejected)) <= window


def pack_to_train(reward: RewardModel, pairs: Sequence[PairTokens]) -> list[Packed] | None:
    """Return a micro-batch of pairs as one row each, to train on; None where not all can be packed, where dropout acts
    on each side by itself, or where the mask would be too large."""
    if reward.model.training and has_dropout(reward.model):
        return None
    if not all(can_pack_pair(reward, pair) for pair in pairs):
        return None
    rows = [pack(pair.chosen.ids, pair.rejected.ids) for pair in pairs]
    width = max(len(row.ids) for row in rows)
    return rows if len(rows) * width**2 <= MASK else None


def _run_rows(
    reward: RewardModel,
    rows: Sequence[Packed],
    names: Sequence[str],
    request: ForwardRequest,
    positions: Sequence[np.ndarray] | None,
    budget: int | None,
    given: States | None = None,
) -> tuple[Forward, States]:
    """Return what is asked of all sides of rows, in their order, and what the last block gives of each row."""
    sides = _sides_of(rows)
    count = sum(len(own) for own in sides)
    read = [np.asarray(own, dtype=np.int64) for own in positions] if positions is not None else None

    def run(chunk: list[int]) -> MicroBatchResult:
        positions_by_row = [[read[side] for side in sides[i]] for i in chunk] if read is not None else None
        states = [given[i] for i in chunk] if given else None
        own = [rows[i] for i in chunk]
        with _start(reward, own, request, given):
            return run_micro_batch(reward, own, request, positions_by_row, states)

    rewards = torch.zeros(count)
    heads = torch.zeros(count, reward.hidden_size if request.heads else 0)
    hidden = [torch.empty(0, 0)] * count
    states_of_rows = [torch.empty(0)] * len(rows)
    # A trunk cache is its thread's own, a GPU has one queue, and modules may keep how they read a sequence.
    in_threads = reward.device.type == "cpu" and trunk_cache() is None and reward.pads
    threads = torch.get_num_threads() if in_threads else 1
    most = budget or reward.budget if reward.pads else 0  # none: rows run one by one
    beside = f"beside {reward.name}; lower max_length, leave the pair out, or raise reward.shards"
    kind = partial(alike, reward.model.config)
    for chunk, found in run_micro_batches(run, rows, names, kind, most, threads, beside):
        numbers = [side for i in chunk for side in sides[i]]
        if found.rewards is not None:
            rewards[numbers] = found.rewards
        if found.heads is not None:
            heads[numbers] = found.heads
        if found.hidden is not None and read is not None:
            lengths = [len(read[side]) for side in numbers]
            for side, vectors in zip(numbers, found.hidden.split(lengths), strict=True):
                hidden[side] = vectors
        if found.states:
            for i, states in zip(chunk, found.states, strict=True):
                states_of_rows[i] = states
    result = Forward(
        rewards=rewards if request.rewards else None,
        hidden=hidden if request.layers else None,
        heads=heads if request.heads else None,
    )
    return result, states_of_rows


def _sides_of(rows: Sequence[Packed]) -> list[range]:
    """Return for each row the numbers of its sides, where those of all rows are counted in turn."""
    found, count = [], 0
    for row in rows:
        found.append(range(count, count + len(row.lengths)))
        count += len(row.lengths)
    return found


def _start(
    reward: RewardModel, rows: Sequence[Packed], request: ForwardRequest, given: States | None
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a micro-batch begins: behind the frozen blocks where what they give is kept, else at
    the first."""
    packed = len(rows[0].lengths) > 1
    if packed or given is not None or not can_start_after_trunk(reward, request.layers):
        return contextlib.nullcontext()
    states = trunk_states(reward, rows)
    return start_after(reward, reward.frozen_layers, pad_sequence(states, batch_first=True))
