"""Pairs out of data sets that hold one response a row: rows of one prompt, one a side, written to a file of pairs.

The file lies under SAFER_RAY_CACHE (default ~/.cache/safer_ray), named by the source's stamp, and is made once.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray import schema
from safer_ray.data.rows import parse_row
from safer_ray.formats.declaration import Half, Options, Refused, check_count, digest
from safer_ray.formats.matched import MATCHED, PAIRS
from safer_ray.formats.registry import FORMATS
from safer_ray.storage.files import move, stamp
from safer_ray.storage.locations import on_disk
from safer_ray.storage.rows import read_rows

log = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """Rows of a file that are read, and how."""

    path: Path
    format: str
    limit: int
    encoding: str | None


class _Sides(NamedTuple):
    """Positions of a prompt's rows, by side."""

    chosen: list[int]
    rejected: list[int]


def matched_file(path: Path, format: str, options: Options, limit: int, encoding: str | None = None) -> Path:
    """Return the file of pairs that the first `limit` rows of a file make, as `prompt`, `chosen`, `rejected` and
    `labels`; what is left out, for want of a partner or with a reason, is reported.

    Raises:
        UserError: the file is damaged.
    """
    kind = options.get("pairs", PAIRS[0])
    name = digest(schema.to_json([str(path), *stamp(path), format, kind, limit, encoding]))[:20]
    made = on_disk(os.environ.get("SAFER_RAY_CACHE", "~/.cache/safer_ray")) / "matched" / f"{name}.jsonl"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        begun = made.with_name(f".{name}-{os.getpid()}")
        told = _write(_Rows(path, format, limit, encoding), kind, begun)
        made.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")
        move(begun, made)
    told = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    log.warning(
        "%s: %s rows of one response each (format %s) give %s pairs by their prompt; %s have no partner, %s are no "
        "such rows%s",
        *(path, told["rows"], format, told["pairs"], told["unmatched"], sum(told["refused"].values())),
        f" ({', '.join(f'{reason}: {count}' for reason, count in told['refused'].items())})" if told["refused"] else "",
    )
    return made


def _write(source: _Rows, kind: str, out: Path) -> dict[str, Any]:
    by_prompt: dict[str, _Sides] = {}
    refused: Counter[str] = Counter()
    rows = 0
    for position, half in _halves(source):
        rows += 1
        if isinstance(half, str):
            refused[half.partition(":")[0]] += 1
            continue
        sides = by_prompt.setdefault(_key(half.prompt), _Sides([], []))
        getattr(sides, half.side).append(position)
    partners, pairs = _partners(by_prompt.values(), kind)
    with out.open("w", encoding="utf-8") as stream:
        stream.writelines(_pairs(source, partners))
    unmatched = rows - sum(refused.values()) - len(partners)
    return {"rows": rows, "pairs": pairs, "unmatched": unmatched, "refused": dict(refused.most_common(5))}


def _partners(prompts: Iterable[_Sides], kind: str) -> tuple[dict[int, list[int]], int]:
    """Return the partners of each row that has some, by position, and how many pairs that makes."""
    partners: dict[int, list[int]] = {}
    count = 0
    for chosen, rejected in prompts:
        if kind == "one":
            pairs = list(zip(chosen[:1], rejected[:1], strict=False))
        else:
            check_count(len(chosen) * len(rejected))
            pairs = [(one, other) for one in chosen for other in rejected]
        count += len(pairs)
        for one, other in pairs:
            partners.setdefault(one, []).append(other)
            partners.setdefault(other, []).append(one)
    return partners, count


def _pairs(source: _Rows, partners: Mapping[int, Sequence[int]]) -> Iterator[str]:
    """Yield a line for each pair, where the later of its rows stands; a row is held until its last partner came."""
    held: dict[int, Half] = {}
    left = {position: len(others) for position, others in partners.items()}
    for position, half in _halves(source):
        if isinstance(half, str) or position not in partners:
            continue
        for other in [other for other in partners[position] if other in held]:
            yield schema.to_json(_pair({position: half, other: held[other]}) | {MATCHED: source.format}) + "\n"
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
    for position, half in halves.items():
        row |= {"prompt": half.prompt, half.side: half.response}
        row |= {f"{half.side}_{name}": value for name, value in half.rest.items()}
        labels |= {name if name in half.shared else f"{half.side}_{name}": text for name, text in half.labels.items()}
        labels[f"{half.side}_position"] = str(position)
    return row | {"labels": dict(sorted(labels.items()))}


def _halves(source: _Rows) -> Iterator[tuple[int, Half | str]]:
    """Yield the position of each row, and what it holds or why it is none of the format's rows."""
    match = FORMATS[source.format].match
    assert match is not None
    for position, raw, refused in read_rows(source.path, 0, source.limit, encoding=source.encoding):
        try:
            if refused is not None:
                raise Refused(refused)
            half = match(parse_row(raw))
            for name, text in (("prompt", half.prompt), (half.side, half.response)):
                if text is None or text in ("", []):
                    raise Refused(f"empty text: {name}")
        except Refused as reason:
            yield position, str(reason)
            continue
        yield position, half


def _key(prompt: Any) -> str:
    """Return what tells prompts apart: their text without the whitespace around it."""
    return digest(prompt.strip() if isinstance(prompt, str) else schema.to_json(prompt))[:24]
