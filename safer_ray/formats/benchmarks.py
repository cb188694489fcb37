"""Evaluation sets: RewardBench 1 and 2, RM-Bench, HHH alignment, LLMBar.

RewardBench and RM-Bench are known by the names of their subsets and their own ids, since other data sets have columns
of these names, too. HHH and LLMBar merely name their columns otherwise. A row of RewardBench 2 or RM-Bench holds
several responses; it is cut into pairs whose ids end in the places of their two responses, `…/I-J`. Sections are named
`rewardbench/SUBSET`, `rewardbench2/SUBSET`, `rm_bench/DOMAIN`; their arithmetic is in `safer_ray.data.benchmarks`.
"""

from collections.abc import Callable, Collection
from typing import Any

from safer_ray.formats.canonical import canonical
from safer_ray.formats.declaration import (
    Options,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
    check_count,
    digest,
    identity,
)
from safer_ray.schema import to_json

REWARDBENCH_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "math-prm": 984,  # 447 pairs, weighted as much as all of code
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "hep-cpp": 164,
    "hep-go": 164,
    "hep-java": 164,
    "hep-js": 164,
    "hep-python": 164,
    "hep-rust": 164,
}
RM_BENCH_DOMAINS = {
    "Chat": ("chat",),
    "Code": ("code",),
    "Math": ("math",),
    "Safety": ("safety-refuse", "safety-response"),
}
RM_BENCH_SUBSETS = tuple(name for names in RM_BENCH_DOMAINS.values() for name in names)
TIES = "Ties"
REWARDBENCH2_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)


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
    """Return a row with its sides and its section; its id is its own within the section, else its content's."""
    key, name = identity(row)
    if key is None:
        name, key = "id", digest(to_json([row.get("prompt"), row.get("chosen"), row.get("rejected")]))[:16]
    return {**row, str(name): f"{section}/{key}{place}", "chosen": chosen, "rejected": rejected, "section": section}


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
        raise Refused(f"unknown label: label is {as_text(row.get('label'))}, wanted 1 or 2 for the better one")
    places = {"prompt": "input", "chosen": f"output_{int(label)}", "rejected": f"output_{3 - int(label)}"}
    kept = {name: value for name, value in row.items() if name not in (*places.values(), "label")}
    return [kept | {name: row.get(place) for name, place in places.items()}]


def _is_known(column: str, names: Collection[str]) -> Callable[[Row], bool]:
    """Return a test of whether a row is of one of the known subsets, with an id."""
    return lambda row: isinstance(row[column], str) and row[column] in names and identity(row)[0] is not None


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
    ordered=True,
)
HHH = PreferenceFormat("hhh", ("input", "targets"), "input, targets with choices and labels", canonical, hhh)
REWARDBENCH = PreferenceFormat(
    "rewardbench",
    ("prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"),
    "id, prompt, chosen, rejected, their models, subset (one of its own)",
    canonical,
    rewardbench,
    holds=_is_known("subset", REWARDBENCH_COUNTS),
)
REWARDBENCH2 = PreferenceFormat(
    "rewardbench2",
    ("prompt", "chosen", "rejected", "subset"),
    "id, prompt, chosen and rejected as lists, subset (one of its own)",
    canonical,
    rewardbench2,
    holds=lambda row: _has_lists(row) and _is_known("subset", REWARDBENCH2_SUBSETS)(row),
    several=True,
)
RM_BENCH = PreferenceFormat(
    "rm_bench",
    ("prompt", "chosen", "rejected", "domain"),
    "id, prompt, chosen and rejected as lists of three, domain (one of its own)",
    canonical,
    rm_bench,
    holds=lambda row: _has_lists(row) and _is_known("domain", RM_BENCH_SUBSETS)(row),
    several=True,
)
