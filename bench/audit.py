"""Measure what an audit carries: `python -m bench.audit [--pairs 2000] [--rows 50000 500000] [--files 10 1000]
[--group-rows 100000] [--rounds 3] [--json OUT]`.

The real engine, a random Llama of hidden 256 behind a bundle, audits pairs of hh-rlhf harmless on Ray with 1 and 2
actors, beside the bare engine on the same pairs and as many cores. A trivial engine, which looks at lengths alone, then
shows what reading, checking, moving and committing rows costs without any model, also of Parquet in one large row
group, and what a process fetches of that where it lies in a store. Every audit has a process of its own,
whose memory is the driver's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.common import local_path, write
from bench.engine import SIZES, prepare, read_pairs
from bench.groups import counted, groups, known_store
from bench.growth import held_at_most
from safer_ray import schema
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.summary import close_audit
from safer_ray.config.sections import PairsConfig, RayConfig, ScoresConfig, SelectConfig, SourceConfig
from safer_ray.data.sources import NormalisePairs
from safer_ray.features.encoder import Encoder
from safer_ray.features.salience import candidates
from safer_ray.features.scoring import pair_scores
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import quiet_transformers, save_reward_model
from safer_ray.sae.formats import save_sae
from safer_ray.storage.artifacts import Artifact, Place, open_artifact, part_files, read_plan
from safer_ray.storage.files import read_json, write_json
from safer_ray.storage.work import BatchFn, MapJob

FRAGMENT = 100  # rows, of the real engine's audits, so that two actors have equal shares
GOALS = {
    "audit_vs_engine": ">= 0.85",
    "device_busy": "about 1: never waits",
    "plumbing_pairs_per_s": ">= 5,000",
    "driver_rss_mb": "<= 1,000",
    "driver_rss_growth": "about 1: does not grow",
    "files_10_to_1000": "<= 1.3",
    "one_group_vs_many": "<= 1.3, with one actor and with two",
    "store_bytes_vs_file": "<= 1.1 for each process that reads it",
}


# A bundle and corpora


def write_pairs(pairs: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as out:
        for number, pair in enumerate(pairs):
            out.write(schema.to_json(pair | {"pair_id": f"p{number}"}) + "\n")


def write_bundle(folder: Path) -> Artifact:
    """An auditor of a random model: what it finds means nothing, what it costs is real."""
    size = SIZES["small"]
    bench = prepare(size, 200, "cpu")
    save_reward_model(bench.reward, folder / "reward")
    save_sae(bench.sae, folder / "sae", model="random", layer=size.layer)
    write_pairs(bench.pairs, folder / "reference.jsonl")
    ctx = StageContext(Place(folder / "made"), LocalRunner())
    source = SourceConfig(path=str(folder / "reference.jsonl"), format="canonical")
    pairs = model_stages.pairs(ctx, PairsConfig(sources=(source,)))
    reward, sae = open_artifact(folder / "reward"), open_artifact(folder / "sae")
    codes = model_stages.codes(ctx, pairs, reward, sae)
    salience = feature_stages.salience(ctx, codes, "response", None)
    rated = candidates(pa.concat_tables(map(pq.read_table, part_files(salience.path))), 32)
    write_json(dict.fromkeys(map(str, rated), 5), folder / "ratings.json")
    chosen = feature_stages.select(ctx, SelectConfig(), salience, ratings=open_artifact(folder / "ratings.json"))
    return feature_stages.auditor(ctx, reward, sae, chosen, codes, None)


def write_corpus(folder: Path, rows: int, files: int) -> None:
    """hh-rlhf harmless, again and again, in so many files."""
    pairs = read_pairs(2000)
    folder.mkdir(parents=True)
    each = rows // files
    for file in range(files):
        some = [pairs[(file * each + i) % len(pairs)] for i in range(each)]
        with (folder / f"{file:05}.jsonl").open("w", encoding="utf-8") as out:
            for i, pair in enumerate(some):
                out.write(schema.to_json(pair | {"pair_id": f"p{file}-{i}"}) + "\n")


# A trivial engine


class Lengths:
    """Batch function: normalised pairs -> AUDITED by lengths alone."""

    def __call__(self, pairs: pa.Table) -> pa.Table:
        n = len(pairs)
        lengths = [sum(len(m["content"]) for m in side) for side in pairs["chosen"].to_pylist()]
        rank = np.array([length % 1000 for length in lengths]) / 1000
        columns = {name: pairs[name] for name in ("pair_id", "row_key", "extra", "source", "section", "labels")}
        texts = [
            schema.to_json(pair | {"sentences": []}) if flag else None
            for pair, flag in zip(pairs.select(["prompt", "chosen", "rejected"]).to_pylist(), rank > 0.95, strict=True)
        ]
        reward = pa.array(rank.astype(np.float32))
        return pa.table(
            columns
            | {
                "score": rank,
                "reward_chosen": reward,
                "reward_rejected": reward,
                "reward_margin": reward,
                "suspicion": rank,
                "flag": rank > 0.95,
                "decision": pa.array(["keep"] * n),
                "reasons": pa.array([[] for _ in range(n)], schema.SCORES.field("reasons").type),
                "tokens": pa.array(np.array(lengths, dtype=np.int32)),
                "texts": pa.array(texts, pa.string()),
            }
        )


class Plumbing(Audit):
    """An audit whose engine is `Lengths`."""

    def job(self) -> MapJob:
        return replace(super().job(), make=Lengths, prepare=lambda: NormalisePairs((self.source,), self.max_chars))


class StoredPlumbing(Plumbing):
    """The same of a corpus in a store that counts."""

    def job(self) -> MapJob:
        job = super().job()
        return replace(job, **counted(job))


class Watched:
    """A batch function that writes down when it worked."""

    def __init__(self, notes: Path, make: Callable[[], BatchFn]) -> None:
        self.function = make()
        notes.mkdir(exist_ok=True)
        self.notes = notes / f"{os.getpid()}"

    def __call__(self, rows: pa.Table) -> pa.Table:
        began = time.time()
        made = self.function(rows)
        with self.notes.open("a", encoding="utf-8") as notes:
            notes.write(f"{began} {time.time()}\n")
        return made


class WatchedAudit(Audit):
    """An audit whose actors write down when they worked, beside the pairs."""

    def job(self) -> MapJob:
        job = super().job()
        return replace(job, make=partial(Watched, Path(self.source.path).parent / "busy", job.make))


def busy(notes: Path) -> float:
    """The smallest share of its time, from first batch to last, that an actor was at work; for the rest it waited."""
    shares = []
    for path in notes.iterdir():
        spans = np.array([line.split() for line in path.read_text(encoding="utf-8").splitlines()], dtype=float)
        if len(spans) > 2:
            shares.append(float((spans[:, 1] - spans[:, 0]).sum() / (spans[-1, 1] - spans[0, 0])))
    shutil.rmtree(notes)
    return min(shares)


# Measuring

KINDS = {  # what is audited, and rows of a fragment
    "real": (WatchedAudit, FRAGMENT),
    "trivial": (Plumbing, 1000),
    "groups": (Plumbing, 5000),
    "stored": (StoredPlumbing, 5000),
}


def one_audit(folder: Path, bundle: Path, corpus: str, actors: int, kind: str) -> dict[str, Any]:
    """An audit on Ray in this process; what it took."""
    from safer_ray.distributed.ray_runner import RayRunner
    from safer_ray.distributed.session import ray_session

    source = SourceConfig(path=corpus, format="canonical")
    known_store()
    audits, rows = KINDS[kind]
    audit = audits(open_artifact(bundle, "auditor"), source, ScoresConfig(detector="safer"), fragment_rows=rows)
    config = RayConfig(min_actors=actors, max_actors=actors)
    out = folder / "out"
    out.mkdir(parents=True)
    with ray_session(config):
        began = time.perf_counter()
        counts = audit_corpus(audit, out, RayRunner(config))
        mapped = time.perf_counter() - began
        close_audit(audit, out, counts, mapped)
        seconds = time.perf_counter() - began
    committed = sorted((path.stat().st_mtime, read_json(path)["read"]) for path in (out / "done").iterdir())
    warm = len(committed) // 10  # actors have started by then
    steady = sum(n for _, n in committed[warm + 1 :]) / (committed[-1][0] - committed[warm][0])
    fragments = len(read_plan(out / "plan.parquet"))
    return {
        "rows": counts.read,
        "fragments": fragments,
        "seconds": seconds,
        "pairs_per_s": counts.read / seconds,
        "steady": steady,
        "device_busy": busy(Path(corpus).parent / "busy") if kind == "real" else None,
        "driver_mb": held_at_most(),
    }


def apart(*words: object) -> dict[str, Any]:
    """An audit in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.audit", "--child", folder, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return dict(json.loads(done.stdout.splitlines()[-1]))


