"""A Parquet file in one row group beside the same rows in twenty, and what is fetched of it: part of `bench.audit`."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from bench.engine import read_pairs
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.work import MapJob

GROUPS = 20
FETCHED = "fetched"  # folder beside that of a file: how much a process fetched, a file each, a line a request


class CountedFile:
    """A file that writes down what is read of it, in processes that read fragments."""

    closed = False
    counts = False  # planning takes a sha256 here, since this store has no ETags

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        notes = Path(path).parents[1] / FETCHED
        notes.mkdir(exist_ok=True)
        self.notes = notes / str(os.getpid())
        self.tell, self.seek = self.file.tell, self.file.seek

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if CountedFile.counts:
            with self.notes.open("a", encoding="ascii") as notes:
                notes.write(f"{len(data)}\n")
        return data

    def readable(self) -> bool:
        return True

    seekable = readable

    def close(self) -> None:
        self.closed = True
        self.file.close()


class CountedStore(LocalFileSystem):
    """`counted://…`: files of this machine as an object store would give them, with account of every byte."""

    protocol = "counted"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return f"/{str(path).removeprefix('counted://').strip('/')}"

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return CountedFile(self._strip_protocol(path))


def known_store() -> None:
    """Make `counted://` known to this process."""
    fsspec.register_implementation("counted", CountedStore, clobber=True)


def read_counted(fragment: Fragment, read: Callable[[Fragment], pa.Table]) -> pa.Table:
    """Read a fragment in a process that may not know the store yet."""
    known_store()
    CountedFile.counts = True
    return read(fragment)


def counted(job: MapJob) -> dict[str, Any]:
    """Return what is other in a job that reads `counted://`."""
    return {"read": partial(read_counted, read=job.read)}


def write_groups(folder: Path, rows: int) -> dict[str, Path]:
    """hh-rlhf harmless, again and again, as Parquet in one row group and in `GROUPS`; a folder each."""
    pairs = read_pairs(2000)
    table = pa.Table.from_pylist([pairs[i % len(pairs)] | {"pair_id": f"p{i}"} for i in range(rows)])
    for name, size in (("one", rows), ("many", -(-rows // GROUPS))):
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "pairs.parquet", row_group_size=size, use_dictionary=False)
    return {name: folder / name for name in ("one", "many")}


def groups(folder: Path, audit: Callable[[object, object, str], dict[str, Any]], rows: int, rounds: int) -> Any:
    """One row group and many, side by side with 1 and 2 actors; the rows of a report, and its two figures.

    `audit(corpus, actors, kind)` gives what an audit with the trivial engine took.
    """
    made, told, ratios = write_groups(folder, rows), [], {}
    for actors in (1, 2):
        taken: dict[str, list[float]] = {"one": [], "many": []}
        for number in range(rounds):
            for name in ("one", "many") if number % 2 else ("many", "one"):
                found = audit(made[name], actors, "groups")
                taken[name].append(found["seconds"])
                told.append(found | {"actors": actors, "groups": name})
        pairs = zip(taken["one"], taken["many"], strict=True)
        ratios[actors] = median(one / many for one, many in pairs)
        print(
            f"trivial engine, {actors} actors, {rows:,} rows of Parquet: in one group {_listed(taken['one'])} s, in "
            f"{GROUPS} {_listed(taken['many'])} s; median of the ratios {ratios[actors]:.2f}",
            flush=True,
        )
    size = (made["one"] / "pairs.parquet").stat().st_size
    audit(f"counted:/{made['one']}/", 1, "stored")
    by = [sum(map(int, path.read_text(encoding="ascii").split())) for path in (folder / FETCHED).iterdir()]
    print(
        f"one group of {size:,} bytes in a store: processes fetched {_listed([n / size for n in by])} of it", flush=True
    )
    return told, {"one_group_vs_many": max(ratios.values()), "store_bytes_vs_file": max(by) / size}


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)
