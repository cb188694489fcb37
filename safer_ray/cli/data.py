"""A look at data on the command line: inspect, duplicates."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safer_ray.cli.options import (
    count_option,
    jaccard_option,
    model_option,
    source_argument,
    text_option,
)
from safer_ray.cli.shared import (
    ClusterSettings,
    ConfigPath,
    Encoding,
    ExistingPath,
    Fresh,
    Out,
    ReadOptions,
    RunnerName,
    SourceSettings,
    Split,
    TrustRemoteCode,
    build_config,
    build_source,
    console,
    one_stage,
    only_of_cluster,
    open_input,
    open_model,
    reading_of,
    show_artifact,
)

if TYPE_CHECKING:
    from safer_ray.pipeline.inspection import Inspection, Side

app = typer.Typer()
SHOWN = 600  # characters of a text
BORDER = " ⟦response⟧ "


@app.command()
def inspect(
    path: Annotated[str, source_argument(help="A file, folder, glob, saved data set or hub:OWNER/NAME.")],
    format: Annotated[str, text_option(help="A format's name, or auto.")] = "auto",
    rows: Annotated[int, count_option(help="Rows to read.")] = 1000,
    split: Split = None,
    encoding: Encoding = None,
    settings: SourceSettings = None,
    reward: Annotated[
        str | None, model_option("--reward", help="A model, to show the examples as it reads them.")
    ] = None,
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show what would be read of a data set: layout, columns, examples, and each reason to refuse a row."""
    source = build_source(settings, path=path, format=format, split=split, encoding=encoding)
    reading = reading_of(read, trust_remote_code)
    from safer_ray.pipeline.inspection import inspect_source

    found = inspect_source(source, rows, reward=open_model(reward).path if reward else None, reading=reading)
    if as_json:
        typer.echo(json.dumps(found.to_tree(), ensure_ascii=False))
        return
    _show(found)


def _show(found: "Inspection") -> None:
    for name, why in found.why.items():
        console.print(f"format    {name}: {why}")
    for told, columns in (("used", found.used), ("carried", found.carried), ("empty", found.empty)):
        if columns:
            console.print(f"{told:<9} {', '.join(columns)}")
    console.print(f"files     {len(found.files)}")
    for folder, count in found.left_out.items():
        console.print(f"left out  {count:,} data files in {folder}")
    of = "" if not found.more else f" of {found.total:,}" if found.total is not None else ", the first ones"
    console.print(f"rows      {found.rows} read{of}, {found.good} good, {found.rows - found.good} refused")
    for line in found.told:
        console.print(f"note      {line}")
    for refusal in found.refusals.values():
        console.print(f"  refused {refusal.rows:>6}  {refusal.reason}")
        console.print(f"          {refusal.row_key}: {refusal.raw}")
    for number, example in enumerate(found.examples, 1):
        console.print(f"\nexample {number}", style="bold")
        for name in ("prompt", "chosen", "rejected"):
            console.print(f"{name:<9} {_cut(' / '.join(map(_turn, example[name] or [])))}")
        if example["label_margin"] is not None:
            console.print(f"margin    {example['label_margin']:g}")
        if found.rendered:
            _show_rendered(found.rendered[number - 1])


def _show_rendered(read: "dict[str, Side] | str") -> None:
    if isinstance(read, str):
        console.print(f"refused by the model: {read}")
        return
    for name, side in read.items():
        cut = ", cut to what the model reads" if side.truncated else ""
        console.print(f"{name} as read: {side.tokens} tokens, {side.prompt_tokens} before the response{cut}")
        console.print(f"{side.text[: side.border]}{BORDER}{side.text[side.border :]}", style="dim")


def _turn(message: dict[str, Any]) -> str:
    from safer_ray.formats.messages import fields_of

    more = {name: value for name, value in fields_of(message).items() if name not in ("role", "content")}
    return f"{message['role']}: {message['content']}{' ' + json.dumps(more, ensure_ascii=False) if more else ''}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@app.command()
def duplicates(
    pairs: ExistingPath,
    out: Out,
    threshold: Annotated[float, jaccard_option(help="Jaccard index from which texts are near, 0.5 to 1.")] = 0.8,
    config: ConfigPath = None,
    assignments: ClusterSettings = None,
    runner: RunnerName = "local",
    fresh: Fresh = False,
) -> None:
    """Find repeated prompts and responses, pairs labelled both ways, and responses that beat each other in a circle."""
    from safer_ray.config.sections import DuplicatesConfig

    settings = build_config(DuplicatesConfig, threshold=threshold)
    from safer_ray.pipeline.duplicate_stage import duplicates as find

    with one_stage(out, fresh, runner, config, assignments=only_of_cluster(assignments)) as ctx:
        made = find(ctx, settings, open_input("pairs", pairs))
    for kind, counts in made.metrics["found"].items():
        console.print(f"{kind:<15} {counts['clusters']:>9,} clusters {counts['pairs']:>11,} pairs")
    show_artifact(made)
