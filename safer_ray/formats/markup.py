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
_STOPS = r"(?:<\|im_end\|>|<\|eot_id\|>|<\|eot\|>|<end_of_turn>|<\|end\|>|<\|endoftext\|>|<\|end_of_text\|>|</s>|<eos>)"
_FAMILIES = (
    _Family(re.compile(r"<\|im_start\|>[ ]?(\w+)(?: name=\S+)?\n"), re.compile(r"<\|im_end\|>")),
    _Family(re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*"), re.compile(r"<\|eo[tm]_id\|>")),
    _Family(re.compile(r"<\|header_start\|>(\w+)<\|header_end\|>\n*"), re.compile(r"<\|eo[tm]\|>")),
    _Family(re.compile(r"<start_of_turn>(\w+)\n"), re.compile(r"<end_of_turn>")),
    _Family(re.compile(r"<\|(user|assistant|system)\|>\n?"), re.compile(r"<\|end\|>|<\|endoftext\|>|</s>")),
)
_LLAMA = re.compile(
    r"\[INST\](?P<user>.*?)\[/INST\](?P<assistant>.*?)(?:</s>\s*(?:<s>)?\s*|(?=\[INST\])|\Z)", re.DOTALL
)
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_TRAILING = re.compile(rf"(?:\s*{_STOPS})+\s*\Z")
_ANYWHERE = re.compile(
    rf"{_STOPS}|<\|im_start\|>|<\|(?:start|end)_header_id\|>|<\|header_(?:start|end)\|>|<start_of_turn>|\[/?INST\]"
    r"|<</?SYS>>|<\|(?:user|assistant|system)\|>|^### (?:Instruction|Response):",
    re.MULTILINE,
)


def unwrapped(text: str) -> Messages | None:
    """Return the messages of a text that begins with a template's markup, without empty ones, or None."""
    if text[:200].lstrip()[:1] not in ("<", "["):
        return None
    start = _BEGIN.match(text).end()  # type: ignore[union-attr]  # it matches the empty text
    if text.startswith("[INST]", start):
        return _of_llama(text[start:])
    for family in _FAMILIES:
        if family.turn.match(text, start):
            return _turns(text[start:], family)
    return None


def _turns(text: str, family: _Family) -> Messages:
    marks = list(family.turn.finditer(text))
    stops = [*(mark.start() for mark in marks[1:]), len(text)]
    messages = []
    for mark, stop in zip(marks, stops, strict=True):
        end = family.end.search(text, mark.end(), stop)
        behind = text[end.end() : stop] if end else ""
        said = text[mark.end() : stop if end is None or _TRAILING.sub("", behind).strip() else end.start()].strip()
        if said:
            messages.append({"role": ROLES.get(mark[1].lower(), mark[1].lower()), "content": said})
    return messages


def _of_llama(text: str) -> Messages | None:
    """Return the messages of Llama 2's and Mistral's form; None where it ends within a turn."""
    messages: Messages = []
    at = 0
    while found := _LLAMA.match(text, at):
        asked, at = found["user"], found.end()
        if system := _SYSTEM.match(asked):
            messages.append({"role": "system", "content": system[1].strip()})
            asked = asked[system.end() :]
        messages += [
            {"role": "user", "content": asked.strip()},
            {"role": "assistant", "content": found["assistant"].strip()},
        ]
        if at == len(text):
            break
    return [message for message in messages if message["content"]] if at == len(text) else None


def without_stops(text: str) -> str:
    """Return a response without the marks behind it at which a model stops."""
    if text[-1:] != ">" and not text[-1:].isspace():
        return text
    return _TRAILING.sub("", text) if text.rstrip().endswith(">") else text


def markup_in(text: str) -> str | None:
    """Return the first mark of a template that a text holds, or None."""
    if "<" not in text and "[" not in text and "#" not in text:
        return None
    if not (  # by far most texts have no part of any mark, which is ten times as fast as the search
        ("<|" in text or "_of_turn>" in text or "INST]" in text or "### " in text)
        or ("SYS>>" in text or "</s>" in text or "<eos>" in text)
    ):
        return None
    found = _ANYWHERE.search(text)
    return found[0] if found else None
