"""Every preference format there is, and how a row is read by one, or its format recognised.

A format is one declaration, `PreferenceFormat`, in a module of its own, and one entry here.
"""

from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType

from safer_ray.errors import UserError
from safer_ray.formats.benchmarks import HHH, LLMBAR, REWARDBENCH, REWARDBENCH2, RM_BENCH
from safer_ray.formats.chosen_rejected import CANONICAL, HH_RLHF, SKYWORK, TRL_EXPLICIT, TRL_IMPLICIT, ULTRAFEEDBACK
from safer_ray.formats.declaration import (
    Options,
    Pair,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
    bare,
)
from safer_ray.formats.nectar import NECTAR
from safer_ray.formats.pku import PKU_SAFERLHF

FORMATS: dict[str, PreferenceFormat] = {
    known.name: known
    for known in (  # a row is taken for the first that it fits: those that ask for more come first
        LLMBAR,
        HHH,
        PKU_SAFERLHF,
        REWARDBENCH2,
        RM_BENCH,
        REWARDBENCH,
        ULTRAFEEDBACK,
        CANONICAL,
        TRL_EXPLICIT,
        HH_RLHF,
        SKYWORK,
        TRL_IMPLICIT,
        NECTAR,
    )
}
AUTO = "auto"  # in a config: the format that most rows at the head of a file fit
NONE: Options = MappingProxyType({})
MARGINS = ("label_margin", "margin", "preference_strength")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def expanded(row: Row, format: str, options: Options = NONE) -> list[Row]:
    """The rows that `read_pair` takes of one row of `format`: mostly itself.

    Raises:
        Refused: the row holds no usable pair; the text says why.
    """
    expand = FORMATS[format].expand
    return [row] if expand is None else expand(row, options)


def read_pair(row: Row, format: str, options: Options = NONE) -> Pair:
    """One row of `format` as a pair, with its margin and its labels.

    Raises:
        Refused: the row is no usable pair; the text says why.
    """
    pair = FORMATS[format].read(row, options)
    if bare(pair.chosen) == bare(pair.rejected):
        raise Refused("equal responses")
    margin, used, labels = pair.label_margin, set(pair.used), dict(pair.labels)
    for name in MARGINS:
        if margin is None and (margin := as_number(row.get(name))) is not None:
            used.add(name)
            if name == "preference_strength" and margin == 0:
                raise Refused("no preference: preference_strength is 0")
    for one, two in SCORES:
        high, low = as_number(row.get(one)), as_number(row.get(two))
        if margin is None and high is not None and low is not None:
            margin = as_number(high - low)
            used |= {one, two}
    for name in ("labels", "meta"):
        mapping = as_mapping(row.get(name))
        if mapping is None:
            continue
        if name == "labels" or not any(isinstance(value, dict | list) for value in mapping.values()):
            used.add(name)  # a meta mapping with more than scalars rides along whole, too
        for key, value in mapping.items():
            if value is not None and (name == "labels" or not isinstance(value, dict | list)):
                labels.setdefault(key, as_text(value))
    return Pair(pair.prompt, pair.chosen, pair.rejected, margin, labels, frozenset(used))


def row_format(row: Row) -> str | None:
    """The format that a row's columns fit, None for none."""
    return next((known.name for known in FORMATS.values() if known.fits(row)), None)


def option_values(option: str) -> tuple[str, ...]:
    """The values that an option of a source may have, over all formats that know it."""
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


def detect_format(rows: Sequence[Row]) -> str:
    """The format that most of the rows fit.

    Raises:
        UserError: no row fits a supported format.
    """
    counts = Counter(name for row in rows if (name := row_format(row)))
    if counts:
        return counts.most_common(1)[0][0]
    columns = sorted({column for row in rows for column in row})
    supported = "; ".join(f"{known.name} ({known.told})" for known in FORMATS.values())
    raise UserError(f"no preference format fits the columns {columns}; rename them to one of: {supported}")
