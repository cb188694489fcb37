"""One writer a run directory: a lock file that names its owner, whose heartbeat renews it.

An owner that can be seen from here (same boot of the same machine, same namespace of processes) holds its lock as long
as it lives; any other as long as its heartbeat goes on. An owner looks at every beat whether the lock still names it,
and ends its run where it does not.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from safer_ray.errors import SaferError, UserError
from safer_ray.storage import owners
from safer_ray.storage.background import heartbeat
from safer_ray.storage.files import make_folder, write_json
from safer_ray.storage.remote import Remote

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
OBJECT_HEARTBEAT_SECONDS = 15.0
SETTLE_SECONDS = 1.0  # after which an object is read back
END_SECONDS = 60.0  # that a run has to end in, once its lock is lost
FORMER = {"host", "pid", "started"}  # keys of locks that name an owner by the wall clock
NO_GUARD = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems
log = logging.getLogger(__name__)

Owner = dict[str, Any]


class LockLost(SaferError):  # noqa: N818
    """Another process has taken the run directory of this one, whose run ends."""


class _Ended(KeyboardInterrupt):
    """Ends the body of a lock that is lost, as Ctrl-C would: what it has begun is left as the next run wants it."""


def is_lock(path: Path) -> bool:
    """Return whether a file is a lock of ours."""
    return _read(path) is not None


def _read(path: Path) -> Owner | None:
    """Return the owner that a lock names; None where there is no lock, a damaged one or a folder of that name."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    return owner if isinstance(owner, dict) and owner.keys() in (owners.KEYS, FORMER) else None


def is_held(path: Path) -> bool:
    """Return whether a living process holds the lock; one that is not seen from here, while its heartbeat is young."""
    owner = _read(path)
    if owner is None:
        return False
    lives = _lives(owner)
    return _age(path) < STALE_SECONDS if lives is None else lives


def _lives(owner: Owner) -> bool | None:
    """As `owners.lives`, also of an owner named by the wall clock, which may have been set since."""
    if "started" not in owner:
        return owners.lives(owner)
    if owner["host"] != owners.this_process()["host"]:
        return None
    try:
        return True if psutil.Process(owner["pid"]).create_time() == owner["started"] else None
    except psutil.NoSuchProcess:
        return False


def _age(path: Path) -> float:
    """Return the seconds since the last heartbeat; the clocks of both sides must agree to seconds."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory/run.lock` while the body runs.

    The owner is written, and read back: on an object store a moment later, so that of two that come at once the one
    that wrote last goes on. Should both go on, since one of them stalled between its look and its write, or should a
    process that stalled for a minute have been taken for dead, the one whose name is gone ends at its next heartbeat.
    Fragments that two processes did until then are done twice, and written once: each has its name.

    Raises:
        UserError: another living process holds it, or something else lies where it belongs.
        LockLost: another process took it; nothing of the body went on.
    """
    make_folder(directory)
    path, owner = directory / "run.lock", owners.this_process()
    is_object = isinstance(path, Remote)
    (_take_object if is_object else _take)(path, owner)
    seconds = OBJECT_HEARTBEAT_SECONDS if is_object else HEARTBEAT_SECONDS
    body = _Body()
    try:
        with body.endable(), heartbeat(seconds, lambda: _beat(path, owner, body)):
            yield
    except BaseException as error:
        if body.why is None:
            raise
        raise LockLost(body.why) from error
    else:
        if body.why is not None:
            raise LockLost(body.why)
    finally:
        with contextlib.suppress(*([SaferError] if is_object else [])):  # the body's error says what is wrong
            if _read(path) == owner:
                path.unlink(missing_ok=True)


def _refuse_if_held(path: Path) -> None:
    if is_held(path) or _beats(path):
        _refuse(path)


