"""Cache what frozen blocks give, computed once a text: a reward model's frozen trunk is the same in every training on
it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from safer_ray.reward.model import RewardModel

GIGABYTES = 4.0

States = list[Tensor]  # of each sequence, [length, d]


class TrunkCache:
    """Outputs of the last frozen block by trunk and token ids; once it is full it takes no more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.used = 0
        self.states: dict[tuple[bytes, bytes], Tensor] = {}

    def get(
        self, trunk: bytes, sequences: Sequence[np.ndarray], compute: Callable[[Sequence[np.ndarray]], States]
    ) -> States:
        """Return the states of every sequence; those not known are computed, all in one call."""
        # Token ids and not the text: two templates may make one text into different ids. As int64, so that equal ids
        # have equal bytes, whoever made them.
        keys = [(trunk, np.asarray(sequence, dtype=np.int64).tobytes()) for sequence in sequences]
        # A dictionary, since a batch may hold one text several times.
        missing: dict[tuple[bytes, bytes], np.ndarray] = {}
        for key, sequence in zip(keys, sequences, strict=True):
            if key not in self.states:
                missing[key] = sequence
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
    """Inside, forward passes begin behind block `layer`: each block up to it returns `states`, the output of that
    block, in place of computing."""
    blocks = list(reward.blocks())[:layer]
    patched = [vars(block).get("forward") for block in blocks]  # by whoever wrapped the model

    def hand_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return states.to(hidden)

    # All of them, and not the last alone: those before it would compute what is not looked at.
    for block in blocks:
        block.forward = hand_on
    try:
        yield
    finally:
        for block, before in zip(blocks, patched, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
