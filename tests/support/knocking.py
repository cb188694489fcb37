"""A stranger without a token, who knocks at every port that a command and its children open."""

import contextlib
import ipaddress
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import psutil
from ray.core.generated import core_worker_pb2, gcs_service_pb2, node_manager_pb2

METHODS = {  # what a stranger would ask for, by gRPC
    "/ray.rpc.InternalKVGcsService/InternalKVPut": gcs_service_pb2.InternalKVPutRequest(key=b"stranger", value=b"here"),
    "/ray.rpc.NodeManagerService/GetNodeStats": node_manager_pb2.GetNodeStatsRequest(),
    "/ray.rpc.NodeManagerService/RequestWorkerLease": node_manager_pb2.RequestWorkerLeaseRequest(),
    "/ray.rpc.CoreWorkerService/PushTask": core_worker_pb2.PushTaskRequest(),
    "/ray.serve.ASGIService/HandleRequest": None,
}
JOBS = ("/api/job_agent/jobs/", "/api/jobs/")
SECONDS, PATIENCE = 3.0, 30.0  # for somebody to speak at all, and for what was asked


class Port(NamedTuple):
    """Where a process listens."""

    process: str
    address: str
    port: int

    @property
    def everywhere(self) -> bool:
        """Whether other hosts reach it."""
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return not (mapped or address).is_loopback


class Answers(NamedTuple):
    """What a stranger was told: HTTP statuses by path, gRPC codes by method; None: no HTTP."""

    pages: dict[str, int | None]
    jobs: dict[str, int | None]
    calls: dict[str, grpc.StatusCode]


@dataclass
class Stranger:
    """Looks for ports while the body of `with` runs, and knocks at each of them once, when it is new."""

    pid: int
    marker: Path  # what a job of the stranger's would leave behind
    heard: dict[Port, Answers] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Stranger":
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(60)

    def _watch(self) -> None:
        while not self.ended.wait(0.3):
            for port in listening(self.pid) - self.heard.keys():
                self.heard[port] = knock(port, self.marker)


def listening(pid: int) -> set[Port]:
    """The TCP ports that a process and its children listen on."""
    found = set()
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(pid)
        for process in [command, *command.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                for each in process.net_connections("tcp"):
                    if each.status == psutil.CONN_LISTEN:
                        found.add(Port(process.name(), each.laddr.ip, each.laddr.port))
    return found


def own_address() -> str:
    """An address of this host that other hosts would use; loopback's where it has no other."""
    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family.name == "AF_INET"]
    return next((a for a in addresses if not a.startswith("127.")), "127.0.0.1")


def knock(port: Port, marker: Path) -> Answers:
    host = own_address() if port.everywhere else "127.0.0.1"
    job = {"entrypoint": f"touch {marker}"}
    with httpx.Client(base_url=f"http://{host}:{port.port}", timeout=SECONDS, trust_env=False) as http:
        pages = {path: _status(http, "GET", path) for path in ("/", "/metrics")}
        jobs = {path: _status(http, "POST", path, job) for path in JOBS}
    with grpc.insecure_channel(f"{host}:{port.port}") as channel:
        speaks = _speaks_grpc(channel)
        calls = {method: _code(channel, method, asked) for method, asked in METHODS.items()} if speaks else {}
    return Answers(pages, jobs, calls)


def _speaks_grpc(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(SECONDS)
    except grpc.FutureTimeoutError:
        return False
    return True


def _status(http: httpx.Client, method: str, path: str, body: object = None) -> int | None:
    try:
        return http.request(method, path, json=body).status_code
    except httpx.HTTPError:
        return None


def _code(channel: grpc.Channel, method: str, asked: object) -> grpc.StatusCode:
    call = channel.unary_unary(method, request_serializer=lambda r: b"" if r is None else r.SerializeToString())
    try:
        call(asked, timeout=PATIENCE)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
