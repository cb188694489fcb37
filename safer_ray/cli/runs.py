"""Whole runs on the command line: run, plan, ls, report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from safer_ray.cli.options import (
    config_argument,
    path_argument,
    path_option,
    source_option,
    text_option,
)
from safer_ray.cli.shared import (
    Assignments,
    Encoding,
    Fresh,
    Model,
    RunnerName,
    Split,
    TrustRemoteCode,
    at_work,
    check_out,
    console,
    emptied,
)
from safer_ray.errors import UserError

if TYPE_CHECKING:
    from safer_ray.storage.artifacts import Artifact

app = typer.Typer()


@app.command("run")
def run_command(
    config: Annotated[Path, config_argument(help="A YAML config, or the name of a shipped one: demo.")],
    assignments: Assignments = None,
    until: Annotated[str | None, text_option(help="Stop after this stage.")] = None,
    runner: RunnerName = "local",
    fresh: Fresh = False,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming", help="Allow every poison variant.")] = False,
) -> None:
    """Run all stages of a config; what is there already is not made again."""
    from safer_ray.config.read import load_config
    from safer_ray.pipeline.run import run

    loaded = load_config(config, assignments, red_team=red_team)
    with at_work(runner, loaded.ray, loaded.reward.shards) as (where, report):
        result = run(loaded, where, until=until, fresh=fresh, on_stage=report.stage)
    summary = result.directory / "summary.json"
    if until in (None, "report"):
        _closing_table(json.loads(summary.read_text(encoding="utf-8")), loaded.evaluate.base)
        console.print(f"\nreport   {result.directory / 'report.html'}\nsummary  {summary}")


@app.command("fit")
def fit_command(
    reward: Model,
    pairs: Annotated[
        list[str],
        source_option("--pairs", help="A file, folder, glob, also s3://BUCKET/…, or hub:NAME; may be repeated."),
    ],
    out: Annotated[Path, path_option(help="The folder of the run: bundle, report, and what they are made of.")],
    format: Annotated[str, text_option()] = "auto",
    split: Split = None,
    encoding: Encoding = None,
    licence: Annotated[str | None, text_option(help="Of the pairs; bundle and report name it.")] = None,
    assignments: Assignments = None,
    until: Annotated[str | None, text_option(help="Stop after this stage.")] = None,
    runner: RunnerName = "local",
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """From a finished reward model and preference pairs to a bundle and a report; run again, it goes on."""
    from safer_ray.pipeline.fit import Estimate, fit, fit_config

    out = check_out(out.absolute())
    given = {"format": format, "split": split, "encoding": encoding, "licence": licence}
    sources = [{"path": path} | {k: v for k, v in given.items() if v is not None} for path in pairs]
    told = [*(assignments or []), *(["reward.trust_remote_code=true"] if trust_remote_code else [])]
    config = fit_config(reward, sources, out, told)

    def show(found: Estimate) -> None:
        table = Table(title="What it will take, in one process of this machine", title_justify="left", box=None)
        table.show_header = False
        for name, value in found.lines():
            table.add_row(name, value)
        console.print(table)

    with emptied(out), at_work(runner, config.ray, config.reward.shards) as (where, report):
        made = fit(config, where, until=until, fresh=fresh, on_stage=report.stage, on_estimate=show)
    if until in (None, "report"):
        summary = made.directory / "summary.json"
        _closing_table(json.loads(summary.read_text(encoding="utf-8")), made.config.evaluate.base)
        console.print(f"\nbundle   {made.artifacts['auditor'].path}\nreport   {made.directory / 'report.html'}")
        others = sorted(
            path.name for path in made.directory.glob("auditor-*") if path != made.artifacts["auditor"].path
        )
        if others:
            console.print(f"older    {', '.join(others)}: of other settings; report and summary are of the new one")
        console.print(f"next     safer-ray audit --auditor {made.artifacts['auditor'].path} --pairs DATA --out OUT")
    else:
        console.print(f"stopped after {until}; the same command without --until goes on")


def _closing_table(summary: dict[str, Any], base: str) -> None:
    """Print what the run found, as a table."""
    found = summary["detection"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    sae = summary["sae"]
    selected = summary["selected_features"]
    facts.add_row("pairs", f"{summary['pairs']:,} ({summary['quarantined']} rows quarantined)")
    reward = summary["reward"]
    if "accuracy" in reward:
        facts.add_row("reward model", f"validation accuracy {reward['accuracy']:.3f}")
    else:
        facts.add_row("reward model", f"agrees with {reward['agreement']:.1%} of the labels")
    facts.add_row(
        "SAE",
        f"nmse {sae['nmse']:.3f}, explained variance {sae['explained_variance']:.3f}, "
        f"L0 {sae['l0']:.1f}, dead {sae['dead_share']:.1%}",
    )
    facts.add_row("features", f"{selected['safe']} safe, {selected['unsafe']} unsafe")
    if summary["truncated"]:
        facts.add_row("cut", f"{summary['truncated']:.0%} of the pairs have a side longer than the model reads")
    console.print()
    console.print(facts)
    if found["auroc"]:
        table = Table(title=f"Finding {found['planted']} planted label swaps", title_justify="left")
        table.add_column("strategy")
        table.add_column("AUROC", justify="right")
        table.add_column("precision at planted", justify="right")
        for name, auroc in found["auroc"].items():
            table.add_row(name, f"{auroc:.3f}", f"{found['precision_at_planted'][name]:.3f}")
        console.print(table)
    if summary["sections"]:
        console.print(_accuracy_table(summary, base))


def _accuracy_table(summary: dict[str, Any], base: str) -> Table:
    """One row a model, one column a section, the p-value of its change (by Holm over all tests of the run) under each
    accuracy: there are more models than sections, and a name is never broken."""
    sections = sorted({section for values in summary["sections"].values() for section in values})
    number = sum(len(by_section) for by_section in summary["tests"].values())
    how = f" (p by sign flips of prompts against {base}, Holm over the run's {number} tests)"
    title = f"Held-out accuracy{how if number else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    for section in sections:
        table.add_column(Text(section), justify="right", overflow="fold")
    for name, values in summary["sections"].items():
        tests = summary["tests"].get(f"{name} vs {base}", {})
        told = {section: Text(f"\np {test['p_holm']:.2g}", "dim") for section, test in tests.items()}
        cells = [Text.assemble(f"{values[s]:.3f}", told.get(s, "")) if s in values else "" for s in sections]
        table.add_row(Text(name), *cells)
    return table


@app.command()
def plan(
    config: Annotated[Path, config_argument(help="A YAML config, or the name of a shipped one.")],
    assignments: Assignments = None,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming")] = False,
) -> None:
    """List the artifacts of a config in order, and which of them are there."""
    from safer_ray.config.read import load_config
    from safer_ray.pipeline.run import run
    from safer_ray.pipeline.runner import LocalRunner

    loaded = load_config(config, assignments, red_team=red_team)

    def show(name: str, artifact: "Artifact | None") -> None:
        console.print(f"{'there  ' if artifact else 'missing'} {name}")

    run(loaded, LocalRunner(), dry=True, on_stage=show)


@app.command("ls")
def list_runs(root: Annotated[Path, path_argument(help="A folder of runs, or one run.")] = Path("runs")) -> None:
    """List the artifacts of runs."""
    if not root.is_dir():
        raise UserError(f"no runs in {root}; `safer-ray run CONFIG` makes one")
    from safer_ray.data.source_files import is_artifact
    from safer_ray.storage.artifacts import open_artifact

    table = Table("artifact", "rows", "seconds", "made by", box=None, pad_edge=False)
    for path in sorted(filter(Path.is_file, root.glob("**/manifest.json")), key=lambda p: p.stat().st_mtime):
        if path.parent.parent.name in ("auditor",) or "auditor-" in path.parent.parent.name:
            continue
        if not is_artifact(path.parent):
            console.print(f"{path} is no manifest of an artifact")
            continue
        artifact = open_artifact(path.parent)
        rows = " ".join(f"{k}={v}" for k, v in artifact.manifest.get("rows", {}).items())
        name = Text.assemble(str(path.parent), *([(" red team", "red")] if artifact.red_team else []))
        version = str(artifact.manifest["packages"].get("safer_ray", "?"))
        seconds = artifact.manifest.get("wall_seconds")
        table.add_row(name, rows, f"{seconds:.1f}" if isinstance(seconds, int | float) else "?", version)
    console.print(table, width=1000)  # whole paths, also where they are longer than the terminal is wide


@app.command()
def report(
    config: Annotated[Path, config_argument(help="The config of a finished run.")],
    assignments: Assignments = None,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming")] = False,
) -> None:
    """Stage 14: write the report and the summary of a finished run again."""
    run_command(config, assignments, until="report", red_team=red_team)
