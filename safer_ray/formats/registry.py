"""Every preference format there is, and how a row is read by one, or its format recognised.

A format is one declaration, `PreferenceFormat`, and one entry here.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from safer_ray.errors import UserError
from safer_ray.formats import chosen_rejected as sides
from safer_ray.formats.benchmarks import HHH, LLMBAR, REWARDBENCH, REWARDBENCH2, RM_BENCH
from safer_ray.formats.canonical import (
    PROMPTS,
    by_any_prompt,
    canonical,
    check_nothing_dropped,
    first_prompt,
    with_system,
    without_lists,
)
from safer_ray.formats.declaration import (
    NOTED,
    OWN_MARGIN,
    Options,
    Pair,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
)
from safer_ray.formats.matched import KTO, MATCHED_ROWS, UNMATCHED, WILDGUARDMIX
from safer_ray.formats.messages import say_the_same
from safer_ray.formats.notes import notes_of
from safer_ray.formats.pku import PKU_SAFERLHF
from safer_ray.formats.ranked import DISTILABEL, NECTAR, ULTRAFEEDBACK_RAW
from safer_ray.formats.tables import ANY, Table, as_told, check_table, table_of
from safer_ray.formats.two_responses import (
    ARENA,
    ARENA_CONVERSATIONS,
    HELPSTEER2,
    HELPSTEER3,
    NAMED_RESPONSES,
    SHP,
    STACK_EXCHANGE,
)

FORMATS: dict[str, PreferenceFormat] = {
    known.name: known
    for known in (  # a row is taken for the first that it fits: those that ask for more come first
        LLMBAR,
        HHH,
        PKU_SAFERLHF,
        REWARDBENCH2,
        RM_BENCH,
        REWARDBENCH,
        HELPSTEER2,
        HELPSTEER3,
        ARENA,
        ARENA_CONVERSATIONS,
        SHP,
        STACK_EXCHANGE,
        NAMED_RESPONSES,
        MATCHED_ROWS,
        sides.ULTRAFEEDBACK,
        sides.CANONICAL,
        sides.TRL_EXPLICIT,
        sides.HH_RLHF,
        sides.SKYWORK,
        sides.TRL_IMPLICIT,
        sides.ALPACA,
        sides.QUESTION,
        sides.QUERY,
        sides.MESSAGES,
        sides.SHAREGPT,
        sides.CONVERSATION,
        sides.HISTORY,
        sides.CONTEXT,
        sides.INPUT,
        NECTAR,
        ULTRAFEEDBACK_RAW,
        DISTILABEL,
        WILDGUARDMIX,
        KTO,
    )
}
AUTO = "auto"  # in a config: the format that most rows at the head of a file fit
CARRIED = "carried"  # the option that names columns which no reader of a row sees, joined by commas
MOST_NAMED, NAME_CHARS = 8, 24  # columns that an error names, and characters of each
NOTHING: frozenset[str] = frozenset()
NONE: Options = MappingProxyType({})
MARGINS = ("label_margin", "margin", "preference_strength", "score_margin", "reward_margin", "score_diff")
_MEASURES = ("score", "rating", "avg_rating", "votes", "reward", "rewards", "rm_score")
SCORES = (  # of the two sides, under the names that data sets give them
    *((f"{name}_chosen", f"{name}_rejected") for name in _MEASURES),
    *((f"chosen_{name}", f"rejected_{name}") for name in _MEASURES),
    *((f"chosen-{name}", f"rejected-{name}") for name in ("score", "rating")),
)
BY_SIDE = ("scores", "ratings", "votes", "rewards")  # mappings of `chosen` and `rejected` to numbers


_BY_FIRST_PROMPT = (canonical, by_any_prompt, sides.ultrafeedback)  # whose prompt is the first that a row has
EVIDENCE = (*((name,) for name in MARGINS), *SCORES)  # columns of margins, in the order in which they are read
_EVIDENCE = frozenset((*MARGINS, *BY_SIDE, *(one for one, _ in SCORES)))
_NUMBERS = frozenset((*MARGINS, *(name for both in SCORES for name in both)))


def expanded(row: Row, format: str, options: Options = NONE) -> list[Row]:
    """Return the rows that `read_pair` takes of one row of `format`: mostly itself.

    Raises:
        Refused: the row holds no usable pair; the text says why.
    """
    expand = FORMATS[format].expand
    return [row] if expand is None else expand(row, options)


def without_carried(row: Row, options: Options) -> Row:
    """Return what readers see of a row: all but the columns that a source says to carry along."""
    carried = options.get(CARRIED, "").split(",") if CARRIED in options else ()
    return {name: value for name, value in row.items() if name not in carried} if carried else row


def read_pair(row: Row, format: str, options: Options = NONE, table: Table = ANY) -> Pair:
    """Return one row of `format` as a pair, with its margin, its labels and notes on it; `table` is what is known of
    the file that it comes from.

    Raises:
        Refused: the row is no usable pair; the text says why.
    """
    known = FORMATS[format]
    row, told = as_told(without_carried(row, options), table)
    if row.keys() >= sides.SIDES:
        row = without_lists(row, (*sorted(sides.SIDES), first_prompt(row) or "prompt"))
    pair = with_system(row, known.read(row, options))
    pair = check_nothing_dropped(row, pair)
    if say_the_same(pair.chosen, pair.rejected):
        raise Refused("equal responses")
    margin, used, of_margin = _margin(row, pair, known, table)
    labels = dict(pair.labels)
    for name in ("labels", "meta"):
        mapping = as_mapping(row[name]) if name in row else None
        if mapping is None:
            continue
        whole = True
        for key, value in mapping.items():
            if name == "meta" and isinstance(value, dict | list):
                whole = False
            elif value is not None:
                labels.setdefault(key, as_text(value))
        if whole:
            used = used | {name}  # a meta mapping with more than scalars rides along, too
    notes = (*notes_of(row, pair), *told, *of_margin, *filter(None, (table.note,)))
    used = used | {NOTED, OWN_MARGIN}.intersection(row)
    for name in sorted(_NUMBERS.intersection(row)):
        if row[name] not in (None, "") and as_number(row[name]) is None:
            notes = (*notes, f"{name} is no number, and not read")
    return Pair(pair.prompt, pair.chosen, pair.rejected, margin, labels, pair.used | used, notes)


class _Margin(NamedTuple):
    """By how much a row's own numbers prefer the chosen response, the columns that say it, and notes on others."""

    margin: float | None = None  # below 0 it contradicts the label
    columns: frozenset[str] = NOTHING
    notes: tuple[str, ...] = ()


