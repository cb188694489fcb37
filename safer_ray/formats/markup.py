"""The markup that chat templates write around messages, where a data set's texts hold it already.

A text that begins with such markup is a conversation, and is read as its messages: a model puts its own template
around them. Markup elsewhere in a text is left as it is, and noted.
"""

import re
from typing import NamedTuple

from safer_ray.formats.declaration import Messages
from safer_ray.formats.messages import ROLES


class _Family(NamedTuple):
    """The turns of templates that write alike: `turn` opens one and names its role, `end` closes it."""

    turn: re.Pattern[str]
    end: re.Pattern[str]


_BEGIN = re.compile(r"\s*(?:<\|begin_of_text\|>|<bos>|<s>|<\|endoftext\|>)?\s*")
_STOPS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>"),
)
_FAMILIES = (
    _Family(re.compile(r"<\|im_start\|>[ ]?(\w+)(?: name=\S+)?\n"), re.compile(r"<\|im_end\|>")),
    _Family(re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*"), re.compile(r"<\|eo[tm]_id\|>")),
    _Family(re.compile(r"<\|header_start\|>(\w+)<\|header_end\|>\n*"), re.compile(r"<\|eo[tm]\|>")),
    _Family(re.compile(r"<\|start_of_role\|>(\w+)<\|end_of_role\|>"), re.compile(r"<\|end_of_text\|>")),
    _Family(re.compile(r"<start_of_turn>(\w+)\n"), re.compile(r"<end_of_turn>")),
    _Family(re.compile(r"<\|(user|assistant|system)\|>\n?"), re.compile(r"<\|end\|>|<\|endoftext\|>|</s>")),
)
_NEMO = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # between turns of HelpSteer 2, the user's first
_LLAMA = re.compile(
    r"\[INST\](?P<user>.*?)\[/INST\](?P<assistant>.*?)(?:</s>\s*(?:<s>)?\s*|(?=\[INST\])|\Z)", re.DOTALL
)
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_ANYWHERE = re.compile(
    "|".join(map(re.escape, _STOPS))
    + r"|<\|\w+\|>|<\uff5c[\w\u2581]+\uff5c>|<(?:s|bos|BOS_TOKEN|sop|eo[ha]|start_of_turn|extra_id_\d|reserved_\d+)>"
    r"|\[\|\w+\|\]|\[/?(?:INST|SYSTEM_PROMPT)\]|\[gMASK\]|<</?SYS>>"
    r"|^### (?:Instruction|Response|System|Human|User|Assistant):|\bGPT4 Correct (?:User|Assistant):",
    re.MULTILINE,
)
_ANGLED = (  # parts of the marks with a `<`
    *("<|", "_of_turn>", "SYS>>", "</s>", "<eos>", "<\uff5c", "<extra_id_"),
    *("<s>", "<bos>", "<BOS_TOKEN>", "<sop>", "<eoh>", "<eoa>", "<reserved_"),
)
_SQUARE = ("INST]", "[|", "SYSTEM_PROMPT]", "[gMASK]")
# What opens a turn of the user, and behind it one of the assistant, in one line or at the beginning of lines.
_ASKED = re.compile(r"\bUSER: |^(?:User|Human):", re.MULTILINE)
_ANSWERED = re.compile(r"\bASSISTANT:|^(?:Assistant|AI|Bot):", re.MULTILINE)


class Stretch(NamedTuple):
    """Mark what one message says, `text[start:stop]`, without the whitespace around it."""

    role: str
    start: int
    stop: int


def unwrapped(text: str) -> Messages | None:
    """Return the messages of a text that begins with a template's markup, without empty ones, or None."""
    found = stretches(text)
    return None if found is None else [{"role": each.role, "content": text[each.start : each.stop]} for each in found]


def stretches(text: str) -> list[Stretch] | None:
    """Return where the messages that `unwrapped` gives stand in the text."""
    if "<" not in text and "[" not in text:
        return None
    if "<extra_id_1>" in text and (marks := list(_NEMO.finditer(text))):
        stops = [*(mark.start() for mark in marks[1:]), len(text)]
        first = _said("user", text, 0, marks[0].start())
        return first + [
            each
            for mark, stop in zip(marks, stops, strict=True)
            for each in _said(mark[1].lower(), text, mark.end(), stop)
        ]
    if text[:200].lstrip()[:1] not in ("<", "["):
        return None
    start = _BEGIN.match(text).end()  # type: ignore[union-attr]  # it matches the empty text
    if text.startswith("[INST]", start):
        return _of_llama(text, start)
    for family in _FAMILIES:
        if family.turn.match(text, start):
            return _turns(text, start, family)
    return None


def _said(role: str, text: str, start: int, stop: int) -> list[Stretch]:
    """Return the stretch without the whitespace around it; none where there is nothing else."""
    said = text[start:stop]
    lead = start + len(said) - len(said.lstrip())
    return [Stretch(role, lead, lead + len(said.strip()))] if said.strip() else []


def _turns(text: str, start: int, family: _Family) -> list[Stretch]:
    marks = list(family.turn.finditer(text, start))
    stops = [*(mark.start() for mark in marks[1:]), len(text)]
    found = []
    for mark, stop in zip(marks, stops, strict=True):
        end = family.end.search(text, mark.end(), stop)
        behind = text[end.end() : stop] if end else ""
        last = stop if end is None or without_stops(behind).strip() else end.start()
        found += _said(ROLES.get(mark[1].lower(), mark[1].lower()), text, mark.end(), last)
    return found


def _of_llama(text: str, start: int) -> list[Stretch] | None:
    """Return the messages of Llama 2's and Mistral's form; None where it ends within a turn."""
    stretches: list[Stretch] = []
    at = start
    while found := _LLAMA.match(text, at):
        asked, at = found.start("user"), found.end()
        if system := _SYSTEM.match(text, asked, found.end("user")):
            stretches += _said("system", text, *system.span(1))
            asked = system.end()
        stretches += _said("user", text, asked, found.end("user"))
        stretches += _said("assistant", text, *found.span("assistant"))
        if at == len(text):
            break
    return stretches if at == len(text) else None


def unstopped(text: str) -> str:
    """Return a text without the marks behind it at which a model stops, as a whole where it holds other marks: what
    opens a turn is left with what closes it."""
    bare_text = without_stops(text)
    return text if len(bare_text) < len(text) and markup_in(bare_text) is not None else bare_text


def without_stops(text: str) -> str:
    """Return a response without the marks behind it at which a model stops."""
    if text[-1:] != ">" and not text[-1:].isspace():
        return text
    kept, end = len(text), len(text.rstrip())
    while text.endswith(_STOPS, 0, end):  # no search: it must be linear
        end -= next(len(stop) for stop in _STOPS if text.endswith(stop, 0, end))
        while end and text[end - 1].isspace():
            end -= 1
        kept = end
    return text[:kept]


def may_hold_markup(text: str) -> bool:
    """Return whether a text holds a part of any mark; by far most do not, and are known by it in a tenth of the time
    that the search takes: a character is found much faster than a word."""
    return (
        ("<" in text and any(part in text for part in _ANGLED))
        or ("[" in text and any(part in text for part in _SQUARE))
        or ("#" in text and "### " in text)
        or ("4" in text and "GPT4 Correct" in text)
    )


def markup_in(text: str) -> str | None:
    """Return the first mark of a template that a text holds, or None."""
    found = _ANYWHERE.search(text) if may_hold_markup(text) else None
    return found[0] if found else None


def speaker_in(text: str) -> str | None:
    """Return the first name of a speaker that opens a turn in a text where the other's turn follows, or None."""
    if not ("User:" in text or "Human:" in text or "USER: " in text):
        return None
    asked = _ASKED.search(text)
    return asked[0] if asked and _ANSWERED.search(text, asked.end()) else None
