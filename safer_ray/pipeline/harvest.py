"""The stages that read texts or run models. Inputs are artifacts, the output of each is one."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray import schema
from safer_ray.config.sae import WarmStartConfig
from safer_ray.config.sections import (
    ActivationsConfig,
    CorpusConfig,
    NoiseConfig,
    PairsConfig,
    RewardConfig,
    SaeConfig,
)
from safer_ray.config.where import where_mask
from safer_ray.data.benchmarks import benchmark_scores
from safer_ray.data.corpus import write_corpus
from safer_ray.data.noise import plant
from safer_ray.data.sources import NormalisePairs, names_apart, plan_sources, read_raw
from safer_ray.detection.evaluation import section_accuracy
from safer_ray.errors import UserError
from safer_ray.features.passes import EncodeActivations, EncodePairs, EncodeTexts, HeadPairs, MeanVectors, RewardPairs
from safer_ray.pipeline.inputs import (
    base_input,
    close_pairs,
    file_input,
    find_source,
    resolve_source,
    source_input,
    with_lasting_base,
)
from safer_ray.pipeline.stage import StageContext, pairs_of, recipe
from safer_ray.reward.checkpoints import hidden_size, load_pair_tokenizer
from safer_ray.reward.plain_text import TokeniseTexts, read_texts, text_fragments
from safer_ray.reward.tokens import TokenisePairs
from safer_ray.reward.train import train_reward
from safer_ray.sae.formats import load_sae
from safer_ray.sae.train import Judged, train_sae
from safer_ray.storage.artifacts import (
    Artifact,
    Result,
    part_files,
    part_fragments,
    part_name,
    read_fragment,
    read_parts,
)
from safer_ray.storage.files import at, read_parquet, write_parquet
from safer_ray.storage.marks import Marks, any_red_team, enclosing, is_marked, together
from safer_ray.storage.recipes import Input
from safer_ray.storage.work import BatchFn, MapJob, TrainJob, Work

log = logging.getLogger(__name__)


class Harvest(StageContext):
    """Corpus, pairs, noise, reward, activations, SAE, codes, evaluation."""

    def corpus(self, config: CorpusConfig) -> Artifact:
        def build(out: Path) -> Result:
            rows = write_corpus(
                out,
                train_per_section=config.train_per_section,
                heldout_per_section=config.heldout_per_section,
                seed=config.seed,
            )
            return Result(rows, seed=config.seed, own=Marks(("synthetic",)))

        return self.place.make(recipe("corpus", config), build)

    def pairs(self, config: PairsConfig, corpus: Artifact | None = None) -> Artifact:
        """Sources to pairs, with everything refused in `quarantine`.

        Raises:
            UserError: more than the configured share was refused, or nothing is left.
        """
        sources = [resolve_source(source, corpus) for source in config.sources]
        shown = config.model_dump(mode="json")
        for source in shown["sources"]:
            del source["path"]
        found = [find_source(s, self.place, config.sources[i]) for i, s in enumerate(sources)]
        inputs = {f"source{i}": source_input(config.sources[i], s, found[i], corpus) for i, s in enumerate(sources)}
        if apart := names_apart(sources, [each.files for each in found]):
            inputs["names"] = Input(apart)
        left_out = {folder: files for each in found for folder, files in each.left_out.items()}

        def build(out: Path) -> Result:
            for folder, number in left_out.items():
                log.warning("pairs: %s data files in %s are left out, which is no part of the source", number, folder)
            plan = plan_sources(sources, rows=self.fragment_rows, found=found)
            job = MapJob(
                "pairs",
                lambda fragment: read_raw(fragment, sources[fragment.source]),
                lambda: NormalisePairs(sources, config.max_chars),
                schema.PAIRS,
            )
            counts = self.map(job, plan, out, refused_share=1)
            closed = close_pairs(out, counts["read"], config)
            files = list(dict.fromkeys(at(fragment.path) for fragment in plan))
            poisoned = is_marked(files) or any(
                any_red_team(read_parquet(path, ["extra"])["extra"]) for path in part_files(out)
            )
            own = together(closed.own, enclosing(files), Marks(red_team=poisoned))
            return replace(closed, metrics=closed.metrics | {"left_out_files": left_out}, own=own)

        return self.place.make(recipe("pairs", shown, **inputs), build)

    def noise(self, config: NoiseConfig, pairs: Artifact) -> Artifact:
        """Plant label errors, and keep the truth apart."""

        def build(out: Path) -> Result:
            parts = [read_parquet(path) for path in part_files(pairs_of(pairs))]
            rows = pa.concat_tables(parts)
            noisy, planted = plant(rows, config)
            offset = 0
            for number, part in enumerate(parts):
                mask = planted[offset : offset + len(part)]
                write_parquet(noisy.slice(offset, len(part)), out / "pairs" / part_name(number))
                truth = pa.table({"pair_id": part["pair_id"], "planted": mask}, schema=schema.TRUTH)
                write_parquet(truth, out / "truth" / part_name(number))
                offset += len(part)
            counts = {"eligible": int(where_mask(rows, config.where).sum()), "planted": int(planted.sum())}
            return Result(counts, seed=config.seed)

        return self.place.make(recipe("noise", config, pairs=pairs), build)

    def reward(self, config: RewardConfig, pairs: Artifact) -> Artifact:
        """A reward model trained on `pairs`."""
        return self.rewards(config, [pairs])[0]

    def rewards(self, config: RewardConfig, variants: Sequence[Artifact]) -> list[Artifact]:
        """A reward model on each of several sets of pairs, trained one after another by the same workers."""
        located = with_lasting_base(config)
        shown = config.model_dump(mode="json", exclude={"micro_batch_size", "gradient_checkpointing", "shards"})
        base = {}
        if isinstance(config.base, str):
            del shown["base"]
            base["base"] = base_input(str(located.base))
        recipes = [recipe("reward", shown, **base, pairs=pairs) for pairs in variants]
        pairs_by_name = {made.name: pairs for made, pairs in zip(recipes, variants, strict=True)}

        def build(partials: dict[str, Path]) -> dict[str, Result]:
            jobs = [
                TrainJob("reward", train_reward, {"pairs": pairs_of(pairs_by_name[name]), "config": located}, out)
                for name, out in partials.items()
            ]
            trained = self.runner.train(jobs)
            return {name: _trained(metrics, config.seed) for name, metrics in zip(partials, trained, strict=True)}

        return self.place.make_all(recipes, build)

    def _work(
        self,
        stage: str,
        make: Callable[..., BatchFn],
        written: pa.Schema,
        pairs: Artifact,
        reward: Artifact,
        out: Path,
        blocks: int | None = None,
        group_rows: int | None = None,
    ) -> Work:
        """Every pair, tokenised for `reward`, through a function that holds it (its first `blocks`)."""
        trusted = {"trust_remote_code": self.trust_remote_code}
        shards = min(self.shards, blocks or self.shards)
        job = MapJob(
            stage,
            read_fragment,
            partial(make, **trusted),
            written,
            prepare=partial(TokenisePairs, reward.path, **trusted),
            loads_model=True,
            shards=shards,
            group_rows=group_rows,
        )
        return Work(job, part_fragments(pairs_of(pairs)), out)

    def _width(self, reward: Artifact) -> int:
        return hidden_size(reward.path, self.trust_remote_code)

    def activations(self, config: ActivationsConfig, pairs: Artifact, reward: Artifact) -> Artifact:
        def build(out: Path) -> Result:
            counts = self.map(
                *self._work(
                    "activations",
                    partial(EncodeActivations, reward.path, config.layer, config.tokens),
                    schema.activations(self._width(reward)),
                    pairs,
                    reward,
                    out,
                    blocks=config.layer,
                    group_rows=schema.GROUP_ROWS,
                )
            )
            return Result(counts, {"layer": config.layer})

        return self.place.make(recipe("activations", config, pairs=pairs, reward=reward), build)

    def text_activations(self, config: WarmStartConfig, layer: int, reward: Artifact) -> Artifact:
        """Vectors of all tokens of general text."""
        text = Path(config.text).absolute()

        def build(out: Path) -> Result:
            job = MapJob(
                "activations",
                read_texts,
                partial(EncodeTexts, reward.path, layer, trust_remote_code=self.trust_remote_code),
                schema.activations(self._width(reward)),
                prepare=partial(TokeniseTexts, reward.path, self.trust_remote_code),
                loads_model=True,
                shards=min(self.shards, layer),
                group_rows=schema.GROUP_ROWS,
            )
            counts = self.map(job, text_fragments(text, self.fragment_rows, config.limit), out)
            if not counts["written"]:
                raise UserError(f"activations: {text} holds no text of two tokens or more; pass more text")
            return Result(counts, {"layer": layer})

        shown = {"layer": layer, "tokens": "text", "limit": config.limit}
        return self.place.make(recipe("activations", shown, text=file_input(text), reward=reward), build)

    def sae(
        self,
        config: SaeConfig,
        activations: Artifact,
        layer: int,
        *,
        start: Artifact | None = None,
        pairs: Artifact | None = None,
        reward: Artifact | None = None,
    ) -> Artifact:
        """An SAE trained on activations, from `start` on if it is given; with pairs and the reward model that they were
        harvested by, it is measured what reconstructions cost the model."""
        given = {"start": start}
        if config.spliced_pairs and pairs and reward:
            given |= {"pairs": pairs, "reward": reward}

        def build(out: Path) -> Result:
            judged = (
                Judged(pairs_of(pairs), reward.path, self.trust_remote_code)
                if "pairs" in given and pairs and reward
                else None
            )
            arguments = {
                "activations": activations.path,
                "config": config,
                "model": activations.manifest.get("inputs", {}).get("reward", activations.name),
                "layer": layer,
                "start": start.path if start else None,
                "judged": judged,
            }
            (metrics,) = self.runner.train([TrainJob("sae", train_sae, arguments, out)])
            rows = {"vectors": metrics["train_vectors"]}
            return Result(rows, metrics, config.seed)

        left_out = {"micro_batch_size", "tensorboard", "warm_start"}
        shown = {**config.model_dump(mode="json", exclude=left_out), "layer": layer}
        inputs = {role: artifact for role, artifact in given.items() if artifact}
        return self.place.make(recipe("sae", shown, activations=activations, **inputs), build)

    def sae_in_stages(
        self, config: SaeConfig, activations: Artifact, layer: int, pairs: Artifact, reward: Artifact
    ) -> Artifact:
        """An SAE trained on general text first, where the config says so, and then on the activations of pairs."""
        start = None
        if config.warm_start is not None:
            text = self.text_activations(config.warm_start, layer, reward)
            first = config.warm_start.model_dump(exclude={"text", "limit"})
            start = self.sae(config.model_copy(update={**first, "warm_start": None, "spliced_pairs": 0}), text, layer)
        return self.sae(config, activations, layer, start=start, pairs=pairs, reward=reward)

    def codes(self, pairs: Artifact, reward: Artifact, sae: Artifact) -> Artifact:
        def build(out: Path) -> Result:
            counts = self.map(
                *self._work("codes", partial(EncodePairs, reward.path, sae.path), schema.CODES, pairs, reward, out)
            )
            loaded = load_sae(sae.path)
            metrics = {"latents": loaded.latents, "k": loaded.k}
            return Result(counts, metrics)

        return self.place.make(recipe("codes", {}, pairs=pairs, reward=reward, sae=sae), build)

    def heads(self, reward: Artifact, pairs: Artifact) -> Artifact:
        """Return what the reward head reads of the two responses of every pair, as a difference."""

        def build(out: Path) -> Result:
            counts = self.map(
                *self._work(
                    "heads", partial(HeadPairs, reward.path), schema.heads(self._width(reward)), pairs, reward, out
                )
            )
            return Result(counts)

        return self.place.make(recipe("heads", {}, reward=reward, pairs=pairs), build)

    def vectors(self, layers: Sequence[int], reward: Artifact, pairs: Artifact) -> Artifact:
        """Mean vectors of layers over responses and prompts of every pair."""

        def build(out: Path) -> Result:
            width = self._width(reward) * len(layers)
            make = partial(MeanVectors, reward.path, layers)
            counts = self.map(
                *self._work("vectors", make, schema.vectors(width), pairs, reward, out, blocks=max(layers))
            )
            return Result(counts)

        shown = {"layers": list(layers)}
        return self.place.make(recipe("vectors", shown, reward=reward, pairs=pairs), build)

    def evaluate(self, reward: Artifact, pairs: Artifact) -> Artifact:
        """Rewards of every evaluation pair, accuracy by section, and the scores of the benchmarks among them."""
        return self.evaluations([reward], pairs)[0]

    def evaluations(self, rewards: Sequence[Artifact], pairs: Artifact) -> list[Artifact]:
        """As `evaluate`, of several models, by the same processes."""
        recipes = [recipe("evaluate", {}, reward=reward, pairs=pairs) for reward in rewards]
        models = {made.name: reward for made, reward in zip(recipes, rewards, strict=True)}

        def build(partials: dict[str, Path]) -> dict[str, Result]:
            works = [
                self._work(
                    "evaluate", partial(RewardPairs, models[name].path), schema.REWARDS, pairs, models[name], out
                )
                for name, out in partials.items()
            ]
            began = time.monotonic()
            counted = self.map_all(works)
            share = (time.monotonic() - began) / len(works)  # the processes that read one model read them all
            return {
                name: Result(counts, self._measured(models[name], out), wall_seconds=share)
                for (name, out), counts in zip(partials.items(), counted, strict=True)
            }

        return self.place.make_all(recipes, build)

    def _measured(self, reward: Artifact, out: Path) -> dict[str, Any]:
        """Return what the rewards in `out` say of their model."""
        rewards = read_parts(out)
        return {
            "sections": {name: a._asdict() for name, a in section_accuracy(rewards).items()},
            "benchmarks": {name: b._asdict() for name, b in benchmark_scores(rewards).items()},
            "dtype": "float32",
            "max_length": load_pair_tokenizer(reward.path, self.trust_remote_code).limit,
        }


def _trained(metrics: dict[str, Any], seed: int) -> Result:
    """Return what a trained reward model says about itself."""
    rows = {"train": metrics["train_pairs"], "validation": metrics["validation_pairs"]}
    return Result(rows, metrics, seed, wall_seconds=metrics["train_seconds"])
