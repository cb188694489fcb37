"""Formats of two responses a row named `chosen` and `rejected`, by where data sets put the prompt."""

import re

from safer_ray.formats.canonical import SIDES, canonical, holds_messages, prompted_by, said
from safer_ray.formats.declaration import (
    Messages,
    Options,
    Pair,
    PreferenceFormat,
    Refused,
    Row,
    as_number,
    as_text,
    required,
    required_text,
    type_name,
)
from safer_ray.formats.messages import same_beginning, say_the_same
from safer_ray.formats.transcripts import JOINED, is_dialogue, notes_of_answer, tidied, turns_of

# Up to the last turn marker, else to the last space.
_BOUNDARY = re.compile(r".*\n(?:Human|Assistant|User|AI|Bot|Q|A|Question|Answer|Response):\s|.*\s", re.DOTALL)


def _split_transcript(text: str, name: str) -> tuple[Messages, Messages, set[str]]:
    """Return the turns before the last answer, the answer, and notes on what was changed."""
    if not is_dialogue(text):
        raise Refused(f"wrong type: {name} is plain text, wanted a Human:/Assistant: transcript")
    *before, last = turns_of(text)
    if last["role"] != "assistant":
        raise Refused(f"wrong type: {name} is a transcript that ends with Human:, wanted Assistant: at the end")
    if not last["content"]:
        raise Refused(f"empty text: {name}")
    prompt = tidied(before)
    notes = {JOINED} if len(prompt) != len(before) else set()
    return prompt, [last], notes | notes_of_answer(text, last["content"])


def hh_rlhf(row: Row, options: Options) -> Pair:
    """Read two transcripts that differ in the last Assistant turn; what comes before it is the prompt."""
    prompt, chosen, notes = _split_transcript(required_text(row, "chosen"), "chosen")
    other, rejected, others = _split_transcript(required_text(row, "rejected"), "rejected")
    if not say_the_same(prompt, other):
        raise Refused("prompts differ")
    if not prompt:
        raise Refused("empty text: prompt")
    return Pair(prompt, chosen, rejected, used=SIDES, notes=tuple(sorted(notes | others)))


def trl_implicit(row: Row, options: Options) -> Pair:
    """Read `chosen` and `rejected` that begin with the prompt: the messages before the assistant's last ones, or the
    common beginning of two texts."""
    values = {name: required(row, name) for name in ("chosen", "rejected")}
    if any(isinstance(value, str) and is_dialogue(value) for value in values.values()):
        return hh_rlhf(row, options)
    sides = {name: said(value, name) for name, value in values.items()}
    chosen, rejected = sides.values()
    if isinstance(chosen, str) or isinstance(rejected, str):
        if isinstance(chosen, str) and isinstance(rejected, str):
            return _common_beginning(chosen, rejected)
        kinds = [type_name(side) for side in sides.values()]
        raise Refused(f"wrong type: rejected is {kinds[1]}, wanted {kinds[0]} as in chosen")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise Refused(f"empty text: {name}")
        if messages[-1]["role"] != "assistant":
            raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    return _common_messages(chosen, rejected)


def _common_messages(chosen: Messages, rejected: Messages) -> Pair:
    """Take the messages that both sides begin with for the prompt; what follows is the assistant's, or its tools'."""
    cut = min(same_beginning(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    behind = {message["role"] for side in (chosen, rejected) for message in side[cut:]}
    if not behind <= {"assistant", "tool"}:
        raise Refused("prompts differ")
    if cut == 0:
        raise Refused("empty text: prompt")
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:], used=SIDES)


def _common_beginning(chosen: str, rejected: str) -> Pair:
    differ = (i for i, (one, two) in enumerate(zip(chosen, rejected, strict=False)) if one != two)
    same = next(differ, min(len(chosen), len(rejected)))
    shared = _BOUNDARY.match(chosen, 0, same)
    cut = shared.end() if shared else 0
    sides = [text[cut:] for text in (chosen, rejected)]
    for name, text in zip(("prompt", "chosen", "rejected"), (chosen[:cut], *sides), strict=True):
        if not text.strip():
            raise Refused(f"empty text: {name}")
    left, right = ([{"role": "assistant", "content": text}] for text in sides)
    return Pair([{"role": "user", "content": chosen[:cut].rstrip()}], left, right, used=SIDES)


def skywork(row: Row, options: Options) -> Pair:
    """Read two message lists and the `source` they came from, which becomes a label."""
    pair = trl_implicit(row, options)
    source = row.get("source")
    labels = {"source": as_text(source)} if source is not None else {}
    return pair._replace(labels=labels, used=pair.used | {"source"})


def ultrafeedback(row: Row, options: Options) -> Pair:
    """Read canonical with two scores; equal scores are no preference."""
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
    return pair._replace(used=pair.used | repeats)


def _in_column(name: str, column: str, told: str) -> PreferenceFormat:
    """Declare a format whose prompt stands in a column of another name."""

    def read(row: Row, options: Options) -> Pair:
        return prompted_by(column, row)

    return PreferenceFormat(name, (column, "chosen", "rejected"), told, read)


def _has_transcript(row: Row) -> bool:
    return any(isinstance(row[side], str) and is_dialogue(row[side]) for side in SIDES)


def _has_messages(row: Row) -> bool:
    return any(isinstance(row[side], list | dict) for side in SIDES)


def _tells_the_prompt(row: Row) -> bool:
    """Return whether both sides are dialogues with more than the assistant's answer."""
    for side in SIDES:
        if not holds_messages(row[side]):
            return False
        try:
            messages = said(row[side], side)
        except Refused:
            continue
        if not isinstance(messages, str) and {message["role"] for message in messages} <= {"assistant"}:
            return False
    return True


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
    "skywork",
    ("chosen", "rejected", "source"),
    "chosen, rejected as messages, source",
    skywork,
    holds=lambda row: _has_messages(row) and _tells_the_prompt(row),
)
TRL_IMPLICIT = PreferenceFormat(
    "trl_implicit",
    ("chosen", "rejected"),
    "chosen, rejected as messages that begin with the prompt; by name also two plain texts that do",
    trl_implicit,
    holds=_tells_the_prompt,
)
ALPACA = _in_column("alpaca", "instruction", "instruction, input and history where there are some, chosen, rejected")
QUESTION = _in_column("question", "question", "question, chosen, rejected, as Intel's orca_dpo_pairs has them")
QUERY = _in_column("query", "query", "query, chosen, rejected")
MESSAGES = _in_column("messages", "messages", "messages, chosen, rejected, as Capybara's have them")
SHAREGPT = _in_column("sharegpt", "conversations", "conversations, chosen, rejected with from and value")
CONVERSATION = _in_column("conversation", "conversation", "conversation, chosen, rejected")
HISTORY = _in_column("history", "history", "history, chosen, rejected")
CONTEXT = _in_column("context", "context", "context, chosen, rejected")
INPUT = _in_column("input", "input", "input, chosen, rejected, as Argilla's and distilabel's have them")
