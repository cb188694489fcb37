"""Tokenised pairs as Arrow columns, so that processes without the model can prepare them for those that hold it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.reward.text import PairTokens, Side
from safer_ray.schema import SIDES

TEXTS = ("prompt", "chosen", "rejected")


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind))


def with_tokens(rows: pa.Table, tokens: Sequence[PairTokens]) -> pa.Table:
    """`rows` with the token columns in the place of the texts.

    Added are `n_prompt_tokens`, `truncated`, and for each side `s`: `s_ids`, `s_token`, `s_end` (lists of int32) and
    `s_fallback`.
    """
    rows = rows.drop_columns([name for name in TEXTS if name in rows.column_names])
    rows = rows.append_column("n_prompt_tokens", pa.array([t.n_prompt_tokens for t in tokens], pa.int32()))
    rows = rows.append_column("truncated", pa.array([t.truncated for t in tokens], pa.bool_()))
    for side in SIDES:
        sides: list[Side] = [getattr(t, side) for t in tokens]
        for name, arrays in (
            ("ids", [s.ids for s in sides]),
            ("token", [s.token for s in sides]),
            ("end", [s.end for s in sides]),
        ):
            rows = rows.append_column(f"{side}_{name}", _lists(arrays, pa.int32()))
        rows = rows.append_column(f"{side}_fallback", pa.array([s.fallback for s in sides], pa.bool_()))
    return rows


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    ends = np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    return np.split(lists.flatten().to_numpy(zero_copy_only=False, writable=True), ends[:-1]) if len(ends) else []


def read_tokens(rows: pa.Table) -> list[PairTokens]:
    """The tokens that `with_tokens` wrote."""
    sides = []
    for side in SIDES:
        ids, token, end = (_arrays(rows[f"{side}_{name}"]) for name in ("ids", "token", "end"))
        fallback = rows[f"{side}_fallback"].to_pylist()
        sides.append([Side(i.astype(np.int64), t, e, f) for i, t, e, f in zip(ids, token, end, fallback, strict=True)])
    facts = (rows[name].to_pylist() for name in ("pair_id", "n_prompt_tokens", "truncated"))
    return [PairTokens(*row) for row in zip(*facts, *sides, strict=True)]


def token_count(rows: pa.Table) -> int:
    """Tokens of both sides of all rows; 0 for rows that are not tokenised."""
    columns = [f"{side}_ids" for side in SIDES if f"{side}_ids" in rows.column_names]
    return sum(pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in columns)


class TokenisePairs:
    """Batch function: pairs -> the same rows, tokenised for the model in `reward`, whose weights are not read."""

    def __init__(self, reward: Path, reading: Reading = AS_IT_COMES) -> None:
        from safer_ray.reward.checkpoints import (
            load_pair_tokenizer,  # here, since other readers of this module need no torch
        )

        self.tokenise = load_pair_tokenizer(reward, reading)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return with_tokens(rows, self.tokenise(rows.select(["pair_id", *TEXTS]).to_pylist()) if len(rows) else [])
