"""The stages that are arithmetic on codes: salience, contexts, verdicts, selection, auditor, scores, curation.

Each is a function of the context and of artifacts, and returns one; the `_write_…` below it says what is in it. Only
the judge runs the model; what imports torch is imported where it is used, and the other stages do without.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from safer_ray import schema
from safer_ray.config.head import HeadConfig
from safer_ray.config.reading import ASCII_ENDS, AUTO, ENDS, FLOAT32, PRECISION, Precision, Reading, SentenceEnds
from safer_ray.config.sections import (
    AuditorConfig,
    ContextsConfig,
    CurateConfig,
    JudgeConfig,
    Mode,
    ScoresConfig,
    SelectConfig,
)
from safer_ray.config.where import where_mask
from safer_ray.data.curation import JOINED, apply_decisions, decide, have_scores, join_scores, keep_others
from safer_ray.errors import UserError
from safer_ray.features.bundle import (
    AUDITOR_FORMAT,
    DETECTOR,
    VALUES,
    check_auditor,
    features_file,
    read_features,
    scorer,
)
from safer_ray.features.cards import FILE as CARDS_FILE
from safer_ray.features.cards import FeatureEvidence, make_cards
from safer_ray.features.codes import flatten
from safer_ray.features.contexts import FindContexts, merge_contexts
from safer_ray.features.judge import JUDGES, load_probe, ratings_of, read_ratings
from safer_ray.features.salience import SUMS, SumFeatures, candidates, reduce_sums, salience_table
from safer_ray.features.salience import select as select_features
from safer_ray.features.scoring import (
    BY_BUNDLE,
    IN_SAMPLE,
    KIND,
    Features,
    ScoreCodes,
    check_width,
    pair_scores,
)
from safer_ray.pipeline.inputs import resolve_exchanges
from safer_ray.pipeline.reference import ALL_PAIRS, Reference, Taken, data_of, facts_of, without_held_out
from safer_ray.pipeline.stage import StageContext, join_parts, make, pairs_of
from safer_ray.reward.folder import ADAPTER_FOLDER
from safer_ray.reward.pretrained import own_code
from safer_ray.reward.reading import DTYPE, SETTINGS, settings_of
from safer_ray.reward.referred import refer_to
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import (
    MANIFEST,
    Artifact,
    Fragment,
    Result,
    part_files,
    part_fragments,
    part_name,
    read_fragment,
    read_parts,
)
from safer_ray.storage.files import read_parquet, write_json, write_parquet
from safer_ray.storage.marks import Marks
from safer_ray.storage.recipes import Input
from safer_ray.storage.work import MapJob

AS_COPY = AuditorConfig()
log = logging.getLogger(__name__)


def mode_of(salience: Artifact, given: Mode | None, otherwise: Mode | None = None) -> Mode:
    """Which ends a salience counts, `otherwise` where nobody says it and no number depends on it.

    Raises:
        UserError: it does not say, and nobody else does, or somebody says otherwise.
    """
    recorded = salience.metrics.get("mode", given)
    if recorded is None and otherwise is not None:
        log.warning("%s does not record its mode, taken for %s; pass --mode paper if not", salience.path, otherwise)
        return otherwise
    if recorded is None:
        raise UserError(f"{salience.path} does not record its mode; pass --mode paper or --mode response")
    if given not in (None, recorded):
        raise UserError(f"{salience.path} was made in mode {recorded!r}, not {given!r}; leave --mode out")
    return recorded


def ends_of(codes: Artifact) -> SentenceEnds:
    """Return the rule by which sentences end in codes; older ones do not say it."""
    return codes.metrics.get(ENDS, ASCII_ENDS)


def dtype_of(codes: Artifact) -> Precision:
    """Return the dtype that codes were computed in; older ones do not say it."""
    return codes.metrics.get(DTYPE, FLOAT32)


def _width(codes: Artifact, given: int | None) -> int:
    """Latents of the SAE that codes were made with."""
    recorded = codes.metrics.get("latents", given)
    if recorded is None:
        raise UserError(
            f"{codes.path} does not record how wide its SAE is, on which every salience depends; pass --latents"
        )
    if given not in (None, recorded):
        raise UserError(f"{codes.path} is of an SAE of {recorded} latents, not {given}; leave --latents out")
    return int(recorded)


def salience(
    ctx: StageContext, codes: Artifact, mode: Mode, latents: int | None = None, reference: Reference = ALL_PAIRS
) -> Artifact:
    """Return the salience of every feature: sums per fragment, reduced in order. `latents` is the SAE's width where the
    codes do not record it. Pairs that are held out as a `reference` are not among those it is of, where they are enough
    to be one.

    Raises:
        UserError: the width is neither recorded nor given, or a feature lies past it.
    """
    write = partial(_write_salience, ctx, codes, mode, latents, reference)
    shown = {"mode": mode, "latents": latents, **reference.recorded}
    return make(ctx, "salience", shown, write, reference.pairs, codes=codes)


def _write_salience(
    ctx: StageContext, codes: Artifact, mode: Mode, latents: int | None, reference: Reference, out: Path
) -> Result:
    flatten(read_parquet(part_files(codes.path)[0]).slice(0, 0), "chosen", mode)  # or it says that these are no codes
    width = _width(codes, latents)
    if mode == "paper" and ends_of(codes) != ASCII_ENDS:
        log.warning(
            "%s: its sentences end by the marks of every script; mode `paper` as published knows those of ASCII alone: "
            "make the codes with --read sentence_ends=ascii for that",
            codes.path,
        )
    read: Callable[[Fragment], pa.Table] = read_fragment
    if split := reference.split:
        read = without_held_out(codes.path, pairs_of(split[0]), split[1])
    job = MapJob("salience", read, lambda: SumFeatures(mode), SUMS, folder="state/sums", batch_rows=10**9)
    counts = ctx.map(job, part_fragments(codes.path), out)
    tables = [read_parquet(path) for path in part_files(out / "state" / "sums")]
    largest = max(int(t["feature"].to_numpy().max(initial=-1)) for t in tables)
    if largest >= width:
        raise UserError(f"salience: feature {largest} fires, but the SAE has {width} latents; check --latents")
    sums = reduce_sums(tables, width)
    write_parquet(salience_table(sums, mode), out / part_name(0))
    ends = {"ends_chosen": sums.ends_chosen, "ends_rejected": sums.ends_rejected}
    metrics = {"mode": mode, "latents": width, **ends}
    return Result({**counts, "written": width}, metrics)


def contexts(
    ctx: StageContext,
    config: ContextsConfig,
    salience: Artifact,
    codes: Artifact,
    pairs: Artifact,
    reward: Artifact,
    mode: Mode,
) -> Artifact:
    """Return the sentences on which each candidate feature fires most."""
    write = partial(_write_contexts, ctx, config, salience, codes, pairs, reward, mode)
    shown = {**config.recorded(), "mode": mode}
    return make(ctx, "contexts", shown, write, reward, salience=salience, codes=codes, pairs=pairs)


def _write_contexts(
    ctx: StageContext,
    config: ContextsConfig,
    salience: Artifact,
    codes: Artifact,
    pairs: Artifact,
    reward: Artifact,
    mode: Mode,
    out: Path,
) -> Result:
    features = candidates(read_parts(salience.path), config.candidates)
    reading = ctx.reading.model_copy(update={ENDS: ends_of(codes)})
    job = MapJob(
        "contexts",
        join_parts(codes.path, pairs_of(pairs), ["prompt", "chosen", "rejected"]),
        partial(FindContexts.load, reward.path, features, mode, config.per_feature, reading),
        schema.CONTEXTS,
        folder="state/found",
        batch_rows=10**9,
    )
    counts = ctx.map(job, part_fragments(codes.path), out)
    merged = merge_contexts((read_parquet(p) for p in part_files(out / "state" / "found")), config.per_feature)
    write_parquet(merged, out / part_name(0))
    rows = {**counts, "written": len(merged)}
    return Result(rows, {"features": len(features)})


def verdicts(
    ctx: StageContext,
    config: JudgeConfig,
    salience: Artifact,
    reward: Artifact,
    sae: Artifact,
    count: int,
    corpus: Artifact | None,
) -> Artifact:
    """Return the judge's ratings of the `count` candidates, and why."""
    exchanges, probe = resolve_exchanges(config.exchanges, corpus)
    write = partial(_write_verdicts, ctx, config, exchanges, salience, reward, sae, count)
    shown = {**config.recorded(), "candidates": count}
    return make(ctx, "verdicts", shown, write, salience=salience, reward=reward, sae=sae, exchanges=probe)


