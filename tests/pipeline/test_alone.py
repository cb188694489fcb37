"""Work that is tried in a child: what ends that by itself, and what was ended by others."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import torch

from safer_ray.errors import SaferError
from safer_ray.pipeline import alone, cores
from safer_ray.pipeline.alone import Memory, how_it_ends

MB = 10**6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(alone, "PAUSES", (0.0,) * 5)


def quietly(end):
    """Without the traceback that pytest would print of the child."""
    return lambda: (faulthandler.disable(), end())


def kill_self(number):
    return quietly(lambda: os.kill(os.getpid(), number))


def take(megabytes, seconds=30.0):
    """Work that takes so much memory, in steps, and keeps it."""

    def work():
        held = []
        for _ in range(megabytes // 10):
            held.append(bytearray(os.urandom(1)) * (10 * MB))
            time.sleep(0.01)
        time.sleep(seconds)

    return work


@pytest.mark.parametrize(
    ("work", "how"),
    [
        (quietly(lambda: ctypes.string_at(0)), "SIGSEGV"),
        (quietly(os.abort), "SIGABRT"),
        (kill_self(signal.SIGBUS), "SIGBUS"),
        (lambda: os._exit(9), "exit code 9"),
        (lambda: os._exit(0), "exit code 0"),
        (kill_self(signal.SIGKILL), "SIGKILL, each of 5 times that it was tried alone"),
    ],
)
def test_work_that_ends_its_process_is_known_by_how(work, how):
    assert how_it_ends(work, "row a#1") == how


@pytest.mark.parametrize(
    "work",
    [
        lambda: None,
        lambda: 1 / 0,
        lambda: sys.exit(3),
        lambda: (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item(),
        kill_self(signal.SIGINT),
    ],
)
def test_work_that_returns_or_raises_does_not(work):
    torch.ones(300, 300) @ torch.ones(300, 300)  # whose threads the child has not
    assert how_it_ends(work, "row a#1") is None


@pytest.mark.parametrize("kills", [1, 4])
def test_a_stranger_who_kills_is_not_the_works_fault(kills):
    before = set(psutil.Process().children())  # of other tests, say a Ray

    def stranger():
        for _ in range(kills):
            while not (children := [child for child in psutil.Process().children() if child not in before]):
                time.sleep(0.001)
            children[0].kill()
            while children[0].is_running() and children[0].status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.001)
            while psutil.pid_exists(children[0].pid):
                time.sleep(0.001)

    thread = threading.Thread(target=stranger)
    thread.start()
    assert how_it_ends(lambda: time.sleep(0.5), "row a#1") is None
    thread.join()


def test_work_that_takes_what_memory_there_is_ends_its_process(monkeypatch):
    monkeypatch.setattr(alone, "memory_of_this_process", lambda: Memory(400 * MB, 300 * MB))
    assert how_it_ends(take(1000), "row a#1") == "it took 0.3 GB where 0.3 GB of memory were free"


def test_memory_that_others_take_is_not_the_works_fault(monkeypatch):
    free = iter([300, 300, 10] * 5)
    monkeypatch.setattr(alone, "memory_of_this_process", lambda: Memory(400 * MB, next(free, 10) * MB))
    message = r"^row a#1 could not be tried: memory ran out, which others took; .* nothing is held against the row$"
    with pytest.raises(SaferError, match=message):
        how_it_ends(take(20), "row a#1")


def test_a_signal_from_outside_is_not_the_works_fault():
    number = signal.SIGUSR1.value
    with pytest.raises(SaferError, match=f"row a#1 could not be tried: signal {number} came from outside"):
        how_it_ends(kill_self(signal.SIGUSR1), "row a#1")  # which nobody ignores, as `nohup` does SIGHUP


def test_a_child_ends_with_its_parent(tmp_path):
    parent = os.fork()
    if parent == 0:
        how_it_ends(lambda: ((tmp_path / "child").write_text(str(os.getpid())), time.sleep(60)), "row a#1")
        os._exit(0)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_work_that_takes_too_long_is_given_up_and_its_child_ends(monkeypatch):
    before = psutil.Process().children()  # of other tests, say a Ray
    monkeypatch.setattr(alone, "MOST_SECONDS", 0.2)
    assert how_it_ends(lambda: time.sleep(60), "row a#1") is None
    assert psutil.Process().children() == before


def test_the_memory_of_a_control_group_counts(monkeypatch, tmp_path):
    group = tmp_path / "job"
    group.mkdir()
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 5\ninactive_file 300\n")):
        (group / f"memory.{name}").write_text(text)
    (tmp_path / "memory.max").write_text("max\n")
    read = cores._read
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "_read", lambda path: "0::/job/\n" if path.name == "cgroup" else read(path))
    assert alone.memory_of_this_process() == Memory(1000, 400)
