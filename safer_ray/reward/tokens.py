"""Tokenised pairs as Arrow columns, so that processes without the model can prepare them for those that hold it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.reward.text import PairTokens, Side
from safer_ray.schema import SIDES
from safer_ray.storage.quarantine import refuse

TEXTS = ("prompt", "chosen", "rejected")


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind))


def with_tokens(rows: pa.Table, tokens: Sequence[PairTokens]) -> pa.Table:
    """`rows` with the token columns in the place of the texts.

    Added are for each side `s`: `s_ids`, `s_token`, `s_end` (lists of int32), `s_types` (the same, or null),
    `s_fallback`, `s_prompt_tokens` and `s_truncated`.
    """
    rows = rows.drop_columns([name for name in TEXTS if name in rows.column_names])
    for side in SIDES:
        sides: list[Side] = [getattr(t, side) for t in tokens]
        for name, arrays in (
            ("ids", [s.ids for s in sides]),
            ("token", [s.token for s in sides]),
            ("end", [s.end for s in sides]),
        ):
            rows = rows.append_column(f"{side}_{name}", _lists(arrays, pa.int32()))
        types = pa.array([None if s.types is None else s.types.astype(np.int32) for s in sides], pa.list_(pa.int32()))
        rows = rows.append_column(f"{side}_types", types)
        rows = rows.append_column(f"{side}_fallback", pa.array([s.fallback for s in sides], pa.bool_()))
        rows = rows.append_column(f"{side}_prompt_tokens", pa.array([s.n_prompt for s in sides], pa.int32()))
        rows = rows.append_column(f"{side}_truncated", pa.array([s.truncated for s in sides], pa.bool_()))
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
        facts = (rows[f"{side}_{name}"].to_pylist() for name in ("fallback", "prompt_tokens", "truncated"))
        types = [None if t is None else np.array(t, dtype=np.int64) for t in rows[f"{side}_types"].to_pylist()]
        own = zip((i.astype(np.int64) for i in ids), token, end, *facts, types, strict=True)
        sides.append([Side(*values) for values in own])
    return [PairTokens(*row) for row in zip(rows["pair_id"].to_pylist(), *sides, strict=True)]


def token_count(rows: pa.Table) -> int:
    """Tokens of both sides of all rows; 0 for rows that are not tokenised."""
    columns = [f"{side}_ids" for side in SIDES if f"{side}_ids" in rows.column_names]
    return sum(pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in columns)


class TokenisePairs:
    """Batch function: pairs -> the same rows, tokenised for the model in `reward`, whose weights are not read; one that
    cannot be put to it has the reason in the column `refused`."""

    def __init__(self, reward: Path, reading: Reading = AS_IT_COMES) -> None:
        from safer_ray.reward.checkpoints import (
            load_pair_tokenizer,  # here, since other readers of this module need no torch
        )

        self.tokenise = load_pair_tokenizer(reward, reading)

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = self.tokenise.read(rows.select(["pair_id", *TEXTS]).to_pylist()) if len(rows) else []
        bad = {i: tokens for i, tokens in enumerate(found) if isinstance(tokens, str)}
        good = [i for i in range(len(rows)) if i not in bad]
        made = with_tokens(rows.take(pa.array(good, pa.int64())), [t for t in found if not isinstance(t, str)])
        return pa.concat_tables([made, refuse(rows, bad)], promote_options="default") if bad else made
