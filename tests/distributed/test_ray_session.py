"""Joining and starting Ray: what is refused and how soon, what is waited for, what is left running."""

import json
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import ray
from support.ray_processes import NODE, at_work, environment, family, free_port, ray_folder, running, script, wait_until
from support.ray_work import write_input
from support.tiny_run import write_config

from safer_ray.config.sections import RayConfig
from safer_ray.distributed import session
from safer_ray.distributed.session import Need, address_of, check_shared, needs, ray_session, room
from safer_ray.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OTHER_VERSION, TOKEN = "2.59.0", "0123456789abcdef0123456789abcdef"
NO_TOKEN = {"HOME": "/nonexistent", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
OUTSIDE = ["unshare", "--pid", "--fork", "--mount-proc"]  # a machine of its own, as far as processes go
HIDING = ["unshare", "--mount"]


def allowed(prefix):
    try:
        return subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def join(address, monkeypatch=None):
    with ray_session(RayConfig(address=address)):
        pass


def run_command(folder, *assignments, prefix=(), **environ):
    """`safer-ray run --runner ray`: its exit code and its standard error."""
    words = [word for assignment in assignments for word in ("--set", assignment)]
    command = [*prefix, sys.executable, "-m", "safer_ray", "run", str(write_config(folder)), "--runner", "ray", *words]
    done = subprocess.run(
        command, env=environment(folder, **environ), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr


# Which address


@pytest.mark.parametrize(
    ("configured", "environ", "address"),
    [
        (None, None, None),
        (None, "", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
        ("local", "10.0.0.1:6379", None),
        (None, "local", None),
    ],
)
def test_the_config_goes_before_the_environment(monkeypatch, configured, environ, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environ is not None:
        monkeypatch.setenv("RAY_ADDRESS", environ)
    assert address_of(RayConfig(address=configured)) == address


# What is refused


@pytest.fixture
def uninitialised(monkeypatch):
    """As in a process that has not used Ray yet."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("uninitialised")
@pytest.mark.parametrize("by", ["config", "environment"])
def test_a_port_that_nobody_listens_on_is_refused_at_once(monkeypatch, by):
    address = f"127.0.0.1:{free_port()}"
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^no Ray cluster at {address}: Connection refused; .*`ray status` works"):
        join(address if by == "config" else None)
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("uninitialised")
def test_a_host_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"^no Ray cluster at nosuch\.invalid:6379: .*; check the address"):
        join("nosuch.invalid:6379")
    with pytest.raises(UserError, match=r"^no Ray cluster at a\.\.b:6379: "):
        join("a..b:6379")


@pytest.fixture(params=["says nothing", "hangs up", "speaks HTTP"])
def other_server(request):
    """The address of a server that is no cluster."""
    held = []

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if request.param == "speaks HTTP":
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            if request.param == "hangs up":
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


@pytest.mark.usefixtures("uninitialised")
def test_another_server_at_the_port_is_no_cluster_and_holds_nobody_up(other_server, monkeypatch):
    assert session.HEAD_SECONDS <= 15
    monkeypatch.setattr(session, "HEAD_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^no Ray cluster at {other_server}: what listens there .*check the port"):
        join(other_server)
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("uninitialised")
def test_ray_client_is_refused_with_the_way_to_submit():
    with pytest.raises(
        UserError, match=r"ray://head:10001: Ray Client is not supported; submit a job instead: `safer-"
    ):
        join("ray://head:10001")


@pytest.mark.usefixtures("uninitialised")
@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:0", "head:99999", "http://head:8265"])
def test_a_malformed_address_is_refused_with_the_right_form(address):
    with pytest.raises(UserError, match=rf"is '{address}': write HOST:PORT as `ray start` printed it, or `auto`"):
        join(address)


@pytest.mark.usefixtures("uninitialised")
def test_auto_without_a_cluster_on_this_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    with pytest.raises(
        UserError, match=r"`auto`, but no Ray cluster runs on this machine; start one with `ray start --h"
    ):
        join("auto")


@pytest.mark.usefixtures("uninitialised")
def test_auto_after_a_cluster_that_crashed_names_where_it_was(monkeypatch, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    with pytest.raises(UserError, match=r"^no Ray cluster at .*: Connection refused; check the address"):
        join("auto")


def test_the_command_says_it_in_one_line(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    code, err = run_command(tmp_path, f"ray.address={address}")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"safer-ray: no Ray cluster at {address}: Connection refused")
    assert not (tmp_path / "runs").exists()


# A cluster of another kind


@pytest.fixture(scope="module")
def strange():
    """The address of a cluster of another version, which wants a token."""
    with ray_folder() as folder:
        port = free_port()
        words = ["--head", "--block", f"--port={port}", f"--ray-client-server-port={free_port()}", "--num-cpus=1"]
        command = script("ray_start.py", OTHER_VERSION, "start", *words, "--include-dashboard=false", *NODE)
        environ = environment(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        with running(command, environ, folder / "head") as head:
            wait_until(lambda: "runtime started" in (folder / "head.out").read_text(), 120, head)
            yield f"127.0.0.1:{port}"


@pytest.mark.usefixtures("uninitialised")
def test_a_cluster_that_wants_a_token_says_so(strange):
    with pytest.raises(
        UserError, match=rf"^the Ray cluster at {strange} wants its token; set RAY_AUTH_MODE=token, and "
    ):
        join(strange)


def test_a_token_that_is_not_there_is_asked_for(strange, tmp_path):
    code, err = run_command(tmp_path, RAY_ADDRESS=strange, RAY_AUTH_MODE="token", **NO_TOKEN)
    assert (code, err.count("\n")) == (2, 1)
    assert "RAY_AUTH_MODE=token is set, but there is no token; give the cluster's as RAY_AUTH_TOKEN" in err


def test_a_cluster_of_another_ray_version_is_refused_with_both_versions(strange, tmp_path):
    code, err = run_command(tmp_path, RAY_ADDRESS=strange, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"safer-ray: the cluster at {strange} runs another version of Ray")
    assert f"Ray: {OTHER_VERSION}" in err
    assert f"Ray: {ray.__version__}" in err
    assert "install the cluster's versions, or use its image" in err


@pytest.mark.skipif(not allowed(OUTSIDE), reason="no process namespaces here")
def test_a_machine_that_is_no_node_of_the_cluster_is_told_to_submit(strange, tmp_path):
    environ = {"RAY_ADDRESS": strange, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    code, err = run_command(tmp_path, prefix=OUTSIDE, **environ)
    assert (code, err.count("\n")) == (2, 1)
    assert f"this machine is no node of the Ray cluster at {strange}; submit a job instead: `safer-ray submit" in err


# Too little

ONE_CPU, HALF, ONE_GPU = Need("", 1, 1, 0), Need("", 1, 0.5, 0), Need("", 1, 0.5, 1)
WITH_TASKS = Need("", 1, 1, 0, 0.5)


@pytest.mark.parametrize(
    ("need", "nodes", "processes"),
    [
        (ONE_CPU, [], 0),
        (ONE_CPU, [{}], 0),
        (ONE_CPU, [{"CPU": 0.9}], 0),
        (ONE_CPU, [{"CPU": 0.9}, {"CPU": 0.9}], 0),  # each is whole on one node
        (ONE_CPU, [{"CPU": 2.5}, {"CPU": 1.0}], 3),
        (HALF, [{"CPU": 2.0}], 4),
        (Need("", 1, 0.1, 0), [{"CPU": 0.3}], 3),  # 0.3 / 0.1 is a little less
        (ONE_GPU, [{"CPU": 8.0}], 0),
        (ONE_GPU, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 0.5, "GPU": 8.0}, {"CPU": 64.0}], 3),
        (Need("", 1, 1, 0.25), [{"CPU": 8.0, "GPU": 1.0}], 4),
        (WITH_TASKS, [{"CPU": 1.0}], 0),
        (WITH_TASKS, [{"CPU": 1.5}], 1),
        (WITH_TASKS, [{"CPU": 2.0}], 1),
        (WITH_TASKS, [{"CPU": 1.0}, {"CPU": 0.5}], 1),
        (WITH_TASKS, [{"CPU": 0.5}, {"GPU": 1.0}, {"CPU": 4.0}], 4),
        (WITH_TASKS, [{"CPU": 4.0}, {"CPU": 4.0}], 7),
        (WITH_TASKS, [{"CPU": 4.2}, {"CPU": 4.7}], 8),
    ],
)
def test_a_process_must_fit_whole_on_a_node_beside_the_tasks(need, nodes, processes):
    assert room(need, nodes) == processes


def test_what_a_config_asks_for_is_what_must_be_there_at_once():
    config = RayConfig(
        min_actors=3, max_actors=9, actor_cpus=2, actor_gpus=1, task_cpus=0.5, train_workers=4, worker_cpus=8
    )
    assert needs(config) == [Need("ray.min_actors", 3, 2, 1, 1), Need("ray.train_workers", 4, 8, 0)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"min_actors": 64, "max_actors": 64, "actor_cpus": 1},
            "ray.min_actors: 64 of 1 CPU and 0 GPU, with 0.5 CPU beside them for tasks",
        ),
        (
            {"min_actors": 4, "max_actors": 4, "actor_cpus": 1},  # all that there is, and nothing for tasks
            "ray.min_actors: 4 of 1 CPU and 0 GPU, with 0.5 CPU beside them for tasks",
        ),
        ({"actor_gpus": 1}, "ray.min_actors: 1 of 0.5 CPU and 1 GPU, with 0.5 CPU beside them for tasks"),
        ({"worker_cpus": 8.5}, "ray.train_workers: 2 of 8.5 CPU and 0 GPU"),
        (
            {"worker_gpus": 1, "actor_gpus": 1},
            "ray.min_actors: 1 of 0.5 CPU and 1 GPU, with 0.5 CPU beside them for tasks; "
            "ray.train_workers: 2 of 0.75 CPU and 1 GPU",
        ),
    ],
    ids=["64 actors", "no room for tasks", "a GPU", "large workers", "two things"],
)
def test_a_cluster_that_is_too_small_is_refused_with_all_that_is_missing(asked, said):
    began = time.monotonic()
    with pytest.raises(UserError) as caught, ray_session(RayConfig(**asked)):
        pass
    assert str(caught.value).startswith(f"the cluster is too small for {said}; its nodes have 4 CPU and 0 GPU. Ask for")
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """What `ray_grown_cluster.py` tells, of a cluster that was too small at first."""
    folder, out = write_input(tmp_path_factory.mktemp("grown"), 2), tmp_path_factory.mktemp("grown-out")
    with ray_folder() as files:
        said = folder / "said"
        with running(script("ray_grown_cluster.py", folder, out), environment(files), said) as process:
            process.wait(240)
        assert process.returncode == 0, said.with_suffix(".err").read_text()
        return json.loads(said.with_suffix(".out").read_text())


@pytest.mark.long
def test_a_node_that_joins_late_is_waited_for_and_then_work_goes_on(grown):
    assert 2 < grown["waited"] < 90
    assert grown["nodes"] == 2
    assert grown["counts"] == {"read": 20, "written": 20, "quarantined": 0, "reasons": {}}


@pytest.mark.long
def test_an_autoscaler_is_not_asked_any_longer_than_one_waits(grown):
    assert grown["asked"] == []


@pytest.mark.long
@pytest.mark.skipif(not allowed(HIDING), reason="no mount namespaces here")
def test_a_run_directory_that_a_node_does_not_see_is_refused(grown):
    assert grown["nodes at last"] == 3
    assert "is not there on " in grown["refused"]
    assert "set `root` to a folder that all of them see" in grown["refused"]
    assert grown["files"] == []


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_of_one_node_need_not_be_asked_what_it_sees(tmp_path):
    check_shared(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is left running


@pytest.mark.usefixtures("ray_session")
def test_a_ray_of_the_host_process_is_used_and_left_initialised():
    address = ray.get_runtime_context().gcs_address
    with ray_session(RayConfig(address="nosuch.invalid:6379")):
        assert ray.get_runtime_context().gcs_address == address
    assert ray.is_initialized()
    assert ray.get(ray.put(42)) == 42


def drive(tmp_path, files, **environ):
    """Map as a command; what it told, and all that it printed as errors."""
    said = tmp_path / "said"
    with running(script("ray_driver.py", write_input(tmp_path, 1)), environment(files, **environ), said) as process:
        process.wait(240)
    err = said.with_suffix(".err").read_text()
    assert process.returncode == 0, err
    (line,) = said.with_suffix(".out").read_text().splitlines()  # nothing but what the driver itself says
    return json.loads(line), err


@pytest.mark.usefixtures("ray_session")
def test_a_ray_of_its_own_is_quiet_and_stopped_even_beside_a_cluster(tmp_path):
    with ray_folder() as files:
        (files / "ray").mkdir()
        (files / "ray/ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        told, err = drive(tmp_path, files)
        assert err == ""
        assert told["counts"]["written"] == 10
        assert len(told["children"]) >= 2  # the raylet and the head's store at least
        left = [psutil.Process(pid) for pid in told["children"] if psutil.pid_exists(pid)]
        wait_until(lambda: not at_work(left), 15)


def test_a_cluster_without_a_token_is_joined_with_a_warning_and_left_running(tmp_path):
    """That one with a token is joined without a word, the tests of drivers that are killed see."""
    with ray_folder() as folder:
        port = free_port()
        words = ["--head", "--block", f"--port={port}", f"--ray-client-server-port={free_port()}", "--num-cpus=4"]
        command = script("ray_start.py", ray.__version__, "start", *words, "--include-dashboard=false", *NODE)
        environ = environment(folder, RAY_AUTH_MODE="disabled", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")  # on loopback
        with running(command, environ, folder / "head") as head:
            wait_until(lambda: "runtime started" in (folder / "head.out").read_text(), 120, head)
            told, err = drive(tmp_path, folder, RAY_ADDRESS=f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled")
            names = {process.name() for process in at_work(family(head.pid))}
            assert {"gcs_server", "raylet"} <= names
            assert told["children"] == []
    assert told["counts"]["written"] == 10
    (line,) = err.splitlines()
    assert line.startswith(
        f"the Ray cluster at 127.0.0.1:{port} asks nobody for a token: whoever reaches its ports runs"
    )
