"""Pair scores from sparse codes, how suspicious they make a pair, and the features that made it so."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import Mode
from safer_ray.errors import UserError
from safer_ray.features.codes import SideCodes, flatten
from safer_ray.schema import REASON, SCORES, TRUNCATED

KIND = "safer_ray.scores"  # in the metadata of scores: whether the models that made them had seen the pairs
IN_SAMPLE = "in sample"
OUT_OF_FOLD = "out of fold"
BY_BUNDLE = "by a bundle"  # whoever audits knows whether it has seen the pairs


class Features(NamedTuple):
    """The selection that scores pairs: F+ fires on safe, F- on unsafe responses."""

    safe: Sequence[int]
    unsafe: Sequence[int]
    mode: Mode

    def signs(self, latents: int) -> np.ndarray:
        """+1 on F+, -1 on F-, else 0; [latents]."""
        signs = np.zeros(latents)
        for sign, ids in ((1.0, self.safe), (-1.0, self.unsafe)):
            # A feature past the table's width fires nowhere in it; `check_width` finds those of another SAE.
            signs[[i for i in ids if i < latents]] = sign
        return signs


def parse_features(tree: object, mode: Mode | None = None) -> Features:
    """From the contents of features.json; `mode` overrides the one it names, which defaults to `response`.

    Raises:
        UserError: not such a file, or one that selects nothing.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("safe"), list) or not isinstance(tree.get("unsafe"), list):
        raise UserError('features: wanted {"safe": [ids], "unsafe": [ids]}; pass the features.json of stage `select`')
    ids = [*tree["safe"], *tree["unsafe"]]
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) != len(ids):
        raise UserError("features: wanted distinct feature ids >= 0, at least one; run stage `select` again")
    chosen_mode = mode or tree.get("mode", "response")
    if chosen_mode not in ("paper", "response"):
        raise UserError(f"features: mode {chosen_mode!r} is neither 'paper' nor 'response'")
    return Features(tree["safe"], tree["unsafe"], chosen_mode)


def check_width(features: Features, latents: int, source: str) -> None:
    """Raises UserError where a selected feature lies past the SAE in `source`: it was selected on another one."""
    largest = max([*features.safe, *features.unsafe])
    if largest >= latents:
        raise UserError(
            f"features: {largest} is selected, but {source} has {latents} latents; select the features of this SAE"
        )


class Contributions(NamedTuple):
    """Signed activations of selected features, already divided by their side's number of entries."""

    row: np.ndarray
    feature: np.ndarray
    value: np.ndarray  # towards the pair's score: the rejected side's are negated
    side: np.ndarray  # 0 chosen, 1 rejected
    end: np.ndarray


def contributions(codes: pa.Table, features: Features) -> Contributions:
    """Return what every selected activation that the mode counts adds to the score of its pair."""
    sides = [flatten(codes, side, features.mode) for side in ("chosen", "rejected")]
    latents = 1 + max([*features.safe, *features.unsafe, *(int(s.feature.max(initial=0)) for s in sides)])
    signs = features.signs(latents)
    parts = [_side_contributions(s, signs, number) for number, s in enumerate(sides)]
    return Contributions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _side_contributions(side: SideCodes, signs: np.ndarray, number: int) -> Contributions:
    selected = np.flatnonzero(signs[side.feature])
    entry = side.entry[selected]
    row, feature = side.entry_row[entry], side.feature[selected]
    # Divided here, entry by entry, so that a pair's reasons sum to its score.
    value = signs[feature] * side.value[selected] / side.ends_per_row[row]
    return Contributions(
        row, feature, -value if number else value, np.full(len(row), number), side.end[entry].astype(np.int64)
    )


def pair_scores(codes: pa.Table, features: Features) -> np.ndarray:
    """S of each pair, float64 [n]: the mean over the chosen side's entries of (sum over F+ - sum over F-), minus the
    same on the rejected side. High: the pair teaches safety; low: suspicious. A side without entries counts 0.
    """
    parts = contributions(codes, features)
    return np.bincount(parts.row, weights=parts.value, minlength=len(codes))


