"""What a file begins with: the encoding of its text, and what it is where its name says otherwise.

Text is UTF-8, UTF-16 or UTF-32 by its byte order mark, or, since it begins with an ASCII character, by where that has
its zeros (RFC 4627, section 3); what is told of it in `encoding` holds for files that say nothing themselves.
"""

import codecs
import io
from pathlib import Path

from safer_ray.errors import UserError

HEAD = 512  # bytes that are looked at
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE: dict[tuple[bool, ...], str] = {
    (True, False, False, False): "utf-32-le",
    (False, False, False, True): "utf-32-be",
}  # which bytes are not zero
_STRANGE = ("idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined", "utf-7")  # no encodings of files
_MAGIC = (
    (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the data; run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the data; run `git annex get`"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook; unpack it, or save its sheet as CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook; save its sheet as CSV"),
    (b"\x1f\x8b", "compressed by gzip; give it a name that ends in .gz, once for each time that it was compressed"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; give it a name that ends in .zst"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"PAR1", "a Parquet file; give it a name that ends in .parquet"),
    (b"PARE", "an encrypted Parquet file; write it without encryption"),
    (b"ARROW1", "an Arrow file; give it a name that ends in .arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream; give it a name that ends in .arrow"),
    (b"SQLite format 3\x00", "an SQLite database; export its table as CSV"),
    (b"%PDF-", "a PDF document"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file; write its rows as Parquet"),
)
_PAGES = (
    (b"<!doctype html", "an HTML page, say of an error or a login; download the data again"),
    (b"<html", "an HTML page, say of an error or a login; download the data again"),
    (b"<?xml", "an XML document, say a store's error; download the data again"),
)
_OWN = {
    "parquet": (b"PAR1", b"PARE"),
    "arrow": (b"ARROW1", b"\xff\xff\xff\xff"),
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
}


def foreign(head: bytes, *, rows: bool = True) -> str | None:
    """Return what a file is by its first bytes, and the remedy, where it holds no text; `rows` it has where it is no
    free text, which may begin with markup."""
    for magic, what in _MAGIC:
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:32].lower()
    return next((what for page, what in _PAGES if rows and start.startswith(page)), None)


def check_head(head: bytes, path: Path, *, rows: bool = True) -> None:
    """Raises UserError where a file that should hold text begins as something else does."""
    if what := foreign(head, rows=rows):
        raise UserError(f"{path} is {what}")


def explain_head(head: bytes, path: Path, kind: str) -> None:
    """Raises UserError where a file that could not be read as `kind` (parquet, arrow, gzip, zstd) is none."""
    if head.startswith(_OWN[kind]) and not head.startswith(b"PARE"):
        return
    check_head(head, path)
    if not head:
        raise UserError(f"{path} is empty, and no {kind} file; write it again")
    if kind != "arrow":  # a stream of old begins with anything
        raise UserError(
            f"{path} is no {kind} file, whatever its name says: it begins with {head[:16]!r}; name it as what it is, "
            "or write it again"
        )


def encoding_of(head: bytes) -> str | None:
    """Return the encoding that a file's first bytes tell of, None for UTF-8 and all others."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    wide = _WIDE.get(tuple(byte != 0 for byte in head[:4]))
    if wide or len(head) < 2:
        return wide
    if head[0] and not head[1]:
        return "utf-16-le"
    return "utf-16-be" if head[1] and not head[0] else None


def known_encoding(name: str) -> str | None:
    """Return Python's own name of an encoding, None for UTF-8.

    Raises:
        UserError: it is none that files are written in, or one in which lines do not end with the byte 10.
    """
    wanted = "write one that Python knows, say cp1252, latin-1, gbk, shift_jis or utf-16"
    try:
        found = codecs.lookup(name)
        known = found.name.startswith(("utf-8", "utf-16", "utf-32"))
        usable = found.name not in _STRANGE and (known or "\n{".encode(found.name) == b"\n{")
    except (LookupError, UnicodeError, ValueError):
        usable = False
    if not usable:
        raise UserError(f"{name!r} is no encoding of text files; {wanted}")
    return None if found.name in ("utf-8", "utf-8-sig", "ascii") else found.name


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Put what becomes a byte that is no UTF-8 where bytes are no text, so that the row is refused."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("safer_ray.mark", _mark)


class Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8; what cannot be decoded is the byte 0xff."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self.stream = stream
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder(encoding)("safer_ray.mark")
        self.rest = memoryview(b"")
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.rest and not self.ended:
            block = self.stream.read(2**18)
            self.ended = not block
            text = self.decoder.decode(block, final=self.ended)
            self.rest = memoryview(text.encode("utf-8", "surrogateescape"))
        taken = min(len(buffer), len(self.rest))
        buffer[:taken] = self.rest[:taken]
        self.rest = self.rest[taken:]
        return taken

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()
