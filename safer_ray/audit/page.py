"""One self-contained HTML page that tells what an audit found (Jinja2, inline SVG, no script)."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from safer_ray.audit.plan import in_words as files_in_words
from safer_ray.data.sources import lines_of
from safer_ray.report.pages import page

WIDTH, HEIGHT = 640, 120
COLUMNS = 40  # of the histogram
KINDS = 12  # of a facet that are shown, those of most pairs


def render(summary: dict[str, Any], worst: Sequence[dict[str, Any]]) -> str:
    """The page of a `summary.json`, with the texts of its most suspicious pairs folded away."""
    facets = {
        facet: sorted(kinds.items(), key=lambda item: _place(facet, *item))[:KINDS]
        for facet, kinds in summary["groups"].items()
        if facet in ("source", "length") or len(kinds) > 1
    }
    filters = {"percent": _percent, "count": "{:,}".format, "number": _number}
    return page("audit.html", filters).render(
        summary=summary, worst=worst, words=in_words(summary), facets=facets, histogram=_histogram(summary["suspicion"])
    )


def _place(facet: str, kind: str, found: dict[str, Any]) -> int:
    """Return what kinds of a facet are ordered by: lengths as they rise, others by their pairs, most first."""
    return int(kind.partition("-")[0].split()[0]) if facet == "length" else -found["pairs"]


def in_words(summary: dict[str, Any]) -> list[str]:
    """Return what the numbers say, in plain sentences."""
    rows, found, quantile = summary["rows"], summary["flag_rate"], summary["flag_quantile"]
    said = [
        f"{rows['read']:,} rows were read: {rows['scored']:,} are scored, {rows['quarantined']:,} are in quarantine.",
        f"{found['flagged']:,} pairs ({_percent(found['rate'])}) are flagged by {summary['detector']}; "
        f"of pairs like the auditor's reference, {_percent(quantile)} would be{_expected(summary)}.",
        f"The reward model contradicts the label of {_percent(summary['against_label'])} of the pairs.",
    ]
    drift = summary["drift"]
    size = "little" if drift["psi"] < 0.1 else "some" if drift["psi"] < 0.25 else "much"
    said.append(
        f"The suspicion of these pairs shows {size} drift from the {drift['reference']:,} reference pairs "
        f"(population stability index {_number(drift['psi'])}, KS distance {_number(drift['ks'])}, "
        f"p {_number(drift['p'])})"
        + ("." if size == "little" else "; look at the flag rates below before trusting it.")
    )
    if cut := summary["truncated"]["pairs"]:
        said.append(
            f"{cut:,} pairs ({_percent(summary['truncated']['share'])}) are longer than the model reads, and were cut."
        )
    said += [f"{line[0].upper()}{line[1:]}." for line in lines_of(summary, rows["scored"])]
    if summary["duplicates"]:
        said.append(f"{summary['duplicates']:,} rows repeat the pair_id of another; all are scored.")
    said += files_in_words(summary["files"])
    if summary["red_team"]:
        said.append("Red team: these pairs, or those that the auditor was built from, were poisoned on purpose.")
    return said


def _expected(summary: dict[str, Any]) -> str:
    """Return what the reference is, and how far the share of flags goes that its size allows."""
    found = summary["reference"]
    if found["kind"] == "in sample":
        return ", and more of new ones, since the model or its features were made by the reference itself"
    if found["low"] is None:
        return ""
    return (
        f" ({_percent(found['low'])} to {_percent(found['high'])} by chance alone: the reference is "
        f"{found['pairs']:,} pairs, {found['kind']})"
    )


def _histogram(bins: Sequence[int]) -> Markup:
    """Pairs by suspicion; a level line is what the reference pairs would give."""
    each = len(bins) // COLUMNS
    counts = [sum(bins[i * each : (i + 1) * each]) for i in range(COLUMNS)]
    top, level, step = max(1, *counts), sum(counts) / COLUMNS, WIDTH / COLUMNS
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{HEIGHT - HEIGHT * n / top:.1f}" width="{step - 2:.1f}" '
        f'height="{HEIGHT * n / top:.1f}"><title>suspicion {i / COLUMNS:.3f} to {(i + 1) / COLUMNS:.3f}: {n:,} pairs'
        f"</title></rect>"
        for i, n in enumerate(counts)
    )
    y = HEIGHT - HEIGHT * level / top
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Pairs by suspicion, 0 to 1">{bars}'
        f'<line x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/></svg>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"  # noqa: RUF001