def _write_verdicts(
    ctx: StageContext,
    config: JudgeConfig,
    exchanges: str,
    salience: Artifact,
    reward: Artifact,
    sae: Artifact,
    count: int,
    out: Path,
) -> Result:
    from safer_ray.features.encoder import Encoder

    rows = read_parts(salience.path)
    features = candidates(rows, count)
    known = dict(zip(rows["feature"].to_pylist(), rows["salience"].to_pylist(), strict=True))
    encoder = Encoder.load(reward.path, sae=sae.path, reading=ctx.reading_of(reward))
    judge = JUDGES[config.kind](encoder, load_probe(exchanges), config)
    verdicts = judge({feature: known[feature] for feature in features})
    write_parquet(verdicts, out / part_name(0))
    ratings = Counter(str(r) for r in verdicts["rating"].to_pylist())
    return Result({"features": len(features)}, {"ratings": dict(sorted(ratings.items()))})


def select(
    ctx: StageContext,
    config: SelectConfig,
    salience: Artifact,
    *,
    verdicts: Artifact | None = None,
    ratings: Artifact | None = None,
    mode: Mode | None = None,
) -> Artifact:
    """Return F+ and F-, chosen by verdicts, or by a file of ratings. `mode` is that of the salience, where this does
    not record it.

    Raises:
        UserError: no candidate has the rating wanted, or nobody knows the mode.
    """
    given = read_ratings(ratings.path) if ratings else {}
    shown = schema.to_json({str(k): v for k, v in sorted(given.items())})
    rating = verdicts or Input(shown, (ratings,) if ratings else ())
    told = config.recorded() | ({"mode": mode} if mode else {})
    write = partial(_write_selection, config, salience, verdicts, given, mode)
    return make(ctx, "select", told, write, salience=salience, ratings=rating)


