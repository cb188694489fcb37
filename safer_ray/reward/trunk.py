"""What frozen blocks give, remembered: many models on one frozen trunk run it once a text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from torch import Tensor

GIGABYTES = 4.0

States = list[Tensor]  # of each sequence, [length, d]


class TrunkMemory:
    """Outputs of the last frozen block by trunk and token ids; once it is full it takes no more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.states: dict[tuple[bytes, bytes], Tensor] = {}

    def get(
        self, trunk: bytes, sequences: Sequence[np.ndarray], compute: Callable[[Sequence[np.ndarray]], States]
    ) -> States:
        """The states of every sequence; those not known are computed, all in one call."""
        keys = [(trunk, np.asarray(sequence, dtype=np.int64).tobytes()) for sequence in sequences]
        missing = list(dict.fromkeys(key for key in keys if key not in self.states))
        where = {key: i for i, key in enumerate(keys)}
        fresh = dict(zip(missing, compute([sequences[where[key]] for key in missing]), strict=True)) if missing else {}
        for key, states in fresh.items():
            size = states.numel() * states.element_size()
            if self.used + size <= self.limit:
                self.states[key] = states
                self.used += size
        return [fresh[key] if key in fresh else self.states[key] for key in keys]


_memory: ContextVar[TrunkMemory | None] = ContextVar("trunk_memory", default=None)


@contextmanager
def remembered(gigabytes: float = GIGABYTES) -> Iterator[TrunkMemory]:
    """Inside, models with frozen layers keep what these give, in this process, and share it where they are equal.

    Results stay the same within rounding (1e-5): a text's states come from whichever batch it was first in.
    """
    token = _memory.set(TrunkMemory(int(gigabytes * 1e9)))
    try:
        memory = _memory.get()
        assert memory is not None
        yield memory
    finally:
        _memory.reset(token)


def memory() -> TrunkMemory | None:
    """Return what `remembered` keeps, where it is on."""
    return _memory.get()
