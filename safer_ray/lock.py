"""One writer a run directory: a lock file with host, process and heartbeat."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from safer_ray.background import repeated
from safer_ray.errors import UserError
from safer_ray.files import write_json

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


def _owner() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}


def _read(path: Path) -> dict[str, Any] | None:
    """The owner that a lock names; None where there is no lock or a damaged one."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "started"} <= set(owner) else None


def _is_held(path: Path) -> bool:
    """Whether a living process holds the lock; another host is believed until its heartbeat is old."""
    owner = _read(path)
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    try:
        return bool(psutil.Process(owner["pid"]).create_time() == owner["started"])
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory/run.lock` while the body runs.

    Raises:
        UserError: another living process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.lock"
    _take(path)
    try:
        with repeated(HEARTBEAT_SECONDS, lambda: _beat(path)):
            yield
    finally:
        if _read(path) == _owner():
            path.unlink(missing_ok=True)


def _take(path: Path) -> None:
    """Write our name into the lock unless a living owner stands there; one process at a time looks and writes."""
    guard = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if _is_held(path):
            owner = _read(path) or {}
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            raise UserError(f"{path.parent} is in use by {who}; wait for that run, or choose another name")
        write_json(_owner(), path)
    finally:
        os.close(guard)


def _beat(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
