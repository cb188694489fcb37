"""Write a fragment of an audit: scores, flagged pairs with their texts, and figures that add up over fragments.

The figures stand in the fragment's `done` entry, so that an audit is summarised without reading a row again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray import schema
from safer_ray.data.audit_files import FLAGGED, SCORES
from safer_ray.data.sources import told_of
from safer_ray.storage.files import DIGITS, remove, write_parquet, write_text
from safer_ray.storage.marks import COLUMN, marked_by_row, red_team_rows

AUDITED = pa.schema(
    [
        *schema.SCORES,
        ("source", pa.string()),
        ("section", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("label_margin", pa.float32()),
        ("notes", pa.list_(pa.string())),  # what should be known of its texts
        ("tokens", pa.int32()),  # of the longer response
        ("texts", pa.string()),  # of a flagged pair, as JSON: prompt, chosen, rejected, and the sentence of each reason
    ]
)
BINS = 200  # of suspicion, over [0, 1]
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)  # tokens of the longer response, upper ends
GROUPS = 200  # kinds of a facet that are told apart; later ones are counted together
OTHER = "(other)"
WORST = 20


class Group(NamedTuple):
    pairs: int
    flagged: int

    @property
    def rate(self) -> float:
        return self.flagged / max(1, self.pairs)


class Figures(NamedTuple):
    """Figures of scored pairs; sums and counts, so that those of parts add up to those of the whole."""

    pairs: int
    flagged: int
    suspicion: np.ndarray  # int64 [BINS], pairs by suspicion
    score: np.ndarray  # float64 [3]: n, sum, sum of squares
    margin: np.ndarray  # the same of the reward margin
    wrong: int  # pairs whose margin is negative: the reward model disagrees with the label
    truncated: int  # pairs of which a side is longer than the model reads, and was cut
    contradicted: int  # pairs whose own numbers prefer the rejected response
    notes: dict[str, int]  # what should be known of texts -> pairs
    groups: dict[str, dict[str, Group]]  # facet -> kind -> pairs
    features: dict[int, tuple[int, float]]  # of flagged pairs: how many a feature made suspicious, and by how much
    worst: list[tuple[float, float, str]]  # suspicion, score and row key of the most suspicious pairs, worst first


def _moments(values: np.ndarray) -> np.ndarray:
    known = values[np.isfinite(values)]
    return np.array([len(known), known.sum(), (known**2).sum()], dtype=np.float64)


def _counted(kinds: Sequence[str], flags: np.ndarray) -> dict[str, Group]:
    pairs, flagged = Counter(kinds), Counter(kind for kind, flag in zip(kinds, flags, strict=True) if flag)
    return {kind: Group(n, flagged[kind]) for kind, n in pairs.items()}


def _length(tokens: int) -> str:
    below = [0, *LENGTHS]
    at = int(np.searchsorted(LENGTHS, tokens, "right"))
    return f"{below[at]}-{LENGTHS[at] - 1} tokens" if at < len(LENGTHS) else f"{LENGTHS[-1]} tokens or more"


def _capped(kinds: dict[str, Group]) -> dict[str, Group]:
    if len(kinds) <= GROUPS:
        return kinds
    kept = dict(sorted(kinds.items(), key=lambda item: (item[0] == OTHER, -item[1].pairs, item[0]))[:GROUPS])
    rest = [group for kind, group in kinds.items() if kind not in kept]
    kept[OTHER] = Group(sum(g.pairs for g in rest), sum(g.flagged for g in rest))
    return kept


def figures_of(rows: pa.Table) -> Figures:
    """Return the figures of rows in the AUDITED schema."""
    flags = rows["flag"].to_numpy()
    facets: dict[str, list[str]] = {
        "source": [name or "" for name in rows["source"].to_pylist()],
        "section": [name or "(none)" for name in rows["section"].to_pylist()],
        "length": [_length(n) for n in rows["tokens"].to_pylist()],
    }
    groups = {facet: _counted(kinds, flags) for facet, kinds in facets.items()}
    labels = rows["labels"].to_pylist()
    for name in sorted({key for row in labels for key, _ in row or []}):
        has = [(dict(row or []).get(name), flag) for row, flag in zip(labels, flags.tolist(), strict=True)]
        known = [(str(value), flag) for value, flag in has if value is not None]
        groups[f"label {name}"] = _counted([kind for kind, _ in known], np.array([flag for _, flag in known]))
    features: dict[int, tuple[int, float]] = {}
    for reasons in rows.filter(rows["flag"])["reasons"].to_pylist():
        for reason in reasons:
            if reason["contribution"] < 0:
                count, total = features.get(reason["feature"], (0, 0.0))
                features[reason["feature"]] = (count + 1, total + reason["contribution"])
    margin = rows["reward_margin"].to_numpy()
    told = told_of(rows)
    return Figures(
        len(rows),
        int(flags.sum()),
        np.bincount(np.minimum((rows["suspicion"].to_numpy() * BINS).astype(np.int64), BINS - 1), minlength=BINS),
        _moments(rows["score"].to_numpy()),
        _moments(margin.astype(np.float64)),
        int((margin < 0).sum()),
        int(schema.truncated(rows).sum()),
        told["contradicted"],
        told["notes"],
        {facet: _capped(kinds) for facet, kinds in groups.items()},
        features,
        _worst(list(zip(*(rows[name].to_pylist() for name in ("suspicion", "score", "row_key")), strict=True))),
    )


def _worst(pairs: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:WORST]


def to_tree(figures: Figures) -> dict[str, Any]:
    """As JSON holds them; `suspicion` by the bins that are not empty."""
    used = np.flatnonzero(figures.suspicion)
    return figures._asdict() | {
        "suspicion": dict(zip(used.tolist(), figures.suspicion[used].tolist(), strict=True)),
        "score": figures.score.tolist(),
        "margin": figures.margin.tolist(),
    }


def from_tree(tree: dict[str, Any]) -> Figures:
    suspicion = np.zeros(BINS, dtype=np.int64)
    for at, count in tree["suspicion"].items():
        suspicion[int(at)] = count
    return Figures(
        tree["pairs"],
        tree["flagged"],
        suspicion,
        np.array(tree["score"]),
        np.array(tree["margin"]),
        tree["wrong"],
        tree["truncated"],
        tree.get("contradicted", 0),  # audits of old do not say it
        tree.get("notes", {}),
        {facet: {kind: Group(*g) for kind, g in kinds.items()} for facet, kinds in tree["groups"].items()},
        {int(feature): (count, total) for feature, (count, total) in tree["features"].items()},
        [(suspicion, score, key) for suspicion, score, key in tree["worst"]],
    )


def empty_figures() -> Figures:
    return from_tree(
        dict.fromkeys(("pairs", "flagged", "wrong", "truncated"), 0)
        | {"score": [0] * 3, "margin": [0] * 3}
        | {"suspicion": {}, "groups": {}, "features": {}, "worst": []}
    )


def sum_figures(figures: Iterable[Figures]) -> Figures:
    """Figures of parts, in their order, as those of all."""
    total = empty_figures()
    for part in figures:
        groups = {facet: dict(kinds) for facet, kinds in total.groups.items()}
        for facet, kinds in part.groups.items():
            own = groups.setdefault(facet, {})
            for kind, group in kinds.items():
                before = own.get(kind, Group(0, 0))
                own[kind] = Group(before.pairs + group.pairs, before.flagged + group.flagged)
            groups[facet] = _capped(own)
        features = dict(total.features)
        for feature, (count, amount) in part.features.items():
            known = features.get(feature, (0, 0.0))
            features[feature] = (known[0] + count, known[1] + amount)
        total = Figures(
            total.pairs + part.pairs,
            total.flagged + part.flagged,
            total.suspicion + part.suspicion,
            total.score + part.score,
            total.margin + part.margin,
            total.wrong + part.wrong,
            total.truncated + part.truncated,
            total.contradicted + part.contradicted,
            dict(Counter(total.notes) + Counter(part.notes)),
            groups,
            features,
            _worst(total.worst + part.worst),
        )
    return total


def flagged_line(row: dict[str, Any], red_team: bool = False) -> dict[str, Any]:
    """A flagged pair as people and labeling tools read it: texts, why it is suspicious, and the user's columns."""
    texts = json.loads(row["texts"])
    reasons = [reason | {"sentence": said} for reason, said in zip(row["reasons"], texts.pop("sentences"), strict=True)]
    return {
        **{name: row[name] for name in schema.SCORES.names if name not in ("reasons", "extra")},
        **texts,
        "reasons": reasons,
        **{name: row[name] for name in ("source", "section")},
        "labels": dict(row["labels"] or []),
        "extra": json.loads(row["extra"]) if row["extra"] else {},
        COLUMN: red_team,
    }


