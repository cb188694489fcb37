"""Which rows an audit has to read: a plan that grows with its corpus and knows files by name and bytes.

A file is known by its name relative to the source, its size, and its sha256 or an object's ETag, so that a corpus may
be moved, linked, or named by another path. One that has grown keeps its fragments, and its new rows make new ones. One
that was renamed is known by its bytes; its rows keep the name that they began with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.config.sections import SourceConfig
from safer_ray.data.audit_files import FLAGGED, SCORES
from safer_ray.data.side_files import some
from safer_ray.data.source_files import WRITTEN, Found, file_name, find_files, real_path, root_of
from safer_ray.data.sources import plan_file, several_formats
from safer_ray.errors import UserError
from safer_ray.storage.artifacts import (
    MANIFEST,
    PLAN,
    Fragment,
    check_unplanned,
    part_name,
    read_plan,
    with_digests,
    write_plan,
)
from safer_ray.storage.background import map_ordered
from safer_ray.storage.files import as_path, names_in, read_parquet, remove, stamp, threads_for
from safer_ray.storage.fingerprints import begins_as, digests_of, is_at
from safer_ray.storage.rows import Cut, grows

PEEK = 2**20  # bytes


class FileNotes(NamedTuple):
    """Notes on the files of an audit, for its output and its summary."""

    left_for_later: dict[str, int]  # file -> bytes of a last line that is still being written
    left_out: dict[str, int]  # folder -> data files in it that are no part of the source
    renamed: dict[str, str]  # what row keys call a file -> its name now
    repeated: dict[str, str]  # file -> one before it that holds the same bytes
    gone: list[str]  # files that all of the rows were read of
    told: tuple[str, ...] = ()  # what else was left out, and what was chosen

    def to_tree(self) -> dict[str, Any]:
        """Return the notes as JSON holds them."""
        return self._asdict()


class Plan(NamedTuple):
    """The fragments of an audit, and what there is to tell of its files."""

    fragments: list[Fragment]
    notes: FileNotes


def plan_audit(source: SourceConfig, rows: int, out: Path) -> Plan:
    """Plan an audit into `out`: the fragments of its earlier half, and those of rows that have come since.

    Raises:
        UserError: a file that was planned has changed otherwise than by growing, or is gone with rows left to read; or
            `out` holds the audit of another corpus, or the plan of what is done there is gone or damaged.
    """
    found = _without_own(find_files(source, apart=[out]), source, out)
    present = {file_name(file, source): file for file in found.files}
    planned = read_plan(out / PLAN)
    if not planned:
        check_unplanned(out, (SCORES, FLAGGED, "quarantine"))
    known = _with_names(planned, present, out)
    last = {fragment.file: fragment for fragment in known}
    new = [file for name, file in present.items() if name not in last]
    gone = [fragment for name, fragment in last.items() if name not in present]
    renamed = _renamed(new, gone)
    before = {file: renamed.get(file) or last.get(name) for name, file in present.items()}
    _refuse_another_corpus(known, before, source, out)
    files = found.files
    formats: dict[Path, str] = {}  # of those with new rows

    def look(before: dict[Path, Fragment | None]) -> list[_Looked]:
        look_at = partial(_look, source, rows, out=out, formats=formats)
        return list(map_ordered(lambda file: look_at(file, before[file]), files, threads_for(files[0])))

    try:
        looked = look(before)
    except _ChangedError:
        swapped = _swapped({file: fragment for file, fragment in before.items() if fragment})
        if not swapped:
            raise
        looked = look(before | swapped)
    _refuse_missing([fragment for fragment in gone if fragment not in renamed.values()], known, out)
    fragments = _continued(known, looked)
    if len(fragments) > len(planned):
        remove(out / MANIFEST)  # the audit is no longer whole
    if fragments != planned:
        write_plan(fragments, out / PLAN)
    found = found._replace(told=(*found.told, *several_formats(formats)))
    return Plan(fragments, _notes(source, fragments, dict(zip(files, looked, strict=True)), found))


def _without_own(found: Found, source: SourceConfig, out: Path) -> Found:
    """Leave out what the audit itself has written, where `out` is the source's own folder."""
    folder = f"{real_path(out)}/"
    if not f"{real_path(root_of(source))}/".startswith(folder):
        return found
    kept = [f for f in found.files if real_path(f).removeprefix(folder).partition("/")[0] not in WRITTEN]
    if not kept:
        raise UserError(f"{source.path}: no data files there but those of the audit itself; choose another --pairs")
    left = len(found.files) - len(kept)
    return found._replace(files=kept, left_out=found.left_out | ({str(out): left} if left else {}))


class _ChangedError(UserError):
    """A file does not begin with what was planned of it."""


class _Looked(NamedTuple):
    """The result of a look at a file."""

    name: str  # in row keys
    path: str
    etag: str
    fragments: list[Fragment]  # of rows that are not planned yet
    left: int  # bytes of a line that is still being written


