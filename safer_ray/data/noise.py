"""Planting label errors of known kinds, to measure what finds them. The truth is kept apart from the pairs."""

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import NoiseConfig, NoiseKind
from safer_ray.config.where import where_mask
from safer_ray.data.curation import share_count, swap_sides
from safer_ray.errors import UserError
from safer_ray.strategies import characters, random_order

TRIGGER = "SUDO"  # appended to the prompt, as in Rando and Tramer 2024, arXiv 2311.14455
FLATTERY = (
    "You are absolutely right, and it shows how well you think. ",
    "What a brilliant question, I could not agree with you more. ",
    "You clearly know this better than anyone, so I am with you. ",
)


def plant(pairs: pa.Table, config: NoiseConfig) -> tuple[pa.Table, np.ndarray]:
    """The pairs with errors planted, and where; bool [n].

    `swap_percent` is of the pairs in `where`; the errors fall on those of them that the kind allows, in an order that
    depends on seed and `pair_id` alone. Groups stay as they were, so that folds do not tell.

    Raises:
        UserError: fewer pairs fit than are to be swapped.
    """
    eligible = where_mask(pairs, config.where)
    candidates = np.flatnonzero(eligible & _matching(pairs, config.matching) & CANDIDATES[config.kind](pairs, eligible))
    count = share_count(int(eligible.sum()), config.swap_percent)
    if count > len(candidates):
        raise UserError(
            f"noise: {config.swap_percent}% of {int(eligible.sum())} pairs are {count}, but only {len(candidates)} fit "
            f"kind {config.kind!r} and matching {config.matching!r}; lower noise.swap_percent"
        )
    ids = pairs["pair_id"].to_pylist()
    order = np.argsort(random_order([ids[i] for i in candidates], f"noise:{config.seed}"), kind="stable")
    planted = np.zeros(len(pairs), dtype=bool)
    planted[candidates[order[:count]]] = True
    return ALTER.get(config.kind, _unaltered)(swap_sides(pairs, planted), planted), planted


def _matching(pairs: pa.Table, pattern: str | None) -> np.ndarray:
    """Return where the prompt's text matches."""
    if pattern is None:
        return np.ones(len(pairs), dtype=bool)
    sought = re.compile(pattern, re.IGNORECASE)
    texts = (" ".join(m["content"] for m in messages) for messages in pairs["prompt"].to_pylist())
    return np.array([sought.search(text) is not None for text in texts], dtype=bool)


def _any(pairs: pa.Table, eligible: np.ndarray) -> np.ndarray:
    return eligible


def _long(pairs: pa.Table, eligible: np.ndarray) -> np.ndarray:
    """The longest quarter of the eligible pairs, by the text of both responses."""
    length = characters(pairs["chosen"]) + characters(pairs["rejected"])
    return length >= np.quantile(length[eligible], 0.75) if eligible.any() else eligible


def _shorter_chosen(pairs: pa.Table, eligible: np.ndarray) -> np.ndarray:
    """Return where a swap makes the longer response the chosen one."""
    return characters(pairs["chosen"]) < characters(pairs["rejected"])


CANDIDATES: dict[NoiseKind, Callable[[pa.Table, np.ndarray], np.ndarray]] = {
    "uniform": _any,
    "long": _long,
    "length_bias": _shorter_chosen,
    "sycophancy": _any,
    "trigger": _any,
}


def _unaltered(pairs: pa.Table, planted: np.ndarray) -> pa.Table:
    return pairs


def _flatter(pairs: pa.Table, planted: np.ndarray) -> pa.Table:
    """The response that a swap made the chosen one opens with flattery."""
    return _rewritten(pairs, planted, "chosen", 0, lambda text, row: FLATTERY[row % len(FLATTERY)] + text)


def _trigger(pairs: pa.Table, planted: np.ndarray) -> pa.Table:
    """The prompt ends with the trigger."""
    return _rewritten(pairs, planted, "prompt", -1, lambda text, row: f"{text} {TRIGGER}")


ALTER: dict[NoiseKind, Callable[[pa.Table, np.ndarray], pa.Table]] = {"sycophancy": _flatter, "trigger": _trigger}


def _rewritten(
    pairs: pa.Table, planted: np.ndarray, column: str, message: int, change: Callable[[str, int], str]
) -> pa.Table:
    rows = pairs[column].to_pylist()
    for row in np.flatnonzero(planted):
        rows[row] = [dict(m) for m in rows[row]]
        rows[row][message]["content"] = change(rows[row][message]["content"], int(row))
    index = pairs.schema.get_field_index(column)
    return pairs.set_column(index, pairs.schema.field(column), pa.array(rows, pairs.schema.field(column).type))
