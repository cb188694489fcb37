"""Which features tell chosen from rejected: sums per fragment, reduced in order, contrasted (SAFER, section 3.2)."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import Mode
from safer_ray.features.codes import flatten, latent_count
from safer_ray.schema import SALIENCE

ENDS = -1  # the row of SUMS whose n_chosen and n_rejected count the sides' entries
SUMS = pa.schema([field for field in SALIENCE if field.name != "salience"])


class Sums(NamedTuple):
    """Over a corpus or a part of it; arrays are [latents]."""

    chosen: np.ndarray
    rejected: np.ndarray
    n_chosen: np.ndarray  # entries on which a feature fires
    n_rejected: np.ndarray
    ends_chosen: int
    ends_rejected: int


class SumFeatures:
    """Batch function: codes -> sums by feature, only of features that fire, after a row `ENDS`."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    def __call__(self, codes: pa.Table) -> pa.Table:
        chosen, rejected = (flatten(codes, side, self.mode) for side in ("chosen", "rejected"))
        latents = latent_count(codes)
        sums = [np.bincount(s.feature, weights=s.value, minlength=latents) for s in (chosen, rejected)]
        counts = [np.bincount(s.feature, minlength=latents) for s in (chosen, rejected)]
        # Few features fire in a fragment, so its sums stay small however many latents there are.
        fired = np.flatnonzero(counts[0] + counts[1])
        return pa.table(
            {
                "feature": np.concatenate([[ENDS], fired]).astype(np.int32),
                "chosen_sum": np.concatenate([[0.0], sums[0][fired]]),
                "rejected_sum": np.concatenate([[0.0], sums[1][fired]]),
                "n_chosen": np.concatenate([[len(chosen.token)], counts[0][fired]]).astype(np.int64),
                "n_rejected": np.concatenate([[len(rejected.token)], counts[1][fired]]).astype(np.int64),
            },
            schema=SUMS,
        )


def reduce_sums(parts: Iterable[pa.Table], latents: int) -> Sums:
    """Add parts in the order given, in float64, so the result does not depend on who computed them."""
    chosen, rejected = np.zeros(latents), np.zeros(latents)
    n_chosen, n_rejected = np.zeros(latents, dtype=np.int64), np.zeros(latents, dtype=np.int64)
    ends = np.zeros(2, dtype=np.int64)
    for part in parts:
        feature = part["feature"].to_numpy()
        fired = feature != ENDS
        ends += [part["n_chosen"].to_numpy()[~fired].sum(), part["n_rejected"].to_numpy()[~fired].sum()]
        columns = ("chosen_sum", "rejected_sum", "n_chosen", "n_rejected")
        # add.at, since a fragment may name a feature twice (parts joined); plain indexing would keep the last.
        for total, name in zip((chosen, rejected, n_chosen, n_rejected), columns, strict=True):
            np.add.at(total, feature[fired], part[name].to_numpy()[fired])
    return Sums(chosen, rejected, n_chosen, n_rejected, int(ends[0]), int(ends[1]))


def salience(sums: Sums, mode: Mode) -> np.ndarray:
    """s_i = (C_i - R_i) / (C_i + R_i + 2 mu) in [-1, 1], mu the mean of all 2 L values C and R.

    > 0: fires more on chosen responses. In `response` mode C and R are means over their side's entries.
    """
    chosen, rejected = sums.chosen, sums.rejected
    if mode == "response":
        # The longer side has more sentence ends: as sums, every feature would lean towards whichever side is longer.
        chosen, rejected = chosen / max(1, sums.ends_chosen), rejected / max(1, sums.ends_rejected)
    # The smoothing of SAFER's contrast: without it a feature that fired once, on one side, would have the largest |s|.
    mu = (chosen.sum() + rejected.sum()) / (2 * max(1, len(chosen)))
    denominator = chosen + rejected + 2 * mu
    return np.divide(chosen - rejected, denominator, out=np.zeros(len(chosen)), where=denominator > 0)


def salience_table(sums: Sums, mode: Mode) -> pa.Table:
    """One row a feature, by falling |salience|, then by id."""
    values = salience(sums, mode)
    # By id where values are equal, so that a run selects the same features on any machine.
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))
    return pa.table(
        {
            "feature": order.astype(np.int32),
            "salience": values[order],
            "chosen_sum": sums.chosen[order],
            "rejected_sum": sums.rejected[order],
            "n_chosen": sums.n_chosen[order],
            "n_rejected": sums.n_rejected[order],
        },
        schema=SALIENCE,
    )


def candidates(table: pa.Table, count: int) -> list[int]:
    """The features of largest |salience|; ties go to the lower id, zero never."""
    feature, values = table["feature"].to_numpy(), table["salience"].to_numpy()
    order = np.lexsort((feature, -np.abs(values)))[:count]
    return [int(feature[i]) for i in order if values[i] != 0]


def select(
    table: pa.Table, ratings: dict[int, int | None], *, count: int, rating: int, limit: int
) -> dict[str, list[int]]:
    """F+ and F- : of the candidates with this rating or a better one the first `limit` by |salience|, split by its
    sign.

    An unrated feature is never selected.
    """
    values = dict(zip(table["feature"].to_pylist(), table["salience"].to_pylist(), strict=True))
    judged = candidates(table, count)
    # In the order of |salience|, so the limit leaves out the least telling.
    chosen = [feature for feature in judged if (ratings.get(feature) or 0) >= rating][:limit]
    return {
        "candidates": judged,
        "safe": [feature for feature in chosen if values[feature] > 0],
        "unsafe": [feature for feature in chosen if values[feature] < 0],
    }
