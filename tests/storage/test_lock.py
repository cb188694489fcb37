"""One writer a run directory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from safer_ray.errors import UserError
from safer_ray.storage import lock as module
from safer_ray.storage import owners
from safer_ray.storage.lock import LockLost, locked

HOLDER = """
import sys, time
from pathlib import Path
from safer_ray.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc"]


def write_lock(directory, age=0.0, **owner):
    """A lock of this process, with other facts laid over it."""
    path = directory / "run.lock"
    path.write_text(json.dumps(owners.this_process() | owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def write_former_lock(directory, age=0.0, **owner):
    """As this package wrote them when it knew processes by the wall clock."""
    path = directory / "run.lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 0.0} | owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def quick(monkeypatch):
    """A heartbeat that a test can wait for."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)


def holding(directory, *before):
    command = [*before, sys.executable, "-c", HOLDER, str(directory)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    return holder


def assert_refused(directory, who):
    with pytest.raises(UserError, match=rf"is in use by {who}; wait for that run"), locked(directory):
        pass


def assert_free(directory):
    with locked(directory):
        assert json.loads((directory / "run.lock").read_text())["pid"] == os.getpid()


def test_a_lock_is_there_while_it_is_held_and_gone_after(tmp_path):
    with locked(tmp_path / "run"):
        owner = json.loads((tmp_path / "run/run.lock").read_text())
        assert owner["pid"] == os.getpid()
        assert owner["host"] == socket.gethostname()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_is_freed_when_its_body_fails(tmp_path):
    with pytest.raises(ValueError, match="oh"), locked(tmp_path):
        raise ValueError("oh")
    assert_free(tmp_path)


def test_a_living_holder_is_named_and_refused(tmp_path):
    with locked(tmp_path):
        assert_refused(tmp_path, rf"process {os.getpid()} on .*")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    with holding(tmp_path) as holder:
        assert_refused(tmp_path, f"process {holder.pid} on .*")
        holder.communicate()
    assert_free(tmp_path)


def test_a_killed_holders_lock_is_free_at_once_also_while_nobody_has_asked_how_it_ended(tmp_path):
    with holding(tmp_path) as holder:
        holder.kill()
        while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").exists()
        assert_free(tmp_path)


# Who lives


def test_a_living_process_keeps_its_lock_when_the_clock_is_set(tmp_path, monkeypatch):
    with holding(tmp_path) as holder:
        boot_time = psutil._pslinux.boot_time
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + 2)  # as a clock set by 2 s moves it
        assert_refused(tmp_path, f"process {holder.pid} on .*")
        holder.communicate()


def test_a_pid_that_another_process_took_over_does_not_hold(tmp_path):
    write_lock(tmp_path, start=owners.start_of(os.getpid()) - 1)
    assert_free(tmp_path)


def test_a_lock_of_another_boot_is_believed_until_its_heartbeat_is_old(tmp_path, quick):
    write_lock(tmp_path, boot="before", age=module.STALE_SECONDS / 2)
    assert_refused(tmp_path, "process .*")
    write_lock(tmp_path, boot="before", age=module.STALE_SECONDS + 5)
    assert_free(tmp_path)


def test_another_host_is_believed_until_its_heartbeat_is_old(tmp_path, quick):
    write_lock(tmp_path, host="elsewhere", age=module.STALE_SECONDS / 2)
    assert_refused(tmp_path, "process .* on elsewhere")
    write_lock(tmp_path, host="elsewhere", age=module.STALE_SECONDS + 5)
    assert_free(tmp_path)


def test_another_host_whose_clock_is_minutes_off_is_known_by_its_heartbeat(tmp_path, quick):
    path = write_lock(tmp_path, host="elsewhere", age=3600)
    beats = threading.Timer(0.03, lambda: os.utime(path, (time.time() - 3599,) * 2))
    beats.start()
    assert_refused(tmp_path, "process .* on elsewhere")
    beats.join()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="makes a namespace of processes")
def test_two_containers_of_one_host_and_name_do_not_take_each_others_locks(tmp_path, quick):
    with holding(tmp_path, *CONTAINER) as holder:
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == 1
        assert_refused(tmp_path, "process 1 on .*")
        second = subprocess.run(
            [*CONTAINER, sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert "is in use by process 1 on" in second.stderr
        holder.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_an_odd_name_is_known_by_its_start(tmp_path):
    odd = tmp_path / "a) R 1 (b"
    shutil.copy(shutil.which("sleep"), odd)
    with subprocess.Popen([odd, "60"]) as process:
        seconds = psutil.Process(process.pid).create_time() - psutil.boot_time()
        assert owners.start_of(process.pid) == round(seconds * os.sysconf("SC_CLK_TCK"))
        process.kill()
    assert owners.start_of(process.pid) is None


def test_where_there_is_no_proc_a_process_is_known_by_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(owners, "PROC", tmp_path / "none")
    owner = owners.this_process()
    assert owners.lives(owner)
    assert owners.lives(owner | {"start": owner["start"] + 0.1})
    assert owners.lives(owner | {"start": owner["start"] - 5}) is False
    assert owners.lives(owner | {"host": "elsewhere"}) is None


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"host": "h", "pid": 1}'])
def test_a_damaged_lock_is_free(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    assert_free(tmp_path)


# Locks from before


def test_a_former_lock_holds_while_its_process_lives(tmp_path):
    write_former_lock(tmp_path, started=psutil.Process().create_time(), age=1000)
    assert_refused(tmp_path, f"process {os.getpid()} on .*")


def test_a_former_lock_of_a_process_that_is_gone_is_free(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_former_lock(tmp_path, pid=ended.pid)
    assert_free(tmp_path)


def test_a_former_lock_whose_time_does_not_fit_is_believed_until_its_heartbeat_is_old(tmp_path, quick):
    write_former_lock(tmp_path, started=1.0)
    assert_refused(tmp_path, f"process {os.getpid()} on .*")
    write_former_lock(tmp_path, started=1.0, age=module.STALE_SECONDS + 5)
    assert_free(tmp_path)


# The heartbeat


def work_after(directory, disturb):
    """A run of which somebody disturbs the lock."""
    with locked(directory):
        disturb()
        time.sleep(30)


def test_the_heartbeat_renews_the_lock(tmp_path, quick):
    with locked(tmp_path):
        path = tmp_path / "run.lock"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 10


def test_a_lock_that_another_has_taken_is_not_renewed_and_ends_the_run(tmp_path, quick):
    message = (
        rf"^{tmp_path}/run.lock names process 1 on elsewhere: this run has lost its folder and ends; see that no other "
        "run works there, then run the same command again: finished work is kept$"
    )
    began = time.monotonic()
    with pytest.raises(LockLost, match=message):
        work_after(tmp_path, lambda: write_lock(tmp_path, host="elsewhere", pid=1, age=30))
    assert time.monotonic() - began < 5
    assert time.time() - (tmp_path / "run.lock").stat().st_mtime > 29


def test_a_lock_of_the_same_process_with_another_token_is_another(tmp_path, quick):
    with pytest.raises(LockLost, match=f"names process {os.getpid()}"):
        work_after(tmp_path, lambda: write_lock(tmp_path))


def test_a_lock_that_is_gone_ends_the_run(tmp_path, quick):
    with pytest.raises(LockLost, match=r"run.lock is gone: this run has lost its folder"):
        work_after(tmp_path, (tmp_path / "run.lock").unlink)


def test_a_lock_in_whose_place_a_folder_lies_ends_the_run(tmp_path, quick):
    def replace():
        (tmp_path / "run.lock").unlink()
        (tmp_path / "run.lock").mkdir()

    with pytest.raises(LockLost, match=r"run.lock is gone: this run has lost its folder"):
        work_after(tmp_path, replace)
    assert (tmp_path / "run.lock").is_dir()


def test_a_lock_around_another_ends_both_when_it_is_lost(tmp_path, quick):
    def work():
        with locked(tmp_path / "outer"):
            work_after(tmp_path / "inner", (tmp_path / "outer/run.lock").unlink)

    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(LockLost, match=rf"{tmp_path}/outer/run.lock is gone"):
        work()
    assert not (tmp_path / "inner/run.lock").exists()
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_body_that_makes_something_else_of_its_end_does_not_hide_it(tmp_path, quick):
    def work():
        (tmp_path / "run.lock").unlink()
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            sys.exit(3)

    with pytest.raises(LockLost, match="is gone"):
        work_after(tmp_path, work)


def test_a_body_in_another_thread_is_ended(tmp_path, quick):
    ended = []

    def run():
        try:
            with locked(tmp_path):
                (tmp_path / "run.lock").unlink()
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    time.sleep(0.01)
        except LockLost as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert [message for message in ended if "is gone" in message]


LOSER = """
import signal, sys, time
from pathlib import Path
from safer_ray.storage import lock
from safer_ray.cli.app import main
from safer_ray.errors import SaferError

lock.HEARTBEAT_SECONDS, lock.END_SECONDS = 0.05, 0.2
stubborn, folder = sys.argv[1] == "stubborn", Path(sys.argv[2])
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    with lock.locked(folder):
        print("held", flush=True)
        for number in range(10_000):
            try:
                time.sleep(0.01)
            except BaseException:
                if not stubborn:
                    raise
            (folder / "committed").write_text(str(number))
except SaferError as error:
    print(f"safer-ray: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("kind", ["plain", "deaf", "stubborn"])
def test_a_run_that_has_lost_its_lock_ends_with_one_line_and_commits_nothing_more(tmp_path, kind):
    command = [sys.executable, "-c", LOSER, kind, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "held"
        write_lock(tmp_path, host="elsewhere", pid=1)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith(f"safer-ray: {tmp_path}/run.lock names process 1 on elsewhere")
    assert err.count("\n") == 1
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"
    committed = (tmp_path / "committed").read_text()
    time.sleep(0.1)
    assert (tmp_path / "committed").read_text() == committed
