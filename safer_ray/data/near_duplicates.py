"""Texts that say nearly the same, found by their signatures: candidates by bands of them, joined partition by partition
on the disk, and verified by the estimated Jaccard index. What is held in memory is some numbers a text."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from safer_ray.data.signatures import PERMUTATIONS, PRIME
from safer_ray.errors import explain_disk_errors
from safer_ray.storage.files import read_parquet, remove

RECALL = 0.99  # of pairs of texts at the threshold, that become candidates
PARTITION_ROWS = 2**20  # of band hashes; what is sorted at once
BUFFERED_ROWS = 4 * 2**20  # of band hashes, before they are written
ALL_OF = 16  # texts in a bucket that are all compared with each other
PENDING = 2**22  # candidates that wait to be verified
AT_ONCE = 2**17  # candidates that are verified at once: the signatures of twice as many texts


class Part(NamedTuple):
    """A file of signatures, and the number of its first row among all."""

    path: Path
    start: int
    stop: int


def parts_of(paths: Sequence[Path]) -> list[Part]:
    """Return files of signatures in their order, with the rows that they hold."""
    stops = np.cumsum([pq.read_metadata(path).num_rows for path in paths]).tolist()
    return [Part(*each) for each in zip(paths, [0, *stops[:-1]], stops, strict=True)]


def bands_for(threshold: float) -> tuple[int, int]:
    """Return the number of bands and the entries of each: the longest by which `RECALL` of the pairs of texts at the
    threshold share one."""
    entries = max(r for r in _divisors(PERMUTATIONS) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL)
    return PERMUTATIONS // entries, entries


def _divisors(number: int) -> list[int]:
    return [r for r in range(1, number + 1) if number % r == 0]


def near_clusters(
    parts: Sequence[Part], columns: Sequence[str], first: np.ndarray, threshold: float, scratch: Path
) -> np.ndarray:
    """Return for each text the least number of a text in its cluster, int64 [n].

    Text `row * len(columns) + i` is what column i says of a row. `first` has for each text the number of the first one
    that is the same, -1 where nothing is said; only these are compared. Two texts are near if the estimated Jaccard
    index of their shingles is `threshold` or more, and a cluster is what is connected by such pairs, so its ends may be
    further apart. Of more than `ALL_OF` texts in one bucket each is compared with the first and with the one before.
    The result depends on the texts and their order alone.
    """
    clusters = np.arange(len(first), dtype=np.int64)
    waiting: list[np.ndarray] = []
    try:
        for found in _candidates(parts, columns, first, bands_for(threshold), scratch):
            waiting.append(found)
            if sum(map(len, waiting)) > PENDING:
                clusters = _verified(parts, columns, clusters, np.unique(np.concatenate(waiting)), threshold)
                waiting = []
        if waiting:
            clusters = _verified(parts, columns, clusters, np.unique(np.concatenate(waiting)), threshold)
    finally:
        remove(scratch)
    said = first >= 0
    clusters[said] = clusters[first[said]]
    return clusters


def _candidates(
    parts: Sequence[Part], columns: Sequence[str], first: np.ndarray, bands: tuple[int, int], scratch: Path
) -> Iterator[np.ndarray]:
    """Yield pairs of texts that share a band, as `smaller << 32 | larger`, those of each partition once."""
    count = max(1, -(-len(first) * bands[0] // PARTITION_ROWS))
    _write_bands(parts, columns, first, bands, scratch, count)
    for partition in range(count):
        files = sorted(scratch.glob(f"{partition:05}-*.parquet"))
        if files:
            rows = pa.concat_tables([read_parquet(file) for file in files])
            yield _in_buckets(rows["key"].to_numpy(), rows["text"].to_numpy().astype(np.uint64))


def _write_bands(
    parts: Sequence[Part], columns: Sequence[str], first: np.ndarray, bands: tuple[int, int], scratch: Path, count: int
) -> None:
    """Write the hash of every band of every text that is the first of its kind, a file a partition and round."""
    remove(scratch)
    scratch.mkdir(parents=True)
    keys: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    rounds = 0
    for number, part in enumerate(parts):
        ids, signed = _signatures_in(part, columns)
        own = np.flatnonzero(first[ids] == ids)
        keys.append(_band_hashes(signed[own], bands).reshape(-1))
        texts.append(np.repeat(ids[own], bands[0]).astype(np.uint32))
        if sum(map(len, keys)) >= BUFFERED_ROWS or number == len(parts) - 1:
            _write_round(np.concatenate(keys), np.concatenate(texts), scratch, count, rounds)
            keys, texts, rounds = [], [], rounds + 1


def _write_round(keys: np.ndarray, texts: np.ndarray, scratch: Path, count: int, number: int) -> None:
    partition = (keys % np.uint64(count)).astype(np.int64)
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(partition[order], np.arange(count + 1))
    with explain_disk_errors(scratch):
        for i, (start, stop) in enumerate(pairwise(bounds)):
            if stop > start:
                rows = pa.table({"key": keys[order[start:stop]], "text": texts[order[start:stop]]})
                path = scratch / f"{i:05}-{number:06}.parquet"
                pq.write_table(rows, path, compression="none", use_dictionary=False, write_statistics=False)


def _band_hashes(signed: np.ndarray, bands: tuple[int, int]) -> np.ndarray:
    """Return a hash of each band of signatures, uint64 [n, bands], other ones of equal entries in another band."""
    entries = signed.reshape(len(signed), *bands).astype(np.uint64)
    hashes = np.tile(np.arange(1, bands[0] + 1, dtype=np.uint64), (len(signed), 1))
    for i in range(bands[1]):
        hashes = (hashes ^ entries[:, :, i]) * PRIME
        hashes ^= hashes >> np.uint64(31)
        hashes *= np.uint64(0x9E3779B97F4A7C15)
    return hashes ^ (hashes >> np.uint64(32))


def _signatures_in(part: Part, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a part's texts, and their signatures, uint16 [n, PERMUTATIONS]."""
    rows = read_parquet(part.path, list(columns))
    flat = [rows[name].combine_chunks().flatten().to_numpy().reshape(-1, PERMUTATIONS) for name in columns]
    ids = np.arange(part.start * len(columns), part.stop * len(columns), dtype=np.int64)
    return ids, np.stack(flat, axis=1).reshape(-1, PERMUTATIONS)


