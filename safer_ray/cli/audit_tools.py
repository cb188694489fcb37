"""Commands on finished audits and runs: export, review, diff, gc."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from safer_ray.cli.options import (
    days_option,
    path_argument,
    path_option,
    percent_option,
    place_argument,
    place_option,
    text_option,
)
from safer_ray.cli.shared import (
    Fresh,
    Out,
    console,
    one_stage,
    show_artifact,
)
from safer_ray.errors import UserError

if TYPE_CHECKING:
    from safer_ray.audit.diff import Difference
    from safer_ray.audit.leftovers import Leftover, Run, Wanted
    from safer_ray.audit.review import Precision, Reviewed

app = typer.Typer()

AuditFolder = Annotated[str, place_option("--audit", help="The folder of a finished audit, also s3://BUCKET/FOLDER.")]


@app.command()
def show(
    bundle: Annotated[str, place_argument(help="The folder of stage `auditor`, also s3://BUCKET/FOLDER.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show what a bundle is: its model, how that reads text, features, reference, data, licences and versions."""
    from safer_ray.features.bundle_facts import bundle_facts, in_lines

    facts = bundle_facts(bundle)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in in_lines(facts):
        table.add_row(name, Text(value))
    console.print(table)


@app.command("export")
def export_command(
    audit: AuditFolder,
    out: Out,
    drop: Annotated[str | None, text_option(help="What is left out: flagged, which is the default.")] = None,
    percent: Annotated[
        float | None, percent_option(help="Leave out so many percent of the pairs instead, the most suspicious.")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Write the pairs that an audit leaves standing, to train on.

    The audit's sources are read again. Pairs that reviews call fine are kept, those that they call bad are left out.
    In the folder are pairs/ (for `safer-ray reward --pairs`), trl/ (JSONL for TRL's trainers) and decisions/ (every
    scored row, and why). The same command goes on where it was interrupted.
    """
    from safer_ray.audit.export import export
    from safer_ray.audit.read import open_audit
    from safer_ray.storage.files import as_path

    if drop not in (None, "flagged"):
        raise UserError(f"--drop {drop!r}: choose flagged, or give --percent")
    if drop is not None and percent is not None:
        raise UserError("--drop and --percent are two ways to say what is left out; choose one")
    if percent is not None and not 0 <= percent < 100:
        raise UserError(f"--percent {percent}: choose a number from 0 to below 100")
    opened = open_audit(as_path(audit).absolute())
    with one_stage(out, fresh) as ctx:
        made = export(opened, percent, ctx.place, ctx.runner)
    show_artifact(made)
    for why, pairs in made.metrics["why"].items():
        console.print(f"  {pairs:>10,}  {why}")


@app.command("review")
def review_command(
    audit: AuditFolder,
    verdicts: Annotated[str, place_option(help="JSONL: row_key or pair_id, verdict, and maybe reviewer, note.")],
) -> None:
    """Take in people's verdicts on flagged pairs, and tell which share of them is bad.

    A line has `verdict`, which is bad, fine or unsure, and `row_key` or `pair_id` as in flagged.jsonl; `reviewer` and
    `note` are kept, all else is left alone. A reviewer's later verdict replaces the earlier one; of several reviewers
    the most common verdict counts, and ties are unsure. Lines that cannot be used are told, with their numbers; the
    others are added to reviews.json in the audit, which `safer-ray export` goes by. Give reviewers names: verdicts
    without one replace those that a pair had without one from earlier files.
    """
    from safer_ray.audit.read import open_audit
    from safer_ray.audit.review import review
    from safer_ray.storage.files import as_path
    from safer_ray.storage.lock import locked

    opened = open_audit(as_path(audit).absolute())
    with locked(opened.path):
        _show_review(review(opened, as_path(verdicts)))
    console.print(f"\nreviews  {opened.path / 'reviews.json'}")


def _show_review(found: "Reviewed") -> None:
    for line, reason in found.bad_lines:
        console.print(f"line {line}: {reason}")
    console.print(f"{found.used:,} lines used, {len(found.bad_lines):,} not\n")
    table = Table("flagged pairs", "reviewed", "bad", "fine", "precision", "95% interval", box=None, pad_edge=False)
    for row in found.at:
        table.add_row(f"worst {row.flagged:,}", *_precision_cells(row))
    table.add_row(f"all {found.whole.flagged:,}", *_precision_cells(found.whole))
    console.print(table)
    console.print("The intervals take pairs as independent; where prompts have several, they are too narrow.")


def _precision_cells(row: "Precision") -> list[str]:
    counts = [f"{number:,}" for number in (row.reviewed, row.bad, row.fine)]
    if row.precision is None:
        return [*counts, "-", "-"]
    return [*counts, f"{row.precision:.3f}", f"{row.low:.3f} to {row.high:.3f}"]


@app.command("diff")
def diff_command(
    a: Annotated[str, place_argument(help="The folder of a finished audit, also s3://BUCKET/FOLDER.")],
    b: Annotated[str, place_argument(help="Another one, of the same pairs or some of them.")],
    json: Annotated[Path | None, path_option(help="Write it all here, with the pairs that gained or lost a flag.")] = (
        None
    ),
) -> None:
    """Compare two audits: flags gained and lost, how alike scores and suspicion are, and what was asked differently.

    Pairs are matched by row key and pair id, or by the pair id alone where that finds more. What is compared waits in
    temporary files meanwhile, about 100 bytes a pair, below TMPDIR.
    """
    from safer_ray.audit.diff import difference, write_difference
    from safer_ray.audit.read import open_audit
    from safer_ray.storage.files import as_path

    one, other = (open_audit(as_path(folder).absolute()) for folder in (a, b))
    found = write_difference(one, other, json.absolute()) if json else difference(one, other)
    _show_difference(found)
    if json:
        console.print(f"\nall of it  {json}")


def _show_difference(found: "Difference") -> None:
    table = Table("", "A", "B", box=None, pad_edge=False)
    pairs, flags = found.pairs, found.flags
    by = "row key and pair id" if found.matched_by == "row_key" else "pair id"
    table.add_row("pairs", f"{pairs.both + pairs.only_a:,}", f"{pairs.both + pairs.only_b:,}")
    table.add_row("  only here", f"{pairs.only_a:,}", f"{pairs.only_b:,}")
    table.add_row(f"  in both, by {by}", f"{pairs.both:,}", f"{pairs.both:,}")
    table.add_row("  flagged of these", f"{flags.a:,}", f"{flags.b:,}")
    table.add_row("  flagged only here", f"{flags.lost:,}", f"{flags.gained:,}")
    one, other = found.quarantine
    table.add_row("quarantined", f"{sum(one.values()):,}", f"{sum(other.values()):,}")
    for reason in sorted({*one, *other}):
        table.add_row(f"  {reason}", f"{one.get(reason, 0):,}", f"{other.get(reason, 0):,}")
    for name, (before, after) in found.config.items():
        table.add_row(name, str(before), str(after))
    console.print(table)
    share = "" if found.spearman_pairs == pairs.both else f" (of {found.spearman_pairs:,} pairs drawn by a hash)"
    shown = ", ".join(f"{name} {_number(value, '.3f')}" for name, value in found.spearman.items())
    console.print(f"\nSpearman's correlation: {shown}{share}")
    console.print(f"mean change of suspicion: {_number(found.suspicion_change, '+.4f')}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@app.command("gc")
def gc_command(
    root: Annotated[Path, path_argument(help="A folder of runs and audits, or one of them.")],
    older_than: Annotated[float, days_option(help="Only what has not changed for so many days.")] = 0.0,
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Delete them, or only list them, which is the default.")
    ] = False,
) -> None:
    """List what interrupted runs and audits left behind, and delete it with --delete.

    These are artifacts that were never finished (the same run would go on with them), scratch and half-written files of
    audits, and locks of dead processes. What a living process holds is left alone, and so are whole artifacts and
    whatever is not from here.
    """
    from safer_ray.audit import leftovers

    wanted = leftovers.old_enough(older_than)
    found: list[Leftover] = []
    for run in list(leftovers.find_runs(root.absolute())):
        if run.held:
            console.print(f"{run.path} is in use and left alone")
        elif delete:
            found += _delete(run, wanted)
        else:
            found += [leftover for leftover in run.leftovers if wanted(leftover)]
    _show_leftovers(found)
    size = decimal(sum(leftover.size for leftover in found))
    done = "deleted" if delete else "nothing is deleted without --delete"
    told = f"{len(found):,} leftovers, {size}; {done}" if found else f"nothing was left behind below {root}"
    console.print(told)


def _delete(run: "Run", wanted: "Wanted") -> list["Leftover"]:
    """Return what was deleted of a run; nothing, which is told, where somebody has begun to work there meanwhile."""
    from safer_ray.audit.leftovers import delete

    try:
        return delete(run, wanted)
    except UserError as error:
        console.print(f"left alone: {error}")
        return []


def _show_leftovers(found: list["Leftover"]) -> None:
    table = Table("leftover", "what it is", "size", "days old", box=None, pad_edge=False)
    for path, kind, size, changed in found:
        table.add_row(str(path), kind, decimal(size), f"{(time.time() - changed) / 86_400:.1f}")
    if found:
        console.print(table, width=1000)  # whole paths
