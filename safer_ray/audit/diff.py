"""Compare two audits of the same pairs: who is flagged, how the order changed, what was asked differently.

Pairs are matched by row key and pair id, or by the pair id alone where that finds more of them, as it does when the
sources differ in their names or their order. A pair that stands in an audit several times is matched as often.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from safer_ray.audit.read import read_asked, scored_rows, scores
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.storage.accounts import count
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.files import beside, make_folder
from safer_ray.storage.replacing import check_outside

MOST = 5_000_000  # rows of both audits that are held at once; more are matched share by share
Key = Literal["row_key", "pair_id"]
VALUES = ("score", "suspicion")
BLOCK = 100_000  # rows that are sorted out, or told, at once
ROWS = pa.schema(
    [
        ("row_key", pa.string()),
        ("pair_id", pa.string()),
        ("score", pa.float64()),
        ("suspicion", pa.float64()),
        ("flag", pa.bool_()),
        ("by_row", pa.uint64()),  # hashes that rows are matched by
        ("by_id", pa.uint64()),
    ]
)
ODD = np.uint64(0x9E3779B97F4A7C15)


class Pairs(NamedTuple):
    """Counts of the pairs that A and B share, and of those that only one has."""

    both: int
    only_a: int
    only_b: int


class Flags(NamedTuple):
    """Counts of flags, over the pairs in both audits."""

    a: int
    b: int
    gained: int  # flagged by B only
    lost: int  # flagged by A only


class Difference(NamedTuple):
    """B against A."""

    matched_by: Key
    pairs: Pairs
    flags: Flags
    spearman: dict[str, float | None]  # of `score` and of `suspicion`, in [-1, 1]; None where one is constant
    spearman_pairs: int  # that it is computed from: all in both, or a share drawn by a hash of the pair id
    suspicion_change: float | None  # mean of B minus A over the pairs in both
    quarantine: tuple[dict[str, int], dict[str, int]]  # reason -> rows, of A and of B
    config: dict[str, tuple[Any, Any]]  # what was asked differently


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [n]"""
    return np.asarray(pd.util.hash_array(column.to_numpy().astype(object)), dtype=np.uint64)


