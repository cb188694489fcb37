"""A driver as a command: FOLDER [PAIRS]; it joins RAY_ADDRESS or starts a Ray, maps, trains, and tells."""

import json
import sys
from pathlib import Path
from typing import Any

import psutil

from safer_ray.config.sections import RayConfig
from safer_ray.distributed.session import ray_session
from support.ray_work import fragments, mapping, training


def main(folder: Path, pairs: Path | None = None) -> None:
    config, told = RayConfig(), dict[str, Any]()
    with ray_session(config):
        from safer_ray.distributed.ray_runner import RayRunner

        told["children"] = [process.pid for process in psutil.Process().children(recursive=True)]
        told["counts"] = vars(RayRunner(config).map(mapping(folder), fragments(folder), folder / "out"))
        if pairs is not None:
            (told["metrics"],) = RayRunner(config).train([training(folder, pairs)])
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