def _write_selection(
    config: SelectConfig,
    salience: Artifact,
    verdicts: Artifact | None,
    given: dict[int, int | None],
    mode: Mode | None,
    out: Path,
) -> Result:
    rated = ratings_of(read_parts(verdicts.path)) if verdicts else given
    rows = read_parts(salience.path, schema.SALIENCE.names)
    chosen = select_features(rows, rated, count=config.candidates, rating=config.rating, limit=config.limit)
    if not chosen["safe"] and not chosen["unsafe"]:
        best = max((r for r in rated.values() if r is not None), default=None)
        raise UserError(
            f"select: none of the {len(chosen['candidates'])} candidates is rated {config.rating} or better "
            f"(highest: {best}); lower judge.thresholds or select.rating, or train a wider SAE"
        )
    known = {"mode": mode_of(salience, mode), "latents": salience.metrics.get("latents")}
    write_json({**known, **chosen}, out / "features.json")
    write_json({str(key): rated.get(key) for key in chosen["candidates"]}, out / "ratings.json")
    return Result({"safe": len(chosen["safe"]), "unsafe": len(chosen["unsafe"])})


def auditor(
    ctx: StageContext,
    reward: Artifact,
    sae: Artifact,
    selected: Artifact,
    codes: Artifact,
    detector: Artifact | None = None,
    known: Mapping[str, Artifact] | None = None,
    reference: Reference = ALL_PAIRS,
    config: AuditorConfig = AS_COPY,
) -> Artifact:
    """Return the deployable bundle: `reward/ sae/ features.json reference.parquet`, `detector/` if one was fitted, and
    `features.parquet`, which shows people its features, where `salience` is `known`, and better where `verdicts` and
    `contexts` are. Its reference is of all pairs in `codes` where no other is given."""
    known = known or {}
    inputs = {"reward": reward, "sae": sae, "features": selected, "codes": codes}
    inputs |= {"detector": detector} if detector else {}
    inputs |= {**known, **reference.inputs}
    write = partial(_write_auditor, ctx.reading, reward, sae, selected, codes, detector, known, reference, config)
    shown = {"format": AUDITOR_FORMAT, **reference.recorded, **config.model_dump(exclude_defaults=True)}
    return make(ctx, "auditor", shown, write, **inputs)


