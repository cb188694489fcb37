"""Find what a pair says in the columns of the row that it was read from: readers cut transcripts and markup into turns,
strip them, join columns, and take responses from columns of other names."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safer_ray.formats.canonical import ANSWERED, PROMPTS, SYSTEMS, TURN_BREAK
from safer_ray.formats.declaration import Pair, Refused
from safer_ray.formats.markup import stretches, without_stops
from safer_ray.formats.messages import CONTENT_KEYS, as_messages, listed, written_as_json
from safer_ray.formats.transcripts import is_transcript, marks_of
from safer_ray.schema import SIDES


class Piece(NamedTuple):
    """A stretch of a message of the pair that was sent as it is."""

    at: int  # where it begins in the content of the pair's message
    column: str
    message: int  # in the column's list; 0 where it holds a text, or one message
    start: int  # in that text, or in the content of that message
    stop: int


Pieces = list[list[Piece]]  # of each message of a prompt or a response, in order, and so are those of a message


class _Turn(NamedTuple):
    """Hold what a column says as one message; no pieces where it does not hold it as it is read."""

    content: str
    pieces: list[Piece]


def pieces_of(sent: Mapping[str, Any], row: Mapping[str, Any], pair: Pair) -> dict[str, Pieces]:
    """Return what of the messages of `prompt`, `chosen` and `rejected` was sent where.

    `sent` is the row as it came, `row` what its format expands it to (often the same), of which `pair` was read. A
    message has no pieces where no column holds it as it was read. A prompt is looked for in the columns that look like
    one, and where there is none, in front of the responses.
    """
    columns = _Columns(sent, row)
    found = {side: _of_response(columns, side, pair) for side in SIDES}
    return found | {"prompt": _of_prompt(columns, pair)}


def sent_span(pieces: Pieces, message: int, start: int, stop: int) -> tuple[str, int, int, int] | None:
    """Return column, message, start and stop, as they were sent, of a stretch of one of the pair's messages; None where
    it was not sent in one piece."""
    own = pieces[message]
    number = bisect_right(own, start, key=lambda piece: piece.at) - 1
    if number < 0:
        return None
    piece = own[number]
    if stop > piece.at + piece.stop - piece.start:
        return None
    shift = piece.start - piece.at
    return piece.column, piece.message, start + shift, stop + shift


class _Columns:
    """The columns of a row, by the names and numbers under which their values were sent."""

    def __init__(self, sent: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        self.sent = sent
        self.row = row
        self._turns: dict[str, list[_Turn]] = {}

    def turns(self, name: str) -> list[_Turn]:
        """Return what a column says, as far as it was sent."""
        if name not in self._turns:
            source = self._source(name)
            self._turns[name] = [] if source is None else _turns(self.row[name], *source)
        return self._turns[name]

    def text(self, name: str) -> tuple[str, str, int] | None:
        """Return the text of a column that is no messages, and the column and number under which it was sent."""
        value = self.row.get(name)
        source = self._source(name) if isinstance(value, str) else None
        if source is None or not isinstance(value, str) or stretches(value) is not None or _holds_json(value):
            return None
        return value, *source

    def _source(self, name: str) -> tuple[str, int] | None:
        """Return the column whose value, or the item of whose list, a column of the expanded row is."""
        value = self.row.get(name)
        if value is None:
            return None
        if self.sent.get(name) is value:
            return name, 0
        # A text of one character is the same object wherever it stands: columns that the expanded row lacks come first.
        for column, whole in sorted(self.sent.items(), key=lambda item: item[0] in self.row):
            if whole is value:
                return column, 0
            if isinstance(whole, list) and isinstance(value, str):
                for number, item in enumerate(whole):
                    if item is value:
                        return column, number
        return None


def _of_prompt(columns: _Columns, pair: Pair) -> Pieces:
    names = [name for name in PROMPTS if name in pair.used and columns.turns(name)]
    if not names:
        system = [turn for name in SYSTEMS if name in pair.used for turn in columns.turns(name)]
        lead = columns.turns("chosen")[: -len(pair.chosen)]
        return _aligned([*system, *lead], pair.prompt) if lead else _common_beginning(columns, pair)
    # Columns of a prompt follow each other: a system message, earlier turns, what is asked, and its input.
    first = names[0]
    before = [*(name for name in SYSTEMS if name in pair.used), *(name for name in names[1:] if name == "history")]
    turns = [*(turn for name in before for turn in columns.turns(name)), *columns.turns(first)]
    if first == "instruction" and "input" in names:
        turns[-1:] = [_joined(turns[-1], turn) for turn in columns.turns("input")[:1]]
    if ANSWERED in pair.notes:
        turns = turns[:-1]
    return _aligned(turns, pair.prompt)


def _joined(one: _Turn, other: _Turn) -> _Turn:
    shift = len(one.content) + len(TURN_BREAK)
    moved = [piece._replace(at=piece.at + shift) for piece in other.pieces]
    return _Turn(f"{one.content}{TURN_BREAK}{other.content}", one.pieces + moved)


def _of_response(columns: _Columns, side: str, pair: Pair) -> Pieces:
    """Return the pieces of a response: the end of its column, behind a prompt that it may repeat."""
    messages = pair.chosen if side == "chosen" else pair.rejected
    # A format that names its responses otherwise and reads them itself: the column that says this one.
    others = [name for name in pair.used if name not in (*PROMPTS, *SYSTEMS, *SIDES)]
    for name in [side] if columns.row.get(side) is not None else sorted(others):
        found = _aligned(columns.turns(name), messages)
        if any(found):
            return found
        sent = columns.text(name)
        if name == side and sent is not None and len(messages) == 1 and (content := messages[0]["content"]):
            text, column, number = sent
            if (start := without_stops(text).rfind(content)) >= 0:
                return [[Piece(0, column, number, start, start + len(content))]]
    return [[] for _ in messages]


def _common_beginning(columns: _Columns, pair: Pair) -> Pieces:
    """Return the pieces of a prompt with which both responses begin, as plain texts."""
    sent = None if pair.used & {*PROMPTS} else columns.text("chosen")
    if sent is None or len(pair.prompt) != 1 or not sent[0].startswith(content := pair.prompt[0]["content"]):
        return [[] for _ in pair.prompt]
    return [[Piece(0, sent[1], sent[2], 0, len(content))]]


def _aligned(turns: Sequence[_Turn], messages: Sequence[Mapping[str, str]]) -> Pieces:
    """Return the pieces of messages that end as the turns do; of those that say something else, none."""
    found: Pieces = [[] for _ in messages]
    for number, (turn, message) in enumerate(zip(reversed(turns), reversed(messages), strict=False), 1):
        if turn.content == message["content"]:
            found[-number] = turn.pieces
    return found


def _holds_json(text: str) -> bool:
    try:
        return written_as_json(text, "text") is not None
    except Refused:
        return True


def _turns(value: Any, column: str, number: int) -> list[_Turn]:
    """Return what a column's value says, message by message."""
    if isinstance(value, str):
        if not value.strip():
            return []
        if (marked := stretches(value)) is not None:
            return [_Turn(value[start:stop], [Piece(0, column, number, start, stop)]) for _, start, stop in marked]
        if _holds_json(value):
            return []  # what it says is escaped there
        if is_transcript(text := without_stops(value)):
            return _of_transcript(text, column, number)
        return [_Turn(text, [Piece(0, column, number, 0, len(text))])]
    try:
        messages = listed(value, column)
    except Refused:
        return []
    turns = [turn for i, message in enumerate(messages) for turn in _of_message(message, column, i)]
    if messages is value or messages[:1] == [value]:
        return turns
    return [_Turn(turn.content, []) for turn in turns]  # a mapping of lists, which have no numbers in the column


