"""Tell what the lab and the sweeps found: figures, tables and conclusions in plain words, made from their numbers
alone."""

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from safer_ray.data.curation import CLEAN, WITHOUT_NOISE

SHOWN = ("combined", "local_probe", "reward_margin", "tfidf", "safer", "length")  # in the figure of recall
RIVALS = ("reward_margin", "confident_learning", "tfidf")
ACTIONS = {"drop": "dropped", "relabel": "relabelled", "poison": "flipped"}
COLOURS = ("#1b6ca8", "#d1495b", "#5b8e3e", "#8d6a9f", "#c98a1b", "#6b7280")

Row = dict[str, Any]


class Table(NamedTuple):
    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Figure(NamedTuple):
    name: str  # of its file
    caption: str
    svg: str


class Part(NamedTuple):
    """One finding: what it says in words, and what the words are made of."""

    title: str
    words: list[str]
    tables: list[Table]
    figures: list[Figure]


# Detection


def detection_part(key: str, title: str, found: Mapping[str, Any]) -> Part:
    """Return the part about one kind of errors in `detection.json`."""
    outside = found["out_of_fold"]
    recalls = ("recall at 1%", "2%", "5%", "10%")
    head = ("detector", "AUROC", "AUPRC", "precision", *recalls, "combined leads by", "in sample")
    inside = found["in_sample"]["detectors"] if found["in_sample"] else {}
    rows = [_detector_row(name, outside, inside) for name in _by_auroc(outside)]
    seeds = len(next(iter(outside["seeds"].values())))
    told = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    caption = (
        f"{found['planted']} of {found['pairs']} labels swapped, {told}; out of fold, with 95% intervals over prompts, "
        "each by itself. Precision: among as many pairs as were planted."
    )
    recall = "Share of the swapped labels found by looking at so many pairs."
    auroc = "AUROC out of fold with 95% intervals; rings: in sample."
    figures = [
        Figure(f"{key}_recall", recall, _recall_figure(outside)),
        Figure(f"{key}_auroc", auroc, _auroc_figure(outside, inside)),
    ]
    return Part(title, detection_words(found), [Table(caption, head, rows)], figures)


def _by_auroc(found: Mapping[str, Any]) -> list[str]:
    return sorted(found["detectors"], key=lambda name: -found["detectors"][name]["auroc"][0])


def _detector_row(name: str, outside: Mapping[str, Any], inside: Mapping[str, Any]) -> tuple[str, ...]:
    by = outside["detectors"][name]
    lead = outside["combined_minus"].get(name, {}).get("auroc")
    shares = [f"{by[m][0]:.2f}" for m in ("precision_at_planted", "recall_1", "recall_2", "recall_5", "recall_10")]
    return (
        name,
        interval(by["auroc"]),
        f"{by['auprc'][0]:.3f}",
        *shares,
        interval(lead, sign="+") if lead else "",
        f"{inside[name]['auroc'][0]:.3f}" if name in inside else "",
    )


def interval(values: Sequence[float], sign: str = "", scale: float = 1, digits: int = 3) -> str:
    """`0.750 [0.731, 0.769]`."""
    value, low, high = (f"{scale * v:{sign}.{digits}f}" for v in values)
    return f"{value} [{low}, {high}]"


def excludes_zero(values: Sequence[float]) -> bool:
    return values[1] > 0 or values[2] < 0


def detection_words(found: Mapping[str, Any]) -> list[str]:
    """Return what the numbers say."""
    outside = found["out_of_fold"]
    by = outside["detectors"]
    best = _by_auroc(outside)[0]
    share = by[best]["recall_5"][0]
    words = [
        f"`{best}` finds most: AUROC {interval(by[best]['auroc'])}. Whoever looks at the 5% of pairs that it suspects "
        f"most finds {share:.0%} of the swapped labels, {share / 0.05:.1f} times as many as by chance."
    ]
    lead = {name: values["auroc"] for name, values in outside["combined_minus"].items()}
    ahead = [name for name in RIVALS if name in lead and lead[name][1] > 0]
    level = [name for name in lead if not excludes_zero(lead[name])]
    if ahead:
        told = ", ".join(f"`{name}` by {interval(lead[name])}" for name in ahead)
        words.append(f"`combined` leads {told}: the paired intervals exclude zero.")
    if behind := [name for name in RIVALS if name in lead and lead[name][1] <= 0]:
        words.append(f"It does not lead {_listed(behind)}: the interval of the difference holds zero or less.")
    if level:
        words.append(f"It cannot be told from {_listed(level)}.")
    safer = {name: values["auroc"] for name, values in outside["safer_minus"].items()}
    against = {name: interval(safer[name], "+") for name in ("random", "length", "reward_margin")}
    words.append(
        f"The SAFER score alone has AUROC {interval(by['safer']['auroc'])}: {against['random']} against random, "
        f"{against['length']} against length, {against['reward_margin']} against the plain reward margin."
    )
    if found["in_sample"]:
        inside = found["in_sample"]["detectors"]
        pairs = [(name, inside[name]["auroc"][0], by[name]["auroc"][0]) for name in SHOWN[:5]]
        told = ", ".join(f"`{name}` {seen:.3f} in sample, {unseen:.3f} out of fold" for name, seen, unseen in pairs)
        words.append(f"Judged by models that learned from the very pairs, the same detectors look different: {told}.")
    return words


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Sweeps


