"""Estimate what an audit would cost, from a sample of its rows: `safer-ray audit --dry-run`."""

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa

from safer_ray.audit.parts import write_part
from safer_ray.audit.run import Audit
from safer_ray.audit.score import AuditRows, PreparePairs
from safer_ray.data.source_files import find_files
from safer_ray.data.sources import plan_file, read_raw, several_formats
from safer_ray.errors import UserError
from safer_ray.features.bundle import check_auditor
from safer_ray.reward.tokens import token_count
from safer_ray.schema import split_refused
from safer_ray.storage.artifacts import Fragment

PLACES, ROWS = 16, 16  # of the sample: fragments, and rows of each


class Estimate(NamedTuple):
    """The cost of a whole audit, on actors as fast as this process."""

    files: int
    left_out: int  # data files in folders that are no part of the source
    rows: int
    refused_share: float  # of the sample
    tokens: float
    pairs_per_s: float  # of one actor
    actors: int
    seconds: float
    actor_mb: float  # resident, with the bundle loaded
    disk_mb: float
    told: tuple[str, ...]  # what else is left out, and what was chosen

    def in_words(self) -> str:
        hours = self.seconds / 3600
        told = f"{self.seconds:,.0f} s" if hours < 1 else f"{hours:,.1f} hours"
        return (
            f"{self.rows:,} rows in {self.files:,} files ({self.left_out:,} below them left out), "
            f"about {100 * self.refused_share:.1f}% of no use\n"
            f"{self.tokens:,.0f} tokens in both sides\n"
            f"{told} on {self.actors} actor{'s' if self.actors != 1 else ''} as fast as this machine "
            f"({self.pairs_per_s:,.1f} pairs/s each)\n"
            f"{self.actor_mb:,.0f} MB of memory an actor, {self.disk_mb:,.1f} MB of disk for the results\n"
            + "".join(f"{line}\n" for line in self.told)
            + "estimated from a sample; nothing was written"
        )


def estimate(audit: Audit, actors: int) -> Estimate:
    """Read a sample spread over the corpus, put it through the bundle, and scale up.

    Raises:
        UserError: the corpus cannot be read, or no row of the sample can be used.
    """
    check_auditor(audit.auditor)
    files, left_out, told = find_files(audit.source)
    formats: dict[Path, str] = {}
    plan = partial(plan_file, source=audit.source, rows=audit.fragment_rows, whole_lines=True, formats=formats)
    fragments = [fragment for file in files for fragment in plan(file)]
    rows = sum(f.stop - f.start for f in fragments)
    raw = _sample(audit, fragments)
    prepared = PreparePairs(audit.auditor, (audit.source,), audit.max_chars, audit.reading)(raw)
    ready, _ = split_refused(prepared)
    if not len(ready):
        reason = next((text for text in prepared["refused"].to_pylist() if text), "there are none")
        raise UserError(f"{audit.source.path}: no row of a sample of {len(raw)} can be used: {reason}")
    score = AuditRows(audit.auditor, audit.scores, reading=audit.reading)
    score(ready.slice(0, 8))  # the first pass is slower
    began = time.perf_counter()
    scored, _ = split_refused(score(ready))
    speed = len(ready) / (time.perf_counter() - began)
    usable = len(ready) / len(raw)
    return Estimate(
        len(files),
        sum(left_out.values()),
        rows,
        1 - usable,
        token_count(ready) / len(ready) * rows * usable,
        speed,
        actors,
        rows * usable / (speed * actors),
        psutil.Process().memory_info().rss / 2**20,
        _bytes_written(scored) / len(ready) * rows * usable / 2**20,
        (*told, *several_formats(formats)),
    )


def _sample(audit: Audit, fragments: list[Fragment]) -> pa.Table:
    places = np.unique(np.linspace(0, len(fragments) - 1, min(PLACES, len(fragments))).astype(int))
    each = PLACES * ROWS // len(places)
    taken = [replace(f, stop=min(f.stop, f.start + each)) for f in (fragments[i] for i in places)]
    return pa.concat_tables([read_raw(fragment, audit.source) for fragment in taken])


def _bytes_written(scored: pa.Table) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_part(scored, Path(folder), "part-00000000.parquet")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
