"""The one place where a sentence is cut: from the character where it ends to its stretch of a message of the pair.

A sentence ends where a feature is read: behind a run of punctuation inside a message's content, or at the end of a
response without one. It begins behind the run before it, or where the content begins. Markup of a
template, role labels included, is never part of it.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

from safer_ray.config.reading import SentenceEnds
from safer_ray.reward.sentence_ends import sentence_ends
from safer_ray.reward.templates import Rendered, Span
from safer_ray.reward.text import PairTokenizer

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
        self._rendered = tokenizer.render(prompt, response)
        self._contents = [message["content"] for message in (*prompt, *response)]
        self._messages_of_prompt = len(prompt)
        self._begins = [span.start for span in self._rendered.spans]
        self._rule = tokenizer.ends
        self._ends: list[int] = sentence_ends([self._rendered], self._rule)[1].tolist()

    def ending_at(self, end: int) -> Sentence | None:
        """Return the sentence that ends at character `end`; None where `end` is -1, unknown, or no message holds it.

        Behind the last character of a content the sentence is its last one.
        """
        number = bisect_left(self._begins, end) - 1  # the last content that begins before the end
        if end < 0 or number < 0:
            return None
        span = self._rendered.spans[number]
        stop = min(span.stop, end)
        before = bisect_left(self._ends, stop) - 1  # the last end before this one
        start = max(span.start, self._ends[before]) if before >= 0 else span.start
        return self._stripped(span, start, stop)

    def _stripped(self, span: Span, start: int, stop: int) -> Sentence | None:
        """The stretch of a message that a stretch of the rendered text is, without the whitespace around it; the last
        sentence of the message where the template rewrote it; None where it says nothing."""
        said = self._rendered.text[start:stop]
        text = said.strip()
        if not text:
            return None
        start += len(said) - len(said.lstrip())
        content = self._contents[span.message]
        place = start - span.start + span.shift if span.shift is not None else content.find(text)
        if place < 0:
            place, text = _last_sentence(content, self._rule)
        in_response = span.message >= self._messages_of_prompt
        number = span.message - (self._messages_of_prompt if in_response else 0)
        stop = place + len(text)
        return Sentence("response" if in_response else "prompt", number, place, stop, content[place:stop])

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


def _last_sentence(content: str, rule: SentenceEnds) -> tuple[int, str]:
    """Return where the last sentence of a content begins, and its text."""
    said = content.strip()
    first = content.index(said)
    ends = sentence_ends([Rendered(content, (Span(first, first + len(said), 0, first),))], rule)[1].tolist()
    start = max([first, *(end for end in ends if end < first + len(said))])
    text = content[start : first + len(said)]
    return start + len(text) - len(text.lstrip()), text.strip()


def _last(text: str, characters: int) -> str:
    return text[max(0, len(text) - characters) :]
