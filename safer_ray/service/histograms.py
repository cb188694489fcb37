"""Histograms of the page as inline SVG: pure functions of numbers, coloured by the page's CSS classes."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from safer_ray.report.plots import Scale, number, ticks
from safer_ray.service.api import Histogram, SideHistograms

WIDTH = 460  # user units; text in them is 13 high
LEFT, RIGHT = 10, 450
TOP, BASE = 44, 184  # of the bars in the histogram of the reference
HALF = 80  # height of one side's bars
GAP = 1.0  # between bars


class Spot(NamedTuple):
    """The place of the pair, and what the marker says."""

    value: float
    label: str


def reference_figure(key: str, title: str, histogram: Histogram, spot: Spot, threshold: float | None, axis: str) -> str:
    """The reference pairs as a histogram, the pair's place in it, and the flag threshold where it is of this scale."""
    edges, counts = histogram.edges, histogram.counts
    known = [spot.value, *([] if threshold is None else [threshold]), *edges]
    x = Scale(min(known), max(known), LEFT, RIGHT)
    y = Scale(0, max([*counts, 1]), BASE, TOP + 14)
    body = []
    if threshold is not None:
        cut = x(threshold)
        body.append(f'<rect class="flagged" x="{LEFT}" y="{TOP}" width="{cut - LEFT:.1f}" height="{BASE - TOP}"/>')
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        hint = f"{count:,} reference pairs between {number(low)} and {number(high)}"
        below = threshold is not None and (low + high) / 2 < threshold
        body.append(_bar(x(low), x(high), y(count), BASE, "bar low" if below else "bar", hint))
    if threshold is not None:
        body.append(f'<line class="threshold" x1="{cut:.1f}" x2="{cut:.1f}" y1="{TOP}" y2="{BASE}"/>')
        inside = cut - LEFT > 60
        body.append(_text(cut - 6 if inside else cut + 6, TOP + 12, "flagged", "note", "end" if inside else "start"))
    body.append(_marker(x(spot.value), spot.label))
    body.append(_axis(x, BASE, axis))
    told = f"{sum(counts):,} reference pairs from {number(edges[0])} to {number(edges[-1])}. {spot.label}."
    told += "" if threshold is None else f" Pairs below {number(threshold)} are flagged."
    return _svg(key, title, told, BASE + 46, body)


def sides_figure(key: str, title: str, histogram: SideHistograms) -> str:
    """Return how strongly a feature fires: chosen responses upwards, rejected ones downwards, on one scale."""
    edges, chosen, rejected = histogram.edges, histogram.chosen, histogram.rejected
    x = Scale(edges[0], edges[-1], LEFT + 62, RIGHT)
    middle, most = 16.0 + HALF, max([*chosen, *rejected, 1])
    height = Scale(0, most, 0, HALF)
    body = []
    for up, down, (low, high) in zip(chosen, rejected, pairwise(edges), strict=True):
        between = f"between {number(low)} and {number(high)}"
        body.append(_bar(x(low), x(high), middle - height(up), middle, "bar chosen", f"{up:,} chosen {between}"))
        body.append(
            _bar(x(low), x(high), middle, middle + height(down), "bar rejected", f"{down:,} rejected {between}")
        )
    body.append(f'<line class="axis" x1="{x.start}" x2="{x.stop}" y1="{middle}" y2="{middle}"/>')
    body.append(_text(LEFT + 52, middle - HALF / 2 + 4, "chosen", "name", "end"))
    body.append(_text(LEFT + 52, middle + HALF / 2 + 4, "rejected", "name", "end"))
    body.append(_text(x.start + 4, 13, f"up to {most:,} sentences a bar", "tick", "start"))
    body.append(_axis(x, middle + HALF + 2, "strength of the feature at a sentence"))
    told = f"{sum(chosen):,} sentences of chosen and {sum(rejected):,} of rejected responses, by strength."
    return _svg(key, title, told, middle + HALF + 44, body)


def strength_bar(value: float, strongest: float) -> str:
    """A bar from the left edge, as long as a strength is to the strongest one."""
    width = 100 * min(1.0, max(0.0, value / strongest)) if strongest > 0 else 0.0
    return (
        '<svg class="strength" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" x="0" y="0" width="100" height="6"/>'
        f'<rect class="bar" x="0" y="0" width="{width:.1f}" height="6"/></svg>'
    )


def _bar(left: float, right: float, top: float, bottom: float, style: str, hint: str) -> str:
    if bottom - top <= 0:
        return ""
    width = max(0.5, right - left - GAP)
    return (
        f'<rect class="{style}" x="{left + GAP / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}">'
        f"<title>{escape(hint)}</title></rect>"
    )


def _marker(at: float, label: str) -> str:
    """A line with a triangle on top, and what it says above."""
    shape = f"{at - 6:.1f},{TOP - 16} {at + 6:.1f},{TOP - 16} {at:.1f},{TOP - 6}"
    return (
        f'<line class="spot" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{BASE}"/>'
        f'<polygon class="spot" points="{shape}"/>' + _centred(at, TOP - 24, label, "spot")
    )


def _centred(at: float, y: float, text: str, style: str) -> str:
    """A text above a place, moved inwards where the figure ends."""
    half = 3.6 * len(text)
    return _text(min(max(at, LEFT + half), RIGHT - half), y, text, style, "middle")


def _axis(x: Scale, y: float, name: str) -> str:
    parts = [f'<line class="axis" x1="{x.start}" x2="{x.stop}" y1="{y}" y2="{y}"/>']
    for value in _ticks(x):
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y}" y2="{y + 4}"/>')
        parts.append(_text(x(value), y + 18, number(value), "tick", "middle"))
    parts.append(_text((x.start + x.stop) / 2, y + 37, name, "tick", "middle"))
    return "".join(parts)


def _ticks(x: Scale) -> Sequence[float]:
    return [value for value in ticks(x.low, x.high, 5) if math.isfinite(value)]


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(key: str, title: str, told: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(told)}</desc>'
        f"{''.join(body)}</svg>"
    )