def _write_auditor(
    reading: Reading,
    reward: Artifact,
    sae: Artifact,
    selected: Artifact,
    codes: Artifact,
    detector: Artifact | None,
    known: Mapping[str, Artifact],
    reference: Reference,
    config: AuditorConfig,
    out: Path,
) -> Result:
    from safer_ray.reward.bases import checkpoint_of
    from safer_ray.reward.checkpoints import hidden_size
    from safer_ray.sae.formats import load_sae

    dtype = dtype_of(codes)
    if reading.inference_dtype not in (AUTO, dtype):
        raise UserError(
            f"{codes.path} holds codes that were computed in {dtype}, and a bundle computes as its codes were: leave "
            f"{PRECISION} {reading.inference_dtype} out, or make codes with it"
        )
    features = read_features(selected.path)
    coder = load_sae(sae.path)
    check_width(features, coder.latents, str(sae.path))
    facts: dict[str, Any] = {"format": AUDITOR_FORMAT, ENDS: ends_of(codes), DTYPE: dtype}
    brought = own_code(checkpoint_of(str(reward.path), reading)._replace(name=reward.path.name))
    if brought:
        facts["own_code"] = brought  # of the reward model; runs where whoever uses the bundle allows it
    elif (width := hidden_size(reward.path, reading)) != coder.d:
        raise UserError(f"{sae.path} reads vectors of {coder.d}, the model in {reward.path} gives {width}")
    shutil.copytree(sae.path, out / "sae", dirs_exist_ok=True)
    if config.weights == "reference":
        refer_to(reward, out / "reward")
    else:
        _write_reward_model(reading, reward, codes, out / "reward")
    shutil.copyfile(features_file(selected.path), out / "features.json")
    if detector is not None:
        shutil.copytree(detector.path, out / DETECTOR, ignore=shutil.ignore_patterns(MANIFEST))
        facts["vector_layers"] = detector.metrics["vector_layers"]
    taken = reference.values(codes, features)
    ordered = {name: np.sort(found.rows[name].to_numpy()) for name, found in taken.items()}
    if detector is not None:
        rows = taken["score"].rows
        said, without = rows_of(read_parquet(detector.path / VALUES), rows["pair_id"].to_pylist())
        if not without:
            taken["combined"] = Taken("out of fold", rows.append_column("combined", said["combined"]))
    facts["reference"], facts["data"] = facts_of(taken), data_of(codes)
    longest = max(map(len, ordered.values()))
    for name, values in ordered.items():  # the shorter one ends in nulls
        ordered[name] = np.concatenate([values, np.full(longest - len(values), np.nan)])
    columns = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in ordered.items()}
    write_parquet(pa.table(columns), out / "reference.parquet")
    if known:
        found = FeatureEvidence(**{name: read_parts(artifact.path) for name, artifact in known.items()})
        parts = [read_parquet(path) for path in part_files(codes.path)]
        write_parquet(make_cards(features, found, parts), out / CARDS_FILE)
    return Result({"reference": len(taken["score"].rows)}, facts)


def _write_reward_model(reading: Reading, reward: Artifact, codes: Artifact, out: Path) -> None:
    """Write the reward model of a bundle, which wants nothing else: as it is, or in safetensors where it is merged with
    an adapter or read from other files. It is read as it was for its codes, whose rewards are the reference."""
    import torch

    from safer_ray.reward.bases import checkpoint_of
    from safer_ray.reward.checkpoints import keep_head, load_pair_tokenizer, load_reward_model, save_reward_model

    known = dict(codes.metrics.get("reading", {}))
    if checkpoint_of(str(reward.path), reading).is_plain:
        shutil.copytree(reward.path, out, ignore=shutil.ignore_patterns(ADAPTER_FOLDER), dirs_exist_ok=True)
        if not (out / SETTINGS).is_file():  # a model from elsewhere
            write_json(known or settings_of(load_pair_tokenizer(reward.path, reading)), out / SETTINGS)
        elif "head" in known:
            keep_head(out, known["head"])
        return
    if head := known.pop("head", None):  # which the weights written here have made one of
        reading = reading.model_copy(update={"head": HeadConfig.model_validate(head)})
    save_reward_model(load_reward_model(reward.path, dtype=torch.float32, device="cpu", reading=reading), out)
    if known:
        write_json(known, out / SETTINGS)


