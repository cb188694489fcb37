"""Sweeps: strategies x percents x seeds of curate, retrain, evaluate; every trial is artifacts, so a sweep resumes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safer_ray.config.sections import CurateConfig, RunConfig, SweepConfig
from safer_ray.data.curation import CLEAN, WITHOUT_NOISE
from safer_ray.detection.grouped import (
    DRAWS,
    FEW,
    cautious_interval,
    group_numbers,
    half_width,
    holm,
    sign_flip_p,
    standard_error,
    student_p,
)
from safer_ray.errors import UserError, need_extra
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.finished_model import settled
from safer_ray.pipeline.inputs import place_of_run
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import Runner
from safer_ray.pipeline.stage import StageContext, recipe
from safer_ray.report.experiment_report import as_page, sweep_part
from safer_ray.reward.trunk import cached_trunk
from safer_ray.storage.artifacts import Artifact, Result, read_parts
from safer_ray.storage.files import write_json, write_text
from safer_ray.storage.lock import locked

COMPARED = ("against_clean", "against_random")
NOTHING = ("against_clean", CLEAN)  # the uncurated pairs against themselves: no test


class Trial(NamedTuple):
    """One cell of a sweep under one seed."""

    action: str  # drop, relabel, poison, CLEAN or WITHOUT_NOISE
    strategy: str
    percent: float
    seed: int
    curate: CurateConfig | None


def trials(sweep: SweepConfig, *, noise: bool = False) -> Iterator[Trial]:
    """Every cell under every seed, the uncurated pairs first; where `noise` was planted, those without it, too."""
    for seed in sweep.seeds:
        yield Trial(CLEAN, CLEAN, 0.0, seed, None)
        if noise:
            yield Trial(WITHOUT_NOISE, WITHOUT_NOISE, 0.0, seed, None)
        for grid in sweep.grids:
            for strategy in grid.strategies:
                for percent in grid.percents:
                    curate = CurateConfig(
                        strategy=strategy,
                        action=grid.action,
                        percent=percent,
                        where=grid.where,
                        seed=seed,
                        red_team=grid.red_team,
                    )
                    yield Trial(grid.action, strategy, percent, seed, curate)


class Effect(NamedTuple):
    """Accuracy of a cell in one section, and how it differs from a rival on the same pairs under the same seeds."""

    accuracy: float
    seeds: list[float]
    change: float  # points of accuracy in [-1, 1], the mean over seeds
    low: float  # 95% bootstrap interval over prompts and seeds
    high: float
    p: float  # of a change as large as this by chance


def effect(
    ours: np.ndarray, theirs: np.ndarray, groups: Sequence[str | None], draws: int = DRAWS, seed: int = 0
) -> Effect:
    """Return the effect from right answers (bool) [seeds, pairs] of a cell and of its rival; pairs of these groups
    (prompts) [pairs].

    Both the prompts and the seeds are drawn again, so that the noise of training counts. Draws of few prompts that
    differ claim too much: the interval is then no narrower than `cautious_interval`, and p is never below that of sign
    flips of the prompts.
    """
    difference = ours.astype(np.float64) - theirs
    numbers = group_numbers(groups)
    sizes = np.bincount(numbers)
    n_seeds, count = len(difference), len(sizes)
    totals = np.stack([np.bincount(numbers, row) for row in difference])  # [seeds, groups]
    rng = np.random.default_rng(seed)
    prompts = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    chosen = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws) / n_seeds
    drawn = np.einsum("dg,dg->d", chosen @ totals, prompts) / (prompts @ sizes)
    change, error = float(difference.mean()), standard_error(drawn, count)
    low, high = change - half_width(error, count), change + half_width(error, count)
    if np.count_nonzero(totals.any(axis=0)) < FEW:
        cautious = cautious_interval(difference.mean(axis=0), groups)
        low, high = min(low, cautious[0]), max(high, cautious[1])
    p = max(student_p(change, error, count), sign_flip_p(totals.sum(axis=0)))
    by_seed = [float(row.mean()) for row in ours]
    return Effect(float(ours.mean()), by_seed, change, max(-1.0, low), min(1.0, high), p)


def sweep(
    ctx: StageContext, config: RunConfig, pairs: Artifact, before: Artifact, scores: Artifact, evaluation: Artifact
) -> Artifact:
    """Curate, retrain and evaluate every cell: `sweep.json`. `before` are the pairs without planted errors."""
    assert config.sweep is not None
    cells = list(trials(config.sweep, noise=config.noise is not None))
    as_they_are = {CLEAN: pairs, WITHOUT_NOISE: before}
    inputs = [
        feature_stages.curate(ctx, cell.curate, pairs, scores) if cell.curate else as_they_are[cell.action]
        for cell in cells
    ]
    models: dict[int, Artifact] = {}
    for seed in config.sweep.seeds:
        mine = [i for i, cell in enumerate(cells) if cell.seed == seed]
        reward = config.reward.model_copy(update={"seed": config.reward.seed + seed})
        models |= zip(mine, model_stages.rewards(ctx, reward, [inputs[i] for i in mine]), strict=True)
    measured = model_stages.evaluations(ctx, [models[i] for i in range(len(cells))], evaluation)
    made = recipe("sweep", config.sweep, pairs, **{f"trial{i}": artifact for i, artifact in enumerate(measured)})
    return ctx.place.make(made, partial(_write_sweep, config, cells, measured, made.inherited.red_team))


def _write_sweep(config: RunConfig, cells: list[Trial], measured: list[Artifact], red_team: bool, out: Path) -> Result:
    assert config.sweep is not None
    right = [grouped(answers(artifact), config.sweep.groups) for artifact in measured]
    found = table(cells, right, prompts(measured[0]))
    found["retraining"] = retraining(config)
    write_json(found, out / "sweep.json")
    parts = [sweep_part(config.name, "What curation changed", found)]
    write_text(as_page(config.name, parts, red_team), out / "page.html")
    return Result({"trials": len(cells)}, found)


def retraining(config: RunConfig) -> str:
    """Return how the models of a sweep are trained, for those who read its figures."""
    frozen = config.reward.frozen_layers
    return f"frozen up to layer {frozen}, its activations computed once" if frozen else "full"


def answers(evaluation: Artifact) -> dict[str, dict[str, bool]]:
    """Return, for each section and pair, whether r_chosen > r_rejected."""
    rows = read_parts(evaluation.path, ["pair_id", "section", "reward_margin"])
    found: dict[str, dict[str, bool]] = {}
    columns = (rows[name].to_pylist() for name in rows.column_names)
    for key, section, margin in zip(*columns, strict=True):
        found.setdefault(section or "unnamed", {})[key] = margin > 0
    return found


def prompts(evaluation: Artifact) -> dict[str, str | None]:
    """Return the group of each pair: the hash of its prompt."""
    rows = read_parts(evaluation.path, ["pair_id", "group"])
    return dict(zip(rows["pair_id"].to_pylist(), rows["group"].to_pylist(), strict=True))


def grouped(by_section: dict[str, dict[str, bool]], groups: dict[str, tuple[str, ...]]) -> dict[str, dict[str, bool]]:
    """The sections, and every group: the pairs of its sections together.

    Raises:
        UserError: a group names a section that is not there.
    """
    found = dict(by_section)
    for name, sections in groups.items():
        missing = [section for section in sections if section not in by_section]
        if missing:
            raise UserError(f"sweep.groups: {name} wants section {missing[0]!r}; there are {sorted(by_section)}")
        found[name] = {key: right for section in sections for key, right in by_section[section].items()}
    return found


def table(
    cells: Sequence[Trial], right: Sequence[dict[str, dict[str, bool]]], prompts: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return rows by cell and section: accuracy, change against the uncurated pairs and against `random` of the same
    cell, each with its p by Holm over all changes of the table (`p_holm`)."""
    seeds = sorted({cell.seed for cell in cells})
    kinds = list(dict.fromkeys((cell.action, cell.strategy, cell.percent) for cell in cells))
    by_cell = {(cell.action, cell.strategy, cell.percent, cell.seed): r for cell, r in zip(cells, right, strict=True)}
    rows: list[dict[str, Any]] = []
    for section in sorted(right[0]):
        ids = sorted(right[0][section])

        def stacked(kind: tuple[str, str, float], section: str = section, ids: list[str] = ids) -> np.ndarray:
            return np.array([[by_cell[*kind, seed][section][key] for key in ids] for seed in seeds])

        groups = [prompts[key] for key in ids]
        clean = stacked((CLEAN, CLEAN, 0.0))
        for kind in kinds:
            action, strategy, percent = kind
            ours = stacked(kind)
            row = {"action": action, "strategy": strategy, "percent": percent, "section": section, "n": len(ids)}
            row["against_clean"] = effect(ours, clean, groups)._asdict()
            chance = (action, "random", percent)
            if strategy != "random" and chance in kinds:
                row["against_random"] = effect(ours, stacked(chance), groups)._asdict()
            rows.append(row)
    tested = [row[name] for row in rows for name in COMPARED if name in row and (name, row["action"]) != NOTHING]
    for told, p_holm in zip(tested, holm([told["p"] for told in tested]), strict=True):
        told["p_holm"] = p_holm
    return {"seeds": seeds, "drawn": "prompts and seeds", "tests": len(tested), "rows": rows}


def run_sweep(
    config: RunConfig,
    runner: Runner,
    *,
    fresh: bool = False,
    on_stage: Callable[[str, Artifact | None], None] = lambda name, artifact: None,
) -> Artifact:
    """Everything a sweep needs, then the sweep.

    Raises:
        UserError: the config has no `sweep` section.
    """
    if config.sweep is None:
        raise UserError("sweep: the config needs a `sweep` section; configs/sweep_smoke.yaml has one")
    need_extra("lab", "matplotlib")
    with cached_trunk():
        made = run(config, runner, until="scores", fresh=fresh, on_stage=on_stage).artifacts
        config = settled(config)
        place = place_of_run(config, fresh=fresh, on_stage=on_stage)
        with locked(place.root):
            ctx = StageContext.of(place, runner, config)
            assert config.evaluation is not None  # a config with a sweep has one
            evaluation = model_stages.pairs(ctx, config.evaluation, made.get("corpus"))
            return sweep(ctx, config, made["training_pairs"], made["pairs"], made["scores"], evaluation)
