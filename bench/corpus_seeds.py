"""Does the demo's result hold for other corpora? Detection and flips over several corpus seeds.

python -m bench.corpus_seeds [--seeds 0 1 2] [--root runs/seeds] [--set key=value ...] [--json OUT]
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import local_path, write
from safer_ray.config.read import load_config
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.summary import RunView, summarise

FLIPS = "flip_safer_5 vs flip_random_5"


def measure(seed: int, root: Path, assignments: list[str]) -> dict[str, Any]:
    """The demo on another corpus, with another draw of planted swaps; one row of the table."""
    seeds = [f"name=seed{seed}", f"root={root}", f"corpus.seed={seed}", f"noise.seed={seed}"]
    whole = load_config(Path("configs/demo.yaml"), seeds + assignments)
    flips = {name: curate for name, curate in whole.curate.items() if name.startswith("flip_")}
    config = whole.model_copy(update={"curate": flips})
    made = run(config, LocalRunner())
    summary = summarise(RunView(made.config, made.artifacts, made.models, made.evaluations, made.curated))
    auroc, sections, test = summary["detection"]["auroc"], summary["sections"], summary["tests"][FLIPS]["safety"]
    return {
        "seed": seed,
        **{f"auroc_{name}": value for name, value in auroc.items()},
        "safety_clean": sections["clean"]["safety"],
        "safety_flip_safer": sections["flip_safer_5"]["safety"],
        "safety_flip_random": sections["flip_random_5"]["safety"],
        "chat_clean": sections["clean"]["chat"],
        "chat_flip_safer": sections["flip_safer_5"]["chat"],
        "flip_p": test["p"],
        "features": sum(summary["selected_features"].values()),
        "seconds": sum(summary["seconds"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=local_path, default=Path("runs/seeds"))
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    rows = [measure(seed, given.root, given.assignments) for seed in given.seeds]
    table = Table("seed", *(str(row["seed"]) for row in rows))
    for name in list(rows[0])[1:]:
        table.add_row(name, *(f"{row[name]:.3g}" for row in rows))
    Console().print(table)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "seed"}
    figures: dict[str, float | None] = {
        "auroc_safer": mean["auroc_safer"],
        "auroc_length": mean["auroc_length"],
        "auroc_reward_margin": mean["auroc_reward_margin"],
        "flip_safety_cost": mean["safety_flip_random"] - mean["safety_flip_safer"],
        "flip_chat_cost": mean["chat_clean"] - mean["chat_flip_safer"],
        "flip_p_max": max(row["flip_p"] for row in rows),
    }
    for name, value in figures.items():
        print(f"{name:<22} {value:.4f}")
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
