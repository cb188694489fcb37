"""The errors that end a run with one clear line: what was wanted, what came, and the remedy."""

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

OF_A_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}  # what whoever named the path can put right


class SaferError(Exception):
    """A failure that is explained to the user in one line; the process ends with `exit_code`."""

    exit_code = 1


class UserError(SaferError):
    """Something that the user can put right: a path, a key, a value, a corrupt input."""

    exit_code = 2


class TooLargeError(UserError):
    """Rows that do not fit the memory, each by itself; all others could have been read."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons  # by row
        super().__init__(next(iter(reasons.values())))


def need_extra(extra: str, *modules: str) -> None:
    """Raises UserError unless the packages of an extra of this project are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'safer-ray[{extra}]'")


def one_line(text: str) -> str:
    """Return a text with what would break its line, or steer a terminal, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def explained(error: OSError | MemoryError) -> SaferError:
    """Return what a disk, a network or the memory refused as an error of one line, which names the path if there is
    one."""
    if isinstance(error, MemoryError):
        return SaferError(f"the memory does not suffice: {error or 'no more is given'}; ask for less at once")
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None:
        return SaferError(f"{reason} ({type(error).__name__}); mend it, then run the same command again")
    kind = UserError if error.errno in OF_A_PATH else SaferError
    return kind(f"{os.fsdecode(error.filename)}: {reason}; check the path, and what lies there")


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path` into one clear line.

    Raises:
        SaferError: the disk is full, over quota or read-only.
    """
    try:
        yield
    except SaferError:
        raise
    except Exception as error:
        reason = "No space left on device"  # safetensors says it in an error of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            reason = str(error.strerror)
        elif isinstance(error, OSError) or reason not in str(error):
            raise
        raise SaferError(
            f"cannot write under {path}: {reason}; free some space or choose another folder, "
            "then run the same command again: finished work is kept"
        ) from error
