"""Small row filters: `section == safety and labels.kind != benign`."""

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa

COLUMNS = ("pair_id", "source", "section", "group")
_CONDITION = re.compile(r"^\s*([\w.]+)\s*(==|!=)\s*(?:\"([^\"]*)\"|'([^']*)'|(\S+))\s*$")


class Condition(NamedTuple):
    column: str
    negated: bool
    value: str


def parse_where(text: str | None) -> tuple[Condition, ...]:
    """Conditions joined by `and`: `column == value` or `column != value`, column one of `COLUMNS` or `labels.KEY`.

    Raises:
        ValueError: the text does not parse or names an unknown column.
    """
    conditions = []
    for part in re.split(r"\s+and\s+", text.strip()) if text and text.strip() else []:
        match = _CONDITION.match(part)
        if match is None:
            raise ValueError(f"cannot read the condition {part!r}; write it as `section == safety`")
        column = match.group(1)
        if column not in COLUMNS and not column.startswith("labels."):
            raise ValueError(f"unknown column {column!r}; choose one of {', '.join(COLUMNS)} or labels.KEY")
        value = next(group for group in match.groups()[2:] if group is not None)
        conditions.append(Condition(column, match.group(2) == "!=", value))
    return tuple(conditions)


def where_mask(pairs: pa.Table, text: str | None) -> np.ndarray:
    """True for the rows of a pairs table that meet every condition; a null value equals nothing."""
    mask = np.ones(len(pairs), dtype=bool)
    for condition in parse_where(text):
        if condition.column.startswith("labels."):
            key = condition.column.removeprefix("labels.")
            values = [dict(row or ()).get(key) for row in pairs["labels"].to_pylist()]
        else:
            values = pairs[condition.column].to_pylist()
        mask &= np.array([(value == condition.value) != condition.negated for value in values], dtype=bool)
    return mask
