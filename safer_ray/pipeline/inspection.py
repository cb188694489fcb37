"""Look at a data set: its layout and why, its columns, what would be read of its rows, and what would be refused."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import SourceConfig
from safer_ray.data.rows import parse_row
from safer_ray.data.side_files import some
from safer_ray.data.source_files import find_files
from safer_ray.data.sources import RAW, NormalisePairs, lines_of, plan_sources, read_raw, several_formats, told_of
from safer_ray.formats.declaration import NOTED, OWN_MARGIN, Refused
from safer_ray.formats.messages import fields_of
from safer_ray.formats.registry import AUTO, FORMATS
from safer_ray.storage.columnar import extent
from safer_ray.storage.rows import explained, kind_of, read_rows

EXAMPLES = 3
BLANK = 1000  # lines in which a row is looked for
PARTS = ("prompt", "chosen", "rejected")


class Refusal(NamedTuple):
    """A kind of reason: how many rows have it, and the first of them in full."""

    rows: int
    row_key: str
    reason: str
    raw: str


class Side(NamedTuple):
    """A side of a pair as a model reads it: `text[:border]` is the prompt with its markup."""

    text: str
    border: int
    tokens: int
    prompt_tokens: int
    truncated: bool


@dataclass(frozen=True)
class Inspection:
    """The first rows of a data set, summarised."""

    format: str  # formats, where files differ
    why: dict[str, str]  # format -> what it was known by
    files: tuple[str, ...]
    left_out: dict[str, int]  # folder -> data files in it that are no part of the source
    rows: int
    more: bool  # whether there are rows behind those
    total: int | None  # rows that there are, where it is known without reading them
    good: int
    refused: dict[str, int]  # kind of reason -> rows, most frequent first
    refusals: dict[str, Refusal]
    columns: tuple[str, ...]
    used: tuple[str, ...]  # columns that pairs are made of
    carried: tuple[str, ...]  # columns that ride along in `extra`
    empty: tuple[str, ...]  # columns that are null in all rows
    told: tuple[str, ...]  # what else is left out, what was chosen, what should be known of the pairs; a line each
    examples: tuple[dict[str, Any], ...]  # the first pairs, as rows of `schema.PAIRS`
    rendered: tuple[dict[str, Side] | str, ...]  # these as a model reads them, by side, or why it cannot
    prompt_chars: float  # means over the good pairs
    chosen_chars: float
    rejected_chars: float

    def to_tree(self) -> dict[str, Any]:
        """Return what a program reads: as JSON has it, messages with all their fields."""
        tree = asdict(self)
        tree["refusals"] = {kind: refusal._asdict() for kind, refusal in self.refusals.items()}
        tree["rendered"] = [
            each if isinstance(each, str) else {name: side._asdict() for name, side in each.items()}
            for each in self.rendered
        ]
        tree["examples"] = [
            {**row, "labels": dict(row["labels"] or ())} | {name: [*map(fields_of, row[name])] for name in PARTS}
            for row in self.examples
        ]
        return tree


def reason_kind(reason: str) -> str:
    """Return a reason without what is particular to its row, for counting."""
    return reason if reason.startswith(("missing column", "empty text")) else reason.partition(":")[0]


def inspect(path: str, format: str = AUTO, rows: int = 1000) -> Inspection:
    """Return what `inspect_source` does of the source at `path`; raises as that does."""
    return inspect_source(SourceConfig.model_validate({"path": path, "format": format}), rows)


def inspect_source(
    source: SourceConfig, rows: int = 1000, *, reward: Path | None = None, reading: Reading = AS_IT_COMES
) -> Inspection:
    """Read the first `rows` rows of a data set, each file's in turn, and return what is there.

    With a `reward` model the first pairs come as it reads them, too.

    Raises:
        UserError: as `plan_sources`; or there is no model that can be read.
    """
    source = source.model_copy(update={"limit": rows})
    found = find_files(source)
    formats: dict[Path, str] = {}
    fragments = plan_sources([source], found=[found], formats=[formats])
    tables, left, more = [], rows, False
    for fragment in fragments:
        if more := left <= 0:
            break
        read = read_raw(fragment, source)
        more = read.num_rows > left
        tables.append(read.slice(0, left))
        left -= tables[-1].num_rows
    more = more or any(_has_more(file, rows, source.encoding) for file in found.files)
    raw = pa.concat_tables(tables) if tables else RAW.empty_table()
    pairs = NormalisePairs([source], max_chars=2**62)(raw)
    good = pairs.filter(pc.is_null(pairs["refused"]))
    means = []
    for part in PARTS:
        lengths = [sum(len(message["content"]) for message in row) for row in good[part].to_pylist()]
        means.append(sum(lengths) / max(len(lengths), 1))
    refusals, columns = _refusals(raw, pairs), _columns(raw, good)
    examples = good.select(schema.PAIRS.names).slice(0, EXAMPLES).to_pylist()
    named = sorted(set(raw["format"].to_pylist()))
    return Inspection(
        ", ".join(named),
        {name: _why(name, source.format) for name in named},
        tuple(dict.fromkeys(fragment.path for fragment in fragments)),
        found.left_out,
        raw.num_rows,
        more,
        _total(found.files, formats),
        good.num_rows,
        {kind: refusal.rows for kind, refusal in refusals.items()},
        refusals,
        columns.all,
        columns.used,
        columns.carried,
        columns.empty,
        (
            *found.told,
            *_without_rows(found.files, formats),
            *several_formats(formats),
            *lines_of(told_of(good), len(good)),
            *_repeated(good),
        ),
        tuple(examples),
        _rendered(examples, reward, reading) if reward is not None else (),
        *means,
    )


def _has_more(file: Path, rows: int, encoding: str | None) -> bool:
    """Return whether a file has a row behind its first ones, over some blank lines, too."""
    return next(read_rows(file, rows, rows + BLANK, encoding=encoding), None) is not None


def _total(files: Sequence[Path], formats: Mapping[Path, str]) -> int | None:
    """Return how many rows files have that say it themselves, and of which a row makes one pair."""
    total = 0
    for file in files:
        kind = kind_of(file)[0]
        layout = FORMATS[formats[file]] if file in formats else None
        if kind not in ("parquet", "arrow") or (layout and (layout.expand or layout.match)):
            return None
        with explained(file):
            total += extent(file, kind)[0]
    return total


def _without_rows(files: Sequence[Path], formats: Mapping[Path, str]) -> tuple[str, ...]:
    empty = [str(file) for file in files if file not in formats]
    return (f"no rows in {some(empty)}",) if empty else ()


def _why(name: str, asked: str) -> str:
    if asked != AUTO:
        return "asked for"
    return f"known by {FORMATS[name].told}"


def _repeated(good: pa.Table) -> list[str]:
    """Return that ids stand in several rows, as a line; nothing where they do not."""
    count = len(good) - len(pc.unique(good["pair_id"]))
    told = f"{count:,} of {len(good):,} pairs repeat an id, or all that another says: `pairs` quarantines these"
    return [told] if count else []


class _Columns(NamedTuple):
    all: tuple[str, ...]
    used: tuple[str, ...]
    carried: tuple[str, ...]
    empty: tuple[str, ...]


def _columns(raw: pa.Table, good: pa.Table) -> _Columns:
    """Return all columns, in their order, and which are used, carried, and empty."""
    columns: dict[str, bool] = {}
    for text in raw["raw"].to_pylist():
        with suppress(Refused):
            for name, value in parse_row(text).items():
                if name not in (NOTED, OWN_MARGIN):
                    columns[name] = columns.get(name, False) or value is not None
    carried = {name for extra in good["extra"].to_pylist() if extra for name in json.loads(extra)}
    filled = [name for name, has in columns.items() if has]
    used = tuple(name for name in filled if name not in carried)
    empty = tuple(name for name, has in columns.items() if not has)
    return _Columns(tuple(columns), used, tuple(name for name in filled if name in carried), empty)


def _refusals(raw: pa.Table, pairs: pa.Table) -> dict[str, Refusal]:
    """Return the kinds of reasons, the most frequent first."""
    bad = pairs.filter(pc.is_valid(pairs["refused"])).select(["row_key", "refused"]).to_pylist()
    counts = Counter(reason_kind(row["refused"]) for row in bad)
    firsts = {reason_kind(row["refused"]): row for row in reversed(bad)}
    texts = dict(zip(reversed(raw["row_key"].to_pylist()), reversed(raw["raw"].to_pylist()), strict=True))
    return {
        kind: Refusal(count, firsts[kind]["row_key"], firsts[kind]["refused"], texts[firsts[kind]["row_key"]])
        for kind, count in counts.most_common()
    }


def _rendered(pairs: Sequence[dict[str, Any]], reward: Path, reading: Reading) -> tuple[dict[str, Side] | str, ...]:
    """Return pairs as a model reads them."""
    from safer_ray.reward.checkpoints import load_pair_tokenizer  # slow to import, and only needed here

    tokenizer = load_pair_tokenizer(reward, reading)
    made: list[dict[str, Side] | str] = []
    for pair, tokens in zip(pairs, tokenizer.read(pairs), strict=True):
        if isinstance(tokens, str):
            made.append(tokens)
            continue
        sides = {}
        for name in schema.SIDES:
            rendered, side = tokenizer.render(pair["prompt"] or [], pair[name]), getattr(tokens, name)
            sides[name] = Side(rendered.text, rendered.border, len(side.ids), side.n_prompt, side.truncated)
        made.append(sides)
    return tuple(made)
