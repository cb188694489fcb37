"""One self-contained HTML page that tells what a run found (Jinja2, inline SVG)."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from safer_ray.report import plots
from safer_ray.report.pages import page


@dataclass(frozen=True)
class Context:
    """A sentence that a feature fires on, with the text around it."""

    before: str
    sentence: str
    after: str
    value: float
    side: str
    pair_id: str


@dataclass(frozen=True)
class FeatureCard:
    feature: int
    salience: float  # [-1, 1]; > 0 fires more on chosen
    sign: int  # +1 selected as safe, -1 as unsafe, 0 judged but not selected
    rating: int | None
    reason: str  # the judge's
    n_chosen: int
    n_rejected: int
    contexts: tuple[Context, ...] = ()


class SentencePlace(NamedTuple):
    """A sentence that a reason names, `content[start:stop]` of a message."""

    part: str  # prompt or response
    message: int  # of the prompt, or of the response
    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class ReasonView:
    feature: int
    sign: int
    contribution: float  # negative: makes the pair suspicious
    side: str
    sentence: SentencePlace | None  # None: unknown


@dataclass(frozen=True)
class PairView:
    """A suspicious pair with its text."""

    pair_id: str
    section: str
    score: float
    suspicion: float
    reward_margin: float | None
    prompt: tuple[tuple[str, str], ...]  # (role, content)
    chosen: tuple[tuple[str, str], ...]
    rejected: tuple[tuple[str, str], ...]
    reasons: tuple[ReasonView, ...] = ()
    planted: bool | None = None  # whether its label was swapped on purpose, where that is known


@dataclass(frozen=True)
class StageView:
    name: str
    rows: int
    seconds: float


@dataclass(frozen=True)
class DetectionView:
    """Figures of how well a strategy finds planted swaps: AUROC in [0, 1], 0.5 is chance."""

    strategy: str
    auroc: float
    precision_at_planted: float


@dataclass(frozen=True)
class SectionView:
    """Held-out pairwise accuracy of a model with its 95% interval."""

    model: str
    section: str
    n: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class TestView:
    """A model against another on one section: the test by sign flips of prompts."""

    model: str
    base: str
    section: str
    gained: int  # pairs right here and wrong there
    lost: int
    change: float  # of accuracy, in [-1, 1], with its 95% interval
    low: float
    high: float
    differ: int  # prompts that gained more than they lost, or less
    prompts: int
    p: float
    p_holm: float  # by Holm over all tests of the run


@dataclass(frozen=True)
class ReportData:
    title: str
    run: str
    mode: str  # paper or response
    rating: int  # least one of the features that are selected
    detector: str  # by which pairs are suspected
    facts: tuple[tuple[str, str], ...]  # summary lines: name, value
    conclusions: tuple[str, ...]  # plain sentences made from the numbers
    stages: tuple[StageView, ...]
    quarantine: dict[str, int]  # reason -> rows
    reward: dict[str, float]  # validation_accuracy, train_pairs, parameters, ...
    reward_history: tuple[dict[str, float], ...]  # step, loss, validation_accuracy, validation_loss
    sae: dict[str, float]  # nmse, explained_variance, l0, dead_share, train_vectors, ...
    sae_history: tuple[dict[str, float], ...]  # step, nmse, aux
    salience: np.ndarray  # [latents]
    features: tuple[FeatureCard, ...]
    scores: np.ndarray  # [pairs]
    planted: np.ndarray | None  # bool [pairs]
    pairs: tuple[PairView, ...]
    detection: tuple[DetectionView, ...] = ()
    sections: tuple[SectionView, ...] = ()
    tests: tuple[TestView, ...] = ()
    red_team: tuple[str, ...] = ()  # names of the models trained on poisoned pairs
    licences: tuple[str, ...] = field(default_factory=tuple)
    sae_density: tuple[Sequence[float], Sequence[float]] = ((), ())  # counts of latents, edges of log10 of their share
    sae_spliced: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # where, to sae_quality.Spliced


class Tile(NamedTuple):
    """A figure with its name and one line on what it means."""

    label: str
    value: str
    note: str = ""


class Segment(NamedTuple):
    """A stretch of a text, with the reasons that name it."""

    text: str
    reasons: tuple[ReasonView, ...] = ()


MarkedTurns = tuple[tuple[str, list[Segment]], ...]  # role and segments of each message


class MarkedPair(NamedTuple):
    """A pair whose texts are cut where reasons name a sentence."""

    pair: PairView
    prompt: MarkedTurns
    chosen: MarkedTurns
    rejected: MarkedTurns


class SectionPlot(NamedTuple):
    name: str
    n: str
    plot: Markup


PERCENTAGES = {"validation_accuracy", "dead_share", "clustered_share", "read_share"}


def render_report(data: ReportData) -> str:
    """The page as HTML: no outside requests, all text escaped, harmful text blurred until clicked."""
    filters: dict[str, Callable[..., Any]] = {
        "number": plots.number,
        "count": _count,
        "metric": _metric,
        "signed": _signed,
        "points": _points,
        "p_value": _p_value,
        "duration": _duration,
        "csp_hash": _csp_hash,
        "clip_start": _clip_start,
        "clip_end": _clip_end,
        "salience_bar": lambda value: Markup(plots.salience_bar(value)),
        "verdict": verdict_in_words,
    }
    features = sorted(data.features, key=lambda card: (-abs(card.salience), card.feature))
    reward_loss, reward_accuracy = plots.reward_curves(data.reward_history)
    sae_loss, sae_dead = plots.sae_curves(data.sae_history)
    return page("report.html", filters).render(
        data=data,
        summary=summary(data),
        tiles=key_figures(data),
        unsafe=[card for card in features if card.sign < 0],
        safe=[card for card in features if card.sign > 0],
        unselected=[card for card in features if card.sign == 0],
        shown={card.feature for card in features},
        pairs=[mark_pair(pair) for pair in data.pairs],
        tail=plots.tail_of(data.scores, data.planted),
        tail_share=plots.TAIL,
        section_plots=section_plots(data),
        base=_base_model(data),
        plots={
            "reward_loss": Markup(reward_loss),
            "reward_accuracy": Markup(reward_accuracy),
            "sae": Markup(sae_loss),
            "sae_dead": Markup(sae_dead),
            "density": Markup(plots.density_histogram(*data.sae_density)),
            "salience": Markup(plots.salience_histogram(data.salience, {c.feature: c.sign for c in features})),
            "scores": Markup(plots.score_histogram(data.scores, data.planted)),
            "detection": Markup(
                plots.bar_plot(
                    "plot-detection",
                    "AUROC of finding planted swaps",
                    [plots.Bar(found.strategy, found.auroc) for found in data.detection],
                )
            ),
        },
    )


def summary(data: ReportData) -> str:
    """Return what the run did, in plain sentences made from its numbers."""
    parts = ["A reward model"]
    if "train_pairs" in data.reward:
        parts.append(f"trained on {_count(data.reward['train_pairs'])} preference pairs")
    size = f" of {_count(len(data.salience))} features" if len(data.salience) else ""
    parts.append(f"was opened up with a sparse autoencoder{size}.")
    safe, unsafe = _selected(data)
    if safe + unsafe:
        parts.append(
            f"{_count(len(data.scores))} pairs were scored by the selected ones, {safe} safe and {unsafe} unsafe."
        )
    elif len(data.scores):
        parts.append(f"No feature was selected, so the scores of its {_count(len(data.scores))} pairs say nothing.")
    if data.pairs:
        parts.append(f"The {len(data.pairs)} most suspicious pairs are shown below with the reasons for each.")
    if data.sections:
        models, sections = ({getattr(row, name) for row in data.sections} for name in ("model", "section"))
        what = f"{len(models)} {_plural(len(models), 'model')} on {len(sections)} {_plural(len(sections), 'section')}"
        parts.append(f"Held-out accuracy is compared for {what}.")
    return " ".join(parts)


def key_figures(data: ReportData) -> list[Tile]:
    """The few numbers to read first."""
    tiles = [Tile("Pairs scored", _count(len(data.scores)), f"{data.mode} mode")]
    if np.isfinite(data.reward.get("validation_accuracy", np.nan)):
        tiles.append(Tile("Reward model", f"{data.reward['validation_accuracy']:.1%}", "held-out accuracy"))
    if np.isfinite(data.sae.get("explained_variance", np.nan)):
        tiles.append(Tile("Autoencoder", f"{data.sae['explained_variance']:.1%}", "variance explained"))
    safe, unsafe = _selected(data)
    tiles.append(Tile("Features selected", str(safe + unsafe), f"{safe} safe, {unsafe} unsafe"))
    if data.detection:
        best = max(data.detection, key=lambda found: found.auroc)
        tiles.append(Tile("Best detection", f"{best.auroc:.3f}", f"AUROC by {best.strategy}; 0.5 is chance"))
    if data.quarantine:
        tiles.append(Tile("Rows refused", _count(sum(data.quarantine.values())), "in quarantine, with reasons"))
    return tiles


def highlight(text: str, reasons: Sequence[ReasonView]) -> list[Segment]:
    """Return a message cut into segments; a sentence that several reasons name stands once, with all of them."""
    named: dict[tuple[int, int], list[ReasonView]] = {}
    for reason in sorted(reasons, key=lambda reason: reason.feature):
        if reason.sentence is not None:
            named.setdefault((reason.sentence.start, reason.sentence.stop), []).append(reason)
    segments, at = [], 0
    for start, stop in sorted(named):
        if start > at:
            segments.append(Segment(text[at:start]))
        segments.append(Segment(text[start:stop], tuple(named[start, stop])))
        at = stop
    if at < len(text):
        segments.append(Segment(text[at:]))
    return segments


def mark_pair(pair: PairView) -> MarkedPair:
    """Return a pair's messages, each cut where reasons name its sentences. The prompt is on both sides, and shown once
    with the reasons of both."""

    def marked(turns: tuple[tuple[str, str], ...], part: str, reasons: list[ReasonView]) -> MarkedTurns:
        found = []
        for number, (role, content) in enumerate(turns):
            own = [r for r in reasons if r.sentence and (r.sentence.part, r.sentence.message) == (part, number)]
            found.append((role, highlight(content, own)))
        return tuple(found)

    by_side = {side: [r for r in pair.reasons if r.side == side] for side in ("chosen", "rejected")}
    return MarkedPair(
        pair,
        marked(pair.prompt, "prompt", list(pair.reasons)),
        marked(pair.chosen, "response", by_side["chosen"]),
        marked(pair.rejected, "response", by_side["rejected"]),
    )


def section_plots(data: ReportData) -> list[SectionPlot]:
    """A plot a section, models in their order and on one shared axis."""
    base, names = _base_model(data), list(dict.fromkeys(row.section for row in data.sections))
    rows = {name: [row for row in data.sections if row.section == name] for name in names}
    intervals = {
        name: [
            plots.Interval(r.model, r.accuracy, r.low, r.high, r.model == base, r.model in data.red_team)
            for r in rows[name]
        ]
        for name in names
    }
    domain = plots.accuracy_domain([row for group in intervals.values() for row in group])
    found = []
    for i, name in enumerate(names):
        sizes = sorted({row.n for row in rows[name]})
        n = _count(sizes[0]) if len(sizes) == 1 else f"{_count(sizes[0])} to {_count(sizes[-1])}"
        plot = plots.interval_plot(f"plot-section-{i}", f"Accuracy on {name}", intervals[name], domain)
        found.append(SectionPlot(name, n, Markup(plot)))
    return found


def verdict_in_words(test: TestView) -> str:
    """Return what the test says, at the 5% level of all tests of the run together."""
    if test.p_holm >= 0.05:
        return "no clear difference"
    direction = "better" if test.gained > test.lost else "worse"
    return f"clearly {direction}" if test.p_holm < 0.001 else direction


def _base_model(data: ReportData) -> str:
    if data.tests:
        return data.tests[0].base
    return data.sections[0].model if data.sections else ""


def _selected(data: ReportData) -> tuple[int, int]:
    return sum(card.sign > 0 for card in data.features), sum(card.sign < 0 for card in data.features)


def _metric(value: float, name: str) -> str:
    if not np.isfinite(value):
        return "n/a"
    if name in PERCENTAGES:
        return f"{value:.1%}"
    return _count(value) if float(value).is_integer() else plots.number(value)


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _plural(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"


def _signed(value: float, digits: int = 2) -> str:
    text = f"{value:+.{digits}f}".replace("-", plots.MINUS)
    return text if any(c in "123456789" for c in text) else text[1:]


def _points(test: TestView) -> str:
    value, low, high = (_signed(100 * share, 1) for share in (test.change, test.low, test.high))
    return f"{value} [{low}, {high}]"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def _clip_start(text: str, limit: int = 90) -> str:
    """The last words of a text, with an ellipsis where it is cut."""
    if len(text) <= limit:
        return text
    kept = text[-limit:]
    return "…" + (kept.partition(" ")[2] or kept)


def _clip_end(text: str, limit: int = 70) -> str:
    """The first words of a text, with an ellipsis where it is cut."""
    if len(text) <= limit:
        return text
    kept = text[:limit]
    return (kept.rpartition(" ")[0] or kept) + "…"
