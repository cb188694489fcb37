"""Starting or joining Ray, quietly, and stopping only what was started here."""

import contextlib
import logging
import math
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Read when ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # also until it is seen that a group has ended

import grpc
import ray.data  # sets the levels of its loggers as it is imported; `quiet` comes after
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.node_messages import NodeMessages
from safer_ray.distributed.own_ray import hushed, own_ray
from safer_ray.distributed.ray_internals import (
    asks_for_a_token,
    cluster_here,
    nodes_at,
    nodes_here,
    on_node_messages,
)
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline.cores import usable_cpus
from safer_ray.storage.remote import Remote

CONNECT_SECONDS = 5.0
IDLE_MS = 300_000  # task processes of a Ray of our own wait so long for the next stage: they have loaded torch
HEAD_SECONDS = 10.0  # until a head node under load has answered
NODE_SECONDS = 120.0  # until a node has, or is known to be lost
OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of our own; what streams between operators is a few fragments
log = logging.getLogger(__name__)
NOISY = ("ray", "ray.data", "ray.train", "ray.serve", "ray.tune")


class Need(NamedTuple):
    """So many processes at once, each with its share of a node, and CPUs that must be left for tasks on one node."""

    what: str
    processes: int
    cpus: float
    gpus: float
    tasks: float = 0


def needs(config: RayConfig, shards: int = 1) -> list[Need]:
    """Return what the stages ask for, at least: mapping and training never run side by side."""
    tasks = 2 * config.task_cpus  # one that reads, one that commits: without them actors hold all and wait for ever
    pools = config.pools(shards)
    actors = sum(pool.min_actors for pool in pools)
    each = [Need("ray.shard_pools", p.min_actors, p.actor_cpus, p.actor_gpus, tasks) for p in dict.fromkeys(pools)]
    cpus = sum(pool.min_actors * pool.actor_cpus for pool in pools) / actors
    gpus = sum(pool.min_actors * pool.actor_gpus for pool in pools) / actors
    return [
        *(each if len(each) > 1 else []),  # each fits alone, and on an average all do
        Need("ray.min_actors", actors, cpus, gpus, tasks),
        Need("ray.train_workers", config.train_workers, config.worker_cpus, config.worker_gpus),
    ]


def address_of(config: RayConfig) -> str | None:
    """The cluster to join; None for a Ray of our own."""
    address = config.address
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    return None if address == "local" else address


@contextlib.contextmanager
def ray_session(config: RayConfig, shards: int = 1, *, verbose: bool = False) -> Iterator[None]:
    """Join the cluster at `ray.address` or RAY_ADDRESS (set inside a job), or start one on this machine.

    A Ray that this process uses already is used as it is. What was joined is left running, what was started is stopped.

    Raises:
        UserError: no cluster there, one of another Ray version, or one too small for what is asked of it.
        SaferError: a Ray of the run's own does not start.
    """
    if ray.is_initialized():
        check_resources(config, shards)
        yield
        return
    address = address_of(config)
    with contextlib.ExitStack() as joined:
        if address is None:
            joined.enter_context(own_ray(hush=not verbose, **_options(config, shards, verbose)))
        else:
            with contextlib.nullcontext() if verbose else hushed():
                _join(address, verbose)
            joined.callback(ray.shutdown)
            if not asks_for_a_token():
                log.warning(
                    "the Ray cluster at %s asks nobody for a token: whoever reaches its ports runs code there; start "
                    "it with RAY_AUTH_MODE=token (docs/security.md)",
                    address,
                )
        quiet(verbose)
        check_resources(config, shards)
        yield


def quiet(verbose: bool) -> None:
    """Keep Ray's own lines in its log files unless they are asked for; what fails is raised, and told in our words."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)
    if not verbose:
        warnings.filterwarnings("ignore", module=r"ray\.")
        on_node_messages(NodeMessages())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _options(config: RayConfig, shards: int, verbose: bool) -> dict[str, Any]:
    """Return what `ray.init` is given for a Ray of the run's own."""
    most = max(math.ceil(n.processes * n.cpus + n.tasks) for n in needs(config, shards))
    return {
        "num_cpus": max(most, usable_cpus()),
        "object_store_memory": OBJECT_STORE_BYTES,
        "_system_config": {"idle_worker_killing_time_threshold_ms": IDLE_MS},
        "include_dashboard": False,
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }


