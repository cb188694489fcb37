"""Duplicates and contradicting labels among pairs: what is listed of each pair, and the labels that filters read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray import schema
from safer_ray.data.conflicts import conflicts, cycles, numbered
from safer_ray.data.near_duplicates import Part, near_clusters, parts_of
from safer_ray.data.signatures import NO_TEXT
from safer_ray.storage.files import read_parquet

RESPONSES = schema.SIDES
LABELLED = schema.PAIRS.field("labels")
LABELS = ("repeats_prompt", "repeats_response", "repeats_pair", "label_conflict", "label_cycle")


class Clusters(NamedTuple):
    """The members of all clusters of a kind, by rising pairs."""

    kind: str
    side: str | None
    row: np.ndarray  # int64, the pair of each member
    cluster: np.ndarray  # int64, the least number of a member
    other: np.ndarray  # int64, the first pair, of that one the second; of a conflict the first labelled otherwise


class Found(NamedTuple):
    """Hold what was found among pairs, by their number."""

    pairs: int
    clusters: list[Clusters]
    labels: dict[str, dict[int, str]]  # of LABELS, what it says of a pair


def find(paths: Sequence[Path], threshold: float, scratch: Path) -> Found:
    """Return the duplicates among pairs whose signatures lie in files, and the labels that contradict each other.

    Texts are the same if roles and contents are, but for the length of whitespace, and near as `near_clusters` has it.
    """
    parts = parts_of(paths)
    n = parts[-1].stop if parts else 0
    prompt, response = _same(parts, ("prompt",)), _same(parts, RESPONSES)
    near_prompt, near_response = (
        near_clusters(parts, [f"{name}_signature" for name in names], same, threshold, scratch)
        for names, same in ((("prompt",), prompt), (RESPONSES, response))
    )
    chosen, rejected = response[0::2], response[1::2]
    exact_pair = numbered(prompt, chosen, rejected)
    near_pair = numbered(np.where(prompt < 0, -1, near_prompt), near_response[0::2], near_response[1::2])
    both, circle = conflicts(prompt, chosen, rejected), cycles(prompt, chosen, rejected)
    row, pairs_of_responses = np.arange(n), np.arange(2 * n) // 2
    clusters = [
        *_of_texts("prompt", ("prompt",), prompt, near_prompt, row),
        *_of_texts("response", RESPONSES, response, near_response, pairs_of_responses),
        *_of_texts("pair", (None,), exact_pair, near_pair, row),
        _conflicts(both, chosen < rejected),
        _members("cycle", None, np.flatnonzero(circle >= 0), circle, row),
    ]
    labels = {
        "repeats_prompt": _repeats(prompt, near_prompt, row),
        "repeats_response": _repeats(response, near_response, pairs_of_responses),
        "repeats_pair": _repeats(exact_pair, near_pair, row),
        "label_conflict": dict.fromkeys(np.flatnonzero(both >= 0).tolist(), "yes"),
        "label_cycle": dict.fromkeys(np.flatnonzero(circle >= 0).tolist(), "yes"),
    }
    return Found(n, clusters, labels)


def _same(parts: Sequence[Part], names: Sequence[str]) -> np.ndarray:
    """Return for each text the number of the first one that is the same, -1 where nothing is said."""
    words = [np.empty((0, 2), dtype=np.uint64)]
    for part in parts:
        rows = read_parquet(part.path, [f"{name}_digest" for name in names])
        each = [np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint64).reshape(-1, 2) for column in rows.columns]
        words.append(np.stack(each, axis=1).reshape(-1, 2))
    high, low = np.concatenate(words).T
    same = numbered(high, low)
    nothing = np.frombuffer(NO_TEXT, dtype=np.uint64)
    same[(high == nothing[0]) & (low == nothing[1])] = -1
    return same


def _of_texts(
    what: str, sides: Sequence[str | None], same: np.ndarray, near: np.ndarray, row: np.ndarray
) -> list[Clusters]:
    """Return the clusters of equal texts, and those of near ones that are not all equal."""
    said = same >= 0
    copies = np.bincount(same[said], minlength=len(same))
    kinds = np.bincount(near[said & (same == np.arange(len(same)))], minlength=len(same))  # different texts in each
    found = []
    for kind, cluster, wanted in (
        (f"{what}_exact", same, said & (copies[same] > 1)),
        (f"{what}_near", near, said & (kinds[near] > 1)),
    ):
        members = np.flatnonzero(wanted)
        others = _others(members, cluster, row)
        for i, side in enumerate(sides):
            own = members % len(sides) == i
            found.append(Clusters(kind, side, row[members[own]], cluster[members[own]], others[own]))
    return found


def _others(members: np.ndarray, cluster: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return for each member the pair of its cluster's first one; for that one the second's."""
    second = np.full(len(cluster), len(cluster), dtype=np.int64)
    later = members[members != cluster[members]]
    np.minimum.at(second, cluster[later], later)
    first = cluster[members]
    return row[np.where(members == first, second[first], first)]


