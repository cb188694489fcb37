"""Why a pair has its score: what each feature adds to it, and each sentence, with its place in the pair's messages."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.features.scoring import Contributions, Features, contributions
from safer_ray.reward.text import SENTENCE_END, PairTokenizer, Rendered
from safer_ray.schema import SIDES


class FeaturePart(NamedTuple):
    """What a feature adds to a pair's score; negative parts make the pair suspicious."""

    feature: int
    sign: int  # +1: of F+, -1: of F-
    contribution: float


class SentencePart(NamedTuple):
    """What a sentence adds to a pair's score; `content[start:stop]` of that message is the sentence."""

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


class Spot(NamedTuple):
    """A stretch of a message of a prompt or response."""

    part: str
    message: int
    start: int
    stop: int


class SidePlaces:
    """One side's text as the model reads it, and where its sentences lie in the messages that it was rendered from."""

    def __init__(self, tokenizer: PairTokenizer, pair: Mapping[str, Any], side: str) -> None:
        prompt, response = pair["prompt"] or [], pair[side]
        head, tail = tokenizer.render(prompt, response)
        self.cut = len(head.text)
        self.parts = {"prompt": _Part(head, prompt), "response": _Part(tail, response)}

    def sentence(self, end: int) -> Spot | None:
        """The sentence that ends before character `end` of the side's text, without the whitespace around it; None
        where no message holds it. What it says is what `PairTokenizer.sentence` says."""
        name, at = ("prompt", end) if end <= self.cut else ("response", end - self.cut)
        found = self.parts[name].sentence(at)
        return Spot(name, *found) if found else None


class _Part:
    """A rendered prompt or response."""

    def __init__(self, rendered: Rendered, messages: Sequence[Mapping[str, str]]) -> None:
        self.text = rendered.text
        self.spans = rendered.spans
        self.begins = [start for start, _ in rendered.spans]
        self.ends = [found.end() for found in SENTENCE_END.finditer(rendered.text)]
        self.messages = list(_owners(rendered, messages))

    def sentence(self, at: int) -> tuple[int, int, int] | None:
        """Message, start and stop in its content."""
        span = bisect_left(self.begins, at) - 1
        before = bisect_left(self.ends, at) - 1
        if span < 0:
            return None
        begin = self.begins[span]
        start = max(begin, self.ends[before]) if before >= 0 else begin
        said = self.text[start:at]
        start += len(said) - len(said.lstrip())
        message, lead = self.messages[span]
        shift = lead - begin
        stop = min(start + len(said.strip()), self.spans[span][1])
        return (message, start + shift, stop + shift) if start < stop else None


def _owners(rendered: Rendered, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int]]:
    """Of each span, the message whose content it is, and where in that it begins; templates may leave some out."""
    owners, number = [], 0
    for start, stop in rendered.spans:
        said = rendered.text[start:stop]
        while messages[number]["content"].strip() != said:
            number += 1
        owners.append((number, messages[number]["content"].index(said)))
        number += 1
    return owners


def explain(
    codes: pa.Table, features: Features, pairs: Sequence[Mapping[str, Any]], tokenizer: PairTokenizer, limit: int
) -> list[Explanation]:
    """Of each pair, given by its codes and its messages, the `limit` features that count most, and all sentences on
    which a selected feature fires. All features' parts, and all sentences', sum to the pair's score."""
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
    entries: defaultdict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for side, end, feature, value in zip(
        *(c.tolist() for c in (own.side, own.end, own.feature, own.value)), strict=True
    ):
        entries[side, end][feature] = entries[side, end].get(feature, 0.0) + value
    places: dict[int, SidePlaces] = {}
    found = []
    for (side, end), values in sorted(entries.items()):
        if side not in places:
            places[side] = SidePlaces(tokenizer, pair, SIDES[side])
        if spot := places[side].sentence(end):
            by_size = sorted(values, key=lambda feature: (-abs(values[feature]), feature))
            found.append(SentencePart(SIDES[side], *spot, sum(values.values()), by_size))
    return found
