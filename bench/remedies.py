"""Measure what was tried to make the SAFER score find more errors: `python -m bench.remedies [--root RUNS] [--json
OUT]`.

Reads the artifacts of `safer-ray lab configs/lab_pku.yaml`, whose folders it needs (`--root`, default runs), and writes
`results/remedies.json`: AUROC out of fold on the same planted swaps, with 95% intervals over prompts.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from bench.common import local_path, write
from safer_ray.config.read import load_config
from safer_ray.config.sections import RunConfig
from safer_ray.detection.combined import fit_effect, splits
from safer_ray.detection.quality import compare
from safer_ray.pipeline import crossfit, detector_stages, model_stages
from safer_ray.pipeline.crossfit import Fold, OutOfFold
from safer_ray.pipeline.detector_stages import read_folds
from safer_ray.pipeline.inputs import durable_path
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext, pairs_of
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Place, read_parts
from safer_ray.storage.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/remedies.json"
THRESHOLDS = (0.15, 0.10, 0.05, 0.02, 0.01, 0.0)  # of |AUROC - 0.5| on the exchanges, for a rating of 5


class Seed(NamedTuple):
    """One planting, rows in the order of the pairs."""

    ids: list[str]
    groups: list[str]
    planted: np.ndarray
    fold: np.ndarray
    contrast: sp.csr_matrix
    folds: list[Fold]


def open_seed(ctx: StageContext, config: RunConfig, seed: int) -> Seed:
    """From artifacts that are there."""
    assert config.lab is not None
    pairs = model_stages.pairs(ctx, config.pairs)
    noisy = model_stages.noise(ctx, config.lab.noises["uniform"].model_copy(update={"seed": seed}), pairs)
    fitted: OutOfFold = crossfit.cross_fit(ctx, config, noisy)
    rows = read_parts(pairs_of(noisy), ["pair_id", "group"])
    ids = rows["pair_id"].to_pylist()
    read = read_folds(fitted.folds, detector_stages.trunk_vectors(ctx, config, noisy, fitted), ids)
    truth, _ = rows_of(read_parts(noisy.path / "truth"), ids)
    planted = np.array(truth["planted"].to_pylist(), dtype=bool)
    groups = rows["group"].to_pylist()
    return Seed(ids, groups, planted, read.fold, read.readings.contrast, fitted.folds)


def by_weights(seed: Seed, weigh: Callable[[dict[int, float], dict[int, float]], dict[int, float]]) -> np.ndarray:
    """Suspicion by a weighted sum of feature contrasts; `weigh` sees a fold's saliences and its judge's separations."""
    out = np.zeros(len(seed.ids))
    for number, fold in enumerate(seed.folds):
        salience, separation = judged(fold)
        weights = np.zeros(seed.contrast.shape[1])
        for feature, value in weigh(salience, separation).items():
            weights[feature] = value
        rows = seed.fold == number
        out[rows] = -(seed.contrast[rows] @ weights)
    return out


def judged(fold: Fold) -> tuple[dict[int, float], dict[int, float]]:
    """Salience of every feature, and AUROC - 0.5 on the exchanges of every candidate."""
    inputs = [json.loads((fold.auditor.path / "manifest.json").read_text(encoding="utf-8"))["inputs"]]
    folder = fold.auditor.path.parent
    inputs.append(json.loads((folder / inputs[0]["features"] / "manifest.json").read_text(encoding="utf-8"))["inputs"])
    table = read_parts(folder / inputs[1]["salience"])
    salience = dict(zip(table["feature"].to_pylist(), table["salience"].to_pylist(), strict=True))
    verdicts = read_parts(folder / inputs[1]["ratings"])
    raw = zip(verdicts["feature"].to_pylist(), verdicts["raw"].to_pylist(), strict=True)
    return salience, {feature: json.loads(text)["auroc"] - 0.5 for feature, text in raw}


def agreed(threshold: float, limit: int, weighted: bool = False) -> Callable[..., dict[int, float]]:
    """Features that the judge separates by at least `threshold`, the way their salience says; the first `limit`."""

    def weigh(salience: dict[int, float], separation: dict[int, float]) -> dict[int, float]:
        kept = [f for f, d in separation.items() if abs(d) >= threshold and d * salience[f] > 0]
        kept = sorted(kept, key=lambda f: -abs(salience[f]))[:limit]
        return {f: salience[f] if weighted else float(np.sign(salience[f])) for f in kept}

    return weigh


def largest(count: int, weighted: bool) -> Callable[..., dict[int, float]]:
    """No judge: the features of largest |salience|."""

    def weigh(salience: dict[int, float], _: dict[int, float]) -> dict[int, float]:
        kept = sorted(salience, key=lambda f: -abs(salience[f]))[:count]
        return {f: salience[f] if weighted else float(np.sign(salience[f])) for f in kept}

    return weigh


def by_effect(seed: Seed) -> np.ndarray:
    """Suspicion by all contrasts, weighted by their effect sizes in the other folds."""
    out = np.zeros(len(seed.ids))
    for train, held in splits(seed.fold):
        out[held] = -fit_effect(seed.contrast[train])(seed.contrast[held])
    return out


def remedies(seed: Seed) -> dict[str, np.ndarray]:
    """Suspicions by name, in the order in which they were tried."""
    found = {f"judge: rating 5 from {t:.2f} on, 32 features": by_weights(seed, agreed(t, 32)) for t in THRESHOLDS}
    found["judge: any sign that agrees, all features"] = by_weights(seed, agreed(0.0, 256))
    found["the same, weighted by salience"] = by_weights(seed, agreed(0.0, 256, weighted=True))
    found["no judge: 256 features"] = by_weights(seed, largest(256, weighted=False))
    found["no judge: all features, weighted by salience"] = by_weights(seed, largest(10**6, weighted=True))
    found["no judge: all features, weighted by effect size"] = by_effect(seed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=local_path, default=Path("runs"))
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    config = load_config(ROOT / "configs/lab_pku.yaml")
    assert config.lab is not None
    ctx = StageContext.of(Place(durable_path(given.root) / config.name), LocalRunner(), config)
    seeds = [open_seed(ctx, config, seed) for seed in config.lab.seeds]
    tried = [remedies(seed) for seed in seeds]
    suspicions = {name: [each[name] for each in tried] for name in tried[0]}
    found = compare(suspicions, [seed.planted for seed in seeds], seeds[0].groups, against=[])
    rows = [{"remedy": name, "auroc": [round(v, 4) for v in by["auroc"]]} for name, by in found.intervals.items()]
    write_json({"seeds": list(config.lab.seeds), "rows": rows}, RESULTS)
    for row in rows:
        print(f"{row['remedy']:<55} {row['auroc'][0]:.3f} [{row['auroc'][1]:.3f}, {row['auroc'][2]:.3f}]")
    write(given.json, {}, rows)


if __name__ == "__main__":
    main()
