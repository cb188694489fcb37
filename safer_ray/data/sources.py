"""Data sets in the wild to pairs: files are cut into fragments, rows are read raw, then normalised or refused."""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.config.sections import SourceConfig
from safer_ray.config.where import meets, parse_where
from safer_ray.data.heads import table_as_stamped
from safer_ray.data.matching import matched_file
from safer_ray.data.partitions import Columns, contradiction, partition_columns
from safer_ray.data.rows import parse_row
from safer_ray.data.source_files import Found, file_name, find_files
from safer_ray.errors import UserError
from safer_ray.formats.declaration import Options, Refused, digest, identity
from safer_ray.formats.matched import MATCHED
from safer_ray.formats.messages import characters, messages_json, without_incidents
from safer_ray.formats.registry import AUTO, FORMATS, expanded, read_pair, row_format
from safer_ray.formats.tables import Table, table_from_json
from safer_ray.schema import RAW_LIMIT
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.columnar import UTF8
from safer_ray.storage.files import as_path, stamp
from safer_ray.storage.fingerprints import still_holds
from safer_ray.storage.rows import BEGIN, MAX_ROW, Cut, RawRow, cut_rows, explained, grows, read_rows

RAW = pa.schema(
    [
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("source_index", pa.int32()),
        ("position", pa.int64()),  # 0-based line of a text file, record of a CSV, row of Parquet or Arrow
        ("format", pa.string()),  # the source's, or the one detected from the head of the file
        ("table", pa.string()),  # what that says of all rows, as JSON (`formats.tables.Table`)
        ("raw", pa.string()),  # the row as JSON text
        ("refused", pa.string()),
    ]
)
NOTES = "notes"
NORMALISED = pa.schema(
    [
        *schema.PAIRS,
        ("refused", pa.string()),
        ("raw", pa.string()),
        ("position", pa.int64()),
        (NOTES, pa.list_(pa.string())),  # what should be known of a pair's texts
    ]
)

log = logging.getLogger(__name__)
FRAGMENT_BYTES = 32 * 2**20


# Fragments


def plan_sources(
    sources: Sequence[SourceConfig],
    *,
    rows: int = 5000,
    size: int = FRAGMENT_BYTES,
    found: Sequence[Found] | None = None,
    formats: Sequence[dict[Path, str]] | None = None,
) -> list[Fragment]:
    """All sources as fragments of at most `rows` rows and about `size` bytes (uncompressed), in order; their files are
    looked for unless they are given as `found`. For each source, `formats` gains the format of each file with rows.

    Raises:
        UserError: a path that is missing, empty, of an unknown kind or damaged; a hub name that cannot be loaded; or
            a file whose columns fit no preference format.
    """
    files = [each.files for each in found or map(find_files, sources)]
    names = names_in_keys(sources, files)
    planned = [
        replace(fragment, source=index, file=names[index, path])
        for index, source in enumerate(sources)
        for path in files[index]
        for fragment in _plan_pairs(path, source, rows, size, formats[index] if formats else None)
    ]
    return [replace(fragment, number=number) for number, fragment in enumerate(planned)]


def _plan_pairs(
    path: Path, source: SourceConfig, rows: int, size: int, formats: dict[Path, str] | None
) -> list[Fragment]:
    """Return a file as fragments; of one with a response a row, the pairs that its rows make."""
    table = table_as_stamped(path, stamp(path)[1], source)
    if FORMATS[table.format].match is None:
        return plan_file(path, source, rows, size, formats=formats)
    if formats is not None:
        formats[path] = table.format
    made = matched_file(path, table, source.options(), source.limit or 2**62, source.encoding)
    return plan_file(made, source.model_copy(update={"format": MATCHED, "limit": None}), rows, size)


def names_in_keys(sources: Sequence[SourceConfig], files: Sequence[Sequence[Path]]) -> dict[tuple[int, Path], str]:
    """Return what row keys call the files of each source: `file_name`, behind the source's name or number where several
    sources have a file of that name."""
    named = {(i, path): file_name(path, sources[i]) for i, paths in enumerate(files) for path in paths}
    holders: dict[str, set[int]] = {}
    for (index, _), name in named.items():
        holders.setdefault(name, set()).add(index)
    own = Counter(source.name for source in sources)
    labels = [s.name if s.name and own[s.name] == 1 else f"source{i}" for i, s in enumerate(sources)]
    return {
        (index, path): f"{labels[index]}:{name}" if len(holders[name]) > 1 else name
        for (index, path), name in named.items()
    }


