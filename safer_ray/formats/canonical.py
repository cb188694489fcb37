"""The reading of `prompt`, `chosen` and `rejected`, each text or messages, which every format comes down to."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from safer_ray.formats.declaration import (
    NOTED,
    Messages,
    Options,
    Pair,
    Refused,
    Row,
    as_text,
    parsed_json,
    required,
    type_name,
)
from safer_ray.formats.markup import unstopped, unwrapped, without_stops
from safer_ray.formats.messages import as_messages, looks_like_messages, same_beginning, say_the_same, written_as_json
from safer_ray.formats.transcripts import is_transcript, notes_of_answer, read_turns

PROMPTS = (  # columns that look like the prompt, in the order in which they are taken for it
    *("prompt", "instruction", "question", "query", "messages", "conversations", "conversation"),
    *("history", "context", "input"),
)
_USED = {name: frozenset({name, "chosen", "rejected"}) for name in PROMPTS}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns that models of text do not read
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
PARTS = (  # columns of what is often a part of the prompt, and is never taken for it
    *("document", "documents", "passage", "passages", "chat_history", "user_message", "user_query"),
)
_LOOKS_LIKE_IT = frozenset((*PROMPTS, *MEDIA, *PARTS))
_OF_DIALOGUES = re.compile(r"history|context|conversation|messages|dialog|turns|chat")  # in names of columns
_SYSTEMS = frozenset(SYSTEMS)
SIDES = frozenset({"chosen", "rejected"})
ANSWERS = ("assistant", "tool")  # roles of a response
ANSWERED = "the prompt ended with one of the responses, which was cut"
EMPTY: tuple[Any, ...] = (None, "", [])
NOTHING_SAID = frozenset({"nan", "<noinput>"})  # what stands for no text in columns that may be empty
TURN_BREAK = "\n"  # between an instruction and its input, as LLaMA-Factory joins them


def said(value: Any, name: str) -> Messages | str:
    """Return a value as messages where it holds some, also as JSON or in the markup of a template; else its text."""
    if isinstance(value, str):
        parsed = written_as_json(value, name)
        return (unwrapped(value) or value) if parsed is None else as_messages(parsed, name)
    return as_messages(value, name)


def has_sides(row: Row) -> bool:
    """Return whether a row says itself which response is which, whatever other columns say."""
    return row.keys() >= SIDES


def without_lists(row: Row, names: Collection[str]) -> Row:
    """Return a row with what the one turn of each of its prompt and responses says, where all are lists of turns, also
    as JSON: as Chatbot Arena's tables have them. A list in one of them alone is an answer.

    Raises:
        Refused: one has several turns.
    """
    turns = {name: _turns_in(row.get(name)) for name in names}
    if any(each is None for each in turns.values()):
        return row
    for name, each in turns.items():
        if len(each or ()) != 1:
            raise Refused(f"several turns: {name} has {len(each or ())}, whose answers of two models follow each other")
    return row | {name: each[0] for name, each in turns.items() if each}


def _turns_in(value: Any) -> list[Any] | None:
    """Return a list of turns, also as JSON; None of anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parsed_json(value)
        except Refused:
            return None
    return value if isinstance(value, list) and all(isinstance(turn, str | None) for turn in value) else None


def holds_messages(value: Any) -> bool:
    """Return whether a value is messages or a transcript, in which a prompt can be told from a response."""
    if not isinstance(value, str):
        return isinstance(value, list | dict) and bool(value)
    try:
        return is_transcript(value) or not isinstance(said(value, "text"), str)
    except Refused:
        return True  # begins as messages do


def parse_prompt(value: Any, name: str = "prompt") -> tuple[Messages, set[str]]:
    """Return a prompt as messages, one user message or the turns of a Human:/Assistant: transcript, and notes on it.

    Raises:
        Refused: it says nothing.
    """
    messages = said(value, name)
    notes: set[str] = set()
    if isinstance(messages, str):
        text = unstopped(messages)
        messages = [{"role": "user", "content": text}]
        if is_transcript(text):
            messages, notes = read_turns(text)
    if not messages:
        raise Refused(f"empty text: {name}")
    return messages, notes


class _Side(NamedTuple):
    """The prompt that a side repeats (empty where it does not), its response, and notes on them."""

    lead: Messages
    response: Messages
    notes: set[str]


def _response(value: Any, name: str, prompt: Messages, *, stopped: bool) -> _Side:
    notes: set[str] = set()
    messages = said(value, name)
    if isinstance(messages, str):
        text = unstopped(messages) if stopped else messages
        if not text.strip():
            raise Refused(f"empty text: {name}")
        told = _told(text, prompt, name) if "Assistant:" in text else None
        if told is None:
            return _Side([], [{"role": "assistant", "content": text}], notes)
        messages, notes = told
    if not messages:
        raise Refused(f"empty text: {name}")
    if messages[-1]["role"] != "assistant":
        raise Refused(f"wrong type: {name} ends with {messages[-1]['role']}, wanted assistant")
    repeats = same_beginning(messages, prompt) == len(prompt)
    cut = max((i + 1 for i, message in enumerate(messages) if message["role"] not in ANSWERS), default=0)
    if repeats:
        cut = max(cut, len(prompt))  # the sides may go on before the last answer
    elif cut:
        shorter = min(cut, len(prompt))  # either may lack a system message that the other has
        if not say_the_same(messages[:cut][-shorter:], prompt[-shorter:]):
            raise Refused("prompts differ")
    if cut == len(messages):
        raise Refused(f"empty text: {name}")
    return _Side(messages[:cut], messages[cut:], notes)


