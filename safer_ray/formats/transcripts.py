"""Dialogues written as one text: Human:/Assistant: transcripts."""

import itertools
import re

from safer_ray.formats.declaration import Messages

_ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")


def is_transcript(text: str) -> bool:
    """Return whether a text is a dialogue: it opens with a turn, or asks for the next one at its end."""
    return bool(TURN.match(text)) or ("\n\nHuman:" in text and text.rstrip().endswith("\n\nAssistant:"))


def turns_of(text: str) -> Messages:
    """Return all turns of a transcript, empty ones too; text before the first is a system message."""
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    lead = text[: marks[0].start()].strip()
    turns = [{"role": "system", "content": lead}] if lead else []
    return turns + [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def tidied(turns: Messages) -> Messages:
    """Return turns without empty ones, and with neighbours of one role joined, so that roles alternate as chat
    templates want."""
    said = [turn for turn in turns if turn["content"]]
    runs = itertools.groupby(said, key=lambda turn: turn["role"])
    return [{"role": role, "content": "\n\n".join(turn["content"] for turn in run)} for role, run in runs]
