"""Sparse codes as flat arrays: every later stage is arithmetic on these."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from safer_ray.config.sections import Mode
from safer_ray.errors import UserError


class SideCodes(NamedTuple):
    """One side's codes over `n_rows` pairs. An *entry* is a token with codes, an *activation* one firing in it."""

    n_rows: int
    entry_row: np.ndarray  # int64 [entries], the pair of each entry
    token: np.ndarray  # int32 [entries]
    end: np.ndarray  # int32 [entries]
    entry: np.ndarray  # int64 [activations], the entry of each activation
    feature: np.ndarray  # int32 [activations]
    value: np.ndarray  # float64 [activations], > 0

    @property
    def row(self) -> np.ndarray:
        """The pair of each activation."""
        return self.entry_row[self.entry]

    @property
    def ends_per_row(self) -> np.ndarray:
        return np.bincount(self.entry_row, minlength=self.n_rows)


def _list(column: pa.ChunkedArray, name: str) -> pa.ListArray:
    array = column.combine_chunks()
    if array.null_count:
        raise UserError(f"codes: {name} has {array.null_count} null rows; write an empty list where nothing fires")
    return array


def _lengths(array: pa.ListArray) -> np.ndarray:
    return np.diff(array.offsets.to_numpy())


def flatten(codes: pa.Table, side: str, mode: Mode) -> SideCodes:
    """The entries that `mode` counts: in `paper` prompt and response ends, in `response` the response's ends, or its
    last token where it has none.

    Raises:
        UserError: a column is missing, or token, features and values disagree in length.
    """
    wanted = [f"{side}_{name}" for name in ("token", "end", "features", "values")]
    missing = [name for name in wanted if name not in codes.column_names]
    if missing:
        raise UserError(f"codes: no column {missing[0]!r}; pass the directory of stage `codes`")
    tokens, ends, features, values = (_list(codes[name], name) for name in wanted)
    per_row, per_entry = _lengths(tokens), _lengths(features.flatten())
    same = np.array_equal(per_row, _lengths(features)) and np.array_equal(per_row, _lengths(ends))
    if not same or not np.array_equal(per_entry, _lengths(values.flatten())):
        raise UserError(f"codes: {side} tokens, ends, features and values differ in length; rebuild stage `codes`")
    entry_row = np.repeat(np.arange(len(codes)), per_row)
    token = tokens.flatten().to_numpy()
    keep = ~_is_fallback(codes, side, per_row) if mode == "paper" else token >= _prompt_lengths(codes, side)[entry_row]
    entry = np.repeat(np.arange(len(token)), per_entry)
    kept = keep[entry]
    renumbered = np.cumsum(keep) - 1
    return SideCodes(
        len(codes),
        entry_row[keep],
        token[keep],
        ends.flatten().to_numpy()[keep],
        renumbered[entry[kept]],
        features.flatten().flatten().to_numpy()[kept],
        values.flatten().flatten().to_numpy()[kept].astype(np.float64),
    )


def _is_fallback(codes: pa.Table, side: str, per_row: np.ndarray) -> np.ndarray:
    """Per entry: whether it is the last token of a response without a sentence end."""
    mask = np.zeros(int(per_row.sum()), dtype=bool)
    name = f"{side}_fallback"
    if name in codes.column_names:
        rows = codes[name].fill_null(False).to_numpy() & (per_row > 0)
        mask[np.cumsum(per_row)[rows] - 1] = True
    return mask


def _prompt_lengths(codes: pa.Table, side: str) -> np.ndarray:
    name = f"{side}_prompt_tokens"
    if name not in codes.column_names or codes[name].null_count:
        raise UserError(
            f"codes: `{name}` is missing or null, without which nobody knows where a response begins; "
            "rebuild stage `codes`, or use mode `paper`, which counts prompts too"
        )
    return codes[name].to_numpy()


def latent_count(codes: pa.Table) -> int:
    """One more than the largest feature id that fires: what sums of these codes need, not the width of the SAE."""
    largest = -1
    for side in ("chosen", "rejected"):
        features = _list(codes[f"{side}_features"], f"{side}_features").flatten().flatten()
        if len(features):
            largest = max(largest, int(features.to_numpy().max()))
    return largest + 1


def contrasts(codes: pa.Table, latents: int, mode: Mode = "response") -> sp.csr_matrix:
    """Return, of each pair and feature, the mean activation over the chosen side's entries minus that over the
    rejected's."""
    total = sp.csr_matrix((len(codes), latents))
    for sign, side in ((1.0, "chosen"), (-1.0, "rejected")):
        flat = flatten(codes, side, mode)
        value = sign * flat.value / np.maximum(flat.ends_per_row[flat.row], 1)
        total = total + sp.csr_matrix((value, (flat.row, flat.feature)), shape=(len(codes), latents))
    return total.tocsr()


def matrix_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length, float64 [n, width]."""
    values = column.combine_chunks().flatten().to_numpy()
    return values.reshape(-1, column.type.list_size).astype(np.float64)
