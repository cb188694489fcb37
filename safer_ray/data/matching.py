"""Pairs out of data sets that hold one response a row: rows of one prompt, one a side, written to a file of pairs.

The file lies under SAFER_RAY_CACHE (default ~/.cache/safer_ray), named by the source's stamp, and is made once.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray import schema
from safer_ray.data.rows import parse_row
from safer_ray.formats.declaration import NOTED, Half, Halver, Options, Refused, Row, check_count, digest
from safer_ray.formats.matched import MATCHED, PAIRS, UNMATCHED
from safer_ray.formats.messages import spoken
from safer_ray.formats.registry import CARRIED, FORMATS, without_carried
from safer_ray.formats.tables import Table, as_told
from safer_ray.schema import RAW_LIMIT
from safer_ray.storage.files import move, stamp
from safer_ray.storage.locations import cache_folder
from safer_ray.storage.rows import read_rows

ALONE = "no preference: no other row of this prompt has the other label, or a pair has them"
VERSION = 2  # of what is written
log = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """Rows of a file that are read, and how."""

    path: Path
    table: Table
    options: Options
    limit: int
    encoding: str | None


class _Sides(NamedTuple):
    """Positions of a prompt's rows, by side."""

    chosen: list[int]
    rejected: list[int]


def matched_file(path: Path, table: Table, options: Options, limit: int, encoding: str | None = None) -> Path:
    """Return the file of what the first `limit` rows of a file make: pairs as `prompt`, `chosen`, `rejected` and
    `labels`; and the rows without a partner or with a reason to refuse them, each with that.

    Raises:
        UserError: the file is damaged.
    """
    kind = options.get("pairs", PAIRS[0])
    carried = options.get(CARRIED, "")
    name = digest(schema.to_json([str(path), *stamp(path), table, kind, carried, limit, encoding, VERSION]))[:20]
    made = cache_folder("matched") / f"{name}.jsonl"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        begun = made.with_name(f".{name}-{os.getpid()}")
        _write(_Rows(path, table, options, limit, encoding), kind, begun)
        move(begun, made)
    log.warning("%s: rows of one response each (format %s) are matched by their prompts", path, table.format)
    return made


def _write(source: _Rows, kind: str, out: Path) -> None:
    by_prompt: dict[str, _Sides] = {}
    for position, half in _halves(source):
        if not isinstance(half, _Bad):
            sides = by_prompt.setdefault(_key(half), _Sides([], []))
            getattr(sides, half.side).append(position)
    with out.open("w", encoding="utf-8") as stream:
        stream.writelines(schema.to_json(row) + "\n" for row in _pairs(source, _partners(by_prompt.values(), kind)))


def _partners(prompts: Iterable[_Sides], kind: str) -> dict[int, list[int]]:
    """Return the partners of each row that has some, by position."""
    partners: dict[int, list[int]] = {}
    for chosen, rejected in prompts:
        if kind == "one":
            pairs = list(zip(chosen[:1], rejected[:1], strict=False))
        else:
            check_count(len(chosen) * len(rejected))
            pairs = [(one, other) for one in chosen for other in rejected]
        for one, other in pairs:
            partners.setdefault(one, []).append(other)
            partners.setdefault(other, []).append(one)
    return partners


def _pairs(source: _Rows, partners: Mapping[int, Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair, where the later of its rows stands, and one for each row that is in none; a row is
    held until its last partner came."""
    held: dict[int, Half] = {}
    left = {position: len(others) for position, others in partners.items()}
    for position, half in _halves(source):
        if isinstance(half, _Bad) or position not in partners:
            reason = half.reason if isinstance(half, _Bad) else ALONE
            raw = half.raw if isinstance(half, _Bad) else schema.to_json(half._asdict())
            yield {
                "prompt": raw[:RAW_LIMIT],
                "chosen": "",
                "rejected": "",
                MATCHED: source.table.format,
                UNMATCHED: reason,
            }
            continue
        for other in [other for other in partners[position] if other in held]:
            yield _pair({position: half, other: held[other]}) | {MATCHED: source.table.format}
            for done in (position, other):
                left[done] -= 1
            if not left[other]:
                del held[other]
        if left[position]:
            held[position] = half


def _pair(halves: Mapping[int, Half]) -> dict[str, Any]:
    """Return two rows as one: what each says besides has its side's name before it."""
    labels: dict[str, str] = {}
    row: dict[str, Any] = {}
    notes: set[str] = set()
    for position, half in halves.items():
        row |= {"prompt": half.prompt, half.side: half.response}
        row |= {f"{half.side}_{name}": value for name, value in half.rest.items()}
        labels |= {name if name in half.shared else f"{half.side}_{name}": text for name, text in half.labels.items()}
        labels[f"{half.side}_position"] = str(position)
        notes |= set(half.notes)
    one, other = (half.rest for half in halves.values())
    notes |= {_differ(name) for name in one.keys() & other.keys() if _is_text(one[name]) and one[name] != other[name]}
    told = {NOTED: sorted(notes)} if notes else {}
    return row | told | {"labels": dict(sorted(labels.items()))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value.split()) > 1


def _differ(name: str) -> str:
    return f"the two rows of a pair have one prompt, and differ in {name}, too"


class _Bad(NamedTuple):
    """A row that is none of its format's, and why."""

    raw: str
    reason: str


def _halves(source: _Rows) -> Iterator[tuple[int, Half | _Bad]]:
    """Yield the position of each row, and what it holds or why it is none of the format's rows."""
    match = FORMATS[source.table.format].match
    assert match is not None
    for position, raw, refused in read_rows(source.path, 0, source.limit, encoding=source.encoding):
        try:
            if refused is not None:
                raise Refused(refused)
            half = _half(match, parse_row(raw), source)
        except Refused as reason:
            yield position, _Bad(raw, str(reason))
            continue
        yield position, half


def _half(match: Halver, row: Row, source: _Rows) -> Half:
    """Return what a row holds; columns that are carried ride along."""
    seen, notes = as_told(without_carried(row, source.options), source.table)
    half = match(seen)
    carried = {name: value for name, value in row.items() if name not in seen}
    return half._replace(rest={**half.rest, **carried}, notes=(*half.notes, *notes))


def _key(half: Half) -> str:
    """Return what tells prompts apart: what their messages say, without the whitespace around it."""
    return digest(schema.to_json(spoken(half.prompt)))[:24]
