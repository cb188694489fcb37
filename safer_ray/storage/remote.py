"""Objects of an object store as paths: what this package uses of `pathlib.Path`, over the filesystems of pyarrow.

An object is written whole, by one request or by a multipart upload that completes at its end; nothing is renamed.
Nothing is remembered between calls, so that a process sees at once what others have written. Requests that fail are
tried again, with growing pauses, AWS_MAX_ATTEMPTS times (default 10). Endpoint, region and credentials come from where
the AWS tools look for them, and stay there.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs

from safer_ray.errors import SaferError, UserError

ATTEMPTS = 10  # of a request
CONNECT_SECONDS, REQUEST_SECONDS = 10, 60
BUFFER = 4 * 2**20  # bytes of one request, of what is read in order
BY_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")  # other schemes are fsspec's
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Stat(NamedTuple):
    """Facts of an object, named as `os.stat` does."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@dataclass(frozen=True)
class Remote:
    """An object, or the folder that its name begins with: `scheme://bucket/key`."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __lt__(self, other: "Remote") -> bool:
        return self.parts < other.parts

    # Names

    @property
    def root(self) -> str:
        """Scheme and bucket."""
        scheme, _, rest = self.uri.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    @property
    def _key(self) -> PurePosixPath:
        return PurePosixPath(self.uri.removeprefix(self.root).strip("/"))

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.root, *self._key.parts)

    @property
    def name(self) -> str:
        return self._key.name

    @property
    def suffix(self) -> str:
        return self._key.suffix

    @property
    def parent(self) -> "Remote":
        return self._of(self._key.parent)

    def __truediv__(self, name: str) -> "Remote":
        return self._of(self._key / name)

    def with_name(self, name: str) -> "Remote":
        return self._of(self._key.with_name(name))

    def with_suffix(self, suffix: str) -> "Remote":
        return self._of(self._key.with_suffix(suffix))

    def is_relative_to(self, other: "Remote") -> bool:
        return self.parts[: len(other.parts)] == other.parts

    def relative_to(self, other: "Remote") -> PurePosixPath:
        if not self.is_relative_to(other):
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(*self.parts[len(other.parts) :])

    def absolute(self) -> "Remote":
        return self

    def _of(self, key: PurePosixPath) -> "Remote":
        return Remote(f"{self.root}/{key}" if key.parts else self.root)

    # What is there

    def _at(self) -> tuple[pa.fs.FileSystem, str]:
        with self.explained("reach"):
            filesystem, base = _filesystem(self.root)
        return filesystem, f"{base}/{self._key}" if self._key.parts else base

    def _info(self) -> pa.fs.FileInfo:
        filesystem, path = self._at()
        with self.explained("read"):
            return filesystem.get_file_info(path)

    def exists(self) -> bool:
        return self._info().type != pa.fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == pa.fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == pa.fs.FileType.Directory

    def stat(self) -> Stat:
        """Raises FileNotFoundError where there is no object."""
        info = self._info()
        if info.type != pa.fs.FileType.File:
            raise FileNotFoundError(f"no object at {self}")
        return Stat(info.size, info.mtime_ns / 1e9 if info.mtime_ns else 0.0, info.mtime_ns or 0)

    def stamp(self) -> tuple[int, str]:
        """Size in bytes, and what changes when the object does: its ETag, else its modification time.

        Raises:
            FileNotFoundError: there is no object.
        """
        with self.explained("read"), self.native() as file:
            size, told = file.size(), {name.lower(): value for name, value in (file.metadata() or {}).items()}
        etag = told.get("etag", b"")
        text = etag.decode() if isinstance(etag, bytes) else str(etag)
        # In quotation marks by RFC 9110, 8.8.3, which not every store writes.
        return size, text.strip('"') or str(self.stat().st_mtime_ns)

    def _listed(self, recursive: bool) -> Iterator[tuple["Remote", bool]]:
        """Yield what lies below, and whether it is an object; one request for a thousand."""
        filesystem, path = self._at()
        selector = pa.fs.FileSelector(path, allow_not_found=True, recursive=recursive)
        with self.explained("list"):
            found = filesystem.get_file_info(selector)
        for info in found:
            key = info.path.strip("/")[len(path.strip("/")) :].strip("/")
            if key:
                yield self / key, info.type == pa.fs.FileType.File

    def iterdir(self) -> Iterator["Remote"]:
        return (path for path, _ in self._listed(recursive=False))

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """Objects by a pattern of names, `**` for any number of folders."""
        wanted = PurePosixPath(pattern).parts
        for path, is_object in self._listed(recursive=len(wanted) > 1 or "**" in wanted):
            if is_object and fits(path.relative_to(self).parts, wanted):
                yield path

    def rglob(self, pattern: str) -> Iterator["Remote"]:
        return self.glob(f"**/{pattern}")

    # Reading and writing

    def native(self) -> pa.NativeFile:
        """The object for those that read it in pieces.

        Raises:
            FileNotFoundError: there is no object.
        """
        filesystem, path = self._at()
        with self.explained("read"):
            return filesystem.open_input_file(path)

    def open(self, mode: str = "rb", encoding: str | None = None) -> Any:
        assert mode in ("r", "rb"), f"an object cannot be opened as {mode!r}: it is written whole"
        stream = io.BufferedReader(self.native(), BUFFER)
        return stream if mode == "rb" else io.TextIOWrapper(stream, encoding=encoding or "utf-8")

    def read_bytes(self) -> bytes:
        with self.explained("read"), self.native() as file:
            return bytes(file.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write(self, blocks: Iterable[bytes | pa.Buffer]) -> None:
        """All blocks as one object, which is there when the last one is."""
        filesystem, path = self._at()
        with self.explained("write"):
            stream = filesystem.open_output_stream(path, compression=None)
            try:
                for block in blocks:
                    stream.write(block)
            except BaseException:  # a stream cannot be abandoned: what it closes to is no whole object, and goes again
                with contextlib.suppress(OSError):
                    stream.close()
                    filesystem.delete_file(path)
                raise
            stream.close()

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: objects need no folder."""

    def unlink(self, missing_ok: bool = False) -> None:
        filesystem, path = self._at()
        with self.explained("delete"), contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            filesystem.delete_file(path)

    def remove_below(self) -> None:
        """Delete every object below."""
        filesystem, path = self._at()
        with self.explained("delete"), contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """A request that failed for good as one line; that an object is not there stays FileNotFoundError.

        Raises:
            SaferError: the store refused, or did not answer.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise SaferError(
                f"cannot {what} {self}: {_without_secrets(error)}; check the address, the network and the "
                "credentials, then run the same command again: finished work is kept"
            ) from None


def fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the names of folders and a file are those that a glob asks for."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return fits(names, pattern[1:]) or bool(names and fits(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and fits(names[1:], pattern[1:])


def _without_secrets(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    for name in SECRETS:
        text = text.replace(os.environ.get(name) or "\0", f"({name})")
    return text


def remote(uri: str) -> Remote:
    """The object or folder that a URI names.

    Raises:
        UserError: no bucket, a password in the URI, or a scheme that nothing here can reach.
    """
    scheme, _, rest = uri.partition("://")
    bucket = rest.partition("/")[0]
    account, at, _ = bucket.rpartition("@")
    if at and (":" in account or scheme == "s3"):
        raise UserError(
            f"a {scheme}:// URI holds credentials, which would be written down; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment and leave them out"
        )
    if not bucket:
        raise UserError(f"{uri!r} names no bucket; write {scheme}://BUCKET/FOLDER")
    if scheme not in BY_ARROW:
        _known_to_fsspec(uri, scheme)
    return Remote(uri.rstrip("/"))


def _known_to_fsspec(uri: str, scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot reach {uri}: {error}; use s3://, or install what fsspec asks for") from None


@functools.cache
def _filesystem(root: str) -> tuple[pa.fs.FileSystem, str]:
    """The filesystem of a scheme and bucket, and what its paths begin with."""
    scheme, _, bucket = root.partition("://")
    if scheme == "s3":
        return _s3(bucket), bucket
    if scheme in BY_ARROW:
        filesystem, base = pa.fs.FileSystem.from_uri(root)
        return filesystem, base.rstrip("/")
    import fsspec

    listed, base = fsspec.core.url_to_fs(root, use_listings_cache=False)
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(listed)), base.rstrip("/")


def _s3(bucket: str) -> pa.fs.S3FileSystem:
    known = os.environ.get
    scheme, _, host = (known("AWS_ENDPOINT_URL_S3") or known("AWS_ENDPOINT_URL") or "").rpartition("://")
    options: dict[str, Any] = {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")} if host else {}
    region = known("AWS_REGION") or known("AWS_DEFAULT_REGION")
    if region is None and not host:
        with contextlib.suppress(OSError):
            region = pa.fs.resolve_s3_region(bucket)
    return pa.fs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        allow_delayed_open=True,  # what is small is one request
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=int(known("AWS_MAX_ATTEMPTS") or ATTEMPTS)),
        tls_ca_file_path=known("AWS_CA_BUNDLE"),
        **options,
    )
