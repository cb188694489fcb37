"""A row's JSON text as a mapping, or why it is none."""

import json
import math
from typing import Any

from safer_ray import schema
from safer_ray.formats.declaration import Refused

MAX_DEPTH = 200  # of lists and mappings in each other


def _finite(text: str) -> float | None:
    """A number, null where it is too large for one, as infinities are: no JSON can hold it again."""
    return number if math.isfinite(number := float(text)) else None


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def parse_row(raw: str) -> dict[str, Any]:
    """A row's JSON text as a mapping; NaN and infinities become null.

    Raises:
        Refused: it is none, or it is nested deeper than `MAX_DEPTH`, which any process can read and write, however deep
            in calls it is itself.
    """
    try:
        row = _DECODER.decode(raw)
        if raw.count("[") + raw.count("{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
            raise RecursionError
        if "\\u" in raw:
            schema.to_json(row).encode()
    except UnicodeEncodeError:
        raise Refused("bad UTF-8: a lone surrogate is escaped in the text") from None
    except RecursionError:
        raise Refused(f"nested too deep: more than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Refused(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Refused(f"wrong type: the row is {type(row).__name__}, wanted a mapping of columns")
    return row


def _depth(value: Any) -> int:
    """Return how many lists and mappings lie in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