def _margin(row: Row, pair: Pair, known: PreferenceFormat, table: Table) -> _Margin:
    if OWN_MARGIN in row:
        return _Margin(as_number(row[OWN_MARGIN]))
    if not _EVIDENCE.isdisjoint(row):
        notes: tuple[str, ...] = ()
        if known.ordered:
            told = [name for name in MARGINS if as_number(row.get(name)) is not None]
            row = {name: value for name, value in row.items() if name not in told}
            notes = tuple(
                f"{name} is carried and not read: it may be the first response's less the second's" for name in told
            )
        found = _margin_of_columns(row, table)
        if found.margin is not None or found.notes or notes:
            return found._replace(notes=(*notes, *found.notes))
    return _Margin(_margin_of_generations(row, pair)) if "generations" in row else _Margin()


def _margin_of_columns(row: Row, table: Table) -> _Margin:
    """Return the margin by the columns that have it in the row's table, else by the first that have one; a note tells
    where others contradict it."""
    if row.get("preference_strength") is not None and as_number(row["preference_strength"]) == 0:
        raise Refused("no preference: preference_strength is 0")
    found = [(names, margin) for names in EVIDENCE if (margin := _difference(*_of(row, names))) is not None]
    found += [((name,), margin) for name in BY_SIDE if (margin := _of_sides(row.get(name))) is not None]
    wanted = next((each for each in found if table.margin in ((), each[0])), None)
    if wanted is None:
        return _Margin()
    names, margin = wanted
    if table.unrated and -1 in _of(row, names):
        return _Margin(notes=(f"a rating of {' or '.join(names)} is -1, which is none where no other is below 0",))
    others = [" and ".join(each) for each, other in found if other * margin < 0]
    told = tuple(f"{name} contradicts {' and '.join(names)}, by which the margin is read" for name in others)
    return _Margin(margin, frozenset(names), told)


def _of(row: Row, names: Sequence[str]) -> list[Any]:
    return [row.get(name) for name in names]


def _of_sides(both: Any) -> float | None:
    return _difference(both.get("chosen"), both.get("rejected")) if isinstance(both, dict) else None


def _difference(one: Any, two: Any = 0) -> float | None:
    high, low = as_number(one), as_number(two)
    return None if high is None or low is None else as_number(high - low)


def _margin_of_generations(row: Row, pair: Pair) -> float | None:
    """Return the margin by the ratings of `generations`, of which the sides are two."""
    texts, ratings = row.get("generations"), row.get("rating", row.get("ratings"))
    if not isinstance(texts, list) or not isinstance(ratings, list) or len(texts) != len(ratings):
        return None
    known = {text.strip(): rating for text, rating in zip(texts, ratings, strict=True) if isinstance(text, str)}
    sides = [known.get(side[-1]["content"].strip()) for side in (pair.chosen, pair.rejected)]
    return _difference(*sides)


