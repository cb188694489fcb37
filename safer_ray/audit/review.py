"""Collect what people say of the pairs that an audit flagged: their verdicts, and the share of flagged pairs that is
bad.

A verdict is a line of JSON: `verdict` (bad, fine or unsure) and `row_key` or `pair_id`, both where a row of the source
gave several pairs; `reviewer` and `note` where they are known. Whatever else stands in the line is left alone, so a
line of `flagged.jsonl` becomes a verdict by one more key.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safer_ray.audit.read import Pair, pairs_in, scores
from safer_ray.data.audit_files import REVIEWS
from safer_ray.detection.evaluation import wilson
from safer_ray.errors import UserError
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.files import write_json
from safer_ray.storage.rows import read_rows

BAD, FINE, UNSURE = "bad", "fine", "unsure"
VERDICTS = (BAD, FINE, UNSURE)
STEPS = (1, 2, 5)  # of the depths that precision is told at: 10, 20, 50, 100, …


class Verdict(NamedTuple):
    """One line of a verdict file."""

    line: int  # from 1
    row_key: str | None
    pair_id: str | None
    verdict: str
    reviewer: str | None
    note: str | None


class BadLine(NamedTuple):
    """A line that is not used, and why."""

    line: int
    reason: str


class Precision(NamedTuple):
    """The share of the most suspicious flagged pairs that is bad."""

    flagged: int  # so many of the most suspicious
    reviewed: int  # of those, also as unsure
    bad: int
    fine: int
    precision: float | None  # bad / (bad + fine), None before there is one
    low: float  # its 95% Wilson interval
    high: float


class Reviewed(NamedTuple):
    """The outcome of reading a verdict file."""

    used: int  # lines
    bad_lines: list[BadLine]
    whole: Precision  # over all flagged pairs
    at: list[Precision]  # over the most suspicious 10, 20, 50, …, as deep as the reviews reach


# Verdict files


def read_verdicts(path: Path) -> tuple[list[Verdict], list[BadLine]]:
    """The verdicts of a JSONL file (also .gz, .zst), and the lines that are none.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"no verdicts at {path}: no such file; pass a JSONL file with row_key and verdict")
    good, bad = [], []
    for position, text, refused in read_rows(path, 0, 2**62):
        found = BadLine(position + 1, refused) if refused else _verdict(position + 1, text)
        if isinstance(found, BadLine):
            bad.append(found)
        else:
            good.append(found)
    return good, bad


