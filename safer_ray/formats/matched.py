"""Formats of one response a row, which become pairs where rows of one prompt differ in their label.

They were not made as pairs: what a pair of them says is that its two responses have different labels, no more.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from safer_ray.formats.canonical import SIDES, canonical, check_nothing_dropped, with_system
from safer_ray.formats.declaration import Half, Options, Pair, PreferenceFormat, Refused, Row, as_flag, as_text
from safer_ray.formats.notes import markup_notes

Side = Literal["chosen", "rejected"]
KTO_COLUMNS = ("prompt", "completion", "label")
WILDGUARDMIX_COLUMNS = ("prompt", "response", "prompt_harm_label", "response_refusal_label")
UNMATCHED = "unmatched"  # of such a row: why it is no pair
MATCHED = "matched"  # the column that names the format of the rows that a pair was matched from
PAIRS = ("one", "all")  # pairs of a prompt: its first two responses of different labels, or all that differ


def kto(row: Row) -> Half:
    """Read KTO's rows: a `completion` that is desirable (`label` true or 1) or not (false or 0)."""
    if (label := _label(row.get("label"))) is None:
        raise Refused(f"unknown label: label is {as_text(row.get('label'))}, wanted true or false")
    return _half(row, "completion", "chosen" if label else "rejected", KTO_COLUMNS, {}, frozenset())


def _label(value: Any) -> bool | None:
    words = {"desirable": True, "undesirable": False, "good": True, "bad": False, "poor": False}
    return words.get(value.strip().lower(), as_flag(value)) if isinstance(value, str) else as_flag(value)


def _half(
    row: Row, column: str, side: Side, columns: Collection[str], labels: Mapping[str, str], shared: frozenset[str]
) -> Half:
    """Return a row as a side: its prompt with all columns that are a part of it, as in rows of two responses.

    Raises:
        Refused: the prompt or the response says nothing, or a column that looks like the prompt would be dropped.
    """
    sides = {"chosen": row.get(column), "rejected": row.get(column)}
    rest = {name: value for name, value in row.items() if name not in (column, *SIDES)}
    pair = with_system(rest, canonical(rest | sides, {}))
    pair = check_nothing_dropped(rest, pair)
    gone = {*pair.used, *columns, *labels, *(("prompt",) if "prompt" in row else ())}
    others = {name: value for name, value in row.items() if name not in gone}
    notes = (*pair.notes, *markup_notes(rest | sides, pair))
    return Half(pair.prompt, side, pair.chosen, labels, shared, others, notes)


def wildguardmix(row: Row) -> Half:
    """Read WildGuardMix: of a harmful prompt a refusal is chosen against compliance, of a harmless one the reverse.

    The label `prompt_harm_label` says which (`where: labels.prompt_harm_label == harmful`).
    """
    asked, answered = (as_text(row.get(name)).strip().lower() for name in WILDGUARDMIX_COLUMNS[2:])
    if asked not in ("harmful", "unharmful") or answered not in ("refusal", "compliance"):
        raise Refused(f"no preference: prompt_harm_label is {asked}, response_refusal_label {answered}")
    good = (asked == "harmful") == (answered == "refusal")
    names = ("prompt_harm_label", "subcategory", "adversarial")
    labels = {name: as_text(row[name]) for name in (*names, "response_harm_label") if row.get(name) is not None}
    side: Side = "chosen" if good else "rejected"
    return _half(row, "response", side, WILDGUARDMIX_COLUMNS, labels, frozenset(names))


def matched(row: Row, options: Options) -> Pair:
    """Read what `safer_ray.data.matching` writes: canonical, and the format of its two rows, which becomes a label.

    Raises:
        Refused: the row had no partner, or was none of the format's rows.
    """
    if isinstance(reason := row.get(UNMATCHED), str):
        raise Refused(reason)
    pair = canonical(row, options)
    return pair._replace(labels={MATCHED: as_text(row.get(MATCHED))}, used=pair.used | {MATCHED})


MATCHED_ROWS = PreferenceFormat(
    MATCHED,
    ("prompt", "chosen", "rejected", MATCHED),
    "prompt, chosen, rejected, as `pairs` makes of rows of one response",
    matched,
    options={"pairs": PAIRS},
)
KTO = PreferenceFormat(
    "kto",
    KTO_COLUMNS,
    "prompt, completion, label true or false; rows of one prompt are matched",
    matched,
    holds=lambda row: _label(row["label"]) is not None,
    match=kto,
    several=True,
    options={"pairs": PAIRS},
)
WILDGUARDMIX = PreferenceFormat(
    "wildguardmix",
    WILDGUARDMIX_COLUMNS,
    "prompt, response, prompt_harm_label, response_refusal_label; rows of one prompt are matched",
    matched,
    match=wildguardmix,
    several=True,
    options={"pairs": PAIRS},
)
