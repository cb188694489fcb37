"""The service that `bench.serve` measures: `python -m bench.serve_up PORT ARGUMENTS`; says `ready`, ends on SIGTERM."""

import json
import logging
import os
import signal
import sys
import threading

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # as `make serve` has it
os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
os.environ.setdefault("RAY_worker_niceness", "0")  # its name; loops and engine give way to nobody either


def main() -> None:
    import ray
    from ray import serve

    from serve.app import build

    ended = threading.Event()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(build(json.loads(sys.argv[2])), name="scoring", route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print("ready", flush=True)
    ended.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