def row_format(row: Row) -> str | None:
    """Return the format that a row's columns fit, None for none."""
    return next((known.name for known in FORMATS.values() if known.fits(row)), None)


def format_of(row: Row) -> str:
    """Return the format that one row's columns fit.

    Raises:
        Refused: they fit none; the text says what is missing.
    """
    if (name := row_format(row)) is not None:
        return name
    if row.keys() >= sides.SIDES:
        raise Refused(_no_prompt(row.keys()))
    missing = [column for column in sides.CANONICAL.columns if column not in row]
    if len(missing) < len(sides.CANONICAL.columns):
        raise Refused(f"missing column: {missing[0]}")
    told = ", ".join(sorted(row)[:8]) or "(none)"
    raise Refused(f"wanted prompt, chosen and rejected, or another preference format; got the keys {told}")


def _no_prompt(columns: Collection[str]) -> str:
    return (
        f"no column holds the prompt of chosen and rejected (columns: {sorted(columns)}); rename it to one of "
        f"{', '.join(PROMPTS)}; where both plain texts begin with it, say format: trl_implicit "
        "(--format trl_implicit)"
    )


def option_values(option: str) -> tuple[str, ...]:
    """Return the values that an option of a source may have, over all formats that know it."""
    return tuple(dict.fromkeys(value for known in FORMATS.values() for value in known.options.get(option, ())))


def check_options(format: str, options: Options) -> None:
    """Raises UserError: the format knows no such option, or no such value of it."""
    for option, value in options.items():
        values = FORMATS[format].options.get(option)
        if values is None:
            raise UserError(
                f"{option}: {value} means nothing in format {format}, which has no such option; leave it out"
            )
        if value not in values:
            raise UserError(f"{option}: {value!r} is unknown to format {format}; choose one of {', '.join(values)}")


def look_at(rows: Sequence[Row], asked: str = AUTO, options: Options = NONE) -> Table:
    """Return the format of the rows at the head of a file, the one that is `asked` for or else that most of them fit,
    and what they say of the others.

    Raises:
        UserError: no row fits a supported format, or they say other than their format, that nobody asked for, has it.
    """
    seen = [without_carried(row, options) for row in rows]
    if asked != AUTO:
        return _table(seen, asked, options)
    if not seen:
        return Table("canonical")
    format = detect_format(seen)
    check_table([row for row in seen if row_format(row) == format], format)
    return _table(seen, format, options)


def _table(rows: Sequence[Row], format: str, options: Options) -> Table:
    made: list[Row] = []
    for row in rows:
        with suppress(Refused):
            made += expanded(row, format, options) if UNMATCHED not in row else ()
    table = table_of(made, format, EVIDENCE)
    return table if FORMATS[format].read in _BY_FIRST_PROMPT else table._replace(prompt="")


def detect_format(rows: Sequence[Row]) -> str:
    """Return the format that most of the rows fit.

    Raises:
        UserError: no row fits a supported format.
    """
    counts = Counter(name for row in rows if (name := row_format(row)))
    if counts:
        return counts.most_common(1)[0][0]
    columns = sorted({column for row in rows for column in row})
    if set(columns) >= sides.SIDES:
        raise UserError(_no_prompt(columns))
    raise UserError(
        f"no preference format fits the columns {_some(columns)}; {_nearest(columns)}; all are listed in "
        "docs/layouts.md; a file that is no data is left out by a glob, say *.jsonl"
    )


def _some(columns: Sequence[str]) -> str:
    shown = [name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…" for name in columns[:MOST_NAMED]]
    return f"{', '.join(shown) or '(none)'}{f' and {more} more' if (more := len(columns) - len(shown)) else ''}"


def _nearest(columns: Collection[str]) -> str:
    """Return the layout that lacks the fewest columns, and which, or that it has all and wants other values."""
    detected = [known for known in FORMATS.values() if known.detected and set(known.columns) & set(columns)]
    if not detected:
        return f"the simplest is canonical: {sides.CANONICAL.told}"
    lacks = {known.name: [name for name in known.columns if name not in columns] for known in detected}
    near = min(detected, key=lambda known: (len(lacks[known.name]), -len(known.columns)))
    missing = lacks[near.name]
    told = f"without {', '.join(missing)}" if missing else "with other values in them"
    return f"nearest is {near.name} ({near.told}), {told}"
