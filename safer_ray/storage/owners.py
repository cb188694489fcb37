"""Processes as they name themselves in files, so that another process can tell whether they still live.

A process is known by its number and the clock ticks from the machine's start to its own, in a boot of the machine and
in a namespace of process numbers: containers of one host share the boot, not the numbers. No clock that is set enters.
"""

import os
import socket
import uuid
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")
START_SECONDS = 1.0  # where there is no /proc: start times closer than that are one
KEYS = {"host", "boot", "space", "pid", "start", "token"}


def this_process() -> dict[str, Any]:
    """Return this process as an owner, with a token that no other owner has."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "space": space(),
        "pid": pid,
        "start": start_of(pid),
        "token": uuid.uuid4().hex,
    }


def boot() -> str:
    """Return what a machine calls its present boot; nothing where it does not."""
    return _said(PROC / "sys/kernel/random/boot_id")


def space() -> str:
    """Return the namespaces in which this process' number and start are told; nothing where there are none."""
    try:
        return " ".join(os.readlink(PROC / "self/ns" / kind) for kind in ("pid", "time"))
    except OSError:
        return ""


def start_of(pid: int) -> float | None:
    """Return when a process began, in clock ticks after the machine, else in seconds; None where none lives."""
    if not (PROC / "self/stat").exists():
        try:
            return psutil.Process(pid).create_time()
        except psutil.NoSuchProcess:
            return None
    fields = _said(PROC / str(pid) / "stat").rpartition(")")[2].split()  # a name may hold spaces and brackets
    # A zombie (Z) or a dead one (X) has ended, and waits for its parent. `starttime` is field 22 of proc(5), the state
    # the third.
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def lives(owner: dict[str, Any]) -> bool | None:
    """Return whether an owner is a living process; None where it cannot be seen from here."""
    if (owner["host"], owner["boot"], owner["space"]) != (socket.gethostname(), boot(), space()):
        return None
    start = start_of(owner["pid"])
    if start is None:
        return None if _is_hidden(owner["pid"]) else False
    if (PROC / "self/stat").exists():
        return bool(start == owner["start"])
    return abs(start - owner["start"]) < START_SECONDS


def _is_hidden(pid: int) -> bool:
    """Return whether there is such a process, but another user's, of which /proc may tell nothing."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _said(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
