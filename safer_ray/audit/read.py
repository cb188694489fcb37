"""A finished audit as its tools read it: what was asked, and the scores part by part."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray.data.audit_files import SCORES
from safer_ray.errors import UserError
from safer_ray.storage.accounts import DONE
from safer_ray.storage.artifacts import (
    MANIFEST,
    PLAN,
    SETTINGS_FILE,
    SETTINGS_KEYS,
    Artifact,
    check_unplanned,
    open_artifact,
    part_name,
    read_plan,
)
from safer_ray.storage.files import names_in, parquet_footer, read_parquet

Pair = tuple[str, str]  # row_key and pair_id: one pair, also where a row of the source gives several


class TornError(UserError):
    """A file of an audit that is not whole."""


def read_asked(out: Path) -> dict[str, Any]:
    """Return what the audit in a folder was asked.

    Raises:
        TornError: it is written down no more.
        UserError: what is there is no audit's.
    """
    path = out / SETTINGS_FILE
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        done = len([name for name in names_in(out / DONE) if name.endswith(".json")])
        raise TornError(
            f"{path}, which says what {out} audits by what, is empty or torn ({error}); put it back from a copy, or "
            f"start again with --fresh: {done:,} finished fragments are done again then"
        ) from None
    if not (isinstance(asked, dict) and asked.keys() >= SETTINGS_KEYS and isinstance(asked["source"], dict)):
        raise UserError(f"{path} is none of ours: {out} holds no audit; choose another folder")
    return asked


def open_audit(path: Path) -> Artifact:
    """The audit in the folder `path`.

    Raises:
        UserError: nothing there, something else, a damaged one, or an audit that has not come to its end.
    """
    if not path.is_dir():
        raise UserError(f"no audit at {path}: no such folder; pass the --out of `safer-ray audit`")
    if (path / SETTINGS_FILE).is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"the audit in {path} is not finished: it has no {MANIFEST}; run the same `safer-ray audit` command again, "
            "it goes on where it stopped"
        )
    if not (path / SETTINGS_FILE).is_file():
        raise UserError(f"{path} holds no audit: it has no {SETTINGS_FILE}; pass the --out of `safer-ray audit`")
    read_asked(path)
    if not (path / PLAN).exists():
        check_unplanned(path)
    return open_artifact(path, "audit")


def score_files(audit: Artifact) -> list[Path]:
    """The parts of the scores, in the order of the corpus."""
    return [audit.path / SCORES / part_name(fragment.number) for fragment in read_plan(audit.path / PLAN)]


def scores(audit: Artifact, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the scores, a part at a time."""
    for path in score_files(audit):
        yield read_parquet(path, list(columns))


def scored_rows(audit: Artifact) -> int:
    """Raises UserError where a part is damaged."""
    rows = 0
    for path in score_files(audit):
        rows += parquet_footer(path).rows
    return rows


def pairs_in(table: pa.Table) -> list[Pair]:
    """Row key and pair id of each row."""
    return list(zip(table["row_key"].to_pylist(), table["pair_id"].to_pylist(), strict=True))
