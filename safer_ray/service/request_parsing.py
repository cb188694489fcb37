"""Pairs as sent to rows that a model reads, and outcomes back to what is answered, with places in the texts as sent."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from safer_ray.data.places import Pieces, pieces_of, sent_span
from safer_ray.features.explain import Explanation
from safer_ray.formats.canonical import SIDES
from safer_ray.formats.declaration import Messages, Options, Refused, type_name
from safer_ray.formats.declaration import Pair as ReadPair
from safer_ray.formats.messages import MORE
from safer_ray.formats.registry import AUTO, CARRIED, FORMATS, NONE, expanded, format_of, read_pair
from safer_ray.service.api import (
    BIGGEST_ID,
    MAX_ID_CHARS,
    Contribution,
    FailedPair,
    Reason,
    ReasonCode,
    ScoredPair,
    ScoreRequest,
    Span,
)
from safer_ray.service.problems import log_without_texts
from safer_ray.service.request_limits import Limits

ROLE_CHARS = 64


class Row(NamedTuple):
    """A pair as the model reads it: messages of `safer_ray.formats.messages`."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
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
    sent: Mapping[str, Any]  # the row as it came
    row: Mapping[str, Any]  # and as its format expands it


class Unread(Exception):  # noqa: N818  # a verdict on a pair, no error
    """A pair that cannot be scored, and why."""

    def __init__(self, code: ReasonCode, detail: str) -> None:
        super().__init__(detail)
        # Details quote names, which may hold half a surrogate pair.
        self.reason = Reason(code=code, detail=detail.encode("utf-8", "replace").decode())


def read_pairs(request: ScoreRequest, limits: Limits) -> list[Read | FailedPair]:
    """Return each pair of a request, or why it has no score: what `safer-ray audit` would quarantine, what is too long,
    what is no text."""
    options = {CARRIED: ",".join(request.carried)} if request.carried else {}
    return [_read(pair, i, limits, request.format, options) for i, pair in enumerate(request.pairs)]


def _read(pair: Any, position: int, limits: Limits, format: str, options: Options) -> Read | FailedPair:
    pair_id = str(position)
    try:
        pair_id = pair_id if (own := id_of(pair, "id")) is None else own
        return read_row(pair, pair_id, limits, format, options)
    except Unread as error:
        return FailedPair(id=pair_id, error=error.reason)


def id_of(row: Any, *names: str) -> str | None:
    """Return the id of a row as text: the first that the columns hold, None where they hold none.

    Raises:
        Unread: it is no id.
    """
    if not isinstance(row, dict):
        return None
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 7.0 is the number 7, as JSON has it
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unread("refused", f"wrong type: {name} is {type_name(value)}, wanted text or a whole number")
    if isinstance(value, int) and abs(value) > BIGGEST_ID:
        raise Unread("refused", f"{name} is a number beyond {BIGGEST_ID:,}; send it as text")
    text = str(value)
    if len(text) > MAX_ID_CHARS:
        raise Unread("refused", f"{name} of {len(text):,} characters, at most {MAX_ID_CHARS} are allowed")
    if _half_pair(text) is not None:
        raise Unread("not_unicode", f"{name} is no Unicode text: it holds half a surrogate pair")
    return text


def read_row(row: Any, pair_id: str, limits: Limits, format: str = AUTO, options: Options = NONE) -> Read:
    """Return a row of any format of one pair a row as a pair.

    Raises:
        Unread: it is no usable pair; the reason says why.
    """
    if not isinstance(row, dict):
        raise Unread("refused", f"wrong type: the pair is {type_name(row)}, wanted a mapping of columns")
    try:
        found = _found(row, pair_id, format, options)
    except Refused as reason:
        raise Unread("refused", str(reason)) from None
    except UnicodeEncodeError:
        raise Unread("not_unicode", "no Unicode text: a column holds half a surrogate pair") from None
    except Exception as error:  # noqa: BLE001  # whatever a pair does, the others get their scores
        log_without_texts(error)
        raise Unread("refused", f"this pair cannot be read ({type(error).__name__})") from None
    for name in ("prompt", "chosen", "rejected"):
        _check(name, getattr(found.pair, name), limits)
    return found


def _found(row: dict[str, Any], pair_id: str, format: str, options: Options) -> Read:
    format = format_of(row) if format == AUTO else format
    known = FORMATS[format]
    if known.match is not None:
        raise Refused(f"a row of format {format} holds one response of a pair, wanted both; use safer-ray audit")
    if known.several:
        raise Refused(f"a row of format {format} holds several pairs, wanted one; use safer-ray audit")
    rows = expanded(row, format, options)
    if len(rows) != 1:
        raise Refused(f"a row of format {format} that holds {len(rows)} pairs, wanted one; use safer-ray audit")
    return Read(pair_id, read_pair(rows[0], format, options), row, rows[0])


def _check(name: str, messages: Messages, limits: Limits) -> None:
    """Raises Unread: a part of a pair is longer than the limits, or no Unicode text."""
    said = sum(len(message["content"]) + len(message.get(MORE, "")) for message in messages)
    if said > limits.text_chars:
        raise Unread("too_long", f"{name} has {said:,} characters, at most {limits.text_chars:,} are taken")
    role = max((len(message["role"]) for message in messages), default=0)
    if role > ROLE_CHARS:
        raise Unread("too_long", f"{name} has a role of {role:,} characters, at most {ROLE_CHARS} are taken")
    half = _half_pair("".join(text for message in messages for text in message.values()))
    if half is not None:
        raise Unread("not_unicode", f"{name} is no Unicode text: half a surrogate pair at character {half}")


def _half_pair(text: str) -> int | None:
    """Return where a text holds half a surrogate pair, which no Unicode text does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def as_read(read: Read) -> Read:
    """Return a pair such that its places are those in its own messages, as the page shows them."""
    row = {"prompt": read.pair.prompt, "chosen": read.pair.chosen, "rejected": read.pair.rejected}
    return Read(read.id, read.pair._replace(used=SIDES | {"prompt"}), row, row)


def answer(read: Read, outcome: Outcome, names: Mapping[int, str]) -> ScoredPair | FailedPair:
    """Return what is answered of a pair; `names` are those of the features."""
    if outcome.figures is None:
        return FailedPair(id=read.id, error=Reason(code="unscorable", detail=outcome.error or "no score"))
    told = outcome.figures | {"notes": list(read.pair.notes)}
    if outcome.explanation is None:
        return ScoredPair(id=read.id, **told)
    features = [
        Contribution.model_validate({**part._asdict(), "name": names[part.feature]})
        for part in outcome.explanation.features
    ]
    return ScoredPair(id=read.id, **told, features=features, spans=_spans(read, outcome.explanation))


def _spans(read: Read, explanation: Explanation) -> list[Span]:
    """Sentences in the texts as sent; those that were not sent as they were read are left out."""
    pieces: dict[str, Pieces] = pieces_of(read.sent, read.row, read.pair)
    spans = []
    for sentence in explanation.sentences:
        own = pieces["prompt" if sentence.part == "prompt" else sentence.side]
        if found := sent_span(own, sentence.message, sentence.start, sentence.stop):
            told = {name: getattr(sentence, name) for name in ("side", "part", "contribution", "features")}
            where = dict(zip(("column", "message", "start", "end"), found, strict=True))
            spans.append(Span.model_validate({**told, **where}))
    return spans