def _in_buckets(keys: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return the pairs of texts of equal keys that are compared, uint64, once each."""
    order = np.argsort(keys, kind="stable")  # texts rise within a bucket
    keys, texts = keys[order], texts[order]
    start = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    size = np.diff(np.append(start, len(keys)))
    found = [np.empty(0, dtype=np.uint64)]
    for several in np.unique(size[(size > 1) & (size <= ALL_OF)]):
        left, right = np.triu_indices(several, 1)
        bucket = texts[start[size == several][:, None] + np.arange(several)]
        found.append((bucket[:, left] << np.uint64(32) | bucket[:, right]).reshape(-1))
    large = size > ALL_OF
    for begin, count in zip(start[large], size[large], strict=True):
        bucket = texts[begin : begin + count]
        found += [bucket[0] << np.uint64(32) | bucket[1:], bucket[:-1] << np.uint64(32) | bucket[1:]]
    return np.unique(np.concatenate(found))


def _verified(
    parts: Sequence[Part], columns: Sequence[str], clusters: np.ndarray, candidates: np.ndarray, threshold: float
) -> np.ndarray:
    """Return clusters joined by the candidates that are near."""
    for begin in range(0, len(candidates), AT_ONCE):
        some = candidates[begin : begin + AT_ONCE]
        left, right = (some >> np.uint64(32)).astype(np.int64), (some & np.uint64(2**32 - 1)).astype(np.int64)
        apart = clusters[left] != clusters[right]  # what is connected already stays so
        left, right = left[apart], right[apart]
        if not len(left):
            continue
        ids = np.unique(np.concatenate([left, right]))
        signed = _signatures_of(parts, columns, ids)
        same = signed[np.searchsorted(ids, left)] == signed[np.searchsorted(ids, right)]
        near = same.mean(axis=1) >= threshold
        clusters = joined(clusters, left[near], right[near])
    return clusters


def _signatures_of(parts: Sequence[Part], columns: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """Return the signatures of texts, by rising number, read part by part."""
    bounds = np.searchsorted(ids, [part.start * len(columns) for part in parts] + [parts[-1].stop * len(columns)])
    found = [np.empty((0, PERMUTATIONS), dtype=np.uint16)]
    for part, begin, end in zip(parts, bounds[:-1], bounds[1:], strict=True):
        if end > begin:
            numbers, signed = _signatures_in(part, columns)
            found.append(signed[ids[begin:end] - numbers[0]])
    return np.concatenate(found)


def joined(clusters: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return clusters, each named by its least member, after the texts `left` and `right` are in one each."""
    names, ends = np.unique(clusters[np.concatenate([left, right])], return_inverse=True)
    if not len(names):
        return clusters
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), ends.reshape(2, -1)), shape=(len(names), len(names)))
    group = connected_components(edges, directed=False)[1]
    least = np.full(group.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, group, names)
    renamed = np.arange(len(clusters), dtype=np.int64)
    renamed[names] = least[group]
    return renamed[clusters]
