"""From messages to the text that a model reads, and where in it each message lies.

A conversation is rendered whole, as a model's card does. Where its messages lie is found by the same conversation with
a mark in the place of each content: what a template writes between the marks is markup. That depends on the roles
alone for nearly all templates, and is rendered once for each order of roles.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from safer_ray.config.reading import DATE
from safer_ray.errors import UserError
from safer_ray.formats.messages import MORE, SPOKEN, fields_of
from safer_ray.formats.messages import ROLES as ALIASES

Message = dict[str, Any]  # role, content, and `more` where a message has other fields
MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a message's content
TODAY = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
ASKED = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")
NO_DAY = date(2024, 7, 26)  # what templates of Llama 3 take for today where nobody says the date
ROLES = ("system", "user", "assistant", "developer", "tool")
TURNS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: ", "developer": "\n\nSystem: "}
BETWEEN_FOLDED = "\n\n"  # a system message and the user message that it is put before
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversation", "tokenize"}


class Span(NamedTuple):
    """A message's content in a rendered text, without the whitespace around it."""

    start: int
    stop: int
    message: int  # its number, counted over prompt and response
    shift: int | None  # where in the content the span begins; None: the template rewrote it


class Rendered(NamedTuple):
    """One side of a pair as text."""

    text: str
    spans: tuple[Span, ...]
    border: int = 0  # character at which the response's first content begins, behind its markup
    n_prompt: int = 0  # messages of the prompt
    systems: frozenset[int] = frozenset()  # messages of the prompt that are a system's


class Conversation(NamedTuple):
    """The messages of one side."""

    prompt: Sequence[Message]
    response: Sequence[Message]

    @property
    def messages(self) -> list[Message]:
        return [*self.prompt, *self.response]

    @property
    def systems(self) -> frozenset[int]:
        """Numbers of the prompt's messages that are a system's."""
        return frozenset(i for i, message in enumerate(self.prompt) if message["role"] in ("system", "developer"))


