"""What a stranger on the network, or another user of the machine, gets from the Rays that our commands start."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
from support.knocking import Stranger
from support.ray_processes import environment, ray_folder, running, wait_until
from support.served import PAIR, bundle_of
from support.tiny_run import finished, write_config

from safer_ray.client import Client
from safer_ray.service.serve_settings import free_ports
from safer_ray.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DENIED = {None, 401, 403, 404, 405, 503}  # 503: by a proxy that has no process for it


def told(files):
    return "".join(path.read_text(errors="replace") for path in files.rglob("*") if path.is_file())


def assert_nobody_was_let_in(stranger):
    """Nothing runs, changes or shows anything; Ray's ports ask for a token, and other hosts reach no other port."""
    assert stranger.heard
    assert not stranger.marker.exists()
    for port, answers in stranger.heard.items():
        assert set(answers.jobs.values()) <= DENIED, port
        assert grpc.StatusCode.OK not in answers.calls.values(), port
        if port.everywhere:
            assert port.process.startswith("ray::ServeReplica"), port
            assert set(answers.pages.values()) == {None}, port
    codes = [answers.calls for answers in stranger.heard.values()]
    for service in ("InternalKVPut", "GetNodeStats", "PushTask"):  # the head's store, the node, its workers
        asked = {code for calls in codes for method, code in calls.items() if method.endswith(service)}
        assert grpc.StatusCode.UNAUTHENTICATED in asked, service


def secrets_in(process):
    """The tokens in the environment of a process and its children."""
    import psutil

    tokens = set()
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            tokens.add(each.environ().get("RAY_AUTH_TOKEN"))
        except psutil.Error:
            continue
    return tokens - {None, os.environ["RAY_AUTH_TOKEN"]}


@pytest.fixture
def home(tmp_path):
    """A home without a token; what a user set for clusters of others is no matter here."""
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}


def without_compilers(folder):
    """A PATH of all programs that are there, but for C and C++ compilers."""
    folder.mkdir()
    compilers = re.compile(r"(.*-)?(c\+\+|g\+\+|gcc|cc|c89|c99|cpp|clang(\+\+)?)(-[\d.]+)?")
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*"):
            if not compilers.fullmatch(program.name):
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


def test_a_training_lets_no_stranger_in_and_wants_no_compiler(pairs_dir, tmp_path, home):
    path, built = without_compilers(tmp_path / "bin"), tmp_path / "extensions"
    assert not any(shutil.which(name, path=path) for name in ("c++", "g++", "gcc", "cc"))
    words = ["reward", "--pairs", pairs_dir, "--out", tmp_path / "out", "--config", write_config(tmp_path)]
    command = [sys.executable, "-m", "safer_ray", *map(str, words), "--runner", "ray"]
    tokens = set()

    def ended():
        tokens.update(secrets_in(process) if process.poll() is None else ())
        return process.poll() is not None

    with ray_folder() as files:
        environ = environment(files, **home, PATH=path, TORCH_EXTENSIONS_DIR=str(built))
        with (
            running(command, environ, tmp_path / "said") as process,
            Stranger(process.pid, tmp_path / "marker") as stranger,
        ):
            wait_until(ended, 300)
        err = (tmp_path / "said.err").read_text()
        assert process.returncode == 0, err
        assert_nobody_was_let_in(stranger)
        assert any("RayTrainWorker" in port.process for port in stranger.heard)
        assert "RAY_AUTH_MODE=disabled does not count here" in err
        written = told(files) + "".join(told(tmp_path / name) for name in ("out", "home")) + err
    assert tokens
    assert all(token not in written for token in tokens)
    assert not list((tmp_path / "home").rglob("*token*"))
    assert read_json(tmp_path / "out/manifest.json")["metrics"]["train_pairs"] > 0
    assert not list(built.rglob("*"))  # nothing was compiled


def test_an_audit_lets_no_stranger_in(tmp_path, tmp_path_factory, home):
    run = finished(tmp_path_factory.getbasetemp())
    words = [
        "audit",
        "--auditor",
        run.artifacts["auditor"].path,
        "--pairs",
        f"{run.artifacts['pairs'].path}/part-*.parquet",
    ]
    words += ["--out", tmp_path / "out", "--runner", "ray", "--fragment-rows", "20"]
    command = [sys.executable, "-m", "safer_ray", *map(str, words)]
    with ray_folder() as files:
        with (
            running(command, environment(files, **home), tmp_path / "said") as process,
            Stranger(process.pid, tmp_path / "marker") as stranger,
        ):
            wait_until(lambda: process.poll() is not None, 300)
        assert process.returncode == 0, (tmp_path / "said.err").read_text()
    assert_nobody_was_let_in(stranger)
    assert read_json(tmp_path / "out" / "summary.json")
    assert not list((tmp_path / "home").rglob("*token*"))


def test_the_service_lets_no_stranger_in_and_starts_beside_another(tmp_path, tmp_path_factory, home):
    """The ports that Ray always takes are taken here, and so is the service's own."""
    import socket

    bundle = bundle_of(tmp_path_factory.getbasetemp()).path
    command = [sys.executable, "-m", "serve", f"auditor={bundle}"]
    with ray_folder() as files:
        environ = {k: v for k, v in environment(files, **home).items() if not k.startswith("RAY_SERVE")}
        environ["PYTHONPATH"] = os.pathsep.join(map(str, [environ["PYTHONPATH"], os.getcwd()]))
        held = []
        for port in (8000, 9000, 30000, 44217, 44227, 52365):
            try:
                held.append(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue  # somebody else has it already
        with running(command, environ, tmp_path / "said") as process:
            with Stranger(process.pid, tmp_path / "marker") as stranger:
                wait_until(lambda: "ready: " in (tmp_path / "said.out").read_text(), 180, process)
                url = (tmp_path / "said.out").read_text().split()[1].rstrip(";")
                with Client(url) as client:
                    assert client.score([PAIR])
                tokens = secrets_in(process)
            process.terminate()
            assert process.wait(60) == 0
        for each in held:
            each.close()
        assert url != "http://127.0.0.1:8000"
        assert "port 8000 is taken by another process: using " in (tmp_path / "said.err").read_text()
        assert_nobody_was_let_in(stranger)
        written = told(files) + told(tmp_path)
    assert all(token not in written for token in tokens)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_port_of_the_users_choice_that_is_taken_is_named(tmp_path, tmp_path_factory):
    import socket

    bundle = bundle_of(tmp_path_factory.getbasetemp()).path
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "serve", f"auditor={bundle}", f"port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: serve: cannot listen on 127.0.0.1:{port}: Address already in use; give another"
    )
    assert free_ports(1)
