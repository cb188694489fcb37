"""What a compressed file holds; zeros behind gzip, which tapes and block devices leave there, end it."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray.storage.columnar import source_of


class Unpacked(io.RawIOBase):
    """A file's content. Raises OSError or EOFError where it cannot be unpacked."""

    stream: Any = None

    def __init__(self, path: Path, compression: str) -> None:
        self.path = path
        self.compression = compression
        self.given = 0  # bytes
        self.stream = pa.input_stream(_opened(path), compression=compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            block = self.stream.read(len(buffer))
        except OSError as error:
            block = self._behind(error, len(buffer))
        except zlib.error as error:
            raise OSError(f"zlib inflate failed: {error}") from error
        buffer[: len(block)] = block
        self.given += len(block)
        return len(block)

    def _behind(self, error: OSError, size: int) -> bytes:
        """Return what comes next by Python's own reader, which knows zeros behind the last member; from then on it is
        the one that reads."""
        if self.compression != "gzip" or isinstance(self.stream, gzip.GzipFile):
            raise error
        self.stream.close()
        self.stream = gzip.GzipFile(fileobj=_opened(self.path))
        try:
            self.stream.seek(self.given)
            return bytes(self.stream.read(size))
        except (OSError, EOFError, zlib.error):
            raise error from None

    def close(self) -> None:
        if not self.closed and self.stream is not None:
            self.stream.close()
        super().close()


def _opened(path: Path) -> Any:
    source = source_of(path)
    return pa.OSFile(str(source)) if isinstance(source, Path) else source