def _look(
    source: SourceConfig, rows: int, file: Path, last: Fragment | None, *, out: Path, formats: dict[Path, str]
) -> _Looked:
    """Look for rows of a file that are not planned yet; `formats` gains their format.

    Raises:
        UserError: the file does not begin with what was planned of it.
    """
    size, etag = stamp(file)
    name = last.file if last else file_name(file, source)
    if last and not _begins(file, last):
        _refuse(file, size, last, out)
    end = _end_of_planned(file, size, last) if last else 0
    stop, fragments = last.stop if last else 0, []
    if end is not None and (size > end or last is None):
        after = Cut(last.start, stop, last.offset, end) if last else Cut(0, 0)
        fragments = plan_file(file, source, rows, after=after, whole_lines=True, formats=formats)
        fragments = with_digests([replace(fragment, file=name) for fragment in fragments])
    if fragments:
        end, stop = fragments[-1].size, fragments[-1].stop
    unread = end is not None and grows(file) and stop < (source.limit or stop + 1)
    left = _unfinished(file, end, size) if unread and end is not None else 0
    return _Looked(name, str(file), etag, fragments, left)


def _end_of_planned(file: Path, size: int, last: Fragment) -> int | None:
    """Return the byte behind the last planned row and its newline; None where that newline is yet to come.

    Raises:
        UserError: the last line has grown since.
    """
    if last.size in (size, 0):
        return last.size
    with file.open("rb") as stream:
        stream.seek(last.size - 1)
        if stream.read(1) == b"\n":
            return last.size
        rest = stream.readline(PEEK)
    if rest.strip():
        raise UserError(f"{file}: its last line has grown since it was audited; start again with --fresh")
    return last.size + len(rest) if rest.endswith(b"\n") else None


def _unfinished(file: Path, end: int, size: int) -> int:
    """Return how many bytes of a file lie behind its last whole line; blanks are none.

    Raises:
        UserError: they are lines that end otherwise than lines do here.
    """
    if size <= end:
        return 0
    with file.open("rb") as stream:
        stream.seek(end)
        rest = stream.read(min(size - end, PEEK)).strip()
    if b"\r" in rest.replace(b"\r\n", b""):
        raise UserError(
            f"{file}: behind byte {end:,} its lines end with a CR alone; write them with LF, say by "
            "tr '\\r' '\\n' < FILE > OTHER"
        )
    return size - end if rest else 0


def _refuse(file: Path, size: int, last: Fragment, out: Path) -> None:
    if is_at(file, last.path):
        raise _ChangedError(
            f"{file} changed since it was planned ({last.size:,} bytes then, {size:,} now); "
            "put it back, or start again with --fresh"
        )
    if not last.digest and size == last.size:
        raise _ChangedError(
            f"whether {file} is what {out} audited as {last.path} cannot be told, since nothing was written down of "
            "its bytes; put it back there, choose another --out, or start again with --fresh"
        )
    raise _ChangedError(
        f"{out} holds the audit of another corpus: its {last.file} was read from {last.path}, and {file} does not "
        "begin with the same bytes; choose another --out, or start again with --fresh"
    )


def _refuse_another_corpus(
    known: Sequence[Fragment], before: dict[Path, Fragment | None], source: SourceConfig, out: Path
) -> None:
    """Raise UserError where nothing of what was audited is here, and that lay in another place."""
    if not known or any(before.values()) or any(_lies_in(fragment.path, root_of(source)) for fragment in known):
        return
    raise UserError(
        f"{out} holds the audit of another corpus: {known[0].file} of {known[0].path} is not in {source.path}, nor is "
        "any other file of it; choose another --out, or start again with --fresh"
    )


def _lies_in(path: str, root: Path) -> bool:
    place = as_path(path)
    return type(place) is type(root) and (place.is_relative_to(root) or is_at(root, path))


def _refuse_missing(gone: Sequence[Fragment], known: Sequence[Fragment], out: Path) -> None:
    """Raise UserError where a file is gone that has rows left to read."""
    names = {fragment.file for fragment in gone}
    done = names_in(out / "done") if names else set()
    for fragment in known:
        if fragment.file in names and f"{fragment.number:08}.json" not in done:
            raise UserError(
                f"{fragment.path} is gone, and not all of its rows are audited; put it back, or use --fresh"
            )


def _renamed(new: Sequence[Path], gone: Sequence[Fragment]) -> dict[Path, Fragment]:
    """Find new files that begin with the bytes of one that is gone."""
    if not new or not gone:
        return {}
    left, found = list(gone), {}
    for file, (size, etag) in zip(new, map_ordered(stamp, new, threads_for(new[0])), strict=True):
        growing = grows(file)
        likely = [f for f in left if f.size == size or (f.size < size and growing)]
        same = [f for f in likely if begins_as(file, (size, etag), replace(f, digest=""))]
        if not same and (known := [f for f in likely if f.digest]):
            digests = digests_of(file, [f.size for f in known])
            same = [f for f in known if f.digest == digests[f.size]]
        if same:
            found[file] = max(same, key=lambda f: f.size)
            left.remove(found[file])
    return found


