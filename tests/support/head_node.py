"""A head node of a cluster, with its dashboard, for real jobs."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from safer_ray.distributed.submit import (
    connect,
    on_this_machine,
)
from safer_ray.errors import SaferError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_head(directory, gcs_port, dashboard_port):
    """A head node in a session of its own; its dashboard answers when this returns."""
    command = (
        f"ray start --head --block --disable-usage-stats --num-cpus=2 --include-dashboard=true --temp-dir={directory} "
        f"--port={gcs_port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard_port} "
        f"--dashboard-agent-listen-port=0 --ray-client-server-port={free_port()} --object-store-memory=100000000 "
        "--min-worker-port=0 --max-worker-port=0"
    )
    venv = str(Path(sys.executable).parent)
    environ = os.environ | {"PATH": f"{venv}{os.pathsep}{os.environ['PATH']}"}
    environ = {key: value for key, value in environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    with (Path(directory) / "start.log").open("w") as log:
        head = subprocess.Popen(command.split(), env=environ, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 90
    answer = None
    while True:
        try:
            connect(f"http://127.0.0.1:{dashboard_port}").list_jobs()
            if on_this_machine(f"http://127.0.0.1:{dashboard_port}"):
                return head
        except (SaferError, RuntimeError, OSError) as error:
            answer = error  # not up yet
        if time.monotonic() > deadline or head.poll() is not None:
            stop_head(head)
            raise RuntimeError((Path(directory) / "start.log").read_text()) from answer
        time.sleep(0.3)


def stop_head(head):
    """End a head node and every process of its session, and no other."""

    def members():
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == head.pid:
                    yield process

    everyone = list(members())
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(15)
    for process in {*everyone, *members()}:
        with contextlib.suppress(psutil.Error):
            process.kill()
    head.wait(10)


@pytest.fixture(scope="module")
def cluster():
    directory, port = tempfile.mkdtemp(prefix="sr-", dir="/tmp"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", "")
        patch.setenv("SAFER_NODE_SECRET", "open-sesame")
        head = start_head(directory, free_port(), port)
    yield f"http://127.0.0.1:{port}"
    stop_head(head)
    shutil.rmtree(directory, ignore_errors=True)
