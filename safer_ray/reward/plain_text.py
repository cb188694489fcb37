"""General text, a text a line or a row: where it is cut, and how its tokens are read like those of pairs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.reward.text import PairTokens, Side
from safer_ray.reward.tokens import with_tokens
from safer_ray.storage.artifacts import Fragment
from safer_ray.storage.files import stamp
from safer_ray.storage.rows import cut_rows, kind_of, read_rows

FRAGMENT_BYTES = 4 * 2**20
EVERY = 2**62
TEXTS = pa.schema([("row_key", pa.string()), ("text", pa.string())])


def text_fragments(path: Path, rows: int, limit: int | None = None) -> list[Fragment]:
    """The lines or rows of a file in ranges of at most `rows`; of the first `limit`, if it is given.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"no text in {path}; pass a file with a text a line, or JSONL rows with `text`")
    cuts = cut_rows(path, rows, FRAGMENT_BYTES, limit or EVERY)
    return [
        Fragment(number, 0, str(path), cut.start, cut.stop, *stamp(path), cut.offset, file=path.name)
        for number, cut in enumerate(cuts)
    ]


def read_texts(fragment: Fragment) -> pa.Table:
    """The texts of a fragment; blank ones are left out.

    Raises:
        UserError: a row of JSONL without `text`.
    """
    path, rows = Path(fragment.path), []
    for position, raw, _ in read_rows(path, fragment.start, fragment.stop, fragment.offset):
        text = raw if kind_of(path)[0] is None else _text_of(raw, path, position)
        if text.strip():
            rows.append({"row_key": f"{path.name}#{position}", "text": text.strip()})
    return pa.Table.from_pylist(rows, schema=TEXTS)


def _text_of(raw: str, path: Path, position: int) -> str:
    try:
        found = json.loads(raw)["text"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise UserError(f"{path}: row {position} has no `text`; write it as a JSON object with the key `text`")
    return found


class TokeniseTexts:
    """Batch function: texts -> rows as of tokenised pairs, of which the sides are two texts, or two pieces of one, read
    apart from each other. Two texts share a `pair_id`, so that both are held out or neither."""

    def __init__(self, reward: Path, reading: Reading = AS_IT_COMES) -> None:
        self.pairs = load_pair_tokenizer(reward, reading)

    def __call__(self, rows: pa.Table) -> pa.Table:
        keys = rows["row_key"].to_pylist()
        found = self.pairs.sequences(rows["text"].to_pylist()) if keys else []
        pieces = [(key, ids) for key, own in zip(keys, found, strict=True) for ids in own]
        tokens = _two_by_two(pieces)
        named = pa.table({"row_key": [t.pair_id for t in tokens], "pair_id": [t.pair_id for t in tokens]})
        return with_tokens(named.cast(pa.schema([("row_key", pa.string()), ("pair_id", pa.string())])), tokens)


def _two_by_two(pieces: Sequence[tuple[str, np.ndarray]]) -> list[PairTokens]:
    """Pieces of like length stand side by side; a last one alone is cut in two, or left out where it is one token."""
    ordered = sorted(pieces, key=lambda piece: len(piece[1]))
    if len(ordered) % 2:
        key, ids = ordered.pop()
        half = len(ids) // 2
        ordered += [(key, ids[:half]), (key, ids[half:])] if half else []
    sides = [Side(ids, np.empty(0, np.int32), np.empty(0, np.int32), False) for _, ids in ordered]
    return [PairTokens(ordered[i][0], sides[i], sides[i + 1]) for i in range(0, len(sides), 2)]
