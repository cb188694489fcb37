"""Counters of the product, on Ray's Prometheus endpoint."""

import functools
from typing import Any

from ray.util.metrics import Counter


@functools.cache
def _counters() -> dict[str, Counter]:
    """One set a process; Ray adds `ray_` in front and the node's labels."""
    described = {
        "pairs": "rows written",
        "quarantined": "rows refused",
        "tokens": "tokens that the model reads",
        "seconds": "time spent on fragments, reading to commit",
        "flagged": "pairs that an audit flags",
        "restarts": "row ranges begun again, since a process ended at them",
    }
    return {
        name: Counter(f"safer_ray_{name}", description=text, tag_keys=("stage", "run"))
        for name, text in described.items()
    }


def count_fragment(stage: str, run: str, done: dict[str, Any]) -> None:
    """Add a committed fragment's accounts."""
    tags = {"stage": stage, "run": run}
    values = {name: done[name] for name in ("quarantined", "tokens", "seconds", "restarts")}
    flagged = done.get("figures", {}).get("flagged", 0)
    for name, value in {"pairs": done["written"], "flagged": flagged, **values}.items():
        if value > 0:
            _counters()[name].inc(value, tags=tags)
