"""What the tests of the service share: the tiny run's bundle, requests, and pairs that break things."""

import math
from pathlib import Path

from safer_ray.storage.artifacts import Artifact, read_parts
from support.tiny_run import finished

SECRET = "the moon is a lantern"
PAIR = {"prompt": "How are you today?", "chosen": "Very well, thank you.", "rejected": "Go away, will you."}
TEXTS = ("prompt", "chosen", "rejected")


def bundle_of(session: Path) -> Artifact:
    """The auditor of the finished tiny run."""
    return finished(session).artifacts["auditor"]


def corpus_of(session: Path, rows: int = 60) -> list[dict[str, object]]:
    """Pairs of the tiny run's corpus."""
    return read_parts(finished(session).artifacts["noise"].path / "pairs").slice(0, rows).to_pylist()


def body(rows: list[dict[str, object]], **more: object) -> dict[str, object]:
    return {"pairs": [{"id": row["pair_id"]} | {name: row[name] for name in TEXTS} for row in rows], **more}


def alike(left: object, right: object) -> bool:
    """Whether two answers say the same: floats within 1e-5, since a pair's figures depend a little on its batch."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(alike(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(alike, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-5)
    return left == right
