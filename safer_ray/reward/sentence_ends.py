"""Where sentences end in the texts of a pair: by the published list of ASCII punctuation, or in every script."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import regex

from safer_ray.config.reading import ASCII_ENDS, EVERY_SCRIPT, SentenceEnds
from safer_ray.reward.templates import Rendered

SENTENCE_END = re.compile(r"[.,?!;\n](?:[.,?!;\s]*[.,?!;\n])?")  # [.,?!;\n]+(\s+[.,?!;\n]+)* without a stack
BETWEEN = "\ue000"  # two texts, no run goes across
UNSPACED = 80  # characters; scripts without spaces between words and marks behind sentences get an end this often

_MARKS = r".,?!;[\P{ASCII}&&\p{Terminal_Punctuation}]"
_END_OF_ANY_SCRIPT = regex.compile(rf"[{_MARKS}\n](?:[{_MARKS}\s]*[{_MARKS}\n])?", regex.V1)
_SCRIPTS = "".join(rf"\p{{scx={name}}}" for name in ("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Hani", "Hira", "Kana"))
_SPACE = regex.compile(  # behind a letter of a script without spaces between words, with more text after it
    rf"[\p{{Line_Break=Complex_Context}}{_SCRIPTS}](?=[^\S\n]+[^\s{_MARKS}])", regex.V1
)


def sentence_ends(texts: Sequence[Rendered], rule: SentenceEnds = EVERY_SCRIPT) -> tuple[np.ndarray, np.ndarray]:
    """Return where sentences end inside the content spans of texts: the number of the text, rising, and the character
    offset in it one past the sentence.

    `ascii` is behind each run of `[.,?!;\\n]`. `every_script` adds the characters of Unicode's Terminal_Punctuation
    beyond ASCII; and in scripts that put no spaces between words (Thai, Lao, Khmer, Burmese, Tibetan, Chinese,
    Japanese), a stretch without an end has one before each space that is `UNSPACED` characters or more behind the last.
    A stretch without a space has none. In a text of ASCII both are the same.
    """
    spans = [(number, span[0], span[1]) for number, rendered in enumerate(texts) for span in rendered.spans]
    number, start, _ = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    contents = [texts[n].text[a:b] for n, a, b in spans]
    published = [i for i, content in enumerate(contents) if rule == ASCII_ENDS or content.isascii()]
    beyond = sorted(set(range(len(contents))) - set(published))
    found = [_swept(contents, published, _published), _swept(contents, beyond, _of_every_script)]
    span, end = (np.concatenate(values) for values in zip(*found, strict=True))
    order = np.lexsort((end, span)) if beyond else slice(None)
    return number[span[order]], (start[span] + end)[order]


def _swept(
    contents: Sequence[str], numbers: Sequence[int], find: Callable[[str, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends in some of the contents, found in one sweep over all of these: whose, and one past which of its
    characters."""
    length = np.array([len(contents[i]) + 1 for i in numbers], dtype=np.int64)
    at = np.cumsum(length) - length  # of each in `joined`
    ends = find(BETWEEN.join(contents[i] for i in numbers), at)
    which = np.searchsorted(at, ends - 1, side="right") - 1
    return np.array(numbers, dtype=np.int64)[which], ends - at[which]


def _published(joined: str, at: np.ndarray) -> np.ndarray:
    return np.fromiter((match.end() for match in SENTENCE_END.finditer(joined)), dtype=np.int64)


def _of_every_script(joined: str, at: np.ndarray) -> np.ndarray:
    marks = np.fromiter((match.end() for match in _END_OF_ANY_SCRIPT.finditer(joined)), dtype=np.int64)
    bounds = np.unique(np.concatenate([at, marks, [len(joined)]]))
    long = np.flatnonzero(np.diff(bounds) > UNSPACED)
    spaces = [_spaces(joined, int(bounds[i]), int(bounds[i + 1])) for i in long]
    return np.unique(np.concatenate([marks, *spaces])).astype(np.int64)


def _spaces(joined: str, start: int, stop: int) -> np.ndarray:
    """Return where a stretch without a mark ends for its length."""
    ends, last = [], start
    for match in _SPACE.finditer(joined, start, stop):
        if match.end() - last >= UNSPACED:
            last = match.end()
            ends.append(last)
    return np.array(ends, dtype=np.int64)
