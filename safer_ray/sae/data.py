"""Vectors for training an SAE, read from Parquet by row groups in an order that seed and epoch decide alone.

An epoch is a seeded permutation of *blocks* of consecutive rows, whichever files and row groups they lie in. *Windows*
of several blocks are shuffled row by row, and the batches are cut from what comes out. What is in a window follows from
its number, so a position is an epoch and a batch, and nothing of the buffer has to be kept. Each worker reads its range
of every window, and takes of every batch the rows that lie there.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from safer_ray.config.sections import SaeConfig
from safer_ray.errors import UserError
from safer_ray.reward.split import validation_split
from safer_ray.reward.training_steps import permutation, share
from safer_ray.sae.model import standardise
from safer_ray.storage.artifacts import part_files
from safer_ray.storage.background import prefetch

BLOCK = 4096  # rows that stay together when blocks are drawn
WINDOW = 16  # blocks that are shuffled among each other
AHEAD = 2  # batches that are ready before they are asked for
KEPT = 2**29  # bytes of blocks that stay in memory from their first epoch on
HELD_OUT = 65_536  # vectors that quality is measured on, at most
log = logging.getLogger(__name__)


class _Group(NamedTuple):
    """A row group of a file."""

    path: Path
    number: int


@dataclass(frozen=True)
class Vectors:
    """Activations on disk, and what each row is for. Raw ones (without a column `norm`) are standardised when read."""

    source: Path  # a directory of parts, or a file
    width: int
    raw: bool
    groups: Sequence[_Group]
    first: np.ndarray  # int64 [groups + 1], the row at which each begins, and the number of all
    train: np.ndarray  # bool [rows]
    held: np.ndarray  # bool [rows], never trained on
    outliers: int  # rows that are neither

    @property
    def rows(self) -> int:
        return int(self.first[-1])

    def counts(self, mask: np.ndarray) -> np.ndarray:
        """Return how many rows of each block are in a mask."""
        return np.add.reduceat(mask, np.arange(0, self.rows, BLOCK), dtype=np.int64)

    def block(self, number: int, mask: np.ndarray) -> np.ndarray:
        """The vectors of a block that are in a mask, float16 [m, d].

        Raises:
            UserError: one of them is NaN or infinite; its row is named.
        """
        start, stop = number * BLOCK, min(self.rows, (number + 1) * BLOCK)
        kept = mask[start:stop]
        if not kept.any():
            return np.empty((0, self.width), np.float16)
        x = _matrix(self._column("x", start, stop), self.width)[kept]
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            raise UserError(self.told(start + int(np.flatnonzero(kept)[bad.argmax()])))
        return _standardised(x) if self.raw else x.astype(np.float16, copy=False)

    def _column(self, name: str, start: int, stop: int) -> pa.ChunkedArray:
        low = int(np.searchsorted(self.first, start, side="right")) - 1
        high = int(np.searchsorted(self.first, stop))
        chunks: list[pa.Array] = []
        for path in dict.fromkeys(group.path for group in self.groups[low:high]):
            numbers = [group.number for group in self.groups[low:high] if group.path == path]
            with pq.ParquetFile(path) as file:
                chunks += file.read_row_groups(numbers, columns=[name], use_threads=False)[name].chunks
        return pa.chunked_array(chunks).slice(start - int(self.first[low]), stop - start)

    def told(self, row: int) -> str:
        """That a row is not to be trained on."""
        named = "pair_id" in pq.read_schema(self.groups[0].path).names
        who = f"pair {self._column('pair_id', row, row + 1)[0].as_py()!r}" if named else self.source.name
        return (
            f"activations: row {row} ({who}) is NaN or infinite; rebuild stage `activations` with a sound reward model"
        )


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Raises UserError: the vectors are not all of one width."""
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    if len(flat) != len(column) * width:
        raise UserError(
            f"activations: {len(column)} vectors hold {len(flat)} numbers, wanted {width} each; mend the file"
        )
    return flat.reshape(-1, width)


def _standardised(x: np.ndarray) -> np.ndarray:
    return standardise(torch.from_numpy(x.astype(np.float32))).x.clamp(-65504, 65504).to(torch.float16).numpy()


class _Facts(NamedTuple):
    """Facts about the rows of a file without its vectors (of raw ones: from them)."""

    norm: np.ndarray  # float32 [rows]
    held: np.ndarray  # bool [rows]


