"""Why a pair has its score: what each feature adds to it, and each sentence, with its place in the pair's messages."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.features.scoring import Contributions, Features, contributions
from safer_ray.reward.sentences import SideSentences
from safer_ray.reward.text import PairTokenizer
from safer_ray.schema import SIDES


class FeaturePart(NamedTuple):
    """The share of a feature in a pair's score; negative parts make the pair suspicious."""

    feature: int
    sign: int  # +1: of F+, -1: of F-
    contribution: float


class SentencePart(NamedTuple):
    """The share of a sentence in a pair's score; `content[start:stop]` of that message is the sentence."""

    side: str
    part: str  # prompt or response
    message: int  # of the prompt, or of the response
    start: int
    stop: int
    contribution: float
    features: list[int]  # of largest part first


class Explanation(NamedTuple):
    features: list[FeaturePart]  # of largest |contribution| first
    sentences: list[SentencePart]  # chosen before rejected, as they are read


def explain(
    codes: pa.Table, features: Features, pairs: Sequence[Mapping[str, Any]], tokenizer: PairTokenizer, limit: int
) -> list[Explanation]:
    """Return of each pair, given by its codes and its messages, the `limit` features that count most, and all sentences
    on which a selected feature fires. All features' parts, and all sentences', sum to the pair's score."""
    parts = contributions(codes, features)
    order = np.argsort(parts.row, kind="stable")
    parts = Contributions(*(column[order] for column in parts))
    bounds = np.searchsorted(parts.row, np.arange(len(codes) + 1))
    found = []
    for i, pair in enumerate(pairs):
        own = Contributions(*(column[bounds[i] : bounds[i + 1]] for column in parts))
        found.append(Explanation(_by_feature(own, features, limit), _by_sentence(own, pair, tokenizer)))
    return found


def _by_feature(own: Contributions, features: Features, limit: int) -> list[FeaturePart]:
    total: defaultdict[int, float] = defaultdict(float)
    for feature, value in zip(own.feature.tolist(), own.value.tolist(), strict=True):
        total[feature] += value
    safe = set(features.safe)
    largest = sorted(total, key=lambda feature: (-abs(total[feature]), feature))[:limit]
    return [FeaturePart(feature, 1 if feature in safe else -1, total[feature]) for feature in largest]


def _by_sentence(own: Contributions, pair: Mapping[str, Any], tokenizer: PairTokenizer) -> list[SentencePart]:
    columns = [column.tolist() for column in (own.side, own.end, own.feature, own.value)]
    entries: defaultdict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # by side and end, value by feature
    for side, end, feature, value in zip(*columns, strict=True):
        entries[side, end][feature] = entries[side, end].get(feature, 0.0) + value
    sentences: dict[int, SideSentences] = {}
    found = []
    for (side, end), values in sorted(entries.items()):
        if side not in sentences:
            sentences[side] = SideSentences(tokenizer, pair, SIDES[side])
        sentence = sentences[side].ending_at(end)
        if sentence is not None:
            by_size = sorted(values, key=lambda feature: (-abs(values[feature]), feature))
            place = sentence.part, sentence.message, sentence.start, sentence.stop
            found.append(SentencePart(SIDES[side], *place, sum(values.values()), by_size))
    return found
