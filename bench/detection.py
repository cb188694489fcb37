"""Which detector finds planted errors: `python -m bench.detection [--run] [--json OUT]`.

Reads `results/lab_pku.json`; `--run` makes it anew with configs/lab_pku.yaml, which takes the data beside the
repository and about an hour on two CPU cores.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bench.common import local_path, write

RESULTS = Path(__file__).parents[1] / "results"
CONFIG = Path(__file__).parents[1] / "configs/lab_pku.yaml"
FIGURES = {
    "auroc_combined": "combined",
    "auroc_margin": "reward_margin",
    "auroc_safer": "safer",
    "auroc_confident": "confident_learning",
    "auroc_tfidf": "tfidf",
    "auroc_length": "length",
}


def run(out: Path) -> None:
    """The whole lab, its figures copied to `out`."""
    from safer_ray.config.read import load_config
    from safer_ray.pipeline.lab import run_lab
    from safer_ray.pipeline.runner import LocalRunner

    made = run_lab(load_config(CONFIG), LocalRunner())
    shutil.copyfile(made.path / "detection.json", out)


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a detector: AUROC with its interval out of fold, how far `combined` leads it, and AUROC in sample."""
    outside, inside = found["out_of_fold"], found["in_sample"]
    rows = []
    for name, values in outside["detectors"].items():
        auroc, low, high = values["auroc"]
        lead = outside["combined_minus"].get(name, {}).get("auroc")
        row = {"detector": name, "auroc": auroc, "low": low, "high": high, "combined_leads_by": lead}
        row["in_sample"] = inside["detectors"][name]["auroc"][0] if inside else None
        rows.append(row | {measure: values[measure][0] for measure in ("auprc", "precision_at_planted", "recall_5")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    path = RESULTS / "lab_pku.json"
    if given.run:
        run(path)
    if not path.exists():
        raise SystemExit(f"no {path}; make it with --run")
    found = json.loads(path.read_text(encoding="utf-8"))["uniform"]
    rows = table(found)
    seeds = len(found["out_of_fold"]["seeds"]["combined"])
    print(f"{found['planted']} of {found['pairs']} labels swapped, {seeds} seeds")
    for row in rows:
        lead = row["combined_leads_by"]
        ahead = f"combined {lead[0]:+.3f} [{lead[1]:+.3f}, {lead[2]:+.3f}]" if lead else ""
        inside = f"{row['in_sample']:.3f}" if row["in_sample"] is not None else "-"
        interval = f"{row['auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{row['detector']:<20} {interval}  in sample {inside}  {ahead}")
    by_name = {row["detector"]: row["auroc"] for row in rows}
    write(given.json, {figure: by_name[name] for figure, name in FIGURES.items()}, rows)


if __name__ == "__main__":
    main()
