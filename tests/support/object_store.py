"""An object store for tests: a real server of S3's protocol on this machine, behind a proxy that can fail."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pytest

from safer_ray.storage.work import MapJob
from support.faulty_proxy import Proxy, proxied
from support.ray_processes import free_port, wait_until

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "build/s3-server"
KEY, SECRET = "AKIATESTKEY0000000", "a-secret-that-nobody-may-read"


def _installed() -> Path:
    """The server's environment; the test skips where it cannot be made."""
    if not (SERVER / "ready").exists():
        made = subprocess.run(
            ["scripts/s3_server.sh", SERVER],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"the S3 server of the tests cannot be installed: {made.stderr[-300:]}")
    return SERVER


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Store:
    """The server behind its proxy; what is asked of the store itself goes past the proxy."""

    def __init__(self, port: int, proxy: Proxy) -> None:
        self.port, self.proxy = port, proxy
        self.direct = pa.fs.S3FileSystem(
            access_key=KEY, secret_key=SECRET, region="us-east-1", scheme="http", endpoint_override=f"127.0.0.1:{port}"
        )

    def make_bucket(self, name: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()

    def put(self, path: str, content: bytes) -> None:
        with self.direct.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def get(self, path: str) -> bytes:
        with self.direct.open_input_stream(path, compression=None) as stream:
            return stream.read()

    def delete(self, path: str) -> None:
        self.direct.delete_file(path)

    def objects(self, path: str) -> dict[str, int]:
        """Names and modification times (ns) of all objects below a path."""
        found = self.direct.get_file_info(pa.fs.FileSelector(path, recursive=True, allow_not_found=True))
        return {info.path: info.mtime_ns for info in found if info.type == pa.fs.FileType.File}

    def environment(self) -> dict[str, str]:
        """Of processes that reach the store as users do."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "5",
        }


@contextlib.contextmanager
def object_store() -> Iterator[Store]:
    """A server of its own, on ports that are free."""
    python, port = _installed() / "bin/python", free_port()
    command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), 60, process)
        with proxied(port) as proxy:
            yield Store(port, proxy)
    finally:
        process.terminate()
        process.wait(10)


def _with(environment: dict[str, str], function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    os.environ.update(environment)
    return function(*arguments, **named)


def knowing(job: MapJob, environment: dict[str, str]) -> dict[str, Any]:
    """The functions of a job as workers need them that were started before the store was."""
    functions = {name: getattr(job, name) for name in ("read", "make", "write")}
    return {name: partial(_with, environment, function) for name, function in functions.items()}
