"""Look at a data set: its format, its columns, and what would be refused."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.config.sections import SourceConfig
from safer_ray.data.source_files import find_files
from safer_ray.data.sources import RAW, NormalisePairs, parse_row, plan_sources, read_raw, several_formats
from safer_ray.formats.declaration import Refused


@dataclass(frozen=True)
class Inspection:
    """The first rows of a data set, summarised."""

    format: str  # formats, where files differ
    files: tuple[str, ...]
    left_out: dict[str, int]  # folder -> data files in it that are no part of the source
    told: tuple[str, ...]  # what else is left out, and what was chosen
    rows: int
    good: int
    refused: dict[str, int]  # kind of reason -> rows, most frequent first
    columns: tuple[str, ...]
    examples: tuple[dict[str, Any], ...]  # the first pairs, as rows of `schema.PAIRS`
    prompt_chars: float  # means over the good pairs
    chosen_chars: float
    rejected_chars: float


def reason_kind(reason: str) -> str:
    """A reason without what is particular to its row, for counting."""
    return reason if reason.startswith(("missing column", "empty text")) else reason.partition(":")[0]


def inspect(path: str, format: str = "auto", rows: int = 1000) -> Inspection:
    """Return what `inspect_source` does of the source at `path`; raises as that does."""
    return inspect_source(SourceConfig.model_validate({"path": path, "format": format}), rows)


def inspect_source(source: SourceConfig, rows: int = 1000) -> Inspection:
    """Read the first `rows` rows of a data set, each file's in turn, and say what is there.

    Raises:
        UserError: as `plan_sources`.
    """
    source = source.model_copy(update={"limit": rows})
    found = find_files(source)
    formats: dict[Path, str] = {}
    fragments = plan_sources([source], found=[found], formats=[formats])
    tables, left = [], rows
    for fragment in fragments:
        tables.append(read_raw(fragment, source).slice(0, left))
        left -= tables[-1].num_rows
        if left <= 0:
            break
    raw = pa.concat_tables(tables) if tables else RAW.empty_table()
    pairs = NormalisePairs([source], max_chars=2**62)(raw)
    good = pairs.filter(pc.is_null(pairs["refused"]))
    columns: dict[str, None] = {}
    for text in raw["raw"].to_pylist():
        with contextlib.suppress(Refused):
            columns |= dict.fromkeys(parse_row(text))
    means = []
    for side in ("prompt", "chosen", "rejected"):
        lengths = [sum(len(message["content"]) for message in row) for row in good[side].to_pylist()]
        means.append(sum(lengths) / max(len(lengths), 1))
    reasons = Counter(reason_kind(reason) for reason in pairs["refused"].to_pylist() if reason)
    return Inspection(
        ", ".join(sorted(set(raw["format"].to_pylist()))),
        tuple(dict.fromkeys(fragment.path for fragment in fragments)),
        found.left_out,
        (*found.told, *several_formats(formats)),
        raw.num_rows,
        good.num_rows,
        dict(reasons.most_common()),
        tuple(columns),
        tuple(good.select(schema.PAIRS.names).slice(0, 3).to_pylist()),
        *means,
    )
