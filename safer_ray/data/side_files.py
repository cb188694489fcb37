"""Files beside the rows of a data set that hold none themselves: descriptions, configurations, vocabularies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safer_ray.formats.registry import row_format
from safer_ray.storage.background import map_ordered
from safer_ray.storage.files import threads_for

ALWAYS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # which `datasets` writes
USUALLY = {"metadata.json", "croissant.json"}  # unless a row lies in them
MOST = 2**20  # bytes; what is larger is no description
NAMED = 5  # files that a line names


def side_files(files: Sequence[Path]) -> set[Path]:
    """Return the JSON files beside others that clearly hold no rows: one value that fits no layout, nor anything in
    it. Where nothing else is left, none is one: it is tried, and refused by what is in it."""
    asked = [file for file in files if file.suffix.lower() == ".json"]
    if not asked or len(files) == 1:
        return set()
    looked = map_ordered(_is_one, asked, threads_for(asked[0]))
    found = {file for file, is_one in zip(asked, looked, strict=True) if is_one}
    return found if len(found) < len(files) else set()


def _is_one(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            text = stream.read(MOST + 1)
        value = json.loads(text) if len(text) <= MOST else None
    except (OSError, ValueError, RecursionError):  # whoever reads it tells
        return False
    if isinstance(value, dict):
        return not any(_is_row(row) for row in (value, *_listed(value)))
    if isinstance(value, list) and value:
        rows = [row for row in value if isinstance(row, dict)]
        return not rows or (file.name in USUALLY and not any(map(_is_row, rows)))
    return False


def _listed(value: dict[str, Any]) -> list[Any]:
    """Return what lists in a mapping begin with: rows under a name."""
    return [items[0] for items in value.values() if isinstance(items, list) and items]


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row_format(row) is not None


def some(names: Sequence[str]) -> str:
    """Return the first of many names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
