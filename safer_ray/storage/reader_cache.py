"""Readers of files, kept where a range of rows ended.

Fragments of a file are mostly read in their order: the next one goes on where the last one in this process stopped, so
that what cannot be entered at any row (a compressed file, a CSV, a JSON array, a row group) is unpacked, and what lies
in an object store is fetched, once a process, and not once a fragment.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safer_ray.storage.files import stamp

KEPT = 4  # readers, of as many files


class Closable(Protocol):
    def close(self) -> None: ...


Reader = TypeVar("Reader", bound=Closable)


@dataclass
class OpenReader(Generic[Reader]):
    """A reader and the row it stands before; whoever reads on moves `position`."""

    reader: Reader
    position: int


_kept: dict[tuple[str, int, str, str | None], OpenReader[Closable]] = {}


@contextlib.contextmanager
def cached_reader(
    path: Path, start: int, stop: int, begin: Callable[[Path], Reader], entry: int = 0, variant: str | None = None
) -> Iterator[OpenReader[Reader]]:
    """A reader of `path` that stands at row `start` or before it; kept if it has come to `stop`, else closed. A new one
    stands at row `entry`. Readers of another `variant` read the same bytes otherwise."""
    key = (str(path), *stamp(path), variant)
    # Taken out while it is used: nobody else moves it, and what fails on the way is not kept.
    found = _kept.pop(key, None)
    if found is not None and not entry <= found.position <= start:
        found.reader.close()
        found = None
    at: OpenReader[Reader] = OpenReader(begin(path), entry) if found is None else found  # type: ignore[assignment]  # `begin` is a path's
    try:
        yield at
    except BaseException:
        at.reader.close()
        raise
    if at.position != stop:
        at.reader.close()
        return
    _kept[key] = at  # type: ignore[assignment]
    while len(_kept) > KEPT:
        _kept.pop(next(iter(_kept))).reader.close()
