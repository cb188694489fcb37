"""The pairs of a training: tokenised once, by all workers together, and read by each where it needs them.

They lie in Arrow files in the training's own state, which are mapped into memory: a row is found without reading any
other, in whatever order an epoch has them, and the pages that hold it are the operating system's to keep or to drop,
once for all workers of a host. (A row of Parquet is found by decoding its row group.)
"""

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.reward.model import RewardModel
from safer_ray.reward.split import validation_split
from safer_ray.reward.text import PairTokens, Side
from safer_ray.reward.training_steps import Workers
from safer_ray.schema import SIDES
from safer_ray.storage.artifacts import part_files, part_name
from safer_ray.storage.columnar import source_of
from safer_ray.storage.files import beside, damaged, make_folder, stamp, write_json, write_parquet
from safer_ray.storage.quarantine import refuse, refused_rows

FOLDER = "tokens"  # in a training's state
TEXTS = ("prompt", "chosen", "rejected")
ROWS = 1024  # tokenised at a time
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("held", pa.bool_()),  # out of training, to measure it
        ("label_margin", pa.float64()),
        *((f"{side}_{name}", kind) for side in SIDES for name, kind in (
            ("ids", IDS), ("types", IDS), ("prompt_tokens", pa.int32()), ("truncated", pa.bool_())
        )),
    ]
)  # fmt: skip
NOTHING = np.empty(0, dtype=np.int32)
log = logging.getLogger(__name__)


def pair_texts(pairs: pa.Table) -> Iterator[str]:
    """Every message of every pair, for a tokenizer made on the spot."""
    for column in TEXTS:
        yield from _messages(pairs[column])


def all_texts(pairs: Path) -> Iterator[str]:
    """Every message of the pairs in a directory, in the order in which a table of all of them has these."""
    for column in TEXTS:
        for path in part_files(pairs):
            for batch in _batches(path, [column]):
                yield from _messages(batch[column])