class _Markup(NamedTuple):
    """The text that a template writes before, between and behind the contents of messages in one order of roles."""

    pieces: list[str]
    numbers: list[int]  # of the messages that have a content


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of a tokenizer, its arguments and its day fixed."""

    tokenizer: Any
    text: str  # in Jinja
    arguments: dict[str, Any] = field(default_factory=dict)
    fold: bool = False  # a system message goes before the first user message after it

    def __post_init__(self) -> None:
        for name in set(self.arguments) - {DATE}:
            if name in GIVEN or not re.search(rf"\b{re.escape(name)}\b", self.text):
                raise UserError(f"the chat template reads no argument {name!r}; leave it out of template_arguments")
        if DATE in self.arguments and not self.reads_the_day and not re.search(rf"\b{DATE}\b", self.text):
            raise UserError("the chat template reads no date; leave `date` out of template_arguments")
        if "strftime_now" in ASKED.sub("", TODAY.sub("", self.text)):
            raise UserError(
                "the chat template writes today's date by a call of strftime_now that cannot be fixed to one day; "
                "set `template` to a file with a template that writes none"
            )

    @property
    def reads_the_day(self) -> bool:
        """Return whether the template writes the day on which it runs."""
        return TODAY.search(self.text) is not None

    @property
    def day(self) -> date:
        """The day that the template takes for today."""
        return date.fromisoformat(str(self.arguments.get(DATE, NO_DAY)))

    @cached_property
    def _source(self) -> str:
        return TODAY.sub(lambda found: repr(self.day.strftime(found[2])), self.text)

    @cached_property
    def _known(self) -> dict[tuple[str, ...], "_Markup | _Text"]:
        return {}

    def texts(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return conversations as `apply_chat_template` writes them; raises what the template raises."""
        arguments = {name: value for name, value in self.arguments.items() if name != DATE or not self.reads_the_day}
        return self.tokenizer.apply_chat_template(
            [list(messages) for messages in conversations], tokenize=False, chat_template=self._source, **arguments
        )

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | str]:
        """Return conversations with their spans, or why one cannot be read: the template's own words, a message that it
        leaves out, or a role that is not known."""
        found: list[Rendered | str] = [""] * len(conversations)
        written: dict[int, list[Message]] = {}
        for number, conversation in enumerate(conversations):
            messages = [{**fields_of(m), "role": self._role(m["role"])} for m in conversation.messages]
            if reason := unknown_role(messages) or self._unread(messages):
                found[number] = reason
            else:
                written[number] = messages
        texts = self._texts_or_reasons(list(written.values()))
        for (number, messages), text in zip(written.items(), texts, strict=True):
            found[number] = text.text if text.failed else self._with_spans(text.text, messages, conversations[number])
        return found

    def _with_spans(self, text: str, messages: Sequence[Message], conversation: Conversation) -> Rendered | str:
        """A rendered text with its spans by the markup around them; where that cannot be told, by what is said."""
        markup = self._markup(messages)
        if isinstance(markup, _Markup):
            aligned = _aligned(text, markup, conversation)
            if aligned is not None:
                return self._with_border(aligned, messages)
        elif not markup.failed:
            return markup.text
        found = _by_contents(text, conversation)
        return (
            self._with_border(found, messages)
            if found
            else (
                "nobody can tell where its messages lie in what the chat template makes of them, since that depends on "
                "what they say; leave it out, or set `template` to a file with one that writes each as it is"
            )
        )

    def _with_border(self, rendered: Rendered, messages: Sequence[Message]) -> Rendered:
        """The rendered text with the border of a response whose first message has no content: a call of a tool begins
        where the text stops being that of the prompt alone."""
        prompt = messages[: rendered.n_prompt]
        if not prompt or len(prompt) == len(messages) or messages[len(prompt)]["content"].strip():
            return rendered
        (alone,) = self._texts_or_reasons([prompt])
        border = 0 if alone.failed else _shared(rendered.text, 0, alone.text)
        last = max((span.stop for span in rendered.spans if span.message < rendered.n_prompt), default=0)
        return rendered._replace(border=max(border, last))

    def _unread(self, messages: Sequence[Message]) -> str | None:
        """Return which part of what a message says the template does not write, in a line; None where it writes all.

        Of the prompt's messages a template that knows a part may leave it out, as reasoning of earlier turns."""
        parts = [(i, key) for i, message in enumerate(messages) for key in message if key in SPOKEN]
        if not parts:
            return None
        without = [[_less(m, key) if n == i else m for n, m in enumerate(messages)] for i, key in parts]
        whole, *others = self._texts_or_reasons([list(messages), *without])
        for (i, key), other in zip(parts, others, strict=True):
            left_out = other.text == whole.text and not whole.failed
            if left_out and (i == len(messages) - 1 or not re.search(rf"\b{re.escape(key)}\b", self.text)):
                return _unrendered(i, key, "the chat template")
        return None

    def _role(self, role: str) -> str:
        """A role by the name that this template compares roles with: its own, or another one for the same."""
        same = ALIASES.get(role.strip().lower(), role)
        names = [role, same, *(alias for alias, known in ALIASES.items() if known == same)]
        return next((name for name in dict.fromkeys(names) if self._compares(name)), same)

    def _compares(self, role: str) -> bool:
        if role not in self._compared:
            own = f"['\"]{re.escape(role)}['\"]"
            pattern = rf"[=!]=\s*{own}|{own}\s*[=!]=|\bin\s*[\[(][^\])]*{own}|{own}\s*:"
            self._compared[role] = re.search(pattern, self.text) is not None
        return self._compared[role]

    @cached_property
    def _compared(self) -> dict[str, bool]:
        return {}

    def _markup(self, messages: Sequence[Message]) -> "_Markup | _Text":
        if any(len(message) > 2 or not message["content"] for message in messages):
            return self._find_markup(messages)  # what else messages say is written, too: nothing to be used again
        roles = tuple(message["role"] for message in messages)
        if roles not in self._known:
            self._known[roles] = self._find_markup(messages)
        return self._known[roles]

    def _find_markup(self, messages: Sequence[Message]) -> "_Markup | _Text":
        """Return the text that the template writes around messages of such roles, or what is wrong with that. A failed
        text is why it does not take the marks, which says nothing of messages."""
        numbers = [number for number, message in enumerate(messages) if message["content"]]
        marks = [
            {**message, "content": f"\ue000{number}\ue001" if message["content"] else ""}
            for number, message in enumerate(messages)
        ]
        (found,) = self._texts_or_reasons([marks])
        if found.failed:
            return found
        seen = [int(number) for number in MARK.findall(found.text)]
        for number in numbers:
            if seen.count(number) != 1:
                what = "leaves out" if number not in seen else f"writes {seen.count(number)} times"
                role = messages[number]["role"]
                return _Text(f"the chat template {what} message {number + 1} of {len(messages)}, of role {role!r}")
        if seen != sorted(seen):
            return _Text("the chat template puts the messages into another order")
        # The pattern has a group, so that the split gives texts and numbers in turn.
        return _Markup(MARK.split(found.text)[0::2], numbers)

    def _texts_or_reasons(self, conversations: Sequence[Sequence[Message]]) -> list["_Text"]:
        """All in one call, or one by one where the template raises."""
        folded = [_folded(messages) if self.fold else messages for messages in conversations]
        try:
            return [_Text(text) for text in self.texts(folded)] if folded else []
        except Exception as error:  # noqa: BLE001  # a template may raise whatever it likes
            if len(conversations) == 1:
                words = " ".join(str(error).split())[:300] or type(error).__name__
                return [_Text(f"the chat template refuses it: {words}", failed=True)]
        # Not one by one at once: a batch with one refused conversation costs a few calls more, not one each.
        half = len(conversations) // 2
        return self._texts_or_reasons(conversations[:half]) + self._texts_or_reasons(conversations[half:])


