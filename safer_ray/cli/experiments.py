"""The noise lab and sweeps on the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from safer_ray.cli.options import (
    config_argument,
)
from safer_ray.cli.shared import Assignments, Fresh, RunnerName, at_work, console

app = typer.Typer()


@app.command("lab")
def lab_command(
    config: Annotated[Path, config_argument(help="A YAML config with a `lab` section, or a name, say lab_pku.")],
    assignments: Assignments = None,
    runner: RunnerName = "local",
    fresh: Fresh = False,
) -> None:
    """Plant label errors and measure what finds them: every detector, out of fold and in sample, with intervals."""
    from safer_ray.config.read import load_config
    from safer_ray.pipeline.lab import run_lab

    loaded = load_config(config, assignments)
    with at_work(runner, loaded.ray, loaded.reward.shards) as (where, report):
        made = run_lab(loaded, where, fresh=fresh, on_stage=report.stage)
    for name, found in made.metrics.items():
        console.print(_detection_table(name, found))
    console.print(f"\n{made.path / 'page.html'}")


@app.command("sweep")
def sweep_command(
    config: Annotated[Path, config_argument(help="A YAML config with a `sweep` section, or a name, say sweep_smoke.")],
    assignments: Assignments = None,
    runner: RunnerName = "local",
    fresh: Fresh = False,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming", help="Allow every poison variant.")] = False,
) -> None:
    """Curate, retrain and evaluate over strategies, percents and seeds."""
    from safer_ray.config.read import load_config
    from safer_ray.pipeline.sweep import run_sweep

    loaded = load_config(config, assignments, red_team=red_team)
    with at_work(runner, loaded.ray, loaded.reward.shards) as (where, report):
        made = run_sweep(loaded, where, fresh=fresh, on_stage=report.stage)
    console.print(_sweep_table(made.metrics))
    console.print(f"\n{made.path / 'page.html'}")


def _sweep_table(found: dict[str, Any]) -> Table:
    """One row a cell and section: accuracy, and what it changed in points, with its p."""
    from safer_ray.report.experiment_report import cell_name, change_with_p

    title = (
        f"{len(found['seeds'])} seeds, retraining {found['retraining']}; points [95% interval over {found['drawn']}], "
        f"p by Holm over {found['tests']} changes"
    )
    table = Table("cell", "section", "accuracy", "against clean", "against random", title=title, title_justify="left")
    for row in found["rows"]:
        changes = [change_with_p(row, rival) for rival in ("against_clean", "against_random")]
        table.add_row(cell_name(row), row["section"], f"{row['against_clean']['accuracy']:.3f}", *changes)
    return table


def _detection_table(name: str, found: dict[str, Any]) -> Table:
    """One row a detector: its AUROC out of fold and in sample, and how far `combined` leads it."""
    told = f"{found['planted']} errors among {found['pairs']:,} pairs"
    title = f"{name}: {told}, AUROC [95% interval over prompts, each by itself]"
    table = Table("detector", "out of fold", "combined leads by", "in sample", title=title, title_justify="left")
    outside, inside = found["out_of_fold"], found["in_sample"]
    for detector, values in outside["detectors"].items():
        lead = outside["combined_minus"].get(detector)
        cells = [values["auroc"], lead["auroc"] if lead else None]
        cells.append(inside["detectors"][detector]["auroc"] if inside else None)
        table.add_row(detector, *("{:.3f} [{:.3f}, {:.3f}]".format(*cell) if cell else "" for cell in cells))
    return table