def _verdict(line: int, text: str) -> Verdict | BadLine:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadLine(line, f"not JSON: {error}")
    if not isinstance(row, dict):
        return BadLine(line, f"a {type(row).__name__}, wanted an object with row_key and verdict")
    for name in ("row_key", "pair_id", "reviewer", "note"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            return BadLine(line, f"{name} is {value!r}, wanted text")
        if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
            return BadLine(line, f"{name} holds a lone surrogate, which is no text")
    row_key, pair_id, reviewer, note = (row.get(name) or None for name in ("row_key", "pair_id", "reviewer", "note"))
    if row_key is None and pair_id is None:
        return BadLine(line, "neither row_key nor pair_id; copy them from flagged.jsonl")
    verdict = row.get("verdict")
    if verdict not in VERDICTS:
        told = "no verdict" if verdict is None else f"verdict {verdict!r}"
        return BadLine(line, f"{told}; write one of {', '.join(VERDICTS)}")
    return Verdict(line, row_key, pair_id, verdict, reviewer, note)


# Flagged pairs


class Flagged(NamedTuple):
    """The flagged pairs of an audit: how many, and those that are wanted by rank, 0 the most suspicious."""

    pairs: int
    rank: dict[Pair, int]


def find_flagged(audit: Artifact, row_keys: Iterable[str], pair_ids: Iterable[str]) -> Flagged:
    """Flagged pairs with one of these row keys or pair ids; of the others only the numbers are held."""
    asked = {"row_key": row_keys, "pair_id": pair_ids}
    wanted = {name: pa.array(sorted(set(keys)), pa.string()) for name, keys in asked.items()}
    numbers: list[np.ndarray] = []
    found: list[tuple[Pair, int]] = []
    count = 0
    for part in scores(audit, ["row_key", "pair_id", "suspicion", "score", "flag"]):
        rows = part.filter(part["flag"])
        numbers.append(np.stack([rows[name].to_numpy() for name in ("score", "suspicion")]))
        mask = pc.or_(*(pc.is_in(rows[name], value_set=keys) for name, keys in wanted.items()))
        places = count + np.flatnonzero(mask.to_numpy())
        found += zip(pairs_in(rows.filter(mask)), places.tolist(), strict=True)
        count += len(rows)
    score, suspicion = np.concatenate(numbers, axis=1) if numbers else np.empty((2, 0))
    rank = np.empty(count, dtype=np.int64)
    rank[np.lexsort((score, -suspicion))] = np.arange(count)
    return Flagged(count, {pair: int(rank[place]) for pair, place in found})


def _resolve(verdict: Verdict, flagged: dict[str, list[Pair]]) -> list[Pair] | BadLine:
    """The flagged pairs that a verdict is about: all that share a pair id, but no more than one of a row key."""
    asked = {"row_key": verdict.row_key, "pair_id": verdict.pair_id}
    told = " and ".join(f"{name} {value!r}" for name, value in asked.items() if value is not None)
    found = [
        pair
        for pair in flagged.get(verdict.row_key or verdict.pair_id or "", [])
        if verdict.row_key in (None, pair[0]) and verdict.pair_id in (None, pair[1])
    ]
    if not found:
        return BadLine(verdict.line, f"no flagged pair has {told}")
    if verdict.pair_id is None and len(found) > 1:
        return BadLine(verdict.line, f"{len(found)} flagged pairs have {told}; name the pair_id too")
    return found


# Reviews


class Said(NamedTuple):
    """One reviewer's verdict on one pair."""

    reviewer: str | None
    verdict: str
    note: str | None


Reviews = dict[Pair, list[Said]]


def load_reviews(audit: Artifact) -> Reviews:
    """The reviews that lie in an audit; none where nobody has reviewed it.

    Raises:
        UserError: they are damaged.
    """
    path = audit.path / REVIEWS
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {
            (pair["row_key"], pair["pair_id"]): [Said(**said) for said in pair["verdicts"]] for pair in tree["pairs"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; put back a copy, or move it away and pass the verdict files again"
        ) from None


def agreed(said: Sequence[Said]) -> str:
    """The verdict that most reviewers gave; unsure where no single one leads."""
    (verdict, votes), *others = Counter(one.verdict for one in said).most_common()
    return UNSURE if others and others[0][1] == votes else verdict


def decided(reviews: Reviews, verdict: str) -> set[Pair]:
    """The pairs of which the reviews say so."""
    return {pair for pair, said in reviews.items() if agreed(said) == verdict}


def merged(before: Reviews, new: Sequence[tuple[Pair, Said]]) -> Reviews:
    """Reviews with those of one more file: a reviewer's later verdict replaces the earlier one. Verdicts without a
    reviewer count one by one, and replace those that the pair had without a reviewer."""
    reviews = {pair: list(said) for pair, said in before.items()}
    for pair in {pair for pair, said in new if said.reviewer is None}:
        reviews[pair] = [one for one in reviews.get(pair, []) if one.reviewer is not None]
    for pair, said in new:
        others = reviews.get(pair, [])
        if said.reviewer is not None:
            others = [one for one in others if one.reviewer != said.reviewer]
        reviews[pair] = [*others, said]
    return reviews


def precision_at(depth: int, reviews: Reviews, rank: dict[Pair, int]) -> Precision:
    """Among the `depth` most suspicious flagged pairs; those of other ranks, or none, stay out."""
    verdicts = Counter(agreed(said) for pair, said in reviews.items() if rank.get(pair, depth) < depth)
    bad, fine = verdicts[BAD], verdicts[FINE]
    share = bad / (bad + fine) if bad + fine else None
    return Precision(depth, verdicts.total(), bad, fine, share, *wilson(bad, bad + fine))


def _depths(reviews: Reviews, flagged: Flagged) -> list[Precision]:
    """Precision at 10, 20, 50, …, until all reviewed pairs are among them."""
    found: list[Precision] = []
    reviewed = sum(pair in flagged.rank for pair in reviews)
    for power in range(1, len(str(flagged.pairs))):
        for depth in (step * 10**power for step in STEPS):
            if depth >= flagged.pairs or (found and found[-1].reviewed == reviewed):
                return found
            here = precision_at(depth, reviews, flagged.rank)
            found += [here] if here.reviewed else []
    return found


def review(audit: Artifact, path: Path) -> Reviewed:
    """Add a file of verdicts to the reviews in an audit.

    Raises:
        UserError: no line of the file can be used, or it cannot be read.
    """
    verdicts, bad = read_verdicts(path)
    before = load_reviews(audit)
    keys = [v.row_key for v in verdicts if v.row_key is not None] + [pair[0] for pair in before]
    flagged = find_flagged(audit, keys, [v.pair_id for v in verdicts if v.row_key is None and v.pair_id is not None])
    by_name: dict[str, list[Pair]] = {}
    for pair in flagged.rank:
        for name in set(pair):
            by_name.setdefault(name, []).append(pair)
    new, used = [], 0
    for verdict in verdicts:
        found = _resolve(verdict, by_name)
        if isinstance(found, BadLine):
            bad.append(found)
        else:
            used += 1
            new += [(pair, Said(verdict.reviewer, verdict.verdict, verdict.note)) for pair in found]
    bad.sort()
    if used == 0:
        told = "it is empty" if not bad else f"{len(bad)} bad, the first is line {bad[0].line}: {bad[0].reason}"
        raise UserError(f"{path}: no usable line ({told}); write row_key and verdict, bad, fine or unsure, in each")
    reviews = merged(before, new)
    whole, at = precision_at(flagged.pairs, reviews, flagged.rank), _depths(reviews, flagged)
    write_json(_tree(reviews, whole, at), audit.path / REVIEWS)
    return Reviewed(used, bad, whole, at)


def _tree(reviews: Reviews, whole: Precision, at: list[Precision]) -> dict[str, Any]:
    """As `reviews.json` holds it."""
    pairs = [
        {"row_key": pair[0], "pair_id": pair[1], "verdict": agreed(said), "verdicts": [one._asdict() for one in said]}
        for pair, said in sorted(reviews.items())
    ]
    return {"pairs": pairs, "precision": whole._asdict(), "precision_at": [one._asdict() for one in at]}
