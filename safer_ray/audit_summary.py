"""What an audit found, from the figures of its fragments: `flagged.jsonl`, `summary.json`, the page, the manifest."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.special import kolmogorov

from safer_ray import report_audit
from safer_ray.artifacts import MANIFEST, PLAN, Fragment, part_name, read_plan, versions
from safer_ray.audit_parts import (
    BINS,
    FLAGGED,
    LISTED,
    PAGE,
    SCORES,
    SUMMARY,
    WORST,
    Figures,
    Group,
    added,
    from_tree,
)
from safer_ray.audit_run import Audit, AuditCounts
from safer_ray.background import side_by_side
from safer_ray.evaluation import wilson
from safer_ray.files import at, names_in, read_json, read_parquet, threads_for, write_json, write_text, writing
from safer_ray.marks import Marks, enclosing, is_marked, together
from safer_ray.schema import to_json

IDS = 5_000_000  # pair ids that are compared at once; of more, a known share of all ids is
DECILES = 10


class Drift(NamedTuple):
    """How far the audited pairs' suspicion lies from the reference pairs', which is uniform over [0, 1]."""

    ks: float  # largest distance of the two distributions, at BINS edges; 0 is none, 1 is most
    p: float  # of Kolmogorov and Smirnov's test for two samples: small where chance does not explain the distance
    psi: float  # population stability index over deciles; below 0.1 is little, above 0.25 is much
    reference: int  # reference pairs


def drift(suspicion: np.ndarray, reference: int) -> Drift:
    """Of pairs by bin of suspicion, against so many reference pairs."""
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
    figures = added(_figures(out, fragments))
    _list_flagged(out, fragments)
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
    """Of the auditor, and of all that was audited by it; what the rows said stands in the scores."""
    licence = audit.source.licence
    scores = is_marked(out / SCORES / part_name(fragment.number) for fragment in fragments)
    own = Marks((licence,) if licence else (), scores)
    return together(audit.auditor.marks, own, enclosing({at(fragment.path) for fragment in fragments}))


def _figures(out: Path, fragments: Sequence[Fragment]) -> Iterator[Figures]:
    paths = [out / "done" / f"{fragment.number:08}.json" for fragment in fragments]
    yield from side_by_side(lambda path: from_tree(read_json(path)["figures"]), paths, threads_for(out))


def _list_flagged(out: Path, fragments: Sequence[Fragment]) -> None:
    """All flagged pairs in one file, in the order of the corpus; no more than a block of it is held."""
    with writing(out / LISTED) as whole:
        for part in side_by_side(lambda path: path.read_bytes(), _flagged(out, fragments), threads_for(out)):
            whole.write(part)


def _flagged(out: Path, fragments: Sequence[Fragment]) -> list[Path]:
    """The flagged pairs of those fragments that have any."""
    present = names_in(out / FLAGGED)
    names = [Path(part_name(fragment.number)).with_suffix(".jsonl").name for fragment in fragments]
    return [out / FLAGGED / name for name in names if name in present]


def worst_pairs(out: Path, fragments: Sequence[Fragment], figures: Figures) -> list[dict[str, Any]]:
    """The most suspicious flagged pairs, worst first, as `flagged.jsonl` has them."""
    wanted = {key for _, _, key in figures.worst}

    def holds(fragment: Fragment) -> bool:
        worst = read_json(out / "done" / f"{fragment.number:08}.json")["figures"]["worst"]
        return any(key in wanted for *_, key in worst)

    holding = [f for f, has in zip(fragments, side_by_side(holds, fragments, threads_for(out)), strict=True) if has]
    found: dict[str, dict[str, Any]] = {}
    for path in _flagged(out, holding):
        rows = map(json.loads, path.read_bytes().splitlines())
        found |= {row["row_key"]: row for row in rows if row["row_key"] in wanted}
    return [found[key] for _, _, key in figures.worst if key in found][:WORST]


def duplicate_ids(out: Path, fragments: Sequence[Fragment]) -> int:
    """Rows whose `pair_id` an earlier row has; estimated where there are more than IDS ids."""
    kept, share = np.empty(0, dtype=np.uint64), 1
    paths = [out / SCORES / part_name(fragment.number) for fragment in fragments]
    for ids in side_by_side(lambda path: read_parquet(path, ["pair_id"])["pair_id"], paths, threads_for(out)):
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
        "score": _mean_std(figures.score),
        "reward_margin": _mean_std(figures.margin),
        "against_label": figures.wrong / max(1, figures.margin[0]),
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
    return int(pq.read_metadata(audit.auditor.path / "reference.parquet").num_rows)


def _rate(group: Group) -> dict[str, float]:
    low, high = wilson(group.flagged, group.pairs)
    return {"pairs": group.pairs, "flagged": group.flagged, "rate": group.rate, "low": low, "high": high}


def _mean_std(moments: np.ndarray) -> dict[str, float | None]:
    n, total, squares = moments.tolist()
    if n == 0:
        return {"mean": None, "std": None}
    mean = total / n
    return {"mean": mean, "std": float(np.sqrt(max(0.0, squares / n - mean * mean)))}
