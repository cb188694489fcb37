"""One command a stage, each from explicit directories to `--out`.

What needs torch is imported last, so that options which cannot work are refused at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safer_ray.cli.options import (
    count_option,
    latents_option,
    model_option,
    path_option,
    percent_option,
    share_option,
    source_option,
    text_option,
    whole_option,
)
from safer_ray.cli.shared import (
    Assignments,
    ClusterSettings,
    ConfigPath,
    Encoding,
    ExistingPath,
    Fresh,
    Model,
    Out,
    ReadOptions,
    RunnerName,
    SourceSettings,
    Split,
    StageSettings,
    TrustRemoteCode,
    build_config,
    build_source,
    config_section,
    console,
    one_stage,
    only_of_cluster,
    open_input,
    open_model,
    reading_of,
    show_artifact,
    split_assignments,
)
from safer_ray.errors import UserError

if TYPE_CHECKING:
    from safer_ray.config.sections import Mode

app = typer.Typer()
SalienceMode = Annotated[
    str | None, text_option(help="paper or response, where the salience does not record its mode.")
]


def checked_mode(mode: str | None) -> "Mode | None":
    """Raises UserError unless it is a mode, or none."""
    from safer_ray.config.sections import SalienceConfig

    checked: Mode | None = build_config(SalienceConfig, mode=mode).mode if mode else None
    return checked


@app.command()
def pairs(
    source: Annotated[
        list[str],
        source_option("--source", help="A file, folder, glob, also s3://BUCKET/…, or hub:NAME; may be repeated."),
    ],
    out: Out,
    format: Annotated[str, text_option()] = "auto",
    section: Annotated[str | None, text_option()] = None,
    split: Split = None,
    encoding: Encoding = None,
    settings: SourceSettings = None,
    max_refused_share: Annotated[float | None, share_option()] = None,
    fresh: Fresh = False,
) -> None:
    """Stage 1: read preference pairs, quarantine what cannot be used."""
    from safer_ray.config.sections import PairsConfig

    given = {"format": format, "section": section, "split": split, "encoding": encoding}
    sources = tuple(build_source(settings, path=path, **given) for path in source)
    config = build_config(PairsConfig, sources=sources, max_refused_share=max_refused_share)
    from safer_ray.pipeline import model_stages

    with one_stage(out, fresh) as ctx:
        show_artifact(model_stages.pairs(ctx, config))


@app.command()
def reward(
    pairs: ExistingPath,
    out: Out,
    config: ConfigPath = None,
    assignments: StageSettings = None,
    runner: RunnerName = "local",
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 2: train a reward model on pairs."""
    settings = config_section(config, "reward", split_assignments(assignments)[1])
    if settings.use is not None:
        raise UserError(
            f"reward: a finished model is not trained; pass --reward {settings.use} to the other stages, or run all of "
            "them: safer-ray fit"
        )
    if trust_remote_code:
        settings = settings.model_copy(update={"trust_remote_code": True})
    from safer_ray.pipeline import model_stages

    with one_stage(out, fresh, runner, config, assignments=assignments) as ctx:
        show_artifact(model_stages.reward(ctx, settings, open_input("pairs", pairs)))


