"""Marks that data hands on to all that is made of it: the licences of its sources, and the red-team mark of poisoned
labels.

An artifact says both in its manifest. The red-team mark is in its files too, since these are copied without it: in the
metadata of its tables, in the rows of pairs, scores and decisions, and in the JSON files that models and features are
opened by.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safer_ray.storage.background import map_ordered
from safer_ray.storage.columnar import source_of
from safer_ray.storage.files import read_json, read_parquet, threads_for, write_json, write_parquet
from safer_ray.storage.remote import Remote
from safer_ray.storage.rows import explained, kind_of
from safer_ray.storage.values import plain_values

MANIFEST = "manifest.json"  # of an artifact; it comes last
MANIFEST_KEYS = {"stage", "name", "packages"}  # of ours
COLUMN = "red_team"  # of rows, and in JSON
RED_TEAM_MARK = {"safer_ray.red_team": "poisoned: labels flipped on purpose"}  # in the metadata of Parquet files
OPENED_BY = {"config.json": (), "cfg.json": ("metadata",), "features.json": ()}  # where the mark goes in each
KEY = "safer_ray_red_team"  # in them
NO = ("", "none", "null", "nan", "false", "no", "n", "f", "off", "0", "0.0", "-0.0")  # as text, of any type


class Marks(NamedTuple):
    """Licences of the sources, and whether they were poisoned as a red-team exercise."""

    licence: tuple[str, ...] = ()
    red_team: bool = False


NOTHING = Marks()


def together(*marks: Marks) -> Marks:
    """Return what is made of all of them is under every licence, and marked where any of them is."""
    return Marks(tuple(sorted({name for m in marks for name in m.licence})), any(m.red_team for m in marks))


# Found


def says_red_team(row: dict[str, Any]) -> bool:
    """Return whether a row of a source calls itself poisoned: by any value that is not clearly a no."""
    return str(row.get(COLUMN)).strip().lower() not in NO


def red_team_rows(extra: pa.ChunkedArray) -> list[bool]:
    """Return whether each of these rows does, by what pairs and scores keep of it in `extra`."""
    maybe = pc.fill_null(pc.match_substring(extra, f'"{COLUMN}":'), False)
    if not pc.any(maybe, min_count=0).as_py():
        return [False] * len(extra)
    told = zip(maybe.to_pylist(), extra.to_pylist(), strict=True)
    return [has and says_red_team(json.loads(text)) for has, text in told]


def any_red_team(extra: pa.ChunkedArray) -> bool:
    """Return whether one of these rows does."""
    return any(red_team_rows(extra))


def is_marked(files: Iterable[Path]) -> bool:
    """Return whether a Parquet file among these says that its rows were poisoned as a red-team exercise. Rows of other
    files say it themselves, when they are read."""
    parquet = [path for path in files if kind_of(path)[0] == "parquet"]
    return bool(parquet) and any(map_ordered(_says_poisoned, parquet, threads_for(parquet[0])))


def _says_poisoned(path: Path) -> bool:
    with explained(path):
        schema = pq.read_schema(source_of(path))
        if _tells(schema):
            return True
        if COLUMN not in schema.names:
            return False
        said = pq.read_table(source_of(path), columns=[COLUMN])[COLUMN]
        said = said if pa.types.is_nested(said.type) else said.unique()
        return any(says_red_team({COLUMN: value}) for value in plain_values(said))


def _tells(schema: pa.Schema) -> bool:
    """Return whether the metadata of a table says that its rows were poisoned."""
    return any(name.encode() in (schema.metadata or {}) for name in RED_TEAM_MARK)


def tell_it(files: Iterable[Path]) -> list[Path]:
    """The Parquet files among these whose metadata says that their rows were poisoned."""
    parquet = [path for path in files if kind_of(path)[0] == "parquet"]
    if not parquet:
        return []

    def tells(path: Path) -> bool:
        with explained(path):
            return _tells(pq.read_schema(source_of(path)))

    told = map_ordered(tells, parquet, threads_for(parquet[0]))
    return [path for path, is_told in zip(parquet, told, strict=True) if is_told]


def wholly_marked(files: Iterable[Path]) -> set[Path]:
    """The files of which every row is marked, whatever it says itself: by their metadata, or by the artifact that they
    lie in."""
    files = list(files)
    parents = {file: {path.parent for path in _lies_at(file)} for file in files}
    marked_folders = {f for f in set().union(*parents.values()) if enclosing([f / MANIFEST]).red_team}
    return {*tell_it(files), *(file for file, folders in parents.items() if folders & marked_folders)}


def _lies_at(path: Path) -> set[Path]:
    """Return where a path says that it lies, and where it does behind links; an object lies in no folder."""
    return set() if isinstance(path, Remote) else {path.absolute(), path.resolve()}


def marks_of(path: Path) -> Marks:
    """Return the marks of a foreign file or folder: what the artifact says that it is, or lies in, and what its files
    say."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = is_marked(files) or any(_opens_marked(file) for file in files)
    return together(enclosing([path if path.is_file() else path / MANIFEST]), Marks(red_team=found))