def open_vectors(source: Path, config: SaeConfig) -> Vectors:
    """Activations split by prompt group (by pair where there is none), outliers (raw norm over `norm_limit` medians)
    left out.

    Raises:
        UserError: NaN or infinite values, no column of vectors, vectors narrower than k, or fewer than a batch.
    """
    files = [source] if source.is_file() else part_files(source)
    groups, sizes, facts = [], [0], []
    schema = pq.read_schema(files[0])
    raw, width = "norm" not in schema.names, _width(files[0], schema)
    for path in files:
        with pq.ParquetFile(path) as file:
            own = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups += [_Group(path, i) for i in range(len(own))]
            facts.append(_facts(file, sum(sizes), width, config))
            sizes += own
    if max(sizes) > WINDOW * BLOCK:
        log.warning("%s: row groups of %d vectors are read again and again; write them smaller", source, max(sizes))
    norm, held = (np.concatenate(values) for values in zip(*facts, strict=True))
    none = np.zeros(len(norm), dtype=bool)
    vectors = Vectors(source, width, raw, groups, np.cumsum(sizes), none, none, 0)
    bad = np.flatnonzero(~np.isfinite(norm))
    if len(bad):
        raise UserError(vectors.told(int(bad[0])))
    inside = norm <= config.norm_limit * np.median(norm) if len(norm) else none
    vectors = replace(vectors, train=inside & ~held, held=inside & held, outliers=int((~inside).sum()))
    if width < config.k:
        raise UserError(f"sae: vectors in {source} are {width} wide, narrower than k {config.k}; lower sae.k")
    train = int(vectors.train.sum())
    if train < config.batch_size or not vectors.held.any():
        raise UserError(
            f"sae: {train} training and {int(vectors.held.sum())} held-out vectors in {source}, wanted at least "
            f"{config.batch_size} and 1; lower sae.batch_size or harvest more pairs"
        )
    return vectors


def _width(path: Path, schema: pa.Schema) -> int:
    kind = schema.field("x").type if "x" in schema.names else None
    if kind is None or not hasattr(kind, "value_type") or not pa.types.is_floating(kind.value_type):
        raise UserError(f"{path} has no column `x` of vectors (lists of floats); pass activations")
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    with pq.ParquetFile(path) as file:
        row = next(file.iter_batches(1, columns=["x"]), None)
    if row is None or not row.num_rows:
        raise UserError(f"{path} holds no vectors; harvest some")
    return len(row["x"][0])


def _facts(file: pq.ParquetFile, first: int, width: int, config: SaeConfig) -> _Facts:
    names = file.schema_arrow.names
    keys = [name for name in ("group", "pair_id") if name in names]
    norms, held = [np.empty(0, np.float32)], [np.empty(0, bool)]
    for batch in file.iter_batches(BLOCK, columns=[*keys, "norm" if "norm" in names else "x"], use_threads=False):
        if "norm" in names:
            norms.append(batch["norm"].to_numpy(zero_copy_only=False))
        else:
            norms.append(np.linalg.norm(_matrix(pa.chunked_array([batch["x"]]), width).astype(np.float32), axis=1))
        held.append(_held(batch, keys, first, config))
        first += batch.num_rows
    return _Facts(np.concatenate(norms), np.concatenate(held))


def _held(batch: pa.RecordBatch, keys: list[str], first: int, config: SaeConfig) -> np.ndarray:
    """Which rows are held out: by prompt group, else by pair, else row by row."""
    if not keys:
        rows = [str(first + i) for i in range(batch.num_rows)]
        return validation_split(rows, config.validation_percent, config.seed)
    key = batch[keys[0]] if len(keys) == 1 else pc.coalesce(batch["group"], batch["pair_id"])
    coded = pc.dictionary_encode(key)
    split = validation_split(coded.dictionary.to_pylist(), config.validation_percent, config.seed)
    return split[coded.indices.to_numpy(zero_copy_only=False)]


class Batch(NamedTuple):
    """A worker's vectors of a batch, and how many the whole batch has."""

    x: np.ndarray  # float16 [m, d], standardised
    rows: int


class _Window(NamedTuple):
    """Blocks that are shuffled together, and where their rows lie in the epoch."""

    epoch: int
    number: int
    blocks: np.ndarray
    start: int
    stop: int


class _Loaded(NamedTuple):
    """A worker's part of a window: rows `low` and on of its blocks, one after another."""

    window: _Window
    order: np.ndarray  # of all rows of the window
    low: int
    x: np.ndarray  # float16 [m, d]

    def take(self, start: int, stop: int) -> np.ndarray:
        """Those of the worker's vectors that lie between two places of the epoch."""
        rows = self.order[max(0, start - self.window.start) : max(0, stop - self.window.start)] - self.low
        return self.x[rows[(rows >= 0) & (rows < len(self.x))]]


