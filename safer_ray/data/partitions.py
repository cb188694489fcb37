"""Columns that the folders of a file tell (`lang=en/year=2024/part.parquet`), as Hive, Spark and Arrow write them."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from safer_ray.errors import UserError
from safer_ray.formats.canonical import PROMPTS, SIDES, SYSTEMS
from safer_ray.formats.declaration import identity

_SAID = frozenset({*PROMPTS, *SYSTEMS, *SIDES})
NULL = "__HIVE_DEFAULT_PARTITION__"

Columns = Mapping[str, str | None]


def check_partitions(names: Iterable[str]) -> None:
    """Raises UserError where the name of a file tells a column that only a row can: its id, or what is said in it."""
    for name in names:
        for column in partition_columns(name):
            if column in _SAID or identity({column: "1"})[1]:
                raise UserError(
                    f"{name}: a folder's name cannot hold the {column} of all its rows; rename the folder, say "
                    f"by_{column}=…"
                )


def partition_columns(name: str) -> dict[str, str | None]:
    """Return the columns that the folders in a file's name tell, as text; the folder nearest to the file holds."""
    told = [folder.partition("=") for folder in PurePosixPath(name).parts[:-1]]
    pairs = [(unquote(key), unquote(value)) for key, equals, value in told if key and equals]
    return {key: None if value == NULL else value for key, value in pairs}


def contradiction(row: Mapping[str, Any], columns: Columns) -> str | None:
    """Return in which column a row says otherwise than its folders do; None where it agrees, or does not say."""
    for name, value in columns.items():
        own = row.get(name)
        if own is not None and not _same(own, value):
            return f"partition contradicts: the row's {name} is {str(own)[:100]!r}, and its folder says {value!r}"
    return None


def _same(own: Any, value: str | None) -> bool:
    if value is None:
        return own == ""
    if isinstance(own, bool):
        return str(own).lower() == value.lower()
    if isinstance(own, int | float):
        try:
            return float(value) == own
        except ValueError:
            return False
    return str(own) == value
