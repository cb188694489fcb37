"""Measure what the service costs and carries: `python -m bench.serve --auditor DIR [--soak-seconds 300] [--json OUT]`;
without `--auditor`, what the limits cost before anything is read.

A service with this bundle on a Ray of its own, loops from a second process at concurrency 1, 8 and 64, of single pairs
and of 16 a request; between them the bare engine (the batch function of an audit) on the same pairs in this process.
Then overload at three times what was carried, recovery, and a soak whose memory is watched.
"""

import argparse
import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench.common import local_path, write
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import read_pair
from safer_ray.service.problems import Problem
from safer_ray.service.request_limits import Limits, check_nesting
from safer_ray.service.request_parsing import Row
from safer_ray.service.serve_settings import free_ports

GOALS = {
    "overhead_p50_ms": "<= 15",
    "batch16_vs_engine": ">= 0.70",
    "single_efficiency": ">= 0.70",
    "overload_p99_ratio": "<= 3",
    "overload_errors": "0",
    "recovery_s": "<= 10",
    "memory_growth": "about 1: flat",
    "http_vs_audit": "<= 1e-5",
    "scan_4mb_s": "<= 0.2",
}
SCANNED = 4 * 2**20  # bytes of a body
COSTLY = (
    b'"',
    b'\\"',
    b"\\\\",
    b'""',
    b'"a',
    b'a""',
    b'" "a',
    b'"\\"',
    b'["",',
    b"[",
    b"]",
    b",",
    b" ",
    b"\\u0041",
    b"\xff",
)
TEXTS = ("prompt", "chosen", "rejected")
OVERLOAD = 3.0  # times what was carried
AT_ONCE = 16  # pairs a request
LINGER_S = 0.005  # what serving may add to a pair, in `single_efficiency`
Pair = dict[str, str]


def read_pairs(path: Path, count: int) -> list[Pair]:
    """The first pairs that an audit would score."""
    pairs: list[Pair] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = {name: json.loads(line)[name] for name in TEXTS}
            try:
                read_pair(row, "canonical")
            except Refused:
                continue
            pairs.append({"id": str(len(pairs)), **row})
            if len(pairs) == count:
                break
    return pairs


