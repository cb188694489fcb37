"""The parts of preference formats: the declaration of one, pairs, refusals, values and transcripts."""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from safer_ray.schema import to_json

Messages = list[dict[str, str]]
Row = dict[str, Any]
Options = Mapping[str, str]  # what a source says of how its rows are read, by option
REASON_CHARS = 300
MOST_PAIRS = 10_000  # of one row
LARGEST = 3.4028234663852886e38  # number that float32 holds
_ROLES = {"Human": "user", "Assistant": "assistant"}
SPOKEN = (  # fields beside a message's content that are part of what it says
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought", "refusal"),
    *("images", "image", "audio", "video", "videos"),
)
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")


class Refused(Exception):  # noqa: N818  # a verdict on a row, no error
    """A row that is no usable pair; the text is the reason, cut where it quotes a long value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if len(reason) <= REASON_CHARS else f"{reason[: REASON_CHARS - 1]}…")


@dataclass(frozen=True)
class Pair:
    """The pair that a format reads from one row. `used` are the columns it accounts for; the others ride along as
    extras."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    label_margin: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    used: frozenset[str] = frozenset({"prompt", "chosen", "rejected"})


Reader = Callable[[Row, Options], Pair]
Expander = Callable[[Row, Options], list[Row]]


@dataclass(frozen=True)
class PreferenceFormat:
    """All that is known of a format; `registry.FORMATS` holds every one.

    `read` makes a pair of a row. Where a row holds other columns, or several pairs, `expand` first makes rows of it
    that `read` takes. Both are pure functions that raise `Refused`, with the reason, for a row that is no usable pair.
    """

    name: str
    columns: tuple[str, ...]  # that a row must have
    told: str  # the columns, for people
    read: Reader
    expand: Expander | None = None
    holds: Callable[[Row], bool] | None = None  # what must hold besides, for a row to be taken for this format
    several: bool = False  # whether a row may hold more than one pair where its source says nothing
    detected: bool = True  # False: taken only where a config names it
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a source, and their values, default first

    def fits(self, row: Row) -> bool:
        """Return whether a row's columns are those of this format."""
        return self.detected and row.keys() >= set(self.columns) and (self.holds is None or self.holds(row))


def check_count(pairs: int) -> None:
    """Raises Refused: a row would be cut into more pairs than any data set has in one, and than memory might hold."""
    if pairs > MOST_PAIRS:
        raise Refused(f"too many pairs in a row: {pairs}, limit {MOST_PAIRS}")


# Values


def type_name(value: Any) -> str:
    """Return what a JSON value is, in the words of the reasons."""
    names = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", dict: "mapping"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def as_text(value: Any) -> str:
    """A label value as text: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def as_number(value: Any) -> float | None:
    """A finite number that float32 can hold, also one written as text (CSV), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # so is NaN


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, also an Arrow map (a list of key and value pairs), else None."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value):
        return {as_text(key): content for key, content in value}
    return None


def required(row: Row, name: str) -> Any:
    """A text or list of messages; null counts as empty text."""
    if name not in row:
        raise Refused(f"missing column: {name}")
    value = row[name]
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        raise Refused(f"empty text: {name}")
    if not isinstance(value, (str, list)):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text or messages")
    return value


def required_text(row: Row, name: str) -> str:
    value = required(row, name)
    if not isinstance(value, str):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text")
    return value


def as_messages(value: list[Any], name: str) -> Messages:
    """Messages with a role and a content; empty ones are left out."""
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise Refused(f"wrong type: {name}[{i}] is {type_name(item)}, wanted a message with role and content")
        for key in ("role", "content"):
            if not isinstance(item.get(key), (str, NoneType)):
                raise Refused(f"wrong type: {name}[{i}].{key} is {type_name(item[key])}, wanted text")
        for key in SPOKEN:
            if item.get(key):
                raise Refused(
                    f"unread field: {name}[{i}].{key}, which is a part of what was said; pairs hold a role and a "
                    "content alone: write it into the content as the model reads it"
                )
        if not item.get("role"):
            raise Refused(f"wrong type: {name}[{i}].role is null, wanted text")
        if (item.get("content") or "").strip():
            messages.append({"role": item["role"], "content": item["content"]})
    if not messages:
        raise Refused(f"empty text: {name}")
    return messages


# Transcripts


def is_transcript(text: str) -> bool:
    """Return whether a text is a dialogue: it opens with a turn, or asks for the next one at its end."""
    return bool(TURN.match(text)) or ("\n\nHuman:" in text and text.rstrip().endswith("\n\nAssistant:"))


def turns_of(text: str) -> Messages:
    """All turns of a transcript, empty ones too; text before the first is a system message."""
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    lead = text[: marks[0].start()].strip()
    turns = [{"role": "system", "content": lead}] if lead else []
    return turns + [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def tidied(turns: Messages) -> Messages:
    """Without empty turns, and with neighbours of one role joined, so that roles alternate as chat templates want."""
    said = [turn for turn in turns if turn["content"]]
    runs = itertools.groupby(said, key=lambda turn: turn["role"])
    return [{"role": role, "content": "\n\n".join(turn["content"] for turn in run)} for role, run in runs]


def parse_prompt(text: str) -> Messages:
    """A text prompt as messages: one user message, or the turns of a Human:/Assistant: transcript."""
    messages = tidied(turns_of(text)) if is_transcript(text) else [{"role": "user", "content": text}]
    if not messages:
        raise Refused("empty text: prompt")
    return messages


# Pairs


def bare(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _response(value: Any, name: str, prompt: Messages, prompt_text: Any) -> tuple[Messages, Messages]:
    """The prompt that a side repeats (empty where it does not) and its response."""
    if isinstance(value, str):
        if isinstance(prompt_text, str) and is_transcript(prompt_text) and value.startswith(prompt_text):
            value = value[len(prompt_text) :].strip()
            if not value:
                raise Refused(f"empty text: {name}")
        return [], [{"role": "assistant", "content": value}]
    messages = as_messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    cut = len(prompt) if bare(messages[: len(prompt)]) == bare(prompt) else 0
    if cut == 0 and messages[0]["role"] != "assistant":
        cut = max(i for i, message in enumerate(messages) if message["role"] != "assistant") + 1
        shorter = min(cut, len(prompt))  # either may lack a system message that the other has
        if bare(messages[:cut])[-shorter:] != bare(prompt)[-shorter:]:
            raise Refused("prompts differ")
    if cut == len(messages):
        raise Refused(f"empty text: {name}")
    return messages[:cut], messages[cut:]


def canonical(row: Row, options: Options) -> Pair:
    """`prompt`, `chosen`, `rejected`, each text or messages; sides that repeat the prompt are cut to their end."""
    values = {name: required(row, name) for name in ("prompt", "chosen", "rejected")}
    text = values["prompt"]
    prompt = parse_prompt(text) if isinstance(text, str) else as_messages(text, "prompt")
    chosen_lead, chosen = _response(values["chosen"], "chosen", prompt, text)
    rejected_lead, rejected = _response(values["rejected"], "rejected", prompt, text)
    leads = [lead for lead in (chosen_lead, rejected_lead) if lead]
    if len(leads) == 2 and bare(leads[0]) != bare(leads[1]):
        raise Refused("prompts differ")
    longer = bool(leads) and len(leads[0]) > len(prompt)  # the sides know a system message or earlier turns
    return Pair(leads[0] if longer else prompt, chosen, rejected)


def identity(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the user's key of a row, and the column that it stands in; None, None where it has none."""
    for name in ("pair_id", "id", "uid"):
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            return as_text(value), name
    return None, None
