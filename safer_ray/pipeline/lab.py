"""The noise lab: plant errors, score every pair by models that did not see its prompt, and measure every detector."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import LabConfig, NoiseConfig, RunConfig
from safer_ray.config.where import where_mask
from safer_ray.detection.detectors import DETECTORS, Evidence
from safer_ray.detection.quality import CURVE, Comparison, compare
from safer_ray.errors import UserError, need_extra
from safer_ray.features.codes import matrix_of
from safer_ray.features.judge import load_probe, probe_pairs
from safer_ray.features.passes import head_differences
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.crossfit import Fold, cross_fit, fit_fold
from safer_ray.pipeline.detector_stages import check_shared_trunk, read_folds, trunk_vectors
from safer_ray.pipeline.finished_model import settled
from safer_ray.pipeline.inputs import place_of_run, resolve_exchanges
from safer_ray.pipeline.runner import Runner
from safer_ray.pipeline.stage import StageContext, pairs_of, recipe
from safer_ray.report.experiment_report import as_page, detection_part
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.trunk import cached_trunk
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Artifact, Result, read_parts
from safer_ray.storage.files import write_json, write_text
from safer_ray.storage.lock import locked
from safer_ray.storage.recipes import Input

LEADERS = ("combined", "safer")  # whose lead over every other detector is tested


class Planted(NamedTuple):
    """One planting: the pairs that could have been hit, which of them were, and what the detectors may know."""

    mask: np.ndarray  # bool [n], in the rows of the evidence
    planted: np.ndarray  # bool [n]
    groups: list[str]
    out_of_fold: Evidence
    in_sample: Evidence | None
    made_of: list[Artifact]


def plantings(
    ctx: StageContext, config: RunConfig, lab: LabConfig, pairs: Artifact, noise: NoiseConfig, corpus: Artifact | None
) -> list[Planted]:
    """The same kind of errors under every seed."""
    seeded = [noise.model_copy(update={"seed": seed}) for seed in lab.seeds]
    return [_planting(ctx, config, lab, pairs, each, corpus) for each in seeded]


def _planting(
    ctx: StageContext, config: RunConfig, lab: LabConfig, pairs: Artifact, noise: NoiseConfig, corpus: Artifact | None
) -> Planted:
    noisy = model_stages.noise(ctx, noise, pairs)
    fitted = cross_fit(ctx, config, noisy, corpus)
    others = [config.reward.model_copy(update={"seed": config.reward.seed + i}) for i in range(1, lab.models)]
    margins = [
        _margins(ctx, model_stages.rewards(ctx, c, [f.train for f in fitted.folds]), fitted.folds) for c in others
    ]
    rows = read_parts(pairs_of(noisy), ["pair_id", "group", "source", "section", "labels", "chosen", "rejected"])
    vectors = trunk_vectors(ctx, config, noisy, fitted)
    evidence = _evidence(ctx, config, rows, fitted.folds, margins, vectors, corpus)
    made_of, known = [noisy, vectors, *_read(ctx, fitted.folds)], None
    if lab.in_sample:
        whole = _in_sample(ctx, config, noisy, fitted.folds[0].sae, corpus)
        known = _evidence(ctx, config, rows, [whole], [], vectors, corpus)  # one model is enough to show the bias
        made_of += _read(ctx, [whole])
    truth = read_parts(noisy.path / "truth")
    by_id = dict(zip(truth["pair_id"].to_pylist(), truth["planted"].to_pylist(), strict=True))
    planted = np.array([by_id[key] for key in rows["pair_id"].to_pylist()], dtype=bool)
    mask = where_mask(rows, noise.where)
    return Planted(mask, planted, rows["group"].to_pylist(), evidence, known, made_of)


def _in_sample(ctx: StageContext, config: RunConfig, pairs: Artifact, sae: Artifact, corpus: Artifact | None) -> Fold:
    """One fold that is everything: its models saw the pairs that they judge."""
    (reward,) = model_stages.rewards(ctx, config.reward, [pairs])
    codes = model_stages.codes(ctx, pairs, reward, sae)
    return fit_fold(ctx, config, pairs, pairs, reward, sae, codes, codes, corpus)


def _margins(ctx: StageContext, rewards: Sequence[Artifact], folds: Sequence[Fold]) -> dict[str, float]:
    """Return the margin of each pair, by the model of its fold."""
    found: dict[str, float] = {}
    for reward, fold in zip(rewards, folds, strict=True):
        table = read_parts(model_stages.evaluate(ctx, reward, fold.held).path, ["pair_id", "reward_margin"])
        found |= zip(table["pair_id"].to_pylist(), table["reward_margin"].to_pylist(), strict=True)
    return found


def _evidence(
    ctx: StageContext,
    config: RunConfig,
    rows: pa.Table,
    folds: Sequence[Fold],
    more: list[dict[str, float]],
    vectors: Artifact,
    corpus: Artifact | None,
) -> Evidence:
    """Return what the folds say of every row, in the rows' order."""
    ids = rows["pair_id"].to_pylist()
    read = read_folds(folds, vectors, ids)
    heads, _ = rows_of(
        pa.concat_tables([read_parts(model_stages.heads(ctx, fold.reward, fold.held).path) for fold in folds]), ids
    )
    margin = [read.readings.margin, *(np.array([m[key] for key in ids]) for m in more)]
    return Evidence(
        pair_id=ids,
        fold=read.fold,
        chosen=_texts(rows["chosen"]),
        rejected=_texts(rows["rejected"]),
        margin=np.stack(margin, axis=1).astype(np.float64),
        score_paper=read.score_paper,
        read=read.readings,
        head=matrix_of(heads["head"]),
        clean_head={i: clean_heads(config, fold, corpus) for i, fold in enumerate(folds)},
    )


