"""A Ray of this process's own: on loopback alone, behind a random token, with files that no other user can open.

Ray listens on the host's addresses unless it is told otherwise, and whoever reaches its ports without a token in the
way runs what they like: jobs over HTTP (also without a dashboard), tasks and the key-value store over gRPC.
"""

import contextlib
import logging
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safer_ray.distributed.ray_internals import quiet_driver, read_environment_again
from safer_ray.errors import SaferError, UserError

TOKEN_BYTES = 32
LONGEST = 103  # bytes of a Unix socket's path, on the system that allows least
SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # Ray's longest below its folder
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: as on a laptop, every process of Ray listens on 127.0.0.1
FAILURES = (RuntimeError, OSError, ValueError, TimeoutError)  # what `ray.init` raises where a part does not start
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # a process beside each worker group
log = logging.getLogger(__name__)


@contextlib.contextmanager
def own_ray(*, hush: bool = True, **options: Any) -> Iterator[None]:
    """Start a Ray that this process and its children alone can use, and stop it when the body ends.

    The token is in the environment of this process while the body runs, and nowhere else; what a user set for clusters
    (mode, token) is put back afterwards. `options` are those of `ray.init`; with `hush`, what it
    writes to standard error itself is kept off it.

    Raises:
        UserError: no folder for Ray's sockets can be made, or its path is too long for them.
        SaferError: Ray does not start.
    """
    folder = own_folder()
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        log.warning("RAY_AUTH_MODE=disabled does not count here: a Ray of this command's own asks for a token")
    closed = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(TOKEN_BYTES), LOOPBACK: "0"}
    unwatched = {WATCHER: os.environ.get(WATCHER, "0")}  # nobody takes this machine from under its own Ray
    with _environment(closed | unwatched):
        import ray

        try:
            # address=local: RAY_ADDRESS in the environment, or a cluster on this machine, would be joined in its place.
            with hushed() if hush else contextlib.nullcontext():
                ray.init(address="local", _temp_dir=str(folder), **options)
        except FAILURES as error:
            ray.shutdown()
            reason = " ".join(str(error).split())[:300]
            raise SaferError(
                f"Ray does not start on this machine: {reason}; its logs are in {folder}/session_latest/logs"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the body, also for a Ray that was imported, and so read them, before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        read_environment_again(LOOPBACK)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        read_environment_again(LOOPBACK)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep off standard error what Ray's C++ part writes there as this process begins to use it, and later but for what
    is fatal: whenever an actor pool starts it writes a line."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with quiet_driver():
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def own_folder() -> Path:
    """Return the folder for Ray's sockets and logs, below RAY_TMPDIR or the system's temporary folder: this user's,
    readable by nobody else.

    Raises:
        UserError: none can be made, or sockets in it would have too long a path.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    try:
        mine = base / f"safer-ray-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            mine.mkdir(mode=0o700)
        if not _is_private(mine):  # somebody else was there first
            mine = Path(tempfile.mkdtemp(prefix="safer-ray-", dir=base))
    except OSError as error:
        raise UserError(
            f"no folder for Ray's sockets can be made in {base}: {error.strerror}; set RAY_TMPDIR to a folder of yours"
        ) from None
    folder = mine / "ray"  # Ray opens its own folder to everybody
    if len(os.fsencode(folder / SOCKET)) > LONGEST:
        raise UserError(
            f"{folder} is too long a path for Ray's sockets, which have {LONGEST} bytes, {len(SOCKET) + 1} of Ray's "
            "own; set RAY_TMPDIR to a folder with a short one, say /tmp"
        )
    return folder


def _is_private(folder: Path) -> bool:
    """Return whether a folder is this user's; what others could open of it is closed to them."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    folder.chmod(0o700)
    return True
