"""Files that are whole or absent, also after a power cut: written beside, synced, renamed, and their folder synced.

Objects of a store are written in one piece, and are there when the store says so.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.locations import anywhere
from safer_ray.remote import Remote, remote

THREADS = 32  # that wait for an object store
BLOCK = 8 * 2**20  # bytes that an upload takes at once
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)  # of file systems that cannot sync a folder


def at(path: str | Path) -> Path:
    """A path of this machine, or what a URI names: it offers of `Path` what is used here."""
    if not isinstance(path, str):
        return path
    path = anywhere(path)
    return cast(Path, remote(path)) if "://" in path else Path(path)


def threads_for(path: Path) -> int:
    """How many may work on files below a path at once: those of a disk are read one after another."""
    return THREADS if isinstance(path, Remote) else 1


def stamp(path: Path) -> tuple[int, str]:
    """Size in bytes, and what changes when the file does: its modification time in ns, or an object's ETag."""
    if isinstance(path, Remote):
        return path.stamp()
    stat = path.stat()
    return stat.st_size, str(stat.st_mtime_ns)


def names_in(directory: Path) -> set[str]:
    """What lies directly in a folder, in one listing; nothing where there is none."""
    try:
        return {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return set()


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
    """Make a folder and those above it, whose names are on the disk when this returns."""
    if isinstance(path, Remote) or path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, once what is in it is on the disk; so is its new name when this returns."""
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
        reason = str(error).splitlines()[0]
        raise UserError(f"corrupt artifact: {path}: {reason}; delete its directory and run again") from None


def parquet_rows(path: Path) -> int:
    """How many rows a Parquet file says it has.

    Raises:
        UserError: it is empty or torn.
    """
    try:
        if isinstance(path, Remote):
            with path.explained("read"), path.native() as source:
                return int(pq.read_metadata(source).num_rows)
        with path.open("rb") as stream:
            return int(pq.read_metadata(stream).num_rows)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is empty or torn: {str(error).splitlines()[0]}; delete it and the `done` entry of its number, "
            "then run the same command again"
        ) from None


@contextlib.contextmanager
def beside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Where the body writes what then becomes `path`; what need not outlive a power cut is not `durable`."""
    if durable:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
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


def write_parquet(table: pa.Table, path: Path, group_rows: int | None = None) -> None:
    """Write beside, then rename: `path` is whole or absent. Row groups are of `group_rows`, or as pyarrow likes them.

    Vectors are no values that repeat: a dictionary of them takes 2.7 times as long to read.
    """
    repeat = [field.name for field in table.schema if not pa.types.is_fixed_size_list(field.type)]
    coded = repeat if len(repeat) < len(table.schema) else True
    options: dict[str, Any] = {"compression": "zstd", "row_group_size": group_rows, "use_dictionary": coded}
    if isinstance(path, Remote):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        path.write([sink.getvalue()])
        return
    with beside(path) as temporary:
        pq.write_table(table, temporary, **options)


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
    """What `write_json` wrote.

    Raises:
        UserError: it is missing or damaged.
        SaferError: it lies in an object store that does not give it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
