"""Values of Arrow columns of every type as those that JSON can hold: none is lost, and none stops a row.

What Python has no value for (a day behind the year 9999, a nanosecond, a time zone that this machine does not know) is
the number that the file holds with its type, as text; bytes are text where they are UTF-8, else `{"base64": …}`.
Numbers that the file's own schema gives names are these names.
"""

import base64
import logging
from typing import Any

import pyarrow as pa
from pyarrow import types

from safer_ray.storage.class_labels import decoders_of

log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()  # files and columns


def plain_rows(batch: pa.RecordBatch, path: str) -> list[dict[str, Any]]:
    """Return the rows of a batch as mappings; a column in which a value had to be written as text is told once.

    Raises:
        UnicodeDecodeError: a text is no UTF-8.
    """
    columns = []
    decoders = decoders_of(batch.schema)
    for field, column in zip(batch.schema, batch.columns, strict=True):
        odd: list[pa.DataType] = []
        values = plain_values(column, odd)
        columns.append([*map(decoders[field.name], values)] if field.name in decoders else values)
        if odd and (path, field.name) not in _told:
            _told.add((path, field.name))
            log.warning("%s: column %s holds values of %s that are carried as text", path, field.name, odd[0])
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def plain_values(column: pa.Array | pa.ChunkedArray, odd: list[pa.DataType] | None = None) -> list[Any]:
    """Return the values of a column; `odd` gains the type of each that became text since Python has none for it.

    Raises:
        UnicodeDecodeError: a text is no UTF-8.
    """
    if _is_plain(column.type):
        found: list[Any] = column.to_pylist()
        return found
    odd = [] if odd is None else odd
    return [_plain(value, odd) for value in column]


def _is_plain(kind: pa.DataType) -> bool:
    """Return whether Python's own values of a type are exact, and known to JSON."""
    if types.is_struct(kind):
        names = [field.name for field in kind]
        return len(names) == len(set(names)) and all(_is_plain(field.type) for field in kind)
    if _is_list(kind):
        return _is_plain(kind.value_type)
    return bool(
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_null(kind)
        or types.is_string(kind)
        or types.is_large_string(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    tests = (
        types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _plain(value: pa.Scalar, odd: list[pa.DataType]) -> Any:
    kind = value.type
    if not value.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.UuidType | pa.Bool8Type):
        return _plain(value.value, odd)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind) or types.is_union(kind):
        return None if value.value is None else _plain(value.value, odd)
    if types.is_map(kind):
        return [_fields(pair, odd) for pair in value.values]
    if _is_list(kind):
        return plain_values(value.values, odd)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        found = _fields(value, odd)
        if len(set(names)) < len(names):
            return [list(pair) for pair in zip(names, found, strict=True)]
        return dict(zip(names, found, strict=True))
    return _leaf(value, odd)


def _fields(value: pa.StructScalar, odd: list[pa.DataType]) -> list[Any]:
    return [_plain(value[i], odd) for i in range(len(value.type))]


def _leaf(value: pa.Scalar, odd: list[pa.DataType]) -> Any:
    kind = value.type
    try:
        found = value.as_py()
    except UnicodeDecodeError:
        raise
    except Exception:  # noqa: BLE001  # what Python has no value for, each in its own way
        odd.append(kind)
        return _number(value)
    if isinstance(found, bytes):
        return _text(found, kind, odd)
    if types.is_time64(kind) and value.value % 1000 and kind.unit == "ns":  # which Python's times leave out
        return str(value.cast(pa.string()))
    return found


def _number(value: pa.Scalar) -> str:
    """Return what the file itself holds, and its type."""
    held = getattr(value, "value", None)
    return f"{held if held is not None else value!r} ({value.type})"


def _text(found: bytes, kind: pa.DataType, odd: list[pa.DataType]) -> Any:
    try:
        return found.decode()
    except UnicodeDecodeError:
        odd.append(kind)
        return {"base64": base64.b64encode(found).decode()}
