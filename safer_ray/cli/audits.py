"""Audits on the command line: a corpus scored by a bundle."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safer_ray.cli.options import count_option, path_option, place_option, share_option, source_option, text_option
from safer_ray.cli.shared import (
    AuditSettings,
    ClusterConfig,
    Encoding,
    Fresh,
    RunnerName,
    Split,
    TrustRemoteCode,
    at_work,
    build_config,
    build_source,
    check_out,
    console,
    emptied,
    open_input,
    ray_config,
    split_assignments,
)
from safer_ray.errors import UserError
from safer_ray.storage.locations import is_name

if TYPE_CHECKING:
    from safer_ray.audit.run import Audit
    from safer_ray.config.sections import SourceConfig

app = typer.Typer()


@app.command()
def audit(
    auditor: Annotated[Path, path_option(help="An auditor bundle.")],
    pairs: Annotated[
        str, source_option(help="A file, folder or glob, also s3://BUCKET/…; a saved data set or hub:OWNER/NAME.")
    ],
    out: Annotated[str, place_option(help="The folder of the audit, also s3://BUCKET/FOLDER.")],
    format: Annotated[str, text_option()] = "auto",
    split: Split = None,
    encoding: Encoding = None,
    settings: AuditSettings = None,
    config: ClusterConfig = None,
    flag_quantile: Annotated[float, share_option(help="Flag pairs among this share of the reference.")] = 0.05,
    detector: Annotated[
        str | None, text_option(help="safer, reward_margin or combined; default: the best that the bundle has.")
    ] = None,
    max_chars: Annotated[int, count_option(help="A pair with more characters goes to the quarantine.")] = 20_000,
    fragment_rows: Annotated[int, count_option(help="Rows that are committed together.")] = 1000,
    max_refused_share: Annotated[
        float, share_option(help="The audit fails if more than this share of the rows is in the quarantine.")
    ] = 0.5,
    shards: Annotated[int, count_option(help="Parts that the reward model is cut into, by layers.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    runner: RunnerName = "local",
    actors: Annotated[str | None, text_option(help="MIN:MAX actors that hold the model, with --runner ray.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate rows, time, memory and disk; write nothing.")] = (
        False
    ),
    fresh: Fresh = False,
) -> None:
    """Score every pair of a corpus with a bundle, and list the suspicious ones.

    The same command goes on where it was interrupted, and scores what a corpus has gained.
    """
    from safer_ray.audit.run import Audit, audit_corpus
    from safer_ray.audit.summary import close_audit
    from safer_ray.config.sections import ScoresConfig
    from safer_ray.features.bundle import best_detector
    from safer_ray.pipeline.inputs import durable_path
    from safer_ray.storage.artifacts import SETTINGS_FILE
    from safer_ray.storage.lock import locked
    from safer_ray.storage.replacing import check_outside

    folder = check_out(durable_path(out))
    if actors is not None and runner == "local" and not dry_run:
        raise UserError(f"--actors {actors}: they work on a cluster; add --runner ray, or leave them out")
    bundle = open_input("auditor", auditor)
    scoring = build_config(ScoresConfig, flag_quantile=flag_quantile, detector=detector or best_detector(bundle))
    source = build_source(split_assignments(settings)[1], path=pairs, format=format, split=split, encoding=encoding)
    asked = Audit(bundle, source, scoring, max_chars, fragment_rows, shards, trust_remote_code, max_refused_share)
    if dry_run:
        wide = runner == "ray" or actors is not None
        _show_estimate(asked, ray_config(config, settings, "ray", actors).max_actors if wide else 1)
        return
    cluster = ray_config(config, settings, runner, actors)
    check_outside(folder / SETTINGS_FILE, [bundle.path])
    _check_read(source, folder, [bundle.path, *([config] if config else [])], fresh=fresh)
    with emptied(folder), locked(folder), at_work(runner, cluster, shards) as (where, _):
        began = time.monotonic()
        counts = audit_corpus(asked, folder, where, fresh=fresh)
        summary = close_audit(asked, folder, counts, time.monotonic() - began)
    _show(summary, folder)


def _check_read(source: "SourceConfig", folder: Path, others: list[Path], *, fresh: bool) -> None:
    """Find the files of a source, and see that an audit that begins anew in `folder` deletes none of them, or of the
    `others` that it reads.

    Raises:
        UserError: there are none, or it would.
    """
    from safer_ray.data.audit_files import OWN_FILES
    from safer_ray.data.source_files import find_files
    from safer_ray.storage.replacing import check_doomed

    is_here = "://" not in source.path and not is_name(source.path)  # those of a store are listed once, later
    files = find_files(source, [folder]).files if is_here else []
    if fresh:
        check_doomed((folder / name for name in OWN_FILES), [*others, *files])


def _show(summary: dict[str, Any], out: Path) -> None:
    from safer_ray.audit.page import in_words

    for text in in_words(summary):
        console.print(text)
    console.print(f"\nflagged  {out / 'flagged.jsonl'}\nscores   {out / 'scores'}\nreport   {out / 'report.html'}")


def _show_estimate(asked: "Audit", most: int) -> None:
    from safer_ray.audit.estimate import estimate

    console.print(estimate(asked, most).in_words())
