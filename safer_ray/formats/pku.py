"""PKU-SafeRLHF."""

from safer_ray.formats.canonical import has_sides, parse_prompt
from safer_ray.formats.declaration import (
    Options,
    Pair,
    PreferenceFormat,
    Refused,
    Row,
    as_number,
    as_text,
    required_text,
    type_name,
)


def _other(column: str) -> str:
    return "better" if column.startswith("safer") else "safer"


def pku_saferlhf(row: Row, options: Options) -> Pair:
    """Two responses and the number of the safer or the better one; harm categories and severities become labels."""
    prompt, notes = parse_prompt(required_text(row, "prompt"))
    responses = [required_text(row, "response_0"), required_text(row, "response_1")]
    column = f"{options.get('prefer', 'safer')}_response_id"
    if column not in row:
        raise Refused(
            f"missing column: {column}; the other one decides with `prefer: {_other(column)}` (--set prefer=…)"
        )
    number = as_number(row[column])
    if number is None and row[column] not in (None, ""):
        raise Refused(f"wrong type: {column} is {type_name(row[column])}, wanted 0 or 1")
    if number in (None, -1):
        raise Refused(f"no preference: {column} is {as_text(row[column])}")
    if number not in (0, 1):
        raise Refused(f"unknown label: {column} is {as_text(row[column])}, wanted 0 or 1")
    chosen = int(number)
    labels: dict[str, str] = {}
    used = {"prompt", "response_0", "response_1", column}
    for side, i in (("chosen", chosen), ("rejected", 1 - chosen)):
        names = {"safe": f"is_response_{i}_safe", "severity": f"response_{i}_severity_level"}
        labels |= {f"{side}_{key}": as_text(row[name]) for key, name in names.items() if row.get(name) is not None}
        used |= set(names.values())
        for name in (f"response_{i}_harm_category", f"response_{i}_harm_categories"):
            harm = row.get(name)
            kinds = [kind for kind, holds in harm.items() if holds] if isinstance(harm, dict) else harm
            if isinstance(kinds, list):
                used.add(name)
                if kinds:
                    labels[f"{side}_harm"] = ", ".join(as_text(kind) for kind in kinds)
    better, worse = ([{"role": "assistant", "content": responses[i]}] for i in (chosen, 1 - chosen))
    return Pair(prompt, better, worse, labels=labels, used=frozenset(used), notes=tuple(sorted(notes)))


PKU_SAFERLHF = PreferenceFormat(
    "pku_saferlhf",
    ("prompt", "response_0", "response_1"),
    "prompt, response_0, response_1, safer_response_id or better_response_id",
    pku_saferlhf,
    holds=lambda row: bool(row.keys() & {"safer_response_id", "better_response_id"}) and not has_sides(row),
    options={"prefer": ("safer", "better")},
    ordered=True,
)