def pair_reasons(codes: pa.Table, features: Features, limit: int) -> list[list[dict[str, object]]]:
    """Per pair the `limit` features of largest |contribution| to its score, with the sentence where each fires most."""
    reasons: list[list[dict[str, object]]] = [[] for _ in range(len(codes))]
    parts = contributions(codes, features)
    if limit == 0 or len(parts.row) == 0:
        return reasons
    # Rows together, in them features, in these the largest first: its sentence is the one that the reason names.
    order = np.lexsort((-np.abs(parts.value), parts.feature, parts.row))
    parts = Contributions(*(column[order] for column in parts))
    first = np.flatnonzero(np.r_[True, (np.diff(parts.row) != 0) | (np.diff(parts.feature) != 0)])
    total = np.add.reduceat(parts.value, first)
    row, feature = parts.row[first], parts.feature[first]
    safe = set(features.safe)
    for i in np.lexsort((feature, -np.abs(total), row)):
        if len(reasons[row[i]]) < limit:
            reasons[row[i]].append(
                {
                    "feature": int(feature[i]),
                    "sign": 1 if int(feature[i]) in safe else -1,
                    "contribution": float(total[i]),
                    "side": ("chosen", "rejected")[parts.side[first[i]]],
                    "end": int(parts.end[first[i]]),
                }
            )
    return reasons


def suspicion(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """1 - mid-rank ECDF of each score among the reference scores, in [0, 1]; 1 is worst."""
    reference = np.sort(reference)
    # Mid-ranks: a score that many reference pairs share (0, where nothing fires) is in the middle of them, not worst.
    below, upto = np.searchsorted(reference, scores, "left"), np.searchsorted(reference, scores, "right")
    return 1 - (below + upto) / (2 * max(1, len(reference)))


def suspect(values: np.ndarray, reference: np.ndarray, flag_quantile: float) -> dict[str, np.ndarray]:
    """The columns `suspicion`, `flag` and `decision` of pairs with these values; low ones are suspicious."""
    suspicions = suspicion(values, reference)
    flags = suspicions >= 1 - flag_quantile
    return {"suspicion": suspicions, "flag": flags, "decision": np.where(flags, "review", "keep")}


def with_columns(rows: pa.Table, columns: dict[str, np.ndarray]) -> pa.Table:
    """Return rows in which columns have other values, of the same types."""
    for name, values in columns.items():
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
    return rows


Value = Callable[[pa.Table, np.ndarray], np.ndarray]  # codes and their scores -> float64 [n], low: suspicious


class ScoreCodes:
    """Batch function: codes -> SCORES. Columns `row_key` and `extra` ride along where the codes table has them.

    A pair is suspected where its `value`, the score itself if none is given, is low among those of the reference.
    """

    def __init__(
        self, features: Features, reference: np.ndarray, flag_quantile: float, reasons: int, value: Value | None = None
    ) -> None:
        self.value = value
        self.features = features
        self.reference = reference
        self.flag_quantile = flag_quantile
        self.reasons = reasons

    def __call__(self, codes: pa.Table) -> pa.Table:
        scores = pair_scores(codes, self.features)
        values = self.value(codes, scores) if self.value else scores
        # NaN sorts above everything, so that such pairs would quietly count as the least suspicious of all.
        unknown = ~np.isfinite(values)
        if unknown.any():
            first = codes["pair_id"][int(unknown.argmax())].as_py()
            raise UserError(
                f"{int(unknown.sum())} pairs, the first is {first!r}, have nothing to be suspected by: their codes "
                "hold no rewards, or values that are not finite; pass --detector safer, or rebuild stage `codes`"
            )
        rewards = [_rewards(codes, side) for side in ("chosen", "rejected")]
        columns = {
            "pair_id": codes["pair_id"],
            "row_key": _column(codes, "row_key", pa.string()),
            "score": scores,
            "reward_chosen": pa.array(rewards[0], from_pandas=True),
            "reward_rejected": pa.array(rewards[1], from_pandas=True),
            "reward_margin": pa.array(rewards[0] - rewards[1], from_pandas=True),
            **{name: _column(codes, name, pa.bool_()) for name in TRUNCATED},
            **suspect(values, self.reference, self.flag_quantile),
            "reasons": pa.array(pair_reasons(codes, self.features, self.reasons), type=pa.list_(REASON)),
            "extra": _column(codes, "extra", pa.string()),
        }
        return pa.table(columns, schema=SCORES)


def margins(codes: pa.Table) -> np.ndarray:
    """r_chosen - r_rejected, float64 [n]; NaN where the codes hold no rewards."""
    chosen, rejected = (_rewards(codes, side).astype(np.float64) for side in ("chosen", "rejected"))
    return chosen - rejected


def _rewards(codes: pa.Table, side: str) -> np.ndarray:
    """float32 [n], NaN where the codes hold no reward."""
    return _column(codes, f"{side}_reward", pa.float32()).to_numpy().astype(np.float32)


def _column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    return table[name] if name in table.column_names else pa.chunked_array([pa.nulls(len(table), kind)])
