"""What is used of Ray that Ray does not promise: a new version of Ray is tried here first."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from safer_ray.distributed import ray_internals as internals
from safer_ray.distributed import ray_train as train
from safer_ray.distributed.node_messages import NodeMessages, in_our_words

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"\bray(\.\w+)*\._\w|\bray\.core\.generated|\bray\.train\.v2|\b_get_global_client\b")
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("folder", ["safer_ray", "serve", "jobs", "bench"])
def test_private_names_of_ray_are_in_one_module(folder):
    """But for names of its loggers."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name != "ray_internals.py":
            lines = [
                line for line in path.read_text().splitlines() if PRIVATE.search(line) and "__version__" not in line
            ]
            assert all("getLogger" in line for line in lines), (path, lines)


def test_the_handler_of_ctrl_c_that_is_left_out_is_called_so():
    (base,) = train._Trainer.__bases__
    assert list(inspect.signature(base._register_sigint_handler).parameters) == ["self", "controller"]


def test_the_callbacks_that_start_idle_processes_are_called_so(monkeypatch):
    """On a cluster that was joined, what a dead controller held is still given back."""
    (base,) = train._Trainer.__bases__
    assert list(inspect.signature(base._create_default_callbacks).parameters) == ["self"]
    config = {"scaling_config": train.ScalingConfig(num_workers=1), "run_config": train.RunConfig(name="callbacks")}
    names = {}
    for own in ([], ["a process"]):
        monkeypatch.setattr(internals, "own_processes", lambda own=own: own)
        names[bool(own)] = [
            type(each).__name__ for each in train._Trainer(train.work, **config)._create_default_callbacks()
        ]
    all_of_them = [type(each).__name__ for each in base(train.work, **config)._create_default_callbacks()]
    assert names[False] == [name for name in all_of_them if name != "DatasetsCallback"] != all_of_them
    assert set(names[False]) - set(names[True]) == {"PlacementGroupCleanerCallback"}


def test_what_is_uploaded_is_seen(tmp_path):
    for name in ("kept.txt", "deep/kept.txt", "left.txt", "ignored.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    seen = []
    internals.each_uploaded(tmp_path, ["left.txt"], seen.append)
    found = {str(path.relative_to(tmp_path)) for path in seen if path.is_file()}
    assert found == {"kept.txt", "deep/kept.txt", ".gitignore"}
    assert internals.upload_limit() >= 100 * 2**20


@pytest.mark.slow
def test_the_cluster_of_this_machine_is_found_with_its_nodes_and_logs(ray_session):
    import grpc

    address = ray.get_runtime_context().gcs_address
    (node,) = ray.nodes()
    assert internals.nodes_at(address, 30) == {node["NodeID"]}
    assert node["NodeID"] in internals.nodes_here()
    assert (internals.logs_folder() / "raylet.out").exists()
    assert internals.asks_for_a_token()
    assert internals.serve_client() is None
    assert {"gcs_server", "raylet"} <= {Path(part.args[0]).name for part in internals.own_processes()}
    with pytest.raises(grpc.RpcError):
        internals.nodes_at("127.0.0.1:9", 1)


LOST = """
import logging, os, signal, sys, time
from safer_ray.config.sections import RayConfig
from safer_ray.distributed.session import ray_session
from safer_ray.distributed.ray_internals import logs_folder
logging.basicConfig(level=logging.WARNING, format="%(message)s")
marker, work = sys.argv[1:]
with ray_session(RayConfig()):
    import ray
    class Works:
        def __call__(self, row):
            if row["id"] == 1 and not os.path.exists(marker):
                open(marker, "w").close()
                exec(work)
            return row
    rows = ray.data.from_items([{"id": i} for i in range(4)], override_num_blocks=4)
    print(len(rows.map(Works, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5).take_all()))
    time.sleep(2)
    print(logs_folder())
"""


def lost(tmp_path, work, **environment):
    """What a driver prints whose actor does `work` once."""
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path / "done"), work],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows, folder = done.stdout.split()
    assert rows == "4"
    return done.stderr, Path(folder)


@pytest.mark.slow
def test_an_actor_that_is_killed_is_told_with_its_cause_and_the_nodes_write_it_down(tmp_path):
    err, folder = lost(tmp_path, f"import os, time; time.sleep(1); os.kill(os.getpid(), {int(signal.SIGKILL)})")
    (line,) = [line for line in err.splitlines() if line]
    assert re.match(r"a process \(\d+ on 127\.0\.0\.1\) was lost: Worker unexpectedly exits with a", line)
    assert "Disconnecting worker" in (folder / "raylet.out").read_text()


NO_MEMORY = (
    "Task _map_task failed due to oom. There are infinite oom retries remaining, so the task will be retried. Error: 1 "
    "worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 15b6666ee749) "
    "was 4.84GB used / 23.54GB limit (0.205561)\nOOM kill reason: Memory usage exceeded threshold"
)  # as Ray wrote it


def test_processes_that_are_killed_for_memory_are_told():
    assert in_our_words(NO_MEMORY) == (
        "Ray killed 1 process(es) on 127.0.0.1, since its memory ran low (4.84GB used / 23.54GB limit); what they did "
        "is done again. Give it more memory, or fewer processes at once (ray.max_actors, ray.tasks)"
    )


def test_an_autoscaler_that_is_told_to_end_is_no_news():
    """A signal to a whole process group, as a terminal sends it, reaches Ray's processes before they are stopped."""
    failed = "The autoscaler failed with the following error:\n{}\n  File monitor.py, line 751, in <module>"
    assert in_our_words(failed.format("Terminated with signal 15")) is None
    assert "KeyError: 'head'" in in_our_words(failed.format("KeyError: 'head'"))


def test_messages_are_told_in_our_words_once_a_minute_a_kind(caplog):
    tell = NodeMessages()
    for pid in (7, 8):
        tell(
            "A worker died or was killed while executing a task by an unexpected system error. Worker ID: a Node ID: c "
            f"Worker IP address: 10.0.0.3 Worker port: 1 Worker PID: {pid} Worker exit type: SYSTEM_ERROR "
            "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common "
            "causes include: (1) the process was killed by the OOM killer"
        )
    tell("Task f failed. There are infinite retries remaining, so the task will be retried. Error: gone")
    assert [record.message for record in caplog.records] == [
        "a process (7 on 10.0.0.3) was lost: Worker unexpectedly exits with a connection error code 2. End of "
        "file; what it did is done again"
    ]
    assert in_our_words("No node\nfits this") == "No node fits this"
    assert in_our_words("A worker died or was killed") == (
        "a process was lost: nobody knows how; what it did is done again"
    )
