"""From messages to tokens: chat rendering, tokenising a pair, truncation, sentence ends."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from safer_ray.errors import UserError

Message = dict[str, str]
SENTENCE_END = re.compile(r"[.,?!;\n](?:[.,?!;\s]*[.,?!;\n])?")  # [.,?!;\n]+(\s+[.,?!;\n]+)* without a stack
BLANK = re.compile("\ue000\\d+\ue001")  # stands for a message's content, to see what is markup
BETWEEN = "\ue000"  # two texts, no run goes across
SEARCHED = 2**28  # characters looked through in vain for the contents of one text, a tenth of a second's work
END_GAP = 5  # tokens before the first end and between two
PLAIN_TURNS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: "}


class Rendered(NamedTuple):
    """A rendered text and the character spans in it that are content, not template markup."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Side(NamedTuple):
    """One response behind its prompt."""

    ids: np.ndarray  # int64, prompt tokens then response tokens
    token: np.ndarray  # int32, indices of sentence ends in `ids`, rising
    end: np.ndarray  # int32, character offsets one past those sentences in the rendered text
    fallback: bool  # the last entry is the response's last content token, since no sentence ends in the response


class PairTokens(NamedTuple):
    pair_id: str
    n_prompt_tokens: int
    truncated: bool
    chosen: Side
    rejected: Side


def both_sides(pairs: Sequence[PairTokens]) -> list[Side]:
    """Chosen, then rejected of each pair in turn."""
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


def _blank(message: Message, number: int) -> Message:
    return {**message, "content": f"\ue000{number}\ue001"}


class _Tokens(NamedTuple):
    ids: np.ndarray
    ends: np.ndarray  # token index of each sentence end
    end_chars: np.ndarray
    last: int  # index of the last content token, -1: none
    last_char: int


