"""A cluster that loses a node in the middle of a map and another in the middle of a training: FOLDER PAIRS."""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.session import ray_session
from support.ray_work import dawdle, fragments, fragments_done, mapping, notes, steps_done, training


def replace_node(cluster: Cluster, node_id: str) -> None:
    """End a node's processes as a power cut would, and bring another node; until the cluster has noticed both."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    while any(known["NodeID"] == node_id and known["Alive"] for known in ray.nodes()):
        time.sleep(0.1)  # what starts before that may be sent to the dead node, and waits a minute for it


def disturbed(work: Callable[[], Any], ready: Callable[[], bool], disturb: Callable[[], None]) -> Any:
    """What the work gives, disturbed as soon as it is ready for that."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        while not ready() and not result.done():
            time.sleep(0.02)
        if result.done():
            result.result()  # why it ended before it could be disturbed
        disturb()
        return result.result()


def main(folder: Path, pairs: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)  # room for one of the two workers, and for two actors
    config = RayConfig(address=cluster.address)
    told: dict[str, Any] = {}

    def lose_a_mapper() -> None:
        told["fragments"] = fragments_done(folder)
        told["mapper"] = notes(folder, "map")[-1].node
        replace_node(cluster, told["mapper"])
        dawdle(folder, "map", False)

    def lose_the_first_trainer() -> None:
        told["step"] = steps_done(folder)
        told["trainer"] = next(note.node for note in notes(folder, "train") if note.rank == 0)
        replace_node(cluster, told["trainer"])
        dawdle(folder, "train", False)

    dawdle(folder, "map", True)
    dawdle(folder, "train", True)
    with ray_session(config):
        from safer_ray.distributed.ray_runner import RayRunner

        runner = RayRunner(config)
        counts = disturbed(
            lambda: runner.map(mapping(folder), fragments(folder), folder / "out"),
            lambda: fragments_done(folder) >= 1,
            lose_a_mapper,
        )
        (metrics,) = disturbed(
            lambda: runner.train([training(folder, pairs)]),
            lambda: steps_done(folder) >= 3,
            lose_the_first_trainer,
        )
    cluster.shutdown()
    print(json.dumps({"counts": vars(counts), "metrics": metrics} | told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
