"""An audit: a folder in which every row of a corpus ends once, in `scores/` or in `quarantine/`.

`audit.json` says what is audited by what, `plan.parquet` which rows there are, `done/` which fragments are finished:
the same command goes on where it was interrupted, and a corpus that has grown is audited where it is new.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.artifacts import MANIFEST, PLAN, SCRATCH, Artifact, Fragment, part_name, read_plan, write_plan
from safer_ray.audit_parts import AUDITED, FLAGGED, SCORES, write_part
from safer_ray.auditor import check_auditor
from safer_ray.background import side_by_side
from safer_ray.config import ScoresConfig, SourceConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.files import at, names_in, parquet_rows, read_json, remove, stamp, threads_for, write_json
from safer_ray.marks import RED_TEAM_MARK, enclosing, is_marked
from safer_ray.rows import grows
from safer_ray.runner import Counts, MapJob, Runner, pending
from safer_ray.scoring import BY_BUNDLE, KIND
from safer_ray.sources import plan_file, read_raw, source_files

ASKED = "audit.json"
LISTED = "flagged.jsonl"
SUMMARY = "summary.json"
PAGE = "report.html"
OWN = (ASKED, PLAN, MANIFEST, LISTED, SUMMARY, PAGE, SCORES, FLAGGED, "quarantine", "done", *SCRATCH)


class Audit(NamedTuple):
    """What is audited, by what, and how it is cut."""

    auditor: Artifact
    source: SourceConfig
    scores: ScoresConfig
    max_chars: int = 20_000
    fragment_rows: int = 1000
    shards: int = 1

    def asked(self) -> dict[str, Any]:
        """What an audit must have in common with its earlier half; never paths or worker counts."""
        source = self.source.model_dump(mode="json", exclude={"path"})
        return {
            "auditor": self.auditor.name,
            "source": source,
            "scores": self.scores.model_dump(mode="json"),
            "max_chars": self.max_chars,
            "fragment_rows": self.fragment_rows,
        }

    def job(self) -> MapJob:
        from safer_ray.audit import AuditRows, PreparePairs  # here, since others of this module need no torch

        return MapJob(
            "audit",
            partial(read_raw, source=self.source),
            partial(AuditRows, self.auditor, self.scores),
            AUDITED,
            prepare=partial(PreparePairs, self.auditor, (self.source,), self.max_chars),
            loads_model=True,
            shards=self.shards,
            metadata={KIND: BY_BUNDLE},
            write=write_part,
        )


def audit_corpus(audit: Audit, out: Path, runner: Runner, *, fresh: bool = False) -> Counts:
    """Every row of the source into `out`; what is there already is not done again.

    Raises:
        UserError: `out` holds something else, another audit, or one whose input changed.
        SaferError: no row could be scored, or the accounts do not close.
    """
    check_auditor(audit.auditor)
    if fresh:
        clear(out)
    _check_asked(audit, out)
    fragments = planned(audit, out)
    job = audit.job()
    files = dict.fromkeys(at(fragment.path) for fragment in pending(fragments, out))
    if audit.auditor.red_team or enclosing(files).red_team or is_marked(files):
        job = replace(job, metadata={**(job.metadata or {}), **RED_TEAM_MARK})
    counts = runner.map(job, fragments, out)
    check_accounts(out, fragments, counts)
    for scratch in SCRATCH:
        with contextlib.suppress(OSError):
            remove(out / scratch)
    return counts


def clear(out: Path) -> None:
    """Remove what an audit wrote, and nothing else."""
    for name in OWN:
        remove(out / name)


def _check_asked(audit: Audit, out: Path) -> None:
    """Write down what is asked, or compare it with what was."""
    path, asked = out / ASKED, audit.asked() | {"path": audit.source.path}
    if not path.exists():
        strange = sorted(names_in(out) & set(OWN))
        if strange:
            raise UserError(f"{out} holds {strange[0]}, but no audit; choose another --out")
        write_json(asked, path)
        return
    before = read_json(path)
    for name, now, then in _differences(asked, before):
        if name != "path":
            raise UserError(
                f"{out} holds an audit with another {name}: {then!r} then, {now!r} now; "
                "choose another --out, or start again with --fresh"
            )


def _differences(now: dict[str, Any], then: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*now, *then}):
        left, right = now.get(name), then.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


# The plan


def planned(audit: Audit, out: Path) -> list[Fragment]:
    """The fragments of an audit: those of its earlier half, and those of rows that have come since.

    Raises:
        UserError: a file that was planned has changed otherwise than by growing, or is gone with rows left to read.
    """
    path = out / PLAN
    known = read_plan(path)
    last = {fragment.path: fragment for fragment in known}
    files = source_files(audit.source)
    found = side_by_side(lambda file: _new(audit, file, last.get(str(file))), files, threads_for(files[0]))
    new = [fragment for fragments in found for fragment in fragments]
    present, done = {str(file) for file in files}, names_in(out / "done")
    for fragment in known:
        if fragment.path not in present and f"{fragment.number:08}.json" not in done:
            raise UserError(
                f"{fragment.path} is gone, and not all of its rows are audited; put it back, or use --fresh"
            )
    if new:
        remove(out / MANIFEST)  # the audit is no longer whole
        known += [replace(fragment, number=number) for number, fragment in enumerate(new, len(known))]
        write_plan(known, path)
    return known


def _new(audit: Audit, file: Path, last: Fragment | None) -> list[Fragment]:
    """The rows of a file that are not planned yet."""
    if last is not None and not _has_grown(file, last):
        return []
    fragments = plan_file(file, audit.source, audit.fragment_rows, after=last)
    if fragments and grows(file):
        fragments[-1] = replace(fragments[-1], digest=digest_of(file, fragments[-1].size))
    return fragments


def _has_grown(file: Path, last: Fragment) -> bool:
    """Whether lines were added to a planned file.

    Raises:
        UserError: it has changed otherwise.
    """
    size, etag = stamp(file)
    if (size, etag) == (last.size, last.etag):
        return False
    if size < last.size or not grows(file) or digest_of(file, last.size) != last.digest:
        raise UserError(
            f"{file} changed since it was planned ({last.size:,} bytes then, {size:,} now); "
            "put it back, or start again with --fresh"
        )
    with file.open("rb") as stream:
        stream.seek(max(0, last.size - 1))
        if size > last.size and stream.read(1) != b"\n":
            raise UserError(f"{file}: its last line has grown since it was audited; start again with --fresh")
    return size > last.size


# The accounts


def check_accounts(out: Path, fragments: Sequence[Fragment], counts: Counts) -> None:
    """Input rows = scored + quarantined, by the `done` entries and by the rows that lie there.

    Raises:
        SaferError: they are not; what is wrong is told.
    """
    wrong = []
    present = {folder: names_in(out / folder) for folder in ("done", SCORES, "quarantine")}

    def rows(folder: str, name: str) -> int:
        return parquet_rows(out / folder / name) if name in present[folder] else 0

    def held(fragment: Fragment) -> tuple[dict[str, Any], int, int] | None:
        """A fragment's `done` entry, its scored and its refused rows."""
        name, done = part_name(fragment.number), f"{fragment.number:08}.json"
        return (
            (read_json(out / "done" / done), rows(SCORES, name), rows("quarantine", name))
            if done in present["done"]
            else None
        )

    for fragment, found in zip(fragments, side_by_side(held, fragments, threads_for(out)), strict=True):
        if found is None:
            wrong.append(f"fragment {fragment.number} is not done")
            continue
        entry, scored, refused = found
        if (scored, refused) != (entry["written"], entry["quarantined"]) or scored + refused != entry["read"]:
            wrong.append(
                f"fragment {fragment.number}: {entry['read']} rows read, {scored} scored and {refused} quarantined"
            )
    names = {part_name(fragment.number) for fragment in fragments}
    for folder in (SCORES, "quarantine"):
        if strange := sorted(name for name in present[folder] - names if not name.startswith(".")):
            raise SaferError(f"{out / folder / strange[0]} is of no planned fragment; move it away, or use --fresh")
    if wrong:
        raise SaferError(
            f"{out}: the accounts do not close in {len(wrong)} of {len(fragments)} fragments ({wrong[0]}); "
            "remove their `done` entries and run the same command again"
        )
    if counts.written == 0:
        reason = max(counts.reasons, key=lambda name: counts.reasons[name], default="nothing was read")
        raise SaferError(f"{out}: none of {counts.read} rows could be scored, most: {reason!r}; see {out}/quarantine")


def digest_of(file: Path, size: int) -> str:
    """sha256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while size > 0 and (block := stream.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