def enclosing(paths: Iterable[Path]) -> Marks:
    """Return the marks of the artifacts that files lie in, up to two folders deep, also behind links."""
    folders = {folder for path in paths for place in _lies_at(path) for folder in place.parents[:2]}
    return together(*(_manifest_marks(folder / MANIFEST) for folder in folders))


def _manifest_marks(path: Path) -> Marks:
    tree = _tree(path)
    if "stage" not in tree or COLUMN not in tree:  # somebody else's manifest
        return NOTHING
    return Marks(tuple(tree.get("licence", ())), bool(tree[COLUMN]))


def _tree(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it is no object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _opens_marked(file: Path) -> bool:
    if file.name not in OPENED_BY:
        return False
    tree: Any = _tree(file)
    for key in OPENED_BY[file.name]:
        tree = tree.get(key)
    return isinstance(tree, dict) and KEY in tree


# Set


def marked(table: pa.Table) -> pa.Table:
    """The table with the mark in its metadata, and in every row of pairs, scores and decisions."""
    if _is_told_by_row(table.schema):
        table = marked_by_row(table, [True] * len(table))
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **RED_TEAM_MARK})


def marked_by_row(table: pa.Table, which: Sequence[bool]) -> pa.Table:
    """The table with a column that says of each row whether it is marked; with the mark in its metadata if one is."""
    if COLUMN in table.column_names:
        table = table.drop_columns([COLUMN])
    table = table.append_column(COLUMN, pa.array(which, pa.bool_()))
    told = {**(table.schema.metadata or {}), **(RED_TEAM_MARK if any(which) else {})}
    return table.replace_schema_metadata(told or None)


def _is_told_by_row(schema: pa.Schema) -> bool:
    names = set(schema.names)
    return "pair_id" in names and (names >= {"chosen", "rejected"} or "decision" in names)


def mark_files(directory: Path, leave: Iterable[str] = ()) -> None:
    """Set the mark in every file below `directory` that can carry it, but in folders called as in `leave` and in whole
    artifacts of their own."""
    for file in sorted(directory.iterdir()):
        if file.name in leave:
            continue
        if file.is_dir():
            if not (file / MANIFEST).is_file():
                mark_files(file)
        elif file.suffix == ".parquet":
            _mark_table(file)
        elif file.name in OPENED_BY and not _opens_marked(file):
            _mark_json(file)


def _mark_table(path: Path) -> None:
    with pq.ParquetFile(path) as file:
        schema, groups = file.schema_arrow, file.metadata.num_row_groups
        rows = file.metadata.row_group(0).num_rows if groups > 1 else None
        told = all(name.encode() in (schema.metadata or {}) for name in RED_TEAM_MARK)
        if told and _is_told_by_row(schema):
            told = COLUMN in schema.names and pc.all(file.read([COLUMN])[COLUMN], min_count=0).as_py()
    if not told:
        write_parquet(marked(read_parquet(path)), path, rows)


def _mark_json(path: Path) -> None:
    whole = read_json(path)
    tree = whole
    for key in OPENED_BY[path.name]:
        tree = tree.setdefault(key, {})
    tree[KEY] = next(iter(RED_TEAM_MARK.values()))
    write_json(whole, path)
