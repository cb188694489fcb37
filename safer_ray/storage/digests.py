"""Digests of a checkpoint's files, written when it is saved and compared before anything of it is loaded.

DeepSpeed's checkpoints are pickles, which run whatever is in them. A digest beside the files finds damage, and
files that came there by accident; whoever may write the whole folder can write its digests, and is trusted.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safer_ray.errors import UserError

RECORD = "sha256-"  # of the files that a worker has read, by its rank

Sum = Callable[[list[float]], Sequence[float]]  # over all workers


def record_digests(checkpoint: Path, rank: int, workers: int) -> None:
    """Write down the digests of this worker's share of the files; all workers have written theirs before."""
    digests = {name: _digest(checkpoint / name) for name in _files(checkpoint)[rank::workers]}
    (checkpoint / f"{RECORD}{rank}.json").write_text(json.dumps(digests), encoding="utf-8")


def check_digests(checkpoint: Path, rank: int, workers: int, over_workers: Sum, remedy: str) -> None:
    """Compare all files with what was written down, each worker its share; `remedy` is told of what does not fit.

    Raises:
        UserError: on all workers, where a file is another one, is gone or came later.
    """
    recorded: dict[str, str] = {}
    for file in sorted(checkpoint.glob(f"{RECORD}*.json")):
        recorded |= json.loads(file.read_text(encoding="utf-8"))
    names = sorted({*_files(checkpoint), *recorded})
    mine = set(names[rank::workers])
    changed = [float(name in mine and recorded.get(name) != _digest(checkpoint / name)) for name in names]
    wrong = [name for name, found in zip(names, over_workers(changed), strict=True) if found]
    if wrong:
        known = recorded.get(wrong[0])
        what = "is not the file that was saved" if known else "was saved without a digest, or came later"
        raise UserError(
            f"{checkpoint / wrong[0]} {what} ({len(wrong)} of {len(names)} files do not fit their SHA-256), so nothing "
            f"is loaded; put it back, or {remedy}"
        )


def _files(checkpoint: Path) -> list[str]:
    """Names of the files in and below a checkpoint, in order, without those that hold digests."""
    found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in found if not name.startswith(RECORD))


def _digest(path: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    return sha256_of(path) if path.is_file() else ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
