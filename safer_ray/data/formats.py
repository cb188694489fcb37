"""Preference formats in the wild: each is a pure function from one row to a pair, or a reason to refuse the row."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal

from safer_ray.errors import UserError
from safer_ray.schema import to_json

Messages = list[dict[str, str]]
Row = dict[str, Any]
Prefer = Literal["safer", "better"]

SUPPORTED = {
    "canonical": "prompt, chosen, rejected as text or messages",
    "hh_rlhf": "chosen, rejected as Human:/Assistant: transcripts",
    "pku_saferlhf": "prompt, response_0, response_1, safer_response_id or better_response_id",
    "ultrafeedback": "prompt, chosen, rejected, score_chosen, score_rejected",
    "skywork": "chosen, rejected as messages, source",
    "trl_explicit": "prompt, chosen, rejected",
    "trl_implicit": "chosen, rejected that begin with the prompt",
    "hhh": "input, targets with choices and labels",
    "llmbar": "input, output_1, output_2, label",
    "rewardbench": "prompt, chosen, rejected, subset",
    "rewardbench2": "prompt, chosen and rejected as lists, subset",
    "rm_bench": "prompt, chosen and rejected as lists of three, domain",
}
MARGINS = ("label_margin", "margin", "preference_strength")
REASON_CHARS = 300
LARGEST = 3.4028234663852886e38  # number that float32 holds
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))

_ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")
_SIDES = frozenset({"chosen", "rejected"})
# Up to the last turn marker, else to the last space.
_BOUNDARY = re.compile(r".*\n(?:Human|Assistant|User|AI|Bot|Q|A|Question|Answer|Response):\s|.*\s", re.DOTALL)


class Refused(Exception):  # noqa: N818  # a verdict on a row, no error
    """A row that is no usable pair; the text is the reason, cut where it quotes a long value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if len(reason) <= REASON_CHARS else f"{reason[: REASON_CHARS - 1]}…")


