"""Log the training of an SAE: JSON lines, and TensorBoard's event files where they are wanted."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safer_ray.errors import need_extra
from safer_ray.storage.files import write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
Item = TypeVar("Item")


class SaeLog:
    """Figures by step, in the order they come; only the first worker has one."""

    def __init__(self, out: Path, tensorboard: bool, step: int) -> None:
        """Raises UserError: event files are wanted, and no package writes them."""
        self.out = out
        self.events: Any = None
        if tensorboard:
            need_extra("tensorboard", "tensorboardX")
            from tensorboardX import SummaryWriter

            self.events = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def add(self, entry: Mapping[str, float]) -> None:
        if self.events is not None:
            for name, value in entry.items():
                self.events.add_scalar(f"sae/{name}", value, int(entry["step"]))

    def write(self, lines: list[dict[str, Any]]) -> None:
        """All lines so far."""
        write_lines(lines, self.out)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def write_lines(lines: list[dict[str, Any]], out: Path) -> None:
    """Figures as JSON lines in `metrics.jsonl`."""
    write_text("".join(json.dumps(line) + "\n" for line in lines), out / METRICS)


class Clock:
    """Times how long something takes, and how much of it goes by in waiting for data."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.waited = 0.0

    def take(self, items: Iterator[Item]) -> Item:
        """The next item, waited for."""
        began = time.perf_counter()
        item = next(items)
        self.waited += time.perf_counter() - began
        return item

    def stop(self) -> None:
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began
