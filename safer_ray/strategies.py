"""Curation strategies: each says how suspicious a pair is. High: the label looks wrong; as detectors have it.

A strategy is one function under `@strategy`, named as configs name it. `drop` and `relabel` take the most suspicious
pairs, `poison` the least; a table of decisions keeps the negative (`value`; low: suspicious).
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.errors import UserError


class StrategyInput(NamedTuple):
    """Pairs joined with their scores, one row a pair: pair_id, row_key, chosen, rejected, score, reward_margin and
    suspicion."""

    table: pa.Table
    seed: int


Strategy = Callable[[StrategyInput], np.ndarray]
STRATEGIES: dict[str, Strategy] = {}


def strategy(function: Strategy) -> Strategy:
    """Make a strategy known by its function's name; it gives float64 [n], high: suspicious."""
    STRATEGIES[function.__name__] = function
    return function


def random_order(ids: list[str], salt: str) -> np.ndarray:
    """A number in [0, 1) for each id, by a hash of salt and id."""
    digests = [int(hashlib.sha256(f"{salt}:{i}".encode()).hexdigest()[:13], 16) for i in ids]
    return np.array(digests, dtype=np.float64) / 16**13


def characters(column: pa.ChunkedArray) -> np.ndarray:
    """Return the number of characters of each list of messages; float64 [n]."""
    return np.array([sum(len(m["content"]) for m in messages) for messages in column.to_pylist()], dtype=np.float64)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    values = table[name].to_numpy().astype(np.float64)
    missing = int((~np.isfinite(values)).sum())
    if missing:
        raise UserError(f"curate: {missing} pairs have no {name}; score them first, or pick another strategy")
    return values


@strategy
def safer(given: StrategyInput) -> np.ndarray:
    """The SAFER score, negated."""
    return -_numbers(given.table, "score")


@strategy
def reward_margin(given: StrategyInput) -> np.ndarray:
    """r_rejected - r_chosen: the model disagrees with the label where it is high."""
    return -_numbers(given.table, "reward_margin")


@strategy
def random(given: StrategyInput) -> np.ndarray:
    """Uniform in (-1, 0] independent of the pairs' order."""
    return -random_order(given.table["pair_id"].to_pylist(), f"random:{given.seed}")


@strategy
def length(given: StrategyInput) -> np.ndarray:
    """Characters of rejected minus chosen: the longer answer is presumed the better one."""
    sides = [characters(given.table[side]) for side in ("rejected", "chosen")]
    return sides[0] - sides[1]


@strategy
def label_margin(given: StrategyInput) -> np.ndarray:
    """Return by how much the own numbers of rows prefer the rejected response; 0 where there are none."""
    margins = given.table["label_margin"].to_numpy().astype(np.float64)
    if not np.isfinite(margins).any():
        raise UserError(
            "curate: no pair has a label_margin, which its own scores or ratings give; pick another strategy"
        )
    return np.where(np.isfinite(margins), -margins, 0.0)


@strategy
def suspicion(given: StrategyInput) -> np.ndarray:
    """Whatever the scores were told to suspect pairs by: `scores.detector`."""
    return _numbers(given.table, "suspicion")
