"""Rows that nobody should send: python tests/chaos/hostile.py FOLDER [--rows 100000].

Malformed and hostile rows of many kinds, a few good pairs among them, go through an audit; every bad row must end in
the quarantine with a reason, every good one in the scores.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401  # sets what torch reads from the environment
from support.tiny_run import finished

from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import read_parts
from safer_ray.storage.quarantine import quarantine_rows

LARGE = 10 * 2**20
EVERY_LARGE = 5000  # one row in so many is 10 MB
EVERY_GOOD = 1000

Row = Callable[[random.Random], bytes]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


KINDS: dict[str, Row] = {
    "deep lists": lambda r: b"[" * r.randint(2000, 20_000),
    "deep mappings": lambda r: b'{"a":' * r.randint(2000, 20_000) + b"1" + b"}" * 10,
    "deep prompt": lambda r: b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b', "chosen": "a", "rejected": "b"}',
    "wrong types": lambda r: _json({"prompt": r.choice([3, [1], {"a": 1}]), "chosen": 4, "rejected": None}),
    "messages of numbers": lambda r: _json({"prompt": [1, 2], "chosen": [{"role": 1, "content": 2}], "rejected": "x"}),
    "not a mapping": lambda r: _json(r.choice([[1, 2], 3, "text", None, True])),
    "missing side": lambda r: _json({"prompt": "p", r.choice(["chosen", "rejected"]): "x"}),
    "empty sides": lambda r: _json({"prompt": "p", "chosen": "", "rejected": " "}),
    "no UTF-8": lambda r: (
        b'{"prompt": "' + bytes(r.choices(range(128, 256), k=40)) + b'", "chosen": "a", "rejected": "b"}'
    ),
    "lone surrogate": lambda r: b'{"prompt": "\\ud800", "chosen": "a b", "rejected": "c"}',
    "NUL bytes": lambda r: b"\0" * r.randint(1, 50),
    "cut off": lambda r: _json({"prompt": "p", "chosen": "yes " * 20, "rejected": "no"})[: r.randint(3, 60)],
    "random bytes": lambda r: bytes(r.choices([b for b in range(256) if b not in (10, 13)], k=60)),
    "NaN for a text": lambda r: b'{"prompt": NaN, "chosen": Infinity, "rejected": -Infinity}',
    "huge number": lambda r: b'{"prompt": ' + b"9" * 6000 + b', "chosen": 1, "rejected": 2}',
}


def large(r: random.Random) -> bytes:
    """A pair of 10 MB."""
    return _json({"prompt": "p", "chosen": r.choice("abc") * LARGE, "rejected": "no"})


def write_rows(path: Path, count: int, good: list[bytes], seed: int) -> tuple[set[int], Counter[str]]:
    """The places of the good rows, and how many of each kind there are."""
    r, places, kinds = random.Random(seed), set(), Counter[str]()
    with path.open("wb") as out:
        for i in range(count):
            if i % EVERY_GOOD == 7:
                places.add(i)
                out.write(good[i % len(good)] + b"\n")
                continue
            kind = "10 MB" if i % EVERY_LARGE == 3 else r.choice(list(KINDS))
            kinds[kind] += 1
            out.write((large(r) if kind == "10 MB" else KINDS[kind](r)).replace(b"\n", b" ") + b"\n")
    return places, kinds


def audited(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """What became of so many rows."""
    began = time.monotonic()
    made = finished(folder)
    pairs = read_parts(made.artifacts["pairs"].path).select(["prompt", "chosen", "rejected"]).to_pylist()
    path, out = folder / "hostile.jsonl", folder / "hostile"
    places, kinds = write_rows(path, count, [_json(pair) for pair in pairs], seed)
    out.mkdir(exist_ok=True)
    source = SourceConfig(path=str(path), format="canonical")
    audit = Audit(made.artifacts["auditor"], source, ScoresConfig(), fragment_rows=1000, max_refused_share=1)
    counts = audit_corpus(audit, out, LocalRunner())
    refused = {row["position"]: row["reason"] for row in quarantine_rows(out).to_pylist()}
    scored = {int(key.rpartition("#")[2]) for key in read_parts(out / "scores")["row_key"].to_pylist()}
    bad = set(range(count)) - places
    return {
        "rows": count,
        "kinds": dict(kinds),
        "quarantined": counts.quarantined,
        "without_reason": sum(not reason for reason in refused.values()),
        "bad_not_quarantined": len(bad - refused.keys()),
        "good_not_scored": len(places - scored),
        "twice": len(scored & refused.keys()) + counts.read - count,
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = audited(given.folder.resolve(), given.rows)
    print(json.dumps(found, indent=1))
    sys.exit(any(found[name] for name in ("without_reason", "bad_not_quarantined", "good_not_scored", "twice")))
