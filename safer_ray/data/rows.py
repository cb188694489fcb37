"""A row's JSON text as a mapping, or why it is none."""

from typing import Any

from safer_ray.formats.declaration import Refused, parsed_json


def parse_row(raw: str) -> dict[str, Any]:
    """Return a row's JSON text as a mapping; NaN and infinities become null.

    Raises:
        Refused: it is none, or as `parsed_json`.
    """
    row = parsed_json(raw)
    if not isinstance(row, dict):
        raise Refused(f"wrong type: the row is {type(row).__name__}, wanted a mapping of columns")
    return row
