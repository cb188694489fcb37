"""A finished audit as its tools read it: what was asked, and the scores part by part."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from safer_ray.artifacts import ASKED, MANIFEST, PLAN, Artifact, open_artifact, part_name, read_plan
from safer_ray.audit_parts import SCORES
from safer_ray.errors import UserError
from safer_ray.files import parquet_rows, read_parquet
from safer_ray.rows import explained

Pair = tuple[str, str]  # row_key and pair_id: one pair, also where a row of the source gives several


def open_audit(path: Path) -> Artifact:
    """The audit in the folder `path`.

    Raises:
        UserError: nothing there, something else, or an audit that has not come to its end.
    """
    if not path.is_dir():
        raise UserError(f"no audit at {path}: no such folder; pass the --out of `safer-ray audit`")
    if (path / ASKED).is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"the audit in {path} is not finished: it has no {MANIFEST}; run the same `safer-ray audit` command again, "
            "it goes on where it stopped"
        )
    if not (path / ASKED).is_file():
        raise UserError(f"{path} holds no audit: it has no {ASKED}; pass the --out of `safer-ray audit`")
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
        with explained(path):
            rows += parquet_rows(path)
    return rows


def pairs_in(table: pa.Table) -> list[Pair]:
    """Row key and pair id of each row."""
    return list(zip(table["row_key"].to_pylist(), table["pair_id"].to_pylist(), strict=True))
