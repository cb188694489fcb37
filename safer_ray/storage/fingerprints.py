"""Tell whether a file is the one that was planned, wherever it lies now: by its bytes, or by what a store says of an
object.

A path, a size and a modification time that have not changed are believed. Where one of them has, the bytes decide: a
file's sha256 was taken when it was planned; an object's ETag is compared, or computed where it is an MD5.
"""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Protocol

from safer_ray.storage.files import as_path
from safer_ray.storage.remote import Remote

MD5 = re.compile(r"[0-9a-f]{32}")  # the ETag of an object that was uploaded in one piece
BLOCK = 2**20


class Planned(Protocol):
    """The facts that were recorded of a file."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...  # bytes
    @property
    def etag(self) -> str: ...  # modification time in ns, or an object's ETag
    @property
    def digest(self) -> str: ...  # sha256 of the first `size` bytes; empty: nobody took it


def digest_of(file: Path, size: int) -> str:
    """Return the sha256 of the first `size` bytes of a file."""
    return digests_of(file, [size])[size]


def digests_of(file: Path, sizes: list[int]) -> dict[int, str]:
    """Return the sha256 of the first bytes of a file, as many as each of `sizes` says, in one reading."""
    digest, at_byte, found = hashlib.sha256(), 0, {}
    with file.open("rb") as stream:
        for size in sorted(set(sizes)):
            _feed(digest, stream, size - at_byte)
            at_byte, found[size] = size, digest.hexdigest()
    return found


def _feed(digest: Any, stream: Any, size: int) -> None:
    while size > 0 and (block := stream.read(min(size, BLOCK))):
        digest.update(block)
        size -= len(block)


def needs_digest(file: Path, etag: str) -> bool:
    """Return whether a file is known by its bytes: objects are by their ETag, unless their store gives none."""
    return not isinstance(file, Remote) or etag.isdecimal()


def is_at(file: Path, path: str) -> bool:
    """Return whether a file is the one at `path`, also by way of links."""
    if isinstance(file, Remote) or "://" in path:
        return str(file) == path
    return str(file) == path or os.path.realpath(file) == os.path.realpath(path)


def begins_as(file: Path, now: tuple[int, str], was: Planned) -> bool:
    """Return whether a file, which is `now` of this size and stamp, begins with the bytes that were planned."""
    size, etag = now
    if size < was.size:
        return False
    by_etag = etag == was.etag and size == was.size and not etag.isdecimal()
    is_known = size == was.size or not was.digest  # grown within one tick of a clock, or with its time put back
    if by_etag or (etag == was.etag and is_known and is_at(file, was.path)):
        return True
    if was.digest:
        return still_holds(str(file), now, was.size, was.digest)
    return bool(MD5.fullmatch(was.etag)) and size == was.size and _md5_of(file) == was.etag


def _md5_of(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def still_holds(path: str, now: tuple[int, str], size: int, digest: str) -> bool:
    """Return whether a file of this size and stamp begins with the planned bytes; asked once a process."""
    return now[0] >= size and digest_of(as_path(path), size) == digest
