"""Where things lie: paths of this machine, and URIs; the one place that decides which of them an option takes.

Every option and config field that names a file or a folder is declared by one of two functions: `on_disk`, which
understands `file://` and refuses every other URI, or `anywhere`, which lets URIs of object stores through.
"""

import re
from pathlib import Path
from urllib.parse import unquote

from safer_ray.errors import UserError

URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)  # also as `Path` writes one: s3:/b
NAMED = ("hub", "corpus", "package")  # what these words begin is looked up by those who know it


def _scheme(path: str | Path) -> str | None:
    """Return the scheme of a URI in lower case; None where it is none."""
    found = URI.match(str(path))
    scheme = found["scheme"].lower() if found else None
    return None if scheme in NAMED else scheme


def on_disk(path: str | Path) -> Path:
    """Return a path of this machine; a `file:` URI is one.

    Raises:
        UserError: it is a URI of another kind, or names another machine.
    """
    _refuse_empty(path)
    scheme = _scheme(path)
    if scheme is None:
        return Path(path)
    if scheme == "file":
        return _of_file_uri(str(path))
    raise UserError(f"{path} is a URI, and only a path of this machine is read or written here; give a local path")


def anywhere(path: str) -> str:
    """Return a path or a URI as it is; a `file:` URI becomes the path that it names.

    Raises:
        UserError: a URI that lacks a slash, or a file on another machine.
    """
    _refuse_empty(path)
    scheme = _scheme(path)
    if scheme is None:
        return path
    if scheme == "file":
        return str(_of_file_uri(path))
    if "://" not in path:
        raise UserError(f"{path} is no URI; write {scheme}://BUCKET/NAME")
    return path


def _refuse_empty(path: str | Path) -> None:
    if not str(path).strip():
        raise UserError("a path is empty, say of a variable that is not set; give it, or `.` for the current folder")


def _of_file_uri(uri: str) -> Path:
    """Return the path in `file:///path`, `file://localhost/path` or `file:/path`."""
    rest = uri.partition(":")[2]
    host = ""
    if rest.startswith("//"):
        host, slash, rest = rest.removeprefix("//").partition("/")
        rest = slash + rest
    if host not in ("", "localhost") or not rest:
        raise UserError(f"{uri} names a file on {host or 'no'} machine; write file:///PATH, or the path alone")
    return Path(unquote(rest))
