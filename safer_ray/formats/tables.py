"""Look at several rows of a table together: names that stand for responses, columns that hold messages or lists as
text, labels that may count from 0, the column that the prompt or the margin stands in."""

import ast
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from safer_ray.errors import UserError
from safer_ray.formats.canonical import PROMPTS, SIDES, SYSTEMS
from safer_ray.formats.declaration import Refused, Row, as_flag, as_number, as_text, parsed_json
from safer_ray.formats.messages import ROLES, written_as_json
from safer_ray.schema import to_json

FEWEST = 3  # rows from which on a likeness of all is no chance
NAME_CHARS = 40  # of what may be a name in place of a response
_SPEAKERS = frozenset(("system", "user", "assistant", *ROLES))
_KNOWN = frozenset((*PROMPTS, *SYSTEMS, *SIDES))
THEMSELVES = "where they are the responses themselves, name the format (--format canonical)"


class Table(NamedTuple):
    """Facts about all rows of a file, read in its first ones."""

    format: str = ""
    prompt: str = ""  # the column of the prompt, where one says it; a row in which it is empty has none
    texts: tuple[str, ...] = ()  # columns of plain text, in which what looks like messages in JSON is none
    margin: tuple[str, ...] = ()  # the columns of the margin
    unrated: bool = False  # whether -1 in these is no rating
    note: str = ""  # of every pair

    def to_json(self) -> str:
        return to_json(self._asdict())


ANY = Table()  # of a row that comes alone


def table_from_json(text: str) -> Table:
    """Return the table that `Table.to_json` wrote."""
    values: dict[str, Any] = json.loads(text)
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Table(**(values | lists))


def as_told(row: Row, table: Table) -> tuple[Row, tuple[str, ...]]:
    """Return a row in which what is plain text in its table is a message of it, and notes on that.

    Raises:
        Refused: the column that holds the prompts of the table holds none here.
    """
    if table.prompt and table.prompt in row and _is_empty(row[table.prompt]):
        raise Refused(f"empty text: {table.prompt}")
    held = [name for name in table.texts if _holds_messages(row.get(name))]
    if not held:
        return row, ()
    told = {name: [{"role": "user" if name in PROMPTS else "assistant", "content": row[name]}] for name in held}
    notes = tuple(f"{name} could be messages in JSON, and is taken as text, as most are in its file" for name in held)
    return row | told, notes


def _is_empty(value: Any) -> bool:
    return value in (None, []) or (isinstance(value, str) and not value.strip())


def _holds_messages(value: Any) -> bool:
    """Return whether a text is messages in JSON."""
    with suppress(Refused):
        return isinstance(value, str) and written_as_json(value, "text") is not None
    return False


def _looks_like_messages(value: Any) -> bool:
    """Return whether a text is messages in JSON, or begins as these do."""
    try:
        return isinstance(value, str) and written_as_json(value, "text") is not None
    except Refused:
        return True


# Refusals


def check_table(rows: Sequence[Row], format: str) -> None:
    """Raises UserError where the rows of a table, known by its columns, say other than their layout would have it."""
    if format == "llmbar":
        _check_counting(rows, ("label",), {1, 2}, 0)
    elif format == "pku_saferlhf":
        _check_counting(rows, ("safer_response_id", "better_response_id"), {0, 1}, 2)
    _check_prompts(rows)
    if all(row.keys() >= SIDES for row in rows) and format != "named_responses":
        _check_names(rows)
        _check_python_lists(rows)


def _check_counting(rows: Sequence[Row], columns: Collection[str], wanted: set[int], other: int) -> None:
    """Raises UserError where numbers of the better response are told that count from another number on."""
    for column in columns:
        said = {as_number(row.get(column)) for row in rows}
        missing = min(wanted) if other > min(wanted) else max(wanted)
        if other in said and missing not in said:
            shown = sorted(number for number in said if number is not None)
            numbers = ", ".join(f"{number:g}" for number in shown)
            raise UserError(
                f"{column} is one of {numbers}, wanted {min(wanted)} for the first response and {max(wanted)} for the "
                "second: it may count otherwise; write it anew"
            )


