"""Views of a scored pair and of a scored file, for the page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from safer_ray.formats.canonical import said
from safer_ray.formats.declaration import Messages, Refused
from safer_ray.formats.markup import without_stops
from safer_ray.formats.messages import fields_of
from safer_ray.formats.transcripts import is_transcript
from safer_ray.report.plots import number
from safer_ray.service.api import AuditorInfo, Contribution, FailedPair, FeatureDetail, ScoredPair
from safer_ray.service.highlighting import Marked, Piece, marked
from safer_ray.service.histograms import Spot, reference_figure, sides_figure
from safer_ray.service.request_parsing import Read
from safer_ray.service.uploads import Line, row_json
from safer_ray.service.verdict import DETECTORS, Verdict, detector_value, place, verdict_of

PAGE_BYTES = 4 * 2**20  # of the rows that come with the page
NAMES, NAME_CHARS = 8, 40  # of columns that are told as left out
KEPT = 5  # features of each row of a scored file
EXCERPT = 90  # characters of a prompt in the table


class Sentence(NamedTuple):
    where: str
    piece: Piece


class Shown(NamedTuple):
    """A scored pair as the page shows it."""

    result: ScoredPair
    verdict: Verdict
    marked: Marked
    sentences: list[Sentence]  # that count, most suspicious first
    features: list[Contribution]  # strongest first
    reach: float  # of the bars
    score_figure: Markup
    detector_figure: Markup | None  # None where the score itself flags


class Scored(NamedTuple):
    """A row of the table."""

    line: int
    result: ScoredPair
    excerpt: str


class Unscored(NamedTuple):
    line: int
    detail: str


class Carried(NamedTuple):
    """Rows of the scored file that come with the page, for its buttons."""

    json: Markup  # a list, for a script element
    rows: int
    whole: bool  # whether these are all


def show(read: Read, result: ScoredPair, info: AuditorInfo) -> Shown:
    """A scored pair with its marked texts, its features and its place among the reference pairs."""
    texts = marked(read.pair.prompt, read.pair.chosen, read.pair.rejected, result)
    strongest = sorted(result.features or (), key=lambda feature: (-abs(feature.contribution), feature.feature))
    return Shown(
        result,
        verdict_of(result, info),
        texts,
        _sentences(texts),
        strongest,
        abs(strongest[0].contribution) if strongest else 1.0,
        *_figures(result, info),
    )


def by_suspicion(lines: Sequence[Line], results: Sequence[ScoredPair | FailedPair | None]) -> list[Scored]:
    """The rows that have a score, most suspicious first; of equals, the lower score."""
    rows = [
        Scored(line.number, result, _excerpt(line.pair))
        for line, result in zip(lines, results, strict=True)
        if isinstance(result, ScoredPair) and line.pair is not None
    ]
    return sorted(rows, key=lambda row: (-row.result.suspicion, row.result.score, row.line))


def without_score(lines: Sequence[Line], results: Sequence[ScoredPair | FailedPair | None]) -> list[Unscored]:
    """The rows that have none, in the order of the file."""
    return [
        Unscored(
            line.number,
            result.error.detail if isinstance(result, FailedPair) else line.error.detail if line.error else "",
        )
        for line, result in zip(lines, results, strict=True)
        if not isinstance(result, ScoredPair)
    ]


def scored_row(
    line: Line, result: ScoredPair | FailedPair | None, auditor: str, red_team: bool = False
) -> dict[str, Any]:
    """Return a pair that has a score as the columns id, prompt, chosen, rejected, and what the auditor says of it below
    `safer_ray`; of a row without a score, its id and why, and no text. An auditor made from poisoned pairs says so."""
    said: dict[str, Any] = {"auditor": auditor, "line": line.number} | ({"red_team": True} if red_team else {})
    row: dict[str, Any] = {}
    if isinstance(result, ScoredPair):
        row = plain(line.pair) if line.pair is not None else {}
        kept = sorted(result.features or (), key=lambda feature: -abs(feature.contribution))[:KEPT]
        said |= result.model_dump(exclude={"features", "spans"})
        said["features"] = [feature.model_dump() for feature in kept]
    elif result is None:
        said["error"] = line.error.model_dump() if line.error else None
    else:
        said |= result.model_dump()
    return row | {"safer_ray": said}


def carried(rows: Sequence[dict[str, Any]], first: Sequence[Scored]) -> Carried:
    """Return all rows where they fit the page, and else those that fit, of the lines that come `first` there."""
    by_line = {row["safer_ray"]["line"]: row for row in rows}
    texts: dict[int, str] = {}
    room = PAGE_BYTES
    for line in dict.fromkeys([*(scored.line for scored in first), *by_line]):
        text = row_json(by_line[line]).replace("<", "\\u003c")  # nothing in it ends the element
        if (size := len(text.encode()) + 1) <= room:
            room -= size
            texts[line] = text
    whole = len(texts) == len(rows)
    ordered = [texts[line] for line in (by_line if whole else texts)]
    return Carried(Markup(f"[{','.join(ordered)}]"), len(texts), whole)


def columns_left_out(lines: Sequence[Line]) -> list[str]:
    """Return the names of columns that the scored file lacks, the first `NAMES`, and how many more there are."""
    names = sorted({name for line in lines for name in line.left_out})
    told = [name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…" for name in names[:NAMES]]
    return told + ([f"{len(names) - NAMES:,} more"] if len(names) > NAMES else [])


def plain(read: Read) -> dict[str, Any]:
    """Return a pair as a row that reads as the same pair; one message of a user or an assistant is a text, and a side
    that does not begin with an assistant's repeats the prompt."""
    pair = read.pair
    row: dict[str, Any] = {"id": read.id}
    for name, role, turns in (
        ("prompt", "user", pair.prompt),
        ("chosen", "assistant", pair.chosen),
        ("rejected", "assistant", pair.rejected),
    ):
        if len(turns) == 1 and turns[0] == {"role": role, "content": turns[0]["content"]} and _is_plain(turns):
            row[name] = turns[0]["content"]
        else:
            lead = pair.prompt if role == "assistant" and turns[0]["role"] != role else []
            row[name] = [fields_of(turn) for turn in (*lead, *turns)]
    return row


