"""Counters of the service, on Ray's Prometheus endpoint, where every name begins with `ray_safer_ray_serve_`."""

import functools

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
TOKENS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
REFUSALS = (401, 403, 413, 422, 429)


@functools.cache
def _counter(name: str, description: str, *tags: str) -> Counter:
    return Counter(f"safer_ray_serve_{name}", description=description, tag_keys=tags)


@functools.cache
def _histogram(name: str, description: str, bounds: tuple[float, ...], *tags: str) -> Histogram:
    return Histogram(f"safer_ray_serve_{name}", description=description, boundaries=list(bounds), tag_keys=tags)


@functools.cache
def _waiting() -> Gauge:
    return Gauge("safer_ray_serve_waiting", description="requests in a scorer, the batch at work included")


def count_answer(route: str, status: int, seconds: float) -> None:
    """A request that was answered; status 0: its client went away first."""
    tags = {"route": route, "status": str(status)}
    _counter("requests", "requests answered", "route", "status").inc(tags=tags)
    if status in REFUSALS:
        _counter("refused", "requests refused, by status", "status").inc(tags={"status": str(status)})
    time_stage("answer", seconds)


def count_pairs(scored: int, failed: int, flagged: int) -> None:
    """The pairs of a request."""
    for outcome, count in (("scored", scored), ("failed", failed), ("flagged", flagged)):
        if count:
            _counter("pairs", "pairs scored, failed, flagged", "outcome").inc(count, tags={"outcome": outcome})


def time_stage(stage: str, seconds: float) -> None:
    """`queue`, `score` and `answer`, which holds the others."""
    bounds = tuple(SECONDS)
    _histogram("seconds", "seconds by stage of a request", bounds, "stage").observe(seconds, tags={"stage": stage})


def measure_batch(tokens: int) -> None:
    bounds = tuple(float(bound) for bound in TOKENS)
    _histogram("batch_tokens", "estimated tokens scored in one call", bounds).observe(tokens)


def measure_waiting(requests: int) -> None:
    _waiting().set(requests)
