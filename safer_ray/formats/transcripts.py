"""Dialogues written as one text: Human:/Assistant: transcripts."""

import itertools
import re

from safer_ray.formats.declaration import Messages

CUT = "a text that is a Human:/Assistant: transcript is read as its turns"
JOINED = "turns of a transcript are joined where one role has several, and empty ones left out"
BLANKS = "blanks around an answer of a transcript are cut"
_ROLES = {"Human": "user", "Assistant": "assistant"}
_OPENING = re.compile(r"\s*(Human|Assistant):[ \t]*")
# A search for what begins with fixed characters is ten times as fast as one that may begin with others, too.
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]*")
_DOS_TURN = re.compile(r"\r\n\r\n(Human|Assistant):[ \t]*")
_LINE_TURN = re.compile(r"\r?\n(Human|Assistant):[ \t]*")
_ASKS = ("\n\nAssistant:", "\r\n\r\nAssistant:")


def marks_of(text: str) -> list[re.Match[str]]:
    """Return the marks that open the turns of a transcript: behind empty lines; at the beginning of lines where the
    text opens with one and no other comes behind an empty line."""
    first = _OPENING.match(text)
    opening, behind = ([first], first.end()) if first else ([], 0)
    marks = opening + list((_DOS_TURN if "\r\n\r\n" in text else _TURN).finditer(text, behind))
    if len(marks) == 1 and first:
        lines = opening + list(_LINE_TURN.finditer(text, behind))
        return lines if len(lines) > 1 else marks
    return marks


def is_transcript(text: str) -> bool:
    """Return whether a text is a dialogue: it opens with a turn of several, or one behind empty lines, or asks for the
    next one at its end."""
    if _OPENING.match(text):
        return text[:1] in ("\n", "\r") or len(marks_of(text)) > 1
    return "Human:" in text and text.rstrip().endswith(_ASKS) and len(marks_of(text)) > 1


def is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue to its last answer, also behind words of its own: as sides of pairs are."""
    if is_transcript(text):
        return True
    roles = [mark[1] for mark in marks_of(text)] if "Human:" in text else []
    return len(roles) > 1 and roles[0] == "Human" and roles[-1] == "Assistant"


def turns_of(text: str) -> Messages:
    """Return all turns of a transcript, empty ones too; text before the first is a system message."""
    marks = marks_of(text)
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


def read_turns(text: str) -> tuple[Messages, set[str]]:
    """Return the tidied turns of a transcript, and notes on what was done; an empty last turn asks for an answer."""
    turns = turns_of(text)
    messages = tidied(turns)
    asks = not turns[-1]["content"]
    return messages, {CUT} if len(messages) == len(turns) - asks else {CUT, JOINED}


def notes_of_answer(text: str, answer: str) -> set[str]:
    """Return a note where more than the one blank behind the mark was cut from the answer that ends a transcript."""
    whole = text.endswith(answer) and text.endswith((":", ": "), 0, len(text) - len(answer))
    return set() if whole else {BLANKS}