def write_part(
    rows: pa.Table, directory: Path, name: str, *, red_team: bool = False, of: Container[str] = ()
) -> dict[str, Any]:
    """Write a fragment's scores and flagged pairs; what its `done` entry says of them.

    Every row says whether it is marked: where all are (`red_team`), where its file is one `of` those marked as a whole,
    or where it calls itself poisoned.
    """
    told = zip(rows["row_key"].to_pylist(), red_team_rows(rows["extra"]), strict=True)
    which = [red_team or said or key.rpartition("#")[0] in of for key, said in told]
    scores = rows.select(schema.SCORES.names).cast(schema.SCORES).replace_schema_metadata(rows.schema.metadata or None)
    parts = {SCORES: write_parquet(marked_by_row(scores, which), directory / SCORES / name).digest}
    flags = rows["flag"].to_pylist()
    of_flagged = [is_marked for is_marked, flag in zip(which, flags, strict=True) if flag]
    flagged = zip(rows.filter(rows["flag"]).to_pylist(), of_flagged, strict=True)
    text = "".join(f"{schema.to_json(flagged_line(row, is_marked))}\n" for row, is_marked in flagged)
    path = (directory / FLAGGED / name).with_suffix(".jsonl")
    if text:
        write_text(text, path)
        parts[FLAGGED] = text_digest(text.encode())
    else:
        remove(path)  # of an attempt that did not come to its end
    return {"figures": to_tree(figures_of(rows)), "parts": parts}


def text_digest(text: bytes) -> str:
    """Return what tells the flagged pairs of a fragment from any others."""
    return hashlib.sha256(text).hexdigest()[:DIGITS]
