"""From pairs to tokens: a side is rendered whole and tokenised once, its sentence ends found, and cut where it is
longer than the model reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from safer_ray.config.reading import EVERY_SCRIPT, SentenceEnds
from safer_ray.errors import UserError
from safer_ray.reward.sentence_ends import sentence_ends
from safer_ray.reward.templates import (
    ChatTemplate,
    Conversation,
    Message,
    Rendered,
    render_pair,
    render_plain,
    render_raw,
)

END_GAP = 5  # tokens before the first end and between two
CHAT = "chat"
RENDERERS = {"plain": render_plain, "pair": render_pair, "raw": render_raw}  # templates that are no chat template
TEMPLATES = (CHAT, *RENDERERS)


class Side(NamedTuple):
    """One response behind its prompt."""

    ids: np.ndarray  # int64, prompt tokens then response tokens
    token: np.ndarray  # int32, indices of sentence ends in `ids`, rising
    end: np.ndarray  # int32, character offsets one past those sentences in the rendered text
    fallback: bool  # the last entry is the response's last content token, since no sentence ends in the response
    n_prompt: int = 0  # tokens before the response's first
    truncated: bool = False  # what is longer than the model reads was cut
    types: np.ndarray | None = None  # int64, token types where a tokenizer of two texts gives them


class PairTokens(NamedTuple):
    pair_id: str
    chosen: Side
    rejected: Side


def both_sides(pairs: Sequence[PairTokens]) -> list[Side]:
    """Chosen, then rejected of each pair in turn."""
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


def thin(indices: np.ndarray) -> np.ndarray:
    """Positions in `indices` of the ends taken: the first at token >= 5, each next at least 5 tokens further on."""
    kept, last = [], 0
    for position, index in enumerate(indices.tolist()):
        if index - last >= END_GAP:
            kept.append(position)
            last = index
    return np.array(kept, dtype=np.int64)


class _Sequence(NamedTuple):
    """A side as the tokenizer gives it."""

    ids: np.ndarray  # int64
    start: (
        np.ndarray
    )  # int64, never falling: each token's first character, of a token without text that of the next one
    stop: np.ndarray  # int64, one past each token's last character; 0 of one without text
    types: np.ndarray | None


@dataclass(frozen=True)
class PairTokenizer:
    """Renders and tokenises pairs for one model.

    `limit` is the longest sequence; `template` names one of `TEMPLATES`, a chat template may be given as `text`.
    """

    tokenizer: Any
    template: str
    limit: int
    arguments: dict[str, Any] = field(default_factory=dict)  # of a chat template
    fold: bool = False  # system messages go before the next user message
    cuts: bool = True  # a side that is too long; else its pair is refused
    text: str | None = None  # a chat template in the place of the tokenizer's own
    ends: SentenceEnds = EVERY_SCRIPT  # the rule by which sentences end

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, checked with its arguments.

        Raises:
            UserError: there is none, or it does not read an argument.
        """
        template = self.tokenizer.chat_template if self.text is None else self.text
        if isinstance(template, dict):  # by name
            template = template["default"]
        return ChatTemplate(self.tokenizer, template, self.arguments, self.fold)

    def render_all(self, conversations: Sequence[Conversation]) -> list[Rendered | str]:
        """Return each conversation as the model reads it, or why it cannot be read."""
        return self.chat.render(conversations) if self.template == CHAT else RENDERERS[self.template](conversations)

    def render(self, prompt: Sequence[Message], response: Sequence[Message]) -> Rendered:
        """Return prompt and response as the model sees them.

        Raises:
            UserError: they cannot be put to it.
        """
        (found,) = self.render_all([Conversation(prompt, response)])
        if isinstance(found, str):
            raise UserError(found)
        return found

    def rendered_side(self, pair: Mapping[str, Any], side: str) -> str:
        """The whole text of one side, that `end` offsets point into."""
        return self.render(pair["prompt"] or [], pair[side]).text

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> list[PairTokens]:
        """Tokens of pairs; keys `pair_id`, `prompt`, `chosen`, `rejected` (messages).

        Raises:
            UserError: a pair cannot be put to the model; it is named.
        """
        found = self.read(pairs)
        for pair, tokens in zip(pairs, found, strict=True):
            if isinstance(tokens, str):
                raise UserError(f"pair {pair['pair_id']!r}: {tokens}")
        return found  # type: ignore[return-value]

    def read(self, pairs: Sequence[Mapping[str, Any]]) -> list[PairTokens | str]:
        """Return the tokens of each pair, or the reason why it cannot be put to the model."""
        conversations = [
            Conversation(pair["prompt"] or [], pair[side]) for pair in pairs for side in ("chosen", "rejected")
        ]
        rendered = self.render_all(conversations)
        found = iter(self._sides([each for each in rendered if not isinstance(each, str)]))
        sides = [each if isinstance(each, str) else next(found) for each in rendered]
        made: list[PairTokens | str] = []
        for number, pair in enumerate(pairs):
            chosen, rejected = sides[2 * number : 2 * number + 2]
            if isinstance(chosen, str) or isinstance(rejected, str):
                made.append(next(each for each in (chosen, rejected) if isinstance(each, str)))
            else:
                made.append(PairTokens(pair["pair_id"], chosen, rejected))
        return made

    def sequences(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
        """Token ids, int64, of plain texts; one that is longer than the limit comes in several pieces."""
        prefix, suffix = self._around
        room = self.limit - len(prefix) - len(suffix)
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [
            [np.array([*prefix, *ids[i : i + room], *suffix], dtype=np.int64) for i in range(0, len(ids), room)]
            for ids in encoded
        ]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and after a text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
        first = mask.index(0)
        return ids[:first], [token for token, added in zip(ids[first:], mask[first:], strict=True) if added]

    def _sides(self, rendered: Sequence[Rendered]) -> list[Side | str]:
        if not rendered:
            return []
        sequences = self._sequences(rendered)
        base = np.cumsum(
            [0, *(len(each.text) + 1 for each in rendered)]
        )  # first character of each, one behind the other
        first = np.cumsum([0, *(len(each.ids) for each in sequences)])  # and its first token
        starts = np.concatenate([each.start + base[i] for i, each in enumerate(sequences)])

        def token(text: np.ndarray, end: np.ndarray) -> np.ndarray:
            """That holds the character before `end`; negative where none does."""
            return np.searchsorted(starts, base[text] + end - 1, side="right") - 1 - first[text]

        text, chars = sentence_ends(rendered, self.ends)
        ends = token(text, chars)
        text, chars, ends = (values[ends >= 0] for values in (text, chars, ends))
        cuts = np.searchsorted(text, np.arange(1, len(rendered)))
        own_ends, own_chars = np.split(ends, cuts), np.split(chars, cuts)
        last_char = np.array([_last_char(each) for each in rendered], dtype=np.int64)
        last = np.maximum(token(np.arange(len(rendered)), last_char), -1)
        return [
            self._side(each, sequences[i], own_ends[i], own_chars[i], int(last[i]), int(last_char[i]))
            for i, each in enumerate(rendered)
        ]

    def _sequences(self, rendered: Sequence[Rendered]) -> list[_Sequence]:
        if self.template == "pair":
            return self._of_two_texts(rendered)
        if self.template == "plain" and is_encoder(self.tokenizer):
            return self._apart(rendered)
        prefix, suffix = ([], []) if self.template == CHAT else self._around
        encoded = self._encode([each.text for each in rendered])
        return [_framed(prefix, [(ids, offsets, 0)], suffix) for ids, offsets in encoded]

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _of_two_texts(self, rendered: Sequence[Rendered]) -> list[_Sequence]:
        """As `tokenizer(prompt, response)` gives them, with the types of tokens where it gives some."""
        texts = [[each.text[: each.border] for each in rendered], [each.text[each.border :] for each in rendered]]
        encoded = self.tokenizer(*texts, return_offsets_mapping=True, verbose=False)
        types = encoded.get("token_type_ids")
        made = []
        for i, each in enumerate(rendered):
            which = [-1 if number is None else number for number in encoded.sequence_ids(i)]
            start, stop = np.array(encoded["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T.copy()
            of_text = np.array(which) >= 0
            start, stop = (values + each.border * (np.array(which) == 1) for values in (start, stop))
            ids = np.array(encoded["input_ids"][i], dtype=np.int64)
            own = None if types is None else np.array(types[i], dtype=np.int64)
            made.append(_Sequence(ids, _never_falling(start, of_text), np.where(of_text, stop, 0), own))
        return made

    def _apart(self, rendered: Sequence[Rendered]) -> list[_Sequence]:
        """Prompt and response as two texts, with the tokenizer's last special token between: what encoders that were
        trained here on turns read."""
        prefix, suffix = self._around
        cuts = [len(each.text[: each.border].rstrip()) for each in rendered]
        heads = self._encode([each.text[:cut] for each, cut in zip(rendered, cuts, strict=True)])
        tails = self._encode([each.text[cut:] for each, cut in zip(rendered, cuts, strict=True)])
        return [
            _framed(prefix, [(*head, 0), (*tail, cut)], suffix)
            for head, tail, cut in zip(heads, tails, cuts, strict=True)
        ]

    def _side(
        self, rendered: Rendered, sequence: _Sequence, ends: np.ndarray, chars: np.ndarray, last: int, last_char: int
    ) -> Side | str:
        """One side, cut where it is too long."""
        length = len(sequence.ids)
        behind = np.flatnonzero(sequence.stop > rendered.border)
        n_prompt = int(behind[0]) if len(behind) else length
        ids, types = sequence.ids, sequence.types
        if length > self.limit:
            if not self.cuts:
                return f"{length:,} tokens, and the model reads {self.limit:,}; set `truncation: cut`, or leave it out"
            kept = kept_tokens(rendered, sequence.start, sequence.stop, n_prompt, self.limit)
            if isinstance(kept, str):
                return kept
            place = np.cumsum(kept) - 1
            ids, types = ids[kept], None if types is None else types[kept]
            there = kept[ends]
            ends, chars = place[ends[there]], chars[there]
            last = int(place[last]) if last >= 0 and kept[last] else -1
            n_prompt = int(kept[:n_prompt].sum())
        taken = thin(ends)
        token, end = ends[taken], chars[taken]
        fallback = not bool((token >= n_prompt).any()) and last >= n_prompt
        if fallback:
            token, end = np.append(token, last), np.append(end, last_char)
        return Side(ids, token.astype(np.int32), end.astype(np.int32), fallback, n_prompt, length > self.limit, types)


def is_encoder(tokenizer: Any) -> bool:
    """Return whether a tokenizer is an encoder's, which begins texts with a token and parts two by another."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def _last_char(rendered: Rendered) -> int:
    """One past the last character of the response's last content; of the whole text where it has none."""
    spans = rendered.spans
    return spans[-1].stop if spans and spans[-1].message >= rendered.n_prompt else len(rendered.text)


def _framed(
    prefix: list[int], texts: Sequence[tuple[list[int], list[tuple[int, int]], int]], suffix: list[int]
) -> _Sequence:
    """Texts between special tokens; between two of them stands what comes behind the last."""
    ids, offsets, shifts = list(prefix), [(0, 0)] * len(prefix), [-1] * len(prefix)
    for number, (own, places, shift) in enumerate(texts):
        ids += [*(suffix if number else []), *own]
        offsets += [*([(0, 0)] * len(suffix) if number else []), *places]
        shifts += [*([-1] * len(suffix) if number else []), *[shift] * len(own)]
    ids += suffix
    offsets += [(0, 0)] * len(suffix)
    shifts += [-1] * len(suffix)
    start, stop = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    by = np.array(shifts, dtype=np.int64)
    of_text = by >= 0
    return _Sequence(
        np.array(ids, dtype=np.int64), _never_falling(start + by, of_text), np.where(of_text, stop + by, 0), None
    )


def _never_falling(start: np.ndarray, of_text: np.ndarray) -> np.ndarray:
    """Starts in which a token without text has that of the next one, so that no character is looked for in it."""
    filled = np.where(of_text, start, np.iinfo(np.int32).max)
    return np.minimum.accumulate(filled[::-1])[::-1]


def kept_tokens(rendered: Rendered, start: np.ndarray, stop: np.ndarray, n_prompt: int, limit: int) -> np.ndarray | str:
    """Return which tokens of a side are kept so that `limit` are left, or why none can be; bool [tokens].

    Markup and special tokens stay, and so do the texts' beginnings: from the prompt's messages go the oldest, then a
    system message, each whole or from its middle; if the last one and the response are still too long, each keeps half
    of the room or as much as it has, and loses its middle.
    """
    owner = np.full(len(start), -1, dtype=np.int64)  # the message that a token is a part of; -1: markup
    for span in rendered.spans:
        owner[(start >= span.start) & (stop <= span.stop) & (stop > start)] = span.message
    excess = len(start) - limit
    kept = np.ones(len(start), dtype=bool)
    if (owner < 0).sum() >= limit:
        return (
            f"the template writes {(owner < 0).sum():,} tokens around the texts of {len(rendered.spans):,} turns, and "
            f"the model reads {limit:,} in all; leave turns out, or raise max_length where the model allows it"
        )
    in_prompt = np.arange(len(start)) < n_prompt
    messages = [span.message for span in rendered.spans]
    prompt = [m for m in messages if (in_prompt & (owner == m)).any() and m < rendered.n_prompt]
    system = [m for m in prompt[:-1] if m in rendered.systems]
    for message in [*(m for m in prompt[:-1] if m not in system), *system]:
        own = np.flatnonzero(owner == message)
        less = min(excess, len(own))
        kept[_middle(own, less)] = False
        excess -= less
    question = np.flatnonzero(owner == prompt[-1]) if prompt else np.empty(0, dtype=np.int64)
    answer = np.flatnonzero(owner >= rendered.n_prompt)
    if excess > 0:
        room = len(question) + len(answer) - excess
        asked = min(len(question), max(room - len(answer), room // 2))
        kept[_middle(question, len(question) - asked)] = False
        kept[_middle(answer, len(answer) - (room - asked))] = False
    return kept


def _middle(tokens: np.ndarray, count: int) -> np.ndarray:
    """So many tokens from the middle."""
    first = (len(tokens) - count + 1) // 2
    return tokens[first : first + count]
