"""Small row filters: `section == safety and labels.kind != benign`."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

log = logging.getLogger(__name__)
COLUMNS = ("pair_id", "source", "section", "group")
_CONDITION = re.compile(r"^\s*([\w.]+)\s*(==|!=)\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))\s*$")

_AND = re.compile(r"(?<!\s)\s+and\s+")  # from the first of its spaces on, or each of them would be tried in turn


class Condition(NamedTuple):
    column: str
    negated: bool
    value: str


def parse_where(text: str | None) -> tuple[Condition, ...]:
    """Conditions joined by `and`: `column == value` or `column != value`, column one of `COLUMNS` or `labels.KEY`.

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
        if column not in COLUMNS and not column.startswith("labels."):
            raise ValueError(f"unknown column {column!r}; choose one of {', '.join(COLUMNS)} or labels.KEY")
        value = next(group for group in match.groups()[2:] if group is not None)
        conditions.append(Condition(column, match.group(2) == "!=", value))
    return tuple(conditions)


def meets(row: Mapping[str, Any], conditions: Sequence[Condition]) -> bool:
    """Return whether a row of a pairs table meets every condition; a null value equals nothing."""
    labels = dict(row.get("labels") or ())
    for column, negated, value in conditions:
        found = labels.get(column.removeprefix("labels.")) if column.startswith("labels.") else row.get(column)
        if (found == value) == negated:
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
