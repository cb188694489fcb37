"""Processes of the tests of sessions and faults: clusters and drivers of their own, ended with all they started."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
NODE = [
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--dashboard-agent-listen-port=0",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
]


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """For a Ray's files and its address; short, since sockets lie below it."""
    folder = tempfile.mkdtemp(prefix="sr-", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a process that knows no cluster but the one in `folder`, and whose workers find the tests' modules."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    }
    return kept | {"RAY_TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))} | more


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TESTS / "support" / name), *map(str, arguments)]


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], said: Path) -> Iterator[subprocess.Popen]:
    """A process whose output goes to `said`.out and `said`.err; it ends here with all of its children."""
    with said.with_suffix(".out").open("w") as out, said.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ask it to end, then make it and its children."""
    children = family(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(10)


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; none when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen) -> list[psutil.Process]:
    """SIGKILL to a process alone; the children that it had."""
    children = family(process.pid)[1:]
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    return children


def interrupt(process: subprocess.Popen) -> list[psutil.Process]:
    """Ctrl-C, as a terminal sends it to a command and its children; these."""
    children = family(process.pid)[1:]
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    return children


def at_work(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [process for process in processes if _works(process)]


def _works(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], seconds: float, process: subprocess.Popen | None = None) -> None:
    """Until a condition holds, as long as the process goes on."""
    until = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < until, f"not so after {seconds} s"
        # A look through all processes takes long: it is not to hold a core that they need.
        time.sleep(min(0.5, max(0.02, 9 * (time.monotonic() - began))))
