"""Cards of an auditor's features, for people: a name, how it was judged, where and how strongly it fires."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.features.codes import flatten
from safer_ray.features.scoring import Features, parse_features
from safer_ray.schema import SIDES, table
from safer_ray.storage.files import read_parquet

FILE = "features.parquet"
NAME_CHARS = 60
BINS = 24

CONTEXT = pa.struct(
    [
        ("value", pa.float32()),
        ("side", pa.string()),
        ("before", pa.string()),
        ("sentence", pa.string()),
        ("after", pa.string()),
    ]
)
CARDS = pa.schema(
    [
        ("feature", pa.int32()),
        ("name", pa.string()),
        ("sign", pa.int8()),  # +1: of F+ (safe), -1: of F- (unsafe)
        ("salience", pa.float64()),
        ("chosen_sum", pa.float64()),
        ("rejected_sum", pa.float64()),
        ("n_chosen", pa.int64()),
        ("n_rejected", pa.int64()),
        ("rating", pa.int8()),
        ("reason", pa.string()),
        ("edges", pa.list_(pa.float64())),  # of the histograms, one more than their counts
        ("chosen", pa.list_(pa.int64())),
        ("rejected", pa.list_(pa.int64())),
        ("contexts", pa.list_(CONTEXT)),  # strongest first
    ]
)


class FeatureEvidence(NamedTuple):
    """Evidence about features from earlier stages: SALIENCE, VERDICTS and CONTEXTS."""

    salience: pa.Table
    verdicts: pa.Table | None = None
    contexts: pa.Table | None = None


class Spread(NamedTuple):
    """A histogram of how strongly a feature fires on the sentences of either side."""

    edges: np.ndarray  # float64 [bins + 1]
    chosen: np.ndarray  # int64 [bins]
    rejected: np.ndarray


def name_of(feature: int, verdict: dict[str, Any] | None, contexts: Sequence[dict[str, Any]]) -> str:
    """A short label, never empty: what a judge that reads the sentences says, else the strongest sentence. A concept
    probe's reason tells figures, which are no name."""
    said = "" if verdict is None or str(verdict["judge"]).startswith("probe:") else verdict["reason"] or ""
    words = " ".join(said.split()) or next((s for c in contexts if (s := " ".join(c["sentence"].split()))), "")
    words = words or f"feature {feature}"
    return words if len(words) <= NAME_CHARS else f"{words[: NAME_CHARS - 1].rstrip()}…"


def spreads(parts: Iterable[pa.Table], features: Features) -> dict[int, Spread]:
    """Return the histogram of each selected feature that fires in these codes; the bins go from 0 to its largest
    activation."""
    ids = np.sort(np.array([*features.safe, *features.unsafe], dtype=np.int64))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {side: [] for side in SIDES}
    for part in parts:
        for side in SIDES:
            flat = flatten(part, side, features.mode)
            kept = np.isin(flat.feature, ids)
            found[side].append((flat.feature[kept], flat.value[kept]))
    sides = {
        side: tuple(np.concatenate(columns) for columns in zip(*rows, strict=True)) for side, rows in found.items()
    }
    out = {}
    for feature in ids.tolist():
        chosen, rejected = (value[of == feature] for of, value in sides.values())
        if len(chosen) or len(rejected):
            edges = np.linspace(0, max(chosen.max(initial=0), rejected.max(initial=0)), BINS + 1)
            counts = (np.histogram(values, edges)[0] for values in (chosen, rejected))
            out[feature] = Spread(edges, *counts)
    return out


def make_cards(features: Features, known: FeatureEvidence, codes: Iterable[pa.Table]) -> pa.Table:
    """One CARDS row a selected feature, by falling |salience|."""
    sums = {row["feature"]: row for row in known.salience.to_pylist()}
    verdicts = {row["feature"]: row for row in known.verdicts.to_pylist()} if known.verdicts is not None else {}
    contexts: dict[int, list[dict[str, Any]]] = {}
    for row in known.contexts.to_pylist() if known.contexts is not None else ():
        contexts.setdefault(row["feature"], []).append(row)
    fires = spreads(codes, features)
    rows = []
    for sign, ids in ((1, features.safe), (-1, features.unsafe)):
        for feature in ids:
            verdict, own = verdicts.get(feature), sorted(contexts.get(feature, ()), key=lambda row: row["rank"])
            row = {**sums.get(feature, {}), "feature": feature, "sign": sign, "name": name_of(feature, verdict, own)}
            row |= {name: verdict[name] for name in ("rating", "reason")} if verdict else {}
            row |= (
                {name: values.tolist() for name, values in fires[feature]._asdict().items()} if feature in fires else {}
            )
            row["contexts"] = [{field.name: context[field.name] for field in CONTEXT} for context in own]
            rows.append(row)
    rows.sort(key=lambda row: (-abs(row.get("salience") or 0.0), row["feature"]))
    return table(rows, CARDS)


def read_cards(bundle: Path) -> pa.Table:
    """The cards of a bundle; of one that carries none, what its features.json says."""
    if (bundle / FILE).is_file():
        return read_parquet(bundle / FILE).cast(CARDS)
    features = parse_features(json.loads((bundle / "features.json").read_text(encoding="utf-8")))
    rows = [
        {"feature": feature, "sign": sign, "name": name_of(feature, None, ()), "contexts": []}
        for sign, ids in ((1, features.safe), (-1, features.unsafe))
        for feature in ids
    ]
    return table(rows, CARDS)
