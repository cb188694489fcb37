"""Audits under fire: python tests/chaos/fire.py FOLDER [--kills 20] [--seed 0] [--nodes 3] [--actors 3].

A cluster of several nodes on this machine audits a corpus; at random moments an actor, a task's worker, a whole node
or the driver is killed with SIGKILL (a driver is started again, by the same command; a node is replaced). When an audit
has ended, its rows are compared with those of one that nobody disturbed; audits follow each other until the kills are
used.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import noting
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import support.environment  # noqa: F401  # sets what Ray and torch read from the environment
from ray.cluster_utils import Cluster
from support.tiny_run import finished

from safer_ray.storage.artifacts import part_files, read_parts, read_plan
from safer_ray.storage.files import read_json
from safer_ray.storage.quarantine import quarantine_rows

FRAGMENT = 60
KINDS = ("actor", "task", "node", "driver")
PAUSE = (1.0, 6.0)  # seconds between two kills
PATIENCE = 300.0  # seconds without a committed fragment, after which an audit hangs
BAD = ('{"prompt": 3}\n', "not JSON\n", '{"chosen": "a", "rejected": "a"}\n')


def write_corpus(folder: Path, count: int) -> tuple[Path, Path]:
    """A bundle, and so many pairs with a few rows of no use, in files of several kinds."""
    made = finished(folder)
    pairs = read_parts(made.artifacts["pairs"].path).select(["prompt", "chosen", "rejected"]).to_pylist()
    half = count // 2
    rows = [json.dumps({"id": f"p{i}", **pairs[i % len(pairs)]}) + "\n" for i in range(half)]
    for i in range(0, half, 97):
        rows[i] = BAD[i % len(BAD)]
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    (corpus / "a.jsonl").write_text("".join(rows), encoding="utf-8")
    rest = pa.Table.from_pylist([{"id": f"q{i}", **pairs[i % len(pairs)]} for i in range(half)])
    pq.write_table(rest, corpus / "b.parquet", row_group_size=500)
    return made.artifacts["auditor"].path, corpus


@dataclass
class Fire:
    """A cluster, the audit that runs on it, and what was killed."""

    folder: Path
    bundle: Path
    corpus: Path
    random: random.Random
    actors: int
    kinds: list[str] = field(default_factory=list)  # what is to be killed next, last first
    killed: Counter[str] = field(default_factory=Counter)

    def notes(self, out: Path) -> Path:
        return self.folder / f"notes-{out.name}"

    def command(self, out: Path, runner: str) -> list[str]:
        words = ["audit", "--auditor", self.bundle, "--pairs", self.corpus, "--out", out, "--runner", runner]
        words += ["--fragment-rows", FRAGMENT, "--detector", "safer", "--flag-quantile", "0.2"]
        words += ["--actors", f"1:{self.actors}"] if runner == "ray" else []
        program = [noting.__file__] if runner == "ray" else ["-c", "from safer_ray.cli.app import main; main()"]
        return [sys.executable, *map(str, [*program, *words])]

    def start(self, out: Path, address: str) -> subprocess.Popen[bytes]:
        said = (self.folder / "driver.log").open("ab")
        env = os.environ | {"RAY_ADDRESS": address, noting.NOTES: str(self.notes(out))}
        return subprocess.Popen(self.command(out, "ray"), env=env, stdout=said, stderr=said)

    def audit(self, out: Path, cluster: Cluster, kills: int) -> None:
        """One audit, under at most so many kills.

        Raises:
            AssertionError: it fails by itself, or does nothing for `PATIENCE` seconds.
        """
        driver, moved, done = self.start(out, cluster.address), time.monotonic(), 0
        pause = self.random.uniform(*PAUSE)
        at = time.monotonic()
        try:
            while True:
                time.sleep(0.05)
                if driver.poll() is not None:
                    assert driver.returncode == 0, (self.folder / "driver.log").read_text()[-3000:]
                    return
                now = len(list((out / "done").glob("*.json")))
                if now != done:
                    done, moved = now, time.monotonic()
                assert time.monotonic() - moved < PATIENCE, f"{out}: nothing for {PATIENCE} s at fragment {done}"
                if not done or kills == 0:
                    at = time.monotonic()  # it has not begun, or may go on in peace
                elif time.monotonic() - at > pause:
                    kind = self.next_kind()
                    hit, driver = self.kill(kind, driver, cluster, out)
                    if not hit:
                        self.kinds.append(kind)  # there is nothing of this kind at the moment
                        continue
                    self.killed[kind] += 1
                    kills -= 1
                    at, pause = time.monotonic(), self.random.uniform(*PAUSE)
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()

    def next_kind(self) -> str:
        """Every kind as often as any other, in random order."""
        if not self.kinds:
            self.kinds = self.random.sample(KINDS, len(KINDS))
        return self.kinds.pop()

    def kill(
        self, kind: str, driver: subprocess.Popen[bytes], cluster: Cluster, out: Path
    ) -> tuple[bool, subprocess.Popen[bytes]]:
        """Whether there was something to kill, and the driver from now on."""
        if kind == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            return True, self.start(out, cluster.address)
        if kind == "node":
            cluster.remove_node(self.random.choice(list(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=2)
            return True, driver
        ours = psutil.Process().children(recursive=True)  # of the nodes that this process started
        workers = [process for process in ours if _is_worker(process, actor=kind == "actor")]
        if not workers:
            return False, driver
        try:
            self.random.choice(workers).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False, driver
        return True, driver


def _is_worker(process: psutil.Process, actor: bool) -> bool:
    """Whether a process is an actor, or a task, at the audit's work."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and ("MapWorker" in title) == actor and ("Map" in title or "map" in title.lower())


