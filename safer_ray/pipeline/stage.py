"""Shared by all stages: recipes and their versions, the place and the runner, and reading parts side by side."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from safer_ray.config.reading import AS_IT_COMES, ENDS, PRECISION, Reading
from safer_ray.config.sections import RunConfig
from safer_ray.config.values import Frozen
from safer_ray.errors import UserError
from safer_ray.pipeline.roles import PAIRS, check_columns, folder_of_pairs
from safer_ray.pipeline.runner import Runner
from safer_ray.reward.precision import precision_of
from safer_ray.schema import rows_of
from safer_ray.storage.accounts import Counts
from safer_ray.storage.artifacts import Artifact, Fragment, Place, Recipe, Result, part_files, read_fragment
from safer_ray.storage.files import read_parquet
from safer_ray.storage.quarantine import quarantine_rows
from safer_ray.storage.recipes import Input
from safer_ray.storage.work import MapJob, Work

VERSIONS = {
    "corpus": 2,
    "pairs": 3,
    "noise": 2,
    "duplicates": 1,
    "fold": 1,
    "cross_fit": 2,
    "gathered": 1,
    "heads": 3,
    "vectors": 2,
    "detector": 2,
    "suspected": 1,
    "detection": 5,
    "reward": 4,
    "activations": 4,
    "sae": 3,
    "codes": 4,
    "salience": 1,
    "contexts": 2,
    "verdicts": 3,
    "select": 2,
    "auditor": 5,
    "scores": 3,
    "curate": 1,
    "sweep": 2,
    "evaluate": 4,
    "report": 1,
}


READS_ENDS = frozenset({"activations", "codes", "verdicts"})  # depend on where sentences end
RUNS_NO_MODEL = frozenset({"auditor"})  # of those that a reward model is an input of
log = logging.getLogger(__name__)


def recipe(
    stage: str, config: Frozen | dict[str, Any], /, *beside: Artifact | None, **inputs: Artifact | Input
) -> Recipe:
    """Return what a stage makes of `inputs`, by role; it may read others `beside` them."""
    values = config.recorded() if isinstance(config, Frozen) else config
    return Recipe(stage, VERSIONS[stage], values, inputs, tuple(filter(None, beside)))


def pairs_of(artifact: Artifact) -> Path:
    """Return where an artifact of `pairs`, `noise` or `curate` keeps its pairs.

    Raises:
        UserError: it holds something else.
    """
    directory = folder_of_pairs(artifact.path)
    check_columns(part_files(directory)[0], PAIRS)
    return directory


def join_parts(left: Path, right: Path, columns: Sequence[str]) -> Callable[[Fragment], pa.Table]:
    """Return a reader of `left`'s fragments with columns of the equally numbered part of `right`, matched by
    `pair_id`."""

    def read(fragment: Fragment) -> pa.Table:
        rows = read_fragment(fragment)
        other = read_parquet(right / Path(fragment.path).name, ["pair_id", *columns])
        taken, missing = rows_of(other, rows["pair_id"].to_pylist())
        if missing:
            raise UserError(f"{right}: no pair {missing[0]!r}, which {left} has; pass the pairs that it was made from")
        for name in columns:
            rows = rows.append_column(name, taken[name])
        return rows

    return read


@dataclass(frozen=True)
class StageContext:
    """The runner of stages, the place of their artifacts, and settings that all share."""

    place: Place
    runner: Runner
    fragment_rows: int = 1000
    shards: int = 1  # parts that reward models are cut into where they only read
    reading: Reading = AS_IT_COMES  # of reward models that are not made here
    max_refused_share: float = 0.2  # of the rows of a stage, before it is given up

    @classmethod
    def of(cls, place: Place, runner: Runner, config: RunConfig) -> Self:
        """As the config of a run says."""
        share = config.pairs.max_refused_share
        return cls(place, runner, config.fragment_rows, config.reward.shards, config.reading, share)

    def reading_of(self, reward: Artifact) -> Reading:
        """Return how a reward model is read here, its dtype settled: by the model and by what runs it, and never by
        the process that happens to load it.

        Raises:
            UserError: the model is in a bundle that says otherwise than this context does.
        """
        precision = precision_of(reward.path, self.reading, self.runner.on_gpu)
        return self.reading.model_copy(update={PRECISION: precision})

    def map(
        self, job: MapJob, fragments: Sequence[Fragment], directory: Path, *, refused_share: float | None = None
    ) -> dict[str, int]:
        """Map a job; its row counts. What it writes is marked as the inputs of what is built in `directory` are.

        Raises:
            UserError: more than `refused_share`, or else the configured share, of the rows failed; the commonest reason
                is named, and a pair.
        """
        return self.map_all([Work(job, fragments, directory)], refused_share=refused_share)[0]

    def map_all(self, works: Sequence[Work], *, refused_share: float | None = None) -> list[dict[str, int]]:
        """As `map`, of several jobs of one stage."""
        marked = [
            work._replace(
                job=replace(
                    work.job, metadata={**(work.job.metadata or {}), **self.place.metadata(work.directory)} or None
                )
            )
            for work in works
        ]
        share = self.max_refused_share if refused_share is None else refused_share
        return [_within(share, work, counts) for work, counts in zip(marked, self.runner.map_all(marked), strict=True)]


def _within(share: float, work: Work, counts: Counts) -> dict[str, int]:
    """Return the row counts of a map of which at most so large a share was refused.

    Raises:
        UserError: more was.
    """
    if counts.quarantined:
        reason = max(counts.reasons, key=lambda name: counts.reasons[name])
        (first,) = quarantine_rows(work.directory).slice(0, 1).to_pylist()
        told = " ".join(first["reason"].split())[:200]
        left_out = f"{work.job.stage}: {counts.quarantined} of {counts.read} rows"
        why = f"most with {reason!r}, the first is pair {first['pair_id']!r} ({told})"
        if counts.quarantined > share * counts.read:
            raise UserError(
                f"{left_out} failed, more than pairs.max_refused_share {share:g}, {why}; see "
                f"{work.directory / 'quarantine'}, and run with --fresh once the cause is mended"
            )
        log.warning("%s are left out, %s; `quarantine` in what is made has them", left_out, why)
    return {"read": counts.read, "written": counts.written, "quarantined": counts.quarantined}


def make(
    ctx: StageContext,
    stage: str,
    config: Frozen | dict[str, Any],
    write: Callable[[Path], Result],
    /,
    *beside: Artifact | None,
    **inputs: Artifact | Input,
) -> Artifact:
    """Return what `stage` makes of `inputs`, by role: as it is there, or as `write` writes it into a folder.

    Its recipe, and with it its name, is made of what `config` records and what the inputs are called. It carries the
    licences and the red-team mark of all inputs, of those that `write` reads `beside` them, and those that it returns.
    A dry context writes nothing; a folder that was begun is gone on with.
    """
    made, reward = recipe(stage, config, *beside, **inputs), inputs.get("reward")
    return ctx.place.make(with_reading(ctx, made, reward) if isinstance(reward, Artifact) else made, write)


def with_reading(ctx: StageContext, made: Recipe, reward: Artifact) -> Recipe:
    """Return the recipe of what is made with a reward model, with what was asked of how that is read."""
    no_matter = [*(() if made.stage in READS_ENDS else (ENDS,)), *((PRECISION,) if made.stage in RUNS_NO_MODEL else ())]
    asked = ctx.reading_of(reward).asked(*no_matter)
    return replace(made, config=made.config | {"reading": asked}) if asked else made