class _Text(NamedTuple):
    text: str
    failed: bool = False  # then it is the reason


def unknown_role(messages: Sequence[Message]) -> str | None:
    """Return why a message cannot be put to a model by its role, in a line; None where all can."""
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and role.strip().lower() not in ALIASES:
            wanted = ", ".join(ROLES)
            return f"message {number + 1} has the role {role!r}, which is not known; wanted one of {wanted}"
    return None


def _unrendered(number: int, key: str, what: str) -> str:
    return (
        f"message {number + 1} has {key}, which {what} does not write, so the model would not read it; leave the row "
        "out, or write it into the content as the model reads it"
    )


def _less(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


def _unwritten(messages: Sequence[Message]) -> str | None:
    """Return why messages cannot be written as plain text: what they say beside their content is no text."""
    for number, message in enumerate(messages):
        key = next((name for name in fields_of(message) if name in SPOKEN), None) if message.get(MORE) else None
        if key is not None:
            return _unrendered(number, key, "a model without a chat template")
    return unknown_role(messages)


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System messages put before the next user message; one that none follows stays."""
    made: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            waiting.append(message)
        elif waiting and message["role"] == "user":
            contents = [each["content"] for each in (*waiting, message)]
            made.append({**message, "content": BETWEEN_FOLDED.join(contents)})
            waiting = []
        else:
            made += [*waiting, message]
            waiting = []
    return made + waiting


def _aligned(text: str, markup: _Markup, conversation: Conversation) -> Rendered | None:
    """Find each content in a text by the markup around it, from the left, in time proportional to the text; None where
    that markup is not there."""
    messages = conversation.messages
    pieces, spans, position, border = markup.pieces, [], 0, len(text)
    absent: set[str] = set()  # what does not come any more, and is not looked for again
    for place, number in enumerate(markup.numbers):
        content = messages[number]["content"]
        position += _shared(text, position, pieces[place])
        if number >= len(conversation.prompt) and border == len(text):
            border = position
        last = place == len(markup.numbers) - 1
        stop = _end_of_content(text, position, content, pieces[place + 1], absent, last=last)
        if stop is None:
            return None
        said = text[position:stop]
        start = position + len(said) - len(said.lstrip())
        end = position + len(said.rstrip())
        if start < end:
            spans.append(Span(start, end, number, _shift(text[start:end], content)))
        position = stop
    return Rendered(text, tuple(spans), border, len(conversation.prompt), conversation.systems)


def _by_contents(text: str, conversation: Conversation) -> Rendered | None:
    """Find each content in a text as it is, from the left; None where one is not there."""
    spans, position, border = [], 0, len(text)
    for number, message in enumerate(conversation.messages):
        said = message["content"].strip()
        start = text.find(said, position)
        if start < 0:
            return None
        if number == len(conversation.prompt):
            border = start
        position = start + len(said)
        if said:
            spans.append(Span(start, position, number, message["content"].index(said)))
    return Rendered(text, tuple(spans), border, len(conversation.prompt), conversation.systems)


def _shift(written: str, content: str) -> int | None:
    """Return where in a content what the template writes of it begins: as it is, or letter by letter."""
    shift = content.find(written)
    if shift < 0 and len(written) == len(content.strip()):
        shift = len(content) - len(content.lstrip())
    return shift if shift >= 0 else None


def _shared(text: str, position: int, piece: str) -> int:
    """Return how much of a piece of markup a text has at a position: all of it, unless it depends on a content."""
    if text.startswith(piece, position):
        return len(piece)
    length = 0
    while length < len(piece) and text[position + length : position + length + 1] == piece[length]:
        length += 1
    return length


def _end_of_content(text: str, position: int, content: str, behind: str, absent: set[str], *, last: bool) -> int | None:
    """Return where a content ends: as it is or trimmed, with the markup behind it, or most of it where that depends on
    a later content; else where this markup, or its first line, comes next."""
    best, most = None, 0
    for said in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
        end = position + len(said)
        if not text.startswith(said, position):
            continue
        shared = _shared(text, end, behind)
        if shared == len(behind) and (not last or end + shared == len(text)):
            return end
        if shared > most:
            best, most = end, shared
    if last:
        return len(text) - len(behind) if text.endswith(behind) else len(text)
    if best is not None:
        return best
    for piece in (behind, *behind.splitlines(keepends=True)[:1]):
        found = text.find(piece, position) if piece and piece not in absent else -1
        if found >= 0:
            return found
        absent.add(piece)
    return None


def render_plain(conversations: Sequence[Conversation]) -> list[Rendered | str]:
    """Return conversations as `Human:` and `Assistant:` turns; behind a prompt the response follows `Assistant:`."""
    return [_unwritten(each.messages) or _plainly(each) for each in conversations]


def _plainly(conversation: Conversation) -> Rendered:
    turns = _turns(conversation.prompt)
    first = [TURNS["assistant"] if conversation.prompt else ""] * bool(conversation.response)
    return _joined([*turns, *first, *[TURNS["assistant"]] * (len(conversation.response) - 1)], conversation)


def render_raw(conversations: Sequence[Conversation]) -> list[Rendered | str]:
    """Return contents one behind the other, with nothing between."""
    return [_unwritten(each.messages) or _joined([""] * len(each.messages), each) for each in conversations]


def render_pair(conversations: Sequence[Conversation]) -> list[Rendered | str]:
    """Return prompt and response for `tokenizer(prompt, response)`: a message alone as it is, several as turns."""
    return [_unwritten(each.messages) or _two_texts(each) for each in conversations]


def _two_texts(conversation: Conversation) -> Rendered:
    turns = [""] if len(conversation.prompt) == 1 else _turns(conversation.prompt)
    begin = [turn.lstrip() for turn in turns[:1]]
    return _joined([*begin, *turns[1:], *[""] * len(conversation.response)], conversation)


def _turns(messages: Sequence[Message]) -> list[str]:
    """Return the line that opens the turn of each message."""
    return [TURNS.get(ALIASES.get(m["role"].strip().lower(), m["role"]), TURNS["user"]) for m in messages]


def _joined(before: Sequence[str], conversation: Conversation) -> Rendered:
    """Contents, each behind its markup."""
    made: list[str] = []
    spans, border, length = [], 0, 0
    for number, (markup, message) in enumerate(zip(before, conversation.messages, strict=True)):
        content = message["content"]
        start = length + len(markup)
        if number == len(conversation.prompt):
            border = start
        said = content.strip()
        if said:
            shift = len(content) - len(content.lstrip())
            spans.append(Span(start + shift, start + shift + len(said), number, shift))
        made += [markup, content]
        length = start + len(content)
    text = "".join(made)
    border = border if conversation.response else len(text)
    return Rendered(text, tuple(spans), border, len(conversation.prompt), conversation.systems)
