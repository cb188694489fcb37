"""The stages in order. Knows only a Runner."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safer_ray.config.sections import RewardConfig, RunConfig
from safer_ray.data.curation import CLEAN, USED
from safer_ray.data.source_files import source_files
from safer_ray.errors import UserError
from safer_ray.features.judge import load_probe
from safer_ray.pipeline import detector_stages, feature_stages, model_stages
from safer_ray.pipeline.crossfit import cross_fit
from safer_ray.pipeline.finished_model import finished, settled
from safer_ray.pipeline.inputs import check_file, place_of_run, resolve_exchanges, tell_language
from safer_ray.pipeline.reference import HeldOut, Reference, held_out_of
from safer_ray.pipeline.runner import Runner
from safer_ray.pipeline.stage import StageContext, pairs_of
from safer_ray.pipeline.summary import RunView, write_report, write_summary
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.lock import locked

STAGES = (
    "corpus",
    "pairs",
    "noise",
    "reward",
    "activations",
    "sae",
    "codes",
    "salience",
    "contexts",
    "verdicts",
    "select",
    "detector",
    "auditor",
    "scores",
    "curate",
    "evaluate",
    "report",
)


@dataclass
class Run:
    """Artifacts by stage, and by variant where there are several."""

    config: RunConfig
    directory: Path
    asked: RewardConfig  # the section `reward` as the user wrote it
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    models: dict[str, Artifact] = field(default_factory=dict)
    evaluations: dict[str, Artifact] = field(default_factory=dict)
    curated: dict[str, Artifact] = field(default_factory=dict)


def preflight(config: RunConfig) -> None:
    """Refuse what can be known to fail, before anything is computed.

    Raises:
        UserError: a missing source, text or probe, or a layer past the model.
    """
    sources = config.sources
    local = [s for s in sources if not s.path.startswith(("corpus:", "hub:"))]
    for source in local:
        source_files(source)
    if config.sae.warm_start is not None:
        check_file(Path(config.sae.warm_start.text).absolute())
    if not config.judge.exchanges.startswith("corpus:"):
        load_probe(config.judge.exchanges)
    if isinstance(config.reward.base, str):
        from safer_ray.reward.checkpoints import layer_count  # here, since it imports torch
        from safer_ray.reward.lora import check_targets

        reward = config.reward
        count = layer_count(config.reward.base, reward, blocks=reward.blocks)
        for name, layer in (
            ("activations.layer", config.activations.layer),
            ("reward.frozen_layers", reward.frozen_layers),
        ):
            if layer > count:
                raise UserError(f"{name} {layer} lies past the {count} layers of {reward.base}; choose 1..{count}")
        check_targets(reward)
    if config.scores.detector == "combined":
        detector_stages.check_shared_trunk(config, "scores.detector: combined")


def check_until(config: RunConfig, until: str | None) -> None:
    """Raises UserError where a run of a config makes no stage called `until`."""
    if until is not None and until not in STAGES:
        raise UserError(f"--until {until!r} is no stage; choose one of {', '.join(STAGES)}")
    wanted = {"corpus": config.corpus, "noise": config.noise, "detector": config.scores.detector == "combined"}
    if until in wanted and not wanted[until]:
        raise UserError(f"--until {until}: this config makes none; choose another stage")


def run(
    config: RunConfig,
    runner: Runner,
    *,
    until: str | None = None,
    fresh: bool = False,
    kept: frozenset[str] = frozenset(),
    dry: bool = False,
    on_stage: Callable[[str, Artifact | None], None] = lambda name, artifact: None,
) -> Run:
    """Run all stages, or those up to `until`; what is there already is not made again, unless `fresh` and by another
    name than those `kept`.

    Raises:
        UserError: anything in the config or the inputs that cannot work.
    """
    check_until(config, until)
    asked, config = config, settled(config)
    preflight(config)
    place = place_of_run(config, fresh=fresh, kept=kept, dry=dry, on_stage=on_stage)
    ctx = StageContext.of(place, runner, config)
    outcome = Run(config, place.root, asked.reward)
    with contextlib.nullcontext() if dry else locked(place.root):
        for stage in _stages(ctx, outcome):
            if stage == until:
                break
    return outcome


def _stages(ctx: StageContext, run: Run) -> Iterator[str]:
    """Make every stage in turn, and yield its name when it is made; whoever goes no further makes no more."""
    yield from _train(ctx, run)
    yield from _find(ctx, run)
    yield from _change(ctx, run)
    if not ctx.place.dry:
        view = RunView(run.config, run.artifacts, run.models, run.evaluations, run.curated)
        write_summary(view, run.directory / "summary.json")
        write_report(view, run.directory / "report.html")
    yield "report"


def _train(ctx: StageContext, run: Run) -> Iterator[str]:
    """Pairs in; a reward model, an SAE on its activations, and the codes of every pair out."""
    config, made, corpus = run.config, run.artifacts, None
    if config.corpus:
        corpus = made["corpus"] = model_stages.corpus(ctx, config.corpus)
        yield "corpus"
    pairs = made["pairs"] = model_stages.pairs(ctx, config.pairs, corpus)
    yield "pairs"
    if config.noise:
        pairs = made["noise"] = model_stages.noise(ctx, config.noise, pairs)
        yield "noise"
    made["training_pairs"] = pairs
    if not ctx.place.dry:
        tell_language(pairs_of(pairs), resolve_exchanges(config.judge.exchanges, corpus)[0])
    if config.reward.use is not None:
        reward = run.models[USED] = finished(ctx, config.reward, run.asked)
    else:
        reward = run.models[CLEAN] = model_stages.reward(ctx, config.reward, pairs)
    made["reward"] = reward
    yield "reward"
    activations = made["activations"] = model_stages.activations(ctx, config.activations, pairs, reward)
    yield "activations"
    layer = config.activations.layer
    sae = made["sae"] = model_stages.sae_in_stages(ctx, config.sae, activations, layer, pairs, reward)
    yield "sae"
    made["codes"] = model_stages.codes(ctx, pairs, reward, sae)
    yield "codes"


def _find(ctx: StageContext, run: Run) -> Iterator[str]:
    """The features that tell safe from unsafe, the bundle that audits with them, and a score for every pair."""
    config, made, corpus = run.config, run.artifacts, run.artifacts.get("corpus")
    pairs, reward, sae, codes = (made[name] for name in ("training_pairs", "reward", "sae", "codes"))
    mode, candidates = config.salience.mode, config.select.candidates
    reference = Reference(pairs, held_out_of(config))
    salience = made["salience"] = feature_stages.salience(ctx, codes, mode, reference=reference)
    yield "salience"
    made["contexts"] = feature_stages.contexts(ctx, config.contexts, salience, codes, pairs, reward, mode)
    yield "contexts"
    made["verdicts"] = feature_stages.verdicts(ctx, config.judge, salience, reward, sae, candidates, corpus)
    yield "verdicts"
    selected = made["select"] = feature_stages.select(ctx, config.select, salience, verdicts=made["verdicts"])
    yield "select"
    fitted = cross_fit(ctx, config, pairs, corpus, sae) if config.cross_fit else None
    detector = None
    if fitted and config.scores.detector == "combined":
        detector = made["detector"] = detector_stages.detector(ctx, config, pairs, fitted)
        yield "detector"
    known = {name: made[name] for name in ("salience", "verdicts", "contexts")}
    if fitted and config.reward.use is None:
        held = HeldOut(config.reward.validation_percent, config.reward.seed)
        reference = Reference(pairs, held, scores=fitted.scores)
    auditor = feature_stages.auditor(ctx, reward, sae, selected, codes, detector, known, reference, config.auditor)
    made["auditor"] = auditor
    yield "auditor"
    if fitted and detector:
        made["scores"] = detector_stages.suspected(ctx, config.scores, fitted.scores, detector)
    elif fitted:
        made["scores"] = fitted.scores
    else:
        made["scores"] = feature_stages.scores(ctx, config.scores, codes, pairs, auditor)
    yield "scores"


def _change(ctx: StageContext, run: Run) -> Iterator[str]:
    """Curate the pairs, retrain models on what is left, and measure all models on the same pairs."""
    config, made = run.config, run.artifacts
    for name, curate in config.curate.items():
        run.curated[name] = feature_stages.curate(ctx, curate, made["training_pairs"], made["scores"])
    yield "curate"
    variants = dict(run.curated)
    if variants and CLEAN not in run.models:  # heads on a finished model are compared with a head of their own kind
        variants = {CLEAN: made["training_pairs"], **variants}
    run.models |= zip(variants, model_stages.rewards(ctx, config.reward, list(variants.values())), strict=True)
    if config.evaluation is not None:
        held = made["evaluation_pairs"] = model_stages.pairs(ctx, config.evaluation, made.get("corpus"))
        run.evaluations |= zip(run.models, model_stages.evaluations(ctx, list(run.models.values()), held), strict=True)
    yield "evaluate"
