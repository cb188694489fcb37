"""Sentences in texts, whatever whitespace stands between their words; a search costs what the text is long."""

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

SPACES = re.compile(r"\s+")
ROLE_LABEL = re.compile(r"^\s*(?:human|user|assistant|system)\s*:\s*", re.IGNORECASE)


def find_sentence(text: str, sentence: str) -> tuple[int, int] | None:
    """Where a sentence stands in a text, whitespace aside. Sentences cut from the rendered conversation may begin with
    a role label or the end of the turn before, which the bare text lacks."""
    words = sentence.strip().strip("…").split()
    if not words:
        return None
    spaced = _Spaced(text)
    unlabelled, last_line = ROLE_LABEL.sub("", sentence).split(), sentence.strip().splitlines()[-1].split()
    for needle in (words, unlabelled or words, spaced.longest_end(words), last_line):
        if needle and (found := spaced.find(needle)):
            return found
    return None


class _Spaced:
    """A text with one space for each run of whitespace, in which words are found as they follow each other."""

    def __init__(self, text: str) -> None:
        self.text = SPACES.sub(" ", text)
        runs = [match.span() for match in SPACES.finditer(text) if match.end() - match.start() > 1]
        self.shifts = [0, *itertools.accumulate(stop - start - 1 for start, stop in runs)]  # behind so many runs
        self.ends = [stop - shift for (_, stop), shift in zip(runs, self.shifts[1:], strict=True)]

    def find(self, words: Sequence[str]) -> tuple[int, int] | None:
        """Return where the words first stand in the text as it was."""
        said = " ".join(words)
        start = self.text.find(said)
        if start < 0:
            return None
        stop = start + len(said)
        return start + self._shift(start), stop + self._shift(stop)

    def _shift(self, at: int) -> int:
        return self.shifts[bisect_right(self.ends, at)]

    def longest_end(self, words: Sequence[str]) -> Sequence[str]:
        """The longest end of the words, of two at least and without the first, that stands there; empty: none. Every
        end of one that is there is there, too, so that halving finds it."""
        starts = range(1, len(words) - 1)
        first = bisect_left(starts, True, key=lambda start: self.find(words[start:]) is not None)
        return words[starts[first] :] if first < len(starts) else ()
