"""The sentences on which a feature fires most: bounded lists per fragment, merged."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import Mode
from safer_ray.features.codes import flatten
from safer_ray.reward.sentences import SideSentences
from safer_ray.reward.text import PairTokenizer
from safer_ray.schema import CONTEXTS, SIDES, table

SPARE = 4  # lists per fragment are this much longer than wanted, since equal sentences are merged later
AROUND = 160  # characters kept before and after the sentence
LONGEST = 400  # of a sentence, from its end


def top_activations(codes: pa.Table, features: Sequence[int], mode: Mode, limit: int) -> list[dict[str, object]]:
    """Return the `limit` largest activations of each feature: feature, value, row, side and end of the sentence."""
    wanted = np.sort(np.array(features, dtype=np.int64))
    columns: list[list[np.ndarray]] = []
    for number, name in enumerate(SIDES):
        side = flatten(codes, name, mode)
        kept = np.flatnonzero(np.isin(side.feature, wanted))
        entry = side.entry[kept]
        columns.append(
            [
                side.feature[kept],
                side.value[kept],
                side.entry_row[entry],
                np.full(len(kept), number),
                side.end[entry],
            ]
        )
    feature, value, row, which, end = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.lexsort((end, which, row, -value, feature))
    rank = np.arange(len(order)) - np.searchsorted(feature[order], feature[order])
    return [
        {"feature": int(feature[i]), "value": float(value[i]), "row": int(row[i])}
        | {"side": SIDES[which[i]], "end": int(end[i])}
        for i in order[rank < limit]
    ]


def context_of(sentences: SideSentences, end: int) -> dict[str, str]:
    """Return what is said before a sentence, the sentence, and what is said after it; a sentence longer than `LONGEST`
    is cut at its beginning, which an ellipsis tells. All are empty where no message holds the sentence."""
    sentence = sentences.ending_at(end)
    if sentence is None:
        return {"before": "", "sentence": "", "after": ""}
    before, after = sentences.around(sentence, AROUND)
    text = sentence.text if len(sentence.text) <= LONGEST else "…" + sentence.text[-LONGEST:]
    return {"before": before, "sentence": text, "after": after}


class FindContexts:
    """Batch function: codes joined with pairs -> CONTEXTS, more than wanted so that merging can choose."""

    def __init__(self, tokenizer: PairTokenizer, features: Sequence[int], mode: Mode, limit: int) -> None:
        self.tokenizer = tokenizer
        self.features = features
        self.mode = mode
        self.limit = limit * SPARE

    @classmethod
    def load(
        cls, reward: Path, features: Sequence[int], mode: Mode, limit: int, reading: Reading = AS_IT_COMES
    ) -> "FindContexts":
        from safer_ray.reward.checkpoints import load_pair_tokenizer  # here, since it imports torch

        return cls(load_pair_tokenizer(reward, reading), features, mode, limit)

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = []
        sentences: dict[tuple[int, str], SideSentences] = {}
        pairs = rows.select(["prompt", "chosen", "rejected"])
        ids = rows["pair_id"].to_pylist()
        for hit in top_activations(rows, self.features, self.mode, self.limit):
            key = (int(str(hit["row"])), str(hit["side"]))
            if key not in sentences:
                sentences[key] = SideSentences(self.tokenizer, pairs.slice(key[0], 1).to_pylist()[0], key[1])
            context = {name: hit[name] for name in ("feature", "value", "side", "end")}
            context |= {"pair_id": ids[key[0]], "rank": 0}
            found.append(context | context_of(sentences[key], int(str(hit["end"]))))
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