def names_apart(sources: Sequence[SourceConfig], files: Sequence[Sequence[Path]]) -> str:
    """The names in row keys that tell files of several sources apart, as JSON; empty where their own names do."""
    named = names_in_keys(sources, files)
    apart = sorted(name for (index, path), name in named.items() if name != file_name(path, sources[index]))
    return schema.to_json(apart) if apart else ""


def plan_file(
    path: Path,
    source: SourceConfig,
    rows: int,
    size: int = FRAGMENT_BYTES,
    after: Cut = BEGIN,
    *,
    whole_lines: bool = False,
    formats: dict[Path, str] | None = None,
) -> list[Fragment]:
    """A file as fragments numbered from 0; of one that has grown, the rows that came `after`. With `whole_lines` a last
    line that is still being written is left, and the fragments' `size` ends before it. `formats` gains its format.

    Raises:
        UserError: the file is damaged, or its columns fit no preference format.
    """
    with explained(path):
        size_now, etag = stamp(path)
    format = table_as_stamped(path, etag, source).format
    if FORMATS[format].match is not None:
        raise UserError(
            f"{path} holds one response a row (format {format}), which only `safer-ray pairs --source` matches by "
            "their prompts; give what that makes"
        )
    limit, encoding = source.limit or 2**62, source.encoding
    cuts = list(cut_rows(path, rows, size, limit, after, size_now, whole_lines=whole_lines, encoding=encoding))
    if cuts and formats is not None:
        formats[path] = format
    planned = cuts[-1].end if cuts and whole_lines and grows(path) else size_now
    name = file_name(path, source)
    return [
        Fragment(number, 0, str(path), cut.start, cut.stop, planned, etag, cut.offset, file=name)
        for number, cut in enumerate(cuts)
    ]


def several_formats(formats: Mapping[Path, str]) -> tuple[str, ...]:
    """Return what to tell of the files of one source that are in several formats: each with one of its files."""
    first: dict[str, Path] = {}
    for path in sorted(formats):
        first.setdefault(formats[path], path)
    named = ", ".join(f"{name} ({path})" for name, path in sorted(first.items()))
    return (f"files of {len(first)} formats are read, each by its own: {named}",) if len(first) > 1 else ()


def read_raw(fragment: Fragment, source: SourceConfig) -> pa.Table:
    """The rows of a fragment as JSON text (columns `RAW`), with a reason for those that cannot be read.

    Raises:
        UserError: the file as a whole cannot be read, or its columns fit no preference format; or an object is not the
            one that was planned.
    """
    path = as_path(fragment.path)
    with _as_planned(path, fragment):
        return _read_raw(path, fragment, source)


@contextlib.contextmanager
def _as_planned(path: Path, fragment: Fragment) -> Iterator[None]:
    """Raises UserError where a file was written anew before it was read to its end: its parts would not fit."""
    try:
        yield
    finally:
        with explained(path):
            found = stamp(path)
            same = _is_as_planned(path, found, fragment)
        if not same:
            raise UserError(
                f"{path} changed since it was planned ({fragment.size:,} bytes then, {found[0]:,} now); "
                "put it back, or start again with --fresh"
            )


def _is_as_planned(path: Path, found: tuple[int, str], fragment: Fragment) -> bool:
    """Return whether a file holds what was planned, as far as that is known without reading one that grows again and
    again."""
    if found == (fragment.size, fragment.etag):
        return True
    if grows(path) and (found[0] > fragment.size or not fragment.digest):
        return found[0] >= fragment.size
    return (
        bool(fragment.digest)
        and found[0] == fragment.size
        and still_holds(str(path), found, fragment.size, fragment.digest)
    )


