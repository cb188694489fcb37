"""One writer a run directory: a lock file with host, process and heartbeat."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from safer_ray.background import repeated
from safer_ray.errors import SaferError, UserError
from safer_ray.files import write_json
from safer_ray.remote import Remote

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
OBJECT_HEARTBEAT_SECONDS = 15.0
SETTLE_SECONDS = 1.0  # after which an object is read back
log = logging.getLogger(__name__)


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


def is_held(path: Path) -> bool:
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

    On an object store the owner is written, and read back a moment later: of two that come at once the one that wrote
    last goes on. It is no guarantee: both go on if one of them stalls for longer than that moment between its look and
    its write, and a process that stalls for a minute can be taken for dead by another host, as can one whose clock is a
    minute off the store's. Fragments that two processes do are then done twice, and written once: each has its name.

    Raises:
        UserError: another living process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.lock"
    is_object = isinstance(path, Remote)
    (_take_object if is_object else _take)(path)
    try:
        seconds = OBJECT_HEARTBEAT_SECONDS if is_object else HEARTBEAT_SECONDS
        with repeated(seconds, lambda: (_beat_object if is_object else _beat)(path)):
            yield
    finally:
        with contextlib.suppress(*([SaferError] if is_object else [])):  # the body's error says what is wrong
            if _read(path) == _owner():
                path.unlink(missing_ok=True)


def _refuse_if_held(path: Path) -> None:
    if is_held(path):
        _refuse(path)


def _refuse(path: Path) -> None:
    owner = _read(path) or {}
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    raise UserError(f"{path.parent} is in use by {who}; wait for that run, or choose another name")


def _take(path: Path) -> None:
    """Write our name into the lock unless a living owner stands there; one process at a time looks and writes."""
    guard = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        _refuse_if_held(path)
        write_json(_owner(), path)
    finally:
        os.close(guard)


def _take_object(path: Path) -> None:
    """As `_take`, where nobody can be kept from looking at the same time."""
    _refuse_if_held(path)
    write_json(_owner(), path)
    time.sleep(SETTLE_SECONDS)
    if _read(path) != _owner():
        _refuse(path)


def _beat(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)


def _beat_object(path: Path) -> None:
    """Write the owner again, unless another has come."""
    try:
        if _read(path) == _owner():
            write_json(_owner(), path)
        else:
            log.warning("%s names another process: two work on the same folder; stop one of them", path)
    except SaferError as error:
        log.warning("the heartbeat of this run failed: %s", error)