@dataclass(frozen=True)
class Pair:
    """What a format says of one row. `used` are the columns it accounts for; the others ride along as extras."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    label_margin: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    used: frozenset[str] = frozenset({"prompt", "chosen", "rejected"})


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


def _column(row: Row, name: str) -> Any:
    """A text or list of messages; null counts as empty text."""
    if name not in row:
        raise Refused(f"missing column: {name}")
    value = row[name]
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        raise Refused(f"empty text: {name}")
    if not isinstance(value, (str, list)):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text or messages")
    return value


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text")
    return value


def _messages(value: list[Any], name: str) -> Messages:
    """Messages with a role and a content; empty ones are left out."""
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise Refused(f"wrong type: {name}[{i}] is {type_name(item)}, wanted a message with role and content")
        for key in ("role", "content"):
            if not isinstance(item.get(key), (str, NoneType)):
                raise Refused(f"wrong type: {name}[{i}].{key} is {type_name(item[key])}, wanted text")
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


def _turns(text: str) -> Messages:
    """All turns of a transcript, empty ones too; text before the first is a system message."""
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    lead = text[: marks[0].start()].strip()
    turns = [{"role": "system", "content": lead}] if lead else []
    return turns + [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _tidy(turns: Messages) -> Messages:
    """Without empty turns, and with neighbours of one role joined, so that roles alternate as chat templates want."""
    said = [turn for turn in turns if turn["content"]]
    runs = itertools.groupby(said, key=lambda turn: turn["role"])
    return [{"role": role, "content": "\n\n".join(turn["content"] for turn in run)} for role, run in runs]


def parse_prompt(text: str) -> Messages:
    """A text prompt as messages: one user message, or the turns of a Human:/Assistant: transcript."""
    messages = _tidy(_turns(text)) if is_transcript(text) else [{"role": "user", "content": text}]
    if not messages:
        raise Refused("empty text: prompt")
    return messages


def _split_transcript(text: str, name: str) -> tuple[Messages, Messages]:
    if not is_transcript(text):
        raise Refused(f"wrong type: {name} is plain text, wanted a Human:/Assistant: transcript")
    *before, last = _turns(text)
    if last["role"] != "assistant":
        raise Refused(f"wrong type: {name} is a transcript that ends with Human:, wanted Assistant: at the end")
    if not last["content"]:
        raise Refused(f"empty text: {name}")
    return _tidy(before), [last]


# Formats


def _bare(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _response(value: Any, name: str, prompt: Messages, prompt_text: Any) -> tuple[Messages, Messages]:
    """The prompt that a side repeats (empty where it does not) and its response."""
    if isinstance(value, str):
        if isinstance(prompt_text, str) and is_transcript(prompt_text) and value.startswith(prompt_text):
            value = value[len(prompt_text) :].strip()
            if not value:
                raise Refused(f"empty text: {name}")
        return [], [{"role": "assistant", "content": value}]
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    cut = len(prompt) if _bare(messages[: len(prompt)]) == _bare(prompt) else 0
    if cut == 0 and messages[0]["role"] != "assistant":
        cut = max(i for i, message in enumerate(messages) if message["role"] != "assistant") + 1
        shorter = min(cut, len(prompt))  # either may lack a system message that the other has
        if _bare(messages[:cut])[-shorter:] != _bare(prompt)[-shorter:]:
            raise Refused("prompts differ")
    if cut == len(messages):
        raise Refused(f"empty text: {name}")
    return messages[:cut], messages[cut:]


def canonical(row: Row, prefer: Prefer = "safer") -> Pair:
    """`prompt`, `chosen`, `rejected`, each text or messages; sides that repeat the prompt are cut to their end."""
    values = {name: _column(row, name) for name in ("prompt", "chosen", "rejected")}
    text = values["prompt"]
    prompt = parse_prompt(text) if isinstance(text, str) else _messages(text, "prompt")
    chosen_lead, chosen = _response(values["chosen"], "chosen", prompt, text)
    rejected_lead, rejected = _response(values["rejected"], "rejected", prompt, text)
    leads = [lead for lead in (chosen_lead, rejected_lead) if lead]
    if len(leads) == 2 and _bare(leads[0]) != _bare(leads[1]):
        raise Refused("prompts differ")
    longer = bool(leads) and len(leads[0]) > len(prompt)  # the sides know a system message or earlier turns
    return Pair(leads[0] if longer else prompt, chosen, rejected)


def hh_rlhf(row: Row, prefer: Prefer = "safer") -> Pair:
    """Two transcripts that differ in the last Assistant turn; what comes before it is the prompt."""
    prompt, chosen = _split_transcript(_text(row, "chosen"), "chosen")
    other, rejected = _split_transcript(_text(row, "rejected"), "rejected")
    return _shared(prompt, other, chosen, rejected)


def _shared(prompt: Messages, other: Messages, chosen: Messages, rejected: Messages) -> Pair:
    if _bare(prompt) != _bare(other):
        raise Refused("prompts differ")
    if not prompt:
        raise Refused("empty text: prompt")
    return Pair(prompt, chosen, rejected, used=_SIDES)


def trl_implicit(row: Row, prefer: Prefer = "safer") -> Pair:
    """`chosen` and `rejected` that begin with the prompt: all messages but the last, or the common beginning."""
    chosen, rejected = _column(row, "chosen"), _column(row, "rejected")
    if type(chosen) is not type(rejected):
        raise Refused(f"wrong type: rejected is {type_name(rejected)}, wanted {type_name(chosen)} as in chosen")
    if isinstance(chosen, str):
        if is_transcript(chosen) or is_transcript(rejected):
            return hh_rlhf(row)
        differ = (i for i, (one, two) in enumerate(zip(chosen, rejected, strict=False)) if one != two)
        same = next(differ, min(len(chosen), len(rejected)))
        shared = _BOUNDARY.match(chosen, 0, same)
        cut = shared.end() if shared else 0
        sides = [text[cut:] for text in (chosen, rejected)]
        for name, text in zip(("prompt", "chosen", "rejected"), (chosen[:cut], *sides), strict=True):
            if not text.strip():
                raise Refused(f"empty text: {name}")
        left, right = ([{"role": "assistant", "content": text}] for text in sides)
        return Pair([{"role": "user", "content": chosen[:cut].rstrip()}], left, right, used=_SIDES)
    lists = {name: _messages(row[name], name) for name in ("chosen", "rejected")}
    for name, messages in lists.items():
        if messages[-1]["role"] != "assistant":
            raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    left, right = lists["chosen"], lists["rejected"]
    return _shared(left[:-1], right[:-1], left[-1:], right[-1:])


def skywork(row: Row, prefer: Prefer = "safer") -> Pair:
    """Two message lists and the `source` they came from, which becomes a label."""
    pair = trl_implicit(row)
    source = row.get("source")
    labels = {"source": as_text(source)} if source is not None else {}
    return replace(pair, labels=labels, used=pair.used | {"source"})


def ultrafeedback(row: Row, prefer: Prefer = "safer") -> Pair:
    """Canonical with two scores; equal scores are no preference. `messages` merely repeats the chosen side."""
    pair = canonical(row)
    numbers = []
    for name in SCORES[0]:
        if name not in row:
            raise Refused(f"missing column: {name}")
        numbers.append(as_number(row[name]))
        if numbers[-1] is None:
            raise Refused(f"wrong type: {name} is {type_name(row[name])}, wanted a number")
    if numbers[0] == numbers[1]:
        raise Refused(f"no preference: both scores are {numbers[0]:g}")
    repeats = {"messages"} if row.get("messages") == row["chosen"] else set()
    return replace(pair, used=pair.used | repeats)


def pku_saferlhf(row: Row, prefer: Prefer = "safer") -> Pair:
    """Two responses and the number of the safer or the better one; harm categories and severities become labels."""
    prompt = parse_prompt(_text(row, "prompt"))
    responses = [_text(row, "response_0"), _text(row, "response_1")]
    column = f"{prefer}_response_id"
    if column not in row:
        raise Refused(f"missing column: {column}")
    number = as_number(row[column])
    if number is None and row[column] not in (None, ""):
        raise Refused(f"wrong type: {column} is {type_name(row[column])}, wanted 0 or 1")
    if number not in (0, 1):
        raise Refused(f"no preference: {column} is {as_text(row[column])}")
    chosen = int(number)
    labels: dict[str, str] = {}
    used = {"prompt", "response_0", "response_1", column}
    for side, i in (("chosen", chosen), ("rejected", 1 - chosen)):
        names = {"safe": f"is_response_{i}_safe", "severity": f"response_{i}_severity_level"}
        labels |= {f"{side}_{key}": as_text(row[name]) for key, name in names.items() if row.get(name) is not None}
        used |= set(names.values())
        for name in (f"response_{i}_harm_category", f"response_{i}_harm_categories"):
            harm = row.get(name)
            kinds = [kind for kind, holds in harm.items() if holds] if isinstance(harm, dict) else harm
            if isinstance(kinds, list):
                used.add(name)
                if kinds:
                    labels[f"{side}_harm"] = ", ".join(as_text(kind) for kind in kinds)
    better, worse = ([{"role": "assistant", "content": responses[i]}] for i in (chosen, 1 - chosen))
    return Pair(prompt, better, worse, labels=labels, used=frozenset(used))


READERS: dict[str, Callable[[Row, Prefer], Pair]] = {
    "canonical": canonical,
    "trl_explicit": canonical,
    "hh_rlhf": hh_rlhf,
    "pku_saferlhf": pku_saferlhf,
    "ultrafeedback": ultrafeedback,
    "skywork": skywork,
    "trl_implicit": trl_implicit,
    **dict.fromkeys(("hhh", "llmbar", "rewardbench", "rewardbench2", "rm_bench"), canonical),  # of benchmarks.EXPANDERS
}


def read_pair(row: Row, format: str, prefer: Prefer = "safer") -> Pair:
    """One row of `format` as a pair, with its margin and its labels.

    Raises:
        Refused: the row is no usable pair; the text says why.
    """
    pair = READERS[format](row, prefer)
    if _bare(pair.chosen) == _bare(pair.rejected):
        raise Refused("equal responses")
    margin, used, labels = pair.label_margin, set(pair.used), dict(pair.labels)
    for name in MARGINS:
        if margin is None and (margin := as_number(row.get(name))) is not None:
            used.add(name)
            if name == "preference_strength" and margin == 0:
                raise Refused("no preference: preference_strength is 0")
    for one, two in SCORES:
        high, low = as_number(row.get(one)), as_number(row.get(two))
        if margin is None and high is not None and low is not None:
            margin = as_number(high - low)
            used |= {one, two}
    for name in ("labels", "meta"):
        mapping = as_mapping(row.get(name))
        if mapping is None:
            continue
        if name == "labels" or not any(isinstance(value, dict | list) for value in mapping.values()):
            used.add(name)  # a meta mapping with more than scalars rides along whole, too
        for key, value in mapping.items():
            if value is not None and (name == "labels" or not isinstance(value, dict | list)):
                labels.setdefault(key, as_text(value))
    return Pair(pair.prompt, pair.chosen, pair.rejected, margin, labels, frozenset(used))


def row_format(row: Row) -> str | None:
    """The format that a row's columns fit, None for none."""
    if {"input", "output_1", "output_2", "label"} <= row.keys():
        return "llmbar"
    if {"input", "targets"} <= row.keys():
        return "hhh"
    if {"prompt", "response_0", "response_1"} <= row.keys():
        return "pku_saferlhf" if row.keys() & {"safer_response_id", "better_response_id"} else None
    if not {"chosen", "rejected"} <= row.keys():
        return None
    if "prompt" in row and (name := _benchmark(row)):
        return name
    if "prompt" in row:
        return "ultrafeedback" if {"score_chosen", "score_rejected"} <= row.keys() else "canonical"
    sides = [row["chosen"], row["rejected"]]
    if any(isinstance(side, str) and is_transcript(side) for side in sides):
        return "hh_rlhf"
    return "skywork" if "source" in row and any(isinstance(side, list) for side in sides) else "trl_implicit"


def _benchmark(row: Row) -> str | None:
    """The benchmark of several responses a row that its columns fit."""
    if not all(isinstance(row[side], list) and row[side] and isinstance(row[side][0], str) for side in _SIDES):
        return "rewardbench" if {"subset", "chosen_model", "rejected_model"} <= row.keys() else None
    return "rewardbench2" if "subset" in row else "rm_bench" if "domain" in row else None


def detect_format(rows: Sequence[Row]) -> str:
    """The format that most of the rows fit.

    Raises:
        UserError: no row fits a supported format.
    """
    counts = Counter(name for row in rows if (name := row_format(row)))
    if counts:
        return counts.most_common(1)[0][0]
    columns = sorted({column for row in rows for column in row})
    supported = "; ".join(f"{name} ({columns})" for name, columns in SUPPORTED.items())
    raise UserError(f"no preference format fits the columns {columns}; rename them to one of: {supported}")