def _read_raw(path: Path, fragment: Fragment, source: SourceConfig) -> pa.Table:
    name = fragment.file or file_name(path, source)
    table = table_as_stamped(path, fragment.etag, source)
    rows = []
    columns = partition_columns(_name_below(file_name(path, source), fragment.file))
    read = read_rows(path, fragment.start, fragment.stop, fragment.offset, source.encoding)
    for position, raw, refused in _pieces(read, table.format, source.options()):
        if columns and refused is None:
            raw, refused = _with_partitions(raw, columns)
        if refused and refused.startswith(f"bad {UTF8}: at character"):  # of text, that is
            _tell_encoding(str(path))
        if refused is None and len(raw) > MAX_ROW:
            raw, refused = raw[:RAW_LIMIT], f"too long: {len(raw)} characters, limit {MAX_ROW}"
        rows.append((position, raw, refused))
    shared = {"source": source.name or name, "source_index": fragment.source}
    return _as_raw(rows, name, shared | {"format": table.format, "table": table.to_json()})


def _as_raw(rows: Sequence[RawRow], name: str, shared: Mapping[str, Any]) -> pa.Table:
    """Return the rows of the file `name` as columns `RAW`, of which they all share some."""
    positions, texts, reasons = zip(*rows, strict=True) if rows else ((), (), ())
    own = {
        "row_key": [f"{name}#{position}" for position in positions],
        "position": positions,
        "raw": texts,
        "refused": reasons,
    }
    columns = [
        pa.array(own[field.name], field.type)
        if field.name in own
        else pa.repeat(pa.scalar(shared[field.name], field.type), len(rows))
        for field in RAW
    ]
    return pa.table(columns, schema=RAW)


@functools.cache
def _tell_encoding(path: str) -> None:
    log.warning("%s holds text that is no UTF-8; where it is in another encoding, say which by --encoding NAME", path)


def _name_below(own: str, known: str) -> str:
    """Return what a file was called below its source when it was planned, without the source's own name."""
    return own if not known or known.endswith(f":{own}") else known


def _with_partitions(raw: str, columns: Columns) -> tuple[str, str | None]:
    """A row with the columns that its file's folders tell, or why it is refused."""
    try:
        row = parse_row(raw)
    except Refused as reason:
        return raw, str(reason)
    if refused := contradiction(row, columns):
        return raw, refused
    return schema.to_json(row | {name: value for name, value in columns.items() if row.get(name) is None}), None


def _pieces(rows: Iterator[RawRow], format: str, options: Options) -> Iterator[RawRow]:
    """Rows that hold several responses as one row a pair, all in their position."""
    if FORMATS[format].expand is None:
        return rows
    return (piece for row in rows for piece in _pieces_of(row, format, options))


def _pieces_of(row: RawRow, format: str, options: Options) -> Iterator[RawRow]:
    position, raw, refused = row
    if refused is not None:
        yield row
        return
    try:
        pieces = expanded(parse_row(raw), format, options)
    except Refused as reason:
        yield position, raw, str(reason)
        return
    for piece in pieces:
        yield position, schema.to_json(piece), None


# Pairs


def _extra(row: dict[str, Any], used: set[str | None]) -> str | None:
    """The columns that no field of a pair holds, as JSON; an `extra` column of ours is unpacked."""
    columns = {name: value for name, value in row.items() if name not in used}
    if isinstance(columns.get("extra"), str):
        with contextlib.suppress(Refused):  # else it is the user's own column of that name
            columns = parse_row(columns["extra"]) | {name: columns[name] for name in columns.keys() - {"extra"}}
    return schema.to_json(columns) if columns else None


def normalise_row(
    row: dict[str, Any], table: Table, source: SourceConfig, options: Options, max_chars: int
) -> dict[str, Any]:
    """One row as the fields of `schema.PAIRS`, all but `row_key` and `source`.

    Raises:
        Refused: the row is no usable pair; the text says why.
    """
    pair = read_pair(row, table.format, options, table)
    length = characters(pair.prompt) + max(characters(pair.chosen), characters(pair.rejected))
    if length > max_chars:
        raise Refused(f"too long: {length} characters, limit {max_chars}")
    key, key_column = identity(row)
    section = row.get("section")
    own_section = isinstance(section, str) and bool(section)
    used = {*pair.used, key_column, "section"} if own_section else {*pair.used, key_column}
    prompt = messages_json(pair.prompt)
    if key is None:
        key = digest(f"[{prompt},{messages_json(pair.chosen)},{messages_json(pair.rejected)}]")[:32]
    asked = without_incidents(pair.prompt)
    return {
        "pair_id": key,
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "label_margin": pair.label_margin,
        "section": section if own_section else source.section,
        "group": digest(prompt if asked == pair.prompt else messages_json(asked))[:16],
        "labels": sorted(pair.labels.items()),
        "extra": _extra(row, used),
        NOTES: list(pair.notes),
    }