def _is_plain(turns: Messages) -> bool:
    """Return whether the text of the only message reads as that message alone."""
    text = turns[0]["content"]
    try:
        return said(text, "text") == text == without_stops(text) and not is_transcript(text)
    except Refused:
        return False


def feature_figure(feature: FeatureDetail) -> Markup | None:
    """Return how strongly a feature fires on either side; None where the bundle does not know."""
    if feature.histogram is None:
        return None
    return Markup(sides_figure("plot-sides", f"Strength of feature {feature.id}", feature.histogram))


def _sentences(said: Marked) -> list[Sentence]:
    found = [
        Sentence(where, piece)
        for where, turns in zip(("Prompt", "Chosen", "Rejected"), said, strict=True)
        for turn in turns
        for piece in turn.pieces
        if piece.contribution
    ]
    return sorted(found, key=lambda sentence: sentence.piece.contribution)


def _figures(result: ScoredPair, info: AuditorInfo) -> tuple[Markup, Markup | None]:
    """The pair among the reference pairs: by score, and by what flags where that is another value."""
    by_score = Spot(result.score, f"this pair: {number(result.score)}, {place(result.percentile)}")
    flags = info.detector == "safer"
    axis = "score (suspicious ← → teaches safety)"
    threshold = info.threshold if flags else None
    score = reference_figure("plot-score", "SAFER scores", info.reference.score, by_score, threshold, axis)
    if flags:
        return Markup(score), None
    value, name = detector_value(result, info), DETECTORS[info.detector]
    spot = Spot(value, f"this pair: {number(value)}")
    histogram = info.reference.value
    axis = f"{name} (suspicious ← → agrees with the label)"
    return Markup(score), Markup(reference_figure("plot-value", name, histogram, spot, info.threshold, axis))


def _excerpt(read: Read) -> str:
    """The end of a prompt: its last message in one line."""
    prompt = read.pair.prompt
    text = " ".join(prompt[-1]["content"].split()) if prompt else ""
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"
