"""The stage that finds duplicates and contradicting labels among pairs."""

import logging
from functools import partial
from pathlib import Path

import pyarrow as pa

from safer_ray.config.sections import DuplicatesConfig
from safer_ray.data.duplicates import counted, find, labelled, listed
from safer_ray.data.near_duplicates import bands_for
from safer_ray.data.signatures import SIGNATURES, SignTexts
from safer_ray.pipeline.stage import StageContext, make, pairs_of
from safer_ray.storage.artifacts import Artifact, Result, part_files, part_fragments, read_fragment
from safer_ray.storage.files import read_parquet, write_parquet
from safer_ray.storage.work import MapJob

log = logging.getLogger(__name__)
FOUND = "found"  # the folder of what is listed


def duplicates(ctx: StageContext, config: DuplicatesConfig, pairs: Artifact) -> Artifact:
    """Return the pairs with labels that say which repeat others or contradict them, and a list of all that was found.

    `pairs/` is as the pairs were but for `labels`, so that it serves in their place; `found/` has DUPLICATES.
    """
    return make(ctx, "duplicates", config, partial(_write_duplicates, ctx, config, pairs), pairs=pairs)


def _write_duplicates(ctx: StageContext, config: DuplicatesConfig, pairs: Artifact, out: Path) -> Result:
    folder, signatures = pairs_of(pairs), out / "state" / "signatures"
    job = MapJob("duplicates", read_fragment, SignTexts, SIGNATURES, folder="state/signatures", batch_rows=2000)
    ctx.map(job, part_fragments(folder), out, refused_share=0)
    found = find(part_files(signatures), config.threshold, out / "state" / "bands")
    ids = pa.concat_tables([read_parquet(path, ["pair_id"]) for path in part_files(signatures)])
    every = ids["pair_id"].combine_chunks()
    start, replaced = 0, 0
    for path in part_files(folder):
        rows = read_parquet(path)
        written, had = labelled(rows, found, start)
        write_parquet(written, out / "pairs" / path.name)
        write_parquet(listed(found, every, start, start + len(rows)), out / FOUND / path.name)
        start, replaced = start + len(rows), replaced + had
    if replaced:
        log.warning("%d pairs had labels of the names that are written here; theirs are replaced", replaced)
    told = counted(found)
    facts = {"found": told, "threshold": config.threshold, "bands": list(bands_for(config.threshold))}

    return Result({"pairs": start} | {kind: counts["pairs"] for kind, counts in told.items()}, facts)
