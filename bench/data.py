"""How fast near duplicates are found, and in how much memory: `python -m bench.data [--pairs 1000000] --json OUT`.

Pairs of random words, of which every twentieth says what the one before says but for one word in twenty of each text.
The stage runs in a process of its own.

`near_duplicates_1m_s`: seconds that stage `duplicates` takes for a million pairs; `near_duplicates_mb`: the most memory
that its process held. `near_duplicates_recall`: the share of the planted pairs that are found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.common import local_path, write
from bench.growth import held_at_most
from safer_ray import schema
from safer_ray.config.sections import DuplicatesConfig
from safer_ray.pipeline.duplicate_stage import duplicates
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Place, open_artifact, part_files, part_name
from safer_ray.storage.files import read_parquet, write_parquet

MILLION = 1_000_000
PART_ROWS = 1000  # as stage `pairs` writes them
EVERY = 20  # pairs, of which the last repeats the one before
WORDS = {"prompt": 20, "chosen": 40, "rejected": 40}


def make_pairs(folder: Path, count: int) -> None:
    """Write pairs of random words, with planted near duplicates."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, (50_000, 6), dtype=np.uint8)
    words = np.array([bytes(each).decode() for each in letters], dtype=object)
    for number, start in enumerate(range(0, count, PART_ROWS)):
        rows = min(PART_ROWS, count - start)
        columns: dict[str, object] = {
            "pair_id": [f"p{i}" for i in range(start, start + rows)],
            "row_key": [f"made#{i}" for i in range(start, start + rows)],
        }
        for name, length in WORDS.items():
            drawn = random.integers(0, len(words), (rows, length))
            repeats = np.arange(EVERY - 1, rows, EVERY)
            drawn[repeats] = drawn[repeats - 1]
            drawn[repeats[:, None], random.integers(0, length, (len(repeats), length // 20))] = 0
            role = "user" if name == "prompt" else "assistant"
            columns[name] = [[{"role": role, "content": " ".join(row)}] for row in words[drawn]]
        made = pa.table(columns, schema=pa.schema([schema.PAIRS.field(name) for name in columns]))
        for field in schema.PAIRS:
            if field.name not in columns:
                made = made.append_column(field, pa.nulls(rows, field.type))
        write_parquet(made.select(schema.PAIRS.names), folder / part_name(number))


def run(folder: Path) -> None:
    """Print what the stage takes over the pairs in `folder`, as JSON."""
    began = time.monotonic()
    ctx = StageContext(Place(folder / "runs"), LocalRunner())
    made = duplicates(ctx, DuplicatesConfig(), open_artifact(folder / "pairs"))
    seconds = time.monotonic() - began
    told = {"seconds": seconds, "mb": held_at_most(), "recall": recall(made.path)}
    print(json.dumps(told | {"found": made.metrics["found"]}))


def recall(made: Path) -> float:
    """Return the share of the planted pairs that are labelled as repeating another."""
    planted = found = 0
    for path in part_files(made / "pairs"):
        labels = read_parquet(path, ["labels"])["labels"].to_pylist()
        own = [dict(row or ()).get("repeats_pair") for row in labels[EVERY - 1 :: EVERY]]
        planted, found = planted + len(own), found + own.count("near")
    return found / planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=MILLION)
    parser.add_argument("--json", type=local_path)
    parser.add_argument("--run", type=local_path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.run)
        return
    with tempfile.TemporaryDirectory() as name:
        make_pairs(Path(name) / "pairs", given.pairs)
        command = [sys.executable, "-m", "bench.data", "--run", name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    told = json.loads(said.splitlines()[-1])
    whole = given.pairs == MILLION
    figures = {
        "near_duplicates_1m_s": told["seconds"] if whole else None,
        "near_duplicates_mb": told["mb"] if whole else None,
        "near_duplicates_recall": told["recall"],
    }
    print(f"{given.pairs:,} pairs: {told['seconds']:.1f} s, {told['mb']:.0f} MB, recall {told['recall']:.4f}")
    for kind, counts in told["found"].items():
        print(f"{kind:<15} {counts['clusters']:>9,} clusters {counts['pairs']:>11,} pairs")
    write(given.json, figures, [{"pairs": given.pairs} | told])


if __name__ == "__main__":
    main()
