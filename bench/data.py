"""How fast rows are read, and near duplicates found: `python -m bench.data [--against REV] --json OUT`.

`rows_per_s_core`: rows that one core reads and makes pairs of in a second, over files of three layouts as JSON lines
and as Parquet, the better of two turns each; with `--against REV` also `rows_per_s_core_before`, of the code of that
commit on the same files, the two in turn, and `rows_per_s_ratio`.

Pairs of random words, of which every twentieth says what the one before says but for one word in twenty of each text.
The stage runs in a process of its own.

`near_duplicates_1m_s`: seconds that stage `duplicates` takes for a million pairs; `near_duplicates_mb`: the most memory
that its process held. `near_duplicates_recall`: the share of the planted pairs that are found.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


READ_ROWS = 6000
WORDS_OF_TEXTS = ("the", "sure,", "answer", "is", "not", "and", "here.", "It", "would", "help", "one", "of\n")
ROLES = ("user", "assistant", "user", "assistant")


def make_rows(folder: Path) -> None:
    """Write rows of three layouts, each as JSON lines and as Parquet."""
    random = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS_OF_TEXTS, words))

    layouts: dict[str, list[dict[str, object]]] = {"canonical": [], "messages": [], "transcripts": []}
    for i in range(READ_ROWS):
        asked, good, bad = text(40), text(120), text(120)
        turns = [
            {"role": role, "content": said} for role, said in zip(ROLES, (asked, text(30), asked, good), strict=True)
        ]
        other = [*turns[:3], {"role": "assistant", "content": bad}]
        lead = f"\n\nHuman: {asked}\n\nAssistant: "
        layouts["canonical"].append({"id": i, "prompt": asked, "chosen": good, "rejected": bad, "meta": {"k": "v"}})
        layouts["messages"].append({"chosen": turns, "rejected": other, "rating": 3.5})
        layouts["transcripts"].append({"chosen": lead + good, "rejected": lead + bad})
    folder.mkdir()
    for name, rows in layouts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def reading_rate(rows: Path, code: Path) -> dict[str, dict[str, float]]:
    """Return rows and CPU seconds by file, of the code below a folder."""
    script = Path(__file__).with_name("reading_rate.py")
    environment = os.environ | {"PYTHONPATH": str(code)}
    said = subprocess.run(
        [sys.executable, script, rows], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(said.stdout.splitlines()[-1])


def rates(against: str | None) -> dict[str, float | None]:
    """Return rows a second of the code at hand and of an earlier commit, the better of two turns each."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows")
        codes = {"rows_per_s_core": root}
        if against is not None:
            packed = subprocess.run(
                ["git", "archive", against, "safer_ray"], check=True, stdout=subprocess.PIPE, cwd=root
            )
            (folder / "before").mkdir()
            subprocess.run(["tar", "x", "-C", folder / "before"], check=True, input=packed.stdout)
            codes["rows_per_s_core_before"] = folder / "before"
        turns = [{figure: reading_rate(folder / "rows", code) for figure, code in codes.items()} for _ in range(2)]
    figures: dict[str, float | None] = {"rows_per_s_core_before": None, "rows_per_s_ratio": None}
    for figure in codes:
        files = turns[0][figure]
        seconds = sum(min(turn[figure][file]["seconds"] for turn in turns) for file in files)
        figures[figure] = sum(told["rows"] for told in files.values()) / seconds
    if against is not None:
        figures["rows_per_s_ratio"] = figures["rows_per_s_core"] / figures["rows_per_s_core_before"]  # type: ignore[operator]
    return figures


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
    parser.add_argument("--against", help="A commit, whose code reads the same rows in turn.")
    parser.add_argument("--json", type=local_path)
    parser.add_argument("--run", type=local_path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.run)
        return
    read = rates(given.against)
    print(", ".join(f"{name} {value:,.2f}" for name, value in read.items() if value is not None), flush=True)
    with tempfile.TemporaryDirectory() as name:
        make_pairs(Path(name) / "pairs", given.pairs)
        command = [sys.executable, "-m", "bench.data", "--run", name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    told = json.loads(said.splitlines()[-1])
    whole = given.pairs == MILLION
    figures = read | {
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