def sweep_part(key: str, title: str, found: Mapping[str, Any]) -> Part:
    """Return the part about a `sweep.json`; figure and words tell of `safety` and `chat`, or of all sections where
    these are not there."""
    names = list(dict.fromkeys(str(row["section"]) for row in found["rows"]))
    groups = [name for name in ("safety", "chat") if name in names] or names
    head = ("section", "pairs", "curation", "accuracy", "against the pairs as they are", "against random")
    rows = [_cell_row(row) for row in found["rows"]]
    seeds = len(found["seeds"])
    caption = (
        f"Accuracy in percent over {seeds} seeds of training (reward model: {found['retraining']}); changes in points, "
        f"with 95% intervals over {_drawn(found)}"
        + (
            f"; p by Holm over the {found['tests']} changes of the table."
            if "tests" in found
            else ", each by itself: of twenty changes that are none, one excludes zero."
        )
    )
    shown = "Accuracy against the share of the pairs changed; bands: from the lowest to the highest seed."
    figure = Figure(key, shown, _sweep_figure(found, groups))
    return Part(title, sweep_words(found, groups), [Table(caption, head, rows)], [figure])


def _drawn(found: Mapping[str, Any]) -> str:
    """Return what the intervals of a `sweep.json` draw again; those of old, which do not say it, drew pairs."""
    return str(found.get("drawn", "pairs and seeds"))


def _cell_row(row: Row) -> tuple[str, ...]:
    return (
        row["section"],
        f"{row['n']:,}",
        cell_name(row),
        f"{100 * row['against_clean']['accuracy']:.1f}",
        change_with_p(row, "against_clean"),
        change_with_p(row, "against_random"),
    )


def _points(told: Mapping[str, Any]) -> str:
    """Return points of change with their interval."""
    return interval([told[name] for name in ("change", "low", "high")], "+", 100, 1)


def change_with_p(row: Row, rival: str) -> str:
    """Return points of change with their interval, and with p by Holm where it is known; nothing where the row is its
    own rival, or has none."""
    told = row.get(rival)
    if told is None or (row["action"], rival) == (CLEAN, "against_clean"):
        return ""
    return _points(told) + (f", p {told['p_holm']:.2g}" if "p_holm" in told else "")


def is_real(told: Mapping[str, Any]) -> bool:
    """Return whether a change is more than noise: by its p among all of the table, or by its interval where results of
    old have no p."""
    return bool(told["p_holm"] < 0.05) if "p_holm" in told else excludes_zero([0.0, told["low"], told["high"]])


def cell_name(row: Row) -> str:
    if row["action"] == CLEAN:
        return "pairs as they are"
    if row["action"] == WITHOUT_NOISE:
        return "before labels were swapped"
    return f"{row['percent']:g}% {ACTIONS[row['action']]} by {row['strategy']}"


