"""Rows that a stage refuses, as its quarantine keeps them."""

from pathlib import Path

import pyarrow as pa

from safer_ray.schema import QUARANTINE, RAW_LIMIT, REFUSED, to_json
from safer_ray.storage.files import read_parquet

KNOWN = ("row_key", "pair_id", "source", "raw", "position")  # what is kept of a row, where it is known


def refuse(pairs: pa.Table, reasons: dict[int, str]) -> pa.Table:
    """The rows that have a reason, with what is known of them and their texts where these ride along."""
    rows = pairs.take(pa.array(list(reasons), pa.int64()))
    known = rows.select([name for name in KNOWN if name in rows.column_names])
    if "texts" in rows.column_names:
        known = known.drop_columns(["raw"] if "raw" in known.column_names else []).append_column("raw", rows["texts"])
    return known.append_column(REFUSED, pa.array(list(reasons.values()), pa.string()))


def refused_rows(rows: pa.Table, stage: str) -> pa.Table:
    """Return rows with a reason in `refused` as the quarantine keeps them, in the QUARANTINE schema."""
    refused = []
    for row in rows.to_pylist():
        raw = row.get("raw") or to_json({k: v for k, v in row.items() if k not in ("refused", "raw") and v is not None})
        source, _, position = (row.get("row_key") or "").rpartition("#")
        refused.append(
            {
                "row_key": row.get("row_key"),
                "pair_id": row.get("pair_id"),
                "source": row.get("source") or source,
                "position": row.get("position") if row.get("position") is not None else _number(position),
                "stage": stage,
                "reason": row["refused"],
                "raw": raw[:RAW_LIMIT],
            }
        )
    return pa.Table.from_pylist(refused, schema=QUARANTINE)


def quarantine_rows(directory: Path) -> pa.Table:
    """The quarantine of a stage, in fragment order; empty where nothing was refused."""
    tables = [read_parquet(path) for path in sorted((directory / "quarantine").glob("*.parquet"))]
    return pa.concat_tables([QUARANTINE.empty_table(), *tables])


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
