"""The scoring service on this machine, until Ctrl-C or SIGTERM.

`safer-ray serve auditor=DIR [host=127.0.0.1 port=8000 address=HOST:PORT KEY=VALUE …]`, with the keys of
`ServiceConfig` in `arguments.py`. It runs on a Ray of its own, unless `address` or RAY_ADDRESS names a cluster.
"""

import contextlib
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from safer_ray.errors import SaferError, UserError
from safer_ray.service.serve_settings import free_ports, settings, socket_folder
from safer_ray.service.shutdown import Ending

if TYPE_CHECKING:
    from safer_ray.service.arguments import ServiceConfig

NAME = "safer-ray"  # of the application, among those of a cluster
HOST, PORT = "127.0.0.1", 8000
EXPLAINED = "safer_ray.errors.UserError: "  # in the traceback of a replica
ANSWER_S = 60.0  # until the front answers, once the scorers are there


def main(arguments: Sequence[str]) -> int:
    """Serve until told to end; print `ready: URL` when pairs can be scored. Return a status for the shell: 0 where the
    service was ready before it was told, 128 and the signal's number where it was not."""
    ending = Ending()
    try:
        ending.listen()
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        serve_until_told(read_words(arguments), ending)
        return 0
    except BaseException as error:
        if ending.number is not None:  # whatever came of it
            ending.tell()
            return ending.status
        if not isinstance(error, SaferError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        ending.ignore()


def serve_until_told(args: dict[str, str], ending: Ending) -> None:
    """Deploy the application, and take it away again on SIGINT or SIGTERM.

    Raises:
        UserError: the service cannot be as it is asked for.
        SaferError: Ray does not start, or nothing answers at the service's port.
        Ended: it was told to end before it was ready.
    """

    from safer_ray.service.arguments import read_args

    host, port = args.pop("host", None), args.pop("port", None)
    address = args.pop("address", None) or os.environ.get("RAY_ADDRESS")
    config = read_args(args)  # what is wrong is said before Ray starts
    if address in (None, "local"):
        check_host(host or HOST, config)
        session = own(host or HOST, own_port(host or HOST, port), ending)
    else:
        session = joined(address, host, port, ending)
    with session as front, deployed(args):
        url = f"http://{front}"
        wait_until_it_answers(url)
        ending.check()
        print(f"ready: {url}; logs are in {logs()}", flush=True)
        ending.wait()


def check_host(host: str, config: "ServiceConfig") -> None:
    """Raises UserError where a service on a Ray of its own would let strangers in, or could not listen."""
    from safer_ray.service.app import check_binding, find_keys

    check_binding(host, bool(find_keys(config.keys)), config.insecure)
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if not (address.is_loopback or address.is_unspecified):
            every = "0.0.0.0" if address.version == 4 else "::"
            raise UserError(
                f"serve: a Ray of this command's own knows no address but loopback, and finds no proxy on {host}; "
                f"listen on host={every} behind a firewall, on 127.0.0.1 behind a proxy of yours, or join a cluster "
                "(address=HOST:PORT)"
            )


@contextlib.contextmanager
def deployed(args: dict[str, str]) -> Iterator[None]:
    """Deploy the application, and take it away again when the body ends, or where it is not deployed to the end.

    Raises:
        UserError: it cannot be as it is asked for.
        SaferError: its replicas do not start.
    """
    from ray import serve

    from safer_ray.service.app import build

    application = build(args)
    try:
        try:
            serve.run(application, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise SaferError(f"the service cannot be deployed: {_why(error)}; {logs()} say more") from error
        yield
    finally:
        serve.delete(NAME)


@contextlib.contextmanager
def own(host: str, port: int, ending: Ending) -> Iterator[str]:
    """Start Ray and its Serve for this service alone; HOST:PORT of its front."""
    from safer_ray.distributed.node_messages import NodeMessages
    from safer_ray.distributed.own_ray import own_ray
    from safer_ray.distributed.ray_internals import leave_signals_alone, on_node_messages
    from safer_ray.service.ray_gone import RayGone

    with socket_folder() as folder, contextlib.ExitStack() as started:
        for name, value in settings(folder).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        leave_signals_alone()
        with ending.held():  # half a Ray would be left behind
            started.enter_context(own_ray(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL))
        started.callback(RayGone(ending, folder).close)
        from ray import serve

        on_node_messages(NodeMessages())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(http_options={"host": host, "port": port})
            yield _front(host, port)
        finally:
            serve.shutdown()


@contextlib.contextmanager
def joined(address: str, host: str | None, port: str | None, ending: Ending) -> Iterator[str]:
    """Join a cluster, whose other applications are left alone; HOST:PORT of its front.

    Raises:
        UserError: no such cluster, or another application stands where this one would.
    """
    from safer_ray.config.sections import RayConfig
    from safer_ray.distributed.ray_internals import leave_signals_alone
    from safer_ray.distributed.session import ray_session

    leave_signals_alone()
    with contextlib.ExitStack() as joined:
        with ending.held():
            joined.enter_context(ray_session(RayConfig(address=address)))
        from ray import serve

        from safer_ray.distributed.ray_internals import serve_client

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        there = serve_client()
        if there is None:
            serve.start(http_options={"host": host or HOST, "port": read_port(port or str(PORT))})
            there = serve_client()
            joined.callback(_tell_what_stays, address, there)
        assert there is not None
        options: Any = there.http_config
        wanted = (host or options.host, read_port(port) if port else options.port)
        if wanted != (options.host, options.port):
            raise UserError(
                f"serve: Serve of the cluster at {address} listens on {options.host}:{options.port} already; "
                "leave host and port out"
            )
        _refuse_if_taken(address, serve.status().applications)
        yield _front(options.host or HOST, options.port)


def _tell_what_stays(address: str, serve_there: Any) -> None:
    options = serve_there.http_config
    print(
        f"Serve, which this command started on the cluster at {address}, stays there for other applications and "
        f"listens on {options.host}:{options.port}; `serve shutdown` there ends it",
        file=sys.stderr,
    )


def _refuse_if_taken(address: str, applications: dict[str, Any]) -> None:
    if NAME in applications:
        raise UserError(f"serve: an application {NAME!r} runs on the cluster at {address}; `serve status` shows it")
    routes = {name: found.route_prefix for name, found in applications.items() if hasattr(found, "route_prefix")}
    if taken := next((name for name, route in routes.items() if route == "/"), None):
        raise UserError(f"serve: application {taken!r} of the cluster at {address} has the route /; remove it first")


def wait_until_it_answers(url: str) -> None:
    """Return when the service says at `url` that it is ready.

    Raises:
        SaferError: it does not, for `ANSWER_S` seconds.
    """
    import httpx

    ends, said = time.monotonic() + ANSWER_S, "no answer"
    while time.monotonic() < ends:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=10, trust_env=False)
        except httpx.HTTPError as error:
            said = _line(error)
        else:
            if answer.status_code == 200:
                return
            said = f"status {answer.status_code}"
        time.sleep(0.1)
    raise SaferError(f"nothing scores pairs at {url} ({said}); {logs()} say why")


def own_port(host: str, asked: str | None) -> int:
    """Return the port that was asked for, or else 8000, or else one that is free.

    Raises:
        UserError: it is no port, or another process has it.
    """
    port = read_port(asked or str(PORT))
    reason = _cannot_listen(host, port)
    if reason is None:
        return port
    if asked is None and _cannot_listen(host, 0) is None:
        (free,) = free_ports(1)
        print(f"port {port} is taken by another process: using {free}", file=sys.stderr)
        return free
    raise UserError(f"serve: cannot listen on {host}:{port}: {reason}; give another host=ADDRESS or port=NUMBER")


def _cannot_listen(host: str, port: int) -> str | None:
    """Return why nobody can listen there, None where one can."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended is no obstacle
            listener.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _front(host: str, port: int) -> str:
    """Return where a client of this machine finds a server that listens on `host`."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
        if ":" in host:
            host = f"[{host}]"
    return f"{host}:{port}"


def logs() -> str:
    """Return the folder of Serve's logs."""
    import ray

    session = ray.get_runtime_context()
    return f"{session.get_temp_dir()}/{session.get_session_name()}/logs/serve"


def read_words(arguments: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE words as a mapping.

    Raises:
        UserError: a word is none, or has no value, or a key comes twice.
    """
    found: dict[str, str] = {}
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"serve: {word!r} is no KEY=VALUE; write auditor=DIR")
        if not value.strip():
            raise UserError(f"serve: {name} is empty, say of a variable that is not set; give it, or leave it out")
        if name in found:
            raise UserError(f"serve: {name} is given twice, as {found[name]!r} and {value!r}; leave one out")
        found[name] = value
    return found


def read_port(text: str) -> int:
    """Return a port's number.

    Raises:
        UserError: the text is none.
    """
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 2**16:
        raise UserError(f"serve: port {text!r} is none; wanted 1 to 65535")
    return int(text)


def _why(error: BaseException) -> str:
    """Return what ended a deployment's replicas, in their own words where they said it."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    messages = [found.message for found in application.deployments.values()] if application else []
    ends = [line for message in messages for line in message.splitlines() if EXPLAINED in line]
    return ends[-1].partition(EXPLAINED)[2][:300] if ends else _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