def _beats(path: Path) -> bool:
    """Return whether the heartbeat of an owner that is not seen from here goes on, whatever the clocks say of it."""
    owner = _read(path)
    if owner is None or _lives(owner) is not None:
        return False
    seconds = OBJECT_HEARTBEAT_SECONDS if isinstance(path, Remote) else HEARTBEAT_SECONDS
    # Twice as long as its beat: a beat may be late, but not missing.
    age, end = _changed(path), time.monotonic() + 2 * seconds
    while time.monotonic() < end:
        time.sleep(seconds / 10)
        if _changed(path) != age:
            return path.exists()
    return False


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _named(owner: Owner | None) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "another process"


def _refuse(path: Path) -> None:
    raise UserError(f"{path.parent} is in use by {_named(_read(path))}; wait for that run, or choose another name")


def _take(path: Path, owner: Owner) -> None:
    """Write the owner into the lock unless a living one stands there; one process at a time looks and writes."""
    # On the folder: a lock file of its own would have to be made and removed, which is the race that is to be kept out.
    guard = os.open(path.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_GUARD:
                raise
            return _take_object(path, owner)
        _refuse_if_held(path)
        write_json(owner, path, durable=False)
        if _read(path) != owner:
            _refuse(path)
    finally:
        os.close(guard)


def _take_object(path: Path, owner: Owner) -> None:
    """As `_take`, where nobody can be kept from looking at the same time."""
    _refuse_if_held(path)
    write_json(owner, path, durable=False)
    time.sleep(SETTLE_SECONDS)
    if _read(path) != owner:
        _refuse(path)


# The heartbeat


class _Body:
    """The body that runs while a lock is held, and how it is ended from the heartbeat's thread."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.lost_at = 0.0
        self.thread = threading.get_ident()
        self.is_main = threading.current_thread() is threading.main_thread()

    @contextlib.contextmanager
    def endable(self) -> Iterator[None]:
        """Inside, a signal ends the body: it wakes what waits, and is not deaf where Ctrl-C is."""
        before = signal.getsignal(signal.SIGUSR2)

        def end(number: int, frame: FrameType | None) -> None:
            if self.why is not None:
                raise _Ended
            if callable(before):  # a lock around this one may be the one that is lost
                before(number, frame)

        if self.is_main:
            signal.signal(signal.SIGUSR2, end)
        try:
            yield
        finally:
            if self.is_main:
                signal.signal(signal.SIGUSR2, before or signal.SIG_DFL)

    def end(self, why: str) -> None:
        """End the body; the process, where the body does not come to its end."""
        if self.why is None:
            self.why, self.lost_at = why, time.monotonic()
            if self.is_main:
                signal.pthread_kill(self.thread, signal.SIGUSR2)
            else:
                # Signals reach the main thread alone; in any other one an exception is raised at its next byte code.
                raised = ctypes.py_object(_Ended)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), raised)
        elif time.monotonic() - self.lost_at > END_SECONDS:
            print(f"safer-ray: {self.why}", file=sys.stderr, flush=True)
            os._exit(LockLost.exit_code)


def _beat(path: Path, owner: Owner, body: _Body) -> None:
    """Renew the lock while it names its owner; end the body when it does not."""
    if body.why is not None:
        body.end(body.why)
        return
    try:
        found = _renew_object(path, owner) if isinstance(path, Remote) else _renew(path, owner)
    except (SaferError, OSError) as error:
        log.warning("the heartbeat of this run failed: %s", error)
        return
    if found != owner:
        gone = "is gone" if found is None else f"names {_named(found)}"
        body.end(
            f"{path} {gone}: this run has lost its folder and ends; see that no other run works there, then run the "
            "same command again: finished work is kept"
        )


def _renew(path: Path, owner: Owner) -> Owner | None:
    """Touch the lock that names the owner, and no other that comes in its place; the owner that it names."""
    try:
        with path.open("rb") as stream:
            # Read and renewed through one open file: what comes in its place meanwhile is another, and is not touched.
            found = json.loads(stream.read())
            if found == owner:
                os.utime(stream.fileno())
            return found if isinstance(found, dict) else None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None


def _renew_object(path: Path, owner: Owner) -> Owner | None:
    """Write the owner again where the object names it; the owner that it names."""
    found = _read(path)
    if found == owner:
        write_json(owner, path)
    return found