def scan() -> dict[str, Any]:
    """Seconds of the limits' scan over the worst of the bodies that are hardest on it, the least of five each."""
    most = Limits(depth=SCANNED, values=SCANNED, members=SCANNED)  # else brackets end it early
    worst, unit = 0.0, b""
    for opening in (b"", b'"', b'{"pairs": "'):
        for each in COSTLY:
            body = (opening + each * (SCANNED // len(each)))[:SCANNED]
            taken = min(_scan_s(body, limits) for limits in 5 * [Limits()])
            worst, unit = max((worst, unit), (taken, opening + each))
    unlimited = max(_scan_s(each * (SCANNED // len(each)), most) for each in (b"[", b",", b'["",'))
    return {"loop": "scan", "bytes": SCANNED, "scan_4mb_s": worst, "of": repr(unit), "without_limits_s": unlimited}


def _scan_s(body: bytes, limits: Limits) -> float:
    began = time.process_time()
    with contextlib.suppress(Problem):
        check_nesting(body, limits)
    return time.process_time() - began


class BareEngine:
    """The batch function of an audit, on tables that are there."""

    def __init__(self, auditor: Path) -> None:
        from safer_ray.reward.checkpoints import quiet_transformers
        from safer_ray.service.bundle_info import open_auditor, scores_config
        from safer_ray.service.scoring import ScorePairs

        quiet_transformers()
        bundle = open_auditor(auditor)
        self.pairs = ScorePairs(bundle, scores_config(bundle, None, 0.05, 8))

    def rows(self, pairs: Sequence[Pair]) -> list[Row]:
        read = (read_pair({name: pair[name] for name in TEXTS}, "canonical") for pair in pairs)
        return [Row(pair.prompt, pair.chosen, pair.rejected, False) for pair in read]

    def each_ms(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the milliseconds that each pair takes when it is scored alone."""
        found = []
        for row in self.rows(pairs):
            began = time.perf_counter()
            self.pairs.outcomes([row])
            found.append(1000 * (time.perf_counter() - began))
        return found

    def pairs_per_s(self, pairs: Sequence[Pair]) -> float:
        """In one call, as an audit does it."""
        rows = self.rows(pairs)
        began = time.perf_counter()
        self.pairs.outcomes(rows)
        return len(rows) / (time.perf_counter() - began)

    def figures(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        return [outcome.figures or {} for outcome in self.pairs.outcomes(self.rows(pairs))]


class Served:
    """A service in processes of its own."""

    def __init__(self, auditor: Path, port: int, arguments: Sequence[str]) -> None:
        self.port = port
        command = [sys.executable, "-m", "serve", f"auditor={auditor}", f"port={port}", *arguments]
        own = os.environ | {"RAY_ADDRESS": "local"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own)
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("ready"):
            raise SystemExit("the service did not start; what it says stands above")

    def load(self, requests: Sequence[Sequence[Pair]], seconds: float, **pace: Any) -> dict[str, Any]:
        """Return what a loop in another process found."""
        asked = {"host": "127.0.0.1", "port": self.port, "requests": requests, "seconds": seconds, **pace}
        found = subprocess.run(
            [sys.executable, "-m", "bench.load"], input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        return dict(json.loads(found.stdout))

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of the processes that score and answer."""
        found: dict[str, float] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                name = " ".join(process.cmdline()[:1])
                if name.startswith("ray::") or process.name() == "haproxy":
                    kind = Path(name).name.removeprefix("ray::").split(":")[0].split("(")[0]
                    found[kind] = found.get(kind, 0.0) + process.memory_info().rss / 2**20
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def chunks(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    whole = len(pairs) // size * size
    return [list(pairs[start : start + size]) for start in range(0, whole, size)]


def closed(served: Served, engine: BareEngine, pairs: Sequence[Pair], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each concurrency and size of request, the engine measured before and after."""
    for at_once in (1, AT_ONCE):
        for concurrency in (1, 8, 64):
            before = engine.pairs_per_s(pairs)
            found = served.load(chunks(pairs, at_once), seconds, concurrency=concurrency)
            rate = (before + engine.pairs_per_s(pairs)) / 2
            yield {
                "loop": "closed",
                "concurrency": concurrency,
                "at_once": at_once,
                "engine_pairs_per_s": rate,
                **found,
            }


def overhead(served: Served, engine: BareEngine, pairs: Sequence[Pair]) -> dict[str, Any]:
    """One client, pair by pair, against the bare engine's time for the same pair; and the same figures."""
    each = engine.each_ms(pairs)
    found = served.load(chunks(pairs, 1), 0.0, concurrency=1, keep=True)
    again = engine.each_ms(pairs)
    alone = [sum(times) / 2 for times in zip(each, again, strict=True)]
    over = [ms - bare for ms, bare in zip(found["each_ms"], alone, strict=True)]
    results = [body["results"][0] for body in found["bodies"]]
    names = ("score", "suspicion", "reward_margin")
    bare = engine.figures(pairs)
    apart = max(abs(a[name] - b[name]) for a, b in zip(results, bare, strict=True) for name in names)
    return {
        "loop": "pair by pair",
        "engine_p50_ms": median(alone),
        "http_p50_ms": median(found["each_ms"]),
        "overhead_p50_ms": median(over),
        "http_vs_audit": apart,
        "errors": sum(body is None for body in found["bodies"]),
    }


def overload(served: Served, pairs: Sequence[Pair], rate: float, p99_ms: float, seconds: float) -> dict[str, Any]:
    """Requests at three times the rate that was carried; then how long until one client is answered as before."""
    memory = sum(served.memory_mb().values())
    usual = served.load(chunks(pairs[:20], 1), 0.0, concurrency=1)["p50_ms"]
    found = served.load(chunks(pairs, 1), seconds, rate=OVERLOAD * rate)
    began = time.perf_counter()
    while served.load(chunks(pairs[:8], 1), 0.0, concurrency=1)["p50_ms"] > 2 * usual:
        if time.perf_counter() - began > 60:
            break
    others = sum(count for status, count in found["statuses"].items() if status not in ("200", "429"))
    return {
        "loop": "open",
        "rate": OVERLOAD * rate,
        **found,
        "overload_p99_ratio": found["p99_ms"] / p99_ms,
        "overload_errors": others,
        "recovery_s": time.perf_counter() - began,
        "memory_mb": [memory, sum(served.memory_mb().values())],
    }


def soak(served: Served, pairs: Sequence[Pair], seconds: float) -> dict[str, Any]:
    """Eight clients; memory at the tenth part of the time, and at its end."""
    part = seconds / 10
    found = served.load(chunks(pairs, 1), part, concurrency=8)
    first = served.memory_mb()
    rest = [served.load(chunks(pairs, 1), part, concurrency=8) for _ in range(9)]
    last = served.memory_mb()
    statuses: dict[str, int] = {}
    for row in (found, *rest):
        for status, count in row["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    return {
        "loop": "soak",
        "seconds": seconds,
        "statuses": statuses,
        "memory_first_mb": first,
        "memory_last_mb": last,
        "memory_growth": sum(last.values()) / sum(first.values()),
    }


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for row in rows:
        found |= {name: row[name] for name in GOALS if name in row}
        if row.get("concurrency") == 64:
            engine, rate = row["engine_pairs_per_s"], row["pairs_per_s"]
            if row["at_once"] == AT_ONCE:
                found["batch16_vs_engine"] = rate / engine
            else:
                found["single_efficiency"] = rate * (1 / engine + LINGER_S)
    return found


def show(row: dict[str, Any]) -> None:
    print("  ".join(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--auditor", type=local_path, help="without it, only the scan is measured")
    parser.add_argument("--pairs", type=local_path, default=Path("../shared/data/hh_harmless_test.jsonl.gz"))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each loop")
    parser.add_argument("--overload-seconds", type=float, default=20.0)
    parser.add_argument("--soak-seconds", type=float, default=0.0)
    parser.add_argument("--json", type=local_path)
    parser.add_argument("arguments", nargs="*", help="KEY=VALUE of the service")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = [scan()]
    show(rows[0])
    if asked.auditor is None:
        report(asked.json, rows)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pairs = read_pairs(asked.pairs, asked.count)
    engine = BareEngine(asked.auditor)
    (port,) = free_ports(1)
    served = Served(asked.auditor.absolute(), port, asked.arguments)
    try:
        served.load(chunks(pairs, AT_ONCE), 3.0, concurrency=8)  # until everything has been used once
        engine.pairs_per_s(pairs)
        for row in (overhead(served, engine, pairs[:100]), *closed(served, engine, pairs, asked.seconds)):
            rows.append(row)
            show(row)
        carried = next(row for row in rows if row.get("concurrency") == 64 and row["at_once"] == 1)
        rows.append(overload(served, pairs, carried["pairs_per_s"], carried["p99_ms"], asked.overload_seconds))
        show(rows[-1])
        if asked.soak_seconds:
            rows.append(soak(served, pairs, asked.soak_seconds))
            show(rows[-1])
    finally:
        served.close()
    report(asked.json, rows)


def report(out: Path | None, rows: list[dict[str, Any]]) -> None:
    figures = figures_of(rows)
    for name, goal in GOALS.items():
        if name in figures:
            print(f"{name:<22} {figures[name]:.4g}   goal {goal}")
    write(out, figures, rows)


if __name__ == "__main__":
    main()
