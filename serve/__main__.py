"""The scoring service on this machine, until Ctrl-C or SIGTERM.

`python -m serve auditor=DIR [host=127.0.0.1 port=8000 KEY=VALUE …]`, with the keys of `serve.arguments.ServiceConfig`.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from safer_ray.errors import UserError
from serve.front import settings

LOOPBACK = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def main(arguments: Sequence[str]) -> int:
    """Says `ready: URL` when pairs can be scored; a status for the shell."""
    with TemporaryDirectory(prefix="sr-", dir="/tmp") as folder:  # paths of sockets have to be short
        for name, value in (LOOPBACK | settings(Path(folder))).items():
            os.environ.setdefault(name, value)
        try:
            serve_until_told(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def serve_until_told(arguments: Sequence[str]) -> None:
    """Raises UserError where the service cannot be as it is asked for."""
    args = read_words(arguments)
    host, port = args.pop("host", "127.0.0.1"), read_port(args.pop("port", "8000"))
    import ray
    from ray import serve

    from serve.app import build

    ray.init(namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port})
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        serve.run(build(args), name="scoring", route_prefix="/")
        session = ray.get_runtime_context()
        logs = f"{session.get_temp_dir()}/{session.get_session_name()}/logs/serve"
        print(f"ready: http://{host}:{port}; logs are in {logs}", flush=True)
        ended.wait()
        serve.shutdown()
    finally:
        ray.shutdown()


def read_words(arguments: Sequence[str]) -> dict[str, str]:
    """Raises UserError on a word that is no KEY=VALUE."""
    for word in arguments:
        if "=" not in word:
            raise UserError(f"serve: {word!r} is no KEY=VALUE; write auditor=DIR")
    return dict(word.split("=", 1) for word in arguments)


def read_port(text: str) -> int:
    """Raises UserError on what is no port."""
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise UserError(f"serve: port {text!r} is none; wanted 1 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
