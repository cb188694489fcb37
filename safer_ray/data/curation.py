"""Which pairs to drop, relabel or (as a red-team exercise) poison. A strategy says how suspicious a pair is."""

import logging

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import Action, CurateConfig, StrategyName
from safer_ray.errors import UserError
from safer_ray.schema import DECISIONS, rows_of
from safer_ray.strategies import STRATEGIES, StrategyInput

log = logging.getLogger(__name__)
CLEAN = "clean"  # the pairs as they are, and the model trained on them
USED = "used"  # the finished model that a run does not train
WITHOUT_NOISE = "without_noise"  # the pairs before errors were planted in them
JOINED = ("score", "reward_margin", "suspicion")  # what strategies know of a pair's scores


def share_count(n: int, percent: float) -> int:
    """floor(n percent / 100), safe against the rounding of percent."""
    return int(np.floor(n * percent / 100 + 1e-9))


def join_scores(pairs: pa.Table, scores: pa.Table) -> pa.Table:
    """Pairs with JOINED of their scores by `pair_id`, in the pairs' order.

    Raises:
        UserError: a pair has no score, or scores name a pair twice.
    """
    if len(set(scores["pair_id"].to_pylist())) != len(scores):
        raise UserError("curate: scores name a pair_id twice; score the deduplicated pairs")
    taken, missing = rows_of(scores, pairs["pair_id"].to_pylist())
    if missing:
        raise UserError(f"curate: {len(missing)} pairs have no score, the first is {missing[0]!r}; score all of them")
    for name in JOINED:
        pairs = pairs.append_column(name, taken[name])
    return pairs


def have_scores(pairs: pa.Table, scores: pa.Table, share: float) -> np.ndarray:
    """Which pairs have a score: a model may have quarantined some.

    Raises:
        UserError: more than this share has none.
    """
    ids = pairs["pair_id"].to_pylist()
    known = set(scores["pair_id"].to_pylist())
    mask = np.array([key in known for key in ids], dtype=bool)
    missing = len(ids) - int(mask.sum())
    if missing > share * len(ids):
        first = ids[int(mask.argmin())]
        raise UserError(f"curate: {missing} pairs have no score, the first is {first!r}; score all of them")
    if missing:
        log.warning("%d of %d pairs have no score: they are kept as they are", missing, len(ids))
    return mask


def keep_others(pairs: pa.Table, decisions: pa.Table, config: CurateConfig) -> pa.Table:
    """The decisions of all pairs, in their order: those that none was made of are kept."""
    _, missing = rows_of(decisions, pairs["pair_id"].to_pylist())
    if not missing:
        return decisions
    kept, _ = rows_of(pairs, missing)
    fixed = {"strategy": config.strategy, "eligible": False, "decision": "keep", "red_team": config.action == "poison"}
    rows = [fixed | row for row in kept.select(["pair_id", "row_key"]).to_pylist()]
    both = pa.concat_tables([decisions, pa.Table.from_pylist(rows, schema=DECISIONS)])
    return rows_of(both, pairs["pair_id"].to_pylist())[0]


def decide(
    joined: pa.Table, eligible: np.ndarray, *, strategy: StrategyName, action: Action, percent: float, seed: int
) -> pa.Table:
    """DECISIONS of all pairs: floor(n percent / 100) of the n eligible ones change, ties by pair_id.

    `drop` and `relabel` take the most suspicious, `poison` flips the least.
    """
    suspicion = STRATEGIES[strategy](StrategyInput(joined, seed))
    ids = np.array(joined["pair_id"].to_pylist(), dtype=object)
    where = np.flatnonzero(eligible)
    count = share_count(len(where), percent)
    keys = suspicion[where] if action == "poison" else -suspicion[where]
    taken = where[np.lexsort((ids[where].astype(str), keys))[:count]]
    decision = np.full(len(ids), "keep", dtype=object)
    decision[taken] = "drop" if action == "drop" else "flip"
    return pa.table(
        {
            "pair_id": joined["pair_id"],
            "row_key": joined["row_key"],
            "strategy": [strategy] * len(ids),
            "value": 0.0 - suspicion,
            "eligible": eligible,
            "decision": decision,
            "red_team": [action == "poison"] * len(ids),
        },
        schema=DECISIONS,
    )


def apply_decisions(pairs: pa.Table, decisions: pa.Table) -> pa.Table:
    """Trainable pairs: dropped ones absent, flipped ones with their responses swapped."""
    decision = dict(zip(decisions["pair_id"].to_pylist(), decisions["decision"].to_pylist(), strict=True))
    taken = np.array([decision[key] for key in pairs["pair_id"].to_pylist()], dtype=object)
    flipped = swap_sides(pairs, taken == "flip")
    return flipped.filter(pa.array(taken != "drop"))


def swap_sides(pairs: pa.Table, mask: np.ndarray) -> pa.Table:
    """The table with chosen and rejected exchanged, and the label margin negated, where `mask` is true."""
    index = np.where(mask, np.arange(len(pairs)) + len(pairs), np.arange(len(pairs)))
    columns = {name: pairs[name] for name in pairs.column_names}
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        both = pa.concat_arrays([pairs[name].combine_chunks(), pairs[other].combine_chunks()])
        columns[name] = both.take(pa.array(index))
    if "label_margin" in columns:
        margin = pairs["label_margin"].to_pylist()
        signed = [None if m is None else -m if s else m for m, s in zip(margin, mask, strict=True)]
        columns["label_margin"] = pa.array(signed, pa.float32())
    return pa.table(columns, schema=pairs.schema)
