"""The command line: whole runs, one command a stage, audits and a look at data. Heavy modules load inside commands."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from safer_ray import __version__
from safer_ray.errors import SaferError, UserError, explained, one_line

if TYPE_CHECKING:
    from safer_ray.storage.artifacts import Artifact

from safer_ray.cli import audit_tools, audits, saes, stages
from safer_ray.cli.options import (
    config_argument,
    count_option,
    days_option,
    path_argument,
    path_option,
    source_argument,
    text_argument,
    text_option,
)
from safer_ray.cli.shared import (
    Assignments,
    Fresh,
    RunnerName,
    at_work,
    console,
    state,
)

app = typer.Typer(
    name="safer-ray",
    help="Find the preference pairs that teach a reward model the wrong thing (SAFER, arXiv 2507.00665).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


INTERRUPTED = 130  # what typer makes of Ctrl-C
TERMINATED = 143  # as a shell tells SIGTERM; a cluster's driver ends with its number alone


def main() -> None:
    """Run the command line; a SaferError, and what a disk or the memory refuses, becomes one line on stderr and an exit
    code."""
    signal.signal(signal.SIGTERM, _end)
    try:
        app(standalone_mode=True)
    except (SaferError, OSError, MemoryError) as error:
        told = error if isinstance(error, SaferError) else explained(error)
        print(f"safer-ray: {one_line(str(told))}", file=sys.stderr)
        if state["verbose"]:
            raise
        sys.exit(told.exit_code)
    except SystemExit as ended:
        if ended.code not in (INTERRUPTED, TERMINATED, signal.SIGTERM):
            raise
        print("safer-ray: interrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(INTERRUPTED if ended.code == INTERRUPTED else TERMINATED)


def _end(*_: object) -> None:
    """SIGTERM as Ctrl-C: locks are given back and what was begun is left as the next run wants it."""
    sys.exit(TERMINATED)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    state["verbose"] = verbose
    level = logging.INFO if verbose else logging.WARNING
    if console.is_terminal:
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    else:
        from safer_ray.pipeline.progress import JsonLog

        logging.basicConfig(level=level, handlers=[JsonLog()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


def _closing_table(summary: dict[str, Any], base: str) -> None:
    """Print what the run found, as a table."""
    found = summary["detection"]
    facts = Table(box=None, show_header=False, pad_edge=False)
    sae = summary["sae"]
    selected = summary["selected_features"]
    facts.add_row("pairs", f"{summary['pairs']:,} ({summary['quarantined']} rows quarantined)")
    facts.add_row("reward model", f"validation accuracy {summary['reward']['accuracy']:.3f}")
    facts.add_row(
        "SAE",
        f"nmse {sae['nmse']:.3f}, explained variance {sae['explained_variance']:.3f}, "
        f"L0 {sae['l0']:.1f}, dead {sae['dead_share']:.1%}",
    )
    facts.add_row("features", f"{selected['safe']} safe, {selected['unsafe']} unsafe")
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
    console.print(_accuracy_table(summary, base))


def _accuracy_table(summary: dict[str, Any], base: str) -> Table:
    """One row a model, one column a section, the p-value of its change under each accuracy: there are more models than
    sections, and a name is never broken."""
    sections = sorted({section for values in summary["sections"].values() for section in values})
    table = Table(title=f"Held-out accuracy (p: McNemar's test against {base})", title_justify="left")
    table.add_column("model", overflow="fold")
    for section in sections:
        table.add_column(Text(section), justify="right", overflow="fold")
    for name, values in summary["sections"].items():
        tests = summary["tests"].get(f"{name} vs {base}", {})
        told = {section: Text(f"\np {test['p']:.2g}", "dim") for section, test in tests.items()}
        cells = [Text.assemble(f"{values[s]:.3f}", told.get(s, "")) if s in values else "" for s in sections]
        table.add_row(Text(name), *cells)
    return table


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
    """One row a cell and section: accuracy, and what it changed in points."""
    from safer_ray.report.experiment_report import cell_name

    title = f"{len(found['seeds'])} seeds, retraining {found['retraining']}; points [95% interval]"
    table = Table("cell", "section", "accuracy", "against clean", "against random", title=title, title_justify="left")
    for row in found["rows"]:
        shown = [row["against_clean"], row.get("against_random")]
        changes = [
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * e[k] for k in ("change", "low", "high"))) if e else ""
            for e in shown
        ]
        table.add_row(cell_name(row), row["section"], f"{row['against_clean']['accuracy']:.3f}", *changes)
    return table


def _detection_table(name: str, found: dict[str, Any]) -> Table:
    """One row a detector: its AUROC out of fold and in sample, and how far `combined` leads it."""
    title = f"{name}: {found['planted']} errors among {found['pairs']:,} pairs, AUROC [95% interval]"
    table = Table("detector", "out of fold", "combined leads by", "in sample", title=title, title_justify="left")
    outside, inside = found["out_of_fold"], found["in_sample"]
    for detector, values in outside["detectors"].items():
        lead = outside["combined_minus"].get(detector)
        cells = [values["auroc"], lead["auroc"] if lead else None]
        cells.append(inside["detectors"][detector]["auroc"] if inside else None)
        table.add_row(detector, *("{:.3f} [{:.3f}, {:.3f}]".format(*cell) if cell else "" for cell in cells))
    return table


@app.command()
def plan(
    config: Annotated[Path, path_argument()],
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
def inspect(
    path: Annotated[str, source_argument(help="A file, folder, glob, saved data set or hub:OWNER/NAME.")],
    format: Annotated[str, text_option(help="A format's name, or auto.")] = "auto",
    rows: Annotated[int, count_option(help="Rows to read.")] = 1000,
) -> None:
    """Show a data set's format, counts, examples, and why rows would be refused."""
    from safer_ray.pipeline.inspection import inspect as look

    found = look(path, format, rows)
    console.print(f"format    {found.format}\ncolumns   {', '.join(found.columns)}\nfiles     {len(found.files)}")
    for folder, count in found.left_out.items():
        console.print(f"left out  {count:,} data files in {folder}")
    console.print(f"rows      {found.rows} read, {found.good} good, {found.rows - found.good} refused")
    for reason, count in found.refused.items():
        console.print(f"  refused {count:>6}  {reason}")
    for number, example in enumerate(found.examples, 1):
        console.print(f"\nexample {number}", style="bold")
        for name in ("prompt", "chosen", "rejected"):
            text = " / ".join(f"{m['role']}: {m['content']}" for m in example[name] or [])
            console.print(f"{name:<9} {text[:300]}{'…' if len(text) > 300 else ''}")


