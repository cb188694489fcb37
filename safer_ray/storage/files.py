"""Files that are whole or absent, also after a power cut: written beside, synced, renamed, and their folder synced.

Objects of a store are written in one piece, and are there when the store says so.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.storage.locations import a_source
from safer_ray.storage.remote import Remote, remote

THREADS = 32  # that wait for an object store
BLOCK = 8 * 2**20  # bytes that an upload takes at once
DIGITS = 16  # of a digest that finds mistakes
TAIL = 16 * 2**10  # bytes that most footers fit
PLAN_LOST = (
    "it says what rows the finished work is of: put it back from a copy, or start again with --fresh, which does all "
    "of them again"
)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)  # of file systems that cannot sync a folder


def as_path(path: str | Path) -> Path:
    """A path of this machine, or what a URI names: it offers of `Path` what is used here."""
    if not isinstance(path, str):
        return path
    path = a_source(path)
    return cast(Path, remote(path)) if "://" in path else Path(path)


def threads_for(path: Path) -> int:
    """Return how many may work on files below a path at once: those of a disk are read one after another."""
    return THREADS if isinstance(path, Remote) else 1


def stamp(path: Path) -> tuple[int, str]:
    """Size in bytes, and what changes when the file does: its modification time in ns, or an object's ETag."""
    if isinstance(path, Remote):
        return path.stamp()
    stat = path.stat()
    return stat.st_size, str(stat.st_mtime_ns)


def names_in(directory: Path) -> set[str]:
    """Return what lies directly in a folder, in one listing; nothing where there is none.

    Raises:
        UserError: a file lies there.
    """
    try:
        return {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise _in_the_way(directory) from None


def _in_the_way(path: Path) -> UserError:
    """Return what to say of a file or folder that lies where a folder or file of ours belongs."""
    file = next((place for place in (path, *path.parents) if place.is_file()), None)
    what = f"{file} is a file where a folder belongs" if file else f"{path} is a folder where a file belongs"
    return UserError(f"{what}; move it away, or choose another folder")


def sync(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be written there.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(opened)


def sync_tree(directory: Path) -> None:
    """Return when all files below a folder, and their names, are on the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                sync(Path(folder, name))
        sync(Path(folder))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, whose names are on the disk when this returns.

    Raises:
        UserError: a file lies there, or nobody may write there.
    """
    if isinstance(path, Remote) or path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _in_the_way(path) from None
    except PermissionError:
        raise UserError(f"{path} cannot be made: no permission to write there; choose another folder") from None
    # A name is kept in the folder above it: outermost first, so that no name on the disk hangs below one that is not.
    for folder in reversed(missing):
        sync(folder.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, once what is in it is on the disk; so is its new name when this returns."""
    # What is in it before its name: a rename may reach the disk first, and after a power cut the name stands over an
    # empty file.
    sync_tree(source) if source.is_dir() else sync(source)
    os.replace(source, target)
    sync(target.parent)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as a table.

    Raises:
        UserError: the file is missing, corrupt or without one of the columns.
        SaferError: it lies in an object store that does not give it.
    """
    try:
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, Remote) else path
        with pq.ParquetFile(source) as file:
            missing = [name for name in columns or [] if name not in file.schema_arrow.names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}; pass the directory of the stage that writes it")
            return file.read(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a Parquet file of ours that cannot be read: which it is, and what it takes to have it
    again."""
    folders = [folder for folder in list(path.parents)[:3] if (folder / "manifest.json").is_file()]
    entries = [folder / "done" / f"{path.stem.removeprefix('part-')}.json" for folder in path.parents[:2]]
    entry = next((file for file in entries if path.stem.startswith("part-") and file.exists()), None)
    if path.name == "plan.parquet":
        how = PLAN_LOST
    elif entry and (not folders or (entry.parent.parent / "audit.json").exists()):
        how = f"delete it and {entry}, then run the same command again: it does those rows again, and no others"
    elif folders:
        how = f"put it back from a copy, or move {folders[0]} away and run the stage again that made it"
    else:
        how = "put it back from a copy, or run again what wrote it"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"corrupt artifact: {path}: {reason}; {how}")


class Footer(NamedTuple):
    """The end of a Parquet file."""

    rows: int
    digest: str  # of the footer, which tells the sizes and the least and greatest values of all columns


def parquet_footer(path: Path) -> Footer:
    """Read the end of a Parquet file.

    Raises:
        UserError: it is missing, empty or torn.
    """
    try:
        if isinstance(path, Remote):
            with path.explained("read"), path.native() as source:
                return _footer_in(source)
        with path.open("rb") as stream:
            return _footer_in(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, error) from None


def _footer_in(stream: Any) -> Footer:
    size = stream.seek(0, os.SEEK_END)
    tail = _tail(stream, size, TAIL)
    # A Parquet file ends with the footer, its length in 4 bytes and the letters PAR1.
    length = 8 + int.from_bytes(tail[-8:-4], "little")
    if TAIL < length <= size:
        tail = _tail(stream, size, length)
    rows = int(pq.read_metadata(pa.BufferReader(tail)).num_rows)
    return Footer(rows, hashlib.sha256(tail[-length:]).hexdigest()[:DIGITS])


def _tail(stream: Any, size: int, length: int) -> bytes:
    stream.seek(max(0, size - length))
    return bytes(stream.read(min(size, length)))


@contextlib.contextmanager
def beside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path at which the body writes what then becomes `path`; what need not outlive a power cut is not
    `durable`.

    Raises:
        UserError: a folder lies there.
        SaferError: the disk is full or read-only.
    """
    if durable:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise _in_the_way(path)
    # Named by the process, so that two do not write into one file, and with a dot, so that no reader takes it for a
    # part.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explain_disk_errors(path.parent):
        try:
            yield temporary
            if durable:
                move(temporary, path)
            else:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_parquet(table: pa.Table, path: Path, group_rows: int | None = None) -> Footer:
    """Write beside, then rename: `path` is whole or absent; what its end says. Row groups are of `group_rows`, or as
    pyarrow likes them.

    Vectors are no values that repeat: a dictionary of them takes 2.7 times as long to read.
    """
    repeat = [field.name for field in table.schema if not pa.types.is_fixed_size_list(field.type)]
    coded = repeat if len(repeat) < len(table.schema) else True
    options: dict[str, Any] = {"compression": "zstd", "row_group_size": group_rows, "use_dictionary": coded}
    if isinstance(path, Remote):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        written = sink.getvalue()
        path.write([written])
        return _footer_in(pa.BufferReader(written))
    with beside(path) as temporary:
        pq.write_table(table, temporary, **options)
        return parquet_footer(temporary)


def write_text(text: str, path: Path, *, durable: bool = True) -> None:
    """Write beside, then rename: `path` is whole or absent."""
    if isinstance(path, Remote):
        path.write([text.encode()])
        return
    with beside(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A stream for a large file, which is there when the body has ended; of an object it is kept on this machine's disk
    until then."""
    if isinstance(path, Remote):
        with explain_disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            path.write(iter(lambda: stream.read(BLOCK), b""))
        return
    with beside(path) as temporary, temporary.open("wb") as stream:
        yield stream


def write_json(value: Any, path: Path, *, durable: bool = True) -> None:
    write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", path, durable=durable)


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote.

    Raises:
        UserError: it is missing or damaged.
        SaferError: it lies in an object store that does not give it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it and run the same command again") from None


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, so that a power cut does not bring it back; nothing where
    there is none."""
    if isinstance(path, Remote):
        path.unlink(missing_ok=True)
        path.remove_below()
        return
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    sync(path.parent)
