"""Whether pairs are in the language of the probe that rates features by them."""

import re
from collections import Counter
from collections.abc import Iterable

from safer_ray.features.judge import Probe

WORD = re.compile(r"[^\W\d_]+")
COMMON = 100  # words of the probe that are most frequent
FOREIGN = 0.2  # English pairs have 0.40 to 0.58 of their words among those of the shipped probe, French or German 0.07


def _words(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


def share_of_common_words(probe: Probe, texts: Iterable[str]) -> float | None:
    """Return the share of the words in texts that are among the probe's most frequent ones, in [0, 1]; None where the
    texts hold no word."""
    said = (text for each in probe.exchanges for text in (each.prompt, each.safe, each.unsafe))
    counts = Counter(word for text in said for word in _words(text))
    common = {word for word, _ in counts.most_common(COMMON)}
    found = [word in common for text in texts for word in _words(text)]
    return sum(found) / len(found) if found else None
