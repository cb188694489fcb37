"""A look at data on the command line: inspect, duplicates."""

from typing import Annotated

import typer

from safer_ray.cli.options import (
    count_option,
    jaccard_option,
    source_argument,
    text_option,
)
from safer_ray.cli.shared import (
    ConfigPath,
    ExistingPath,
    Fresh,
    Out,
    RunnerName,
    build_config,
    console,
    one_stage,
    open_input,
    show_artifact,
)

app = typer.Typer()


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
def duplicates(
    pairs: ExistingPath,
    out: Out,
    threshold: Annotated[float, jaccard_option(help="Jaccard index from which texts are near, 0.5 to 1.")] = 0.8,
    config: ConfigPath = None,
    runner: RunnerName = "local",
    fresh: Fresh = False,
) -> None:
    """Find repeated prompts and responses, pairs labelled both ways, and responses that beat each other in a circle."""
    from safer_ray.config.sections import DuplicatesConfig

    settings = build_config(DuplicatesConfig, threshold=threshold)
    from safer_ray.pipeline.duplicate_stage import duplicates as find

    with one_stage(out, fresh, runner, config) as ctx:
        made = find(ctx, settings, open_input("pairs", pairs))
    for kind, counts in made.metrics["found"].items():
        console.print(f"{kind:<15} {counts['clusters']:>9,} clusters {counts['pairs']:>11,} pairs")
    show_artifact(made)