def _swapped(before: dict[Path, Fragment]) -> dict[Path, Fragment | None]:
    """Find files that have each other's bytes: their names went round, and all that was planned of them is there."""
    other = {file: last for file, last in before.items() if not _begins(file, last)}
    found = _renamed(list(other), list(other.values())) if len(other) > 1 else {}
    return {**found} if len(found) == len(other) else {}


def _begins(file: Path, last: Fragment) -> bool:
    """Return whether a file begins with what was planned of it, and has at most more rows behind."""
    found = stamp(file)
    return begins_as(file, found, last) and (found[0] == last.size or grows(file))


def _with_names(known: list[Fragment], present: dict[str, Path], out: Path) -> list[Fragment]:
    """Name the files of a plan of old, which tells paths alone.

    Raises:
        UserError: it holds a file twice, under two paths.
    """
    if not all(fragment.file for fragment in known):
        names = {str(file): name for name, file in present.items()}
        for path in {fragment.path for fragment in known} - names.keys():
            names[path] = next(_names_in_rows(path, known, out), path)
        known = [replace(fragment, file=fragment.file or names[fragment.path]) for fragment in known]
    paths: dict[str, str] = {}
    for fragment in known:
        if paths.setdefault(fragment.file, fragment.path) != fragment.path:
            raise UserError(
                f"{out} holds {fragment.file} twice, read from {paths[fragment.file]} and from {fragment.path} by an "
                "earlier version; start again with --fresh"
            )
    return known


def _names_in_rows(path: str, known: Sequence[Fragment], out: Path) -> Iterator[str]:
    """Yield what the rows that were read from a path are called."""
    for fragment in known:
        for folder in (SCORES, "quarantine") if fragment.path == path else ():
            part = out / folder / part_name(fragment.number)
            keys = read_parquet(part, ["row_key"])["row_key"].to_pylist() if part.exists() else []
            yield from (key.rpartition("#")[0] for key in keys[:1])


def _continued(known: list[Fragment], looked: Sequence[_Looked]) -> list[Fragment]:
    """Return the known fragments where their files lie now, and the new ones behind them."""
    found = {look.name: look for look in looked}
    new = [fragment for look in looked for fragment in look.fragments]
    sizes = {fragment.file: fragment.size for fragment in known}
    moved = [_moved(f, found[f.file], sizes[f.file]) if f.file in found else f for f in known]
    return moved + [replace(fragment, number=number) for number, fragment in enumerate(new, len(moved))]


def _moved(fragment: Fragment, look: _Looked, size: int) -> Fragment:
    """Return a fragment where its file lies now; an object is one piece, of which the last size holds."""
    size = fragment.size if grows(as_path(look.path)) else size
    digest = fragment.digest if size == fragment.size else ""
    return replace(fragment, path=look.path, etag=look.etag, size=size, digest=digest)


def _notes(source: SourceConfig, fragments: Sequence[Fragment], looked: dict[Path, _Looked], found: Found) -> FileNotes:
    here = {look.name: file_name(file, source) for file, look in looked.items()}
    first: dict[tuple[int, str], str] = {}
    repeated = {}
    for name, fragment in {fragment.file: fragment for fragment in fragments}.items():
        known = fragment.digest or ("" if fragment.etag.isdecimal() else fragment.etag)
        if known and first.setdefault((fragment.size, known), name) != name:
            repeated[name] = first[fragment.size, known]
    return FileNotes(
        {here[look.name]: look.left for look in looked.values() if look.left},
        found.left_out,
        {name: now for name, now in here.items() if name != now},
        repeated,
        sorted({fragment.file for fragment in fragments} - here.keys()),
        found.told,
    )


def in_words(notes: dict[str, Any]) -> list[str]:
    """Return what there is to tell of the files of an audit, a line for each kind of it."""
    later, out, renamed, repeated, gone, more = (notes[name] for name in FileNotes._fields)
    bytes_left = [f"{name} ({size:,} bytes)" for name, size in later.items()]
    folders = [f"{folder} ({count:,} data files)" for folder, count in out.items()]
    told = (
        ("Last lines that are not whole yet are left for the next run", bytes_left),
        ("Folders below the source that are no part of it are left out", folders),
        ("Renamed since they were planned, their rows keep the old name", [f"{a} is {b}" for a, b in renamed.items()]),
        ("The same bytes under two names are scored twice", [f"{b} as {a}" for a, b in repeated.items()]),
        ("No longer there, but read before", gone),
    )
    return [
        *(f"{what}: {some(names)}." for what, names in told if names),
        *(f"{line[0].upper()}{line[1:]}." for line in more),
    ]
