"""The pairs that an audit leaves standing, read again from its sources: to train on, and in the layout of TRL.

`pairs/` is what `safer-ray reward` reads, `trl/` what the trainers of TRL read (conversational, one object a line; a
pair without a prompt has no `prompt`), `decisions/` says of every scored row whether it was kept, and why.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.audit.read import Pair, pairs_in, read_asked, scored_rows, scores
from safer_ray.audit.review import BAD, FINE, decided, load_reviews
from safer_ray.audit.worst import RANKED, Rank, last_of_worst, ranks
from safer_ray.config.sections import SourceConfig
from safer_ray.data.audit_files import REVIEWS, SCORES
from safer_ray.data.curation import share_count
from safer_ray.data.sources import NormalisePairs, read_raw
from safer_ray.errors import UserError
from safer_ray.formats.messages import fields_of
from safer_ray.pipeline.runner import Runner
from safer_ray.storage.artifacts import PLAN, Artifact, Fragment, Place, Recipe, Result, part_name, read_plan
from safer_ray.storage.contents import content_hash
from safer_ray.storage.files import as_path, read_json, read_parquet, stamp, write_parquet, write_text
from safer_ray.storage.fingerprints import begins_as
from safer_ray.storage.marks import Marks, enclosing, is_marked, together
from safer_ray.storage.recipes import Input
from safer_ray.storage.rows import grows
from safer_ray.storage.work import MapJob

VERSION = 1
PAIRS, TRL, DECISIONS = "pairs", "trl", "decisions"  # folders
KEEP, DROP = "keep", "drop"
DECIDED = pa.schema(
    [("row_key", pa.string()), ("pair_id", pa.string()), ("decision", pa.string()), ("why", pa.string())]
)
EXPORTED = pa.schema([*schema.PAIRS, DECIDED.field("decision"), DECIDED.field("why")])


# What is left out


class Drop(NamedTuple):
    """Which pairs are left out: the flagged ones, or those up to a rank; and what people said of some."""

    flagged: bool
    until: Rank | None  # of the last pair that is left out for its suspicion
    bad: set[Pair]
    fine: set[Pair]

    def decide(self, row: tuple[Pair, bool, Rank]) -> tuple[str, str]:
        """The decision on a scored pair by its flag and rank, and why."""
        pair, flag, rank = row
        if pair in self.bad:
            return DROP, "reviewed: bad"
        if pair in self.fine:
            return KEEP, "reviewed: fine"
        if self.flagged and flag:
            return DROP, "flagged"
        if self.until is not None and rank <= self.until:
            return DROP, "among the most suspicious"
        return KEEP, "not suspected"


def what_to_drop(audit: Artifact, percent: float | None) -> Drop:
    """The flagged pairs, or the floor(n percent / 100) most suspicious of n scored ones, as the reviews mend it."""
    reviews = load_reviews(audit)
    until = None
    if percent is not None:
        until = last_of_worst(partial(scores, audit, RANKED), share_count(scored_rows(audit), percent))
    return Drop(percent is None, until, decided(reviews, BAD), decided(reviews, FINE))


# The sources, read again


def check_sources(fragments: Sequence[Fragment]) -> None:
    """Raises UserError unless every planned row can be read as it was: files are as they were, or have only grown."""
    last = {fragment.path: fragment for fragment in fragments}
    for fragment in last.values():
        file = as_path(fragment.path)
        if not file.is_file():
            raise UserError(
                f"{file} is gone, but the audit read its pairs from there; put it back, or run the same audit with "
                "--pairs where it lies now, then export again"
            )
        found = stamp(file)
        if not _begins_alike(file, found, fragment):
            raise UserError(
                f"{file} changed since it was audited ({fragment.size:,} bytes then, {found[0]:,} now); "
                "put it back as it was, or audit it again with --fresh"
            )


def _begins_alike(file: Path, found: tuple[int, str], last: Fragment) -> bool:
    """Return whether the planned rows of a file still stand there, which is known of lines: more may have come behind
    them."""
    if not begins_as(file, found, last):
        return False
    if found[0] == last.size:
        return True
    if not grows(file):
        return False
    with file.open("rb") as stream:
        stream.seek(max(0, last.size - 1))
        return stream.read(1) == b"\n" or not stream.readline(2**20).strip()  # else the last line has grown


class ReadDecided:
    """Reads the scored pairs of a fragment from its source, each with the decision on it (EXPORTED)."""

    def __init__(self, audit: Artifact, source: dict[str, Any], max_chars: int, drop: Drop) -> None:
        self.audit = audit
        self.source = source
        self.max_chars = max_chars
        self.drop = drop

    def __call__(self, fragment: Fragment) -> pa.Table:
        """Raises UserError where the source does not give the rows that were audited."""
        name = part_name(fragment.number)
        scored = read_parquet(self.audit.path / SCORES / name, [*RANKED, "flag"])
        path = self.audit.path / "quarantine" / name
        refused = set(read_parquet(path, ["row_key"])["row_key"].to_pylist()) if path.exists() else set()
        keys = [*scored["row_key"].to_pylist(), *refused]
        if not keys:  # nothing of the fragment is in the part of the source that was asked for
            return EXPORTED.empty_table()
        source = SourceConfig(path=fragment.path if fragment.file else str(_root(fragment, keys[0])), **self.source)
        rows = NormalisePairs([source], self.max_chars)(read_raw(fragment, source))
        pairs = rows.filter(pc.is_null(rows["refused"])).select(schema.PAIRS.names)
        return self._joined(pairs, scored, refused, fragment)

    def _joined(self, pairs: pa.Table, scored: pa.Table, refused: set[str], fragment: Fragment) -> pa.Table:
        left: defaultdict[Pair, deque[tuple[str, str]]] = defaultdict(deque)
        for row in zip(pairs_in(scored), scored["flag"].to_pylist(), ranks(scored), strict=True):
            left[row[0]].append(self.drop.decide(row))
        taken, found = [], []
        for place, pair in enumerate(pairs_in(pairs)):
            if left[pair]:
                taken.append(place)
                found.append(left[pair].popleft())
            elif pair[0] not in refused:
                raise _changed(fragment, f"{pair[0]} is a pair now that was not audited")
        missing = [pair[0] for pair, decisions in left.items() if decisions]
        if missing:
            raise _changed(fragment, f"{missing[0]} is no longer the pair that was audited")
        kept = pairs.take(pa.array(taken, pa.int64()))
        for column, values in zip(("decision", "why"), zip(*found, strict=True) if found else ((), ()), strict=True):
            kept = kept.append_column(column, pa.array(values, pa.string()))
        return kept.cast(EXPORTED)


def _changed(fragment: Fragment, what: str) -> UserError:
    return UserError(
        f"{fragment.path} gives other rows than it did: {what}; put the file back as it was, or audit it again"
    )


def _root(fragment: Fragment, key: str) -> Path:
    """The folder that the row keys of a fragment start from, wherever the audit was started.

    Raises:
        UserError: the keys are not of the fragment's file.
    """
    name, path = Path(key.rpartition("#")[0]), as_path(fragment.path)
    if path.parts[-len(name.parts) :] != name.parts:
        raise UserError(f"{path} is planned, but row {key} is scored: the audit is damaged; run it with --fresh")
    for _ in name.parts:
        path = path.parent
    return path


# What is written


def trl_line(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair in TRL's conversational preference layout, with an implicit prompt where there is none."""
    said = {name: [fields_of(message) for message in pair[name] or []] for name in ("prompt", *schema.SIDES)}
    return said if said["prompt"] else {side: said[side] for side in schema.SIDES}


