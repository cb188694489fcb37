"""Summarise an audit, from the figures of its fragments: `flagged.jsonl`, `summary.json`, the page, the manifest."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import kolmogorov

from safer_ray.audit import page as report_audit
from safer_ray.audit.parts import BINS, WORST, Figures, Group, from_tree, sum_figures, text_digest
from safer_ray.audit.run import Audit, AuditCounts
from safer_ray.data.audit_files import FLAGGED, FLAGGED_FILE, PAGE, SCORES, SUMMARY
from safer_ray.detection.evaluation import wilson
from safer_ray.errors import UserError
from safer_ray.features.bundle import reference_values
from safer_ray.features.bundle_facts import expected_flags
from safer_ray.schema import to_json
from safer_ray.storage.accounts import entry_name, read_entry
from safer_ray.storage.artifacts import DONE, MANIFEST, PLAN, Fragment, part_name, read_plan, versions
from safer_ray.storage.background import map_ordered
from safer_ray.storage.files import as_path, names_in, read_parquet, threads_for, write_json, write_text, writing
from safer_ray.storage.marks import Marks, enclosing, tell_it, together

IDS = 5_000_000  # pair ids that are compared at once; of more, a known share of all ids is
DECILES = 10


class Drift(NamedTuple):
    """The distance of the audited pairs' suspicion from the reference pairs', which is uniform over [0, 1]."""

    ks: float  # largest distance of the two distributions, at BINS edges; 0 is none, 1 is most
    p: float  # of Kolmogorov and Smirnov's test for two samples: small where chance does not explain the distance
    psi: float  # population stability index over deciles; below 0.1 is little, above 0.25 is much
    reference: int  # reference pairs


def drift(suspicion: np.ndarray, reference: int) -> Drift:
    """Return the drift of pairs, counted by bin of suspicion, against so many reference pairs."""
    n = int(suspicion.sum())
    if n == 0:
        return Drift(0.0, 1.0, 0.0, reference)
    found = np.cumsum(suspicion) / n
    distance = float(np.abs(found - np.arange(1, BINS + 1) / BINS).max())
    effective = np.sqrt(n * reference / (n + reference))
    shares = np.maximum(suspicion.reshape(DECILES, -1).sum(1) / n, 0.5 / n)
    index = float(((shares - 1 / DECILES) * np.log(shares * DECILES)).sum())
    return Drift(distance, float(kolmogorov(effective * distance)), index, reference)


def close_audit(audit: Audit, out: Path, counts: AuditCounts, seconds: float) -> dict[str, Any]:
    """Write what an audit found; the summary."""
    fragments = read_plan(out / PLAN)
    figures, flagged = _figures(out, fragments)
    _list_flagged(out, flagged)
    summary = summarise(audit, figures, counts, duplicate_ids(out, fragments))
    marks = _marks(audit, out, fragments)
    summary |= marks._asdict()
    write_text(report_audit.render(summary, worst_pairs(out, fragments, figures)), out / PAGE)
    write_json(summary, out / SUMMARY)
    manifest = {
        "stage": "audit",
        "name": f"audit-{hashlib.sha256(to_json(audit.asked()).encode()).hexdigest()[:12]}",
        "config": audit.asked(),
        "inputs": {"auditor": audit.auditor.name},
        "packages": versions(),
        "rows": summary["rows"],
        "metrics": {name: summary[name] for name in ("flagged", "duplicates", "against_label", "files")},
        "licence": list(marks.licence),
        "red_team": marks.red_team,
        "wall_seconds": round(seconds, 3),
    }
    write_json(manifest, out / MANIFEST)
    return summary


def _marks(audit: Audit, out: Path, fragments: Sequence[Fragment]) -> Marks:
    """Return the marks of the auditor, and of all that was audited by it; what the rows said stands in the scores."""
    licence = audit.source.licence
    scores = tell_it(out / SCORES / part_name(fragment.number) for fragment in fragments)
    own = Marks((licence,) if licence else (), bool(scores))
    return together(audit.auditor.marks, own, enclosing({as_path(fragment.path) for fragment in fragments}))


def _entry(out: Path, fragment: Fragment) -> dict[str, Any]:
    """Return a fragment's `done` entry; its `figures` as such, and its `parts`, which entries of old do not tell."""
    path = out / DONE / entry_name(fragment)
    entry = read_entry(path)
    try:
        return {"parts": {}, **entry, "figures": from_tree(entry["figures"])}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} has no figures of its rows ({error!r}); delete it, then run the same command again: it does those "
            "rows again"
        ) from None


class _Flagged(NamedTuple):
    """The flagged pairs of a fragment that has any."""

    path: Path
    done: Path  # its entry
    digest: str  # of the file; empty in entries of old


def _figures(out: Path, fragments: Sequence[Fragment]) -> tuple[Figures, list[_Flagged]]:
    """Return the figures of all fragments, and where their flagged pairs are; entries are read once."""
    flagged = []

    def each() -> Iterator[Figures]:
        entries = map_ordered(partial(_entry, out), fragments, threads_for(out))
        for fragment, entry in zip(fragments, entries, strict=True):
            if entry["figures"].flagged:
                done, digest = out / DONE / entry_name(fragment), entry["parts"].get(FLAGGED, "")
                flagged.append(_Flagged(_flagged(out, fragment), done, digest))
            yield entry["figures"]

    return sum_figures(each()), flagged