def scores(ctx: StageContext, config: ScoresConfig, codes: Artifact, pairs: Artifact, auditor: Artifact) -> Artifact:
    """Return the scores of pairs whose codes are there, against the auditor's reference."""
    write = partial(_write_scores, ctx, config, codes, pairs, auditor)
    return make(ctx, "scores", config, write, codes=codes, pairs=pairs, auditor=auditor)


def _write_scores(
    ctx: StageContext, config: ScoresConfig, codes: Artifact, pairs: Artifact, auditor: Artifact, out: Path
) -> Result:
    own = auditor.manifest.get("inputs", {}).get("codes") == codes.name
    kind = IN_SAMPLE if own else BY_BUNDLE
    check_auditor(auditor)
    job = MapJob(
        "scores",
        join_parts(codes.path, pairs_of(pairs), ["row_key", "extra"]),
        lambda: scorer(auditor, config),
        schema.SCORES,
        metadata={KIND: kind},
    )
    counts = ctx.map(job, part_fragments(codes.path), out)
    facts = {"mode": scorer(auditor, config).features.mode, "detector": config.detector, "kind": kind}
    return Result(counts, facts)


def rescore(
    ctx: StageContext, config: ScoresConfig, codes: Artifact, selected: Artifact, mode: Mode | None = None
) -> Artifact:
    """Return scores with another selection of features, of a file or of stage `select`; the scored pairs themselves are
    the reference."""
    features = read_features(selected.path, mode)
    shown = {**config.recorded(), **features._asdict()}
    return make(ctx, "scores", shown, partial(_write_rescored, ctx, config, codes, features), selected, codes=codes)


def _write_rescored(ctx: StageContext, config: ScoresConfig, codes: Artifact, features: Features, out: Path) -> Result:
    if "latents" in codes.metrics:
        check_width(features, codes.metrics["latents"], str(codes.path))
    reference = np.concatenate([pair_scores(read_parquet(p), features) for p in part_files(codes.path)])
    job = MapJob(
        "scores",
        read_fragment,
        lambda: ScoreCodes(features, reference, config.flag_quantile, config.reasons),
        schema.SCORES,
    )
    counts = ctx.map(job, part_fragments(codes.path), out)
    return Result(counts, {"mode": features.mode})


def curate(ctx: StageContext, config: CurateConfig, pairs: Artifact, scores: Artifact) -> Artifact:
    """Return pairs of which some are dropped, relabelled or poisoned: `pairs/` is trainable as it is, `decisions/` has
    every row."""
    return make(ctx, "curate", config, partial(_write_curated, ctx, config, pairs, scores), pairs=pairs, scores=scores)


def _write_curated(ctx: StageContext, config: CurateConfig, pairs: Artifact, scores: Artifact, out: Path) -> Result:
    parts = part_files(pairs_of(pairs))
    rows = pa.concat_tables([read_parquet(path) for path in parts])
    known = read_parts(scores.path, ["pair_id", *JOINED])
    scored = rows.filter(pa.array(have_scores(rows, known, ctx.max_refused_share)))
    decisions = decide(
        join_scores(scored, known),
        where_mask(scored, config.where),
        strategy=config.strategy,
        action=config.action,
        percent=config.percent,
        seed=config.seed,
    )
    decisions = keep_others(rows, decisions, config)
    offset = 0
    for path in parts:
        part = read_parquet(path)
        decided = decisions.slice(offset, len(part))
        offset += len(part)
        for folder, table in (("pairs", apply_decisions(part, decided)), ("decisions", decided)):
            write_parquet(table, out / folder / path.name)
    totals = Counter(decisions["decision"].to_pylist())
    if len(scored) < len(rows):
        totals["unscored"] = len(rows) - len(scored)  # kept
    if totals["drop"] == len(rows):
        raise UserError(f"curate: dropping {config.percent}% leaves no pairs; lower the percentage")
    return Result(dict(totals), {}, config.seed, Marks(red_team=config.action == "poison"))
