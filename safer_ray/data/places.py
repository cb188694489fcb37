"""Find what a pair says in the texts as they were sent: readers cut transcripts into turns and strip them."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safer_ray.formats.declaration import Pair
from safer_ray.formats.transcripts import TURN, is_transcript


class Piece(NamedTuple):
    """A stretch of a message of the pair that was sent as it is."""

    at: int  # where it begins in the content of the pair's message
    message: int  # of the text as sent; 0 where that is no list
    start: int  # in the content of that message
    stop: int


Pieces = list[list[Piece]]  # of each message of a prompt or a response, in order, and so are those of a message


def pieces_of(sent: Mapping[str, Any], pair: Pair) -> dict[str, Pieces]:
    """Return of the messages of `prompt`, `chosen` and `rejected` of a pair in canonical format what was sent where.

    A prompt that only the sides told, or told at more length, has no piece: nobody sent it as the prompt.
    """
    prompt = _pieces_of_prompt(sent["prompt"])
    found = {"prompt": prompt if len(prompt) == len(pair.prompt) else [[] for _ in pair.prompt]}
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        found[side] = _pieces_of_response(sent[side], response)
    return found


def _pieces_of_prompt(sent: str | Sequence[Mapping[str, str]]) -> Pieces:
    if not isinstance(sent, str):
        return _whole(sent)
    return _turns(sent) if is_transcript(sent) else [[Piece(0, 0, 0, len(sent))]]


def _pieces_of_response(sent: str | Sequence[Mapping[str, str]], response: Sequence[Mapping[str, str]]) -> Pieces:
    if not isinstance(sent, str):
        return _whole(sent)[-len(response) :]  # what comes before repeats the prompt
    content = response[0]["content"]
    start = sent.rfind(content)  # behind a transcript that repeats the prompt, else the whole text
    return [[Piece(0, 0, start, start + len(content))]]


def _whole(sent: Sequence[Mapping[str, str]]) -> Pieces:
    """Messages that say something."""
    return [[Piece(0, i, 0, len(m["content"]))] for i, m in enumerate(sent) if m["content"].strip()]


def _turns(text: str) -> Pieces:
    """The turns of a transcript that say something, neighbours of one role together."""
    found: Pieces = []
    last = None
    for role, start, stop in _spoken(text):
        if found and role == last:
            before = found[-1][-1]
            found[-1].append(Piece(before.at + before.stop - before.start + len("\n\n"), 0, start, stop))
        else:
            found.append([Piece(0, 0, start, stop)])
        last = role
    return found


def _spoken(text: str) -> Iterator[tuple[str, int, int]]:
    """Role, start and stop of what each turn says, without the whitespace around it."""
    marks = list(TURN.finditer(text))
    starts = [("", 0), *((mark[1], mark.end()) for mark in marks)]
    stops = [*(mark.start() for mark in marks), len(text)]
    for (role, start), stop in zip(starts, stops, strict=True):
        said = text[start:stop]
        if bare := said.strip():
            lead = len(said) - len(said.lstrip())
            yield role, start + lead, start + lead + len(bare)


def sent_span(pieces: Pieces, message: int, start: int, stop: int) -> tuple[int, int, int] | None:
    """Message, start and stop in the texts as sent of a stretch of one of the pair's messages, as far as it lies in one
    piece; None where that was not sent."""
    own = pieces[message]
    number = bisect_right(own, start, key=lambda piece: piece.at) - 1
    if number < 0:
        return None
    piece = own[number]
    length, shift = piece.stop - piece.start, piece.start - piece.at
    return (piece.message, start + shift, min(stop, piece.at + length) + shift) if start < piece.at + length else None
