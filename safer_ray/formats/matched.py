"""Formats of one response a row, which become pairs where rows of one prompt differ in their label.

They were not made as pairs: what a pair of them says is that its two responses have different labels, no more.
"""

from collections.abc import Collection
from typing import Literal

from safer_ray.formats.canonical import canonical
from safer_ray.formats.declaration import Half, Options, Pair, PreferenceFormat, Refused, Row, as_number, as_text

Side = Literal["chosen", "rejected"]
KTO_COLUMNS = ("prompt", "completion", "label")
WILDGUARDMIX_COLUMNS = ("prompt", "response", "prompt_harm_label", "response_refusal_label")
MATCHED = "matched"  # the column that names the format of the rows that a pair was matched from
PAIRS = ("one", "all")  # pairs of a prompt: its first two responses of different labels, or all that differ


def kto(row: Row) -> Half:
    """Read KTO's rows: a `completion` that is desirable (`label` true) or not."""
    label = row.get("label")
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):
        label = label.strip().lower() == "true"  # CSV
    if label not in (True, False):
        raise Refused(f"no preference: label is {as_text(row.get('label'))}")
    side: Side = "chosen" if label else "rejected"
    return Half(row.get("prompt"), side, row.get("completion"), {}, frozenset(), _rest(row, KTO_COLUMNS))


def _rest(row: Row, used: Collection[str]) -> Row:
    return {name: value for name, value in row.items() if name not in used}


def wildguardmix(row: Row) -> Half:
    """Read WildGuardMix: of a harmful prompt a refusal is chosen against compliance, of a harmless one the reverse.

    The label `prompt_harm_label` says which (`where: labels.prompt_harm_label == harmful`).
    """
    asked, answered = (
        as_text(row.get(name)).strip().lower() for name in ("prompt_harm_label", "response_refusal_label")
    )
    if asked not in ("harmful", "unharmful") or answered not in ("refusal", "compliance"):
        raise Refused(f"no preference: prompt_harm_label is {asked}, response_refusal_label {answered}")
    good = (asked == "harmful") == (answered == "refusal")
    names = ("prompt_harm_label", "subcategory", "adversarial")
    labels = {name: as_text(row[name]) for name in (*names, "response_harm_label") if row.get(name) is not None}
    rest = _rest(row, (*WILDGUARDMIX_COLUMNS, *names, "response_harm_label"))
    side: Side = "chosen" if good else "rejected"
    return Half(row.get("prompt"), side, row.get("response"), labels, frozenset(names), rest)


def _is_label(row: Row) -> bool:
    label = row["label"]
    text = isinstance(label, str) and label.strip().lower() in ("true", "false")
    return isinstance(label, bool) or text or as_number(label) in (0, 1)


def matched(row: Row, options: Options) -> Pair:
    """Read what `safer_ray.data.matching` writes: canonical, and the format of its two rows, which becomes a label."""
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
    holds=_is_label,
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
