"""The sentences on which a feature fires most: bounded lists per fragment, merged."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import Mode
from safer_ray.features.codes import flatten
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.reward.text import PairTokenizer
from safer_ray.schema import CONTEXTS, SIDES, table

SPARE = 4  # lists per fragment are this much longer than wanted, since equal sentences are merged later
AROUND = 160  # characters kept before and after the sentence


def top_activations(codes: pa.Table, features: Sequence[int], mode: Mode, limit: int) -> list[dict[str, object]]:
    """The `limit` largest activations of each feature: feature, value, row, side, start and end of the sentence."""
    wanted = np.sort(np.array(features, dtype=np.int64))
    columns: list[list[np.ndarray]] = []
    for number, name in enumerate(SIDES):
        side = flatten(codes, name, mode)
        kept = np.flatnonzero(np.isin(side.feature, wanted))
        entry = side.entry[kept]
        previous = np.r_[0, side.end[:-1]]
        previous[np.r_[True, np.diff(side.entry_row) != 0]] = 0
        columns.append(
            [
                side.feature[kept],
                side.value[kept],
                side.entry_row[entry],
                np.full(len(kept), number),
                previous[entry],
                side.end[entry],
            ]
        )
    feature, value, row, which, start, end = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.lexsort((end, which, row, -value, feature))
    rank = np.arange(len(order)) - np.searchsorted(feature[order], feature[order])
    return [
        {"feature": int(feature[i]), "value": float(value[i]), "row": int(row[i])}
        | {"side": SIDES[which[i]], "start": int(start[i]), "end": int(end[i])}
        for i in order[rank < limit]
    ]


def cut_context(text: str, start: int, end: int) -> tuple[str, str, str]:
    """Text before, the sentence, and text after, trimmed to `AROUND` characters; -1 as `end`: unknown."""
    if end < 0:
        return "", text[-AROUND:], ""
    start = max(start, end - 400, text.rfind("\n\n", 0, max(0, end - 2)) + 1)
    return text[max(0, start - AROUND) : start], text[start:end], text[end : end + AROUND]


class FindContexts:
    """Batch function: codes joined with pairs -> CONTEXTS, more than wanted so that merging can choose."""

    def __init__(self, tokenizer: PairTokenizer, features: Sequence[int], mode: Mode, limit: int) -> None:
        self.tokenizer = tokenizer
        self.features = features
        self.mode = mode
        self.limit = limit * SPARE

    @classmethod
    def load(
        cls, reward: Path, features: Sequence[int], mode: Mode, limit: int, trust_remote_code: bool = False
    ) -> "FindContexts":
        return cls(load_pair_tokenizer(reward, trust_remote_code), features, mode, limit)

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = []
        texts: dict[tuple[int, str], str] = {}
        pairs = rows.select(["prompt", "chosen", "rejected"])
        ids = rows["pair_id"].to_pylist()
        for hit in top_activations(rows, self.features, self.mode, self.limit):
            key = (int(str(hit["row"])), str(hit["side"]))
            if key not in texts:
                texts[key] = self.tokenizer.rendered_side(pairs.slice(key[0], 1).to_pylist()[0], key[1])
            before, sentence, after = cut_context(texts[key], int(str(hit["start"])), int(str(hit["end"])))
            found.append(
                {name: hit[name] for name in ("feature", "value", "side", "end")}
                | {"pair_id": ids[key[0]], "before": before, "sentence": sentence, "after": after, "rank": 0}
            )
        return table(found, CONTEXTS)


def merge_contexts(parts: Iterable[pa.Table], limit: int) -> pa.Table:
    """The `limit` strongest contexts of each feature over all parts, equal sentences once; rank 0 is the strongest."""
    rows = [row for part in parts for row in part.to_pylist()]
    rows.sort(key=lambda r: (r["feature"], -r["value"], r["pair_id"], r["side"], r["end"]))
    kept: list[dict[str, object]] = []
    seen: dict[int, set[str]] = {}
    for row in rows:
        sentences = seen.setdefault(row["feature"], set())
        sentence = " ".join(row["sentence"].lower().split())
        if sentence not in sentences and len(sentences) < limit:
            kept.append({**row, "rank": len(sentences)})
            sentences.add(sentence)
    return table(kept, CONTEXTS)