@app.command()
def activations(
    reward: Model,
    out: Out,
    pairs: Annotated[Path | None, path_option(help="Pairs, of which sentence ends are read.")] = None,
    text: Annotated[Path | None, path_option(help="General text, a text a line: all tokens are read.")] = None,
    config: ConfigPath = None,
    assignments: StageSettings = None,
    runner: RunnerName = "local",
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 3: harvest layer vectors of pairs or of general text."""
    from safer_ray.config.sae import WarmStartConfig

    if (pairs is None) == (text is None):
        raise UserError("activations: pass either --pairs DIR or --text FILE")
    reading = reading_of(read, trust_remote_code, config)
    settings, model = (
        config_section(config, "activations", split_assignments(assignments)[1]),
        open_model(reward, reading),
    )
    source = open_input("pairs", pairs) if pairs else None
    from safer_ray.pipeline import model_stages

    with one_stage(out, fresh, runner, config, reading, assignments) as ctx:
        if source:
            show_artifact(model_stages.activations(ctx, settings, source, model))
        else:
            show_artifact(model_stages.text_activations(ctx, WarmStartConfig(text=str(text)), settings.layer, model))


@app.command()
def sae(
    activations: ExistingPath,
    out: Out,
    start: Annotated[Path | None, path_option(help="An SAE to go on from, say one trained on general text.")] = None,
    pairs: Annotated[Path | None, path_option(help="With --reward: measure what reconstructions cost it.")] = None,
    reward: Annotated[str | None, model_option("--reward", help="The model that the activations are of.")] = None,
    layer: Annotated[int | None, count_option(help="Of vectors from outside, which do not say it.")] = None,
    config: ConfigPath = None,
    assignments: StageSettings = None,
    runner: RunnerName = "local",
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 4: train a sparse autoencoder on activations, or on a Parquet file with a column `x` of vectors."""
    if (pairs is None) != (reward is None):
        raise UserError("sae: pass --pairs and --reward together, or neither")
    source = open_input("activations", activations)
    known = source.metrics.get("layer", layer)
    if layer not in (None, known):
        raise UserError(f"{activations} are of layer {known}, not {layer}; leave --layer out")
    if known is None:
        raise UserError(f"{activations} does not say its layer; pass --layer, or what stage `activations` wrote")
    reading = reading_of(read, trust_remote_code, config)
    first, judged = (open_input(role, path) if path else None for role, path in (("sae", start), ("pairs", pairs)))
    model = open_model(reward, reading) if reward else None
    settings = config_section(config, "sae", split_assignments(assignments)[1])
    from safer_ray.pipeline import model_stages

    with one_stage(out, fresh, runner, config, reading, assignments) as ctx:
        show_artifact(model_stages.sae(ctx, settings, source, known, start=first, pairs=judged, reward=model))


@app.command()
def codes(
    pairs: ExistingPath,
    reward: Model,
    sae: ExistingPath,
    out: Out,
    config: ConfigPath = None,
    assignments: ClusterSettings = None,
    runner: RunnerName = "local",
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 5: one forward pass a pair; sparse codes and rewards remain."""
    from safer_ray.pipeline import model_stages

    reading = reading_of(read, trust_remote_code, config)
    with one_stage(out, fresh, runner, config, reading, only_of_cluster(assignments)) as ctx:
        show_artifact(
            model_stages.codes(ctx, open_input("pairs", pairs), open_model(reward, reading), open_input("sae", sae))
        )


@app.command()
def salience(
    codes: ExistingPath,
    out: Out,
    mode: Annotated[str, text_option(help="paper or response")] = "response",
    latents: Annotated[int | None, latents_option(help="SAE width, where the codes do not record it.")] = None,
    fresh: Fresh = False,
) -> None:
    """Stage 6: how differently each feature fires on chosen and rejected responses."""
    from safer_ray.config.sections import SalienceConfig

    config = build_config(SalienceConfig, mode=mode)
    from safer_ray.pipeline import feature_stages

    with one_stage(out, fresh) as ctx:
        show_artifact(feature_stages.salience(ctx, open_input("codes", codes), config.mode, latents))


@app.command()
def contexts(
    salience: ExistingPath,
    codes: ExistingPath,
    pairs: ExistingPath,
    reward: Model,
    out: Out,
    mode: SalienceMode = None,
    assignments: Assignments = None,
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 7: the sentences on which each candidate feature fires most."""
    from safer_ray.pipeline import feature_stages

    ranked = open_input("salience", salience)
    counted = feature_stages.mode_of(ranked, checked_mode(mode), otherwise="response")
    reading = reading_of(read, trust_remote_code)
    with one_stage(out, fresh, reading=reading) as ctx:
        config = config_section(None, "contexts", assignments)
        show_artifact(
            feature_stages.contexts(
                ctx,
                config,
                ranked,
                open_input("codes", codes),
                open_input("pairs", pairs),
                open_model(reward, reading),
                counted,
            )
        )


@app.command()
def verdicts(
    salience: ExistingPath,
    reward: Model,
    sae: ExistingPath,
    out: Out,
    candidates: Annotated[int, count_option()] = 256,
    assignments: Assignments = None,
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 8: rate candidate features by the concept probe."""
    from safer_ray.pipeline import feature_stages

    reading = reading_of(read, trust_remote_code)
    with one_stage(out, fresh, reading=reading) as ctx:
        config = config_section(None, "judge", assignments)
        show_artifact(
            feature_stages.verdicts(
                ctx,
                config,
                open_input("salience", salience),
                open_model(reward, reading),
                open_input("sae", sae),
                candidates,
                None,
            )
        )


@app.command()
def select(
    salience: ExistingPath,
    out: Out,
    ratings: Annotated[Path | None, path_option(help='JSON {"feature": rating}.')] = None,
    verdicts: Annotated[Path | None, path_option(help="The directory of stage verdicts.")] = None,
    mode: SalienceMode = None,
    assignments: Assignments = None,
    fresh: Fresh = False,
) -> None:
    """Stage 9: choose the safe and unsafe features."""
    if (ratings is None) == (verdicts is None):
        raise UserError("select: pass either --ratings FILE or --verdicts DIR")
    config = config_section(None, "select", assignments)
    from safer_ray.pipeline import feature_stages

    with one_stage(out, fresh) as ctx:
        source = open_input("salience", salience)
        judged = open_input("verdicts", verdicts) if verdicts else None
        show_artifact(
            feature_stages.select(
                ctx,
                config,
                source,
                verdicts=judged,
                ratings=open_input("ratings", ratings) if ratings else None,
                mode=checked_mode(mode),
            )
        )


@app.command()
def auditor(
    reward: Model,
    sae: ExistingPath,
    features: Annotated[Path, path_option(help="The directory of stage select, or a features.json.")],
    codes: ExistingPath,
    out: Out,
    detector: Annotated[Path | None, path_option(help="The directory of stage detector, where there is one.")] = None,
    salience: Annotated[Path | None, path_option(help="Of stage salience: the bundle then shows its features.")] = None,
    verdicts: Annotated[Path | None, path_option(help="Of stage verdicts, to show ratings and reasons.")] = None,
    contexts: Annotated[Path | None, path_option(help="Of stage contexts, to show where features fire.")] = None,
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    held_out: Annotated[
        Path | None, path_option(help="Codes of pairs that neither model nor features were made by: the reference.")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Stage 10: the deployable bundle."""
    if salience is None and (verdicts or contexts):
        raise UserError("auditor: --verdicts and --contexts need --salience, which the features' cards begin with")
    reading = reading_of(read, trust_remote_code)
    given = {"salience": salience, "verdicts": verdicts, "contexts": contexts}
    known = {name: open_input(name, path) for name, path in given.items() if path}
    needed = {"sae": sae, "features": features, "codes": codes}
    coder, selected, reference = (open_input(role, path) for role, path in needed.items())
    model = open_model(reward, reading)
    fitted = open_input("detector", detector) if detector else None
    apart = open_input("codes", held_out) if held_out else None
    for read_codes in filter(None, (reference, apart)):
        made_with = read_codes.manifest.get("inputs", {})
        for role, artifact in (("reward", model), ("sae", coder)):
            if made_with.get(role, artifact.name) != artifact.name:
                raise UserError(
                    f"auditor: {read_codes.path} were made with {role} {made_with[role]}, not {artifact.name}; pass "
                    f"the {role} that they were made with, or make codes with this one"
                )
    from safer_ray.pipeline import feature_stages
    from safer_ray.pipeline.reference import Reference

    with one_stage(out, fresh, reading=reading) as ctx:
        taken = Reference(codes=apart)
        show_artifact(feature_stages.auditor(ctx, model, coder, selected, reference, fitted, known, taken))


@app.command()
def scores(codes: ExistingPath, pairs: ExistingPath, auditor: ExistingPath, out: Out, fresh: Fresh = False) -> None:
    """Stage 11: score pairs from their codes against an auditor's reference."""
    config = config_section(None, "scores", None)
    from safer_ray.pipeline import feature_stages

    with one_stage(out, fresh) as ctx:
        show_artifact(
            feature_stages.scores(
                ctx, config, open_input("codes", codes), open_input("pairs", pairs), open_input("auditor", auditor)
            )
        )


@app.command()
def rescore(
    codes: ExistingPath,
    features: ExistingPath,
    out: Out,
    mode: Annotated[str | None, text_option(help="paper or response; default: what the features file says")] = None,
    fresh: Fresh = False,
) -> None:
    """Stage 11 with another selection of features, from codes alone."""
    checked = checked_mode(mode)
    from safer_ray.pipeline import feature_stages

    with one_stage(out, fresh) as ctx:
        scoring = config_section(None, "scores", None)
        show_artifact(
            feature_stages.rescore(ctx, scoring, open_input("codes", codes), open_input("features", features), checked)
        )


@app.command()
def curate(
    pairs: ExistingPath,
    scores: ExistingPath,
    strategy: Annotated[str, text_option(help="safer, reward_margin, random, length or suspicion")],
    action: Annotated[str, text_option(help="drop, relabel or poison")],
    percent: Annotated[float, percent_option(help="Share of the eligible pairs, 0-100.")],
    out: Out,
    where: Annotated[str | None, text_option(help="Limits the eligible pairs: section == safety")] = None,
    seed: Annotated[int, whole_option()] = 0,
    red_team: Annotated[bool, typer.Option("--i-am-red-teaming", help="Needed to poison.")] = False,
    fresh: Fresh = False,
) -> None:
    """Stage 12: drop, relabel or (as a red-team exercise) poison pairs."""
    from safer_ray.config.sections import CurateConfig

    config = build_config(
        CurateConfig,
        strategy=strategy,
        action=action,
        percent=percent,
        where=where,
        seed=seed,
        red_team=red_team,
    )
    from safer_ray.pipeline import feature_stages

    with one_stage(out, fresh) as ctx:
        show_artifact(feature_stages.curate(ctx, config, open_input("pairs", pairs), open_input("scores", scores)))


@app.command()
def evaluate(
    reward: Model,
    pairs: ExistingPath,
    out: Out,
    config: ConfigPath = None,
    assignments: ClusterSettings = None,
    runner: RunnerName = "local",
    read: ReadOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    fresh: Fresh = False,
) -> None:
    """Stage 13: accuracy of a reward model by section."""
    from safer_ray.pipeline import model_stages

    reading = reading_of(read, trust_remote_code, config)
    with one_stage(out, fresh, runner, config, reading, only_of_cluster(assignments)) as ctx:
        artifact = model_stages.evaluate(ctx, open_model(reward, reading), open_input("pairs", pairs))
    show_artifact(artifact)
    for name, values in artifact.metrics["sections"].items():
        interval = f"[{values['low']:.3f}, {values['high']:.3f}]"
        console.print(f"  {name:<20} {values['accuracy']:.3f}  95% {interval}  n {values['n']}")
