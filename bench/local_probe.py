"""The local probe in `combined` against the n x n kernel it stands for: `python -m bench.local_probe [--json OUT]`.

Time and memory at 5,000, 20,000 and 50,000 pairs of random vectors, each in a process of its own, the kernel at 5,000
alone: at 20,000 a single matrix of it takes 3.2 GB, and it makes several. With `--lab CONFIG` (configs/lab_pku.yaml,
configs/lab_harmless.yaml) also the AUROC of both on the lab's pairs, by the trunk as it was before any training, with
5% of the labels swapped under three seeds; that takes ten minutes on two CPU cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import local_path, write
from safer_ray.detection.combined import splits
from safer_ray.detection.local_probe import LOCAL, fit_local

SIZES = (5_000, 20_000, 50_000)
KERNEL = 5_000  # the most pairs that the kernel is tried on
WIDTH = 768  # two layers of 384
SEEDS = (0, 1, 2)
Says = Callable[[np.ndarray, np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray], Any]  # responses and prompts to what says


def fit_kernel(response: np.ndarray, prompt: np.ndarray) -> Says:
    """The support vector machine on the kernel itself."""
    from sklearn.svm import SVC

    scale = np.maximum(np.sqrt((response**2).mean(axis=0)), 1e-9)
    centre, spread = prompt.mean(axis=0), np.maximum(prompt.std(axis=0), 1e-9)

    def near(rows: np.ndarray) -> np.ndarray:
        rows = (rows - centre) / spread
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    scaled, own = response / scale, near(prompt)
    kernel = scaled @ scaled.T * (1 + LOCAL * np.maximum(own @ own.T, 0))
    size = kernel.diagonal().mean()
    # Every other pair is shown swapped, since a support vector machine needs two classes.
    sign = np.where(np.arange(len(response)) % 2, -1.0, 1.0)
    model = SVC(C=0.3, kernel="precomputed", cache_size=500).fit(kernel / size * np.outer(sign, sign), sign)
    held = model.support_
    dual = model.dual_coef_[0] * sign[held]
    return lambda r, p: ((r / scale) @ scaled[held].T * (1 + LOCAL * np.maximum(near(p) @ own[held].T, 0))) @ dual


FITS: dict[str, Fit] = {"kernel": fit_kernel, "landmarks": fit_local}


def made(pairs: int, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Responses of which the trace of what is right differs by one of 16 kinds of prompt, with a share that all have;
    prompts; and which pairs are labelled wrong."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(16, width))
    kind = rng.integers(0, 16, pairs)
    wrong = rng.random(pairs) < 0.05
    trace = (rng.normal(size=(16, width)) + rng.normal(size=width)) * np.sqrt(WIDTH / width) / 30
    response = (rng.normal(size=(pairs, width)) + trace[kind]) * np.where(wrong, -1, 1)[:, None]
    return response, kinds[kind] + rng.normal(size=(pairs, width)), wrong


def auroc(fit: Fit, given: tuple[np.ndarray, ...], fold: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    response, prompt, wrong = given
    out = np.zeros(len(wrong))
    for train, held in splits(fold):
        out[held] = -fit(response[train], prompt[train])(response[held], prompt[held])
    return float(roc_auc_score(wrong, out))


def status(field: str) -> int:
    """A figure of this process that Linux tells, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measured(name: str, pairs: int) -> dict[str, Any]:
    """Fit on so many pairs in this process; seconds, and its most memory above what it held before, in MB (Linux)."""
    response, prompt, wrong = made(pairs + 2_000)
    new = slice(pairs, None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is of now on
    before = status("VmRSS")
    began = time.perf_counter()
    said = FITS[name](response[:pairs], prompt[:pairs])
    seconds = time.perf_counter() - began
    memory = status("VmHWM") - before
    from sklearn.metrics import roc_auc_score

    found = float(roc_auc_score(wrong[new], -said(response[new], prompt[new])))
    return {"form": name, "pairs": pairs, "seconds": seconds, "memory_mb": memory / 1024, "auroc": found}


def lab_vectors(config_path: Path, root: Path) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Response and prompt vectors of a lab's pairs by its untrained trunk, their ids and groups."""
    from safer_ray.config.read import load_config
    from safer_ray.features.codes import matrix_of
    from safer_ray.features.passes import MeanVectors
    from safer_ray.pipeline import model_stages
    from safer_ray.pipeline.detector_stages import vector_layers
    from safer_ray.pipeline.finished_model import settled
    from safer_ray.pipeline.inputs import place_of_run
    from safer_ray.pipeline.runner import LocalRunner
    from safer_ray.pipeline.stage import StageContext
    from safer_ray.reward.checkpoints import new_reward_model, save_reward_model
    from safer_ray.schema import rows_of
    from safer_ray.storage.artifacts import read_parts

    config = settled(load_config(config_path).model_copy(update={"root": root}))
    ctx = StageContext.of(
        place_of_run(config, fresh=False, on_stage=lambda name, artifact: None), LocalRunner(), config
    )
    pairs = read_parts(model_stages.pairs(ctx, config.pairs).path)
    untrained = new_reward_model(config.reward, lambda: iter(()))
    save_reward_model(untrained, root / "untrained", untrained.model.state_dict())
    ids = pairs["pair_id"].to_pylist()
    read = MeanVectors(root / "untrained", vector_layers(config))
    found, _ = rows_of(read(pairs), ids)
    return matrix_of(found["response"]), matrix_of(found["prompt"]), ids, pairs["group"].to_pylist()


def in_lab(config_path: Path) -> list[dict[str, Any]]:
    """AUROC of both forms on a lab's pairs, seed by seed."""
    from safer_ray.pipeline.crossfit import fold_of
    from safer_ray.strategies import random_order

    with tempfile.TemporaryDirectory() as root:
        response, prompt, ids, groups = lab_vectors(config_path, Path(root))
    rows = []
    for seed in SEEDS:
        order = np.argsort(random_order(ids, f"noise:{seed}"), kind="stable")
        wrong = np.zeros(len(ids), dtype=bool)
        wrong[order[: round(0.05 * len(ids))]] = True
        given = response * np.where(wrong, -1, 1)[:, None], prompt, wrong
        found = {name: auroc(fit, given, fold_of(groups, 5, 0)) for name, fit in FITS.items()}
        rows.append({"lab": config_path.stem, "seed": seed, "pairs": len(ids), **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lab", type=local_path, nargs="*", default=[])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.measure[0], int(given.measure[1]))))
        return
    rows: list[dict[str, Any]] = []
    figures: dict[str, float | None] = {}
    for name, size in [("kernel", KERNEL), *(("landmarks", size) for size in given.sizes)]:
        command = [sys.executable, "-m", "bench.local_probe", "--measure", name, str(size)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print("{form:<10} {pairs:>7,} pairs {seconds:>7.1f} s {memory_mb:>7,.0f} MB  AUROC {auroc:.4f}".format(**row))
        rows.append(row)
        figures |= {f"{name}_{size}_s": row["seconds"], f"{name}_{size}_mb": row["memory_mb"]}
    for config_path in given.lab:
        told = in_lab(config_path)
        rows += told
        changes = [row["landmarks"] - row["kernel"] for row in told]
        for row, change in zip(told, changes, strict=True):
            print("{lab} seed {seed}: kernel {kernel:.4f}, landmarks {landmarks:.4f}".format(**row), f"{change:+.4f}")
        figures[f"auroc_change_{config_path.stem}"] = float(np.mean(changes))
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