def _read(ctx: StageContext, folds: Sequence[Fold]) -> list[Artifact]:
    """The artifacts that evidence is read from."""
    return [a for fold in folds for a in (fold.scores, model_stages.heads(ctx, fold.reward, fold.held))]


def detection(ctx: StageContext, config: RunConfig, pairs: Artifact, corpus: Artifact | None = None) -> Artifact:
    """Return how every detector does on every kind of errors: `detection.json`."""
    lab = config.lab
    assert lab is not None
    by_noise = {name: plantings(ctx, config, lab, pairs, noise, corpus) for name, noise in lab.noises.items()}
    inputs = {
        f"{name}{number}": Input(" ".join(a.name for a in planting.made_of), tuple(planting.made_of))
        for name, planted in by_noise.items()
        for number, planting in enumerate(planted)
    }
    made = recipe("detection", lab, pairs, **inputs)
    return ctx.place.make(made, partial(_write_detection, config.name, lab, by_noise, made.inherited.red_team))


def _write_detection(
    title: str, lab: LabConfig, by_noise: dict[str, list[Planted]], red_team: bool, out: Path
) -> Result:
    found = {}
    for name, plantings in by_noise.items():
        found[name] = {
            "pairs": int(plantings[0].mask.sum()),
            "planted": int(plantings[0].planted.sum()),
            "out_of_fold": as_json(measured(plantings, lab.draws)),
            "in_sample": as_json(measured(plantings, lab.draws, in_sample=True)) if lab.in_sample else None,
        }
    write_json(found, out / "detection.json")
    parts = [detection_part(name, f"Errors: {name}", told) for name, told in found.items()]
    write_text(as_page(title, parts, red_team), out / "page.html")
    return Result({"noises": len(found)}, found)


def clean_heads(config: RunConfig, fold: Fold, corpus: Artifact | None) -> np.ndarray:
    """The judge's exchanges as the reward head reads them, [m, d]: a small set that no error was planted in."""
    reward = load_reward_model(fold.reward.path, reading=config.reading)
    exchanges = probe_pairs(load_probe(resolve_exchanges(config.judge.exchanges, corpus)[0]))
    return head_differences(reward, reward.pairs(exchanges)).astype(np.float64)


def _texts(column: pa.ChunkedArray) -> list[str]:
    return ["\n".join(message["content"] for message in messages) for messages in column.to_pylist()]


def measured(plantings: Sequence[Planted], draws: int, *, in_sample: bool = False) -> Comparison:
    """Every detector on the pairs that could have been hit, over the plantings."""
    suspicions: dict[str, list[np.ndarray]] = {name: [] for name in DETECTORS}
    for planting in plantings:
        evidence = planting.in_sample if in_sample else planting.out_of_fold
        assert evidence is not None
        for name, detector in DETECTORS.items():
            suspicions[name].append(detector(evidence)[planting.mask])
    mask = plantings[0].mask
    groups = [group for group, inside in zip(plantings[0].groups, mask, strict=True) if inside]
    return compare(suspicions, [p.planted[mask] for p in plantings], groups, against=LEADERS, draws=draws)


def as_json(found: Comparison) -> dict[str, Any]:
    """Intervals as [value, low, high], and each planting's measures."""

    def flat(table: dict[str, Any]) -> dict[str, Any]:
        return {name: {m: [round(v, 4) for v in interval] for m, interval in by.items()} for name, by in table.items()}

    return {
        "detectors": flat(found.intervals),
        **{f"{one}_minus": flat(found.differences[one]) for one in LEADERS},
        "curve": {"budget": list(CURVE)}
        | {name: [round(v, 4) for v in values] for name, values in found.curves.items()},
        "seeds": {name: [round(m.auroc, 4) for m in each] for name, each in found.seeds.items()},
    }


def run_lab(config: RunConfig, runner: Runner, *, fresh: bool = False, on_stage: Any = None) -> Artifact:
    """The whole lab of a config with a `lab` and a `cross_fit` section.

    Raises:
        UserError: a section is missing, or the reward models do not share the layer that is read.
    """
    if config.lab is None or config.cross_fit is None:
        raise UserError("lab: the config needs a `lab` and a `cross_fit` section; configs/lab_pku.yaml has both")
    need_extra("lab", "cleanlab", "matplotlib")
    config = settled(config)
    check_shared_trunk(config, "lab")
    place = place_of_run(config, fresh=fresh, on_stage=on_stage or (lambda name, artifact: None))
    with locked(place.root), cached_trunk():
        ctx = StageContext.of(place, runner, config)
        corpus = model_stages.corpus(ctx, config.corpus) if config.corpus else None
        return detection(ctx, config, model_stages.pairs(ctx, config.pairs, corpus), corpus)
