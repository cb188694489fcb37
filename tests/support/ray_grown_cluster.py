"""A cluster of one node that another joins late, then one that does not see the run's directory: FOLDER OUT."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.session import ray_session
from safer_ray.errors import UserError
from support.ray_processes import NODE, end, script
from support.ray_work import fragments, mapping

LATE = 2.0
nodes: list[subprocess.Popen] = []


def join(address: str, *prefix: str) -> None:
    """Start a node of 2 CPUs that joins the cluster."""
    start = script("ray_start.py", ray.__version__, "start", f"--address={address}", "--block", "--num-cpus=2", *NODE)
    said = Path(os.environ["RAY_TMPDIR"]) / f"node-{len(nodes)}.out"
    with said.open("w") as out:
        nodes.append(subprocess.Popen([*prefix, *start], stdout=out, stderr=out))


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(folder: Path, out: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    config = RayConfig(address=cluster.address, min_actors=2, max_actors=2, actor_cpus=0.9, wait_seconds=90)
    told: dict[str, Any] = {}
    threading.Timer(LATE, join, [cluster.address]).start()
    began = time.monotonic()
    with ray_session(config):
        from safer_ray.distributed.ray_runner import RayRunner

        told["waited"] = time.monotonic() - began
        told["asked"] = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))
        told["nodes"] = alive()
        told["counts"] = vars(RayRunner(config).map(mapping(folder), fragments(folder), out / "first"))
        hide = f'mount -t tmpfs none {out} && exec "$@"'
        join(cluster.address, "unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")
        while alive() < 3 and nodes[-1].poll() is None:
            time.sleep(0.1)
        told["nodes at last"] = alive()
        try:
            RayRunner(config).map(mapping(folder), fragments(folder), out / "second")
        except UserError as error:
            told["refused"] = str(error)
        told["files"] = [path.name for path in (out / "second").rglob("*")]
    for node in nodes:
        end(node)
    cluster.shutdown()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
