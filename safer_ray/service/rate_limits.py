"""Limit what a key may ask in a minute: counted by each ingress, of which each grants its share."""

import math
import time
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from safer_ray.service.keys import Key
from safer_ray.service.problems import Problem

WINDOW_S = 60.0


class RateLimited(Problem):
    """A key has asked enough for now."""

    def __init__(self, key: Key, what: str, limit: int, wait_s: float) -> None:
        after = max(1, math.ceil(wait_s))
        detail = f"key {key.name} may send {limit:,} {what} a minute; try again in {after} s"
        super().__init__(429, detail, {"Retry-After": str(after)})


class Window:
    """The record of what was taken in the last minute, entry by entry, so that no minute ever holds more than the
    limit."""

    def __init__(self) -> None:
        self.taken: deque[list[float]] = deque()  # time, count
        self.total = 0.0

    def wait_for(self, count: int, limit: int, now: float) -> float:
        """Seconds until `count` more fit, 0: now; `count` is at most the limit."""
        while self.taken and self.taken[0][0] <= now - WINDOW_S:
            gone = self.taken.popleft()
            self.total -= gone[1]
            gone[1] = 0.0
        # The wait ends when enough of the oldest entries have left the window, which is when the last of them does.
        over, wait = self.total + count - limit, 0.0
        for at, took in self.taken:
            if over <= 0:
                break
            over -= took
            wait = at + WINDOW_S - now
        return wait

    def take(self, count: int, now: float) -> list[float]:
        entry = [now, float(count)]
        self.taken.append(entry)
        self.total += count
        return entry

    def give_back(self, entry: list[float]) -> None:
        self.total -= entry[1]
        entry[1] = 0.0


class Rates:
    """The windows of all keys in this process, one of `ingresses` that share a key's limits evenly."""

    def __init__(self, ingresses: int = 1) -> None:
        self.ingresses = ingresses
        self.windows: dict[tuple[str, str], Window] = {}

    def share_of(self, limit: int) -> int:
        return -(-limit // self.ingresses)

    def _take(
        self, key: Key, what: str, limit: int | None, count: int, now: float
    ) -> tuple[Window, list[float]] | None:
        if limit is None:
            return None
        # Ingresses do not speak with each other on the way of a request; the proxy spreads requests evenly enough.
        share, window = self.share_of(limit), self.windows.setdefault((key.digest, what), Window())
        # Before waiting: no wait would ever make room for it.
        if count > share:
            raise Problem(
                413, f"key {key.name} may send {limit:,} {what} a minute; send at most {share:,} in a request"
            )
        if wait := window.wait_for(count, share, now):
            raise RateLimited(key, what, limit, wait)
        return window, window.take(count, now)

    def take_request(self, key: Key, now: float | None = None) -> None:
        """Raises RateLimited where the key has sent its requests of this minute."""
        self._take(key, "requests", key.requests, 1, time.monotonic() if now is None else now)

    @contextmanager
    def pairs(self, key: Key, count: int, now: float | None = None) -> Iterator[None]:
        """Pairs that are scored inside; where that ends with a Problem, they do not count.

        Raises:
            Problem: 429 where the key has sent its pairs of this minute, 413 where no minute holds so many.
        """
        taken = self._take(key, "pairs", key.pairs, count, time.monotonic() if now is None else now)
        try:
            yield
        except Problem:
            if taken is not None:
                window, entry = taken
                window.give_back(entry)
            raise


class Caller:
    """Who asks, in the scope of a request; without a key there is no limit."""

    def __init__(self, key: Key, rates: Rates) -> None:
        self.key, self.rates = key, rates


def caller_of(scope: MutableMapping[str, Any]) -> Caller | None:
    caller = scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else None


@contextmanager
def counted_pairs(scope: MutableMapping[str, Any], count: int) -> Iterator[None]:
    """As `Rates.pairs`, for whoever sent the request."""
    caller = caller_of(scope)
    if caller is None:
        yield
        return
    with caller.rates.pairs(caller.key, count):
        yield


def pairs_at_once(scope: MutableMapping[str, Any], most: int) -> int:
    """Return how many pairs of an upload go together, so that the key's limit holds them."""
    caller = caller_of(scope)
    limit = None if caller is None else caller.key.pairs
    return most if caller is None or limit is None else min(most, caller.rates.share_of(limit))
