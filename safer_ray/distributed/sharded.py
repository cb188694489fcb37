"""Fragments cut into micro-batches, for models in several parts: the rows of one stream from pool to pool."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safer_ray.distributed.operators import COUNTED, Commit, Map, Read, Row, fragment_of, from_bytes, next_row, to_bytes
from safer_ray.errors import UserError
from safer_ray.pipeline.runner import Attempts, Mapped, Prepared
from safer_ray.schema import QUARANTINE, SIDES
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.files import names_in, read_json, read_parquet, remove, write_json, write_parquet
from safer_ray.storage.work import Part, Work


def cut(rows: pa.Table, tokens: int) -> Iterator[pa.Table]:
    """Tokenised rows in their order, in pieces of at most so many tokens, or of one row."""
    lengths = sum(pc.list_value_length(rows[f"{side}_ids"]).to_numpy() for side in SIDES)
    start, held = 0, 0
    for i, length in enumerate(np.asarray(lengths).tolist()):
        if i > start and held + length > tokens:
            yield rows.slice(start, i - start)
            start, held = i, 0
        held += length
    if start < len(rows):
        yield rows.slice(start)


class ReadPieces(Read):
    """Reads a fragment, and gives it in pieces."""

    def __call__(self, row: Row) -> list[Row]:  # type: ignore[override]
        made: Any = super().__call__(row)
        return made if isinstance(made, list) else [made]

    def work(self, row: Row) -> list[Row]:  # type: ignore[override]
        prepared: Prepared = self.built(fragment_of(row))
        pieces = list(cut(pa.concat_tables(prepared.pieces), self.job.piece_tokens)) if prepared.pieces else []
        rows, start = [], 0
        for number, piece in enumerate(pieces or [None]):
            # What belongs to the whole fragment travels with its first piece alone, or it would be counted for each.
            refused = prepared.refused if number == 0 else QUARANTINE.empty_table()
            counted = {name: getattr(prepared, name) if number == 0 else 0 for name in COUNTED}
            place = {"number": number, "of": max(1, len(pieces)), "start": start}
            held = {"rows": b"" if piece is None else to_bytes([piece]), "refused": to_bytes([refused])}
            rows.append(next_row(row, **place, **counted, **held))
            start += 0 if piece is None else len(piece)
        return rows


class MapPiece(Map):
    """Puts a piece through one part of the batch function."""

    def __init__(self, works: Sequence[Work], run: str, part: Part, threads: int) -> None:
        super().__init__(works, run, threads)
        self.part = part

    def build_function(self) -> Attempts:
        return Attempts(self.job, self.directory, self.job.make(part=self.part), f"map-{self.part.number}")

    def work(self, row: Row) -> Row:
        # A fragment of refused rows alone still has to reach the commit, which counts them.
        if not row["rows"]:
            return row
        began, self.built.restarts = time.monotonic(), 0
        good, bad = self.built(fragment_of(row), pa.concat_tables(from_bytes(row["rows"])), row["start"])
        if self.part.last:
            good = [self.job.as_written(table) for table in good]
        refused = pa.concat_tables([*from_bytes(row["refused"]), bad])
        held = {"rows": to_bytes(good) if good else b"", "refused": to_bytes([refused])}
        counted = {
            "seconds": row["seconds"] + time.monotonic() - began,
            "restarts": self.built.restarts + row["restarts"],
        }
        return row | held | counted


class CommitPiece(Commit):
    """Writes a piece down; the one that makes a fragment whole commits it."""

    def work(self, row: Row) -> Row:
        fragment = fragment_of(row)
        folder = self.directory / "journal" / "pieces" / f"{fragment.number:08}-{row['of']:05}"
        rows = pa.concat_tables([self.job.schema.empty_table(), *(from_bytes(row["rows"]) if row["rows"] else [])])
        write_parquet(rows, folder / f"{row['number']:05}.rows.parquet")
        write_parquet(pa.concat_tables(from_bytes(row["refused"])), folder / f"{row['number']:05}.refused.parquet")
        write_json({name: row[name] for name in COUNTED}, folder / f"{row['number']:05}.json")
        # Whoever sees all pieces commits; two may, at one moment, and both write the same.
        waits = next_row(row, committed=False, read=0)
        if sum(name.endswith(".json") for name in names_in(folder)) < row["of"]:
            return waits
        try:
            mapped = _together(fragment, folder, row["of"])
        except UserError:
            if (self.directory / "done" / f"{fragment.number:08}.json").exists():
                return waits  # another piece came at the same time, committed, and removes what is read here
            raise
        closed = self.close(row, mapped)
        with contextlib.suppress(OSError):
            remove(folder)
        return closed


def _together(fragment: Fragment, folder: Path, pieces: int) -> Mapped:
    """All pieces of a fragment; raises UserError where one is not there."""
    facts = [read_json(folder / f"{number:05}.json") for number in range(pieces)]
    rows, refused = (
        pa.concat_tables([read_parquet(folder / f"{number:05}.{name}.parquet") for number in range(pieces)])
        for name in ("rows", "refused")
    )
    return Mapped(fragment, rows=rows, refused=refused, **{name: sum(fact[name] for fact in facts) for name in COUNTED})
