"""Small SVG plots as text: pure functions of numbers, coloured by the CSS classes of the page they stand in.

Every function copes with no data, one value and NaN (left out), and gives the same text for the same numbers.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np

NARROW, WIDE = 460, 760  # user units; half and full width of the page's text column
MINUS = "\N{MINUS SIGN}"
TAIL = 0.05  # share of the lowest scores that the histogram shades


class Scale(NamedTuple):
    """A linear map from data to user units."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.stop - self.start)


class Line(NamedTuple):
    """A named series of a line plot; `style` is the CSS class that colours it."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str


class Interval(NamedTuple):
    """A row of an interval plot, in [0, 1]; the baseline row draws the reference line."""

    label: str
    value: float
    low: float
    high: float
    baseline: bool = False
    warning: bool = False


class Bar(NamedTuple):
    label: str
    value: float


class Tail(NamedTuple):
    """The lowest scores: their upper bound, how many they are, and how many of them are planted."""

    bound: float
    n: int
    planted: int | None


def number(value: float, digits: int = 3) -> str:
    """A short number with a true minus sign, say 0.25, 1,200 or 3e-05."""
    if value and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{max(0, digits - 1)}g}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return "0" if text == "-0" else text.replace("-", MINUS)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round values within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_plot(key: str, title: str, lines: Sequence[Line], x_label: str = "step") -> str:
    """Lines over training steps; the last value of each is written at its end."""
    lines = [line._replace(points=_finite(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return _empty(key, title, NARROW, 210)
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    low, high = _padded(min(ys), max(ys))
    x = Scale(min(xs), max(xs), 48, NARROW - 56)
    y = Scale(low, high, 172, 14)
    body = [_y_axis(y, x), _x_axis(x, 172, x_label, count=4)]
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in _thinned(line.points))
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
    for line, label_y in zip(lines, _apart([y(line.points[-1][1]) for line in lines], 13), strict=True):
        end, last = line.points[-1]
        body.append(f'<circle class="dot {line.style}" cx="{x(end):.1f}" cy="{y(last):.1f}" r="3.5"/>')
        body.append(_text(x(end) + 8, label_y + 4, number(last), f"value {line.style}"))
    told = "; ".join(f"{n}: {number(p[0][1])} first, {number(p[-1][1])} last" for n, p, _ in lines)
    return _svg(key, title, told, NARROW, 212, body)


def reward_curves(history: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """Loss, and validation accuracy, of the reward model over its steps."""
    losses = [
        Line("training loss", _column(history, "loss"), "s1"),
        Line("validation loss", _column(history, "validation_loss"), "s2"),
    ]
    accuracy = [Line("validation accuracy", _column(history, "validation_accuracy"), "s2")]
    return (
        line_plot("plot-reward-loss", "Reward model loss", losses),
        line_plot("plot-reward-accuracy", "Reward model validation accuracy", accuracy),
    )


def sae_curves(history: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """Normalised reconstruction error of the SAE over its steps, and the share of its latents that are dead."""
    errors = [
        Line("normalised MSE", _column(history, "nmse"), "s1"),
        Line("held-out normalised MSE", _column(history, "held_out_nmse"), "s2"),
    ]
    dead = [Line("dead latents", _column(history, "dead"), "s1")]
    return (
        line_plot("plot-sae", "Sparse autoencoder loss", errors),
        line_plot("plot-sae-dead", "Dead latents of the sparse autoencoder", dead),
    )


def density_histogram(counts: Sequence[float], edges: Sequence[float]) -> str:
    """Return how many latents fire on which share of the vectors, bins by its log10."""
    key, title = "plot-density", "Firing density of the latents"
    if not any(counts):
        return _empty(key, title, NARROW, 212)
    x, base = Scale(edges[0], edges[-1], 48, NARROW - 16), 172
    y = Scale(0, max(counts) * 1.06, base, 14)
    body = [_y_axis(y, x)]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        name = f"{count:,} latents fire on {number(10**left)} to {number(10**right)} of the vectors"
        body.append(_column_bar(x(left), x(right), y(count), base, "bar s1", name))
    body.append(_x_axis(x, base, "log10 of the share of vectors"))
    return _svg(key, title, f"{sum(counts):,} latents that fire.", NARROW, 212, body)


def salience_histogram(salience: np.ndarray, selected: Mapping[int, int]) -> str:
    """Return how many features have each salience (log scale), with a mark for each selected feature (id -> sign).

    Features of salience 0, mostly dead ones, are left out.
    """
    key, title = "plot-salience", "Salience of the features"
    values = np.asarray(salience, dtype=np.float64)
    marks = [(float(values[i]), i, s) for i, s in selected.items() if s and 0 <= i < len(values)]
    marks = [mark for mark in marks if math.isfinite(mark[0])]
    alive = values[np.isfinite(values) & (values != 0)]
    if not len(alive):
        return _empty(key, title, WIDE, 250)
    reach = min(1.0, max(0.05, math.ceil(float(np.abs(alive).max()) * 10.5) / 10))
    counts, edges = np.histogram(np.clip(alive, -reach, reach), bins=60, range=(-reach, reach))
    x, base = Scale(-reach, reach, 56, WIDE - 16), 204
    y = Scale(0, math.log10(1 + counts.max()), base, 24)
    powers = [10**i for i in range(int(math.log10(counts.max())) + 1)]
    body = [_y_axis(y, x, [math.log10(1 + p) for p in powers], [f"{p:,}" for p in powers])]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        style = "unsafe" if right <= 1e-9 else "safe"
        name = f"{count:,} features between {number(left)} and {number(right)}"
        body.append(_column_bar(x(left), x(right), y(math.log10(1 + count)), base, f"bar soft {style}", name))
    body.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="20" y2="{base}"/>')
    for at, level, feature, sign, value in _dodged(x, sorted(marks)):
        style, name = ("safe", "safe") if sign > 0 else ("unsafe", "unsafe")
        hint = f"<title>feature {feature} ({name}), salience {number(value)}</title>"
        body.append(f'<circle class="mark {style}" cx="{at:.1f}" cy="{base - 7 - 9 * level}" r="4">{hint}</circle>')
    body.append(_x_axis(x, base, "salience (fires more on rejected ← 0 → fires more on chosen)"))
    told = f"{len(alive):,} features from {number(alive.min())} to {number(alive.max())}; {len(marks)} selected."
    return _svg(key, title, told, WIDE, 252, body)


def tail_of(scores: np.ndarray, planted: np.ndarray | None, share: float = TAIL) -> Tail | None:
    """The `share` lowest finite scores; None where there are none."""
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(scores))
    if not len(finite):
        return None
    lowest = finite[np.argsort(scores[finite], kind="stable")[: max(1, int(len(finite) * share))]]
    swapped = None if planted is None else int(np.asarray(planted, dtype=bool)[lowest].sum())
    return Tail(float(scores[lowest[-1]]), len(lowest), swapped)


def score_histogram(scores: np.ndarray, planted: np.ndarray | None) -> str:
    """Pairs by score, planted swaps stacked below the others; the lowest scores are shaded.

    The outermost bars also hold the few scores beyond them.
    """
    key, title = "plot-scores", "Scores of the pairs"
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(scores)
    kept, tail = scores[finite], tail_of(scores, planted)
    if tail is None:
        return _empty(key, title, WIDE, 270)
    swapped = np.zeros(len(kept), dtype=bool) if planted is None else np.asarray(planted, dtype=bool)[finite]
    lowest, highest = (float(q) for q in np.quantile(kept, [0.002, 0.998]))
    low, high = _padded(lowest, highest, share=0.02)
    bins = 1 if low == high else 48
    clipped = np.clip(kept, low, high)
    every, edges = np.histogram(clipped, bins=bins, range=(low, high))
    below, _ = np.histogram(clipped[swapped], bins=bins, range=(low, high))
    x, base = Scale(low, high, 56, WIDE - 16), 222
    y = Scale(0, float(every.max()) * 1.06, base, 14)
    cut = min(max(x(tail.bound), x.start), x.stop)
    body = [f'<rect class="tail" x="{x.start}" y="14" width="{cut - x.start:.1f}" height="{base - 14}"/>']
    body.append(_y_axis(y, x))
    for count, bad, left, right in zip(every, below, edges[:-1], edges[1:], strict=True):
        name = f"{count:,} pairs between {number(left)} and {number(right)}"
        name += "" if planted is None else f", {bad:,} of them planted"
        body.append(_column_bar(x(left), x(right), y(float(count)), y(float(bad)), "bar plain", name))
        body.append(_column_bar(x(left), x(right), y(float(bad)), base, "bar unsafe", name))
    body.append(f'<line class="cut" x1="{cut:.1f}" x2="{cut:.1f}" y1="14" y2="{base}"/>')
    body.append(_x_axis(x, base, "score (suspicious ← → teaches safety)"))
    told = f"{len(kept):,} pairs, median {number(float(np.median(kept)))}; the lowest {tail.n:,} are at or below "
    told += number(tail.bound) + ("" if tail.planted is None else f", {tail.planted:,} of them planted")
    return _svg(key, title, told + ".", WIDE, 270, body)


def interval_plot(key: str, title: str, rows: Sequence[Interval], domain: tuple[float, float] | None = None) -> str:
    """One line a row: the value as a dot, its interval as a bar, and the baseline's value as a dashed reference."""
    rows = [row for row in rows if all(math.isfinite(v) for v in row[1:4])]
    if not rows:
        return _empty(key, title, NARROW, 120)
    low, high = domain or accuracy_domain(rows)
    height = 30 * len(rows)
    x = Scale(low, high, 136, NARROW - 54)
    body = [_grid(x, ticks(low, high, 4), 6, height + 6)]
    for row in rows:
        if row.baseline:
            at = f"{x(row.value):.1f}"
            body.append(f'<line class="reference" x1="{at}" x2="{at}" y1="6" y2="{height + 6}"/>')
    for i, row in enumerate(rows):
        y = 21 + 30 * i
        style = "baseline" if row.baseline else "warning" if row.warning else "s1"
        hint = f"{row.label}: {row.value:.1%} [{row.low:.1%}, {row.high:.1%}]"
        body.append(f'<g class="interval {style}"><title>{escape(hint)}</title>')
        body.append(f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot {style}" cx="{x(row.value):.1f}" cy="{y}" r="4.5"/></g>')
        body.append(_text(128, y + 4, _short(row.label, 20), "name", "end"))
        body.append(_text(NARROW - 4, y + 4, f"{row.value:.1%}", "value", "end"))
    body.append(_x_axis(x, height + 6, "", percent=True, count=4))
    told = "; ".join(f"{r.label} {r.value:.1%} [{r.low:.1%}, {r.high:.1%}]" for r in rows)
    return _svg(key, title, told, NARROW, height + 30, body)


def accuracy_domain(rows: Sequence[Interval]) -> tuple[float, float]:
    """Round bounds in [0, 1] that hold all intervals, so that several plots can share an axis."""
    finite = [v for row in rows for v in row[1:4] if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    return max(0.0, math.floor(min(finite) * 20) / 20), min(1.0, max(0.05, math.ceil(max(finite) * 20) / 20))


def bar_plot(key: str, title: str, bars: Sequence[Bar], chance: float = 0.5) -> str:
    """Horizontal bars of values in [0, 1] that start at 0, the best in colour, with a line at chance."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return _empty(key, title, NARROW, 120)
    height, best = 32 * len(bars), max(bar.value for bar in bars)
    x = Scale(0, 1, 136, NARROW - 54)
    body = [_grid(x, [0, 0.25, 0.5, 0.75, 1], 18, height + 18)]
    for i, bar in enumerate(bars):
        y = 24 + 32 * i
        style = "s1" if bar.value == best else "plain"
        width = x(min(1.0, max(0.0, bar.value))) - x(0)
        hint = escape(f"{bar.label}: {bar.value:.3f}")
        body.append(f'<rect class="bar {style}" x="{x(0)}" y="{y}" width="{width:.1f}" height="20" rx="2">')
        body.append(f"<title>{hint}</title></rect>")
        body.append(_text(128, y + 14, _short(bar.label, 20), "name", "end"))
        body.append(_text(NARROW - 4, y + 14, f"{bar.value:.3f}", "value", "end"))
    at = f"{x(chance):.1f}"
    body.append(f'<line class="reference strong" x1="{at}" x2="{at}" y1="16" y2="{height + 18}"/>')
    body.append(_text(x(chance), 11, "chance", "tick", "middle"))
    body.append(_x_axis(x, height + 18, "", count=4))
    told = "; ".join(f"{bar.label} {bar.value:.3f}" for bar in bars) + f"; chance is {chance}"
    return _svg(key, title, told, NARROW, height + 42, body)


def salience_bar(value: float) -> str:
    """A bar from the middle: right (safe) for positive, left (unsafe) for negative values in [-1, 1]."""
    value = max(-1.0, min(1.0, value)) if math.isfinite(value) else 0.0
    start, width = (100.0, 100 * value) if value >= 0 else (100 + 100 * value, -100 * value)
    style = "safe" if value >= 0 else "unsafe"
    return (
        '<svg class="saliencebar" viewBox="0 0 200 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" x="0" y="2" width="200" height="4"/><rect class="bar {style}" x="{start:.1f}" y="0" '
        f'width="{width:.1f}" height="8"/><line class="zero" x1="100" x2="100" y1="0" y2="8"/></svg>'
    )


def _column(history: Sequence[Mapping[str, float]], name: str) -> tuple[tuple[float, float], ...]:
    return tuple((float(row.get("step", i)), float(row[name])) for i, row in enumerate(history) if name in row)


def _finite(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a, b in points if math.isfinite(a) and math.isfinite(b))


def _thinned(points: Sequence[tuple[float, float]], limit: int = 400) -> list[tuple[float, float]]:
    every = math.ceil(len(points) / limit)
    return [*points[:-1:every], points[-1]]


def _padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    if low == high:
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - share * (high - low), high + share * (high - low)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Label heights at least `gap` apart, in the given order of rows."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, here in pairwise(order):
        placed[here] = max(placed[here], placed[before] + gap)
    return placed


def _dodged(x: Scale, marks: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int, int, float]]:
    """Marks (value, feature, sign) with a level each, so that neighbours do not cover each other."""
    last: list[float] = []
    placed = []
    for value, feature, sign in marks:
        at = x(value)
        level = next((i for i, edge in enumerate(last) if at - edge >= 9), len(last))
        last[level : level + 1] = [at]
        placed.append((at, min(level, 18), feature, sign, value))
    return placed


def _short(label: str, limit: int) -> str:
    """The label with its middle left out, since the names of models differ most at their ends."""
    return label if len(label) <= limit else f"{label[: limit - 9]}…{label[-8:]}"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _column_bar(left: float, right: float, top: float, bottom: float, style: str, hint: str) -> str:
    if bottom - top <= 0:
        return ""
    width = max(0.5, right - left - 1)
    shape = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="{style}" {shape}><title>{escape(hint)}</title></rect>'


def _grid(x: Scale, at: Sequence[float], top: float, bottom: float) -> str:
    lines = (f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{top}" y2="{bottom}"/>' for v in at)
    return "".join(lines)


def _x_axis(x: Scale, y: float, label: str, *, percent: bool = False, count: int = 6) -> str:
    parts = [f'<line class="axis" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{y}" y2="{y}"/>']
    for value in ticks(x.low, x.high, count):
        name = f"{value:.0%}" if percent else number(value)
        parts.append(_text(x(value), y + 17, name, "tick", "middle"))
    if label:
        parts.append(_text((x.start + x.stop) / 2, y + 36, label, "label", "middle"))
    return "".join(parts)


def _y_axis(y: Scale, x: Scale, at: Sequence[float] | None = None, names: Sequence[str] | None = None) -> str:
    at = ticks(y.low, y.high, 4) if at is None else at
    names = [number(value) for value in at] if names is None else names
    parts = []
    for value, name in zip(at, names, strict=True):
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.stop}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(_text(x.start - 7, y(value) + 4, name, "tick", "end"))
    return "".join(parts)


def _empty(key: str, title: str, width: int, height: int) -> str:
    body = [_text(width / 2, height / 2, "nothing to show", "label", "middle")]
    return _svg(key, title, "There is no data for this plot.", width, height, body)


def _svg(key: str, title: str, told: str, width: int, height: float, body: Sequence[str]) -> str:
    size = "wide" if width == WIDE else "narrow"
    return (
        f'<svg class="plot {size}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(told)}</desc>{"".join(body)}</svg>'
    )