def sweep_words(found: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    """Return what the numbers say: what flips cost, and what dropping wins back."""
    rows = [row for group in groups for row in found["rows"] if row["section"] == group]
    words = []
    for row in rows:
        if row["action"] == "poison" and row["strategy"] != "random":
            words.append(_flip_words(row, _twin(rows, row, strategy="random")))
        if row["action"] == WITHOUT_NOISE:
            words.append(_cost_words(row))
        if row["action"] in ("drop", "relabel") and row["strategy"] != "random":
            words.append(_gain_words(row, _twin(rows, row, action=WITHOUT_NOISE, strategy=WITHOUT_NOISE, percent=0.0)))
    return words


def _twin(rows: Sequence[Row], row: Row, **changed: Any) -> Row | None:
    wanted = {name: row[name] for name in ("action", "strategy", "percent", "section")} | changed
    return next((r for r in rows if all(r[name] == value for name, value in wanted.items())), None)


def _change(row: Row, rival: str = "against_clean") -> tuple[str, bool]:
    """Return points of change with their interval, and whether it is more than noise."""
    return _points(row[rival]), is_real(row[rival])


def _flip_words(row: Row, chance: Row | None) -> str:
    told, real = _change(row)
    text = f"{row['percent']:g}% flipped by `{row['strategy']}`: {row['section']} {told} points"
    text += "" if real else " (not told from none)"
    if chance is None:
        return text + "."
    random, random_real = _change(chance)
    text += f"; as many random flips: {random}{'' if random_real else ' (not told from none)'}."
    cost, usual = -row["against_clean"]["change"], -chance["against_clean"]["change"]
    if cost > 0 and usual > 0 and random_real:
        text += f" That is {cost / usual:.1f} times the cost of chance"
    else:
        text += " The difference"
    apart, told_apart = _change(row, "against_random")
    noise = "beyond" if told_apart else "within"
    return f"{text}: {apart} points against random flips, {noise} the noise."


def _cost_words(row: Row) -> str:
    told, real = _change(row)
    verdict = "" if real else " That is within the noise: these swaps cost nothing that can be measured here."
    return f"Without the swapped labels {row['section']} is at {told} points against the pairs as they are.{verdict}"


def _gain_words(row: Row, before: Row | None) -> str:
    told, real = _change(row)
    text = f"{cell_name(row)}: {row['section']} {told} points{'' if real else ' (not told from none)'}"
    if "against_random" in row:
        apart, told_apart = _change(row, "against_random")
        text += f", {apart} against dropping as many at random ({'beyond' if told_apart else 'within'} noise)"
    cost = before["against_clean"]["change"] if before else 0.0
    if before and is_real(before["against_clean"]) and cost > 0:
        text += f"; {row['against_clean']['change'] / cost:.0%} of what the swaps cost is won back"
    return text + "."


# Figures


def _figure(panels: int = 1, height: float = 3.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "safer_ray", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6 * max(panels, 1.4), height), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return canvas, axes


def _svg(canvas: Any) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _recall_figure(outside: Mapping[str, Any]) -> str:
    canvas, (axis,) = _figure()
    budget = [100 * b for b in outside["curve"]["budget"]]
    for name, colour in zip(SHOWN, COLOURS, strict=True):
        axis.plot(budget, [100 * v for v in outside["curve"][name]], color=colour, label=name, linewidth=1.6)
    axis.plot([0, 100], [0, 100], color="#999", linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel="pairs looked at, most suspicious first (%)", ylabel="swapped labels found (%)", xlim=(0, 60))
    axis.legend(frameon=False, fontsize=8)
    return _svg(canvas)


def _auroc_figure(outside: Mapping[str, Any], inside: Mapping[str, Any]) -> str:
    names = _by_auroc(outside)[::-1]
    canvas, (axis,) = _figure(height=0.8 + 0.24 * len(names))
    for y, name in enumerate(names):
        value, low, high = outside["detectors"][name]["auroc"]
        axis.plot([low, high], [y, y], color=COLOURS[0], linewidth=2)
        axis.plot(value, y, "o", color=COLOURS[0], markersize=5)
        if name in inside:
            axis.plot(inside[name]["auroc"][0], y, "o", color=COLOURS[1], markersize=5, markerfacecolor="none")
    axis.axvline(0.5, color="#999", linewidth=0.8, linestyle=":")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="AUROC")
    return _svg(canvas)


def _sweep_figure(found: Mapping[str, Any], groups: Sequence[str]) -> str:
    canvas, axes = _figure(len(groups))
    for axis, group in zip(axes, groups, strict=True):
        rows = [row for row in found["rows"] if row["section"] == group]
        start = next(row for row in rows if row["action"] == CLEAN)
        curated = sorted((r for r in rows if r["action"] in ACTIONS), key=lambda r: (r["strategy"], r["percent"]))
        for (strategy, cells), colour in zip(groupby(curated, key=lambda r: str(r["strategy"])), COLOURS, strict=False):
            line = [start, *cells]
            percents = [row["percent"] for row in line]
            seeds = [[100 * v for v in row["against_clean"]["seeds"]] for row in line]
            axis.plot(percents, [sum(s) / len(s) for s in seeds], "o-", color=colour, label=strategy, markersize=4)
            low, high = [min(s) for s in seeds], [max(s) for s in seeds]
            axis.fill_between(percents, low, high, color=colour, alpha=0.15, linewidth=0)
        for row in (r for r in rows if r["action"] == WITHOUT_NOISE):
            level = 100 * row["against_clean"]["accuracy"]
            axis.axhline(level, color="#333", linestyle="--", linewidth=1, label="before swaps")
        verb = ACTIONS[curated[0]["action"]] if curated else "changed"
        axis.set(title=group, xlabel=f"share of the pairs {verb} (%)", ylabel="accuracy (%)")
    axes[0].legend(frameon=False, fontsize=8)
    return _svg(canvas)


# Pages


def as_markdown(part: Part, images: str) -> str:
    """A section of a document; figures are files in the folder `images`."""
    lines = [f"## {part.title}", "", *(f"- {text}" for text in part.words), ""]
    for figure in part.figures:
        lines += [f"![{figure.caption}]({images}/{figure.name}.svg)", "", f"*{figure.caption}*", ""]
    for table in part.tables:
        lines += [table.caption, "", _row(table.head), _row(["---"] * len(table.head)), *map(_row, table.rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_page(title: str, parts: Sequence[Part], red_team: bool = False) -> str:
    """One self-contained HTML page, which says where some of the data were poisoned on purpose."""
    environment = Environment(loader=PackageLoader("safer_ray.report"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("experiment.html").render(
        title=title, parts=parts, red_team=red_team, Markup=Markup
    )
