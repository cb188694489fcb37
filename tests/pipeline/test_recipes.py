"""What each stage records of its making, in full: `recipes.json` has the recipes of several dry runs, and of each stage
alone. An artifact that somebody has is found again as long as they are what they were.

A recipe that is changed on purpose comes with a new version of its stage, and `WRITE_RECIPES=1 python -m pytest
tests/pipeline/test_recipes.py` writes the file anew.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import tiny_config

from safer_ray.config import sections as c
from safer_ray.config.sae import WarmStartConfig
from safer_ray.config.values import Frozen
from safer_ray.pipeline import crossfit, detector_stages, duplicate_stage, feature_stages, lab, model_stages, sweep
from safer_ray.pipeline.crossfit import Fold, OutOfFold
from safer_ray.pipeline.lab import Planted
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import VERSIONS, StageContext
from safer_ray.storage.artifacts import Artifact, Place, open_artifact

GOLDEN = Path(__file__).parent / "recipes.json"
PAIR = '{"pair_id": "p", "prompt": "Q", "chosen": "A", "rejected": "B", "section": "safety"}\n'
EXCHANGE = "- {id: e, category: c, kind: harmful, prompt: 'How?', safe: 'No.', unsafe: 'So.'}\n"
PROBE = "concept: made\nexchanges:\n" + 10 * EXCHANGE
BASE = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "architectures": ["LlamaForCausalLM"]}
TEXT = "{folder}/text.txt"
RUNS = {
    "tiny": [],
    "quiet": [  # as `tiny`, but for what changes no result
        "fragment_rows=7",
        "reward.micro_batch_size=8",
        "reward.gradient_checkpointing=true",
        "reward.frozen_states_gb=5",
        "reward.shards=2",
        "sae.micro_batch_size=16",
        "sae.tensorboard=true",
        "ray.train_workers=3",
    ],
    "warm": [
        "noise=null",
        "pairs.max_chars=900",
        "reward.trust_remote_code=true",
        "activations.tokens=all",
        "sae.variant={kind: batch_topk}",
        "sae.spliced_pairs=0",
        "sae.warm_start={text: '" + TEXT + "', limit: 3, steps: 9, learning_rate: 0.01}",
        "salience.mode=paper",
        "contexts.per_feature=3",
        "select.limit=4",
        "curate={relabel: {strategy: reward_margin, action: relabel, percent: 2.5, seed: 3}}",
    ],
    "folds": ["cross_fit={folds: 2, seed: 1}", "noise={kind: long, swap_percent: 3, matching: how, seed: 2}"],
    "combined": [
        "corpus=null",
        "pairs.sources=[{path: '{folder}/pairs.jsonl', where: section == safety, licence: MIT, limit: 5}]",
        "evaluation.sources=[{path: '{folder}/pairs.jsonl', name: held, section: other, part: holdout}]",
        "reward.base='{folder}/base'",
        "reward.frozen_layers=2",
        "reward.dtype=bfloat16",
        "activations.layer=2",
        "judge.exchanges='{folder}/probe.yaml'",
        "cross_fit={folds: 2, vector_layers: [1, 2]}",
        "scores={detector: combined, flag_quantile: 0.1}",
    ],
}

WHERE = Path("/nowhere")
CONFIG = c.RunConfig(
    name="named",
    corpus=c.CorpusConfig(),
    pairs=c.PairsConfig(sources=(c.SourceConfig(path="corpus:train.jsonl", format="canonical", licence="MIT"),)),
    evaluation=c.PairsConfig(sources=(c.SourceConfig(path="corpus:heldout.jsonl", part="holdout"),)),
)


def given(stage):
    return Artifact(WHERE / stage, f"{stage}-0123456789ab")


def plantings(*_):
    made_of = [given("noise"), given("vectors"), given("scores")]
    return [Planted(np.ones(1, bool), np.ones(1, bool), ["g"], None, None, made_of)] * 2


def every_stage(tmp_path, place, monkeypatch):
    """Each stage once, several of some, at a place where nothing is made; plantings are given."""
    monkeypatch.setattr(lab, "plantings", plantings)
    (tmp_path / "text.txt").write_text("A text.\n", encoding="utf-8")
    (tmp_path / "probe.yaml").write_text(PROBE, encoding="utf-8")
    ctx = StageContext(place, LocalRunner())
    corpus, pairs, reward, sae, codes, salience, scores = map(
        given, ("corpus", "pairs", "reward", "sae", "codes", "salience", "scores")
    )
    model_stages.corpus(ctx, c.CorpusConfig())
    model_stages.pairs(ctx, CONFIG.pairs, corpus)
    model_stages.pairs(ctx, CONFIG.evaluation, corpus)
    model_stages.noise(ctx, c.NoiseConfig(), pairs)
    duplicate_stage.duplicates(ctx, c.DuplicatesConfig(), pairs)
    model_stages.rewards(ctx, c.RewardConfig(base=c.TinyLlamaConfig()), [pairs, given("curate")])
    model_stages.reward(ctx, c.RewardConfig(base="hub:some/base"), pairs)
    activations = model_stages.activations(ctx, c.ActivationsConfig(layer=1), pairs, reward)
    model_stages.text_activations(ctx, WarmStartConfig(text=str(tmp_path / "text.txt")), 2, reward)
    model_stages.sae(ctx, c.SaeConfig(), activations, 1)
    model_stages.sae(ctx, c.SaeConfig(spliced_pairs=4), activations, 1, start=sae, pairs=pairs, reward=reward)
    model_stages.codes(ctx, pairs, reward, sae)
    model_stages.heads(ctx, reward, pairs)
    model_stages.vectors(ctx, (1, 2), reward, pairs)
    model_stages.evaluate(ctx, reward, pairs)
    feature_stages.salience(ctx, codes, "response")
    feature_stages.contexts(ctx, c.ContextsConfig(), salience, codes, pairs, reward, "response")
    for exchanges, beside in (("corpus:probe.yaml", corpus), (str(tmp_path / "probe.yaml"), None)):
        feature_stages.verdicts(ctx, c.JudgeConfig(exchanges=exchanges), salience, reward, sae, 16, beside)
    feature_stages.select(ctx, c.SelectConfig(), salience, verdicts=given("verdicts"))
    (tmp_path / "ratings.json").write_text('{"3": 5, "1": null}', encoding="utf-8")
    feature_stages.select(ctx, c.SelectConfig(), salience, ratings=open_artifact(tmp_path / "ratings.json"))
    known = {name: given(name) for name in ("salience", "verdicts", "contexts")}
    feature_stages.auditor(ctx, reward, sae, given("select"), codes)
    auditor = feature_stages.auditor(ctx, reward, sae, given("select"), codes, given("detector"), known)
    feature_stages.scores(ctx, c.ScoresConfig(), codes, pairs, auditor)
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "paper"}', encoding="utf-8")
    feature_stages.rescore(ctx, c.ScoresConfig(), codes, open_artifact(tmp_path / "features.json"))
    feature_stages.curate(
        ctx, c.CurateConfig(strategy="safer", action="poison", percent=5, red_team=True), pairs, scores
    )
    crossfit.fold(ctx, pairs, 3, 1, 0, "train")
    codes_of = [given("codes"), Artifact(WHERE, "codes-ba9876543210")]
    crossfit.gathered(ctx, given("fold"), codes_of)
    fold = Fold(given("fold"), given("fold"), reward, sae, codes, auditor, scores)
    together = crossfit.scores_of_folds(ctx, pairs, [fold, fold], True, c.ScoresConfig())
    crossed = CONFIG.model_copy(update={"cross_fit": c.CrossFitConfig(folds=2)})
    detector = detector_stages.detector(ctx, crossed, pairs, OutOfFold([fold, fold], together, True))
    detector_stages.suspected(ctx, c.ScoresConfig(detector="combined"), scores, detector)
    lab.detection(
        ctx, CONFIG.model_copy(update={"lab": c.LabConfig(noises={"uniform": c.NoiseConfig(swap_percent=10)})}), pairs
    )
    grid = c.SweepGrid(action="drop", strategies=("safer",), percents=(5,))
    swept = CONFIG.model_copy(update={"sweep": c.SweepConfig(grids=(grid,), seeds=(0,))})
    sweep.sweep(ctx, swept, pairs, given("noise"), scores, given("pairs"))


@pytest.fixture
def recorded(monkeypatch):
    """The recipes of all that is made from here on, by name, once each."""
    seen = {}
    find = Place.find

    def noting(place, recipe):
        seen.setdefault(recipe.name, {"version": recipe.version, "config": recipe.config, "inputs": recipe.names})
        return find(place, recipe)

    monkeypatch.setattr(Place, "find", noting)
    # The base here is a config alone.
    monkeypatch.setattr("safer_ray.reward.bases.check_weights", lambda folder, bin_weights: None)
    return seen


def prepared(folder, assignments):
    """A run config on what is written into `folder`."""
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(BASE), encoding="utf-8")
    (folder / "pairs.jsonl").write_text(PAIR, encoding="utf-8")
    (folder / "text.txt").write_text("A text.\n", encoding="utf-8")
    (folder / "probe.yaml").write_text(PROBE, encoding="utf-8")
    return tiny_config(folder, *(each.replace("{folder}", str(folder)) for each in assignments))


def check(case, recorded):
    told = json.loads(json.dumps(recorded))  # as a manifest has it
    if os.environ.get("WRITE_RECIPES"):
        known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
        text = re.sub(r'("version": \d+\}+,) "', r'\1\n"', json.dumps(known | {case: told}, sort_keys=True))
        GOLDEN.write_text(text + "\n", encoding="utf-8")  # a recipe a line
    assert told == json.loads(GOLDEN.read_text(encoding="utf-8"))[case]


@pytest.mark.parametrize("case", RUNS)
def test_a_run_records_what_it_always_did(case, recorded, tmp_path):
    run(prepared(tmp_path, RUNS[case]), LocalRunner(), dry=True)
    assert len(recorded) > 15
    check(case, recorded)


def test_each_stage_records_what_it_always_did(recorded, tmp_path, monkeypatch):
    every_stage(tmp_path, Place(tmp_path / "out", dry=True), monkeypatch)
    check("stages", recorded)


def test_what_changes_no_result_is_in_no_recipe():
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert known["quiet"] == known["tiny"]


def test_every_stage_that_makes_an_artifact_is_recorded():
    made = {name.rpartition("-")[0] for name in json.loads(GOLDEN.read_text(encoding="utf-8"))["stages"]}
    assert made == set(VERSIONS) - {"report"}


def sections(model=Frozen):
    """All kinds of sections that a config may have."""
    return {model}.union(*(sections(kind) for kind in model.__subclasses__()))


def test_what_a_section_leaves_out_are_fields_of_it():
    left_out = {kind: kind.unrecorded - kind.model_fields.keys() for kind in sections()}
    assert not any(left_out.values()), left_out
    assert sum(map(bool, (kind.unrecorded for kind in sections()))) >= 4


def test_sections_in_a_section_leave_out_theirs():
    recorded = CONFIG.pairs.recorded("max_chars")
    assert recorded.keys() == c.PairsConfig.model_fields.keys() - {"max_chars"}
    unset = {"path", "pairs", "carried", "encoding"}
    assert recorded["sources"][0].keys() == c.SourceConfig.model_fields.keys() - unset
    whole = CONFIG.recorded()
    assert whole["pairs"]["sources"] == recorded["sources"]
    assert "exchanges" not in whole["judge"]
