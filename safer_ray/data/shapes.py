"""Tables that are no rows, and columns that have almost the names of a known layout, by the first rows of a file."""

from collections.abc import Sequence
from typing import Any

from safer_ray.formats.registry import row_format

_PANDAS = "write it anew by DataFrame.to_json(FILE, orient='records', lines=True)"


def shape_of(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return what the readable rows at the head of a file are instead of rows, and the remedy; None where they may be
    some: one value that holds all of a table, or columns that differ from known ones in capitals or blanks alone."""
    if len(rows) == 1 and (whole := _table_in(rows[0])):
        return whole
    for row in rows:
        names = {name: name.strip().lower() for name in row}
        odd = sorted(name for name, plain in names.items() if name != plain)
        if not odd or len(set(names.values())) < len(names):
            continue
        meant = row_format({names[name]: value for name, value in row.items()})
        if meant is not None and meant != row_format(row):
            told = ", ".join(f"{name!r} to {names[name]!r}" for name in odd)
            return (
                f"its columns would be those of format {meant} but for capitals or blanks in their names, which count; "
                f"rename {told}"
            )
    return None


def _table_in(row: dict[str, Any]) -> str | None:
    """Return how one value holds all rows of a table."""
    if row.keys() >= {"columns", "data"} and isinstance(row["columns"], list) and isinstance(row["data"], list):
        return f"it holds a table as pandas splits it (columns, data), and not rows; {_PANDAS}"
    values = list(row.values())
    if len(values) > 1 and all(isinstance(value, dict) and value and "0" in value for value in values):
        return f"it holds a table by its columns, as pandas writes it, and not rows; {_PANDAS}"
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) == len(values) > 1 and all(isinstance(item, str) for items in lists for item in items):
        return "it holds one list a column, and not rows; write an object a row"
    if row_format(row) is not None:
        return None
    if values and all(isinstance(value, dict) and row_format(value) is not None for value in values):
        return "it holds rows under their numbers or names, and not rows; write the values alone as an array"
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and row_format(value[0]) is not None:
            return f"its rows lie in a list under {name!r}; write that array alone into a file that ends in .json"
    return None
