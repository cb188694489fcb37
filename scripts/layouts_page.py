"""Write docs/layouts.md from the registry of preference formats: `python scripts/layouts_page.py`."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from safer_ray.formats.canonical import PARTS, PROMPTS, SYSTEMS
from safer_ray.formats.messages import ROLES, SPOKEN
from safer_ray.formats.registry import FORMATS, MARGINS, SCORES


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


PAGE = Path(__file__).parents[1] / "docs/layouts.md"
INTRO = f"""# Layouts of preference data

A file's layout is known by its columns: that of most of its first hundred rows. `safer-ray inspect FILE` says which one
was found, which columns are used and which ride along, and why rows would be refused; `--format NAME` (in a config
`format: NAME`) asks for one. Options are given by `--set pairs=all`, in a config by `pairs: all`.

{{table}}

A row is taken for the first layout that it fits. RewardBench and RM-Bench are known by the names of their subsets and
by ids, since other data sets have columns of these names. KTO's and WildGuardMix's rows have one response each; `pairs`
matches rows of one prompt whose labels differ, and says in each pair's label `matched` that it was made so. What the
numbers of HelpSteer 2 and 3, SHP, Nectar and UltraFeedback mean is as their cards and the code around them have it.

## The prompt

Columns that look like the prompt are used, or the row is refused by that column's name where it says what the prompt
does not: {_names(PROMPTS)}; never used, but refused in the same way: {_names(PARTS)}, and columns of messages whose
names tell of dialogues. `carried: [NAME]` hides a column from all readers: it rides along. A row whose prompt is empty
has none where other rows of its file have theirs in that column. An `instruction` is followed
by its `input` in a line of its own, `history` (pairs of turns) comes before. A text in a column
{_names(SYSTEMS)} is the system message. What both responses begin with is the prompt where they are
messages or transcripts; of two plain texts only by `format: trl_implicit`.

## Messages

A text, or a list of `{{role, content}}`; also `{{from, value}}`, one mapping, a mapping of lists, JSON of any of these
as text, and parts of type `text` (joined by newlines; other parts are refused). Roles are named as chat templates name
them; {_names(ROLES)} are known. Template markup at the beginning of a text (ChatML, Llama 2, 3 and 4, Gemma, Zephyr,
Phi, Granite) is unwrapped, elsewhere it is left; both are reported. Other fields of a message are kept in `more` as
JSON, compared, given to the model's chat template, and written back by exports. A model whose template does not write
one of {_names(SPOKEN)} refuses the row.
Several messages of one assistant, and its tools', are one response.

## The rows' own evidence

`label_margin` is the first of {_names(MARGINS)}, or the difference of two numbers of the sides:
{_names(one for one, _ in SCORES)}, each less its other: of a file the first that its
first rows have. Where a layout has a first and a second response, only these differences are read, and what the
layout's own numbers tell. Below 0 it contradicts the label: `inspect`, `pairs` and the
summary of an audit count such rows, `where: label_margin < 0` takes them, and the curation strategy `label_margin`
orders by it. Ties that a layout's own label tells, and equal scores of `ultrafeedback`, are left out with
their reason and do not count as damage of a file; labels that a layout does not know do. Other equal numbers beside
`chosen` and `rejected` leave the label as it is.

This page is written by `python scripts/layouts_page.py`, from `safer_ray/formats`.
"""


def text() -> str:
    """Return the page."""
    rows = ["| format | columns | options |", "|---|---|---|"]
    for known in FORMATS.values():
        options = "; ".join(f"`{name}`: {', '.join(values)}" for name, values in known.options.items())
        told = known.told if known.detected else f"{known.told} (only where it is named)"
        rows.append(f"| `{known.name}` | {told} | {options} |")
    paragraphs = [part if part.startswith("#") else textwrap.fill(part, 120) for part in INTRO.strip().split("\n\n")]
    return "\n\n".join(paragraphs).replace("{table}", "\n".join(rows)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
