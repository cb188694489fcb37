"""Sweeps: every cell under every seed, paired figures that count training noise, and a whole small one."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from safer_ray.config.read import load_config
from safer_ray.config.sections import SweepConfig, SweepGrid
from safer_ray.detection.grouped import holm
from safer_ray.errors import UserError
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.sweep import CLEAN, WITHOUT_NOISE, Trial, effect, grouped, run_sweep, table, trials

CONFIG = Path(__file__).parents[2] / "configs/sweep_smoke.yaml"
DROP = SweepGrid(action="drop", strategies=("safer", "random"), percents=(5, 10))


def test_every_cell_comes_under_every_seed_and_the_clean_pairs_too():
    found = list(trials(SweepConfig(grids=(DROP,), seeds=(0, 7))))
    assert len(found) == 2 * (1 + 4)
    assert {(t.strategy, t.percent) for t in found} == {
        (CLEAN, 0.0),
        *((s, p) for s in DROP.strategies for p in (5, 10)),
    }
    assert {t.seed for t in found} == {t.curate.seed for t in found if t.curate} == {0, 7}


def test_where_errors_were_planted_the_pairs_without_them_come_too():
    found = list(trials(SweepConfig(grids=(DROP,), seeds=(0, 7)), noise=True))
    assert len(found) == 2 * (2 + 4)
    assert sum(t.action == WITHOUT_NOISE and t.curate is None for t in found) == 2


def test_a_group_is_the_pairs_of_its_sections_together():
    sections = {"a": {"x": True}, "b": {"y": False, "z": True}, "c": {"w": True}}
    assert grouped(sections, {"ab": ("a", "b")}) == sections | {"ab": {"x": True, "y": False, "z": True}}
    with pytest.raises(UserError, match="ab wants section 'nowhere'"):
        grouped(sections, {"ab": ("a", "nowhere")})


def test_poison_needs_to_be_asked_for():
    with pytest.raises(ValidationError, match="it needs `red_team: true`"):
        SweepGrid(action="poison", strategies=("safer",), percents=(5,))
    grids = ["sweep.grids=[{action: poison, strategies: [safer], percents: [5]}]"]
    with pytest.raises(UserError, match="it needs `red_team: true`"):
        load_config(CONFIG, grids)
    assert load_config(CONFIG, grids, red_team=True).sweep.grids[0].red_team


def answers(share, seeds=3, n=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((seeds, n)) < np.reshape(share, (-1, 1))


ALONE = [None] * 400


def test_an_effect_is_the_paired_mean_with_an_interval():
    ours, theirs = answers(0.6), answers(0.9, seed=1)
    found = effect(ours, theirs, ALONE)
    assert found.accuracy == pytest.approx(ours.mean())
    assert found.change == pytest.approx(ours.mean() - theirs.mean())
    assert found.low < found.change < found.high < 0
    assert found.seeds == pytest.approx(ours.mean(axis=1).tolist())
    assert found.p < 1e-6
    assert effect(ours, theirs, ALONE) == found
    assert effect(ours, ours, ALONE)[2:] == (0, *(pytest.approx(edge, abs=0.01) for edge in (0, 0)), 1)


def test_pairs_of_one_prompt_that_change_together_are_one_change():
    def told(groups):
        drawn = (answers(share, seeds=1, n=40, seed=seed) for share, seed in ((0.6, 0), (0.8, 1)))
        return effect(*(np.repeat(right, 10, axis=1) for right in drawn), groups)

    by_pair, by_prompt = told(ALONE), told(np.repeat(np.arange(40), 10).astype(str))
    assert by_prompt.change == by_pair.change
    assert by_prompt.high - by_prompt.low > 2 * (by_pair.high - by_pair.low)
    assert by_prompt.p > by_pair.p


def test_a_change_of_few_prompts_is_no_finding():
    ours, theirs = np.ones((3, 50), dtype=bool), np.zeros((3, 50), dtype=bool)
    found = effect(ours, theirs, np.repeat(np.arange(5), 10).astype(str))
    assert found.p == pytest.approx(2 / 2**5)
    assert found.low < 0.6 < found.change == found.high == 1
    assert effect(ours, theirs, ["one"] * 50)[3:] == (-1, 1, 1)


def test_seeds_that_disagree_widen_the_interval():
    base = answers(0.8)
    steady, shaky = (effect(answers(share, seed=1), base, ALONE) for share in (0.7, [0.5, 0.7, 0.9]))
    assert shaky.high - shaky.low > 2 * (steady.high - steady.low)


def test_an_interval_about_nothing_holds_zero_about_as_often_as_it_says():
    pairs = ((answers(0.8, 5, 300, seed), answers(0.8, 5, 300, seed + 99)) for seed in range(40))
    found = [effect(*pair, ALONE[:300]) for pair in pairs]
    assert sum(told.low <= 0 <= told.high for told in found) >= 34
    assert sum(told.p > 0.05 for told in found) >= 34


def test_a_table_compares_with_the_clean_pairs_and_with_chance():
    cells = list(trials(SweepConfig(grids=(DROP,), seeds=(0, 1))))
    ids = [f"p{i}" for i in range(50)]

    def measured(trial: Trial):
        wrong = {CLEAN: 5, "safer": 2, "random": 10}[trial.strategy]
        return {"safety": {key: i >= wrong for i, key in enumerate(ids)}, "chat": dict.fromkeys(ids, True)}

    found = table(cells, [measured(cell) for cell in cells], dict.fromkeys(ids))
    assert found["seeds"] == [0, 1]
    rows = {(r["strategy"], r["percent"], r["section"]): r for r in found["rows"]}
    assert len(rows) == 2 * 5
    row = rows["safer", 10, "safety"]
    assert (row["n"], row["against_clean"]["accuracy"]) == (50, 0.96)
    assert row["against_clean"]["change"] == pytest.approx(0.06)
    assert row["against_random"]["change"] == pytest.approx(0.16)
    assert "against_random" not in rows["random", 5, "safety"]
    assert rows["random", 5, "chat"]["against_clean"]["change"] == 0
    tested = [row[name] for row in found["rows"] for name in ("against_clean", "against_random") if name in row]
    tested = [told for told in tested if "p_holm" in told]
    assert len(tested) == found["tests"] == 2 * (4 + 2)  # in each section: cells against clean, `safer` against random
    assert [told["p_holm"] for told in tested] == pytest.approx(holm([told["p"] for told in tested]))
    assert "p_holm" not in rows[CLEAN, 0, "chat"]["against_clean"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = load_config(CONFIG, [f"root={tmp_path_factory.mktemp('sweep')}"])
    return config, run_sweep(config, LocalRunner())


@pytest.mark.slow
def test_a_small_sweep_is_whole_and_marked(made):
    config, artifact = made
    found = json.loads((artifact.path / "sweep.json").read_text(encoding="utf-8"))
    assert found["seeds"] == list(config.sweep.seeds)
    assert found["retraining"] == "full"
    cells = {(row["action"], row["strategy"]) for row in found["rows"]}
    assert cells == {
        ("clean", "clean"),
        ("without_noise", "without_noise"),
        ("poison", "safer"),
        ("poison", "random"),
        ("drop", "safer"),
        ("drop", "random"),
    }
    assert {row["section"] for row in found["rows"]} == {"safety", "chat", "all"}
    pairs = {row["section"]: row["n"] for row in found["rows"]}
    assert pairs["all"] == pairs["safety"] + pairs["chat"]
    assert artifact.red_team
    marks = {
        a.parent.name: json.loads(a.read_text())["red_team"]
        for a in artifact.path.parent.glob("reward-*/manifest.json")
    }
    assert any(marks.values())
    assert not all(marks.values())


@pytest.mark.slow
def test_a_sweep_that_is_run_again_makes_nothing_anew(made):
    config, artifact = made
    begun = []
    again = run_sweep(config, LocalRunner(), on_stage=lambda name, done: begun.append(name) if done is None else None)
    assert again.manifest == artifact.manifest
    assert begun == []


def test_a_config_without_a_sweep_is_refused():
    with pytest.raises(UserError, match="needs a `sweep` section"):
        run_sweep(load_config(CONFIG.with_name("smoke.yaml")), LocalRunner())
