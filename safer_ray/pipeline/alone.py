"""Trying rows alone, in a process that is watched, to learn whether it is they who end it.

A process that is gone leaves no word of why: a crash of its own, want of memory, for which the kernel kills whom it
likes, a node that is lost and a stranger's `kill -9` look alike to the process that comes in its place. A child tells:
its parent learns how it ended, and how much memory it took.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from safer_ray.errors import SaferError
from safer_ray.pipeline.cores import own_groups

HARMLESS = 87  # exit code of a child that has come to its end, whether the function returned or raised
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP")  # what a process does to itself
PAUSES = (0.0, 1.0, 2.0, 3.0, 4.0)  # seconds before each try
MEMORY_TRIES = 3  # that must have taken too much memory
POLL_SECONDS = 0.03
MOST_SECONDS = 900.0  # of a try; what takes longer does not end its process
OF_ROOM, OF_TOTAL = 1 / 2, 1 / 8  # memory that a row takes for itself: of what was free, and of all there is
STOP_AT = 0.9  # of the free memory, and
LOW = 0.07  # of all that is still free, before the kernel, or Ray, looks for somebody to kill
PDEATHSIG = 1  # of prctl: the child ends with its parent


class Memory(NamedTuple):
    """Bytes that this process may use, and those of them that are free now."""

    total: int
    free: int


class End(NamedTuple):
    """The end of a child: its exit code, or the negative number of a signal."""

    code: int
    grown: int  # bytes that it took beyond its parent's
    memory: Memory  # before
    short: bool  # whether memory ran low meanwhile, or the kernel has killed processes for want of it

    @property
    def took_memory(self) -> bool:
        return self.grown >= max(OF_ROOM * self.memory.free, OF_TOTAL * self.memory.total)


def is_possible() -> bool:
    """Return whether this process can be copied to be watched: not once it computes on a GPU."""
    torch = sys.modules.get("torch")
    return hasattr(os, "fork") and not (torch and torch.cuda.is_initialized())


def how_it_ends(work: Callable[[], Any], name: str) -> str | None:
    """Return how some work ends its process by itself; None where it does not.

    A crash or an exit counts at once; memory, when the work has taken it `MEMORY_TRIES` times: half of what was free
    and an eighth of all; a SIGKILL of which nothing is known, when every try ended with one.

    Raises:
        SaferError: something else ended the tries, say want of memory that others took; `name` is told.
    """
    taken, ends = 0, list[End]()
    for pause in PAUSES:
        time.sleep(pause)
        end = _tried(work)
        if end is None or end.code == HARMLESS:
            return None
        if end.code >= 0:
            return f"exit code {end.code}"
        if (name_of := signal.Signals(-end.code).name) in CRASHES:
            return name_of
        ends.append(end)
        taken += end.took_memory
        if taken == MEMORY_TRIES:
            return f"it took {_gigabytes(end.grown)} where {_gigabytes(end.memory.free)} of memory were free"
    if all(end.code == -signal.SIGKILL and (end.took_memory or not end.short) for end in ends):
        return f"SIGKILL, each of {len(ends)} times that it was tried alone"
    short = any(end.short for end in ends)
    why = "memory ran out, which others took" if short else f"signal {-ends[-1].code} came from outside"
    raise SaferError(
        f"{name} could not be tried: {why}; end what takes the memory or ends the processes, then run the same command "
        "again: finished work is kept, and nothing is held against the row"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


# A child


def _tried(work: Callable[[], Any]) -> End | None:
    """Do the work in a copy of this process; how that ended, None where it could not be made or took too long."""
    memory, kills, parent = memory_of_this_process(), _kills(), psutil.Process()
    info = parent.memory_info()
    # Pages of files that both map (libraries, weights) are not taken by the work.
    base, libc = info.rss - getattr(info, "shared", 0), ctypes.CDLL(None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which the child has none of and waits for none of
            child = os.fork()
    except OSError:
        return None
    if child == 0:
        _work_in_child(work, parent.pid, libc)
    status, grown, low, in_time = None, 0, False, time.monotonic() + MOST_SECONDS
    try:
        while status is None and time.monotonic() < in_time:
            time.sleep(POLL_SECONDS)
            grown = max(grown, _resident(child) - base)
            now = memory_of_this_process()
            low = low or now.free < LOW * now.total
            if low or grown > STOP_AT * memory.free:
                os.kill(child, signal.SIGKILL)
            _, status, usage = _ended(child)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status is None:
        return None
    most = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return End(os.waitstatus_to_exitcode(status), max(grown, most - base), memory, low or _kills() != kills)


def _ended(child: int) -> tuple[int, int | None, Any]:
    pid, status, usage = os.wait4(child, os.WNOHANG)
    return pid, status if pid else None, usage


def _resident(child: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(child).memory_info().rss)
    return 0


def _work_in_child(work: Callable[[], Any], parent: int, libc: Any) -> None:
    """Do the work, and end; with its parent, if that ends before."""
    try:
        with contextlib.suppress(AttributeError, OSError):
            libc.prctl(PDEATHSIG, int(signal.SIGKILL))
            Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than its parent
        if os.getppid() == parent:
            torch = sys.modules.get("torch")
            if torch:
                torch.set_num_threads(1)  # the threads that it had are not in the copy
            work()
    finally:
        os._exit(HARMLESS)


# Memory


def memory_of_this_process() -> Memory:
    """Return what the machine has, or less where a control group allows less."""
    machine = psutil.virtual_memory()
    found = [Memory(machine.total, machine.available), *_groups()]
    return Memory(min(memory.total for memory in found), min(memory.free for memory in found))


def _groups() -> Iterator[Memory]:
    """The limits of the control groups that this process is in."""
    for group, second in own_groups("memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        limit, used, cache = (
            names if second else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        total, current = _number(group / limit), _number(group / used)
        if total is not None and current is not None:
            # Pages of files count as used, and are given back as soon as memory is wanted.
            held = sum(int(words[1]) for words in map(str.split, _lines(group / "memory.stat")) if words[0] == cache)
            yield Memory(total, max(0, total - current + held))


def _kills() -> int | None:
    """Return how often the kernel has killed a process for want of memory; None where it does not tell."""
    counts = [int(words[1]) for words in map(str.split, _lines(Path("/proc/vmstat"))) if words[0] == "oom_kill"]
    return counts[0] if counts else None


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None  # `max` is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
