"""The most suspicious pairs of an audit, found in a few sweeps over the scores: no more than a block is held."""

import heapq
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

Rank = tuple[float, float, str, str]  # minus suspicion, score, row key, pair id; the lowest is the most suspicious
RANKED = ("suspicion", "score", "row_key", "pair_id")
MOST = 1_000_000  # ranks that are sorted at once; among more, the place is narrowed down first
DIGITS, BASE = 8, 2**16  # of the two leading numbers of a rank


def _numbers(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Minus suspicion and score, float64 [n]; what is unknown suspects nothing."""
    known = [table[name].to_numpy().astype(np.float64) for name in ("suspicion", "score")]
    first, second = (np.where(np.isnan(values), np.inf, values) for values in (-known[0], known[1]))
    return first + 0.0, second + 0.0  # -0.0 is 0.0


def ranks(table: pa.Table) -> list[Rank]:
    """Return the rank of each row of a table with the columns RANKED."""
    numbers = [values.tolist() for values in _numbers(table)]
    return list(zip(*numbers, table["row_key"].to_pylist(), table["pair_id"].to_pylist(), strict=True))


def _digits(table: pa.Table) -> np.ndarray:
    """uint16 [n, DIGITS], most significant first: they order as the two numbers do."""
    bits = np.stack(_numbers(table), axis=1).view(np.uint64)
    negative = (bits >> np.uint64(63)).astype(bool)
    ordered = np.where(negative, ~bits, bits | np.uint64(2**63))
    return np.ascontiguousarray(ordered.astype(">u8")).view(">u2").astype(np.int64)


def last_of_worst(parts: Callable[[], Iterable[pa.Table]], count: int, most: int = MOST) -> Rank | None:
    """The rank of the `count`th most suspicious pair, None for count 0; there are at least `count` pairs.

    `parts` gives tables with the columns RANKED, each time anew. A sweep over them finds one more digit of the rank,
    until no more than `most` pairs share those that are known.
    """
    if count == 0:
        return None
    known: list[int] = []
    while len(known) < DIGITS:
        tally = np.zeros(BASE, dtype=np.int64)
        for table in parts():
            digits = _digits(table)
            tally += np.bincount(digits[_shared(digits, known), len(known)], minlength=BASE)
        if tally.sum() <= most:
            break
        reach = np.cumsum(tally)
        digit = int(np.searchsorted(reach, count))
        count -= int(reach[digit - 1]) if digit else 0
        known.append(digit)
    return heapq.nsmallest(count, _sharing(parts, known))[-1]


def _shared(digits: np.ndarray, known: list[int]) -> np.ndarray:
    """Return whether rows begin with the known digits, bool [n]."""
    return (digits[:, : len(known)] == np.array(known, dtype=np.int64)).all(axis=1)


def _sharing(parts: Callable[[], Iterable[pa.Table]], known: list[int]) -> Iterator[Rank]:
    for table in parts():
        yield from ranks(table.filter(pa.array(_shared(_digits(table), known))))