def _of_message(message: Any, column: str, number: int) -> Iterator[_Turn]:
    """Yield a message's turn; none where it says nothing, and one without pieces where its content is no text."""
    if not isinstance(message, Mapping):
        return
    content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
    if isinstance(content, str) and content.strip():
        yield _Turn(content, [Piece(0, column, number, 0, len(content))])
        return
    try:
        yield from (_Turn(read["content"], []) for read in as_messages([message], column))
    except Refused:
        return


def _of_transcript(text: str, column: str, number: int) -> list[_Turn]:
    """Return the turns of a transcript that say something, neighbours of one role together."""
    found: list[tuple[str, list[str], list[Piece]]] = []
    for role, start, stop in _spoken(text):
        at = 0
        if found and found[-1][0] == role:
            before = found[-1][2][-1]
            at = before.at + before.stop - before.start + len("\n\n")
        else:
            found.append((role, [], []))
        found[-1][1].append(text[start:stop])
        found[-1][2].append(Piece(at, column, number, start, stop))
    return [_Turn("\n\n".join(said), pieces) for _, said, pieces in found]


def _spoken(text: str) -> Iterator[tuple[str, int, int]]:
    """Role, start and stop of what each turn says, without the whitespace around it."""
    marks = marks_of(text)
    starts = [("", 0), *((mark[1], mark.end()) for mark in marks)]
    stops = [*(mark.start() for mark in marks), len(text)]
    for (role, start), stop in zip(starts, stops, strict=True):
        said = text[start:stop]
        if bare := said.strip():
            lead = len(said) - len(said.lstrip())
            yield role, start + lead, start + lead + len(bare)
