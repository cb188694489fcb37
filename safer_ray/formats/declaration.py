"""The parts of preference formats: the declaration of one, pairs, refusals and values."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from safer_ray.schema import to_json

Messages = list[dict[str, str]]
Row = dict[str, Any]
Options = Mapping[str, str]  # what a source says of how its rows are read, by option
REASON_CHARS = 300
MOST_PAIRS = 10_000  # of one row
MAX_DEPTH = 200  # of lists and mappings in each other
NO_PREFERENCE = "no preference"  # how reasons of ties begin: they are left out, and count as no damage of a file
NOTED = "safer_ray_notes"  # the column of notes in rows that are made of others
OWN_MARGIN = "safer_ray_margin"  # of the margin that a layout's own numbers tell, in rows that are made of others
LARGEST = 3.4028234663852886e38  # number that float32 holds


class Refused(Exception):  # noqa: N818  # a verdict on a row, no error
    """A row that is no usable pair; the text is the reason, cut where it quotes a long value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if len(reason) <= REASON_CHARS else f"{reason[: REASON_CHARS - 1]}…")


class Pair(NamedTuple):
    """The pair that a format reads from one row. `used` are the columns it accounts for; the others ride along as
    extras. `notes` say what was done to its texts, or should be known of them."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    label_margin: float | None = None
    labels: Mapping[str, str] = MappingProxyType({})
    used: frozenset[str] = frozenset({"prompt", "chosen", "rejected"})
    notes: tuple[str, ...] = ()


class Half(NamedTuple):
    """A row of a data set that holds one response a row: its prompt, its side of a pair, the response, labels (those
    `shared` are the prompt's), its other columns, and notes on them."""

    prompt: Any
    side: Literal["chosen", "rejected"]
    response: Any
    labels: Mapping[str, str]
    shared: frozenset[str]
    rest: Mapping[str, Any]
    notes: tuple[str, ...] = ()


Reader = Callable[[Row, Options], Pair]
Expander = Callable[[Row, Options], list[Row]]
Halver = Callable[[Row], Half]


@dataclass(frozen=True)
class PreferenceFormat:
    """All that is known of a format; `registry.FORMATS` holds every one.

    `read` makes a pair of a row. Where a row holds other columns, or several pairs, `expand` first makes rows of it
    that `read` takes. Both are pure functions that raise `Refused`, with the reason, for a row that is no usable pair.
    """

    name: str
    columns: tuple[str, ...]  # that a row must have
    told: str  # the columns, for people
    read: Reader
    expand: Expander | None = None
    holds: Callable[[Row], bool] | None = None  # what must hold besides, for a row to be taken for this format
    several: bool = False  # whether a row may hold more than one pair where its source says nothing
    match: Halver | None = None  # of a data set with one response a row: pairs are rows of one prompt, one a side
    detected: bool = True  # False: taken only where a config names it
    ordered: bool = (
        False  # whether a row has a first and a second response: its margins may be the first's less the other's
    )
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a source, and their values, default first

    def fits(self, row: Row) -> bool:
        """Return whether a row's columns are those of this format."""
        return self.detected and row.keys() >= self._wanted and (self.holds is None or self.holds(row))

    @cached_property
    def _wanted(self) -> frozenset[str]:
        return frozenset(self.columns)


def check_count(pairs: int) -> None:
    """Raises Refused: a row would be cut into more pairs than any data set has in one, and than memory might hold."""
    if pairs > MOST_PAIRS:
        raise Refused(f"too many pairs in a row: {pairs}, limit {MOST_PAIRS}")


# Values


def _finite(text: str) -> float | None:
    """A number, null where it is too large for one, as infinities are: no JSON can hold it again."""
    return number if math.isfinite(number := float(text)) else None


def _with_keys_apart(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping. Of a key that stands twice json would keep the last value without a word."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Refused(f"key twice: {twice} stands twice in a mapping; leave one of them")
    return made


_DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite, object_pairs_hook=_with_keys_apart)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a surrogate pair


def parsed_json(raw: str) -> Any:
    """Return what a JSON text says; NaN and infinities become null.

    Raises:
        Refused: it is no JSON, has a key twice, holds half a surrogate pair, or is nested deeper than `MAX_DEPTH`,
            which any process can read and write, however deep in calls it is itself.
    """
    try:
        value = _decoded(raw)
        if raw.count("[") + raw.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if _HALF.search(raw):
            to_json(value).encode()
    except UnicodeEncodeError:
        raise Refused("bad UTF-8: a lone surrogate is escaped in the text") from None
    except RecursionError:
        raise Refused(f"nested too deep: more than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise Refused(f"not JSON: {error}") from None
    return value


def _decoded(raw: str) -> Any:
    """Return what `_DECODER` does, without its two searches for blanks around the value where there are none."""
    if raw[:1] == "{":
        value, end = _DECODER.raw_decode(raw)
        if end == len(raw):
            return value
    return _DECODER.decode(raw)


def _depth(value: Any) -> int:
    """Return how many lists and mappings lie in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def type_name(value: Any) -> str:
    """Return what a JSON value is, in the words of the reasons."""
    names = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", dict: "mapping"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def as_text(value: Any) -> str:
    """A label value as text: strings as they are, anything else as JSON."""
    if isinstance(value, str):
        return value
    return repr(value) if type(value) is int else to_json(value)  # as JSON has it, in a fifth of the time


def as_number(value: Any) -> float | None:
    """A finite number that float32 can hold, also one written as text (CSV), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (isinstance(value, str) and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # so is NaN


def as_flag(value: Any) -> bool | None:
    """A truth value, also one written as 1 or 0 or as text (CSV), else None."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    number = int(value) if isinstance(value, bool) else as_number(value)
    return bool(number) if number in (0, 1) else None


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, also an Arrow map (a list of key and value pairs), else None."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value):
        return {as_text(key): content for key, content in value}
    return None


def required(row: Row, name: str) -> Any:
    """A text or list of messages; null counts as empty text."""
    if name not in row:
        raise Refused(f"missing column: {name}")
    value = row[name]
    if isinstance(value, str) and value and not value.isspace():
        return value
    if value is None or isinstance(value, str) or value == []:
        raise Refused(f"empty text: {name}")
    if not isinstance(value, (list, dict)):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text or messages")
    return value


def required_text(row: Row, name: str) -> str:
    value = required(row, name)
    if not isinstance(value, str):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted text")
    return value


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def identity(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the user's key of a row, and the column that it stands in; None, None where it has none."""
    for name in ("pair_id", "id", "uid"):
        value = row.get(name)
        if value is None or value == "" or isinstance(value, bool):
            continue
        if isinstance(value, str | int | float):
            return as_text(value), name
    return None, None
