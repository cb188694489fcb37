"""Locations: paths of this machine, and URIs; the one place that decides which of them an option takes.

Every option and config field that names a file or a folder is declared by one of five functions: `on_disk`, which
understands `file://` and refuses every other URI, `anywhere`, which lets URIs of object stores through, `a_source`,
which lets names through that are looked up, too, `a_model`, which takes these or a path, or `a_config`, which knows the
shipped configs by name. All expand
`~`, and refuse what can be no path.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from safer_ray.errors import UserError

URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)  # also as `Path` writes one: s3:/b
NAMED = ("hub", "corpus", "package")  # what these words begin is looked up by those who know it
PACKAGE = Path(__file__).parents[1]
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of the configs: in an installed package, in a checkout
LONGEST = 255  # bytes of a name in a folder, on every file system in use


def _scheme(path: str | Path) -> str | None:
    """Return the scheme of a URI in lower case; None where it is none."""
    found = URI.match(str(path))
    scheme = found["scheme"].lower() if found else None
    return None if scheme in NAMED else scheme


def is_name(path: str) -> bool:
    """Return whether it is a name that is looked up, as of a data set on the hub."""
    return path.partition(":")[0] in NAMED and ":" in path


def on_disk(path: str | Path) -> Path:
    """Return a path of this machine; a `file:` URI is one.

    Raises:
        UserError: it is a URI of another kind, or names another machine or what is looked up; or it can be no path.
    """
    _refuse_empty(path)
    scheme = _scheme(path)
    if scheme is None:
        _refuse_name(path)
        return Path(_usable(str(path)))
    if scheme == "file":
        return Path(_usable(_of_file_uri(str(path))))
    raise UserError(f"{path} is a URI, and only a path of this machine is read or written here; give a local path")


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package, by name."""
    return {path.stem: path for folder in reversed(SHIPPED) for path in sorted(folder.glob("*.yaml"))}


def a_config(path: str | Path) -> Path:
    """Return the file of a config: a path of this machine, or else what a shipped config's name stands for; a folder is
    no config, a link is one, wherever it leads.

    Raises:
        UserError: as for `on_disk`.
    """
    found = on_disk(path)
    if os.path.lexists(found) and not found.is_dir():
        return found
    return shipped_configs().get(str(path), found)


def anywhere(path: str) -> str:
    """Return a path or a URI; a `file:` URI becomes the path that it names.

    Raises:
        UserError: a URI that lacks a slash, or a file on another machine, or a name that is looked up; or it can be no
            path.
    """
    _refuse_name(path)
    return a_source(path)


def a_source(path: str) -> str:
    """Return a name that is looked up as it is, and all else as `anywhere`; raises as that does."""
    _refuse_empty(path)
    scheme = _scheme(path)
    if scheme is None:
        return path if is_name(path) else _usable(path)
    if scheme == "file":
        return _usable(_of_file_uri(path))
    if "://" not in path:
        raise UserError(f"{path} is no URI; write {scheme}://BUCKET/NAME")
    return path


def a_model(path: str) -> str:
    """Return where a model lies on this machine, or a name that is looked up (`hub:`, `package:`) as it is.

    Raises:
        UserError: as for `on_disk`.
    """
    _refuse_empty(path)
    return path if is_name(path) else str(on_disk(path))


def cache_folder(name: str) -> Path:
    """Return the folder of that name in the cache: under SAFER_RAY_CACHE, by default ~/.cache/safer_ray."""
    return on_disk(os.environ.get("SAFER_RAY_CACHE", "~/.cache/safer_ray")) / name


def _refuse_empty(path: str | Path) -> None:
    if not str(path).strip():
        raise UserError("a path is empty, say of a variable that is not set; give it, or `.` for the current folder")


def _refuse_name(path: str | Path) -> None:
    if is_name(str(path)):
        kind = str(path).partition(":")[0]
        raise UserError(
            f"{path} is a name on the hub or the like, and only a path will do here; "
            f"write ./{kind}:… for a folder of that name"
        )


def check_utf8(path: str | Path) -> None:
    """Raises UserError where a name is no text, which neither a table nor a manifest could hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {os.fsencode(path)!r} is not UTF-8; rename it") from None


def _usable(path: str) -> str:
    """Return a path with the home directory in the place of `~`, which shells leave in `--out=~/x`.

    Raises:
        UserError: no file system takes it, or nobody has that name.
    """
    if "\0" in path:
        raise UserError(f"the path {path!r} holds a NUL, which no file system takes; check where it comes from")
    check_utf8(path)
    if path.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            raise UserError(f"{path}: no such user's home; write ./{path} for a file or folder of that name")
        path = expanded
    elif Path(path).parts[:1] and Path(path).parts[0].startswith("~"):
        path = os.path.abspath(path)  # ./~x is meant as it stands, also where it is read again
    longest = max(path.split("/"), key=len)
    if len(longest.encode()) > LONGEST:
        raise UserError(f"{longest[:40]}… is a name of {len(longest):,} characters; file systems take {LONGEST} bytes")
    return path


def _of_file_uri(uri: str) -> str:
    """Return the path in `file:///path`, `file://localhost/path` or `file:/path`."""
    rest = uri.partition(":")[2]
    host = ""
    if rest.startswith("//"):
        host, slash, rest = rest.removeprefix("//").partition("/")
        rest = slash + rest
    if host not in ("", "localhost") or not rest:
        raise UserError(f"{uri} names a file on {host or 'no'} machine; write file:///PATH, or the path alone")
    return unquote(rest)