def told_of(pairs: pa.Table) -> dict[str, Any]:
    """Return what should be known of pairs with notes: how many rows' own numbers contradict their label
    (`contradicted`), and how often each note stands (`notes`)."""
    notes = Counter(note for row in pairs[NOTES].to_pylist() for note in row or ())
    return {"contradicted": contradicted(pairs), NOTES: dict(notes)}


def contradicted(pairs: pa.Table) -> int:
    """Return how many rows' own numbers prefer the rejected response."""
    return pc.sum(pc.less(pairs["label_margin"], 0)).as_py() or 0


def lines_of(told: dict[str, Any], pairs: int) -> list[str]:
    """Return what there is to say of so many pairs (the sums of `told_of`), a line each."""
    count = told["contradicted"]
    lines = [
        f"{count:,} of {pairs:,} pairs contradict their label by their own scores, ratings or margins: label_margin is "
        "below 0 (`where: label_margin < 0` takes them)"
    ] * bool(count)
    return lines + [f"{number:,} of {pairs:,} pairs: {note}" for note, number in sorted(told[NOTES].items())]


def in_part(group: str, source: SourceConfig) -> bool:
    """Return whether a prompt group is in the part of the data that the source asks for."""
    if source.part == "all":
        return True
    holdout = int(digest(group)[:8], 16) % 10_000 < source.holdout_percent * 100
    return holdout == (source.part == "holdout")


@functools.lru_cache(maxsize=1024)
def _as_table(text: str) -> Table:
    return table_from_json(text)


def _table_of(raw_row: Mapping[str, Any], row: dict[str, Any], source: SourceConfig) -> Table:
    """Return what is known of the file of a row; of one without a file its format."""
    if raw_row.get("table"):
        return _as_table(raw_row["table"])
    format = raw_row.get("format") or source.format
    return Table((row_format(row) or "canonical") if format == AUTO else format)


class NormalisePairs:
    """Batch function: raw rows (columns `RAW`) to pairs, or to reasons; no row raises.

    Rows of the other part (train, holdout) or outside `where` are left out; a refused row, whose prompt may be
    unknown, is in the part that its raw text falls into.
    """

    def __init__(self, sources: Sequence[SourceConfig], max_chars: int) -> None:
        self.sources = tuple(sources)
        self.max_chars = max_chars
        self.conditions = [parse_where(source.where) for source in sources]
        self.options = [source.options() for source in sources]

    def __call__(self, raw: pa.Table) -> pa.Table:
        """Return columns `NORMALISED`: those of `schema.PAIRS`, then `refused`, `raw` (of refused rows), `position` and
        `notes`."""
        rows = []
        for raw_row in raw.to_pylist():
            source = self.sources[raw_row["source_index"]]
            row = self._row(raw_row, source)
            if in_part(row.get("group") or row["raw"], source) and self._wanted(raw_row, row):
                row |= {"row_key": raw_row["row_key"], "source": raw_row["source"], "position": raw_row["position"]}
                rows.append(row)
        return schema.table(rows, NORMALISED)

    def _wanted(self, raw_row: dict[str, Any], row: dict[str, Any]) -> bool:
        """Return whether a row is one of those that its source takes; of a refused one nobody knows, so it is told."""
        wanted = self.conditions[raw_row["source_index"]]
        return not wanted or "refused" in row or meets({"source": raw_row["source"]} | row, wanted)

    def _row(self, raw_row: dict[str, Any], source: SourceConfig) -> dict[str, Any]:
        raw = raw_row["raw"] or ""
        row: dict[str, Any] = {}
        try:
            if raw_row["refused"]:
                raise Refused(raw_row["refused"])
            row = parse_row(raw)
            options = self.options[raw_row["source_index"]]
            return normalise_row(row, _table_of(raw_row, row, source), source, options, self.max_chars)
        except Refused as refused:
            return {"pair_id": identity(row)[0], "refused": str(refused), "raw": raw[:RAW_LIMIT]}
