"""The stages that fit a detector across folds: from what the folds say of every pair to which pairs are suspected."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray

from safer_ray.config.sections import RunConfig, ScoresConfig
from safer_ray.detection.combined import Readings, fit_combined
from safer_ray.errors import UserError
from safer_ray.features.bundle import VALUES, read_features
from safer_ray.features.codes import contrasts, matrix_of
from safer_ray.features.scoring import margins, pair_scores, suspect, with_columns
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.crossfit import Fold, OutOfFold, frozen_below
from safer_ray.pipeline.stage import StageContext, make
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Artifact, Result, part_files, read_parts
from safer_ray.storage.files import read_parquet, write_parquet


class FoldReadings(NamedTuple):
    """Readings of n pairs by the models of their folds."""

    fold: Int[ndarray, " n"]
    readings: Readings
    score_paper: Float[ndarray, " n"]


def trunk_vectors(ctx: StageContext, config: RunConfig, pairs: Artifact, fitted: OutOfFold) -> Artifact:
    """Return the mean vectors of the frozen trunk, which all folds share and no label has touched."""
    return model_stages.vectors(ctx, vector_layers(config), fitted.folds[0].reward, pairs)


def detector(ctx: StageContext, config: RunConfig, pairs: Artifact, fitted: OutOfFold) -> Artifact:
    """Return the detector `combined`, fitted on all pairs, and its out-of-fold values of them."""
    vectors = trunk_vectors(ctx, config, pairs, fitted)
    write = partial(_write_detector, config, fitted, vectors)
    return make(ctx, "detector", {}, write, pairs, scores=fitted.scores, vectors=vectors)


def _write_detector(config: RunConfig, fitted: OutOfFold, vectors: Artifact, out: Path) -> Result:
    ids = read_parts(fitted.scores.path, ["pair_id"])["pair_id"].to_pylist()
    read = read_folds(fitted.folds, vectors, ids)
    model, values = fit_combined(read.readings, read.fold, ids)
    model.save(out)
    write_parquet(pa.table({"pair_id": ids, "combined": values}), out / VALUES)
    facts = {"vector_layers": list(vector_layers(config)), "weights": model.weights_by_part()}
    return Result({"pairs": len(ids)}, facts)


def suspected(ctx: StageContext, config: ScoresConfig, scores: Artifact, detector: Artifact) -> Artifact:
    """Return out-of-fold scores, suspected by what the detector says of each pair, among what it says of all."""
    write = partial(_write_suspected, config, scores, detector)
    return make(ctx, "suspected", {"flag_quantile": config.flag_quantile}, write, scores=scores, detector=detector)


def _write_suspected(config: ScoresConfig, scores: Artifact, detector: Artifact, out: Path) -> Result:
    known = read_parquet(detector.path / VALUES)
    reference = known["combined"].to_numpy()
    for path in part_files(scores.path):
        rows = pq.read_table(path)
        values, _ = rows_of(known, rows["pair_id"].to_pylist())
        said = suspect(values["combined"].to_numpy(), reference, config.flag_quantile)
        write_parquet(with_columns(rows, said), out / path.name)
    facts = {**scores.metrics, "detector": "combined"}
    return Result({"written": len(known)}, facts)


def read_folds(folds: Sequence[Fold], vectors: Artifact, ids: list[str]) -> FoldReadings:
    """Return what the folds say of the pairs with these ids, in their order.

    Raises:
        UserError: a model could not read some of the pairs.
    """
    said = pa.concat_tables([_said(fold, number) for number, fold in enumerate(folds)])
    latents = folds[0].codes.metrics["latents"]
    matrix = sp.vstack([contrasts(read_parts(fold.codes.path), latents) for fold in folds]).tocsr()
    rows, missing = rows_of(said.append_column("row", pa.array(np.arange(len(said)))), ids)
    means, also = rows_of(read_parts(vectors.path), ids)
    if missing or also:
        first = (missing or also)[0]
        raise UserError(f"pair {first!r} ({len({*missing, *also})} in all) was quarantined by a model; leave it out")
    readings = Readings(
        margin=rows["margin"].to_numpy(),
        score=rows["score"].to_numpy(),
        contrast=matrix[rows["row"].to_numpy()],
        response=matrix_of(means["response"]),
        prompt=matrix_of(means["prompt"]),
    )
    return FoldReadings(rows["fold"].to_numpy(), readings, rows["score_paper"].to_numpy())


def _said(fold: Fold, number: int) -> pa.Table:
    """Return margin and both scores of a fold's held pairs, in the order of its codes."""
    codes = read_parts(fold.codes.path)
    features = read_features(fold.auditor.path / "features.json")
    return pa.table(
        {
            "pair_id": codes["pair_id"],
            "fold": np.full(len(codes), number),
            "margin": margins(codes),
            "score": pair_scores(codes, features._replace(mode="response")),
            "score_paper": pair_scores(codes, features._replace(mode="paper")),
        }
    )


def vector_layers(config: RunConfig) -> tuple[int, ...]:
    """The layers whose mean vectors the probes read."""
    assert config.cross_fit is not None
    return config.cross_fit.vector_layers or (config.activations.layer,)


def check_shared_trunk(config: RunConfig, who: str) -> None:
    """Raises UserError unless all folds share every layer that a detector reads."""
    deepest = max(config.activations.layer, *vector_layers(config))
    if not frozen_below(config.reward, deepest):
        raise UserError(
            f"{who}: reward.frozen_layers is {config.reward.frozen_layers}, below layer {deepest}, which is read "
            "(activations.layer, cross_fit.vector_layers): layers of different folds would not mean the same; "
            "freeze up to it"
        )
