"""Find what interrupted runs and audits left behind, told apart by name, place and content from all that is still of
use.

A run is a folder with artifacts (`STAGE-HASH/manifest.json`), or with the beginning of one or the lock of a stage; an
audit is a folder whose `audit.json` says so. Left alone is whatever a living process works on, and what lies below it,
and whatever is whole, a link, or has a name that this package does not give.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.data.audit_files import FLAGGED, FLAGGED_FILE, SCORES
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.storage.artifacts import SCRATCH, SETTINGS_FILE, SETTINGS_KEYS
from safer_ray.storage.lock import is_held, is_lock, locked
from safer_ray.storage.marks import MANIFEST, MANIFEST_KEYS

LOCK = "run.lock"
NAME = re.compile(r"[a-z][a-z_]*-[0-9a-f]{12}")  # STAGE-HASH
PARTIAL = ".partial-"
STAGE_LOCK = ".lock-"  # folder beside the --out of a single stage
TORN = re.compile(
    r"\.((part-\d{8}|plan)\.parquet|part-\d{8}\.jsonl|(\d{8}|audit|manifest|reviews|summary)\.json|report\.html|run\.lock)"
    rf"\.\d+|\.{re.escape(FLAGGED_FILE)}"
)
WRITTEN = (SCORES, FLAGGED, "quarantine", "done")  # folders of an audit
DAY = 86_400.0


class Leftover(NamedTuple):
    """A file or folder that nobody needs."""

    path: Path
    kind: str  # in words
    size: int  # bytes
    changed: float  # seconds since the epoch, of the newest file in it


Wanted = Callable[[Leftover], bool]


class Run(NamedTuple):
    """A folder of ours, and what was left in it; nothing is looked for where a living process works."""

    path: Path
    held: bool
    leftovers: list[Leftover]


# What is ours


def _tree(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError):
        tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not path.is_symlink() else {}
        return tree if isinstance(tree, dict) else {}
    return {}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_artifact(folder: Path) -> bool:
    return set(_tree(folder / MANIFEST)) >= MANIFEST_KEYS


def _is_audit(folder: Path) -> bool:
    return set(_tree(folder / SETTINGS_FILE)) >= SETTINGS_KEYS


def _is_partial(path: Path) -> bool:
    """Return whether it is an artifact in the making; one with a manifest is whole, and only waits for its name."""
    named = path.name.startswith(PARTIAL) and NAME.fullmatch(path.name.removeprefix(PARTIAL))
    return bool(named) and _is_folder(path) and not (path / MANIFEST).exists()


def _is_lock(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and is_lock(path)


def _stage_locks(folder: Path) -> list[Path]:
    """The folders in which single stages that write beside `folder`'s entries hold their locks."""
    return [p for p in sorted(folder.glob(f"{STAGE_LOCK}*")) if _is_folder(p) and _is_lock(p / LOCK)]


def _is_run(folder: Path) -> bool:
    entries = [entry for entry in folder.iterdir() if _is_folder(entry)]
    begun = any(_is_partial(entry) or (NAME.fullmatch(entry.name) and _is_artifact(entry)) for entry in entries)
    return begun or bool(_stage_locks(folder))


def _stages_at_work(folder: Path) -> bool:
    return any(is_held(lock / LOCK) for lock in _stage_locks(folder))


# What was left


def _measured(path: Path, kind: str) -> Leftover:
    files = [path] if not path.is_dir() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    stats = [file.lstat() for file in files] or [path.lstat()]
    size = sum(stat.st_size for stat in stats) if files else 0
    return Leftover(path, kind, size, max(stat.st_mtime for stat in stats))


def leftovers_of(folder: Path) -> Iterator[Leftover]:
    """Yield what was left in a run or an audit that no living process holds."""
    for path in sorted(folder.iterdir()):
        if _is_partial(path):
            yield _measured(path, "unfinished artifact")
    for path in _stage_locks(folder):
        if not is_held(path / LOCK):
            yield _measured(path, "lock of a dead process")
    if _is_lock(folder / LOCK) and not is_held(folder / LOCK):
        yield _measured(folder / LOCK, "lock of a dead process")
    audit = _is_audit(folder)
    for name in SCRATCH if audit else ():
        if _is_folder(folder / name):
            yield _measured(folder / name, "scratch of an audit")
    for place in (folder, *(folder / name for name in WRITTEN if audit)):
        for path in sorted(place.glob(".*")) if _is_folder(place) else ():
            if TORN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield _measured(path, "half-written file")


def find_runs(root: Path) -> Iterator[Run]:
    """The runs and audits in and below `root`; links are not followed.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"no folder at {root}; pass a folder of runs, say runs")
    for at, names, _ in os.walk(root):
        folder = Path(at)
        audit = _is_audit(folder)
        names[:] = sorted(name for name in names if not name.startswith("."))
        if not audit and _is_artifact(folder):
            names.clear()
        elif audit or _is_run(folder):
            held = is_held(folder / LOCK) or _stages_at_work(folder)
            if held or audit:
                names.clear()
            yield Run(folder, held, [] if held else list(leftovers_of(folder)))


# What is deleted


def old_enough(days: float, now: float | None = None) -> Wanted:
    """Return whether nothing in a leftover has changed for so many days."""
    before = (time.time() if now is None else now) - days * DAY
    return lambda leftover: leftover.changed <= before


def delete(run: Run, wanted: Wanted) -> list[Leftover]:
    """Delete the wanted leftovers of a run; those deleted. The run is locked meanwhile, and looked at again.

    Raises:
        UserError: a living process has come to hold it.
        SaferError: the disk is read-only.
    """
    if not any(wanted(leftover) for leftover in run.leftovers):
        return []
    deleted = [left for left in run.leftovers if left.path == run.path / LOCK]  # taking it frees it
    with explain_disk_errors(run.path), locked(run.path):
        if _stages_at_work(run.path):
            raise UserError(f"{run.path} is in use by a stage that writes there; wait for it")
        for leftover in leftovers_of(run.path):
            if wanted(leftover):
                _remove(leftover.path)
                deleted.append(leftover)
    return sorted(deleted)


def _remove(path: Path) -> None:
    if path.name.startswith(STAGE_LOCK):
        with locked(path):
            for torn in path.glob(f".{LOCK}.*"):
                torn.unlink()
        with contextlib.suppress(OSError):  # another process waits for it
            path.rmdir()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
