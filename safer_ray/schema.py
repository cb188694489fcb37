"""The nouns of the system and their Arrow schemas. Every table that crosses a stage has one of these."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("more", pa.string()),  # JSON of a message's other fields: tool_calls, name, reasoning_content
        ]
    )
)

PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("row_key", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("label_margin", pa.float32()),
        ("source", pa.string()),
        ("section", pa.string()),
        ("group", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("extra", pa.string()),  # the user's other columns as one JSON object
    ]
)

QUARANTINE = pa.schema(
    [
        ("row_key", pa.string()),
        ("pair_id", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),  # 0-based row of the source file
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("raw", pa.string()),  # the row as it came, cut to RAW_LIMIT characters
    ]
)
RAW_LIMIT = 2000

SIDES = ("chosen", "rejected")


GROUP_ROWS = 512  # of a row group of activations, which are read group by group


def activations(width: int) -> pa.Schema:
    """Standardised layer vectors, one row a token; `norm`, `mean` and `std` are of the raw vector."""
    return pa.schema(
        [
            ("pair_id", pa.string()),
            ("group", pa.string()),  # prompt hash; null where there is no prompt
            ("side", pa.string()),
            ("token", pa.int32()),
            ("end", pa.int32()),
            ("norm", pa.float32()),
            ("mean", pa.float32()),
            ("std", pa.float32()),
            ("x", pa.list_(pa.float16(), width)),
        ]
    )


def heads(width: int) -> pa.Schema:
    """Return what the reward head reads of the chosen response minus what it reads of the rejected one."""
    return pa.schema([("pair_id", pa.string()), ("head", pa.list_(pa.float32(), width))])


def vectors(width: int) -> pa.Schema:
    """Mean layer vectors: of the chosen response minus those of the rejected one, and of the prompt."""
    return pa.schema(
        [
            ("pair_id", pa.string()),
            ("response", pa.list_(pa.float32(), width)),
            ("prompt", pa.list_(pa.float32(), width)),
        ]
    )


def _codes() -> pa.Schema:
    fields = [("pair_id", pa.string())]
    for side in SIDES:
        fields += [
            (f"{side}_token", pa.list_(pa.int32())),
            (f"{side}_end", pa.list_(pa.int32())),
            (f"{side}_features", pa.list_(pa.list_(pa.int32()))),
            (f"{side}_values", pa.list_(pa.list_(pa.float32()))),
            (f"{side}_prompt_tokens", pa.int32()),  # before the first of the response
            (f"{side}_truncated", pa.bool_()),  # what is longer than the model reads was cut
            (f"{side}_fallback", pa.bool_()),  # the last entry is the response's last token, no sentence end
            (f"{side}_reward", pa.float32()),
        ]
    return pa.schema(fields)


CODES = _codes()

SALIENCE = pa.schema(
    [
        ("feature", pa.int32()),
        ("salience", pa.float64()),
        ("chosen_sum", pa.float64()),
        ("rejected_sum", pa.float64()),
        ("n_chosen", pa.int64()),
        ("n_rejected", pa.int64()),
    ]
)

CONTEXTS = pa.schema(
    [
        ("feature", pa.int32()),
        ("rank", pa.int32()),
        ("value", pa.float32()),
        ("pair_id", pa.string()),
        ("side", pa.string()),
        ("end", pa.int32()),
        ("before", pa.string()),
        ("sentence", pa.string()),
        ("after", pa.string()),
    ]
)

VERDICTS = pa.schema(
    [
        ("feature", pa.int32()),
        ("judge", pa.string()),
        ("rating", pa.int8()),  # 1..5, null: unrated
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)

REASON = pa.struct(
    [
        ("feature", pa.int32()),
        ("sign", pa.int8()),  # +1: of F+ (safe), -1: of F- (unsafe)
        ("contribution", pa.float32()),  # to the score; negative ones make a pair suspicious
        ("side", pa.string()),
        ("end", pa.int32()),  # of the sentence where the feature fires most, -1: unknown
    ]
)

SCORES = pa.schema(
    [
        ("pair_id", pa.string()),
        ("row_key", pa.string()),
        ("score", pa.float64()),
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
        ("reward_margin", pa.float32()),
        ("chosen_truncated", pa.bool_()),
        ("rejected_truncated", pa.bool_()),
        ("suspicion", pa.float64()),
        ("flag", pa.bool_()),
        ("decision", pa.string()),
        ("reasons", pa.list_(REASON)),
        ("extra", pa.string()),
    ]
)

DECISIONS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("row_key", pa.string()),
        ("strategy", pa.string()),
        ("value", pa.float64()),  # what the strategy ordered by; low: suspicious
        ("eligible", pa.bool_()),  # inside `curate.where`
        ("decision", pa.string()),  # keep, drop or flip
        ("red_team", pa.bool_()),
    ]
)

REWARDS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("section", pa.string()),
        ("group", pa.string()),  # prompt hash; null where it is not known
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
        ("reward_margin", pa.float32()),
        ("chosen_truncated", pa.bool_()),
        ("rejected_truncated", pa.bool_()),
    ]
)

DUPLICATES = pa.schema(
    [
        ("pair_id", pa.string()),
        ("kind", pa.string()),  # prompt_exact, prompt_near, response_…, pair_…, conflict or cycle
        ("side", pa.string()),  # prompt, chosen or rejected; null of a whole pair
        ("cluster", pa.int64()),  # equal for all that belong together, within a kind
        ("other", pa.string()),  # another pair of the cluster: the first, of the first the second
    ]
)

TRUTH = pa.schema([("pair_id", pa.string()), ("planted", pa.bool_())])


NO_PROMPT = hashlib.sha256(b"[]").hexdigest()[:16]  # the `group` of pairs without a prompt
TRUNCATED = ("chosen_truncated", "rejected_truncated")  # what is longer than the model reads was cut


def truncated(rows: pa.Table) -> np.ndarray:
    """Return which pairs have a side that was cut, bool [n]; rows that do not say it have none."""
    known = [rows[name].fill_null(False).to_numpy() for name in TRUNCATED if name in rows.column_names]
    return np.logical_or.reduce([np.zeros(len(rows), dtype=bool), *known])


REFUSED = "refused"  # the column of a batch function's output that tells why a row could not be used; else null


def split_refused(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows that could be used, without the column `refused`, and the others."""
    if REFUSED not in rows.column_names:
        return rows, rows.slice(0, 0)
    bad = pc.is_valid(rows[REFUSED])
    return rows.filter(pc.invert(bad)).drop_columns([REFUSED]), rows.filter(bad)


def rows_of(table: pa.Table, ids: list[str]) -> tuple[pa.Table, list[str]]:
    """The rows of `table` with these `pair_id`s, in their order, and those ids that it has no row for."""
    place = {key: i for i, key in enumerate(table["pair_id"].to_pylist())}
    taken = [place[key] for key in ids if key in place]
    return table.take(pa.array(taken, pa.int64())), [key for key in ids if key not in place]


def table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`; keys that a row lacks are null."""
    return pa.Table.from_pylist(rows, schema=schema)


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def to_json(value: Any) -> str:
    """Compact JSON with sorted keys, the one form in which values are hashed and carried."""
    return _ENCODER.encode(value)
