"""Report what Ray tells a driver of its nodes, in our words: which processes were lost, and why."""

import logging
import re
import time

AGAIN_SECONDS = 60.0  # between two messages that differ in numbers and names alone
MOST = 400  # characters of a message that is told as it is
_NO_MEMORY = re.compile(
    r"(\d+) worker\(s\) were killed due to the node running low on memory\."
    r".*?\(IP: ([^,]+), ID: \w+\) was ([^(]+?) \(",
    re.S,
)
_LOST = re.compile(r"A worker died or was killed\b")
_WHICH = re.compile(r"Worker IP address: (\S+).*?Worker PID: (\d+)", re.S)
_HOW = re.compile(r"Worker exit detail: (.+?)(?:\.? Some common causes|$)", re.S)
_AUTOSCALER_ENDED = re.compile(r"The autoscaler failed .*\bTerminated with signal \d+", re.S)
_TRIED_AGAIN = re.compile(r"There are (infinite|\d+) retries remaining")
log = logging.getLogger(__name__)


def in_our_words(message: str) -> str | None:
    """Return what to tell of a message; None where it is one of a call that Ray makes again, or of an autoscaler that
    was told to end."""
    if found := _NO_MEMORY.search(message):
        count, node, used = found.groups()
        return (
            f"Ray killed {count} process(es) on {node}, since its memory ran low ({used}); what they did is done "
            "again. Give it more memory, or fewer processes at once (ray.max_actors, ray.tasks)"
        )
    if _LOST.search(message):
        which, how = _WHICH.search(message), _HOW.search(message)
        where = f" ({which[2]} on {which[1]})" if which else ""
        why = " ".join(how[1].split())[:MOST].rstrip(".") if how else "nobody knows how"
        return f"a process{where} was lost: {why}; what it did is done again"
    if _TRIED_AGAIN.search(message) or _AUTOSCALER_ENDED.search(message):
        return None
    return " ".join(message.split())[:MOST]


class NodeMessages:
    """Tells each message, those alike once a minute."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}

    def __call__(self, message: str) -> None:
        text = in_our_words(message)
        if text is None:
            return
        kind, now = re.sub(r"[\d.]+", "#", text), time.monotonic()
        if now - self.told.get(kind, -AGAIN_SECONDS) >= AGAIN_SECONDS:
            self.told[kind] = now
            log.warning("%s", text)