def bare(bundle: Path, pairs: Sequence[dict[str, Any]], cores: int) -> float:
    """Pairs a second of the engine alone, scores among them."""
    from safer_ray.features.bundle import read_features
    from safer_ray.features.encoder import codes_table

    torch.set_num_threads(cores)
    engine = Encoder.load(bundle / "reward", sae=bundle / "sae")
    features = read_features(bundle / "features.json")
    engine.encode(pairs[:50])
    began = time.perf_counter()
    for start in range(0, len(pairs), FRAGMENT):
        pair_scores(codes_table(engine.encode(pairs[start : start + FRAGMENT])), features)
    return len(pairs) / (time.perf_counter() - began)


def real(folder: Path, count: int) -> list[dict[str, Any]]:
    bundle = write_bundle(folder).path
    pairs = [pair | {"pair_id": f"p{i}"} for i, pair in enumerate(read_pairs(count))]
    corpus = folder / "real"
    corpus.mkdir()
    write_pairs(pairs, corpus / "pairs.jsonl")
    told = []
    for actors in (1, 2):
        before = bare(bundle, pairs[: count // 4], actors)
        found = apart(bundle, corpus, actors, "real")
        after = bare(bundle, pairs[: count // 4], actors)
        engine = (before + after) / 2
        told.append(found | {"actors": actors, "engine": engine, "audit_vs_engine": found["steady"] / engine})
        print(
            f"real engine, {actors} actors: {found['steady']:.1f} pairs/s steady, {found['pairs_per_s']:.1f} with "
            f"start and end; bare engine {before:.1f} and {after:.1f}; ratio {told[-1]['audit_vs_engine']:.2f}; "
            f"actors at work {found['device_busy']:.2f} of their time",
            flush=True,
        )
    return told


def plumbing(folder: Path, bundle: Path, sizes: Sequence[int], counts: Sequence[int]) -> list[dict[str, Any]]:
    told = []
    for rows in sizes:
        for files in counts:
            corpus = folder / f"corpus-{rows}-{files}"
            write_corpus(corpus, rows, files)
            found = apart(bundle, corpus, 2, "trivial") | {"files": files}
            told.append(found)
            print(
                f"trivial engine, {rows:,} rows in {files:,} files: {found['pairs_per_s']:,.0f} pairs/s, "
                f"{found['seconds']:.1f} s, driver {found['driver_mb']:,.0f} MB",
                flush=True,
            )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--files", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--group-rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3, help="of one row group beside many")
    parser.add_argument("--json", type=local_path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_transformers()
    if given.child:
        folder, bundle, corpus, actors, kind = given.child
        print(json.dumps(one_audit(Path(folder), Path(bundle), corpus, int(actors), kind)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines = real(folder, given.pairs)
        bundle = next((folder / "made").glob("auditor-*"))
        moved = plumbing(folder, bundle, given.rows, given.files)
        grouped, of_groups = groups(folder / "groups", partial(apart, bundle), given.group_rows, given.rounds)
    largest, smallest = max(given.rows), min(given.rows)
    by = {(found["rows"], found["files"]): found for found in moved}
    few, many = min(given.files), max(given.files)
    figures = {
        "audit_vs_engine": min(found["audit_vs_engine"] for found in engines),
        "device_busy": min(found["device_busy"] for found in engines),
        "plumbing_pairs_per_s": by[largest, few]["pairs_per_s"],
        "driver_rss_mb": max(found["driver_mb"] for found in moved),
        "driver_rss_growth": by[largest, few]["driver_mb"] / by[smallest, few]["driver_mb"],
        "files_10_to_1000": by[largest, many]["seconds"] / by[largest, few]["seconds"],
        **of_groups,
    }
    for figure, goal in GOALS.items():
        print(f"{figure:<24} {figures[figure]:10.2f}   {goal}")
    write(given.json, figures, [*engines, *moved, *grouped])


if __name__ == "__main__":
    main()
