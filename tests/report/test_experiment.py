"""Pages say what the numbers say, and no more."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from safer_ray.cli import experiments
from safer_ray.pipeline.sweep import Effect
from safer_ray.report.experiment_report import (
    as_markdown,
    as_page,
    detection_part,
    detection_words,
    sweep_part,
    sweep_words,
)

NAMES = ("combined", "local_probe", "reward_margin", "confident_learning", "tfidf", "safer", "random", "length")


def found(leads, in_sample=True):
    """A detection.json of one kind of errors; `leads` are what `combined` has more AUROC than each rival."""
    auroc = {name: 0.8 - leads[name] for name in NAMES}

    def measures(value):
        shares = {
            name: [0.2, 0.1, 0.3] for name in ("auprc", "precision_at_planted", "recall_1", "recall_2", "recall_10")
        }
        return {"auroc": [value, value - 0.02, value + 0.02], "recall_5": [0.25, 0.2, 0.3], **shares}

    def minus(one):
        differences = {name: auroc[one] - auroc[name] for name in NAMES if name != one}
        return {name: {"auroc": [d, d - 0.01, d + 0.01]} for name, d in differences.items()}

    outside = {
        "detectors": {name: measures(value) for name, value in auroc.items()},
        "combined_minus": minus("combined"),
        "safer_minus": minus("safer"),
        "curve": {"budget": [0, 0.5, 1.0]} | {name: [0, 0.8, 1.0] for name in NAMES},
        "seeds": {name: [value] * 3 for name, value in auroc.items()},
    }
    inside = {"detectors": {name: measures(min(1, value + 0.1)) for name, value in auroc.items()}}
    return {"pairs": 1000, "planted": 50, "out_of_fold": outside, "in_sample": inside if in_sample else None}


LEADS = dict(zip(NAMES, (0, 0.005, 0.05, 0.05, 0.1, 0.2, 0.3, 0.31), strict=True))


def test_a_lead_is_claimed_where_the_interval_excludes_zero():
    text = " ".join(detection_words(found(LEADS)))
    assert "`combined` finds most: AUROC 0.800 [0.780, 0.820]" in text
    assert "finds 25% of the swapped labels, 5.0 times as many as by chance" in text
    assert "leads `reward_margin` by 0.050 [0.040, 0.060], `confident_learning`" in text
    assert "cannot be told from `local_probe`" in text
    assert "+0.100 [+0.090, +0.110] against random" in text
    assert "`reward_margin` 0.850 in sample, 0.750 out of fold" in text


def test_a_detector_that_loses_is_said_to():
    text = " ".join(detection_words(found(LEADS | {"reward_margin": -0.05, "tfidf": 0.0}, in_sample=False)))
    assert "`reward_margin` finds most: AUROC 0.850" in text
    assert "does not lead `reward_margin`, `tfidf`" in text
    assert "leads `confident_learning` by" in text
    assert "in sample" not in text


def cell(action, strategy, percent, change, section="safety", random=None, spread=0.01, p=None):
    """A row of a sweep.json; without a `p` one of old."""

    def told(value):
        known = Effect(0.7 + value, [0.69 + value, 0.71 + value], value, value - spread, value + spread, p)._asdict()
        return known | {"p_holm": p} if p is not None else {k: v for k, v in known.items() if k != "p"}

    row = {"action": action, "strategy": strategy, "percent": percent, "section": section, "n": 500}
    return row | {"against_clean": told(change)} | ({"against_random": told(random)} if random is not None else {})


def sweep(*rows):
    chat = [row | {"section": "chat"} for row in rows]
    return {"seeds": [0, 1], "retraining": "full", "rows": [*rows, *chat]}


POISON = sweep(
    cell("clean", "clean", 0, 0.0),
    cell("poison", "safer", 5.0, -0.08, random=-0.06),
    cell("poison", "random", 5.0, -0.02),
)


def test_flips_are_told_against_chance():
    (text,) = sweep_words(POISON, ["safety"])
    assert text == (
        "5% flipped by `safer`: safety -8.0 [-9.0, -7.0] points; as many random flips: -2.0 [-3.0, -1.0]. "
        "That is 4.0 times the cost of chance: -6.0 [-7.0, -5.0] points against random flips, "
        "beyond the noise."
    )


def test_what_is_noise_is_said_by_the_p_of_all_changes_together():
    """And not by each interval, of which one in twenty excludes zero by chance."""
    rows = [
        cell("clean", "clean", 0, 0.0, p=1.0),
        cell("without_noise", "without_noise", 0, 0.04, p=0.06),
        cell("drop", "suspicion", 5.0, 0.03, random=0.03, p=0.02),
    ]
    told = sweep(*rows) | {"drawn": "prompts and seeds", "tests": 7}
    cost, gain = sweep_words(told, ["safety"])
    assert "+4.0 [+3.0, +5.0] points" in cost
    assert "That is within the noise: these swaps cost nothing that can be measured here." in cost
    assert "not told from none" not in gain
    assert "(beyond noise)" in gain
    (table,) = sweep_part("key", "Title", told).tables
    assert table.rows[2][4:] == ("+3.0 [+2.0, +4.0], p 0.02", "+3.0 [+2.0, +4.0], p 0.02")
    assert table.caption.endswith(
        "with 95% intervals over prompts and seeds; p by Holm over the 7 changes of the table."
    )
    screen = Console(width=200, file=io.StringIO())
    screen.print(experiments._sweep_table(told))
    lines = [line for line in screen.file.getvalue().splitlines() if "dropped by suspicion" in line]
    assert all(line.count("+3.0 [+2.0, +4.0], p 0.02") == 2 for line in lines)
    assert "points [95% interval over prompts and seeds], p by Holm over 7 changes" in screen.file.getvalue()
    old = sweep_part("key", "Title", POISON).tables[0].caption
    assert old.endswith("over pairs and seeds, each by itself: of twenty changes that are none, one excludes zero.")


def test_what_is_won_back_is_a_share_of_a_cost_that_is_one():
    rows = [
        cell("clean", "clean", 0, 0.0),
        cell("without_noise", "without_noise", 0, 0.04),
        cell("drop", "suspicion", 5.0, 0.03, random=0.03),
        cell("drop", "random", 5.0, 0.0),
    ]
    cost, gain = sweep_words(sweep(*rows), ["safety"])
    assert cost == "Without the swapped labels safety is at +4.0 [+3.0, +5.0] points against the pairs as they are."
    assert gain.endswith("75% of what the swaps cost is won back.")
    rows[1] = cell("without_noise", "without_noise", 0, 0.005)
    cost, gain = sweep_words(sweep(*rows), ["safety"])
    assert "these swaps cost nothing that can be measured here" in cost
    assert "won back" not in gain


@pytest.mark.parametrize(
    "part", [detection_part("key", "Title", found(LEADS)), sweep_part("key", "Title", POISON)], ids=["lab", "sweep"]
)
def test_a_part_is_told_as_markdown_and_as_a_page(part):
    text = as_markdown(part, "images")
    assert all(f"- {words}" in text for words in part.words)
    assert all(f"(images/{figure.name}.svg)" in text for figure in part.figures)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    page = as_page("A <title>", [part])
    assert "<script" not in page
    assert "A &lt;title&gt;" in page
    assert page.count("<svg") == len(part.figures)
    assert len(re.findall(r"<tr>", page)) == len(part.tables[0].rows) + 1


def test_figures_are_the_same_every_time_and_show_every_line():
    first, second = (sweep_part("key", "Title", POISON).figures[0].svg for _ in range(2))
    assert first == second
    assert {"safety", "chat", "safer", "random"} <= set(re.findall(r">([^<>]+)</text>", first))


def test_the_committed_results_can_be_told():
    for path in sorted((Path(__file__).parents[2] / "results").glob("lab_*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        for name, told in tree.items():
            assert detection_part(name, name, told).words
