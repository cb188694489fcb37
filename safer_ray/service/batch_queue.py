"""Who goes into the next batch: requests in the order they came, as many as its tokens hold."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Gate:
    """Opens when the model is free, for all that then fit: a busy model gets full batches, and an idle one no delay.

    What is inside is in one batch; the gate opens again when all of it has left, in whatever way.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.inside = 0

    def __len__(self) -> int:
        """Requests before the gate and inside."""
        return self.inside + sum(not waiter.done() for _, waiter in self.waiting)

    @contextlib.asynccontextmanager
    async def passed(self, tokens: int) -> AsyncIterator[None]:
        """Inside, after waiting for it; `tokens` beyond those of a batch fill one alone."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append((tokens, waiter))
        self._open()
        try:
            await waiter
            yield
        finally:
            # Let in, whatever came of it: also a request whose client went away between being let in and waking up.
            if waiter.done() and not waiter.cancelled():
                self.inside -= 1
                self._open()
            else:
                waiter.cancel()

    def _open(self) -> None:
        # Only the front of the queue is looked at: a small request that slipped past a large one would starve it.
        room = self.tokens
        while self.waiting and (not self.inside or room < self.tokens):
            tokens, waiter = self.waiting[0]
            if not waiter.done():
                if room < self.tokens and tokens > room:
                    return
                # At least 1, or requests without tokens would fit without end.
                room -= max(1, tokens)
                self.inside += 1
                waiter.set_result(None)
            self.waiting.popleft()
