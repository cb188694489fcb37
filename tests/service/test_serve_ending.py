"""How the service ends: told to at any moment, killed, and on a cluster that goes on."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.ray_processes import at_work, environment, family, kill, ray_folder, running, wait_until
from support.served import bundle_of

from safer_ray.service import serve_settings
from safer_ray.service.serve_settings import free_ports, socket_folder
from safer_ray.service.shutdown import Ended, Ending

HERE = Path(__file__).parents[2]


@pytest.fixture
def started(tmp_path, tmp_path_factory):
    """The command, with a Ray of its own."""
    (port,) = free_ports(1)
    bundle = bundle_of(tmp_path_factory.getbasetemp())
    command = [sys.executable, "-W", "ignore", "-m", "serve", f"auditor={bundle.path}", f"port={port}"]
    with ray_folder() as files:
        environ = {name: value for name, value in environment(files).items() if not name.startswith("RAY_SERVE")}
        environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(HERE)])
        with running(command, environ, tmp_path / "said") as process:
            yield process


def has(process, name):
    """Whether a child of this name is there."""

    def found():
        return any(name in _words(child) for child in children(process))

    return found


def _words(child):
    try:
        return " ".join(child.cmdline()) or child.name()
    except psutil.NoSuchProcess:
        return ""


def children(process):
    return [child for child in family(process.pid)[1:] if at_work([child])]


MOMENTS = {
    "at once": lambda process: lambda: True,
    "while Ray starts": lambda process: has(process, "gcs_server"),
    "while Serve starts": lambda process: has(process, "ServeController"),
    "while the model is loaded": lambda process: has(process, "ServeReplica:safer-ray:Scorer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(number, moment, id=f"{number.name} {moment}", marks=() if number == quick else pytest.mark.long)
        for quick, moment in zip(itertools.cycle((signal.SIGINT, signal.SIGTERM)), MOMENTS, strict=False)
        for number in (signal.SIGINT, signal.SIGTERM)  # one handler takes both; each is sent at every other moment
    ],
)
def test_told_to_end_before_it_is_ready_it_does_with_a_line_and_leaves_nothing(started, tmp_path, moment, number):
    time.sleep(1)  # Python itself, which beside other work takes its time
    wait_until(MOMENTS[moment](started), 120, started)
    begun = children(started)
    os.killpg(started.pid, number)  # as a terminal does
    os.killpg(started.pid, number)
    assert started.wait(60) == 128 + number
    assert (tmp_path / "said.out").read_text() == ""
    assert (tmp_path / "said.err").read_text() == "ended before the service was ready\n"
    wait_until(lambda: not at_work(begun), 10)


@pytest.mark.long
def test_it_ends_where_its_ray_has_ended(started, tmp_path):
    wait_until(lambda: "ready: " in (tmp_path / "said.out").read_text(), 180, started)
    begun = children(started)
    next(child for child in begun if child.name() == "gcs_server").kill()
    assert started.wait(30) == 1
    assert (
        tmp_path / "said.err"
    ).read_text() == "error: Ray, on which this service runs, has ended; its logs say why\n"
    wait_until(lambda: not at_work(begun), 10)


@pytest.mark.long
def test_told_with_all_its_children_it_ends_as_told_alone(started, tmp_path):
    wait_until(lambda: "ready: " in (tmp_path / "said.out").read_text(), 180, started)
    begun = children(started)
    os.killpg(started.pid, signal.SIGTERM)
    assert started.wait(60) == 0
    assert (tmp_path / "said.err").read_text() == ""
    wait_until(lambda: not at_work(begun), 10)


@pytest.mark.long
def test_killed_it_leaves_its_port_to_others_within_seconds(started, tmp_path):
    wait_until(lambda: "ready: " in (tmp_path / "said.out").read_text(), 180, started)
    proxies = [child for child in children(started) if "haproxy" in child.name()]
    assert proxies
    left = kill(started)
    wait_until(lambda: not at_work(proxies), 15)
    wait_until(lambda: not [one for one in at_work(left) if "Agent" not in one.name()], 15)


def test_the_proxy_ends_with_the_process_that_started_it(tmp_path):
    """Ray's HAProxy has a parent that may be killed."""
    (tmp_path / "proxy").write_text("#!/bin/sh\necho $$ > $1\nexec sleep 60\n", encoding="utf-8")
    (tmp_path / "proxy").chmod(0o755)
    environ = os.environ | {"SAFER_RAY_PYTHON": sys.executable, "SAFER_RAY_HAPROXY": str(tmp_path / "proxy")}
    script = HERE / "safer_ray/service/haproxy.sh"
    starts = f"import subprocess; subprocess.run([{str(script)!r}, {str(tmp_path / 'pid')!r}])"
    with subprocess.Popen([sys.executable, "-c", starts], env=environ) as parent:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 30)
        proxy = psutil.Process(int((tmp_path / "pid").read_text()))
        assert at_work([proxy])
        parent.kill()
    wait_until(lambda: not at_work([proxy]), 10)


SETTINGS = """global
    stats socket /tmp/admin.sock mode 666 level admin
defaults
    timeout connect 5s
    errorfile 502 /tmp/502.http
frontend http_frontend
    bind {front}:8000
    mode http
frontend other
    bind {other}:9000
"""


@pytest.mark.parametrize(
    ("front", "other", "code"),
    [("*", "127.0.0.1", 0), ("127.0.0.1", "127.0.0.1", 0), ("127.0.0.1", "*", 1), ("*", "", 1)],
)
def test_the_service_may_listen_everywhere_and_nothing_else_may(tmp_path, front, other, code):
    (tmp_path / "haproxy.cfg").write_text(SETTINGS.format(front=front, other=other), encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if name != "SAFER_RAY_PYTHON"}
    command = ["sh", str(HERE / "safer_ray/service/haproxy.sh"), "-f", str(tmp_path / "haproxy.cfg")]
    ended = subprocess.run(
        command, env=environ | {"SAFER_RAY_HAPROXY": "/bin/true"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert ("binds everywhere" in ended.stderr) == bool(code)


@pytest.fixture
def short(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_settings, "SHORT", tmp_path)
    return tmp_path


def test_folders_of_services_that_were_killed_go_and_those_of_others_stay(short):
    (short / "sr-a-test's").mkdir()
    (short / "elsewhere").mkdir()
    (short / "elsewhere" / serve_settings.OWNER).touch()
    (short / "sr-link").symlink_to(short / "elsewhere")
    dead = short / "sr-dead"
    dead.mkdir()
    (dead / serve_settings.OWNER).touch()
    with socket_folder() as first:
        assert not dead.exists()
        with socket_folder() as second:
            assert first.exists()
        assert not second.exists()
    assert sorted(path.name for path in short.iterdir()) == ["elsewhere", "sr-a-test's", "sr-link"]
    assert (short / "elsewhere" / serve_settings.OWNER).exists()


def test_a_signal_is_held_back_while_something_may_not_be_left_half_done(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ending, done = Ending(), []
    ending.check()

    def begin():
        with ending.held():
            ending._tell(signal.SIGTERM, None)
            ending._tell(signal.SIGINT, None)
            done.append("all of it")

    with pytest.raises(Ended):
        begin()
    assert (done, ending.number) == (["all of it"], signal.SIGTERM)
    ending.wait()


def test_a_signal_ends_what_is_under_way_once():
    ending = Ending()
    with pytest.raises(Ended):
        ending._tell(signal.SIGINT, None)
    ending._tell(signal.SIGINT, None)  # what is taken back is not disturbed
    with pytest.raises(Ended):
        ending.check()
