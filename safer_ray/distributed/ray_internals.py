"""Names of Ray that Ray does not promise: each name has its test in
`tests/distributed/test_ray_internals.py`, and Ray is held to the minor version that was tested."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LEVEL = "RAY_BACKEND_LOG_LEVEL"  # of Ray's C++ part


def asks_for_a_token() -> bool:
    """Return whether the Ray that this process uses, or is about to, asks for a token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return is_token_auth_enabled()


def read_environment_again(loopback: str) -> None:
    """Let Ray read its variables again, where it is imported already; it does so once, as it is."""
    if "ray" in sys.modules:
        from ray._private import ray_constants
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(loopback, not ray_constants.IS_WINDOWS_OR_OSX)


@contextlib.contextmanager
def quiet_driver() -> Iterator[None]:
    """In the body, a process that begins to use Ray hears of its C++ part only what is fatal, on standard error and in
    its log; the cluster's own processes go on writing down all else."""
    from ray._private import worker

    connect = worker.connect

    def quietly(*arguments: Any, **options: Any) -> Any:
        before = os.environ.get(LEVEL)
        os.environ[LEVEL] = before or "fatal"
        try:
            return connect(*arguments, **options)
        finally:
            if before is None:
                del os.environ[LEVEL]

    worker.connect = quietly
    try:
        yield
    finally:
        worker.connect = connect


def on_node_messages(tell: Callable[[str], None]) -> None:
    """Hand what Ray tells a driver of its nodes to `tell`; it would print it on standard output."""
    from ray._private import worker

    def told(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            tell(line)

    worker.print_to_stdstream = told


def logs_folder() -> Path:
    """Return where the Ray that this process uses keeps its logs on this node."""
    from ray._private import worker

    return Path(worker.global_worker.node.get_logs_dir_path())


def own_processes() -> list["subprocess.Popen[bytes]"]:
    """Return the processes of the Ray that this process started."""
    from ray._private import worker

    node: Any = worker._global_node
    return [info.process for infos in node.all_processes.values() for info in infos]


def needed_callbacks(callbacks: list[Any]) -> list[Any]:
    """Return the callbacks of a Ray Train group without those that start processes which have nothing to do here: no
    loop takes Ray's data sets, and a Ray that this process started ends with it, with all that groups hold of it."""
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if own_processes() else (DatasetsCallback,)
    return [callback for callback in callbacks if not isinstance(callback, idle)]


def cluster_here() -> str:
    """Return HOST:PORT of the cluster whose node this machine is; raises ConnectionError where there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def nodes_here() -> set[str]:
    """Return the ids of Ray's nodes that run on this machine."""
    from ray._private.services import find_node_ids

    return set(find_node_ids())


def nodes_at(address: str, timeout: float) -> set[str]:
    """Return the ids of a cluster's nodes, as its head node at HOST:PORT tells; raises grpc.RpcError where it does
    not."""
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with create_gcs_channel(address) as channel:
        asked = gcs_service_pb2.GetAllNodeInfoRequest()  # type: ignore[attr-defined]
        known = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(asked, timeout=timeout)
    return {node.node_id.hex() for node in known.node_info_list}


def upload_limit() -> int:
    """Return how many bytes a cluster's dashboard takes as a working directory."""
    from ray._private import ray_constants

    return int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE)


def each_uploaded(folder: Path, excludes: list[str], seen: Callable[[Path], None]) -> None:
    """Call `seen` with each file and folder of a working directory that Ray would upload."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    packaging._dir_travel(folder, [packaging._get_excludes(folder, excludes)], seen, gitignore)


def serve_client() -> Any:
    """Return the client of the Serve that runs on this process's cluster, which has its `http_config`; None where none
    runs."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def leave_signals_alone() -> None:
    """Keep Ray from taking SIGTERM; what it does then ends the process in the middle of anything."""
    from ray._private import utils

    utils.set_sigterm_handler = lambda *_: None
