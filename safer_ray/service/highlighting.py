"""Texts as the page shows them: messages cut at the sentences that count, with what each adds to the score."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safer_ray.formats.declaration import Messages
from safer_ray.formats.messages import MORE
from safer_ray.service.api import ScoredPair, Span

STEPS = 4  # shades of each sign
FAINT = 0.02  # of the strongest sentence; below it a sentence stays unmarked
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: "\u2421"}
_DIRECTIONS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_VISIBLE = _CONTROLS | _DIRECTIONS | _SURROGATES


class Piece(NamedTuple):
    """A stretch of a message; `step` in -4..4 is its shade, 0 where it does not count."""

    text: str
    step: int = 0
    contribution: float = 0.0
    features: tuple[int, ...] = ()


class Turn(NamedTuple):
    """A message; consecutive pieces make up its content."""

    role: str
    pieces: tuple[Piece, ...]


class Marked(NamedTuple):
    """A pair's texts with their sentences marked."""

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]


def visible(text: str) -> str:
    """A text whose control characters show: they would reorder, hide or break what stands around them."""
    return text.translate(_VISIBLE)


def storable(text: str) -> str:
    """A text as it is, but for what UTF-8 cannot say."""
    return text.translate(_SURROGATES)


def parted(text: str) -> tuple[str, str, str]:
    """A text as the space before it, what it says, and the space after it."""
    said = text.strip()
    start = text.index(said)
    return text[:start], said, text[start + len(said) :]


def marked(prompt: Messages, chosen: Messages, rejected: Messages, result: ScoredPair) -> Marked:
    """The texts of a pair with the sentences that its result names.

    A sentence of the prompt counts on both sides, and is shown once with the sum.
    """
    spans = [span for span in result.spans or () if span.contribution]
    strongest = max((abs(span.contribution) for span in spans), default=0.0)
    parts: dict[str, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        parts["prompt" if span.part == "prompt" else span.side][span.message].append(span)
    return Marked(
        _turns(prompt, parts["prompt"], strongest),
        _turns(chosen, parts["chosen"], strongest),
        _turns(rejected, parts["rejected"], strongest),
    )


def step_of(contribution: float, strongest: float) -> int:
    """The shade of a contribution: its share of the strongest one in quarters, signed; 0 where it is faint."""
    share = abs(contribution) / strongest if strongest else 0.0
    if share < FAINT:
        return 0
    step = min(STEPS, int(share * STEPS) + 1)
    return step if contribution > 0 else -step


def _turns(said: Messages, spans: Mapping[int, list[Span]], strongest: float) -> tuple[Turn, ...]:
    return tuple(
        Turn(m["role"], _pieces(m["content"], spans.get(i, ()), strongest) + _beside(m)) for i, m in enumerate(said)
    )


def _beside(message: Mapping[str, str]) -> tuple[Piece, ...]:
    """Return what a message says beside its content, calls of tools and the like, as JSON."""
    more = message.get(MORE)
    return (Piece(f"\n{more}" if message["content"] else more),) if more else ()


def _pieces(text: str, spans: Sequence[Span], strongest: float) -> tuple[Piece, ...]:
    """The text in order, each sentence once with the sum of its spans; what overlaps an earlier one is cut."""
    sums: dict[tuple[int, int], float] = defaultdict(float)
    named: dict[tuple[int, int], set[int]] = defaultdict(set)
    for span in spans:
        sums[span.start, span.end] += span.contribution
        named[span.start, span.end].update(span.features)
    pieces, at = [], 0
    for key in sorted(sums):
        start, stop = max(key[0], at), min(key[1], len(text))
        if start >= stop:
            continue
        if start > at:
            pieces.append(Piece(text[at:start]))
        lead, sentence, tail = parted(text[start:stop])
        pieces.append(Piece(lead))
        pieces.append(Piece(sentence, step_of(sums[key], strongest), sums[key], tuple(sorted(named[key]))))
        pieces.append(Piece(tail))
        at = stop
    return tuple(piece for piece in (*pieces, Piece(text[at:])) if piece.text)
