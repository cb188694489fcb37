"""One writer a run directory."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from safer_ray import lock as module
from safer_ray.errors import UserError
from safer_ray.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from safer_ray.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def write_lock(directory, age=0.0, **owner):
    path = directory / "run.lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 0.0} | owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_lock_is_there_while_it_is_held_and_gone_after(tmp_path):
    with locked(tmp_path / "run"):
        owner = json.loads((tmp_path / "run/run.lock").read_text())
        assert owner["pid"] == os.getpid()
        assert owner["host"] == socket.gethostname()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_is_freed_when_its_body_fails(tmp_path):
    with pytest.raises(ValueError, match="oh"), locked(tmp_path):
        raise ValueError("oh")
    with locked(tmp_path):
        pass


def test_a_living_holder_is_named_and_refused(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=rf"is in use by .*{os.getpid()}.*wait for that run"),
        locked(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"process {holder.pid} on"), locked(tmp_path):
            pass
        holder.communicate()
    with locked(tmp_path):
        pass


def test_a_killed_holders_lock_is_free_at_once(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "held"
        holder.kill()
        holder.wait()
    assert (tmp_path / "run.lock").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_pid_that_another_process_took_over_does_not_hold(tmp_path):
    write_lock(tmp_path, started=1.0)  # this pid, but of a process that began long ago
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_lock_is_free(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with locked(tmp_path):
        pass


def test_another_host_is_believed_until_its_heartbeat_is_old(tmp_path):
    write_lock(tmp_path, host="elsewhere", age=module.STALE_SECONDS / 2)
    with pytest.raises(UserError, match="elsewhere"), locked(tmp_path):
        pass
    write_lock(tmp_path, host="elsewhere", age=module.STALE_SECONDS + 5)
    with locked(tmp_path):
        pass


def test_the_heartbeat_renews_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    with locked(tmp_path):
        path = tmp_path / "run.lock"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 100 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 10
