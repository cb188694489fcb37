"""The stages that read texts or run models: corpus, pairs, noise, reward, activations, SAE, codes, evaluation.

Each is a function of the context and of artifacts, and returns one; the `_write_…` below it says what is in it. What
imports torch is imported there: stages that are found, planned or only read texts do without.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from safer_ray import schema
from safer_ray.config.reading import ENDS
from safer_ray.config.sae import WarmStartConfig
from safer_ray.config.sections import (
    ActivationsConfig,
    CorpusConfig,
    NoiseConfig,
    PairsConfig,
    RewardConfig,
    SaeConfig,
    SourceConfig,
)
from safer_ray.config.where import where_mask
from safer_ray.data.benchmarks import benchmark_scores
from safer_ray.data.corpus import write_corpus
from safer_ray.data.noise import plant
from safer_ray.data.source_files import Found
from safer_ray.data.sources import (
    NORMALISED,
    NOTES,
    NormalisePairs,
    names_apart,
    plan_sources,
    read_raw,
    several_formats,
    told_of,
)
from safer_ray.detection.evaluation import section_accuracy
from safer_ray.errors import UserError
from safer_ray.pipeline.inputs import (
    base_input,
    close_pairs,
    file_input,
    find_source,
    resolve_source,
    source_input,
    with_lasting_base,
)
from safer_ray.pipeline.stage import StageContext, make, pairs_of, recipe, with_reading
from safer_ray.reward.reading import DTYPE, settings_of
from safer_ray.reward.tokens import TokenisePairs
from safer_ray.storage.artifacts import (
    Artifact,
    Fragment,
    Result,
    part_files,
    part_fragments,
    part_name,
    read_fragment,
    read_parts,
)
from safer_ray.storage.files import as_path, read_parquet, write_parquet
from safer_ray.storage.marks import Marks, any_red_team, enclosing, is_marked, together
from safer_ray.storage.recipes import Input
from safer_ray.storage.work import BatchFn, MapJob, TrainJob, Work

log = logging.getLogger(__name__)


def corpus(ctx: StageContext, config: CorpusConfig) -> Artifact:
    """Return the synthetic corpus of the demo."""
    return make(ctx, "corpus", config, partial(_write_corpus, config))


def _write_corpus(config: CorpusConfig, out: Path) -> Result:
    rows = write_corpus(
        out,
        train_per_section=config.train_per_section,
        heldout_per_section=config.heldout_per_section,
        seed=config.seed,
    )
    return Result(rows, seed=config.seed, own=Marks(("synthetic",)))


def pairs(ctx: StageContext, config: PairsConfig, corpus: Artifact | None = None) -> Artifact:
    """Return the pairs of all sources, with everything refused in `quarantine`.

    Raises:
        UserError: more than the configured share was refused, or nothing is left.
    """
    sources = [resolve_source(source, corpus) for source in config.sources]
    found = [find_source(s, ctx.place, given) for s, given in zip(sources, config.sources, strict=True)]
    named = [source_input(*each, corpus) for each in zip(config.sources, sources, found, strict=True)]
    inputs = {f"source{i}": each for i, each in enumerate(named)}
    if apart := names_apart(sources, [each.files for each in found]):
        inputs["names"] = Input(apart)
    return make(ctx, "pairs", config, partial(_write_pairs, ctx, config, sources, found), **inputs)


def _write_pairs(
    ctx: StageContext, config: PairsConfig, sources: list[SourceConfig], found: list[Found], out: Path
) -> Result:
    left_out = {folder: files for each in found for folder, files in each.left_out.items()}
    for folder, number in left_out.items():
        log.warning("pairs: %s data files in %s are left out, which is no part of the source", number, folder)
    formats: list[dict[Path, str]] = [{} for _ in sources]
    plan = plan_sources(sources, rows=ctx.fragment_rows, found=found, formats=formats)
    told = [line for each in found for line in each.told]
    told += [line for each in formats for line in several_formats(each)]
    for line in told:
        log.warning("pairs: %s", line)
    job = MapJob(
        "pairs",
        lambda fragment: read_raw(fragment, sources[fragment.source]),
        lambda: NormalisePairs(sources, config.max_chars),
        pa.schema([*schema.PAIRS, NORMALISED.field(NOTES)]),
        facts=told_of,
        unwritten=(NOTES,),
    )
    counts = ctx.map(job, plan, out, refused_share=1)
    closed = close_pairs(out, counts["read"], config)
    files = list(dict.fromkeys(as_path(fragment.path) for fragment in plan))
    poisoned = is_marked(files) or any(any_red_team(read_parquet(path, ["extra"])["extra"]) for path in part_files(out))
    own = together(closed.own, enclosing(files), Marks(red_team=poisoned))
    return replace(closed, metrics=closed.metrics | {"left_out_files": left_out, "told": told}, own=own)


def noise(ctx: StageContext, config: NoiseConfig, pairs: Artifact) -> Artifact:
    """Return the pairs with label errors planted in them, and the truth apart."""
    return make(ctx, "noise", config, partial(_write_noise, config, pairs), pairs=pairs)


def _write_noise(config: NoiseConfig, pairs: Artifact, out: Path) -> Result:
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


def reward(ctx: StageContext, config: RewardConfig, pairs: Artifact) -> Artifact:
    """Return a reward model trained on `pairs`."""
    return rewards(ctx, config, [pairs])[0]


def rewards(ctx: StageContext, config: RewardConfig, variants: Sequence[Artifact]) -> list[Artifact]:
    """Return a reward model for each of several sets of pairs, trained one after another by the same workers."""
    located = with_lasting_base(config)
    shown, base = config.recorded(), {}
    if isinstance(config.base, str):
        shown, base = config.recorded("base"), {"base": base_input(str(located.base), located)}
    if config.frozen_layers:  # other numbers than of the float32 that they were; no other recipe is renamed
        shown |= {"frozen_states": "float16"}
    recipes = [recipe("reward", shown, **base, pairs=pairs) for pairs in variants]
    pairs_by_name = {made.name: pairs for made, pairs in zip(recipes, variants, strict=True)}
    return ctx.place.make_all(recipes, partial(_write_rewards, ctx, located, pairs_by_name))


def _write_rewards(
    ctx: StageContext, config: RewardConfig, pairs: dict[str, Artifact], partials: dict[str, Path]
) -> dict[str, Result]:
    from safer_ray.reward.lora import check_targets
    from safer_ray.reward.train import train_reward

    check_targets(config)
    jobs = [
        TrainJob("reward", train_reward, {"pairs": pairs_of(pairs[name]), "config": config}, out)
        for name, out in partials.items()
    ]
    trained = ctx.runner.train(jobs)
    return {name: _trained(metrics, config.seed) for name, metrics in zip(partials, trained, strict=True)}


def _trained(metrics: dict[str, Any], seed: int) -> Result:
    """Return what a trained reward model says about itself."""
    rows = {"train": metrics["train_pairs"], "validation": metrics["validation_pairs"]}
    return Result(rows, metrics, seed, wall_seconds=metrics["train_seconds"])


def _job_on_pairs(
    ctx: StageContext,
    stage: str,
    load: Callable[..., BatchFn],
    written: pa.Schema,
    reward: Artifact,
    *,
    blocks: int | None = None,
    group_rows: int | None = None,
) -> MapJob:
    """Return the job of putting pairs, tokenised for `reward`, through a function that holds it (its first
    `blocks`)."""
    return MapJob(
        stage,
        read_fragment,
        partial(load, reading=ctx.reading_of(reward)),
        written,
        prepare=partial(TokenisePairs, reward.path, ctx.reading),
        loads_model=True,
        shards=min(ctx.shards, blocks or ctx.shards),
        group_rows=group_rows,
    )


def _fragments_of(pairs: Artifact) -> list[Fragment]:
    return part_fragments(pairs_of(pairs))


def _dtype(ctx: StageContext, reward: Artifact) -> str:
    return ctx.reading_of(reward).inference_dtype


def _width(ctx: StageContext, reward: Artifact) -> int:
    from safer_ray.reward.checkpoints import hidden_size

    return hidden_size(reward.path, ctx.reading)


def activations(ctx: StageContext, config: ActivationsConfig, pairs: Artifact, reward: Artifact) -> Artifact:
    """Return the vectors of a layer, of every pair."""
    write = partial(_write_activations, ctx, config, pairs, reward)
    return make(ctx, "activations", config, write, pairs=pairs, reward=reward)


def _write_activations(
    ctx: StageContext, config: ActivationsConfig, pairs: Artifact, reward: Artifact, out: Path
) -> Result:
    from safer_ray.features.passes import EncodeActivations

    load = partial(EncodeActivations, reward.path, config.layer, config.tokens)
    written, rows = schema.activations(_width(ctx, reward)), schema.GROUP_ROWS
    job = _job_on_pairs(ctx, "activations", load, written, reward, blocks=config.layer, group_rows=rows)
    return Result(ctx.map(job, _fragments_of(pairs), out), {"layer": config.layer, DTYPE: _dtype(ctx, reward)})


def text_activations(ctx: StageContext, config: WarmStartConfig, layer: int, reward: Artifact) -> Artifact:
    """Return the vectors of a layer, of all tokens of general text."""
    text = Path(config.text).absolute()
    shown = {"layer": layer, "tokens": "text", "limit": config.limit}
    write = partial(_write_text_activations, ctx, text, config.limit, layer, reward)
    return make(ctx, "activations", shown, write, text=file_input(text), reward=reward)


def _write_text_activations(
    ctx: StageContext, text: Path, limit: int | None, layer: int, reward: Artifact, out: Path
) -> Result:
    from safer_ray.features.passes import EncodeTexts
    from safer_ray.reward.plain_text import TokeniseTexts, read_texts, text_fragments

    job = MapJob(
        "activations",
        read_texts,
        partial(EncodeTexts, reward.path, layer, reading=ctx.reading_of(reward)),
        schema.activations(_width(ctx, reward)),
        prepare=partial(TokeniseTexts, reward.path, ctx.reading),
        loads_model=True,
        shards=min(ctx.shards, layer),
        group_rows=schema.GROUP_ROWS,
    )
    counts = ctx.map(job, text_fragments(text, ctx.fragment_rows, limit), out)
    if not counts["written"]:
        raise UserError(f"activations: {text} holds no text of two tokens or more; pass more text")
    return Result(counts, {"layer": layer, DTYPE: _dtype(ctx, reward)})


def sae(
    ctx: StageContext,
    config: SaeConfig,
    activations: Artifact,
    layer: int,
    *,
    start: Artifact | None = None,
    pairs: Artifact | None = None,
    reward: Artifact | None = None,
) -> Artifact:
    """Return an SAE trained on activations, from `start` on if it is given; with pairs and the reward model that they
    were harvested by, it is measured what reconstructions cost the model."""
    judges = {"pairs": pairs, "reward": reward} if config.spliced_pairs and pairs and reward else {}
    given = {role: artifact for role, artifact in ({"start": start} | judges).items() if artifact}
    shown = {**config.recorded(), "layer": layer}
    write = partial(_write_sae, ctx, config, activations, layer, given)
    return make(ctx, "sae", shown, write, activations=activations, **given)


def _write_sae(
    ctx: StageContext, config: SaeConfig, activations: Artifact, layer: int, given: dict[str, Artifact], out: Path
) -> Result:
    from safer_ray.sae.train import SpliceEvaluation, train_sae

    judged = None
    if "reward" in given:
        judged = SpliceEvaluation(pairs_of(given["pairs"]), given["reward"].path, ctx.reading_of(given["reward"]))
    arguments = {
        "activations": activations.path,
        "config": config,
        "model": activations.manifest.get("inputs", {}).get("reward", activations.name),
        "layer": layer,
        "start": given["start"].path if "start" in given else None,
        "judged": judged,
    }
    (metrics,) = ctx.runner.train([TrainJob("sae", train_sae, arguments, out)])
    return Result({"vectors": metrics["train_vectors"]}, metrics, config.seed)


def sae_in_stages(
    ctx: StageContext, config: SaeConfig, activations: Artifact, layer: int, pairs: Artifact, reward: Artifact
) -> Artifact:
    """Return an SAE trained on general text first, where the config says so, and then on the activations of pairs."""
    start = None
    if config.warm_start is not None:
        text = text_activations(ctx, config.warm_start, layer, reward)
        first = config.warm_start.model_dump(exclude={"text", "limit"})
        start = sae(ctx, config.model_copy(update={**first, "warm_start": None, "spliced_pairs": 0}), text, layer)
    return sae(ctx, config, activations, layer, start=start, pairs=pairs, reward=reward)


def codes(ctx: StageContext, pairs: Artifact, reward: Artifact, sae: Artifact) -> Artifact:
    """Return which features fire in every pair, and how much, with the rewards of its responses."""
    write = partial(_write_codes, ctx, pairs, reward, sae)
    return make(ctx, "codes", {}, write, pairs=pairs, reward=reward, sae=sae)


def _write_codes(ctx: StageContext, pairs: Artifact, reward: Artifact, sae: Artifact, out: Path) -> Result:
    from safer_ray.features.passes import EncodePairs
    from safer_ray.reward.checkpoints import load_pair_tokenizer
    from safer_ray.sae.formats import load_sae

    job = _job_on_pairs(ctx, "codes", partial(EncodePairs, reward.path, sae.path), schema.CODES, reward)
    counts = ctx.map(job, _fragments_of(pairs), out)
    loaded = load_sae(sae.path)
    tokenizer = load_pair_tokenizer(reward.path, ctx.reading)
    reading = settings_of(tokenizer)
    if ctx.reading.head is not None:
        reading["head"] = ctx.reading.head.model_dump(mode="json", exclude_none=True)
    facts = {"latents": loaded.latents, "k": loaded.k, "reading": reading}
    return Result(counts, facts | {ENDS: tokenizer.ends, DTYPE: _dtype(ctx, reward)})


def heads(ctx: StageContext, reward: Artifact, pairs: Artifact) -> Artifact:
    """Return what the reward head reads of the two responses of every pair, as a difference."""
    return make(ctx, "heads", {}, partial(_write_heads, ctx, reward, pairs), reward=reward, pairs=pairs)


def _write_heads(ctx: StageContext, reward: Artifact, pairs: Artifact, out: Path) -> Result:
    from safer_ray.features.passes import HeadPairs

    job = _job_on_pairs(ctx, "heads", partial(HeadPairs, reward.path), schema.heads(_width(ctx, reward)), reward)
    return Result(ctx.map(job, _fragments_of(pairs), out))


def vectors(ctx: StageContext, layers: Sequence[int], reward: Artifact, pairs: Artifact) -> Artifact:
    """Return the mean vectors of layers over responses and prompts of every pair."""
    write = partial(_write_vectors, ctx, layers, reward, pairs)
    return make(ctx, "vectors", {"layers": list(layers)}, write, reward=reward, pairs=pairs)


def _write_vectors(ctx: StageContext, layers: Sequence[int], reward: Artifact, pairs: Artifact, out: Path) -> Result:
    from safer_ray.features.passes import MeanVectors

    load, written = partial(MeanVectors, reward.path, layers), schema.vectors(_width(ctx, reward) * len(layers))
    job = _job_on_pairs(ctx, "vectors", load, written, reward, blocks=max(layers))
    return Result(ctx.map(job, _fragments_of(pairs), out))


def evaluate(ctx: StageContext, reward: Artifact, pairs: Artifact) -> Artifact:
    """Return the rewards of every evaluation pair, accuracy by section, and the scores of the benchmarks among them."""
    return evaluations(ctx, [reward], pairs)[0]


def evaluations(ctx: StageContext, rewards: Sequence[Artifact], pairs: Artifact) -> list[Artifact]:
    """As `evaluate`, of several models, by the same processes."""
    recipes = [with_reading(ctx, recipe("evaluate", {}, reward=reward, pairs=pairs), reward) for reward in rewards]
    models = {made.name: reward for made, reward in zip(recipes, rewards, strict=True)}
    return ctx.place.make_all(recipes, partial(_write_evaluations, ctx, models, pairs))


def _write_evaluations(
    ctx: StageContext, models: dict[str, Artifact], pairs: Artifact, partials: dict[str, Path]
) -> dict[str, Result]:
    from safer_ray.features.passes import RewardPairs

    fragments = _fragments_of(pairs)
    works = []
    for name, out in partials.items():
        load = partial(RewardPairs, models[name].path)
        works.append(Work(_job_on_pairs(ctx, "evaluate", load, schema.REWARDS, models[name]), fragments, out))
    began = time.monotonic()
    counted = ctx.map_all(works)
    share = (time.monotonic() - began) / len(works)  # the processes that read one model read them all
    return {
        name: Result(counts, _measured(ctx, models[name], out), wall_seconds=share)
        for (name, out), counts in zip(partials.items(), counted, strict=True)
    }


def _measured(ctx: StageContext, reward: Artifact, out: Path) -> dict[str, Any]:
    """Return what the rewards in `out` say of their model."""
    from safer_ray.reward.checkpoints import load_pair_tokenizer

    rewards = read_parts(out)
    pairs = load_pair_tokenizer(reward.path, ctx.reading)
    return {
        "sections": {name: a._asdict() for name, a in section_accuracy(rewards).items()},
        "benchmarks": {name: b._asdict() for name, b in benchmark_scores(rewards).items()},
        DTYPE: _dtype(ctx, reward),
        "reading": settings_of(pairs),
        "truncated": float(schema.truncated(rewards).mean()) if len(rewards) else 0.0,
        "max_length": pairs.limit,
    }
