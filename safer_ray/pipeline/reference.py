"""The reference of a bundle: what its detectors say of pairs whose labels neither its model nor its features were made
by."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import RunConfig
from safer_ray.detection.evaluation import effective_count
from safer_ray.errors import UserError
from safer_ray.features.scoring import Features, margins, pair_scores
from safer_ray.pipeline.stage import join_parts, pairs_of
from safer_ray.reward.split import validation_split
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Artifact, Fragment, open_artifact, part_files, read_parts
from safer_ray.storage.files import read_parquet
from safer_ray.storage.marks import MANIFEST

LEAST = 100  # held-out pairs; of fewer, a quantile of 5% says little
MEASURED = 0.05  # the quantile at which it is told what dependent pairs are worth
Kind = Literal["held out", "out of fold", "in sample"]
log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """The prompts that are held out of training and of the choice of features, by a hash of each."""

    percent: float
    seed: int

    def of(self, groups: list[str]) -> np.ndarray:
        """Return for each pair, by its prompt group, whether it is held out; bool [n]."""
        return validation_split(groups, self.percent, self.seed)


def held_out_of(config: RunConfig) -> HeldOut | None:
    """Return what a run holds out; None where it scores all pairs out of fold, by models of their kind."""
    if config.cross_fit is not None and config.reward.use is None:
        return None
    return HeldOut(config.reward.validation_percent, config.reward.seed)


def _are_enough(pairs: Artifact, held: HeldOut) -> bool:
    counts = (held.of(read_parquet(path, ["group"])["group"].to_pylist()).sum() for path in part_files(pairs_of(pairs)))
    return int(sum(counts)) >= LEAST


def without_held_out(codes: Path, pairs: Path, held: HeldOut) -> Callable[[Fragment], pa.Table]:
    """Return a reader of fragments of codes that leaves out the pairs that are held out."""
    read = join_parts(codes, pairs, ["group"])

    def kept(fragment: Fragment) -> pa.Table:
        rows = read(fragment)
        return rows.filter(pa.array(~held.of(rows["group"].to_pylist()))).drop_columns(["group"])

    return kept


class Reference(NamedTuple):
    """The source of a bundle's reference: `pairs` of which some are `held` out, `scores` of pairs out of fold, or
    `codes` of pairs that are held out; without any of them, the pairs that the bundle is made by."""

    pairs: Artifact | None = None
    held: HeldOut | None = None
    scores: Artifact | None = None
    codes: Artifact | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """Return what a recipe says of it, beside its inputs."""
        return {"held_out": self.held._asdict()} if self.held else {}

    @property
    def split(self) -> tuple[Artifact, HeldOut] | None:
        """Return the pairs and what is held out of them; None where that is nothing, or too few to be a reference."""
        if self.pairs is None or self.held is None or not _are_enough(self.pairs, self.held):
            return None
        return self.pairs, self.held

    @property
    def inputs(self) -> dict[str, Artifact]:
        """Return what it is read from, by role; the names of the codes imply their pairs."""
        named = {"reference": self.codes, "out_of_fold": self.scores}
        return {role: artifact for role, artifact in named.items() if artifact is not None}

    def values(self, codes: Artifact, features: Features) -> tuple[Kind, pa.Table]:
        """Return of which kind the reference is, and of its pairs `group`, `score` and `reward_margin`."""
        if self.codes is not None:
            return "held out", _with_groups(values_of(self.codes, features), self.pairs)
        if self.scores is not None:
            known = read_parts(self.scores.path, ["pair_id", "score", "reward_margin"])
            return "out of fold", _with_groups(known, self.pairs)
        known = _with_groups(values_of(codes, features), self.pairs)
        if self.held is not None and self.split is not None:
            return "held out", known.filter(pa.array(self.held.of(known["group"].to_pylist())))
        if self.held is not None:
            log.warning(
                "auditor: fewer than %d of %s pairs are held out, so the reference is of all of them, which features "
                "were chosen by: of new pairs more will be flagged; pass more pairs, or raise "
                "reward.validation_percent (%g)",
                *(LEAST, len(known), self.held.percent),
            )
        return "in sample", known


ALL_PAIRS = Reference()


def values_of(codes: Artifact, features: Features) -> pa.Table:
    """Return `pair_id`, `score` and `reward_margin` of all pairs in codes."""
    parts = []
    for path in part_files(codes.path):
        part = read_parquet(path)
        margin = pa.array(margins(part), pa.float64(), from_pandas=True)
        columns = {"pair_id": part["pair_id"], "score": pair_scores(part, features), "reward_margin": margin}
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _with_groups(rows: pa.Table, pairs: Artifact | None) -> pa.Table:
    """Return rows with the prompt group of each pair; of pairs that are not at hand, each is a group of its own."""
    if pairs is None:
        return rows.append_column("group", rows["pair_id"])
    found, missing = rows_of(read_parts(pairs_of(pairs), ["pair_id", "group"]), rows["pair_id"].to_pylist())
    if missing:
        raise UserError(f"auditor: the pairs have no {missing[0]!r}, which the codes have; pass the pairs of the codes")
    return rows.append_column("group", found["group"])


def facts_of(kind: Kind, rows: pa.Table) -> dict[str, Any]:
    """Return what is told of a reference: its kind, its pairs and prompts, and by detector how many independent pairs
    tell as much of the quantile of 5% as these, of which several may have one prompt."""
    groups = np.array(rows["group"].to_pylist(), dtype=object)
    worth = {}
    for name in ("score", "reward_margin", "combined"):
        values = rows[name].to_numpy() if name in rows.column_names else np.empty(0)
        if len(values) and np.isfinite(values).all():
            worth[name] = round(effective_count((values > np.quantile(values, MEASURED)).astype(np.float64), groups), 1)
    return {"kind": kind, "pairs": len(rows), "prompts": len(set(groups.tolist())), "worth": worth}


def data_of(codes: Artifact) -> list[dict[str, Any]]:
    """Return by what sources the pairs of codes were read, as far as the artifacts beside these say it: `name`,
    `format`, `section`, `part`, `licence`, what names its files (`input`), and how many `pairs` all sources are."""
    artifact = codes
    while artifact.manifest.get("stage") != "pairs":
        folder = artifact.path.parent / artifact.manifest.get("inputs", {}).get("pairs", "")
        if folder == artifact.path.parent or not (folder / MANIFEST).is_file():
            return []
        artifact = open_artifact(folder)
    named, rows = artifact.manifest.get("inputs", {}), artifact.manifest.get("rows", {})
    sources = artifact.manifest.get("config", {}).get("sources", [])
    return [
        {name: source.get(name) for name in ("name", "format", "section", "part", "licence")}
        | {"input": named.get(f"source{number}"), "pairs": rows.get("pairs")}
        for number, source in enumerate(sources)
    ]
