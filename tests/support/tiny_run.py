"""A whole run on a tiny synthetic corpus, made once a session and shared by the end-to-end tests."""

import fcntl
import functools
import shutil
from pathlib import Path

import pyarrow as pa

from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.config.read import load_config
from safer_ray.config.sections import RunConfig, ScoresConfig, SourceConfig
from safer_ray.pipeline.run import Run, run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import Artifact, read_parts
from safer_ray.storage.files import read_parquet

CONFIG = """
name: tiny
root: {root}
fragment_rows: 100
corpus: {{train_per_section: 160, heldout_per_section: 60, seed: 0}}
pairs:
  sources: [{{path: "corpus:train.jsonl", format: canonical, licence: synthetic}}]
evaluation:
  sources: [{{path: "corpus:heldout.jsonl", format: canonical, licence: synthetic}}]
noise: {{swap_percent: 5, where: section == safety, seed: 0}}
reward:
  base: {{hidden: 32, layers: 2, heads: 2, intermediate: 48, vocabulary: 400, positions: 160}}
  max_length: 160
  learning_rate: 1.0e-3
activations: {{layer: 1}}
sae: {{latents: 64, k: 4, steps: 60, batch_size: 256, learning_rate: 1.0e-3, dead_after: 50000}}
judge: {{exchanges: "corpus:probe.yaml", thresholds: [0.0, 0.0, 0.0, 0.0]}}
curate:
  flip_safer_5: {{strategy: safer, action: poison, percent: 5, where: section == safety, red_team: true}}
  flip_random_5: {{strategy: random, action: poison, percent: 5, where: section == safety, red_team: true}}
  drop_safer_5: {{strategy: safer, action: drop, percent: 5, where: section == safety}}
report: {{title: "A tiny run"}}
"""
VARIANTS = ("flip_safer_5", "flip_random_5", "drop_safer_5")
POISONED = VARIANTS[:2]


def write_config(folder: Path, more: str = "") -> Path:
    """The tiny config in `folder`, its runs below `folder/runs`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(root=folder / "runs") + more, encoding="utf-8")
    return path


def tiny_config(folder: Path, *assignments: str) -> RunConfig:
    return load_config(write_config(folder), list(assignments))


@functools.cache
def finished(session: Path) -> Run:
    """The finished run of this test session; of processes that share the tests, one makes it and each has a copy."""
    if session.name.startswith("popen-"):  # the folder of one such process
        with (session.parent / "tiny.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copied(run(tiny_config(session.parent / "tiny"), LocalRunner()), session)
    return run(tiny_config(session / "tiny"), LocalRunner())


def copied(made: Run, folder: Path) -> None:
    """Put a finished run where `finished(folder)` finds it."""
    shutil.copytree(made.directory.parent, folder / "tiny/runs")


def audited(config: ScoresConfig, pairs: str | Path, bundle: Artifact, out: Path) -> pa.Table:
    """The scores of an audit of a file, or of the parts in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = Path(pairs)
    source = SourceConfig(path=str(path / "part-*.parquet" if path.is_dir() else path))
    audit_corpus(Audit(bundle, source, config), out, LocalRunner())
    return read_parts(out / "scores")


def every(made: Run) -> dict[str, Artifact]:
    """All artifacts of a run by name."""
    groups = (made.artifacts, made.models, made.evaluations, made.curated)
    return {artifact.name: artifact for group in groups for artifact in group.values()}


def tables(artifact: Path) -> dict[str, pa.Table]:
    """The Parquet rows below a directory: those of a folder's numbered parts together, others by file; the plan is no
    part of them."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(p for p in artifact.rglob("*.parquet") if p.name != "plan.parquet"):
        kind = path.parent / path.name.split("part-")[0]
        kinds.setdefault(str(kind.relative_to(artifact)), []).append(path)
    return {kind: pa.concat_tables(map(read_parquet, paths)) for kind, paths in kinds.items()}
