"""Data sets in the wild to pairs: files are cut into fragments, rows are read raw, then normalised or refused."""

import contextlib
import functools
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray import schema
from safer_ray.artifacts import Fragment
from safer_ray.benchmarks import EXPANDERS
from safer_ray.config import SourceConfig
from safer_ray.errors import UserError
from safer_ray.files import at, move, stamp
from safer_ray.formats import Refused, as_text, detect_format, read_pair, row_format
from safer_ray.remote import Remote
from safer_ray.rows import BEGIN, ENDINGS, MAX_ROW, Cut, RawRow, cut_rows, explained, kind_of, read_rows
from safer_ray.schema import RAW_LIMIT
from safer_ray.where import meets, parse_where

RAW = pa.schema(
    [
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("source_index", pa.int32()),
        ("position", pa.int64()),  # 0-based line of a text file, record of a CSV, row of Parquet or Arrow
        ("format", pa.string()),  # the source's, or the one detected from the head of the file
        ("raw", pa.string()),  # the row as JSON text
        ("refused", pa.string()),
    ]
)
NORMALISED = pa.schema([*schema.PAIRS, ("refused", pa.string()), ("raw", pa.string()), ("position", pa.int64())])

FRAGMENT_BYTES = 32 * 2**20
HEAD = 100  # rows that the format is detected from


_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


# Which files