def _join(address: str, verbose: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR
    try:
        _reach(_head_of(address))
        ray.init(address=address, log_to_driver=verbose, logging_level=level)
    except ray.exceptions.AuthenticationError:
        raise UserError(
            "RAY_AUTH_MODE=token is set, but there is no token; give the cluster's as RAY_AUTH_TOKEN, or the file that "
            "holds it as RAY_AUTH_TOKEN_PATH"
        ) from None
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {address}: {_line(error)}; start one with `ray start --head`") from None
    except RuntimeError as error:
        if "ersion mismatch" in str(error):
            raise UserError(
                f"the cluster at {address} runs another version of Ray or Python than this process "
                f"(Ray {ray.__version__}): {_line(error)}; install the cluster's versions, or use its image"
            ) from None
        raise UserError(f"cannot join the Ray cluster at {address}: {_line(error)}") from None


def _head_of(address: str) -> str:
    """HOST:PORT of a cluster's head node.

    Raises:
        UserError: the address is malformed, Ray Client's or the dashboard's, or `auto` where no cluster runs.
    """
    if address == "auto":
        try:
            return cluster_here()
        except ConnectionError:
            raise UserError(
                "ray.address is `auto`, but no Ray cluster runs on this machine; start one with `ray start --head`, or "
                "leave ray.address out for a Ray of the run's own"
            ) from None
    if address.startswith("ray://"):
        raise UserError(
            f"{address}: Ray Client is not supported; submit a job instead: "
            "`safer-ray submit --address URL -- run CONFIG`"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"ray.address or RAY_ADDRESS is {address!r}: write HOST:PORT as `ray start` printed it, or `auto` for the "
            "cluster of this machine; a URL is for `safer-ray submit --address URL`"
        )
    return address


def _reach(address: str) -> None:
    """Fail within seconds where Ray itself would wait for minutes.

    Raises:
        UserError: no head node answers at the address, not without a token, or of a cluster without this machine.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}; check the address, and that "
            "`ray status` works there"
        ) from None
    try:
        known = nodes_at(address, HEAD_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(
                f"the Ray cluster at {address} wants its token; set RAY_AUTH_MODE=token, and the cluster's "
                "token as RAY_AUTH_TOKEN or the file that holds it as RAY_AUTH_TOKEN_PATH"
            ) from None
        raise UserError(
            f"no Ray cluster at {address}: what listens there does not answer as a head node does "
            f"({error.code().name.lower()}); check the port, and that `ray status` works there"
        ) from None
    if not known & nodes_here():
        raise UserError(
            f"this machine is no node of the Ray cluster at {address}; submit a job instead: "
            "`safer-ray submit --address URL -- run CONFIG`, or `ray start --address` here first"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def room(need: Need, nodes: list[dict[str, float]]) -> int:
    """Return how many such processes the nodes hold, each process whole on one of them, with tasks on the node that
    suits."""
    if not need.tasks:
        return sum(_fit(need, node) for node in nodes)
    with_tasks = [
        sum(_fit(need, other | {"CPU": other["CPU"] - need.tasks} if other is node else other) for other in nodes)
        for node in nodes
        if node.get("CPU", 0) >= need.tasks
    ]
    return max(with_tasks, default=0)


def _fit(need: Need, node: dict[str, float]) -> int:
    # Shares are fractions in binary: 0.3 / 0.1 is a little less than 3.
    fits = [node.get(kind, 0) / share for kind, share in (("CPU", need.cpus), ("GPU", need.gpus)) if share]
    return int(min(fits) + 1e-6)


def check_resources(config: RayConfig, shards: int = 1) -> None:
    """Compare what the stages ask for with what the cluster has, waiting `ray.wait_seconds` for an autoscaler.

    Raises:
        UserError: something is missing; all of it is named.
    """
    end = time.monotonic() + config.wait_seconds
    missing, nodes = _missing(config, shards)
    if missing and config.wait_seconds:
        request_resources(bundles=[bundle for need in missing for bundle in _bundles(need)])
        try:
            while missing and time.monotonic() < end:
                time.sleep(1)
                missing, nodes = _missing(config, shards)
        finally:
            request_resources(bundles=[])  # it would hold for ever; the work asks for itself
    if not missing:
        return
    said = "; ".join(map(_said, missing))
    have = ", ".join(f"{n.get('CPU', 0):g} CPU and {n.get('GPU', 0):g} GPU" for n in nodes)
    raise UserError(
        f"the cluster is too small for {said}; its nodes have {have}. Ask for less in the `ray` section of the config, "
        "add nodes, or give an autoscaler time with ray.wait_seconds"
    )


def _said(need: Need) -> str:
    tasks = f", with {need.tasks:g} CPU beside them for tasks" if need.tasks else ""
    return f"{need.what}: {need.processes} of {need.cpus:g} CPU and {need.gpus:g} GPU{tasks}"


def _missing(config: RayConfig, shards: int) -> tuple[list[Need], list[dict[str, float]]]:
    """Return what does not fit, and what the nodes have."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [need for need in needs(config, shards) if room(need, nodes) < need.processes], nodes


def _bundles(need: Need) -> list[dict[str, float]]:
    process = {kind: share for kind, share in (("CPU", need.cpus), ("GPU", need.gpus)) if share}
    return [process] * need.processes + [{"CPU": need.tasks}] * bool(need.tasks)


@ray.remote(num_cpus=0, max_retries=0)
def _sees(path: str) -> bool:
    return Path(path).exists()


def check_shared(directory: Path) -> None:
    """Every node must see the run's directory, where workers read and commit; a node lost meanwhile need not.

    An object store is seen from everywhere.

    Raises:
        UserError: one does not.
        SaferError: one does not answer.
    """
    nodes = _alive()
    if len(nodes) == 1 or isinstance(directory, Remote):
        return
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / f".seen-{uuid.uuid4().hex[:8]}"
    marker.touch()
    try:
        asked = {node: _sees.options(scheduling_strategy=_on(node)).remote(str(marker)) for node in nodes}
        blind = sorted(nodes[node] for node, answer in asked.items() if not _answer(answer, node, directory))
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{directory} is not there on {blind[0]}; on a cluster of several hosts set `root` to a folder that all of "
            "them see (a network file system)"
        )


def _alive() -> dict[str, str]:
    """The addresses of the nodes, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _answer(answer: "ray.ObjectRef[bool]", node: str, directory: Path) -> bool:
    try:
        return ray.get(answer, timeout=NODE_SECONDS)
    except ray.exceptions.RayError as error:
        if node not in _alive():
            return True
        raise SaferError(f"cannot ask the nodes of the cluster for {directory}: {_line(error)}") from None