def _check_names(rows: Sequence[Row]) -> None:
    """Raises UserError where `chosen` and `rejected` are names, numbers or ids of responses in place of these."""
    sides = [(_plain(row["chosen"]), _plain(row["rejected"])) for row in rows]
    if not sides or any(len(text) > NAME_CHARS for both in sides for text in both):
        return
    named = [_columns_named(row, *both) or _models_named(row, *both) for row, both in zip(rows, sides, strict=True)]
    first = next(filter(None, named), None)
    shown = f"{as_text(rows[0]['chosen'])!r} and {as_text(rows[0]['rejected'])!r}"
    if first and all(name or set(both) <= _UNDECIDED for name, both in zip(named, sides, strict=True)):
        raise UserError(
            f"chosen and rejected are no responses but names, say {shown} of {first}; write the responses themselves "
            f"into them, or leave both out where another column tells the better one; {THEMSELVES}"
        )
    beside = _longer_texts(rows)
    if len(rows) < FEWEST or len(beside) < 2:
        return
    kind = next((kind for kind, holds in _KINDS if all(holds(text) for both in sides for text in both)), None)
    if kind is not None:
        raise UserError(
            f"chosen and rejected are {kind}, say {shown}, and longer texts stand in {', '.join(beside[:4])}; rename "
            f"the columns so that chosen and rejected are the responses; {THEMSELVES}"
        )


_UNDECIDED = frozenset(("tie", "both", "neither", "none", "draw", ""))
_KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("numbers or truth values", lambda text: as_number(text) is not None or as_flag(text) is not None),
    ("single words", lambda text: text.isascii() and len(text.split()) < 2),
)


def _plain(value: Any) -> str:
    return value.strip().lower() if isinstance(value, str) else as_text(value).lower()


def _columns_named(row: Row, chosen: str, rejected: str) -> str:
    """Return two columns of texts that the sides name, whole or in part: `model_a` of `model_a_response`."""
    if not chosen or not rejected or chosen == rejected:
        return ""
    columns = {name.lower(): name for name, value in row.items() if isinstance(value, str) and name not in SIDES}
    for name, column in columns.items():
        before, found, behind = name.rpartition(chosen)
        other = columns.get(f"{before}{rejected}{behind}")
        apart = (not before or before[-1] in "_- ") and (not behind or behind[0] in "_- ")
        if found and other and apart and max(len(row[column]), len(row[other])) > len(name):
            return f"the columns {column} and {other}"
    return ""


def _models_named(row: Row, chosen: str, rejected: str) -> str:
    """Return the columns of models' names that the sides are."""
    models = {_plain(value): name for name, value in row.items() if "model" in name.lower() and isinstance(value, str)}
    if chosen != rejected and chosen in models and rejected in models:
        return f"the values of {models[chosen]} and {models[rejected]}"
    return ""