def _blocks(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Parts, joined until they have BLOCK rows."""
    held: list[pa.Table] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= BLOCK:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _write_shares(audit: Artifact, folder: Path, shares: int) -> None:
    """The rows of an audit in so many files, by a hash of the pair id."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(pa.OSFile(str(folder / str(share)), "wb")) for share in range(shares)]
        writers = [stack.enter_context(pa.ipc.new_stream(file, ROWS)) for file in files]
        for rows in _blocks(scores(audit, ROWS.names[:-2])):
            by_id = _hashes(rows["pair_id"])
            by_row = _hashes(rows["row_key"]) * ODD + by_id
            rows = rows.append_column("by_row", pa.array(by_row)).append_column("by_id", pa.array(by_id))
            for share, writer in enumerate(writers):
                writer.write_table(rows.filter(pa.array(by_id % np.uint64(shares) == share)).cast(ROWS))


def _read_share(folder: Path, share: int) -> pa.Table:
    with pa.memory_map(str(folder / str(share))) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def _numbered(hashes: np.ndarray) -> np.ndarray:
    """Hashes with the number of equal ones before them mixed in."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    runs = np.diff(np.append(first, len(ordered)))
    numbered = np.empty_like(hashes)
    numbered[order] = ordered + (np.arange(len(ordered)) - np.repeat(first, runs)).astype(np.uint64) * ODD
    return numbered


def _matches(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of equal keys in A and in B, in the order of A."""
    _, at_a, at_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    order = np.argsort(at_a)
    return at_a[order], at_b[order]


def _keys(rows: pa.Table, key: Key) -> np.ndarray:
    """uint64 [n], each unlike all others: the second of its name has another than the first."""
    return _numbered(rows["by_row" if key == "row_key" else "by_id"].to_numpy())


def _best_key(a: Path, b: Path, shares: int) -> Key:
    """The key that matches more pairs."""
    found: dict[Key, int] = {"row_key": 0, "pair_id": 0}
    for share in range(shares):
        one, other = (_read_share(folder, share) for folder in (a, b))
        for key in found:
            found[key] += len(_matches(_keys(one, key), _keys(other, key))[0])
    return "pair_id" if found["pair_id"] > found["row_key"] else "row_key"


def _correlation(values: np.ndarray) -> float | None:
    """Spearman's, of two rows of values [2, n], where both are known."""
    values = values[:, np.isfinite(values).all(axis=0)]
    if values.shape[1] < 2 or (values.min(axis=1) == values.max(axis=1)).any():
        return None
    return float(spearmanr(values[0], values[1]).statistic)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _asked_differently(a: Artifact, b: Artifact) -> dict[str, tuple[Any, Any]]:
    one, other = (_flat(read_asked(audit.path)) for audit in (a, b))
    names = sorted({*one, *other})
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


class Matched(NamedTuple):
    """The pairs of one share that are in both audits: the rows of A and of B, and the places of each pair in them."""

    a: pa.Table
    b: pa.Table
    at_a: np.ndarray
    at_b: np.ndarray

    def values(self, name: str) -> np.ndarray:
        """Return what A and B say of each pair, [2, n]."""
        return np.stack([self.a[name].to_numpy()[self.at_a], self.b[name].to_numpy()[self.at_b]])

    def flags(self) -> dict[str, np.ndarray]:
        """Who is flagged, bool [n] by the names of Flags."""
        a, b = self.values("flag")
        return {"a": a, "b": b, "gained": b & ~a, "lost": a & ~b}

    def changes(self) -> np.ndarray:
        """B minus A in suspicion, where both know it."""
        a, b = self.values("suspicion")
        return (b - a)[np.isfinite(b - a)]

    def told(self, mask: np.ndarray) -> Iterator[dict[str, Any]]:
        """The pairs of a mask, with what both audits say of them."""
        for start in range(0, len(mask), BLOCK):
            chosen = start + np.flatnonzero(mask[start : start + BLOCK])
            rows = [t.take(pa.array(at[chosen])) for t, at in ((self.a, self.at_a), (self.b, self.at_b))]
            for a, b in zip(*(table.to_pylist() for table in rows), strict=True):
                yield _told(a, b)


def _told(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    said = {f"{name}_{side}": row[name] for name in ("row_key", *VALUES) for side, row in (("a", a), ("b", b))}
    unknown = {name: None for name, value in said.items() if value != value}  # noqa: PLR0124  # NaN is no JSON
    return {"pair_id": a["pair_id"], **said, **unknown}


Tell = Callable[[str, dict[str, Any]], None]  # "gained" or "lost", and the pair


def difference(a: Artifact, b: Artifact, tell: Tell = lambda kind, pair: None, most: int = MOST) -> Difference:
    """B against A; `tell` is told of every pair that gained or lost its flag. About `most` rows are held at once, the
    others wait in temporary files."""
    total = scored_rows(a) + scored_rows(b)
    shares = max(1, -(-total // most))
    with explain_disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        folders = Path(folder) / "a", Path(folder) / "b"
        for audit, place in zip((a, b), folders, strict=True):
            _write_shares(audit, place, shares)
        key = _best_key(*folders, shares)
        matched = (_matched(_read_share(folders[0], n), _read_share(folders[1], n), key) for n in range(shares))
        return _added(a, b, key, matched, tell)


def _matched(a: pa.Table, b: pa.Table, key: Key) -> Matched:
    at_a, at_b = _matches(_keys(a, key), _keys(b, key))
    same = pc.equal(a["pair_id"].take(pa.array(at_a)), b["pair_id"].take(pa.array(at_b)))
    same = same.to_numpy()  # two hashes may be equal by chance
    return Matched(a, b, at_a[same], at_b[same])


def _added(a: Artifact, b: Artifact, key: Key, shares: Iterable[Matched], tell: Tell) -> Difference:
    """Return what is found share by share, together."""
    both, flags = 0, Counter(dict.fromkeys(Flags._fields, 0))
    changes = np.zeros(2)  # how many, and their sum
    spearman: dict[str, float | None] = {}
    spearman_pairs = 0
    for share in shares:
        if not spearman:  # the first share by hash is as good as a draw
            spearman = {name: _correlation(share.values(name)) for name in VALUES}
            spearman_pairs = len(share.at_a)
        both += len(share.at_a)
        changes += len(share.changes()), share.changes().sum()
        for kind, mask in share.flags().items():
            flags[kind] += int(mask.sum())
            if kind in ("gained", "lost"):
                for pair in share.told(mask):
                    tell(kind, pair)
    return Difference(
        key,
        Pairs(both, scored_rows(a) - both, scored_rows(b) - both),
        Flags(**flags),
        spearman,
        spearman_pairs,
        float(changes[1] / changes[0]) if changes[0] else None,
        (count(a.path).reasons, count(b.path).reasons),
        _asked_differently(a, b),
    )


def write_difference(a: Artifact, b: Artifact, path: Path, most: int = MOST) -> Difference:
    """The difference as JSON at `path`, with `gained` and `lost` pair by pair; the lists are written as they are found.

    `path` is whole or absent.

    Raises:
        UserError: `path` lies in one of the audits, or is a folder, or a file that no diff wrote.
    """
    check_outside(path, [a.path, b.path])
    if os.path.lexists(path) and not _is_difference(path):
        raise UserError(f"{path} is there and no diff wrote it, which would be lost; choose another --json")
    make_folder(path.parent)
    with (
        explain_disk_errors(path.parent),
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent) as gained,
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent) as lost,
    ):
        lists: dict[str, IO[str]] = {"gained": gained, "lost": lost}
        begun: set[str] = set()

        def tell(kind: str, pair: dict[str, Any]) -> None:
            lists[kind].write(("," if kind in begun else "") + "\n  " + json.dumps(pair, ensure_ascii=False))
            begun.add(kind)

        found = difference(a, b, tell, most)
        with beside(path) as temporary, temporary.open("w", encoding="utf-8") as whole:
            told = {"red_team": True} if a.red_team or b.red_team else {}
            facts = {"a": str(a.path), "b": str(b.path)} | told | _tree(found)
            whole.write(json.dumps(facts, indent=1, ensure_ascii=False).removesuffix("\n}"))
            for name, stream in lists.items():
                whole.write(f',\n "{name}": [')
                stream.seek(0)
                shutil.copyfileobj(stream, whole)
                whole.write("]")
            whole.write("\n}\n")
    return found


def _is_difference(path: Path) -> bool:
    """Return whether a file begins as `write_difference` writes it; it may be large."""
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(9) == '{\n "a": "'
    except (OSError, UnicodeDecodeError):
        return False


def _tree(found: Difference) -> dict[str, Any]:
    shown = found._asdict() | {"pairs": found.pairs._asdict(), "flags": found.flags._asdict()}
    return shown | {"quarantine": dict(zip("ab", found.quarantine, strict=True))}
