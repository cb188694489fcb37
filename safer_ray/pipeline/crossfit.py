"""Scores of pairs by models that did not see their prompts: the pairs are cut into folds by prompt group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.reading import ENDS
from safer_ray.config.sections import RewardConfig, RunConfig, ScoresConfig
from safer_ray.errors import UserError
from safer_ray.features.scoring import KIND, OUT_OF_FOLD, suspect, with_columns
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.stage import StageContext, make, pairs_of
from safer_ray.reward.reading import DTYPE
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Artifact, Result, part_files, part_name, read_parts
from safer_ray.storage.files import read_parquet, write_parquet


def fold_of(groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each pair, int64 [n] in 0..folds-1: a hash of seed and prompt group."""
    digests = [int(hashlib.sha256(f"fold:{seed}:{group}".encode()).hexdigest()[:8], 16) for group in groups]
    return np.array(digests, dtype=np.int64) % folds


class Fold(NamedTuple):
    """One fold's artifacts: models made from `train`, and what they say of `held`."""

    train: Artifact
    held: Artifact
    reward: Artifact
    sae: Artifact
    codes: Artifact  # of `held`
    auditor: Artifact
    scores: Artifact  # of `held`


@dataclass(frozen=True)
class OutOfFold:
    """All folds, and their scores as one artifact over all pairs."""

    folds: list[Fold]
    scores: Artifact
    shared_sae: bool


def fold(ctx: StageContext, pairs: Artifact, folds: int, number: int, seed: int, side: str) -> Artifact:
    """Return the pairs of one fold (`held`) or of all others (`train`).

    Raises:
        UserError: there are none.
    """
    shown = {"folds": folds, "fold": number, "seed": seed, "side": side}
    return make(ctx, "fold", shown, partial(_write_fold, pairs, folds, number, seed, side), pairs=pairs)


def _write_fold(pairs: Artifact, folds: int, number: int, seed: int, side: str, out: Path) -> Result:
    count = 0
    for path in part_files(pairs_of(pairs)):
        rows = read_parquet(path)
        inside = fold_of(rows["group"].to_pylist(), folds, seed) == number
        kept = rows.filter(pa.array(inside == (side == "held")))
        write_parquet(kept, out / path.name)
        count += len(kept)
    if not count:
        raise UserError(f"cross_fit: fold {number} of {folds} leaves no pairs to {side}; lower cross_fit.folds")
    return Result({"pairs": count}, seed=seed)


def cross_fit(
    ctx: StageContext, config: RunConfig, pairs: Artifact, corpus: Artifact | None = None, sae: Artifact | None = None
) -> OutOfFold:
    """Return the reward model, selection and scores of every fold, made from the other folds' pairs.

    The autoencoder, too, unless the trunk below the layer read is frozen: then one is shared, `sae` if it is given,
    since it sees the same vectors in every fold, and no label.
    """
    assert config.cross_fit is not None
    count, seed = config.cross_fit.folds, config.cross_fit.seed
    sides = [[fold(ctx, pairs, count, i, seed, side) for i in range(count)] for side in ("train", "held")]
    rewards = model_stages.rewards(ctx, config.reward, sides[0])
    shared = frozen_below(config.reward, config.activations.layer)
    if shared:
        saes = [sae or _fold_sae(ctx, config, sides[0][0], rewards[0])] * count
    else:
        saes = [_fold_sae(ctx, config, train, reward) for train, reward in zip(sides[0], rewards, strict=True)]
    codes = [model_stages.codes(ctx, *read) for read in zip(sides[1], rewards, saes, strict=True)]
    folds = []
    for i, (train, held, reward) in enumerate(zip(*sides, rewards, strict=True)):
        seen = gathered(ctx, train, codes) if shared else model_stages.codes(ctx, train, reward, saes[i])
        folds.append(fit_fold(ctx, config, train, held, reward, saes[i], seen, codes[i], corpus))
    return OutOfFold(folds, scores_of_folds(ctx, pairs, folds, shared, config.scores), shared)


