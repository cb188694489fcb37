"""Cache what frozen blocks give, computed once a text: a reward model's frozen trunk is the same in every training on
it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from safer_ray.reward.hooks import after, with_states
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import Packed

GIGABYTES = 4.0

States = list[Tensor]  # of each sequence, [length, d]


class TrunkCache:
    """Outputs of the last frozen block by trunk and token ids; once it is full it takes no more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.used = 0
        self.states: dict[tuple[bytes, bytes], Tensor] = {}

    def get(self, trunk: bytes, rows: Sequence[Packed], compute: Callable[[Sequence[Packed]], States]) -> States:
        """Return the states of every row of one side; those not known are computed, all in one call."""
        # Token ids and not the text: two templates may make one text into different ids.
        keys = [(trunk, _content(row)) for row in rows]
        # A dictionary, since a batch may hold one text several times.
        missing: dict[tuple[bytes, bytes], Packed] = {}
        for key, row in zip(keys, rows, strict=True):
            if key not in self.states:
                missing[key] = row
        fresh: dict[tuple[bytes, bytes], Tensor] = {}
        if missing:
            fresh = dict(zip(missing, compute(list(missing.values())), strict=True))
        for key, states in fresh.items():
            size = states.numel() * states.element_size()
            # Nothing is thrown out when it is full: every text comes back once an epoch, none sooner than another.
            if self.used + size <= self.limit:
                self.states[key] = states
                self.used += size
        return [fresh[key] if key in fresh else self.states[key] for key in keys]


def _content(row: Packed) -> bytes:
    ids = np.asarray(row.ids, dtype=np.int64).tobytes()
    return ids if row.types is None else ids + np.asarray(row.types, dtype=np.int64).tobytes()


_cache: ContextVar[TrunkCache | None] = ContextVar("trunk_cache", default=None)


@contextmanager
def cached_trunk(gigabytes: float = GIGABYTES) -> Iterator[TrunkCache]:
    """Inside, models with frozen layers keep what these give, in this thread, and share it where they are equal.

    Results stay the same within rounding (1e-5): a text's states come from whichever batch it was first in.
    """
    cache = TrunkCache(int(gigabytes * 1e9))
    token = _cache.set(cache)
    try:
        yield cache
    finally:
        _cache.reset(token)


def trunk_cache() -> TrunkCache | None:
    """Return the cache of `cached_trunk`, where it is on."""
    return _cache.get()


def uses_trunk_cache(reward: RewardModel) -> bool:
    """Return whether what the frozen blocks of a model give is kept now."""
    return trunk_cache() is not None and reward.frozen_layers > 0


def can_start_after_trunk(reward: RewardModel, layers: Sequence[int]) -> bool:
    """Return whether a pass that reads `layers` can begin behind the frozen blocks: what these give is kept, and no
    earlier block is read."""
    return uses_trunk_cache(reward) and all(layer >= reward.frozen_layers for layer in layers)


@contextmanager
def start_after(reward: RewardModel, layer: int, states: Float[Tensor, "n width d"]) -> Iterator[None]:
    """Inside, forward passes go on from `states` as the output of block `layer`.

    The blocks up to it do not compute where blocks of their classes have been seen to give nothing but states. Else
    they do, since later blocks may want what comes with the states (T5's position bias).
    """
    blocks = list(reward.blocks())[:layer]
    with ExitStack() as stack:
        if all(_gives_states_alone(block) for block in blocks):
            for block in blocks:
                stack.enter_context(_without_computing(block, states))
        else:
            stack.enter_context(outputs_noted(reward, layer))
            stack.enter_context(after(blocks[-1], lambda output: with_states(output, states)))
        yield


@contextmanager
def outputs_noted(reward: RewardModel, layer: int) -> Iterator[None]:
    """Inside, forward passes of any thread note what the blocks up to `layer` give, so that `start_after` need not run
    them."""
    handles = [block.register_forward_hook(_note) for block in list(reward.blocks())[:layer]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_seen: dict[type[nn.Module], Any] = {}  # by class of block, what one gave: None in the place of a tensor


def _note(block: nn.Module, _inputs: Any, output: Any) -> None:
    kind = type(block)
    if not isinstance(output, tuple | list):
        _seen[kind] = None
    elif all(value is None for value in output[1:]):
        _seen[kind] = type(output)([None] * len(output))
    else:
        # A block gave more than states: from now on blocks of its class run, also where one had been seen to give
        # nothing else.
        _seen.pop(kind, None)


def _gives_states_alone(block: nn.Module) -> bool:
    return type(block) in _seen


@contextmanager
def _without_computing(block: nn.Module, states: Tensor) -> Iterator[None]:
    """Inside, a block gives `states`, in the form in which it gives its own."""
    form = _seen[type(block)]

    def hand_on(*inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        return with_states(hidden if form is None else type(form)([hidden, *form[1:]]), states)

    # In the instance alone: the class's own method comes back when the attribute is gone.
    patched = vars(block).get("forward")  # by whoever wrapped the model
    block.forward = hand_on
    try:
        yield
    finally:
        del block.forward
        if patched is not None:
            block.forward = patched
