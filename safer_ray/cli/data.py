"""A look at data on the command line: inspect."""

from typing import Annotated

import typer

from safer_ray.cli.options import (
    count_option,
    source_argument,
    text_option,
)
from safer_ray.cli.shared import Encoding, Split, build_config, console

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[str, source_argument(help="A file, folder, glob, saved data set or hub:OWNER/NAME.")],
    format: Annotated[str, text_option(help="A format's name, or auto.")] = "auto",
    rows: Annotated[int, count_option(help="Rows to read.")] = 1000,
    split: Split = None,
    encoding: Encoding = None,
) -> None:
    """Show a data set's format, counts, examples, and why rows would be refused."""
    from safer_ray.config.sections import SourceConfig

    source = build_config(SourceConfig, path=path, format=format, split=split, encoding=encoding)
    from safer_ray.pipeline.inspection import inspect_source

    found = inspect_source(source, rows)
    console.print(f"format    {found.format}\ncolumns   {', '.join(found.columns)}\nfiles     {len(found.files)}")
    for folder, count in found.left_out.items():
        console.print(f"left out  {count:,} data files in {folder}")
    for line in found.told:
        console.print(f"note      {line}")
    console.print(f"rows      {found.rows} read, {found.good} good, {found.rows - found.good} refused")
    for reason, count in found.refused.items():
        console.print(f"  refused {count:>6}  {reason}")
    for number, example in enumerate(found.examples, 1):
        console.print(f"\nexample {number}", style="bold")
        for name in ("prompt", "chosen", "rejected"):
            text = " / ".join(f"{m['role']}: {m['content']}" for m in example[name] or [])
            console.print(f"{name:<9} {text[:300]}{'…' if len(text) > 300 else ''}")
