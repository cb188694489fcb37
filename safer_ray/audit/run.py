"""An audit: a folder in which every row of a corpus ends once, in `scores/` or in `quarantine/`.

`audit.json` says what is audited by what, `plan.parquet` which rows there are, `done/` which fragments are finished:
the same command goes on where it was interrupted, and a corpus that has grown is audited where it is new.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.audit.parts import AUDITED, write_part
from safer_ray.audit.plan import FileNotes, in_words, plan_audit
from safer_ray.audit.read import TornError, read_asked
from safer_ray.config.reading import Reading
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.data.audit_files import OWN_FILES, SCORES
from safer_ray.data.source_files import place_of
from safer_ray.data.sources import read_raw
from safer_ray.errors import SaferError, UserError
from safer_ray.features.bundle import check_auditor, check_code
from safer_ray.features.scoring import BY_BUNDLE, KIND
from safer_ray.pipeline.runner import Runner
from safer_ray.storage.accounts import Counts, entry_name, pending, read_entry
from safer_ray.storage.artifacts import SCRATCH, SETTINGS_FILE, Artifact, Fragment, part_name
from safer_ray.storage.background import map_ordered
from safer_ray.storage.files import Footer, as_path, names_in, parquet_footer, remove, threads_for, write_json
from safer_ray.storage.marks import wholly_marked
from safer_ray.storage.work import MapJob

MAX_REFUSED_SHARE = 0.5
log = logging.getLogger(__name__)
CONTENT = "auditor_sha256"  # of the bundle, which its name does not tell


class Audit(NamedTuple):
    """An audit's corpus, its bundle, and how the corpus is cut."""

    auditor: Artifact
    source: SourceConfig
    scores: ScoresConfig
    max_chars: int = 20_000
    fragment_rows: int = 1000
    shards: int = 1
    trust_remote_code: bool = False  # whether Python code that the bundle's reward model brings may run
    max_refused_share: float = MAX_REFUSED_SHARE  # of the rows, before an audit counts as failed

    @property
    def reading(self) -> Reading:
        return Reading(trust_remote_code=self.trust_remote_code)

    def asked(self) -> dict[str, Any]:
        """Return what an audit must have in common with its earlier half; never paths or worker counts."""
        source = self.source.recorded()
        return {
            "auditor": self.auditor.name,
            CONTENT: self.auditor.manifest.get("content_sha256"),
            "source": source,
            "scores": self.scores.recorded(),
            "max_chars": self.max_chars,
            "fragment_rows": self.fragment_rows,
        }

    def job(self) -> MapJob:
        from safer_ray.audit.score import AuditRows, PreparePairs  # here, since others of this module need no torch

        return MapJob(
            "audit",
            partial(read_raw, source=self.source),
            partial(AuditRows, self.auditor, self.scores, reading=self.reading),
            AUDITED,
            prepare=partial(PreparePairs, self.auditor, (self.source,), self.max_chars, self.reading),
            loads_model=True,
            shards=self.shards,
            metadata={KIND: BY_BUNDLE},
            write=write_part,
        )


@dataclass(frozen=True)
class AuditCounts(Counts):
    """Accounts of an audit, and what there is to tell of its files."""

    files: FileNotes


def audit_corpus(audit: Audit, out: Path, runner: Runner, *, fresh: bool = False) -> AuditCounts:
    """Every row of the source into `out`; what is there already is not done again.

    Raises:
        UserError: `out` holds something else, another audit, or one whose input changed.
        SaferError: no row could be scored, or the accounts do not close.
    """
    check_auditor(audit.auditor)
    check_code(audit.auditor, audit.trust_remote_code)
    if fresh:
        _refuse_to_clear(audit, out)
        clear(out)
    _check_asked(audit, out)
    fragments, notes = plan_audit(audit.source, audit.fragment_rows, out)
    if not fragments:
        why = " ".join(in_words(notes.to_tree())) or "Is it empty?"
        raise UserError(f"{audit.source.path}: no rows to audit there. {why}")
    job = audit.job()
    files = dict.fromkeys(as_path(fragment.path) for fragment in pending(fragments, out))
    marked = wholly_marked(files)
    names = frozenset(fragment.file for fragment in fragments if as_path(fragment.path) in marked) if marked else ()
    job = replace(job, write=partial(write_part, red_team=audit.auditor.red_team, of=names))
    counts = runner.map(job, fragments, out)
    check_accounts(out, fragments, counts)
    check_share(audit, out, counts)
    for scratch in SCRATCH:
        with contextlib.suppress(OSError):
            remove(out / scratch)
    return AuditCounts(**vars(counts), files=notes)


