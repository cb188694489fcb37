"""What two audits say of the same pairs: who is flagged, how the order changed, what was asked differently.

Pairs are matched by row key and pair id, or by the pair id alone where that finds more of them, as it does when the
sources differ in their names or their order. A pair that stands in an audit several times is matched as often.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from safer_ray.artifacts import Artifact
from safer_ray.audit_read import scored_rows, scores
from safer_ray.audit_run import ASKED
from safer_ray.errors import explain_disk_errors
from safer_ray.files import read_json
from safer_ray.runner import count

MOST = 5_000_000  # rows of both audits that are held at once; more are matched share by share
Key = Literal["row_key", "pair_id"]
VALUES = ("score", "suspicion")


class Pairs(NamedTuple):
    """How the pairs of A and B go together."""

    both: int
    only_a: int
    only_b: int


class Flags(NamedTuple):
    """Of the pairs in both audits."""

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


class Share(NamedTuple):
    """The pairs of an audit whose id falls into one of `of` shares."""

    audit: Artifact
    number: int
    of: int

    def read(self, columns: list[str]) -> pa.Table:
        return pa.concat_tables(map(self._of_it, scores(self.audit, columns)))

    def _of_it(self, part: pa.Table) -> pa.Table:
        if self.of == 1:
            return part
        hashes = pd.util.hash_array(part["pair_id"].to_numpy(zero_copy_only=False).astype(object))
        return part.filter(pa.array(hashes % self.of == self.number))


def _keys(table: pa.Table, key: Key) -> pa.ChunkedArray:
    """A key of each row, unlike all others: with the number of rows before it that are named alike."""
    named = table["pair_id"]
    if key == "row_key":
        named = pc.binary_join_element_wise(table["row_key"], named, "\n")
    codes = named.combine_chunks().dictionary_encode().indices.to_numpy()
    return pc.binary_join_element_wise(pc.cast(pa.array(_earlier(codes)), pa.string()), named, "\n")


def _earlier(codes: np.ndarray) -> np.ndarray:
    """How many times each value stood before; int64 [n]."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(codes) else np.empty(0, dtype=np.int64)
    runs = np.diff(np.append(first, len(codes)))
    earlier = np.empty(len(codes), dtype=np.int64)
    earlier[order] = np.arange(len(codes)) - np.repeat(first, runs)
    return earlier


def _matches(tables: Sequence[pa.Table], key: Key) -> tuple[np.ndarray, np.ndarray]:
    """The places of matching rows in A and in B, in the order of A."""
    a, b = (_keys(table, key) for table in tables)
    places = pc.index_in(a, value_set=b)
    mask = pc.is_valid(places)
    return np.flatnonzero(mask.to_numpy()), places.filter(mask).to_numpy().astype(np.int64)


def _best_key(a: Artifact, b: Artifact, shares: int) -> Key:
    """The key that matches more pairs."""
    found: dict[Key, int] = {"row_key": 0, "pair_id": 0}
    for number in range(shares):
        rows = [Share(audit, number, shares).read(["row_key", "pair_id"]) for audit in (a, b)]
        for key in found:
            found[key] += len(_matches(rows, key)[0])
    return "pair_id" if found["pair_id"] > found["row_key"] else "row_key"


def _correlation(a: pa.Table, b: pa.Table, name: str) -> float | None:
    """Spearman's, of the rows where both know a value."""
    values = np.stack([table[name].to_numpy().astype(np.float64) for table in (a, b)])
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
    one, other = (_flat(read_json(audit.path / ASKED)) for audit in (a, b))
    names = sorted({*one, *other})
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


class Matched(NamedTuple):
    """The pairs of one share that are in both audits, row by row side by side."""

    a: pa.Table
    b: pa.Table

    def flags(self) -> dict[str, np.ndarray]:
        """Who is flagged, bool [n] by the names of Flags."""
        a, b = self.a["flag"].to_numpy(), self.b["flag"].to_numpy()
        return {"a": a, "b": b, "gained": b & ~a, "lost": a & ~b}

    def changes(self) -> np.ndarray:
        """B minus A in suspicion, where both know it."""
        change = self.b["suspicion"].to_numpy() - self.a["suspicion"].to_numpy()
        return change[np.isfinite(change)]

    def told(self, mask: np.ndarray) -> Iterator[dict[str, Any]]:
        """The pairs of a mask, with what both audits say of them."""
        chosen = pa.array(np.flatnonzero(mask))
        for a, b in zip(self.a.take(chosen).to_pylist(), self.b.take(chosen).to_pylist(), strict=True):
            said = {f"{name}_{side}": row[name] for name in ("row_key", *VALUES) for side, row in (("a", a), ("b", b))}
            unknown = {name: None for name, value in said.items() if value != value}  # noqa: PLR0124  # NaN is no JSON
            yield {"pair_id": a["pair_id"], **said, **unknown}


Tell = Callable[[str, dict[str, Any]], None]  # "gained" or "lost", and the pair


def difference(a: Artifact, b: Artifact, tell: Tell = lambda kind, pair: None, most: int = MOST) -> Difference:
    """B against A; `tell` is told of every pair that gained or lost its flag. About `most` rows are held at once."""
    rows = {audit.path: scored_rows(audit) for audit in (a, b)}
    shares = max(1, -(-sum(rows.values()) // most))
    key = _best_key(a, b, shares)
    both, flags = 0, Counter(dict.fromkeys(Flags._fields, 0))
    changes = np.zeros(2)  # how many, and their sum
    for number in range(shares):
        matched = _matched(a, b, key, number, shares)
        both += len(matched.a)
        changes += len(matched.changes()), matched.changes().sum()
        for kind, mask in matched.flags().items():
            flags[kind] += int(mask.sum())
            if kind in ("gained", "lost"):
                for pair in matched.told(mask):
                    tell(kind, pair)
        if number == 0:  # a share by hash is as good as a draw
            spearman = {name: _correlation(*matched, name) for name in VALUES}
            spearman_pairs = len(matched.a)
    return Difference(
        key,
        Pairs(both, rows[a.path] - both, rows[b.path] - both),
        Flags(**flags),
        spearman,
        spearman_pairs,
        float(changes[1] / changes[0]) if changes[0] else None,
        (count(a.path).reasons, count(b.path).reasons),
        _asked_differently(a, b),
    )


def _matched(a: Artifact, b: Artifact, key: Key, number: int, shares: int) -> Matched:
    columns = ["row_key", "pair_id", *VALUES, "flag"]
    held = [Share(audit, number, shares).read(columns) for audit in (a, b)]
    return Matched(*(table.take(pa.array(at)) for table, at in zip(held, _matches(held, key), strict=True)))


def write_difference(a: Artifact, b: Artifact, path: Path, most: int = MOST) -> Difference:
    """The difference as JSON at `path`, with `gained` and `lost` pair by pair; the lists are written as they are found.

    `path` is whole or absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
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
        try:
            with beside.open("w", encoding="utf-8") as whole:
                facts = json.dumps({"a": str(a.path), "b": str(b.path)} | _tree(found), indent=1, ensure_ascii=False)
                whole.write(facts.removesuffix("\n}"))
                for name, stream in lists.items():
                    whole.write(f',\n "{name}": [')
                    stream.seek(0)
                    shutil.copyfileobj(stream, whole)
                    whole.write("]")
                whole.write("\n}\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return found


def _tree(found: Difference) -> dict[str, Any]:
    shown = found._asdict() | {"pairs": found.pairs._asdict(), "flags": found.flags._asdict()}
    return shown | {"quarantine": dict(zip("ab", found.quarantine, strict=True))}
