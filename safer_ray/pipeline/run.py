"""The stages in order. Knows only a Runner."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safer_ray.config.sections import RunConfig
from safer_ray.data.curation import CLEAN
from safer_ray.data.source_files import source_files
from safer_ray.errors import UserError
from safer_ray.features.judge import load_probe
from safer_ray.pipeline.inputs import check_file, place_of_run
from safer_ray.pipeline.runner import Runner
from safer_ray.pipeline.summary import RunView, write_report, write_summary
from safer_ray.pipeline.suspect import Suspecting, check_shared_trunk
from safer_ray.reward.checkpoints import layer_count
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


class Stages(Suspecting):
    """All stages."""


class _Until(Exception):  # noqa: N818
    """The last stage asked for is done."""


@dataclass
class Run:
    """Artifacts by stage, and by variant where there are several."""

    config: RunConfig
    directory: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    models: dict[str, Artifact] = field(default_factory=dict)
    evaluations: dict[str, Artifact] = field(default_factory=dict)
    curated: dict[str, Artifact] = field(default_factory=dict)


def preflight(config: RunConfig) -> None:
    """What can be known to fail, before anything is computed.

    Raises:
        UserError: a missing source, text or probe, or a layer past the model.
    """
    sources = (*config.pairs.sources, *config.evaluation.sources)
    local = [s for s in sources if not s.path.startswith(("corpus:", "hub:"))]
    for source in local:
        source_files(source)
    if config.sae.warm_start is not None:
        check_file(Path(config.sae.warm_start.text).absolute())
    if not config.judge.exchanges.startswith("corpus:"):
        load_probe(config.judge.exchanges)
    if isinstance(config.reward.base, str):
        count = layer_count(config.reward.base, config.reward.trust_remote_code)
        if config.activations.layer > count:
            raise UserError(
                f"activations.layer {config.activations.layer} lies past the {count} layers of "
                f"{config.reward.base}; choose 1..{count}"
            )
    if config.scores.detector == "combined":
        check_shared_trunk(config, "scores.detector: combined")


def run(
    config: RunConfig,
    runner: Runner,
    *,
    until: str | None = None,
    fresh: bool = False,
    dry: bool = False,
    on_stage: Callable[[str, Artifact | None], None] = lambda name, artifact: None,
) -> Run:
    """Run all stages, or those up to `until`; what is there already is not made again.

    Raises:
        UserError: anything in the config or the inputs that cannot work.
    """
    if until is not None and until not in STAGES:
        raise UserError(f"--until {until!r} is no stage; choose one of {', '.join(STAGES)}")
    wanted = {"corpus": config.corpus, "noise": config.noise, "detector": config.scores.detector == "combined"}
    if until in wanted and not wanted[until]:
        raise UserError(f"--until {until}: this config makes none; choose another stage")
    preflight(config)
    place = place_of_run(config, fresh=fresh, dry=dry, on_stage=on_stage)
    stages = Stages.of(place, runner, config)
    outcome = Run(config, place.root)
    if dry:
        _all(stages, outcome, until)
        return outcome
    with locked(place.root):
        _all(stages, outcome, until)
    return outcome


def _all(stages: Stages, run: Run, until: str | None) -> None:
    def done(stage: str, artifact: Artifact) -> Artifact:
        run.artifacts[stage] = artifact
        if stage == until:
            raise _Until
        return artifact

    try:
        _train(stages, run, done)
        _find(stages, run, done)
        _change(stages, run, until)
        if not stages.place.dry and until in (None, "report"):
            view = RunView(run.config, run.artifacts, run.models, run.evaluations, run.curated)
            write_summary(view, run.directory / "summary.json")
            write_report(view, run.directory / "report.html")
    except _Until:
        return


def _train(stages: Stages, run: Run, done: Callable[[str, Artifact], Artifact]) -> None:
    """Pairs in; a reward model, an SAE on its activations, and the codes of every pair out."""
    config = run.config
    corpus = done("corpus", stages.corpus(config.corpus)) if config.corpus else None
    pairs = done("pairs", stages.pairs(config.pairs, corpus))
    if config.noise:
        pairs = done("noise", stages.noise(config.noise, pairs))
    run.artifacts["training_pairs"] = pairs
    reward = done("reward", stages.reward(config.reward, pairs))
    run.models[CLEAN] = reward
    activations = done("activations", stages.activations(config.activations, pairs, reward))
    sae = done("sae", stages.sae_in_stages(config.sae, activations, config.activations.layer, pairs, reward))
    done("codes", stages.codes(pairs, reward, sae))


def _find(stages: Stages, run: Run, done: Callable[[str, Artifact], Artifact]) -> None:
    """The features that tell safe from unsafe, the bundle that audits with them, and a score for every pair."""
    config, made = run.config, run.artifacts
    pairs, reward, sae, codes = (made[name] for name in ("training_pairs", "reward", "sae", "codes"))
    salience = done("salience", stages.salience(codes, config.salience.mode))
    done("contexts", stages.contexts(config.contexts, salience, codes, pairs, reward, config.salience.mode))
    count = config.select.candidates
    verdicts = done("verdicts", stages.verdicts(config.judge, salience, reward, sae, count, made.get("corpus")))
    selected = done("select", stages.select(config.select, salience, verdicts=verdicts))
    fitted = stages.cross_fit(config, pairs, made.get("corpus"), sae) if config.cross_fit else None
    detector = None
    if fitted and config.scores.detector == "combined":
        detector = done("detector", stages.detector(config, pairs, fitted))
    known = {name: made[name] for name in ("salience", "verdicts", "contexts")}
    auditor = done("auditor", stages.auditor(reward, sae, selected, codes, detector, known))
    if fitted and detector:
        done("scores", stages.suspected(config.scores, fitted.scores, detector))
    else:
        done("scores", fitted.scores if fitted else stages.scores(config.scores, codes, pairs, auditor))


def _change(stages: Stages, run: Run, until: str | None) -> None:
    """Curate, retrain on what is left, and measure every model on the same pairs."""
    config, made = run.config, run.artifacts
    pairs, scores = made["training_pairs"], made["scores"]
    for name, curate in config.curate.items():
        run.curated[name] = stages.curate(curate, pairs, scores)
    if until == "curate":
        raise _Until
    run.models |= zip(run.curated, stages.rewards(config.reward, list(run.curated.values())), strict=True)
    evaluation = stages.pairs(config.evaluation, made.get("corpus"))
    made["evaluation_pairs"] = evaluation
    run.evaluations |= zip(run.models, stages.evaluations(list(run.models.values()), evaluation), strict=True)
    if until == "evaluate":
        raise _Until