def _told(text: str, prompt: Messages, name: str) -> tuple[Messages, set[str]] | None:
    """Return the messages of a response that is a transcript, the assistant's turn alone, or behind the turns of the
    prompt, and notes on them; None where it is an answer that has the form of one."""
    if not is_transcript(text):
        return None
    messages, notes = read_turns(text)
    if not messages or messages[-1]["role"] != "assistant":
        raise Refused(f"empty text: {name}")
    if messages[0]["role"] == "assistant":
        return (messages, notes) if len(messages) == 1 and text[:1] in ("\n", "\r") else None
    same = same_beginning(messages, prompt) == len(prompt) or say_the_same(messages[:-1], prompt[-len(messages) + 1 :])
    return (messages, notes | notes_of_answer(text, messages[-1]["content"])) if same else None


def _stop(value: Any) -> str:
    """Return the marks behind a text at which a model stops."""
    return value[len(without_stops(value)) :].strip() if isinstance(value, str) else ""


def paired(row: Row, prompt: Messages, prompt_text: Any, used: frozenset[str], notes: Collection[str]) -> Pair:
    """Return the pair of a prompt and of the row's `chosen` and `rejected`; sides that repeat the prompt are cut to
    their end, and so are marks at which a model stops where both sides have them, or the prompt is marked up. `notes`
    are those on the prompt.

    Raises:
        Refused: the sides are of different prompts, or one says nothing.
    """
    sides = required(row, "chosen"), required(row, "rejected")
    marked = isinstance(prompt_text, str) and unwrapped(prompt_text) is not None
    stopped = marked or _stop(sides[0]) == _stop(sides[1])
    chosen = _response(sides[0], "chosen", prompt, stopped=stopped)
    rejected = _response(sides[1], "rejected", prompt, stopped=stopped)
    leads = [side.lead for side in (chosen, rejected) if side.lead]
    if len(leads) == 2 and not say_the_same(*leads):
        raise Refused("prompts differ")
    longer = bool(leads) and len(leads[0]) > len(prompt)  # the sides know a system message, or more turns
    if longer and len(leads) == 1:
        raise Refused("prompts differ: one side has messages before its answer that the other has not")
    prompt = leads[0] if longer else prompt
    told = tuple(sorted({*notes, *chosen.notes, *rejected.notes}))
    pair = Pair(prompt, chosen.response, rejected.response, used=used, notes=told)
    if len(prompt) == 1 or prompt[-1]["role"] != "assistant":
        return pair
    if say_the_same(prompt[-1:], pair.chosen) or say_the_same(prompt[-1:], pair.rejected):
        return pair._replace(prompt=prompt[:-1], notes=(*told, ANSWERED))
    return pair


def canonical(row: Row, options: Options) -> Pair:
    """Read `prompt`, `chosen`, `rejected`, each text or messages; where the prompt is empty, the next column that looks
    like one is taken for it."""
    return prompted_by(first_prompt(row) or "prompt", row)


def prompted_by(column: str, row: Row) -> Pair:
    """Read `chosen` and `rejected` with the prompt in a column: behind an `instruction` comes its `input`, before any
    of them what `history` has of earlier turns."""
    value = required(row, column)
    (prompt, notes), used = parse_prompt(value, column), {column}
    if column != "instruction" and "history" not in row:
        return paired(row, prompt, value, _USED[column], notes)
    if column == "instruction" and "input" in row:
        used.add("input")
        if isinstance(text := row["input"], str) and text.strip() in NOTHING_SAID:
            notes = {*notes, _nothing_said("input", text)}
        elif isinstance(text, str) and text.strip():
            content = f"{prompt[-1]['content']}{TURN_BREAK}{text}"
            prompt = [*prompt[:-1], {**prompt[-1], "content": content}]
        elif text not in (None, ""):
            raise Refused(f"wrong type: input is {type_name(text)}, wanted text")
    earlier = row.get("history")
    if column != "history" and (earlier is None or isinstance(earlier, list)) and "history" in row:
        used.add("history")
        prompt = [*_earlier(earlier or []), *prompt]
    return paired(row, prompt, value if len(used) == 1 else None, SIDES | used, notes)


def prompt_column(row: Row) -> str:
    """Return the first column that looks like the prompt.

    Raises:
        Refused: there is none.
    """
    name = first_prompt(row)
    if name is None:
        raise Refused(f"missing column: prompt (or one of {', '.join(PROMPTS[1:])})")
    return name


def first_prompt(row: Row) -> str | None:
    """Return the first column that looks like the prompt and is not empty."""
    for name in PROMPTS:
        if row.get(name) not in EMPTY:
            return name
    return None