def _fold_sae(ctx: StageContext, config: RunConfig, train: Artifact, reward: Artifact) -> Artifact:
    activations = model_stages.activations(ctx, config.activations, train, reward)
    return model_stages.sae_in_stages(ctx, config.sae, activations, config.activations.layer, train, reward)


def fit_fold(
    ctx: StageContext,
    config: RunConfig,
    train: Artifact,
    held: Artifact,
    reward: Artifact,
    sae: Artifact,
    seen: Artifact,
    codes: Artifact,
    corpus: Artifact | None,
) -> Fold:
    """Return a fold: of the codes `seen` of the training pairs, a selection; of the held pairs' `codes`, scores by
    it."""
    salience = feature_stages.salience(ctx, seen, config.salience.mode)
    verdicts = feature_stages.verdicts(ctx, config.judge, salience, reward, sae, config.select.candidates, corpus)
    selected = feature_stages.select(ctx, config.select, salience, verdicts=verdicts)
    auditor = feature_stages.auditor(ctx, reward, sae, selected, seen)
    detector = "safer" if config.scores.detector == "combined" else config.scores.detector  # fitted over all folds
    scoring = config.scores.model_copy(update={"detector": detector})
    scores = feature_stages.scores(ctx, scoring, codes, held, auditor)
    return Fold(train, held, reward, sae, codes, auditor, scores)


def gathered(ctx: StageContext, train: Artifact, codes: list[Artifact]) -> Artifact:
    """Return the codes of a fold's training pairs, taken from the other folds', which share trunk and autoencoder; the
    rewards among them are those of the other folds' models."""
    inputs = {f"codes{i}": artifact for i, artifact in enumerate(codes)}
    return make(ctx, "gathered", {}, partial(_write_gathered, train, codes), pairs=train, **inputs)


def _write_gathered(train: Artifact, codes: list[Artifact], out: Path) -> Result:
    every = pa.concat_tables([read_parts(artifact.path) for artifact in codes])
    count = 0
    for path in part_files(pairs_of(train)):
        rows, _ = rows_of(every, read_parquet(path, ["pair_id"])["pair_id"].to_pylist())
        write_parquet(rows, out / path.name)
        count += len(rows)
    facts = {name: codes[0].metrics[name] for name in ("latents", "k", ENDS)} | {
        DTYPE: feature_stages.dtype_of(codes[0])
    }
    return Result({"written": count}, facts)


def scores_of_folds(
    ctx: StageContext, pairs: Artifact, folds: list[Fold], shared: bool, config: ScoresConfig
) -> Artifact:
    """Return the folds' scores in the order of the pairs, marked as out of fold; each pair is suspected among what all
    folds say of the pairs that they held out."""
    inputs = {f"scores{i}": fold.scores for i, fold in enumerate(folds)}
    write = partial(_write_scores, pairs, folds, shared, config)
    return make(ctx, "cross_fit", {"shared_sae": shared}, write, pairs=pairs, **inputs)


def _write_scores(pairs: Artifact, folds: list[Fold], shared: bool, config: ScoresConfig, out: Path) -> Result:
    scores = pa.concat_tables([read_parts(fold.scores.path) for fold in folds])
    # A fold's own reference is of pairs that its models saw, which are rarely as low as new ones.
    values = scores["reward_margin" if config.detector == "reward_margin" else "score"].to_numpy()
    scores = with_columns(scores, suspect(values, values, config.flag_quantile))
    missing = 0
    for number, path in enumerate(part_files(pairs_of(pairs))):
        rows, without = rows_of(scores, read_parquet(path, ["pair_id"])["pair_id"].to_pylist())
        missing += len(without)
        write_parquet(rows.replace_schema_metadata({KIND: OUT_OF_FOLD}), out / part_name(number))
    facts = {"kind": OUT_OF_FOLD, "folds": len(folds), "shared_sae": shared}
    rows_by_kind = {"written": len(scores), "missing": missing}
    return Result(rows_by_kind, facts)


def frozen_below(config: RewardConfig, layer: int) -> bool:
    """Return whether training leaves the output of `layer` as it was, so that all models on one base share it."""
    return config.frozen_layers >= layer
