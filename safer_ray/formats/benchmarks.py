"""Evaluation sets: RewardBench 1 and 2, RM-Bench, HHH alignment, LLMBar.

HHH and LLMBar merely name their columns otherwise. A row of RewardBench 2 or RM-Bench holds several responses; it is
cut into pairs whose ids end in the places of their two responses, `…/I-J`. Sections are named `rewardbench/SUBSET`,
`rewardbench2/SUBSET`, `rm_bench/DOMAIN`; their arithmetic is in `safer_ray.data.benchmarks`.
"""

from typing import Any

from safer_ray.formats.declaration import (
    Options,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
    canonical,
    check_count,
)
from safer_ray.storage.marks import COLUMN


def _parts(row: Row, count: int | None = None) -> tuple[list[Any], list[Any]]:
    lists = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if not isinstance(value, list) or not value or (count is not None and len(value) != count):
            raise Refused(f"wrong type: {name} is no list of {count or 'several'} responses")
        lists.append(value)
    check_count(len(lists[0]) * len(lists[1]))
    return lists[0], lists[1]


def _name(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise Refused(f"missing column: {column}")
    return value


def _pair(row: Row, section: str, chosen: Any, rejected: Any, place: str = "") -> Row:
    return {
        "id": f"{section}/{as_text(row.get('id'))}{place}",
        "prompt": row.get("prompt"),
        "chosen": chosen,
        "rejected": rejected,
        "section": section,
        **{name: row[name] for name in (COLUMN,) if name in row},
    }


def rewardbench(row: Row, options: Options) -> list[Row]:
    """One pair; its section is its subset."""
    section = f"rewardbench/{_name(row, 'subset')}"
    return [_pair(row, section, row.get("chosen"), row.get("rejected"))]


def rewardbench2(row: Row, options: Options) -> list[Row]:
    """Every correct response with every incorrect one."""
    section = f"rewardbench2/{_name(row, 'subset')}"
    chosen, rejected = _parts(row)
    return [
        _pair(row, section, one, other, f"/{i}-{j}") for i, one in enumerate(chosen) for j, other in enumerate(rejected)
    ]


def rm_bench(row: Row, options: Options) -> list[Row]:
    """Three styles of the chosen with three of the rejected response: concise, detailed, detailed with markdown."""
    section = f"rm_bench/{_name(row, 'domain')}"
    chosen, rejected = _parts(row, 3)
    return [
        _pair(row, section, one, other, f"/{i}-{j}") for i, one in enumerate(chosen) for j, other in enumerate(rejected)
    ]


def hhh(row: Row, options: Options) -> list[Row]:
    """HHH alignment: an `input`, and `targets` of two choices with label 1 for the better one."""
    targets = as_mapping(row.get("targets")) or {}
    choices, labels = targets.get("choices"), targets.get("labels")
    if not isinstance(choices, list) or len(choices) != 2:
        raise Refused("wrong type: targets is no two choices with labels 1 and 0")
    if not isinstance(labels, list) or sorted(map(as_text, labels)) != ["0", "1"]:
        raise Refused("wrong type: targets has no labels 1 and 0")
    better = [as_text(label) for label in labels].index("1")
    sides = {"prompt": row.get("input"), "chosen": choices[better], "rejected": choices[1 - better]}
    return [{name: value for name, value in row.items() if name not in ("input", "targets")} | sides]


def llmbar(row: Row, options: Options) -> list[Row]:
    """LLMBar: an `input`, two outputs, and the number (1 or 2) of the better one."""
    label = as_number(row.get("label"))
    if label not in (1, 2):
        raise Refused(f"no preference: label is {as_text(row.get('label'))}")
    places = {"prompt": "input", "chosen": f"output_{int(label)}", "rejected": f"output_{3 - int(label)}"}
    kept = {name: value for name, value in row.items() if name not in (*places.values(), "label")}
    return [kept | {name: row.get(place) for name, place in places.items()}]


def _has_lists(row: Row) -> bool:
    """Return whether both sides are lists of texts."""
    sides = (row["chosen"], row["rejected"])
    return all(isinstance(side, list) and side and isinstance(side[0], str) for side in sides)


LLMBAR = PreferenceFormat(
    "llmbar",
    ("input", "output_1", "output_2", "label"),
    "input, output_1, output_2, label",
    canonical,
    llmbar,
)
HHH = PreferenceFormat("hhh", ("input", "targets"), "input, targets with choices and labels", canonical, hhh)
REWARDBENCH = PreferenceFormat(
    "rewardbench",
    ("prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"),
    "prompt, chosen, rejected, subset",
    canonical,
    rewardbench,
)
REWARDBENCH2 = PreferenceFormat(
    "rewardbench2",
    ("prompt", "chosen", "rejected", "subset"),
    "prompt, chosen and rejected as lists, subset",
    canonical,
    rewardbench2,
    holds=_has_lists,
    several=True,
)
RM_BENCH = PreferenceFormat(
    "rm_bench",
    ("prompt", "chosen", "rejected", "domain"),
    "prompt, chosen and rejected as lists of three, domain",
    canonical,
    rm_bench,
    holds=_has_lists,
    several=True,
)
