"""Pairs as sent to rows that a model reads, and outcomes back to what is answered, with places in the texts as sent."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safer_ray.data.places import Pieces, pieces_of, sent_span
from safer_ray.features.explain import Explanation
from safer_ray.formats.declaration import Pair as ReadPair
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import read_pair
from safer_ray.service.api import Contribution, FailedPair, Pair, Reason, ScoredPair, Span, Text
from safer_ray.service.request_limits import Limits

TEXTS = ("prompt", "chosen", "rejected")
ROLE_CHARS = 64


class Row(NamedTuple):
    """A pair as the model reads it; messages are {role, content}."""

    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    explain: bool


class Outcome(NamedTuple):
    """The outcome of a row: figures and, where it was asked for, an explanation; or why there is none."""

    figures: dict[str, Any] | None  # of ScoredPair
    explanation: Explanation | None = None
    error: str | None = None


class Scored(NamedTuple):
    """The outcomes of a request's rows, by which bundle, and the names of the features that they tell of."""

    auditor: str
    outcomes: list[Outcome]
    names: Mapping[int, str]
    red_team: bool = False  # of the bundle: it was made from pairs that were poisoned on purpose


class Read(NamedTuple):
    """A pair that can be scored, and what is needed to answer it."""

    id: str
    pair: ReadPair
    sent: dict[str, str | list[dict[str, str]]]


def read_pairs(pairs: Sequence[Pair], limits: Limits) -> list[Read | FailedPair]:
    """Each pair, or why it has no score: what `safer-ray audit` would quarantine, what is too long, what is no text."""
    return [_read(str(i) if pair.id is None else str(pair.id), pair, limits) for i, pair in enumerate(pairs)]


def _read(pair_id: str, pair: Pair, limits: Limits) -> Read | FailedPair:
    sent = {name: _plain(getattr(pair, name)) for name in TEXTS}
    for name, text in sent.items():
        if reason := _unreadable(name, text, limits):
            return FailedPair(id=pair_id, error=reason)
    try:
        return Read(pair_id, read_pair(sent, "canonical"), sent)
    except Refused as reason:
        return FailedPair(id=pair_id, error=Reason(code="refused", detail=str(reason)))


def _plain(text: Text) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [{"role": m.role, "content": m.content} for m in text]


def _unreadable(name: str, text: str | list[dict[str, str]], limits: Limits) -> Reason | None:
    turns = [{"role": "", "content": text}] if isinstance(text, str) else text
    role, said = max((len(m["role"]) for m in turns), default=0), sum(len(m["content"]) for m in turns)
    if said > limits.text_chars:
        detail = f"{name} has {said:,} characters, at most {limits.text_chars:,} are taken"
        return Reason(code="too_long", detail=detail)
    if role > ROLE_CHARS:
        detail = f"{name} has a role of {role:,} characters, at most {ROLE_CHARS} are taken"
        return Reason(code="too_long", detail=detail)
    try:
        "".join(m["role"] + m["content"] for m in turns).encode()
    except UnicodeEncodeError as error:
        detail = f"{name} is no Unicode text: half a surrogate pair at character {error.start}"
        return Reason(code="not_unicode", detail=detail)
    return None


def answer(read: Read, outcome: Outcome, names: Mapping[int, str]) -> ScoredPair | FailedPair:
    """Return what is answered of a pair; `names` are those of the features."""
    if outcome.figures is None:
        return FailedPair(id=read.id, error=Reason(code="unscorable", detail=outcome.error or "no score"))
    if outcome.explanation is None:
        return ScoredPair(id=read.id, **outcome.figures)
    features = [
        Contribution.model_validate({**part._asdict(), "name": names[part.feature]})
        for part in outcome.explanation.features
    ]
    return ScoredPair(id=read.id, **outcome.figures, features=features, spans=_spans(read, outcome.explanation))


def _spans(read: Read, explanation: Explanation) -> list[Span]:
    """Sentences in the texts as sent; those of a prompt that was not sent as such are left out."""
    pieces: dict[str, Pieces] = pieces_of(read.sent, read.pair)
    spans = []
    for sentence in explanation.sentences:
        own = pieces["prompt" if sentence.part == "prompt" else sentence.side]
        if found := sent_span(own, sentence.message, sentence.start, sentence.stop):
            message, start, end = found
            told = {name: getattr(sentence, name) for name in ("side", "part", "contribution", "features")}
            spans.append(Span.model_validate({**told, "message": message, "start": start, "end": end}))
    return spans
