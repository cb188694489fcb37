"""Micro-batches: cut by a token budget, run side by side on a CPU's cores, halved where the memory does not suffice."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from safer_ray.background import side_by_side
from safer_ray.errors import UserError
from safer_ray.packing import Packed

Result = TypeVar("Result")


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by rising length, cut so that a micro-batch has at most `budget` padded tokens, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= budget:
            stop += 1
        yield order[start:stop]
        start = stop


def cut(rows: Sequence[Packed], numbers: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of these rows, each of rows with as many sides."""
    return [
        [alike[j] for j in chunk]
        for sides in (1, 2)
        if (alike := [i for i in numbers if len(rows[i].lengths) == sides])
        for chunk in micro_batches([len(rows[i].ids) for i in alike], budget)
    ]


def passes(
    run: Callable[[list[int]], Result],
    rows: Sequence[Packed],
    names: Sequence[str],
    budget: int,
    threads: int,
    beside: str,
) -> Iterator[tuple[list[int], Result]]:
    """Micro-batches of rows and what `run` makes of them; one that does not fit the memory is cut to half the budget,
    once.

    Several run in so many threads, in which torch uses one core: products of their size keep one busier than several.

    Raises:
        UserError: a row that does not fit; its name and length are told, and `beside` what, with the remedy.
    """

    def halved(chunk: list[int]) -> list[tuple[list[int], Result]]:
        found = _unless_too_large(run, chunk)
        if found is not None:
            return [(chunk, found)]
        parts = []
        for part in cut(rows, chunk, budget // 2):
            found = _unless_too_large(run, part)
            if found is None:
                raise UserError(
                    f"{names[part[-1]]} has {len(rows[part[-1]].ids)} tokens, which do not fit the memory {beside}"
                )
            parts.append((part, found))
        return parts

    chunks, cores = cut(rows, range(len(rows)), budget), torch.get_num_threads()
    try:
        for parts in side_by_side(halved, chunks, min(threads, max(1, len(chunks))), partial(torch.set_num_threads, 1)):
            yield from parts
    finally:
        torch.set_num_threads(cores)  # each thread has its own number, but new threads take the last one set


def _unless_too_large(run: Callable[[list[int]], Result], chunk: list[int]) -> Result | None:
    """What is made of a micro-batch; None where the memory did not suffice."""
    try:
        return run(chunk)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # as torch says it of a CPU's
            raise
    return None
