"""Formats of one response a row, which become pairs where rows of one prompt differ in their label.

They were not made as pairs: what a pair of them says is that its two responses have different labels, no more.
"""

from safer_ray.formats.canonical import canonical
from safer_ray.formats.declaration import Half, PreferenceFormat, Refused, Row, as_number, as_text

PAIRS = ("one", "all")  # pairs of a prompt: its first two responses of different labels, or all that differ


def kto(row: Row) -> Half:
    """Read KTO's rows: a `completion` that is desirable (`label` true) or not."""
    label = row.get("label")
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):
        label = label.strip().lower() == "true"  # CSV
    if label not in (True, False):
        raise Refused(f"no preference: label is {as_text(row.get('label'))}")
    return Half(row.get("prompt"), "chosen" if label else "rejected", row.get("completion"), {})


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
    labels = {name: as_text(row[name]) for name in names if row.get(name) is not None}
    labels["response_harm_label"] = as_text(row.get("response_harm_label"))
    return Half(row.get("prompt"), "chosen" if good else "rejected", row.get("response"), labels)


def _is_label(row: Row) -> bool:
    label = row["label"]
    text = isinstance(label, str) and label.strip().lower() in ("true", "false")
    return isinstance(label, bool) or text or as_number(label) in (0, 1)


KTO = PreferenceFormat(
    "kto",
    ("prompt", "completion", "label"),
    "prompt, completion, label true or false; rows of one prompt are matched",
    canonical,
    holds=_is_label,
    match=kto,
    several=True,
    options={"pairs": PAIRS},
)
WILDGUARDMIX = PreferenceFormat(
    "wildguardmix",
    ("prompt", "response", "prompt_harm_label", "response_refusal_label"),
    "prompt, response, prompt_harm_label, response_refusal_label; rows of one prompt are matched",
    canonical,
    match=wildguardmix,
    several=True,
    options={"pairs": PAIRS},
)
