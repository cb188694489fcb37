"""Write docs/experiment.md and its figures from results/*.json: `python -m bench.experiment [--check]`.

`--check` writes nothing and ends with 1 where the document is not what the results say.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safer_ray.report.experiment_report import (
    Part,
    Table,
    as_markdown,
    detection_part,
    interval,
    is_real,
    sweep_part,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENT = ROOT / "docs/experiment.md"
IMAGES = ROOT / "docs/images"
TEMPLATE = ROOT / "docs/experiment.template.md"
TITLES = {
    "lab_pku": "Finding swapped labels: PKU-SafeRLHF",
    "lab_harmless": "Finding swapped labels: hh-rlhf harmless",
    "sweep_poison": "Flipping labels on purpose",
    "sweep_denoise": "Dropping suspicious pairs",
    "sweep_denoise20": "Dropping suspicious pairs where a fifth of the labels is swapped",
}


def results() -> dict[str, Any]:
    """By name, those that are there."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def parts(found: dict[str, Any]) -> dict[str, Part]:
    """The sections, by the name of the result that they tell."""
    told = {}
    for name, title in TITLES.items():
        if name not in found:
            continue
        if name.startswith("lab"):
            told[name] = detection_part(name, title, found[name]["uniform"])
        else:
            told[name] = sweep_part(name, title, found[name])
    if "remedies" in found:
        told["remedies"] = remedies_part(found["remedies"])
    return told


def remedies_part(found: dict[str, Any]) -> Part:
    rows: list[tuple[str, ...]] = [(row["remedy"], interval(row["auroc"])) for row in found["rows"]]
    caption = f"AUROC of the same swaps as above, out of fold, {len(found['seeds'])} seeds, 95% intervals over prompts."
    best = max(found["rows"], key=lambda row: row["auroc"][0])
    first = found["rows"][0]["auroc"][0]
    words = [
        f"The judge is what costs: at its default threshold the score has AUROC {first:.3f}, and the best of these "
        f"({best['remedy']}) {best['auroc'][0]:.3f}. A feature that fires on few texts tells few exchanges apart, "
        "however well it tells labels."
    ]
    return Part("What was tried to make the score find more", words, [Table(caption, ("what", "AUROC"), rows)], [])


def goals(found: dict[str, Any]) -> Table:
    """Return what was hoped for before the first run, and what came."""
    rows: list[tuple[str, ...]] = []

    def add(goal: str, value: str, met: bool) -> None:
        rows.append((goal, value, "yes" if met else "no"))

    for name, corpus in (("lab_pku", "PKU"), ("lab_harmless", "hh-rlhf harmless")):
        if name not in found:
            continue
        outside = found[name]["uniform"]["out_of_fold"]
        auroc = outside["detectors"]["combined"]["auroc"]
        if name == "lab_pku":
            add(f"{corpus}: `combined` has AUROC 0.75 or more", interval(auroc), auroc[0] >= 0.75)
        for rival in ("reward_margin", "confident_learning", "tfidf"):
            lead = outside["combined_minus"][rival]["auroc"]
            add(f"{corpus}: `combined` above `{rival}`, interval without zero", interval(lead, "+"), lead[1] > 0)
        for rival in ("random", "length"):
            lead = outside["safer_minus"][rival]["auroc"]
            add(f"{corpus}: `safer` alone above `{rival}` by 0.10", interval(lead, "+"), lead[0] >= 0.10)
    if "sweep_poison" in found:
        _poison_goals(found["sweep_poison"]["rows"], add)
    for name, percent in (("sweep_denoise", 5), ("sweep_denoise20", 20)):
        if name in found:
            _denoise_goal(found[name]["rows"], percent, add)
    return Table("Goals set before the first run.", ("goal", "found", "met"), rows)


def _cell(rows: list[dict[str, Any]], section: str, action: str, strategy: str, percent: float) -> dict[str, Any]:
    wanted = (section, action, strategy, percent)
    return next(r for r in rows if (r["section"], r["action"], r["strategy"], r["percent"]) == wanted)


def _poison_goals(rows: list[dict[str, Any]], add: Any) -> None:
    safer, random = (_cell(rows, "safety", "poison", name, 5.0)["against_clean"] for name in ("safer", "random"))
    shown = f"{100 * safer['change']:+.1f} against {100 * random['change']:+.1f} points"
    twice = safer["change"] <= min(2 * random["change"], 0)
    add("5% flipped by `safer` cost safety twice what random flips cost", shown, twice)
    chat = _cell(rows, "chat", "poison", "safer", 5.0)["against_clean"]
    told = interval([chat[name] for name in ("change", "low", "high")], "+", 100, 1)
    add("and chat at most 1 point", told, chat["change"] >= -0.01)


def _denoise_goal(rows: list[dict[str, Any]], percent: int, add: Any) -> None:
    cost = _cell(rows, "safety", "without_noise", "without_noise", 0.0)["against_clean"]
    gain = _cell(rows, "safety", "drop", "suspicion", float(percent))["against_clean"]
    shown = f"{100 * gain['change']:+.1f} of {100 * cost['change']:+.1f} points"
    real = is_real(cost) and cost["change"] > 0
    half = real and gain["change"] >= cost["change"] / 2
    add(f"dropping {percent}% by the best detector wins back half of what {percent}% swaps cost", shown, half)


def document(found: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The text, and the figures by file name."""
    told = parts(found)
    text = TEMPLATE.read_text(encoding="utf-8")
    summary = as_markdown(Part("Goals", [], [goals(found)], []), "images").split("\n", 2)[2].strip()
    blocks = {name: f"## {title}\n\nNot run yet." for name, title in TITLES.items() if name not in told}
    blocks |= {"goals": summary} | {key: as_markdown(part, "images") for key, part in told.items()}
    for name, block in blocks.items():
        text = text.replace(f"<!-- {name} -->", block.rstrip())
    return text, {f"{figure.name}.svg": figure.svg for part in told.values() for figure in part.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    text, figures = document(results())
    if given.check:
        same = DOCUMENT.read_text(encoding="utf-8") == text
        sys.exit(0 if same else "docs/experiment.md is stale; run python -m bench.experiment")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (IMAGES / name).write_text(svg, encoding="utf-8")
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
