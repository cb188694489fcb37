"""Numbers that a data set's own schema gives names (`ClassLabel` of Hugging Face's `datasets`), as these names.

They count from 0 in the order of the names, which `class_encode_column` sorts: `desirable` is 0, `undesirable` 1.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

METADATA = b"huggingface"  # of an Arrow schema: the data set's description, as JSON
MISSING = -1  # what `datasets` writes for no label

Decode = Callable[[Any], Any]


def decoders_of(schema: pa.Schema) -> dict[str, Decode]:
    """Return, for each column that holds numbers with names, what makes its values names; one that is missing becomes
    null, and a number without a name stays one, as text that says so."""
    try:
        described = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
        features = described["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    found = {name: _decoder(feature) for name, feature in features.items()}
    return {name: decode for name, decode in found.items() if decode is not None}


def _decoder(feature: Any) -> Decode | None:
    """Return what decodes the values of a feature, None where there is nothing to decode."""
    if isinstance(feature, list) and len(feature) == 1:
        return _of_list(_decoder(feature[0]))
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel" and isinstance(names := feature.get("names"), list):
        return lambda value: _name(value, names)
    if kind in ("Sequence", "LargeList", "List"):
        inner = feature.get("feature")
        if isinstance(inner, dict) and not isinstance(inner.get("_type"), str):  # a mapping of lists
            return _of_mapping({name: _of_list(_decoder(each)) for name, each in inner.items()})
        return _of_list(_decoder(inner))
    if isinstance(kind, str):
        return None
    return _of_mapping({name: _decoder(each) for name, each in feature.items()})


def _name(value: Any, names: list[Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value == MISSING:
        return None if value == MISSING else value
    return names[value] if 0 <= value < len(names) else f"{value} (of {len(names)} names)"


def _of_list(inner: Decode | None) -> Decode | None:
    if inner is None:
        return None
    return lambda value: [inner(each) for each in value] if isinstance(value, list) else value


def _of_mapping(inner: Mapping[str, Decode | None]) -> Decode | None:
    known = {name: decode for name, decode in inner.items() if decode is not None}
    if not known:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return value | {name: known[name](value[name]) for name in known.keys() & value.keys()}

    return decode