def _has_data_name(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    return not hidden and path.name not in _NO_DATA and kind_of(path)[0] is not None


def _place(source: SourceConfig) -> Path:
    """What a source's path means: a file, a folder or a glob."""
    path = at(source.path)
    return path if isinstance(path, Remote) else Path(os.path.abspath(os.path.expanduser(path)))


def _matches(pattern: Path) -> Iterator[Path]:
    if not isinstance(pattern, Remote):
        return (Path(name) for name in glob.iglob(str(pattern), recursive=True))
    root = _before_magic(pattern)
    return root.glob(str(pattern.relative_to(root)))


def _before_magic(path: Path) -> Path:
    """The folder that a glob's first wildcard stands in."""
    while any(glob.has_magic(part) for part in path.parts):
        path = path.parent
    return path


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted by path; a hub name is fetched.

    Raises:
        UserError: a path that is missing, empty or of an unknown kind, or a hub name that cannot be loaded.
    """
    if source.path.startswith("hub:"):
        return _saved(_from_hub(source), source.split)
    path = _place(source)
    if path.is_file():
        if kind_of(path)[0] is None:
            raise UserError(f"{source.path}: unknown kind of file; supported are {ENDINGS}")
        return [path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, source.split)
    if path.is_dir():
        found: Iterable[Path] = path.rglob("*")
    elif glob.has_magic(source.path):
        found = _matches(path)
    else:
        raise UserError(f"no file, folder or glob at {source.path}; check the path, or write hub:OWNER/NAME")
    listed = isinstance(path, Remote)  # of objects nothing more need be asked
    files = sorted(file for file in found if _has_data_name(file) and (listed or file.is_file()))
    if not files:
        raise UserError(f"{source.path}: no data files there; supported are {ENDINGS}")
    return files


def _saved(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a `save_to_disk` folder, or of one split of a saved dict."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise UserError(f"{folder} has no split {split!r}; set `split` to one of {splits}")
            folder = folder / split
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is a damaged save_to_disk folder ({error!r}); save it again") from error


def _from_hub(source: SourceConfig) -> Path:
    """A hub data set, saved once under SAFER_RAY_CACHE (default ~/.cache/safer_ray)."""
    name, at, revision = source.path.removeprefix("hub:").partition("@")
    if Path(source.path.removeprefix("hub:")).exists():
        name, at, revision = source.path.removeprefix("hub:"), "", ""
    import datasets  # slow to import, and only needed here

    try:
        data = datasets.load_dataset(name, split=source.split, revision=revision if at else None)
    except Exception as error:  # whatever the hub client raises: no network, no such name, split or revision
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load {source.path} (split {source.split!r}): {cause}; check the name, the split and the network, "
            "or give a downloaded folder"
        ) from error
    cache = Path(os.environ.get("SAFER_RAY_CACHE", "~/.cache/safer_ray")).expanduser() / "hub"
    identity = _digest(schema.to_json([name, revision, source.split, data._fingerprint]))[:12]
    folder = cache / f"{Path(name).name}-{identity}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=cache, prefix=".saving-")
        data.save_to_disk(temporary)
        with contextlib.suppress(OSError):  # another process was faster; its copy is the same
            move(Path(temporary), folder)
    return folder


def _file_name(path: Path, source: SourceConfig) -> str:
    """The file's path inside the source's folder (or before a glob's first wildcard), else its base name."""
    root = _place(source)
    if isinstance(path, Remote) or not root.exists():  # of objects it is not asked: a bucket holds no file called `*`
        root = _before_magic(root)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else path.name


# Fragments


_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def parse_row(raw: str) -> dict[str, Any]:
    """A row's JSON text as a mapping; NaN and infinities become null."""
    try:
        row = _DECODER.decode(raw)
        if "\\u" in raw:
            schema.to_json(row).encode()
    except UnicodeEncodeError:
        raise Refused("bad UTF-8: a lone surrogate is escaped in the text") from None
    except RecursionError:
        raise Refused("not JSON: nested too deep") from None
    except ValueError as error:
        raise Refused(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Refused(f"wrong type: the row is {type(row).__name__}, wanted a mapping of columns")
    return row


def _head(path: Path) -> list[dict[str, Any]]:
    """The first rows that are readable, up to `HEAD`."""
    return list(islice(_readable(path), HEAD))


def _readable(path: Path) -> Iterator[dict[str, Any]]:
    for _, raw, refused in read_rows(path, 0, 10 * HEAD):
        with contextlib.suppress(Refused):
            if refused is None:
                yield parse_row(raw)


def _format(path: Path, source: SourceConfig) -> str:
    """The source's format, or the one detected from the head of the file (canonical where no row can be read)."""
    if source.format != "auto":
        return source.format
    head = _head(path)
    try:
        return detect_format(head) if head else "canonical"
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def plan_sources(sources: Sequence[SourceConfig], *, rows: int = 5000, size: int = FRAGMENT_BYTES) -> list[Fragment]:
    """All sources as fragments of at most `rows` rows and about `size` bytes (uncompressed), in order.

    Raises:
        UserError: a path that is missing, empty, of an unknown kind or damaged; a hub name that cannot be loaded; or
            a file whose columns fit no preference format.
    """
    found = [
        replace(fragment, source=index)
        for index, source in enumerate(sources)
        for path in source_files(source)
        for fragment in plan_file(path, source, rows, size)
    ]
    return [replace(fragment, number=number) for number, fragment in enumerate(found)]


def plan_file(
    path: Path, source: SourceConfig, rows: int, size: int = FRAGMENT_BYTES, after: Fragment | None = None
) -> list[Fragment]:
    """A file as fragments numbered from 0; of one that has grown, the rows that came `after`.

    Raises:
        UserError: the file is damaged, or its columns fit no preference format.
    """
    with explained(path):
        size_now, etag = stamp(path)
    _format(path, source)
    behind = Cut(after.start, after.stop, after.size) if after else BEGIN
    return [
        Fragment(number, 0, str(path), cut.start, cut.stop, size_now, etag, cut.offset)
        for number, cut in enumerate(cut_rows(path, rows, size, source.limit or 2**62, behind, size_now))
    ]


def read_raw(fragment: Fragment, source: SourceConfig) -> pa.Table:
    """The rows of a fragment as JSON text (columns `RAW`), with a reason for those that cannot be read.

    Raises:
        UserError: the file as a whole cannot be read, or its columns fit no preference format; or an object is not the
            one that was planned.
    """
    path = at(fragment.path)
    with _as_planned(path, fragment):
        return _read_raw(path, fragment, source)


@contextlib.contextmanager
def _as_planned(path: Path, fragment: Fragment) -> Iterator[None]:
    """Raises UserError where an object was written anew before it was read to its end: its parts would not fit."""
    try:
        yield
    finally:
        if isinstance(path, Remote):
            with explained(path):
                found = stamp(path)
            if found != (fragment.size, fragment.etag):
                raise UserError(
                    f"{path} changed since it was planned ({fragment.size:,} bytes then, {found[0]:,} now); "
                    "put it back, or start again with --fresh"
                )


@functools.lru_cache(maxsize=1024)
def _format_of_object(uri: str, etag: str, source: SourceConfig) -> str:
    """As `_format`, asked once a process."""
    return _format(at(uri), source)


def _read_raw(path: Path, fragment: Fragment, source: SourceConfig) -> pa.Table:
    name = _file_name(path, source)
    is_object = isinstance(path, Remote)
    format = _format_of_object(fragment.path, fragment.etag, source) if is_object else _format(path, source)
    shared = {"source": source.name or name, "source_index": fragment.source, "format": format}
    rows = []
    expand = EXPANDERS.get(str(shared["format"]))
    read = read_rows(path, fragment.start, fragment.stop, fragment.offset)
    for position, raw, refused in (piece for row in read for piece in _pieces(row, expand)):
        row = {"row_key": f"{name}#{position}", "position": position, "raw": raw, "refused": refused, **shared}
        if refused is None and len(raw) > MAX_ROW:
            row |= {"raw": raw[:RAW_LIMIT], "refused": f"too long: {len(raw)} characters, limit {MAX_ROW}"}
        rows.append(row)
    return schema.table(rows, RAW)


def _pieces(row: RawRow, expand: Callable[[dict[str, Any]], list[dict[str, Any]]] | None) -> Iterator[RawRow]:
    """A row that holds several responses as one row a pair, all in its position."""
    position, raw, refused = row
    if expand is None or refused is not None:
        yield row
        return
    try:
        pieces = expand(parse_row(raw))
    except Refused as reason:
        yield position, raw, str(reason)
        return
    for piece in pieces:
        yield position, schema.to_json(piece), None


# Pairs


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """The user's key and the column that it stands in."""
    for name in ("pair_id", "id", "uid"):
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            return as_text(value), name
    return None, None


def _extra(row: dict[str, Any], used: set[str | None]) -> str | None:
    """The columns that no field of a pair holds, as JSON; an `extra` column of ours is unpacked."""
    columns = {name: value for name, value in row.items() if name not in used}
    if isinstance(columns.get("extra"), str):
        with contextlib.suppress(Refused):  # else it is the user's own column of that name
            columns = parse_row(columns["extra"]) | {name: columns[name] for name in columns.keys() - {"extra"}}
    return schema.to_json(columns) if columns else None


def normalise_row(row: dict[str, Any], format: str, source: SourceConfig, max_chars: int) -> dict[str, Any]:
    """One row as the fields of `schema.PAIRS`, all but `row_key` and `source`.

    Raises:
        Refused: the row is no usable pair; the text says why.
    """
    pair = read_pair(row, format, source.prefer)
    sides = [sum(len(message["content"]) for message in side) for side in (pair.prompt, pair.chosen, pair.rejected)]
    length = sides[0] + max(sides[1:])
    if length > max_chars:
        raise Refused(f"too long: {length} characters, limit {max_chars}")
    key, key_column = _identity(row)
    section = row.get("section")
    own_section = isinstance(section, str) and bool(section)
    used = {*pair.used, key_column} | ({"section"} if own_section else set())
    return {
        "pair_id": key or _digest(schema.to_json([pair.prompt, pair.chosen, pair.rejected]))[:32],
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "label_margin": pair.label_margin,
        "section": section if own_section else source.section,
        "group": _digest(schema.to_json(pair.prompt))[:16],
        "labels": sorted(pair.labels.items()),
        "extra": _extra(row, used),
    }


def in_part(group: str, source: SourceConfig) -> bool:
    """Whether a prompt group is in the part of the data that the source asks for."""
    holdout = int(_digest(group)[:8], 16) % 10_000 < source.holdout_percent * 100
    return source.part == "all" or holdout == (source.part == "holdout")


class NormalisePairs:
    """Batch function: raw rows (columns `RAW`) to pairs, or to reasons; no row raises.

    Rows of the other part (train, holdout) or outside `where` are left out; a refused row, whose prompt may be
    unknown, is in the part that its raw text falls into.
    """

    def __init__(self, sources: Sequence[SourceConfig], max_chars: int) -> None:
        self.sources = tuple(sources)
        self.max_chars = max_chars
        self.conditions = [parse_where(source.where) for source in sources]

    def __call__(self, raw: pa.Table) -> pa.Table:
        """Columns `NORMALISED`: those of `schema.PAIRS`, then `refused`, `raw` (of refused rows) and `position`."""
        rows = []
        for raw_row in raw.to_pylist():
            source = self.sources[raw_row["source_index"]]
            row = self._row(raw_row, source)
            if in_part(row.get("group") or row["raw"], source) and self._wanted(raw_row, row):
                rows.append({name: raw_row[name] for name in ("row_key", "source", "position")} | row)
        return schema.table(rows, NORMALISED)

    def _wanted(self, raw_row: dict[str, Any], row: dict[str, Any]) -> bool:
        """Whether a row is one of those that its source takes; of a refused one nobody knows, so it is told."""
        wanted = self.conditions[raw_row["source_index"]]
        return "refused" in row or meets({"source": raw_row["source"]} | row, wanted)

    def _row(self, raw_row: dict[str, Any], source: SourceConfig) -> dict[str, Any]:
        raw = raw_row["raw"] or ""
        row: dict[str, Any] = {}
        try:
            if raw_row["refused"]:
                raise Refused(raw_row["refused"])
            row = parse_row(raw)
            format = raw_row.get("format") or source.format
            format = (row_format(row) or "canonical") if format == "auto" else format
            return normalise_row(row, format, source, self.max_chars)
        except Refused as refused:
            return {"pair_id": _identity(row)[0], "refused": str(refused), "raw": raw[:RAW_LIMIT]}