def planned(audit: Audit, out: Path) -> list[Fragment]:
    """Return the fragments of an audit into `out`, written down there; raises as `plan_audit`."""
    return plan_audit(audit.source, audit.fragment_rows, out).fragments


def clear(out: Path) -> None:
    """Remove what an audit wrote, and nothing else."""
    for name in OWN_FILES:
        remove(out / name)


def _refuse_to_clear(audit: Audit, out: Path) -> None:
    """Raises UserError where `--fresh` would delete what is no audit's, or what is to be audited."""
    if (out / SETTINGS_FILE).exists():
        with contextlib.suppress(TornError):  # an audit's all the same
            read_asked(out)
    elif strange := sorted(names_in(out) & set(OWN_FILES)):
        raise UserError(f"{out} holds {strange[0]}, but no audit; choose another --out")
    source = str(place_of(audit.source))
    below = [name for name in OWN_FILES if source == str(out / name) or source.startswith(f"{out / name}/")]
    if below:
        raise UserError(f"{source} is what --fresh deletes of the audit in {out}; choose another --out")


def _check_asked(audit: Audit, out: Path) -> None:
    """Write down what is asked, or compare it with what was."""
    path, asked = out / SETTINGS_FILE, audit.asked() | {"path": str(place_of(audit.source))}
    bundle, content = audit.auditor, asked[CONTENT]
    if not path.exists():
        strange = sorted(names_in(out) & set(OWN_FILES))
        if strange:
            raise UserError(f"{out} holds {strange[0]}, but no audit; choose another --out")
        write_json(asked, path)
        return
    before = read_asked(out)
    if before.get(CONTENT) is None and content is not None:
        log.warning("%s was begun by an earlier version, which did not write down what %s held", out, bundle.name)
        before |= {CONTENT: content}
        write_json(before, path)
    for name, now, then in _differences(asked, before):
        if name == CONTENT:
            raise UserError(
                f"{out} was audited by another {bundle.name} than the one in {bundle.path}, which holds other files "
                "(content_sha256); pass the former, choose another --out, or start again with --fresh"
            )
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


# The accounts


def check_accounts(out: Path, fragments: Sequence[Fragment], counts: Counts) -> None:
    """Input rows = scored + quarantined, by the `done` entries and by the rows that lie there.

    Raises:
        SaferError: they are not; what is wrong is told.
    """
    wrong = []
    present = {folder: names_in(out / folder) for folder in ("done", SCORES, "quarantine")}

    def footer(folder: str, name: str) -> Footer:
        return parquet_footer(out / folder / name) if name in present[folder] else Footer(0, "")

    def held(fragment: Fragment) -> tuple[dict[str, Any], Footer, Footer] | None:
        """A fragment's `done` entry, and what its parts say."""
        name, done = part_name(fragment.number), entry_name(fragment)
        if done not in present["done"]:
            return None
        return read_entry(out / "done" / done), footer(SCORES, name), footer("quarantine", name)

    for fragment, found in zip(fragments, map_ordered(held, fragments, threads_for(out)), strict=True):
        if found is None:
            wrong.append(f"fragment {fragment.number} is not done")
            continue
        if why := _does_not_fit(*found):
            wrong.append(f"fragment {fragment.number}: {why}")
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


def _does_not_fit(entry: dict[str, Any], scored: Footer, refused: Footer) -> str | None:
    """Return in what a fragment's parts are not those that its `done` entry tells of."""
    rows = scored.rows, refused.rows
    if rows != (entry["written"], entry["quarantined"]) or sum(rows) != entry["read"]:
        return f"{entry['read']} rows read, {rows[0]} scored and {rows[1]} quarantined"
    for folder, part in ((SCORES, scored), ("quarantine", refused)):
        if part.digest != entry.get("parts", {folder: part.digest}).get(folder, ""):  # which entries of old do not tell
            return f"its part in {folder} is not the one that was written for it"
    return None


def check_share(audit: Audit, out: Path, counts: Counts) -> None:
    """Raises UserError where more rows than the configured share are in the quarantine; the scores stay."""
    if counts.quarantined > audit.max_refused_share * counts.read:
        reason = max(counts.reasons, key=lambda name: counts.reasons[name])
        raise UserError(
            f"{out}: {counts.quarantined} of {counts.read} rows could not be scored, more than --max-refused-share "
            f"{audit.max_refused_share:g}, most: {reason!r}; see {out}/quarantine, mend the rows and audit them with "
            "--fresh, or run the same command with a larger share: what is scored is kept"
        )