@app.command()
def key(
    name: Annotated[str, text_argument(help="Whose key it is, say a team's or a platform's name.")],
    days: Annotated[float | None, days_option(help="It expires after so many days; without this, never.")] = None,
    requests: Annotated[int | None, count_option(help="Requests a minute that it may send.")] = None,
    pairs: Annotated[int | None, count_option(help="Pairs a minute that it may have scored.")] = None,
) -> None:
    """Make a key of the scoring service: its token, shown this once, and the line for the keys file."""
    import time

    from safer_ray.service.keys import expiry_in, new_key

    token, line = new_key(name, None if days is None else expiry_in(days, time.time()), requests, pairs)
    typer.echo(f"token  {token}\nline   {line}")


@app.command("serve")
def serve_command(
    words: Annotated[
        list[str] | None,
        text_argument(
            metavar="KEY=VALUE …", help="auditor=DIR, host=127.0.0.1, port=8000, keys=FILE, …: see docs/service.md"
        ),
    ] = None,
) -> None:
    """Answer pairs over HTTP with their scores, on Ray Serve, until Ctrl-C or SIGTERM."""
    from safer_ray.service.main import main as serve

    raise typer.Exit(serve(words or []))


app.add_typer(stages.app)
app.add_typer(audits.app)
app.add_typer(audit_tools.app)
app.add_typer(saes.app)


@app.command()
def report(
    config: Annotated[Path, config_argument(help="The config of a finished run.")],
    assignments: Assignments = None,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming")] = False,
) -> None:
    """Stage 14: write the report and the summary of a finished run again."""
    run_command(config, assignments, until="report", red_team=red_team)


@app.command("submit")
def submit_command(
    command: Annotated[list[str] | None, text_argument(help="After --, a command of safer-ray: run CONFIG …")] = None,
    address: Annotated[str | None, text_option(help="The cluster's dashboard, say http://HEAD:8265.")] = None,
    working_dir: Annotated[
        Path, path_option(help="Uploaded for the job, less runs/ and what .gitignore or .rayignore name.")
    ] = Path(),
    env: Annotated[
        list[str] | None,
        text_option(help="KEY=VALUE for the job, may be repeated; whoever may see the job can read it: no secrets."),
    ] = None,
    node_env: Annotated[
        list[str] | None,
        text_option(help="KEY, a variable the nodes have, say a secret; the job ends where it is not set."),
    ] = None,
    job_id: Annotated[str | None, text_option(help="The job's id; a job that is there is followed.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the job has ended.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster; Ctrl-C leaves it running.

    Exit codes: 0 succeeded, 1 failed, 2 wrong use or no cluster, 3 stopped, 4 cluster lost, 130 Ctrl-C.
    """
    from safer_ray.distributed.submit import submit

    submit(
        command or [],
        address=address,
        working_dir=working_dir,
        env=env or [],
        job_id=job_id,
        wait=wait,
        node_env=node_env or [],
    )
