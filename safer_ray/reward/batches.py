"""Micro-batches: cut by a token budget, run side by side on a CPU's cores, halved where the memory does not suffice."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from safer_ray.errors import TooLargeError
from safer_ray.reward.packing import Packed
from safer_ray.storage.background import map_ordered

Result = TypeVar("Result")
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by rising length, cut so that a micro-batch has at most `budget` padded tokens, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        stop = start + 1
        # In rising order the next length is the width, so that the padded size is known without a look back.
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def cut(
    rows: Sequence[Packed], numbers: Sequence[int], budget: int, kind: Callable[[Packed], tuple[int, int]]
) -> list[list[int]]:
    """Return micro-batches of these rows, each of rows of one kind."""
    by_kind: dict[tuple[int, int], list[int]] = {}
    for i in numbers:
        by_kind.setdefault(kind(rows[i]), []).append(i)
    found = []
    for _, own in sorted(by_kind.items()):
        for chunk in micro_batches([len(rows[i].ids) for i in own], budget):
            found.append([own[j] for j in chunk])
    return found


def run_micro_batches(
    run: Callable[[list[int]], Result],
    rows: Sequence[Packed],
    names: Sequence[str],
    kind: Callable[[Packed], tuple[int, int]],
    budget: int,
    threads: int,
    beside: str,
) -> Iterator[tuple[list[int], Result]]:
    """Yield micro-batches of rows of one `kind` and what `run` makes of them; one that does not fit the memory is
    halved until it does.

    Several run in so many threads, in which torch uses one core: products of their size keep one busier than several.

    Raises:
        TooLargeError: rows that do not fit even alone, when all others are through; of each the name and length are
            told, and `beside` what, with the remedy.
    """
    too_large: dict[int, str] = {}

    def run_or_halve(chunk: list[int], most: int) -> list[tuple[list[int], Result]]:
        found = _unless_too_large(run, chunk)
        if found is not None:
            return [(chunk, found)]
        if len(chunk) == 1:
            row = chunk[0]
            too_large[row] = f"{names[row]} has {len(rows[row].ids)} tokens, which do not fit the memory {beside}"
            return []
        done = []
        for smaller in cut(rows, chunk, most // 2, kind):
            done += run_or_halve(smaller, most // 2)
        return done

    chunks, cores = cut(rows, range(len(rows)), budget, kind), torch.get_num_threads()
    work, settle = partial(run_or_halve, most=budget), partial(torch.set_num_threads, 1)
    try:
        for done in map_ordered(work, chunks, min(threads, max(1, len(chunks))), settle):
            yield from done
    finally:
        torch.set_num_threads(cores)  # each thread has its own number, but new threads take the last one set
    if too_large:
        raise TooLargeError(too_large)


def _unless_too_large(run: Callable[[list[int]], Result], chunk: list[int]) -> Result | None:
    """Return what is made of a micro-batch; None where the memory did not suffice."""
    try:
        return run(chunk)
    except (torch.OutOfMemoryError, MemoryError):
        # What the failed pass held in pieces is given back, or the halves might not find room in one piece.
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
    return None