def compared(out: Path, undisturbed: Path) -> dict[str, int]:
    """Rows lost, duplicated and different, of scores and quarantine."""
    told = Counter({"lost": 0, "duplicated": 0, "different": 0})
    for name in ("scores", "quarantine"):
        ours, theirs = (
            (read_parts(at / name) if name == "scores" else quarantine_rows(at)).to_pylist()
            for at in (out, undisturbed)
        )
        found = Counter(row["row_key"] for row in ours)
        wanted = {row["row_key"]: row for row in theirs}
        told["lost"] += len(wanted.keys() - found.keys())
        told["duplicated"] += sum(count - 1 for count in found.values())
        told["different"] += sum(_differ(row, wanted.get(row["row_key"])) for row in ours)
    assert [p.name for p in part_files(out / "scores")] == [p.name for p in part_files(undisturbed / "scores")]
    return dict(told)


def _differ(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    if other is None:
        return True
    close = [k for k, v in one.items() if isinstance(v, float) and k != "suspicion"]
    exact = ("pair_id", "extra", "reason", "position", "source")
    return not np.allclose([one[k] for k in close], [other[k] for k in close], rtol=1e-5, atol=1e-5) or any(
        one.get(k) != other.get(k) for k in exact
    )


def under_fire(folder: Path, kills: int, seed: int, rows: int, nodes: int, actors: int) -> dict[str, Any]:
    """Audits until `kills` processes are killed; what became of the rows."""
    began = time.monotonic()
    bundle, corpus = write_corpus(folder, rows)
    fire = Fire(folder, bundle, corpus, random.Random(seed), actors)
    subprocess.run(fire.command(folder / "undisturbed", "local"), check=True, capture_output=True)
    fragments = len(read_plan(folder / "undisturbed/plan.parquet"))
    totals: Counter[str] = Counter()
    audits = 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=2)
        while (left := kills - fire.killed.total()) > 0:
            out = folder / f"audit-{audits}"
            fire.audit(out, cluster, left)
            totals.update(compared(out, folder / "undisturbed"))
            totals["begun_again"] += noting.begun_again(fire.notes(out))
            totals["restarts"] += sum(read_json(path)["restarts"] for path in (out / "done").iterdir())
            totals["quarantined_by_kills"] += sum(
                "failed twice" in row["reason"] for row in quarantine_rows(out).to_pylist()
            )
            audits += 1
            shutil.rmtree(out)
    finally:
        cluster.shutdown()
    return {
        "kills": dict(fire.killed),
        "audits": audits,
        "rows": rows,
        "fragments": fragments,
        "nodes": nodes,
        "actors": actors,
        **totals,
        "begun_again_at_most": kills * actors,
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--actors", type=int, default=3, help="at most")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = under_fire(given.folder.resolve(), given.kills, given.seed, given.rows, given.nodes, given.actors)
    print(json.dumps(found, indent=1))
    wrong = any(found[name] for name in ("lost", "duplicated", "different"))
    sys.exit(wrong or found["begun_again"] > found["begun_again_at_most"])
