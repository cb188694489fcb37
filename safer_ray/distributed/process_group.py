"""The process group of a training: where all of its workers are on one host, it listens on loopback alone.

torch's rendezvous store listens on all interfaces and asks nobody for a key, whatever address its clients are given,
and gloo listens where the host's name leads. A stranger who writes to the store or to a worker's port changes weights.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from safer_ray.reward.ending import note_sigterm

LOOPBACK = "127.0.0.1"
HOSTS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # the interface that workers find each other on
_stores: list[dist.TCPStore] = []  # of the first worker; one lives as long as that process


@dataclass
class GroupConfig(TorchConfig):
    """As `TorchConfig`, for groups that keep to loopback where they can."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _on_loopback(super().backend_cls)


def _on_loopback(spread: type[Backend]) -> type[Backend]:
    """Return a backend that sets up groups of one host on loopback, and others as `spread` does."""

    class GroupBackend(spread):  # type: ignore[misc, valid-type]
        def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
            worker_group.execute(note_sigterm)  # here, since it runs in the main thread of each
            # Hosts need addresses at which they reach each other; their network protects them (docs/security.md).
            if len(set(worker_group.execute(_host))) > 1:
                super().on_start(worker_group, backend_config)
                return
            port = worker_group.execute_single(0, _open_store)
            joining = [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, rank, len(worker_group), port, backend_config.timeout_s
                )
                for rank in range(len(worker_group))
            ]
            ray.get(joining)

    return GroupBackend


def _host() -> str:
    """Return what tells this host from others: two containers may have one address each of a network of their own."""
    boot = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    network = ""
    with contextlib.suppress(OSError):
        network = os.readlink("/proc/self/ns/net")  # who shares it shares its loopback
    return f"{boot} {network} {ray.util.get_node_ip_address() if not boot else ''}"


def _open_store() -> int:
    """Open the group's store on loopback, and return its port."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(128)
        port = int(listener.getsockname()[1])
        # The socket is handed over open, so that nobody can take the port between finding it free and listening.
        descriptor = listener.detach()
    _stores.append(dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor))
    return port


def _join(backend: str, rank: int, size: int, port: int, timeout_s: int) -> None:
    """Join the group whose store is at a port of loopback."""
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    for name in HOSTS:
        os.environ.setdefault(name, _interface())
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _interface() -> str:
    """Return the name of the loopback interface."""
    return next(
        name for name, addresses in psutil.net_if_addrs().items() if any(a.address == LOOPBACK for a in addresses)
    )
