"""Scores of pairs by models that did not see their prompts: the pairs are cut into folds by prompt group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import RewardConfig, RunConfig
from safer_ray.errors import UserError
from safer_ray.features.scoring import KIND, OUT_OF_FOLD
from safer_ray.pipeline.findings import Findings
from safer_ray.pipeline.harvest import Harvest
from safer_ray.pipeline.stage import pairs_of, recipe
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


class CrossFit(Harvest, Findings):
    """The stages, run fold by fold."""

    def fold(self, pairs: Artifact, folds: int, fold: int, seed: int, side: str) -> Artifact:
        """The pairs of one fold (`held`) or of all others (`train`).

        Raises:
            UserError: there are none.
        """

        def build(out: Path) -> Result:
            count = 0
            for path in part_files(pairs_of(pairs)):
                rows = read_parquet(path)
                inside = fold_of(rows["group"].to_pylist(), folds, seed) == fold
                kept = rows.filter(pa.array(inside == (side == "held")))
                write_parquet(kept, out / path.name)
                count += len(kept)
            if not count:
                raise UserError(f"cross_fit: fold {fold} of {folds} leaves no pairs to {side}; lower cross_fit.folds")
            return Result({"pairs": count}, seed=seed)

        shown = {"folds": folds, "fold": fold, "seed": seed, "side": side}
        return self.place.make(recipe("fold", shown, pairs=pairs), build)

    def cross_fit(
        self, config: RunConfig, pairs: Artifact, corpus: Artifact | None = None, sae: Artifact | None = None
    ) -> OutOfFold:
        """Reward model, selection and scores of every fold from the other folds' pairs.

        The autoencoder, too, unless the trunk below the layer read is frozen: then one is shared, `sae` if it is given,
        since it sees the same vectors in every fold, and no label.
        """
        assert config.cross_fit is not None
        count, seed = config.cross_fit.folds, config.cross_fit.seed
        sides = [[self.fold(pairs, count, i, seed, side) for i in range(count)] for side in ("train", "held")]
        rewards = self.rewards(config.reward, sides[0])
        shared = frozen_below(config.reward, config.activations.layer)
        if shared:
            saes = [sae or self._sae(config, sides[0][0], rewards[0])] * count
        else:
            saes = [self._sae(config, train, reward) for train, reward in zip(sides[0], rewards, strict=True)]
        codes = [self.codes(held, reward, sae) for held, reward, sae in zip(sides[1], rewards, saes, strict=True)]
        folds = []
        for i, (train, held, reward) in enumerate(zip(*sides, rewards, strict=True)):
            seen = self._gathered(train, codes) if shared else self.codes(train, reward, saes[i])
            folds.append(self._fold(config, train, held, reward, saes[i], seen, codes[i], corpus))
        return OutOfFold(folds, self._together(pairs, folds, shared), shared)

    def _sae(self, config: RunConfig, train: Artifact, reward: Artifact) -> Artifact:
        activations = self.activations(config.activations, train, reward)
        return self.sae_in_stages(config.sae, activations, config.activations.layer, train, reward)

    def _fold(
        self,
        config: RunConfig,
        train: Artifact,
        held: Artifact,
        reward: Artifact,
        sae: Artifact,
        seen: Artifact,
        codes: Artifact,
        corpus: Artifact | None,
    ) -> Fold:
        """Of the codes `seen` of the training pairs, a selection; of the held pairs' `codes`, scores by it."""
        salience = self.salience(seen, config.salience.mode)
        verdicts = self.verdicts(config.judge, salience, reward, sae, config.select.candidates, corpus)
        selected = self.select(config.select, salience, verdicts=verdicts)
        auditor = self.auditor(reward, sae, selected, seen)
        detector = "safer" if config.scores.detector == "combined" else config.scores.detector  # fitted over all folds
        scoring = config.scores.model_copy(update={"detector": detector})
        return Fold(train, held, reward, sae, codes, auditor, self.scores(scoring, codes, held, auditor))

    def _gathered(self, train: Artifact, codes: list[Artifact]) -> Artifact:
        """Codes of a fold's training pairs, taken from the other folds', which share trunk and autoencoder; the rewards
        among them are those of the other folds' models."""

        def build(out: Path) -> Result:
            every = pa.concat_tables([read_parts(artifact.path) for artifact in codes])
            count = 0
            for path in part_files(pairs_of(train)):
                rows, _ = rows_of(every, read_parquet(path, ["pair_id"])["pair_id"].to_pylist())
                write_parquet(rows, out / path.name)
                count += len(rows)
            facts = {name: codes[0].metrics[name] for name in ("latents", "k")}
            return Result({"written": count}, facts)

        inputs = {f"codes{i}": artifact for i, artifact in enumerate(codes)}
        return self.place.make(recipe("gathered", {}, pairs=train, **inputs), build)

    def _together(self, pairs: Artifact, folds: list[Fold], shared: bool) -> Artifact:
        """The folds' scores in the order of the pairs, marked as out of fold."""

        def build(out: Path) -> Result:
            scores = pa.concat_tables([read_parts(fold.scores.path) for fold in folds])
            missing = 0
            for number, path in enumerate(part_files(pairs_of(pairs))):
                rows, without = rows_of(scores, read_parquet(path, ["pair_id"])["pair_id"].to_pylist())
                missing += len(without)
                write_parquet(rows.replace_schema_metadata({KIND: OUT_OF_FOLD}), out / part_name(number))
            facts = {"kind": OUT_OF_FOLD, "folds": len(folds), "shared_sae": shared}
            rows_by_kind = {"written": len(scores), "missing": missing}
            return Result(rows_by_kind, facts)

        inputs = {f"scores{i}": fold.scores for i, fold in enumerate(folds)}
        return self.place.make(recipe("cross_fit", {"shared_sae": shared}, pairs=pairs, **inputs), build)


def frozen_below(config: RewardConfig, layer: int) -> bool:
    """Return whether training leaves the output of `layer` as it was, so that all models on one base share it."""
    return config.frozen_layers >= layer
