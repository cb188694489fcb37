"""The one place where a sentence is cut: from the character where it ends to its stretch of a message of the pair.

A sentence ends where a feature is read: behind a run of punctuation inside a message's content, or at the end of a
response without one. It begins behind the run before it, or where the content begins. Markup of a
template, role labels included, is never part of it.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safer_ray.reward.text import PairTokenizer, Rendered, sentence_ends

APART = "\n\n"  # between messages, where several are shown as one text


class Sentence(NamedTuple):
    """A stretch of a message: `text` is `content[start:stop]`, without the whitespace around it."""

    part: str  # prompt or response
    message: int  # of the prompt, or of the response
    start: int
    stop: int
    text: str


class SideSentences:
    """The sentences of one side of a pair, prompt and response, by the character where they end in the text as the
    model reads it (`PairTokenizer.rendered_side`)."""

    def __init__(self, tokenizer: PairTokenizer, pair: Mapping[str, Any], side: str) -> None:
        prompt, response = pair["prompt"] or [], pair[side]
        head, tail = tokenizer.render(prompt, response)
        self._contents = [message["content"] for message in (*prompt, *response)]
        self._messages_of_prompt = len(prompt)
        self._length_of_prompt = len(head.text)
        self._prompt = _Part("prompt", head, prompt)
        self._response = _Part("response", tail, response)

    def ending_at(self, end: int) -> Sentence | None:
        """Return the sentence that ends at character `end`; None where `end` is -1, unknown, or no message holds it.

        Behind the last character of a content the sentence is its last one.
        """
        if end < 0:
            return None
        if end <= self._length_of_prompt:
            return self._prompt.ending_at(end)
        return self._response.ending_at(end - self._length_of_prompt)

    def around(self, sentence: Sentence, characters: int) -> tuple[str, str]:
        """Return up to so many characters of what the messages say before a sentence, and after it."""
        number = sentence.message + (self._messages_of_prompt if sentence.part == "response" else 0)
        content = self._contents[number]
        before = content[max(0, sentence.start - characters) : sentence.start]
        after = content[sentence.stop : sentence.stop + characters]
        earlier, later = number - 1, number + 1
        while len(before) < characters and earlier >= 0:
            before = _last(_last(self._contents[earlier], characters) + APART + before, characters)
            earlier -= 1
        while len(after) < characters and later < len(self._contents):
            after = (after + APART + self._contents[later][:characters])[:characters]
            later += 1
        return before, after


def _last(text: str, characters: int) -> str:
    return text[max(0, len(text) - characters) :]


class _Part:
    """A rendered prompt or response, and the messages that it was rendered from."""

    def __init__(self, name: str, rendered: Rendered, messages: Sequence[Mapping[str, str]]) -> None:
        self.name = name
        self.text = rendered.text
        self.messages = messages
        self.spans = rendered.spans
        self.begins = [start for start, _ in rendered.spans]
        self.ends = sentence_ends([rendered])[1].tolist()
        self.owners = _owners(rendered, messages)

    def ending_at(self, end: int) -> Sentence | None:
        number = bisect_left(self.begins, end) - 1  # the last span that begins before the end
        if number < 0:
            return self._last() if not self.spans and end == len(self.text) else None
        begin, stop = self.spans[number]
        message, shift = self.owners[number]
        stop = min(stop, end)
        before = bisect_left(self.ends, stop) - 1  # the last end before this one
        start = max(begin, self.ends[before]) if before >= 0 else begin
        return self._stripped(message, start - begin + shift, stop - begin + shift)

    def _last(self) -> Sentence | None:
        """The last sentence of the last message: what is read at the end of a text of which the template rewrote every
        content, so that nobody knows where in it they lie."""
        for message in reversed(range(len(self.messages))):
            content = self.messages[message]["content"]
            if said := content.strip():
                start = content.index(said)
                own = Rendered(content, ((start, start + len(said)),))
                ends = [end for end in sentence_ends([own])[1].tolist() if end < start + len(said)]
                return self._stripped(message, max([start, *ends]), start + len(said))
        return None

    def _stripped(self, message: int, start: int, stop: int) -> Sentence | None:
        """A stretch of a message without the whitespace around it; None where it says nothing."""
        said = self.messages[message]["content"][start:stop]
        text = said.strip()
        if not text:
            return None
        start += len(said) - len(said.lstrip())
        return Sentence(self.name, message, start, start + len(text), text)


def _owners(rendered: Rendered, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int]]:
    """Return for each span the message whose content it is, and where in that it begins; templates may leave some
    out."""
    owners, number = [], 0
    for start, stop in rendered.spans:
        said = rendered.text[start:stop]
        while messages[number]["content"].strip() != said:
            number += 1
        owners.append((number, messages[number]["content"].index(said)))
        number += 1
    return owners