def _messages(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    for messages in column.to_pylist():
        yield from (message["content"] for message in messages or [])


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(source_of(path)) as file:
            yield from file.iter_batches(ROWS, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, error) from None


class _Account(NamedTuple):
    """The account of a part: which it is, how many rows were read and refused."""

    of: list[Any]  # by which the part is known: its name, its size and when it was written
    checksum: int  # of the file of its tokens
    read: int
    refused: int
    first: list[str]  # pair and reason of the first that was refused


def tokenise(pairs: Path, out: Path, reward: RewardModel, config: RewardConfig, workers: Workers) -> None:
    """Tokenise the pairs in `pairs` for a model, each worker its parts of them; what cannot be put to the model goes to
    the quarantine in `out`. Parts that are there, whole and of the same pairs, stay.

    Raises:
        UserError: the pairs cannot be read.
        SaferError: the disk is full.
    """
    folder = workers.state / FOLDER
    make_folder(folder)
    for number, path in enumerate(part_files(pairs)):
        known = [path.name, *stamp(path)]
        if number % workers.size == workers.rank and not _is_tokenised(folder, number, known):
            _tokenise_part(path, number, known, out, folder, reward, config)
    workers.sum(torch.zeros(1))  # all wait for all


_NONE = _Account([], 0, 0, 0, [])


def _is_tokenised(folder: Path, number: int, known: list[Any]) -> bool:
    found = _account(folder, number)
    return found is not None and found.of == known and found.checksum == checksum(_file(folder, number))


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file; -1 where there is none."""
    found = 0
    try:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                found = zlib.crc32(block, found)
    except FileNotFoundError:
        return -1
    return found


def _account(folder: Path, number: int) -> _Account | None:
    try:
        return _Account(**json.loads((folder / f"{number:08}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _tokenise_part(
    path: Path, number: int, known: list[Any], out: Path, folder: Path, reward: RewardModel, config: RewardConfig
) -> None:
    read, bad_rows = 0, []
    with (
        explain_disk_errors(folder),
        beside(_file(folder, number)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for batch in _batches(path, ["pair_id", "row_key", *TEXTS, "group", "label_margin"]):
            table = pa.Table.from_batches([batch])
            found = reward.pairs.read(table.select(["pair_id", *TEXTS]).to_pylist())
            bad = {i: tokens for i, tokens in enumerate(found) if isinstance(tokens, str)}
            if bad:
                bad_rows.append(refuse(table, bad))
            held = validation_split(table["group"].to_pylist(), config.validation_percent, config.seed)
            good = [i for i in range(len(found)) if i not in bad]
            if good:
                margins = table["label_margin"].take(good).to_pylist()
                writer.write_batch(
                    as_batch([tokens for tokens in found if not isinstance(tokens, str)], held[good].tolist(), margins)
                )
            read += len(table)
    refused, first = 0, []
    if bad_rows:
        rows = refused_rows(pa.concat_tables(bad_rows), "reward")
        write_parquet(rows, out / "quarantine" / part_name(number))
        refused, first = len(rows), [str(rows["pair_id"][0]), str(rows["reason"][0])]
    write_json(
        _Account(known, checksum(_file(folder, number)), read, refused, first)._asdict(), folder / f"{number:08}.json"
    )


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.arrow"


def as_batch(
    tokens: Sequence[PairTokens], held: Sequence[bool], label_margins: Sequence[float | None] | None = None
) -> pa.RecordBatch:
    """Return tokenised pairs in `SCHEMA`."""
    margins = [None] * len(tokens) if label_margins is None else list(label_margins)
    columns: list[Any] = [[t.pair_id for t in tokens], list(held), margins]
    for name in SIDES:
        sides: list[Side] = [getattr(pair, name) for pair in tokens]
        columns += [[s.ids.astype(np.int32) for s in sides]]
        columns += [[None if s.types is None else s.types.astype(np.int32) for s in sides]]
        columns += [[s.n_prompt for s in sides], [s.truncated for s in sides]]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


class _Lists:
    """A column of lists, as arrays that stay in their file."""

    def __init__(self, column: pa.ListArray) -> None:
        self.values = column.values.to_numpy(zero_copy_only=True)
        self.offsets = column.offsets.to_numpy(zero_copy_only=True)
        self.missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int64)

    def __getitem__(self, row: int) -> np.ndarray | None:
        """The list of a row, int64; None where it has none."""
        if self.missing is not None and self.missing[row]:
            return None
        return self.values[self.offsets[row] : self.offsets[row + 1]].astype(np.int64)


class _Batch:
    """A record batch in its file, and the numbers of its lists."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.ids = {side: _Lists(batch[f"{side}_ids"]) for side in SIDES}
        self.types = {side: _Lists(batch[f"{side}_types"]) for side in SIDES}

    def __getitem__(self, row: int) -> PairTokens:
        return PairTokens(self.batch["pair_id"][row].as_py(), *(self._side(side, row) for side in SIDES))

    def _side(self, side: str, row: int) -> Side:
        ids = self.ids[side][row]
        assert ids is not None
        prompt, cut = (self.batch[f"{side}_{name}"][row].as_py() for name in ("prompt_tokens", "truncated"))
        return Side(ids, NOTHING, NOTHING, False, prompt, cut, self.types[side][row])


@dataclass(frozen=True)
class TrainingPairs:
    """Tokenised pairs in mapped files, of which only numbers are held; their sentence ends are left out."""

    batches: Sequence[_Batch]
    numbers: np.ndarray  # int64 [n], of the rows of all batches in turn

    @classmethod
    def of(cls, batches: Sequence[pa.RecordBatch]) -> Self:
        """All rows of record batches in `SCHEMA`."""
        return cls([_Batch(batch) for batch in batches], np.arange(sum(batch.num_rows for batch in batches)))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: np.ndarray) -> list[PairTokens]:
        numbers = self.numbers[rows]
        owners = np.searchsorted(self._first, numbers, side="right") - 1
        places = zip(owners.tolist(), (numbers - self._first[owners]).tolist(), strict=True)
        return [self.batches[owner][row] for owner, row in places]

    @cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0, *(each.batch.num_rows for each in self.batches)])

    @cached_property
    def side_lengths(self) -> np.ndarray:
        """Tokens of the chosen and the rejected side of each pair, int64 [n, 2]."""
        sides = [np.stack([each.ids[side].lengths for side in SIDES], axis=1) for each in self.batches]
        return np.concatenate([np.empty((0, 2), np.int64), *sides])[self.numbers]

    @cached_property
    def checksum(self) -> int:
        """A CRC-32 of the tokens of all pairs."""
        found = zlib.crc32(self.numbers.tobytes())
        for each in self.batches:
            for side in SIDES:
                found = zlib.crc32(each.ids[side].values, zlib.crc32(each.ids[side].offsets, found))
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer side of each pair, int64 [n]."""
        return np.asarray(self.side_lengths.max(axis=1))

    def columns(self, names: list[str]) -> pa.Table:
        """Return columns of `SCHEMA` of all pairs."""
        schema = pa.schema([SCHEMA.field(name) for name in names])
        return pa.Table.from_batches([each.batch.select(names) for each in self.batches], schema).take(self.numbers)

    def split(self) -> tuple[Self, Self]:
        """Return the pairs to train on, and those that are held out."""
        held = [each.batch["held"].to_numpy(zero_copy_only=False) for each in self.batches]
        mask = np.concatenate([np.empty(0, bool), *held])[self.numbers]
        return type(self)(self.batches, self.numbers[~mask]), type(self)(self.batches, self.numbers[mask])


def map_tokens(files: Sequence[Path]) -> TrainingPairs:
    """Map Arrow files in `SCHEMA`.

    Raises:
        UserError: one is missing or torn.
    """
    batches: list[pa.RecordBatch] = []
    for file in files:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            words = " ".join(str(error).split())[:200]
            raise UserError(
                f"{file} is missing or torn ({words}); delete {file.parent}, and run the same command again"
            ) from None
    return TrainingPairs.of(batches)


class Tokenised(NamedTuple):
    """All pairs that `tokenise` could put to a model, and how many it was given."""

    pairs: TrainingPairs
    given: int


def open_tokenised(pairs: Path, state: Path, name: str) -> Tokenised:
    """Open what `tokenise` wrote for the model `name`, and tell what it left out.

    Raises:
        UserError: it is not there, or damaged.
    """
    folder = state / FOLDER
    numbers = range(len(part_files(pairs)))
    found = map_tokens([_file(folder, number) for number in numbers])
    accounts = [_account(folder, number) or _NONE for number in numbers]
    given, refused = sum(account.read for account in accounts), sum(account.refused for account in accounts)
    if refused:
        pair, reason = next(account.first for account in accounts if account.first)
        log.warning(
            "reward: %d of %d pairs cannot be put to %s and are left out, the first is pair %r: %s",
            *(refused, given, name, pair, reason),
        )
    return Tokenised(found, given)