def _list_flagged(out: Path, flagged: Sequence[_Flagged]) -> None:
    """All flagged pairs in one file, in the order of the corpus; no more than a block of it is held.

    Raises:
        UserError: those of a fragment are gone, or not what was written for it.
    """

    present = names_in(out / FLAGGED)

    def held(part: _Flagged) -> bytes | None:
        try:
            text = part.path.read_bytes() if part.path.name in present else b""
        except IsADirectoryError:
            return None
        return text if text and part.digest in ("", text_digest(text)) else None

    with writing(out / FLAGGED_FILE) as whole:
        for part, text in zip(flagged, map_ordered(held, flagged, threads_for(out)), strict=True):
            if text is None:
                raise UserError(
                    f"{part.path} is gone, or not what was written for its fragment; delete {part.done}, then run the "
                    "same command again: it does those rows again"
                )
            whole.write(text)


def _flagged(out: Path, fragment: Fragment) -> Path:
    return (out / FLAGGED / part_name(fragment.number)).with_suffix(".jsonl")


def worst_pairs(out: Path, fragments: Sequence[Fragment], figures: Figures) -> list[dict[str, Any]]:
    """The most suspicious flagged pairs, worst first, as `flagged.jsonl` has them."""
    wanted = {key for _, _, key in figures.worst}

    def holds(fragment: Fragment) -> bool:
        return any(key in wanted for *_, key in _entry(out, fragment)["figures"].worst)

    holding = [f for f, has in zip(fragments, map_ordered(holds, fragments, threads_for(out)), strict=True) if has]
    found: dict[str, dict[str, Any]] = {}
    for path in [_flagged(out, fragment) for fragment in holding]:
        rows = map(json.loads, path.read_bytes().splitlines() if path.exists() else ())
        found |= {row["row_key"]: row for row in rows if row["row_key"] in wanted}
    return [found[key] for _, _, key in figures.worst if key in found][:WORST]


def duplicate_ids(out: Path, fragments: Sequence[Fragment]) -> int:
    """Rows whose `pair_id` an earlier row has; estimated where there are more than IDS ids."""
    kept, share = np.empty(0, dtype=np.uint64), 1
    paths = [out / SCORES / part_name(fragment.number) for fragment in fragments]
    for ids in map_ordered(lambda path: read_parquet(path, ["pair_id"])["pair_id"], paths, threads_for(out)):
        hashes = pd.util.hash_array(ids.to_numpy().astype(object))
        kept = np.concatenate([kept, hashes[hashes % share == 0]])
        while len(kept) > IDS:
            share *= 2
            kept = kept[kept % share == 0]
    return int(len(kept) - len(np.unique(kept))) * share


def summarise(audit: Audit, figures: Figures, counts: AuditCounts, duplicates: int) -> dict[str, Any]:
    """The numbers of an audit: rates and shares in [0, 1]."""
    features = sorted(figures.features.items(), key=lambda item: (item[1][1], item[0]))[:20]
    return {
        "auditor": audit.auditor.name,
        "pairs": audit.source.path,
        "detector": audit.scores.detector,
        "flag_quantile": audit.scores.flag_quantile,
        "rows": {"read": counts.read, "scored": counts.written, "quarantined": counts.quarantined},
        "reasons": counts.reasons,
        "files": counts.files.to_tree(),
        "max_refused_share": audit.max_refused_share,
        "duplicates": duplicates,
        "flagged": figures.flagged,
        "flag_rate": _rate(Group(figures.pairs, figures.flagged)),
        "reference": expected_flags(
            audit.auditor, audit.scores.detector, audit.scores.flag_quantile, _reference(audit)
        ),
        "score": _mean_std(figures.score),
        "reward_margin": _mean_std(figures.margin),
        "against_label": figures.wrong / max(1, figures.margin[0]),
        "contradicted": figures.contradicted,
        "notes": figures.notes,
        "truncated": {"pairs": figures.truncated, "share": figures.truncated / max(1, figures.pairs)},
        "drift": drift(figures.suspicion, _reference(audit))._asdict(),
        "suspicion": figures.suspicion.tolist(),
        "groups": {
            facet: {kind: _rate(group) for kind, group in sorted(kinds.items())}
            for facet, kinds in figures.groups.items()
        },
        "features": [
            {"feature": feature, "flagged_pairs": count, "contribution": total} for feature, (count, total) in features
        ],
    }


def _reference(audit: Audit) -> int:
    return len(reference_values(audit.auditor, audit.scores.detector))


def _rate(group: Group) -> dict[str, float]:
    low, high = wilson(group.flagged, group.pairs)
    return {"pairs": group.pairs, "flagged": group.flagged, "rate": group.rate, "low": low, "high": high}


def _mean_std(moments: np.ndarray) -> dict[str, float | None]:
    n, total, squares = moments.tolist()
    if n == 0:
        return {"mean": None, "std": None}
    mean = total / n
    return {"mean": mean, "std": float(np.sqrt(max(0.0, squares / n - mean * mean)))}
