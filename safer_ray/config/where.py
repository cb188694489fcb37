"""Small row filters: `section == safety and labels.kind != benign and label_margin < 0`."""

import logging
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

log = logging.getLogger(__name__)
COLUMNS = ("pair_id", "source", "section", "group")
NUMBERS = ("label_margin",)
ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_CONDITION = re.compile(r"^\s*([\w.]+)\s*(==|!=|<=|>=|<|>)\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))\s*$")

_AND = re.compile(r"(?<!\s)\s+and\s+")  # from the first of its spaces on, or each of them would be tried in turn


class Condition(NamedTuple):
    column: str
    operator: str  # ==, != or one of `ORDERS`
    value: str | float


def parse_where(text: str | None) -> tuple[Condition, ...]:
    """Return conditions joined by `and`: `column == value` or `column != value`, column one of `COLUMNS` or
    `labels.KEY`, or a number, one of `NUMBERS`, also by `<`, `<=`, `>`, `>=`.

    Raises:
        ValueError: the text is empty, does not parse or names an unknown column.
    """
    conditions = []
    if text is not None and not text.strip():
        raise ValueError("the condition is empty, say of a variable that is not set; leave it out to take all rows")
    for part in _AND.split(text.strip()) if text is not None else []:
        match = _CONDITION.match(part)
        if match is None:
            raise ValueError(f"cannot read the condition {part!r}; write it as `section == safety`")
        column = match.group(1)
        if column not in (*COLUMNS, *NUMBERS) and not column.startswith("labels."):
            known = ", ".join((*COLUMNS, *NUMBERS))
            raise ValueError(f"unknown column {column!r}; choose one of {known} or labels.KEY")
        value = next(group for group in match.groups()[2:] if group is not None)
        conditions.append(Condition(column, match.group(2), _number(value) if column in NUMBERS else value))
        if match.group(2) in ORDERS and column not in NUMBERS:
            raise ValueError(f"{column} is text, which {match.group(2)} does not order; use == or !=")
    return tuple(conditions)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def meets(row: Mapping[str, Any], conditions: Sequence[Condition]) -> bool:
    """Return whether a row of a pairs table meets every condition; a null equals nothing, and is in no order."""
    labels = dict(row.get("labels") or ())
    for column, compared, value in conditions:
        found = labels.get(column.removeprefix("labels.")) if column.startswith("labels.") else row.get(column)
        if compared in ORDERS:
            if found is None or not ORDERS[compared](found, value):
                return False
        elif (found == value) == (compared == "!="):
            return False
    return True


def where_mask(pairs: pa.Table, text: str | None) -> np.ndarray:
    """True for the rows of a pairs table that meet every condition."""
    conditions = parse_where(text)
    columns = sorted({"labels" if c.column.startswith("labels.") else c.column for c in conditions})
    if not columns:
        return np.ones(len(pairs), dtype=bool)
    mask = np.array([meets(row, conditions) for row in pairs.select(columns).to_pylist()], dtype=bool)
    if len(pairs) and not mask.any():
        log.warning("none of %d pairs meets `%s`", len(pairs), text)
    return mask