def _members(kind: str, side: str | None, members: np.ndarray, cluster: np.ndarray, row: np.ndarray) -> Clusters:
    return Clusters(kind, side, row[members], cluster[members], _others(members, cluster, row))


def _conflicts(both: np.ndarray, forward: np.ndarray) -> Clusters:
    members = np.flatnonzero(both >= 0)
    first = np.full((2, len(both)), len(both), dtype=np.int64)
    np.minimum.at(first, (forward[members].astype(np.int64), both[members]), members)
    return Clusters(
        "conflict", None, members, both[members], first[(~forward[members]).astype(np.int64), both[members]]
    )


def _repeats(same: np.ndarray, near: np.ndarray, row: np.ndarray) -> dict[int, str]:
    """Return the pairs with a text that an earlier pair says: `exact`, or `near`."""
    found: dict[int, str] = {}
    for how, cluster in (("near", near), ("exact", same)):
        later = np.flatnonzero((same >= 0) & (row[cluster] < row))
        found |= dict.fromkeys(row[later].tolist(), how)
    return found


def listed(found: Found, ids: pa.Array, start: int, stop: int) -> pa.Table:
    """Return what is found of the pairs `start` to `stop`, in the DUPLICATES schema; `ids` are those of all pairs."""
    tables = [schema.DUPLICATES.empty_table()]
    for each in found.clusters:
        begin, end = np.searchsorted(each.row, [start, stop])
        rows = slice(begin, end)
        columns = {
            "pair_id": ids.take(pa.array(each.row[rows])),
            "kind": pa.array([each.kind] * int(end - begin), pa.string()),
            "side": pa.array([each.side] * int(end - begin), pa.string()),
            "cluster": pa.array(each.cluster[rows]),
            "other": ids.take(pa.array(each.other[rows])),
        }
        tables.append(pa.table(columns, schema=schema.DUPLICATES))
    return pa.concat_tables(tables)


def labelled(pairs: pa.Table, found: Found, start: int) -> tuple[pa.Table, int]:
    """Return pairs, of which the first is number `start`, with LABELS among their labels, in the place of any of these
    names; and the number of pairs that had one."""
    if "labels" not in pairs.column_names:  # of pairs from elsewhere
        pairs = pairs.append_column(LABELLED, pa.nulls(len(pairs), LABELLED.type))
    labels, replaced = [], 0
    for number, own in enumerate(pairs["labels"].to_pylist(), start):
        kept = [(name, value) for name, value in own or () if name not in LABELS]
        replaced += len(kept) < len(own or ())
        added = [(name, of[number]) for name, of in found.labels.items() if number in of]
        labels.append(kept + added if kept or added or own is not None else None)
    place = pairs.schema.get_field_index("labels")
    return pairs.set_column(place, LABELLED, pa.array(labels, LABELLED.type)), replaced


def counted(found: Found) -> dict[str, dict[str, int]]:
    """Return for each kind the number of its clusters, and of the pairs in them."""
    clusters: dict[str, list[np.ndarray]] = {}
    rows: dict[str, list[np.ndarray]] = {}
    for each in found.clusters:
        clusters.setdefault(each.kind, []).append(each.cluster)
        rows.setdefault(each.kind, []).append(each.row)
    return {
        kind: {
            "clusters": len(np.unique(np.concatenate(clusters[kind]))),
            "pairs": len(np.unique(np.concatenate(rows[kind]))),
        }
        for kind in clusters
    }