def write_part(rows: pa.Table, directory: Path, name: str, red_team: bool) -> dict[str, Any]:
    """A fragment's kept pairs and its decisions; what its `done` entry says of them. Tables are marked at the end."""
    kept = rows.filter(pc.equal(rows["decision"], KEEP)).select(schema.PAIRS.names)
    told = {"red_team": True} if red_team else {}
    lines = [json.dumps(trl_line(row) | told, ensure_ascii=False) for row in kept.to_pylist()]
    write_parquet(kept, directory / PAIRS / name)
    write_text("".join(f"{line}\n" for line in lines), (directory / TRL / name).with_suffix(".jsonl"))
    write_parquet(rows.select(DECIDED.names), directory / DECISIONS / name)
    return {column: Counter(rows[column].to_pylist()) for column in ("decision", "why")}


def export(audit: Artifact, percent: float | None, place: Place, runner: Runner) -> Artifact:
    """The pairs of an audit less the flagged ones, or less the `percent` most suspicious.

    Raises:
        UserError: a source is gone or changed, no pair is left, or the place holds something else.
    """
    asked = read_asked(audit.path)
    inputs: dict[str, Artifact | Input] = {"audit": audit, "scores": Input(content_hash(audit.path / SCORES), (audit,))}
    if (audit.path / REVIEWS).exists():
        inputs["reviews"] = Input(content_hash(audit.path / REVIEWS), (audit,))
    config = {"drop": "flagged"} if percent is None else {"percent": percent}
    fragments = read_plan(audit.path / PLAN)
    files = list({as_path(fragment.path) for fragment in fragments})
    place = replace(place, reads=(*place.reads, *files))
    write = partial(_write_export, audit, asked, percent, fragments, files, runner)
    return place.make(Recipe("export", VERSION, config, inputs), write)


def _write_export(
    audit: Artifact,
    asked: dict[str, Any],
    percent: float | None,
    fragments: list[Fragment],
    files: list[Path],
    runner: Runner,
    out: Path,
) -> Result:
    check_sources(fragments)
    licence = asked["source"]["licence"]
    read = Marks((licence,) if licence else (), is_marked(files))
    own = together(read, enclosing(files))  # of the sources, which are read again
    job = MapJob(
        "export",
        ReadDecided(audit, asked["source"], asked["max_chars"], what_to_drop(audit, percent)),
        lambda: lambda rows: rows,
        EXPORTED,
        write=partial(write_part, red_team=audit.red_team or own.red_team),
    )
    runner.map(job, fragments, out)
    rows, why = _counts(out, fragments)
    if not rows["kept"]:
        raise UserError(f"all {rows['dropped']:,} pairs would be left out; lower --percent, or flag fewer pairs")
    return Result(rows, {"why": why}, own=own)


def _counts(out: Path, fragments: Sequence[Fragment]) -> tuple[dict[str, int], dict[str, int]]:
    """Rows kept and dropped, and rows by why."""
    decisions: Counter[str] = Counter()
    why: Counter[str] = Counter()
    for fragment in fragments:
        done = read_json(out / "done" / f"{fragment.number:08}.json")
        decisions.update(done["decision"])
        why.update(done["why"])
    return {"kept": decisions[KEEP], "dropped": decisions[DROP]}, dict(sorted(why.items()))
