"""Hash what an artifact holds: the rows of its tables, and the bytes of its other files."""

import functools
import hashlib
import os
from pathlib import Path

import pyarrow as pa

from safer_ray.errors import UserError
from safer_ray.storage.files import read_parquet, stamp
from safer_ray.storage.marks import MANIFEST
from safer_ray.storage.recipes import Artifact

PLAN = "plan.parquet"
SCRATCH = ("journal", "state")  # of a stage at work; gone when it is whole


def content_hash(path: Path) -> str:
    """First 16 hex digits of the sha256 over the names and bytes of a file or of all files below a directory.

    Raises:
        UserError: there is no such file or directory.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; check the path")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(os.fsencode(file.name if path.is_file() else file.relative_to(path)) + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def tables_in(directory: Path) -> list[Path]:
    """Return the Parquet files directly in a folder, but for a plan, by name."""
    return sorted(path for path in directory.glob("*.parquet") if path.name != PLAN)


def _tables_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in tables_in(directory):
        rows = read_parquet(path).replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def artifact_hash(directory: Path) -> str:
    """sha256 over the rows of every table in part order (which is key order) and the bytes of every other file.

    Manifests, also those of a bundle's parts, tell wall times and stay out.
    """
    digest = hashlib.sha256()
    skip = {MANIFEST, PLAN, "done", *SCRATCH}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        relative = path.relative_to(directory)
        if relative.parts[0] not in skip and path.name != MANIFEST and path.suffix != ".parquet":
            digest.update(f"{relative}\0{content_hash(path)}".encode())
    for folder in sorted({p.parent.relative_to(directory) for p in directory.rglob("*.parquet")}):
        if not folder.parts or folder.parts[0] not in skip:
            digest.update(f"{folder}\0{_tables_digest(directory / folder)}".encode())
    return digest.hexdigest()


def check_whole(artifact: Artifact) -> None:
    """Compare an artifact's rows and files with the hash in its manifest; once a process while no file changes.

    Raises:
        UserError: they differ, or the manifest tells no hash.
    """
    known = artifact.manifest.get("content_sha256")
    if not known:
        raise UserError(f"{artifact.path / MANIFEST} tells no content_sha256 to know its files by; make it again")
    files = sorted(path for path in artifact.path.rglob("*") if path.is_file() and path.name != MANIFEST)
    stamps = {str(path.relative_to(artifact.path)): stamp(path) for path in files}
    if _hash_as(artifact.path, tuple(stamps.items())) != known:
        newest = max(stamps, key=lambda name: int(stamps[name][1]), default="none")
        raise UserError(
            f"corrupt artifact: {artifact.path} is not the {artifact.name} that was made: its files differ from the "
            f"content_sha256 of its manifest (newest: {newest}); copy it again from where it was made, or make it again"
        )


@functools.lru_cache(maxsize=64)
def _hash_as(directory: Path, stamps: tuple[tuple[str, tuple[int, str]], ...]) -> str:
    return artifact_hash(directory)