@dataclass(frozen=True)
class Order:
    """The batches of every epoch as worker `rank` of `size` sees them; the batches are the same for any number."""

    vectors: Vectors
    batch_size: int
    seed: int
    rank: int = 0
    size: int = 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Training rows of each block."""
        return self.vectors.counts(self.vectors.train)

    @cached_property
    def rows(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def _kept(self) -> dict[int, np.ndarray]:
        return {}

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch; their sizes differ by one at most, so that none is left over."""
        return -(-self.rows // self.batch_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """Return where a batch begins and ends in its epoch."""
        return number * self.rows // self.per_epoch, (number + 1) * self.rows // self.per_epoch

    @contextlib.contextmanager
    def batches(self, step: int = 0) -> Iterator[Iterator[Batch]]:
        """Inside, all batches from a step on, without end; what is to come is read meanwhile."""
        with prefetch(self._batches(step), AHEAD) as made:
            yield made

    def _batches(self, step: int) -> Iterator[Batch]:
        with prefetch(self._loaded(step), 1) as loaded:
            held: list[_Loaded] = []
            for epoch, number in (divmod(at, self.per_epoch) for at in count(step)):
                start, stop = self.bounds(number)
                held = [own for own in held if own.window.epoch == epoch and own.window.stop > start]
                while not held or held[-1].window.stop < stop:
                    held.append(next(loaded))
                yield Batch(np.concatenate([own.take(start, stop) for own in held]), stop - start)

    def _loaded(self, step: int) -> Iterator[_Loaded]:
        begin, number = divmod(step, self.per_epoch)
        for epoch in count(begin):
            for window in self.windows(epoch):
                if epoch > begin or window.stop > self.bounds(number)[0]:
                    yield self._load(window)

    def windows(self, epoch: int) -> list[_Window]:
        """An epoch's windows, in their order."""
        drawn = permutation(len(self.counts), self.seed, epoch)
        windows, start = [], 0
        for number, first in enumerate(range(0, len(drawn), WINDOW), 1):
            blocks = drawn[first : first + WINDOW]
            stop = start + int(self.counts[blocks].sum())
            if stop > start:
                windows.append(_Window(epoch, number, blocks, start, stop))
            start = stop
        return windows

    def _load(self, window: _Window) -> _Loaded:
        rows = window.stop - window.start
        own = share(rows, self.rank, self.size)
        low, high = own.start, own.stop
        counts = self.counts[window.blocks]
        ends = np.cumsum(counts)
        mine = (ends > low) & (ends - counts < high)
        begins = int((ends - counts)[mine][0]) if mine.any() else low
        parts = [self._block(int(number)) for number in window.blocks[mine]]
        x = np.concatenate([np.empty((0, self.vectors.width), np.float16), *parts])[low - begins : high - begins]
        order = np.random.default_rng([self.seed, window.epoch, window.number]).permutation(rows)
        return _Loaded(window, order, low, x)

    def _block(self, number: int) -> np.ndarray:
        """A block's training vectors: decoding Parquet again costs a tenth of a step."""
        if number in self._kept:
            return self._kept[number]
        x = self.vectors.block(number, self.vectors.train)
        if sum(kept.nbytes for kept in self._kept.values()) + x.nbytes <= KEPT:
            self._kept[number] = x
        return x


def sample(vectors: Vectors, seed: int, size: int) -> np.ndarray:
    """Training vectors that an SAE starts from, float16 [at most size, d]."""
    order = Order(vectors, 1, seed)
    window = order.windows(2**31 - 1)[0]  # an epoch that no training comes to
    loaded = order._load(window)
    return loaded.x[loaded.order[:size]]


def held_out_vectors(vectors: Vectors, seed: int, limit: int = HELD_OUT) -> Iterator[np.ndarray]:
    """Held-out vectors, block by block, float16; of many the first ones in a seeded order of the blocks."""
    counts = vectors.counts(vectors.held)
    drawn = permutation(len(counts), seed, 2**31 - 2)
    enough = int(np.searchsorted(np.cumsum(counts[drawn]), limit)) + 1
    for number in sorted(int(block) for block in drawn[:enough]):
        if counts[number]:
            yield vectors.block(number, vectors.held)