def by_any_prompt(row: Row, options: Options) -> Pair:
    """Read `chosen` and `rejected` with the prompt in whichever column looks like it first."""
    return prompted_by(prompt_column(row), row)


def _earlier(history: list[Any]) -> Messages:
    """Return earlier turns: messages, or pairs of what the user and the assistant said."""
    if not history:
        return []
    if all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        roles = ("user", "assistant")
        history = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
    return as_messages(history, "history")


def with_system(row: Row, pair: Pair) -> Pair:
    """Put a system message that a column of its own holds before a prompt that has none.

    Raises:
        Refused: the prompt has another one, or the column is no text.
    """
    if _SYSTEMS.isdisjoint(row):
        return pair
    for name in SYSTEMS:
        value = row.get(name)
        if name in pair.used or value is None or value == "":
            continue
        if isinstance(value, str) and value.strip() in NOTHING_SAID:
            pair = pair._replace(used=pair.used | {name}, notes=(*pair.notes, _nothing_said(name, value)))
            continue
        if not isinstance(value, str):
            raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text of a system message")
        first = pair.prompt[0] if pair.prompt else {"role": ""}
        if first["role"] not in ("system", "developer"):
            pair = pair._replace(prompt=[{"role": "system", "content": value}, *pair.prompt]) if value.strip() else pair
        elif value.strip() not in first["content"]:
            raise Refused(f"two system messages: {name} says other than the prompt's first message")
        pair = pair._replace(used=pair.used | {name})
    return pair


def _nothing_said(name: str, text: str) -> str:
    return f"{name} is {text.strip()!r}, which is read as none"


def check_nothing_dropped(row: Row, pair: Pair) -> Pair:
    """Return the pair, with a note on messages in a column whose name does not say that they are of the prompt.

    Raises:
        Refused: a column that looks like a part of the prompt says what the prompt does not: a text that is none of
            its messages or their lines, messages that are none of the pair's, or an image.
    """
    for name, value in sorted(row.items()):
        if name in pair.used or not (name in _LOOKS_LIKE_IT or _is_dialogue(name, value)):
            continue
        if name not in _LOOKS_LIKE_IT and not _OF_DIALOGUES.search(name.lower()):
            if not _is_told(value, pair):
                pair = pair._replace(notes=(*pair.notes, f"{name} holds messages, and is no part of the prompt"))
            continue
        if value in EMPTY:
            continue
        if name in MEDIA:
            raise Refused(
                f"unread column: {name}; pairs hold text alone; set `carried: [{name}]` (--set carried={name}) where "
                "it is no part of a prompt"
            )
        if name in PARTS and _is_within(value, pair):
            continue
        if not _is_told(value, pair):
            used = next((other for other in PROMPTS if other in pair.used), "chosen and rejected")
            raise Refused(
                f"two prompts: {name} says what the prompt, read from {used}, does not; rename it, or set "
                f"`carried: [{name}]` (--set carried={name}) where it is no part of the prompt"
            )
    return pair


def _is_dialogue(name: str, value: Any) -> bool:
    """Return whether a column of any name holds messages; one that is named by a side is that side's."""
    if not isinstance(value, list | str) or not value or name.startswith(("chosen", "rejected")) or name == NOTED:
        return False
    if isinstance(value, list):
        return looks_like_messages(value)
    try:
        return written_as_json(value, name) is not None
    except Refused:
        return True


def _is_within(value: Any, pair: Pair) -> bool:
    """Return whether each text of several words is within a message of the prompt."""
    texts = [text for item in _texts(value) if len((text := item.strip()).split()) > 1]
    return all(any(text in message["content"] for message in pair.prompt) for text in texts)


def _is_told(value: Any, pair: Pair) -> bool:
    asked = [message["content"] for message in pair.prompt]
    if isinstance(value, str) and isinstance(said(value, "text"), str):
        text = value.strip()
        return not text or any(f"\n{text}\n" in f"\n{content.strip()}\n" for content in asked)
    known = {content.strip() for content in asked}
    known |= {message["content"].strip() for side in (pair.chosen, pair.rejected) for message in side}
    return all(text.strip() in known for text in _texts(value) if text.strip())


def _texts(value: Any) -> Iterator[str]:
    """Yield what a value that looks like a prompt says: a text, the contents of messages, or the parts of others."""
    if isinstance(value, str):
        try:
            messages = said(value, "text")
        except Refused:
            messages = value
        yield from [value] if isinstance(messages, str) else (message["content"] for message in messages)
        return
    if isinstance(value, list) and value and all(isinstance(item, str | list | dict) for item in value):
        try:
            yield from (message["content"] for message in as_messages(value, "text"))
        except Refused:  # turns in another form: pairs, or inputs with outputs
            inner = [list(item.values()) if isinstance(item, dict) else item for item in value]
            flat = [text for item in inner for text in (item if isinstance(item, list) else [item])]
            yield from (as_text(text) for text in flat if text is not None)
        return
    yield as_text(value)