def _longer_texts(rows: Sequence[Row]) -> list[str]:
    """Return other columns that hold texts of several words, longer than the sides, in most of the rows."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, str)} - _KNOWN
    counts = {
        name: sum(
            isinstance(text := row.get(name), str)
            and len(text.split()) > 1
            and all(len(text) > len(as_text(row[side])) for side in SIDES)
            for row in rows
        )
        for name in names
    }
    return sorted(name for name, count in counts.items() if 2 * count > len(rows))


def _check_python_lists(rows: Sequence[Row]) -> None:
    for side in ("chosen", "rejected"):
        if len(rows) < 2 or not all(_is_python_list(row[side]) for row in rows):
            return
    raise UserError(
        "chosen and rejected hold lists as Python's repr writes them, say "
        f"{str(rows[0]['chosen'])[:40]!r}; write their texts alone, or the list by json.dumps"
    )


def _is_python_list(value: Any) -> bool:
    if not isinstance(value, str) or not value.startswith("['") or not value.endswith("]"):
        return False
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(found, list) and all(isinstance(text, str) for text in found)


def _check_prompts(rows: Sequence[Row]) -> None:
    """Raises UserError where all prompts are dialogues as JSON in a form that is none of messages."""
    column = _prompt_column(rows)
    forms = {_dialogue_form(value) for row in rows if not _is_empty(value := row.get(column))}
    if not forms or "" in forms:
        return
    raise UserError(
        f"{column} holds {sorted(forms)[0]} as JSON text, and no messages; write a list of messages with role (user, "
        "assistant, system) and content, or plain text"
    )


def _dialogue_form(text: Any) -> str:
    """Return in what form a JSON text holds a dialogue; empty where it holds messages, or something else."""
    if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{") or _looks_like_messages(text):
        return ""
    try:
        value = parsed_json(text)
    except Refused:
        return ""
    if isinstance(value, dict) and value:
        inner = next(iter(value.values())) if len(value) == 1 else None
        speakers = {name.strip().lower() for name in value} <= _SPEAKERS
        return f"mappings of {', '.join(value)}" if speakers or isinstance(inner, list) else ""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) and item for item in value):
        return ""
    has_text = all(any(isinstance(each, str) for each in item.values()) for item in value)
    return f"lists of mappings with the keys {', '.join(value[0])}" if has_text else ""


# What is told of all rows


def table_of(rows: Sequence[Row], format: str, evidence: Sequence[tuple[str, ...]]) -> Table:
    """Return what rows of a format, as they are expanded, say of all; `evidence` are the columns of margins in the
    order in which they are read."""
    held = [names for names in evidence if any(_numbers(row, names) for row in rows)]
    margin = held[0] if held else ()
    numbers = [number for row in rows for number in _numbers(row, margin)] if len(margin) == 2 else []
    others = [number for number in numbers if number != -1]
    unrated = len(others) < len(numbers) and min(others, default=-1) >= 0 and max(others, default=0) > 1
    column = _prompt_column(rows)
    return Table(format, column, tuple(_plain_columns(rows, column)), margin, unrated, _same_prompt(rows, column))


def _numbers(row: Row, names: tuple[str, ...]) -> list[float]:
    found = [number for name in names if (number := as_number(row.get(name))) is not None]
    return found if len(found) == len(names) else []


def _prompt_column(rows: Sequence[Row]) -> str:
    return next((name for name in PROMPTS if any(not _is_empty(row.get(name)) for row in rows)), "")


def _plain_columns(rows: Sequence[Row], prompt: str) -> Iterator[str]:
    """Yield the columns in which some texts look like messages in JSON, and most do not; both sides are of one kind."""
    for names in (("chosen", "rejected"), ("completion",), ("response",), (prompt,)):
        texts = [text for row in rows for name in names if not _is_empty(text := row.get(name))]
        alike = sum(_looks_like_messages(text) or not isinstance(text, str) for text in texts)
        if 2 * alike <= len(texts) and texts:
            yield from names


def _same_prompt(rows: Sequence[Row], prompt: str) -> str:
    """Return a note where all prompts are one text while other texts differ, which may be a part of them."""
    texts = {text if isinstance(text := row.get(prompt), str) else to_json(text) for row in rows}
    if len(rows) < FEWEST or len(texts) != 1 or not prompt:
        return ""
    names = sorted({name for row in rows for name in row} - {*_KNOWN, "completion", "response"})
    varied = [name for name in names if _varies([row.get(name) for row in rows])]
    if not varied:
        return ""
    which = ", ".join(varied[:4])
    return f"the first prompts of the file are all one text, while {which} differs: is that a part of the prompt?"


def _varies(values: Sequence[Any]) -> bool:
    """Return whether values are texts of several words that differ."""
    texts = [value for value in values if isinstance(value, str) and len(value.split()) > 1]
    with suppress(TypeError):
        return len(texts) == len(values) and len(set(texts)) > 1
    return False