def _content_spans(text: str, markup: Sequence[str], contents: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return where the contents lie in a text that alternates markup and contents; whitespace around a content is left
    out.

    Raises:
        UserError: the template rewrites so many contents of a long conversation that looking for them would not end.
    """
    spans, position, searched = [], 0, 0
    for before, content in zip(markup, contents, strict=False):
        if text.startswith(before, position):
            position += len(before)
        said = content.strip()
        start = text.find(said, position)
        if said and start >= 0:
            position = start + len(said)
            spans.append((start, position))
        elif said:
            searched += len(text) - position
            if searched > SEARCHED:
                raise UserError(
                    f"the chat template leaves out or rewrites too many of the {len(contents):,} messages of a text of "
                    f"{len(text):,} characters; set `template: plain`, or cut the conversation"
                )
    return tuple(spans)


def _rendered(text: str, blank: str, messages: Sequence[Message], marked: Sequence[Message]) -> Rendered:
    """A text with its content spans by the same text with a mark in the place of each content; those whose mark the
    template left out are not looked for."""
    shown = set(BLANK.findall(blank))
    contents = [m["content"] for m, mark in zip(messages, marked, strict=True) if mark["content"] in shown]
    return Rendered(text, _content_spans(text, BLANK.split(blank), contents))


def render_chat(tokenizer: Any, prompt: Sequence[Message], response: Sequence[Message]) -> tuple[Rendered, Rendered]:
    """Return prompt and response as the tokenizer's own chat template writes them.

    Raises:
        UserError: the chat template does not put the response behind the prompt.
    """
    head, whole = _chat_texts(tokenizer, prompt, response)
    marked = [_blank(m, i) for i, m in enumerate([*prompt, *response])]
    marked_prompt, marked_response = marked[: len(prompt)], marked[len(prompt) :]
    blank_head, blank_whole = _chat_texts(tokenizer, marked_prompt, marked_response)
    return (
        _rendered(head, blank_head, prompt, marked_prompt),
        _rendered(whole[len(head) :], blank_whole[len(blank_head) :], response, marked_response),
    )


def _chat_texts(tokenizer: Any, prompt: Sequence[Message], response: Sequence[Message]) -> tuple[str, str]:
    """The prompt by the chat template, and prompt with response, which begins with it."""
    apply = tokenizer.apply_chat_template
    whole = str(apply([*prompt, *response], tokenize=False))
    for open_turn in (True, False):
        head = str(apply(list(prompt), tokenize=False, add_generation_prompt=open_turn)) if prompt else ""
        if whole.startswith(head):
            return head, whole
    raise UserError("the chat template rewrites the prompt when a response follows; set `template: plain`")


def render_plain(prompt: Sequence[Message], response: Sequence[Message]) -> tuple[Rendered, Rendered]:
    """Prompt and response as `Human:` and `Assistant:` turns, the prompt ending in an open `Assistant:`."""
    turns = [PLAIN_TURNS.get(m["role"], PLAIN_TURNS["user"]) for m in prompt]
    said = [m["content"] for m in prompt]
    head = "".join(turn + content for turn, content in zip(turns, said, strict=True))
    head += PLAIN_TURNS["assistant"].rstrip() if prompt else ""
    answers = [m["content"] for m in response]
    gaps = [" " * bool(prompt)] + [PLAIN_TURNS["assistant"]] * (len(answers) - 1)
    tail = "".join(gap + answer for gap, answer in zip(gaps, answers, strict=True))
    return Rendered(head, _content_spans(head, turns, said)), Rendered(tail, _content_spans(tail, gaps, answers))


class Template(NamedTuple):
    """A way in which messages become text. A span is a content as it is, without the whitespace around it."""

    render: Callable[[Any, Sequence[Message], Sequence[Message]], tuple[Rendered, Rendered]]  # by a tokenizer
    writes_special_tokens: bool  # else those that the tokenizer puts around a text are added


TEMPLATES = {
    "plain": Template(lambda _tokenizer, prompt, response: render_plain(prompt, response), False),
    "chat": Template(render_chat, True),
}


def sentence_ends(texts: Sequence[Rendered]) -> tuple[np.ndarray, np.ndarray]:
    """Return where runs of sentence-ending punctuation end inside the content spans of texts, found in one sweep over
    all: the number of the text, rising, and the character offset in it one past the run."""
    spans = [(number, a, b) for number, rendered in enumerate(texts) for a, b in rendered.spans]
    number, start, stop = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    joined = BETWEEN.join(texts[n].text[a:b] for n, a, b in spans)
    at = np.cumsum(stop - start + 1) - (stop - start + 1)  # of each span in `joined`
    ends = np.fromiter((match.end() for match in SENTENCE_END.finditer(joined)), dtype=np.int64)
    span = np.searchsorted(at, ends - 1, side="right") - 1
    return number[span], ends - at[span] + start[span]


def thin(indices: np.ndarray) -> np.ndarray:
    """Positions in `indices` of the ends taken: the first at token >= 5, each next at least 5 tokens further on."""
    kept, last = [], 0
    for position, index in enumerate(indices.tolist()):
        if index - last >= END_GAP:
            kept.append(position)
            last = index
    return np.array(kept, dtype=np.int64)


@dataclass(frozen=True)
class PairTokenizer:
    """Renders and tokenises pairs for one model.

    `limit` is the longest sequence; `template` names one of `TEMPLATES`.
    """

    tokenizer: Any
    template: str
    limit: int

    def render(self, prompt: Sequence[Message], response: Sequence[Message]) -> tuple[Rendered, Rendered]:
        """Return prompt and response as the model sees them.

        Raises:
            UserError: the chat template does not put the response behind the prompt.
        """
        return TEMPLATES[self.template].render(self.tokenizer, prompt, response)

    def rendered_side(self, pair: dict[str, Any], side: str) -> str:
        """The whole text of one side, that `end` offsets point into."""
        head, tail = self.render(pair["prompt"] or [], pair[side])
        return head.text + tail.text

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> list[PairTokens]:
        """Tokens of pairs; keys `pair_id`, `prompt`, `chosen`, `rejected` (messages)."""
        rendered = []
        for pair in pairs:
            prompt, chosen = self.render(pair["prompt"] or [], pair["chosen"])
            rendered += [prompt, chosen, self.render(pair["prompt"] or [], pair["rejected"])[1]]
        tokens = self._tokenise(rendered)
        prefix, middle, suffix = self._specials()
        output = []
        for i, pair in enumerate(pairs):
            head, *answers = tokens[3 * i : 3 * i + 3]
            longest = max(len(answer.ids) for answer in answers) + len(suffix)
            room = self.limit - longest - len(prefix) - len(middle)
            cut = max(0, len(head.ids) - max(0, room))
            offset = len(rendered[3 * i].text)
            sides = [self._side(head, cut, answer, offset, prefix, middle, suffix) for answer in answers]
            n_prompt = len(prefix) + len(head.ids) - cut + len(middle)
            output.append(PairTokens(pair["pair_id"], n_prompt, cut > 0 or room < 0, sides[0], sides[1]))
        return output

    def sequences(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
        """Token ids, int64, of plain texts; one that is longer than the limit comes in several pieces."""
        prefix, _, suffix = self._around()
        room = self.limit - len(prefix) - len(suffix)
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [
            [np.array([*prefix, *ids[i : i + room], *suffix], dtype=np.int64) for i in range(0, len(ids), room)]
            for ids in encoded
        ]

    def _specials(self) -> tuple[list[int], list[int], list[int]]:
        """Special tokens before the prompt, between prompt and response, and after the response."""
        return ([], [], []) if TEMPLATES[self.template].writes_special_tokens else self._around()

    def _around(self) -> tuple[list[int], list[int], list[int]]:
        """Special tokens that the tokenizer puts before a text, between two and after them."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
        first = mask.index(0)
        suffix = [token for token, special in zip(ids[first:], mask[first:], strict=True) if special]
        is_encoder = self.tokenizer.cls_token_id is not None and self.tokenizer.sep_token_id is not None
        return ids[:first], suffix if is_encoder else [], suffix

    def _tokenise(self, texts: Sequence[Rendered]) -> list[_Tokens]:
        encoded = self.tokenizer(
            [t.text for t in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        counts = [len(ids) for ids in encoded["input_ids"]]
        first = np.cumsum([0, *counts])  # token of each text, where all follow each other
        base = np.cumsum([0, *(len(t.text) + 1 for t in texts)])  # and its first character
        starts = np.fromiter((a for offsets in encoded["offset_mapping"] for a, _ in offsets), np.int64, first[-1])
        starts += np.repeat(base[:-1], counts)

        def token(text: np.ndarray, end: np.ndarray) -> np.ndarray:
            """That holds the character before `end`; negative where none does."""
            return np.searchsorted(starts, base[text] + end - 1, side="right") - 1 - first[text]

        text, chars = sentence_ends(texts)
        ends = token(text, chars)
        text, chars, ends = (values[ends >= 0] for values in (text, chars, ends))
        cuts = np.searchsorted(text, np.arange(1, len(texts)))
        each_end, each_char = np.split(ends, cuts), np.split(chars, cuts)
        last_char = np.array([t.spans[-1][1] if t.spans else len(t.text) for t in texts], dtype=np.int64)
        last = np.maximum(token(np.arange(len(texts)), last_char), -1)
        return [
            _Tokens(np.array(ids, dtype=np.int64), each_end[i], each_char[i], int(last[i]), int(last_char[i]))
            for i, ids in enumerate(encoded["input_ids"])
        ]

    def _side(
        self,
        prompt: _Tokens,
        cut: int,
        response: _Tokens,
        offset: int,
        prefix: list[int],
        middle: list[int],
        suffix: list[int],
    ) -> Side:
        """One side's sequence: prefix, the prompt without its first `cut` tokens, middle, response, suffix."""
        start = len(prefix) - cut  # of the prompt's first token, were it kept
        n_prompt = start + len(prompt.ids) + len(middle)
        drop = max(0, n_prompt + len(response.ids) + len(suffix) - self.limit)
        ids = np.concatenate([prefix, prompt.ids[cut:], middle, response.ids[drop:], suffix]).astype(np.int64)
        before = prompt.ends >= cut
        after = response.ends >= drop
        token = np.concatenate([prompt.ends[before] + start, response.ends[after] + n_prompt - drop])
        end = np.concatenate([prompt.end_chars[before], response.end_chars[after] + offset])
        kept = thin(token)
        token, end = token[kept], end[kept]
        fallback = not bool((token >= n_prompt).any()) and response.last >= drop
        if fallback:
            token = np.append(token, response.last + n_prompt - drop)
            end = np.append(end, response.last_char + offset)
        return Side(ids, token.astype(np.int32), end.astype(np.int32), fallback)
