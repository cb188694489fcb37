"""What should be known of a pair's texts beyond what they say: notes on what was done to them, or is left in them."""

from itertools import pairwise

from safer_ray.formats.declaration import NOTED, Messages, Pair, Row
from safer_ray.formats.markup import markup_in, may_hold_markup, speaker_in
from safer_ray.formats.messages import MORE, look_the_same

REPEATED = 8  # characters of a prompt that a response would not begin with by chance
TOOLS = "definitions of tools ride along, and no model reads them"
BEGUN = "both responses begin with the prompt"
ALIKE = "the responses differ in whitespace or in the composition of characters alone"
FOLLOWING = "messages of one role follow each other in the prompt; empty ones between them are left out"
CONTINUED = "the prompt ends with words of the assistant, and the responses go on from them"


def notes_of(row: Row, pair: Pair) -> tuple[str, ...]:
    """Return what should be known of a pair: the notes that it and its row carry; definitions of tools; what both
    responses begin with; messages of one role behind each other; and template markup."""
    carried = row.get(NOTED) if NOTED in row else None
    known = (*pair.notes, *map(str, carried)) if isinstance(carried, list) else pair.notes
    notes = tuple(dict.fromkeys((*known, *markup_notes(row, pair))))
    if look_the_same(pair.chosen, pair.rejected):
        notes = (*notes, ALIKE)
    asked = pair.prompt[-1] if pair.prompt else {"role": "", "content": ""}
    if row.get("tools") or row.get("functions"):
        notes = (*notes, TOOLS)
    if len(text := asked["content"]) > REPEATED and _begins(pair.chosen, text) and _begins(pair.rejected, text):
        notes = (*notes, BEGUN)
    if any(_follow(*both) for both in pairwise(pair.prompt)):
        notes = (*notes, FOLLOWING)
    return (*notes, CONTINUED) if asked["role"] == "assistant" else notes


def _follow(one: dict[str, str], other: dict[str, str]) -> bool:
    return one["role"] == other["role"] in ("user", "assistant") and MORE not in one


def _begins(side: Messages, text: str) -> bool:
    return side[0]["content"].startswith(text)


def markup_notes(row: Row, pair: Pair) -> tuple[str, ...]:
    """Return that markup is left in a text, or else that it was unwrapped."""
    contents = [message["content"] for message in (*pair.prompt, *pair.chosen, *pair.rejected)]
    sent = [value for name in pair.used if isinstance(value := row.get(name), str) and value not in contents]
    marked = may_hold_markup("\0".join((*contents, *sent)))
    for text in contents:
        if mark := (marked and markup_in(text)) or speaker_in(text):
            return (f"chat markup left in a text: {' '.join(mark.split())}",)
    if not marked:
        return ()
    marks = sorted(mark for text in sent if (mark := markup_in(text)) is not None)
    return (f"chat markup unwrapped: {' '.join(marks[0].split())}",) if marks else ()
