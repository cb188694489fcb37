"""Check what a command may replace or delete: an artifact of its own stage, and nothing that it reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safer_ray.errors import UserError
from safer_ray.storage.marks import MANIFEST, MANIFEST_KEYS
from safer_ray.storage.remote import Remote


def check_outside(out: Path, read: Iterable[Path]) -> None:
    """Raises UserError where `out` lies in a folder that is read: what is written there would become part of it."""
    above = {os.path.realpath(folder) for folder in out.absolute().parents} if not isinstance(out, Remote) else set()
    for path in read:
        if not isinstance(path, Remote) and os.path.realpath(path) in above:
            raise UserError(f"{out} lies in {path}, which this command reads; choose another place to write")


def check_doomed(doomed: Iterable[Path], read: Iterable[Path]) -> None:
    """Raises UserError where something that is read is, or lies in, what would be deleted."""
    lost = {os.path.realpath(path): path for path in doomed if not isinstance(path, Remote) and os.path.lexists(path)}
    for path in read if lost else ():
        if isinstance(path, Remote):
            continue
        real = Path(os.path.realpath(path))
        for folder in (real, *real.parents):
            if str(folder) in lost:
                raise UserError(
                    f"{lost[str(folder)]} is or holds {path}, which this command reads, and would be deleted; "
                    "choose another --out"
                )


def check_kind(path: Path, stage: str) -> None:
    """Raises UserError unless the folder `path` holds an artifact of a stage."""
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    ours = isinstance(found, dict) and found.keys() >= MANIFEST_KEYS
    if not ours or found["stage"] != stage:
        what = f"an artifact of stage {found['stage']!r}" if ours else f"a {MANIFEST} that is none of ours"
        raise UserError(f"{path} holds {what}; --fresh replaces {stage} alone: choose another --out")
