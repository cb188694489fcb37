"""Names of artifacts are promises to those who have some: what is made of the same inputs is found again."""

from pathlib import Path

import numpy as np
import pytest

from safer_ray.config import sections as c
from safer_ray.config.sae import WarmStartConfig
from safer_ray.pipeline.crossfit import Fold, OutOfFold
from safer_ray.pipeline.lab import Lab, Planted
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import VERSIONS
from safer_ray.pipeline.sweep import Sweep
from safer_ray.storage.artifacts import Artifact, Place, open_artifact

WHERE = Path("/nowhere")
EXCHANGE = "- {id: e, category: c, kind: harmful, prompt: 'How?', safe: 'No.', unsafe: 'So.'}\n"
PROBE = "concept: made\nexchanges:\n" + 10 * EXCHANGE
CONFIG = c.RunConfig(
    name="named",
    corpus=c.CorpusConfig(),
    pairs=c.PairsConfig(sources=(c.SourceConfig(path="corpus:train.jsonl", format="canonical", licence="MIT"),)),
    evaluation=c.PairsConfig(sources=(c.SourceConfig(path="corpus:heldout.jsonl", part="holdout"),)),
)


def given(stage):
    return Artifact(WHERE / stage, f"{stage}-0123456789ab")


class Dry(Lab, Sweep):
    """Stages of which nothing is made; plantings are given."""

    def plantings(self, config, lab, pairs, noise, corpus):
        made_of = [given("noise"), given("vectors"), given("scores")]
        return [Planted(np.ones(1, bool), np.ones(1, bool), ["g"], None, None, made_of)] * 2


@pytest.fixture
def names(tmp_path):
    """What each stage would make, by stage; several of some."""
    (tmp_path / "text.txt").write_text("A text.\n", encoding="utf-8")
    (tmp_path / "probe.yaml").write_text(PROBE, encoding="utf-8")
    seen = {}
    stages = Dry(Place(tmp_path / "out", dry=True, on_stage=lambda name, _: seen.setdefault(name, None)), LocalRunner())
    corpus, pairs, reward, sae, codes, salience, scores = map(
        given, ("corpus", "pairs", "reward", "sae", "codes", "salience", "scores")
    )
    stages.corpus(c.CorpusConfig())
    stages.pairs(CONFIG.pairs, corpus)
    stages.pairs(CONFIG.evaluation, corpus)
    stages.noise(c.NoiseConfig(), pairs)
    stages.rewards(c.RewardConfig(base=c.TinyLlamaConfig()), [pairs, given("curate")])
    stages.reward(c.RewardConfig(base="hub:some/base"), pairs)
    activations = stages.activations(c.ActivationsConfig(layer=1), pairs, reward)
    stages.text_activations(WarmStartConfig(text=str(tmp_path / "text.txt")), 2, reward)
    stages.sae(c.SaeConfig(), activations, 1)
    stages.sae(c.SaeConfig(spliced_pairs=4), activations, 1, start=sae, pairs=pairs, reward=reward)
    stages.codes(pairs, reward, sae)
    stages.heads(reward, pairs)
    stages.vectors((1, 2), reward, pairs)
    stages.evaluate(reward, pairs)
    stages.salience(codes, "response")
    stages.contexts(c.ContextsConfig(), salience, codes, pairs, reward, "response")
    for exchanges, beside in (("corpus:probe.yaml", corpus), (str(tmp_path / "probe.yaml"), None)):
        stages.verdicts(c.JudgeConfig(exchanges=exchanges), salience, reward, sae, 16, beside)
    stages.select(c.SelectConfig(), salience, verdicts=given("verdicts"))
    (tmp_path / "ratings.json").write_text('{"3": 5, "1": null}', encoding="utf-8")
    stages.select(c.SelectConfig(), salience, ratings=open_artifact(tmp_path / "ratings.json"))
    known = {name: given(name) for name in ("salience", "verdicts", "contexts")}
    stages.auditor(reward, sae, given("select"), codes)
    auditor = stages.auditor(reward, sae, given("select"), codes, given("detector"), known)
    stages.scores(c.ScoresConfig(), codes, pairs, auditor)
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "paper"}', encoding="utf-8")
    stages.rescore(c.ScoresConfig(), codes, open_artifact(tmp_path / "features.json"))
    stages.curate(c.CurateConfig(strategy="safer", action="poison", percent=5, red_team=True), pairs, scores)
    stages.fold(pairs, 3, 1, 0, "train")
    codes_of = [given("codes"), Artifact(WHERE, "codes-ba9876543210")]
    stages._gathered(given("fold"), codes_of)
    fold = Fold(given("fold"), given("fold"), reward, sae, codes, auditor, scores)
    together = stages._together(pairs, [fold, fold], True)
    crossed = CONFIG.model_copy(update={"cross_fit": c.CrossFitConfig(folds=2)})
    detector = stages.detector(crossed, pairs, OutOfFold([fold, fold], together, True))
    stages.suspected(c.ScoresConfig(detector="combined"), scores, detector)
    stages.detection(
        CONFIG.model_copy(update={"lab": c.LabConfig(noises={"uniform": c.NoiseConfig(swap_percent=10)})}), pairs
    )
    grid = c.SweepGrid(action="drop", strategies=("safer",), percents=(5,))
    swept = CONFIG.model_copy(update={"sweep": c.SweepConfig(grids=(grid,), seeds=(0,))})
    stages.sweep(swept, pairs, given("noise"), scores, given("pairs"))
    found = {}
    for name in seen:
        found.setdefault(name.rpartition("-")[0], []).append(name.rpartition("-")[2])
    return found


NAMES = {
    "activations": ["4ad2c9777cb7", "686f7a49fdde"],
    "auditor": ["6a72212d969a", "32f4714d0864"],
    "codes": ["4bb09343de6a"],
    "contexts": ["22be7caf82ad"],
    "corpus": ["b9adfdab78c4"],
    "cross_fit": ["680dabf4d6df"],
    "curate": ["6ebb427444c0", "2c557f9f3024"],
    "detection": ["b27d07dc79bf"],
    "detector": ["053133213a50"],
    "evaluate": ["ebe4f66bee7b", "0fee19b766ac", "38b2561a173e"],
    "fold": ["517f88823d0d"],
    "gathered": ["2e2210360781"],
    "heads": ["aca5d4e7c437"],
    "noise": ["3a73e26e835b"],
    "pairs": ["1239b48d63fe", "7ea2b5835850"],
    "reward": ["c068ef76cfd8", "e5a25f57bfe4", "bdacd48f231c", "babd06ae91e8"],
    "sae": ["3c19151ab392", "744f8f6fe0dc"],
    "salience": ["e1eb8959f366"],
    "scores": ["77ee8d33086d", "61314696622e"],
    "select": ["1779d9c84fad", "691a0771d62a"],
    "suspected": ["96826c8f78a3"],
    "sweep": ["5f919f63fc9d"],
    "vectors": ["3150c7e36402", "33faaac083a1"],
    "verdicts": ["746bbcbcf6ed", "d74e94b4201d"],
}


def test_names_are_what_they_were(names):
    assert names == NAMES


def test_every_stage_that_makes_an_artifact_is_named():
    assert set(NAMES) == set(VERSIONS) - {"report"}
