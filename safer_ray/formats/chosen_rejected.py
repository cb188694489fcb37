"""Formats of two responses a row, by the names that data sets give their columns."""

import re
from dataclasses import replace

from safer_ray.formats.declaration import (
    Messages,
    Options,
    Pair,
    PreferenceFormat,
    Refused,
    Row,
    as_messages,
    as_number,
    as_text,
    bare,
    canonical,
    is_transcript,
    required,
    required_text,
    tidied,
    turns_of,
    type_name,
)

_SIDES = frozenset({"chosen", "rejected"})
# Up to the last turn marker, else to the last space.
_BOUNDARY = re.compile(r".*\n(?:Human|Assistant|User|AI|Bot|Q|A|Question|Answer|Response):\s|.*\s", re.DOTALL)


def _split_transcript(text: str, name: str) -> tuple[Messages, Messages]:
    if not is_transcript(text):
        raise Refused(f"wrong type: {name} is plain text, wanted a Human:/Assistant: transcript")
    *before, last = turns_of(text)
    if last["role"] != "assistant":
        raise Refused(f"wrong type: {name} is a transcript that ends with Human:, wanted Assistant: at the end")
    if not last["content"]:
        raise Refused(f"empty text: {name}")
    return tidied(before), [last]


def hh_rlhf(row: Row, options: Options) -> Pair:
    """Two transcripts that differ in the last Assistant turn; what comes before it is the prompt."""
    prompt, chosen = _split_transcript(required_text(row, "chosen"), "chosen")
    other, rejected = _split_transcript(required_text(row, "rejected"), "rejected")
    return _shared(prompt, other, chosen, rejected)


def _shared(prompt: Messages, other: Messages, chosen: Messages, rejected: Messages) -> Pair:
    if bare(prompt) != bare(other):
        raise Refused("prompts differ")
    if not prompt:
        raise Refused("empty text: prompt")
    return Pair(prompt, chosen, rejected, used=_SIDES)


def trl_implicit(row: Row, options: Options) -> Pair:
    """`chosen` and `rejected` that begin with the prompt: all messages but the last, or the common beginning."""
    chosen, rejected = required(row, "chosen"), required(row, "rejected")
    if type(chosen) is not type(rejected):
        raise Refused(f"wrong type: rejected is {type_name(rejected)}, wanted {type_name(chosen)} as in chosen")
    if isinstance(chosen, str):
        if is_transcript(chosen) or is_transcript(rejected):
            return hh_rlhf(row, options)
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
    lists = {name: as_messages(row[name], name) for name in ("chosen", "rejected")}
    for name, messages in lists.items():
        if messages[-1]["role"] != "assistant":
            raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    left, right = lists["chosen"], lists["rejected"]
    return _shared(left[:-1], right[:-1], left[-1:], right[-1:])


def skywork(row: Row, options: Options) -> Pair:
    """Two message lists and the `source` they came from, which becomes a label."""
    pair = trl_implicit(row, options)
    source = row.get("source")
    labels = {"source": as_text(source)} if source is not None else {}
    return replace(pair, labels=labels, used=pair.used | {"source"})


def ultrafeedback(row: Row, options: Options) -> Pair:
    """Canonical with two scores; equal scores are no preference. `messages` merely repeats the chosen side."""
    pair = canonical(row, options)
    numbers = []
    for name in ("score_chosen", "score_rejected"):
        if name not in row:
            raise Refused(f"missing column: {name}")
        numbers.append(as_number(row[name]))
        if numbers[-1] is None:
            raise Refused(f"wrong type: {name} is {type_name(row[name])}, wanted a number")
    if numbers[0] == numbers[1]:
        raise Refused(f"no preference: both scores are {numbers[0]:g}")
    repeats = {"messages"} if row.get("messages") == row["chosen"] else set()
    return replace(pair, used=pair.used | repeats)


def _has_transcript(row: Row) -> bool:
    return any(isinstance(row[side], str) and is_transcript(row[side]) for side in _SIDES)


def _has_messages(row: Row) -> bool:
    return any(isinstance(row[side], list) for side in _SIDES)


ULTRAFEEDBACK = PreferenceFormat(
    "ultrafeedback",
    ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
    "prompt, chosen, rejected, score_chosen, score_rejected",
    ultrafeedback,
)
CANONICAL = PreferenceFormat(
    "canonical", ("prompt", "chosen", "rejected"), "prompt, chosen, rejected as text or messages", canonical
)
TRL_EXPLICIT = PreferenceFormat(
    "trl_explicit", ("prompt", "chosen", "rejected"), "prompt, chosen, rejected", canonical, detected=False
)
HH_RLHF = PreferenceFormat(
    "hh_rlhf",
    ("chosen", "rejected"),
    "chosen, rejected as Human:/Assistant: transcripts",
    hh_rlhf,
    holds=_has_transcript,
)
SKYWORK = PreferenceFormat(
    "skywork", ("chosen", "rejected", "source"), "chosen, rejected as messages, source", skywork, holds=_has_messages
)
TRL_IMPLICIT = PreferenceFormat(
    "trl_implicit", ("chosen", "rejected"), "chosen, rejected that begin with the prompt", trl_implicit
)
