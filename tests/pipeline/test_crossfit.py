"""Folds by prompt: no pair is scored by what its own prompt taught, and every pair is scored once."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr
from support.made import EXCHANGE, write_parts
from support.same_rows import assert_same_rows
from support.tiny_run import audited, tables, tiny_config

from safer_ray.audit.score import AuditPairs
from safer_ray.config.sections import (
    ActivationsConfig,
    CorpusConfig,
    CrossFitConfig,
    CurateConfig,
    JudgeConfig,
    LabConfig,
    NoiseConfig,
    RewardConfig,
    RunConfig,
    SaeConfig,
    ScoresConfig,
)
from safer_ray.detection.combined import Readings, load_combined
from safer_ray.errors import UserError
from safer_ray.features import passes
from safer_ray.features.bundle import best_detector
from safer_ray.features.bundle_facts import expected_flags, flag_interval
from safer_ray.features.codes import contrasts, matrix_of
from safer_ray.features.scoring import KIND, margins
from safer_ray.pipeline import crossfit, model_stages
from safer_ray.pipeline.crossfit import fold_of
from safer_ray.pipeline.lab import plantings, run_lab
from safer_ray.pipeline.reference import Taken, facts_of
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext, pairs_of
from safer_ray.storage.artifacts import Place, open_artifact, part_files, read_parts
from safer_ray.storage.work import Part

FOLDS = 3


@pytest.fixture(scope="module")
def config(reward_dir, tmp_path_factory):
    """A frozen trunk up to the layer that is read, and a judge that finds everything worth a 5."""
    folder = tmp_path_factory.mktemp("lab")
    kinds = ("harmful", "benign")
    lines = [EXCHANGE.format(i=i, kind=kinds[i % 2]) for i in range(12)]
    (folder / "probe.yaml").write_text("concept: made\nexchanges:\n" + "\n".join(lines) + "\n")
    return tiny_config(folder).model_copy(
        update={
            "reward": RewardConfig(base=str(reward_dir), frozen_layers=2, max_length=96, batch_size=8,
                                   micro_batch_size=8, learning_rate=1e-3, validation_percent=20, evaluations=1),
            "activations": ActivationsConfig(layer=2),
            "sae": SaeConfig(latents=64, k=4, steps=20, batch_size=32, learning_rate=1e-3, validation_percent=20),
            "judge": JudgeConfig(exchanges=str(folder / "probe.yaml"), thresholds=(0, 0, 0, 0)),
            "cross_fit": CrossFitConfig(folds=FOLDS),
            "corpus": CorpusConfig(train_per_section=60, heldout_per_section=20),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(config, pairs_dir, tmp_path_factory):
    ctx = StageContext(Place(tmp_path_factory.mktemp("crossfit")), LocalRunner())
    return crossfit.cross_fit(ctx, config, open_artifact(pairs_dir))


def groups(artifact):
    return set(read_parts(artifact.path, ["group"])["group"].to_pylist())


def test_folds_are_dealt_by_prompt_and_seed():
    names = [f"g{i % 50}" for i in range(200)]
    folds = fold_of(names, 5, 0)
    assert len({(name, fold) for name, fold in zip(names, folds, strict=True)}) == 50
    assert set(folds) == set(range(5))
    assert (fold_of(names, 5, 1) != folds).any()
    assert (fold_of(names[::-1], 5, 0) == folds[::-1]).all()


def test_no_model_sees_a_prompt_that_it_scores(made, pairs_dir):
    every = groups(open_artifact(pairs_dir))
    held = [groups(fold.held) for fold in made.folds]
    assert set.union(*held) == every
    assert sum(map(len, held)) == len(every)
    for fold, inside in zip(made.folds, held, strict=True):
        assert groups(fold.train) == every - inside
        assert fold.reward.manifest["inputs"]["pairs"] == fold.train.name
        assert fold.scores.manifest["inputs"]["auditor"] == fold.auditor.name
        assert fold.auditor.manifest["inputs"]["reward"] == fold.reward.name


def test_the_autoencoder_of_a_frozen_trunk_is_shared_and_says_so(made):
    assert made.shared_sae
    assert len({fold.sae.name for fold in made.folds}) == 1
    assert made.scores.metrics == {"kind": "out of fold", "folds": FOLDS, "shared_sae": True}


def test_every_pair_has_one_score_in_its_own_place(made, pairs_dir):
    scores = made.scores.path
    for ours, theirs in zip(part_files(scores), part_files(pairs_dir), strict=True):
        assert read_parts_of(ours, "pair_id") == read_parts_of(theirs, "pair_id")
    metadata = pa.parquet.read_schema(part_files(scores)[0]).metadata
    assert metadata[KIND.encode()] == b"out of fold"
    by_fold = {key: value for fold in made.folds for key, value in zip(*columns(fold.scores.path), strict=True)}
    assert dict(zip(*columns(scores), strict=True)) == by_fold


def read_parts_of(path, column):
    return pa.parquet.read_table(path)[column].to_pylist()


def columns(path):
    rows = read_parts(path, ["pair_id", "score"])
    return rows["pair_id"].to_pylist(), rows["score"].to_pylist()


def test_codes_of_a_frozen_trunk_do_not_depend_on_the_fold(made):
    """What makes contrasts of different folds comparable."""
    first, second = made.folds[:2]
    ctx = StageContext(Place(made.scores.path.parent), LocalRunner())
    theirs = read_parts(model_stages.codes(ctx, first.held, second.reward, first.sae).path)
    ours = read_parts(first.codes.path)
    assert ours["chosen_features"] == theirs["chosen_features"]
    assert ours["chosen_reward"] != theirs["chosen_reward"]


def test_more_folds_than_prompts_are_refused(config, pairs, tmp_path):
    ctx = StageContext(Place(tmp_path / "out"), LocalRunner())
    few = open_artifact(write_parts(pairs.slice(0, 2), tmp_path / "few", 2))
    many = config.model_copy(update={"cross_fit": CrossFitConfig(folds=9)})
    with pytest.raises(UserError, match=r"fold \d of 9 leaves no pairs to held; lower cross_fit\.folds"):
        crossfit.cross_fit(ctx, many, few)


@pytest.mark.slow
def test_a_run_curates_by_out_of_fold_scores_and_its_report_says_so(tmp_path):
    curate = "curate={drop: {strategy: safer, action: drop, percent: 5}}"
    small = ("corpus.train_per_section=80", "corpus.heldout_per_section=20", "sae.steps=30")
    config = tiny_config(tmp_path, "cross_fit={folds: 2}", curate, *small)
    done = run(config, LocalRunner())
    scores = done.artifacts["scores"]
    assert scores.metrics["kind"] == "out of fold"
    assert not scores.metrics["shared_sae"]  # each fold trains its whole model, and an autoencoder of its own
    assert done.curated["drop"].manifest["inputs"]["scores"] == scores.name
    page = (done.directory / "report.html").read_text(encoding="utf-8")
    assert "out of fold: by models and features fitted on other prompts, 2 folds" in page


# The combined detector


@pytest.fixture(scope="module")
def suspected(config, tmp_path_factory):
    """A run that suspects pairs by `combined`."""
    update = {
        "root": tmp_path_factory.mktemp("suspected"),
        "scores": ScoresConfig(detector="combined", flag_quantile=0.1),
        "cross_fit": CrossFitConfig(folds=FOLDS, vector_layers=(1, 2)),
        "curate": {"drop": CurateConfig(strategy="suspicion", action="drop", percent=10)},
    }
    return run(config.model_copy(update=update), LocalRunner())


def test_suspicion_is_the_rank_of_what_the_detector_says(suspected):
    values = pa.parquet.read_table(suspected.artifacts["detector"].path / "values.parquet")
    scores = read_parts(suspected.artifacts["scores"].path)
    said = dict(zip(*(values[name].to_pylist() for name in ("pair_id", "combined")), strict=True))
    ours = np.array([said[key] for key in scores["pair_id"].to_pylist()])
    rank = np.argsort(np.argsort(ours)) + 0.5
    np.testing.assert_allclose(scores["suspicion"].to_numpy(), 1 - rank / len(ours), atol=1e-9)
    assert scores["flag"].to_pylist() == [s >= 0.9 for s in scores["suspicion"].to_pylist()]
    assert suspected.artifacts["scores"].metrics | {"detector": "combined", "kind": "out of fold"} == (
        suspected.artifacts["scores"].metrics
    )
    assert pa.parquet.read_schema(part_files(suspected.artifacts["scores"].path)[0]).metadata[KIND.encode()]


def test_pairs_are_curated_by_suspicion(suspected):
    scores = read_parts(suspected.artifacts["scores"].path, ["pair_id", "suspicion"]).sort_by("suspicion")
    decisions = read_parts(suspected.curated["drop"].path / "decisions")
    dropped = {row["pair_id"] for row in decisions.to_pylist() if row["decision"] == "drop"}
    assert dropped == set(scores["pair_id"].to_pylist()[-12:])


def test_a_bundle_audits_by_the_detector_that_was_fitted_for_it(suspected, tmp_path):
    bundle = open_artifact(suspected.artifacts["auditor"].path, "auditor")
    assert best_detector(bundle) == "combined"
    ctx = StageContext(Place(tmp_path), LocalRunner())
    pairs = suspected.artifacts["training_pairs"]
    audits = {
        name: audited(ScoresConfig(detector=name), pairs_of(pairs), bundle, tmp_path / name).sort_by("pair_id")
        for name in ("safer", "reward_margin", "combined")
    }
    assert audits["safer"]["score"].equals(audits["combined"]["score"])
    margin = audits["reward_margin"]["reward_margin"].to_numpy()
    assert spearmanr(audits["reward_margin"]["suspicion"].to_numpy(), -margin).statistic > 0.999
    model, read = load_combined(bundle.path / "detector"), audits["combined"]
    codes = read_parts(model_stages.codes(ctx, pairs, suspected.artifacts["reward"], suspected.artifacts["sae"]).path)
    codes = codes.sort_by("pair_id")
    vectors = read_parts(model_stages.vectors(ctx, (1, 2), suspected.artifacts["reward"], pairs).path).sort_by(
        "pair_id"
    )
    matrices = (matrix_of(vectors[name]) for name in ("response", "prompt"))
    contrast = contrasts(codes, len(model.effect.weights))
    said = model(Readings(margins(codes), read["score"].to_numpy(), contrast, *matrices))
    assert spearmanr(read["suspicion"].to_numpy(), -said).statistic > 0.99


def test_its_flags_are_told_by_what_pairs_of_one_prompt_are_worth(suspected):
    bundle = open_artifact(suspected.artifacts["auditor"].path, "auditor")
    values = pa.parquet.read_table(bundle.path / "detector/values.parquet")
    pairs = read_parts(pairs_of(suspected.artifacts["training_pairs"]), ["pair_id", "group"])
    rows = values.join(pairs, "pair_id")
    rows = rows.append_column("score", rows["combined"]).append_column("reward_margin", rows["combined"])
    names = ("score", "reward_margin", "combined")
    wanted = facts_of(dict.fromkeys(names, Taken("out of fold", rows)))["worth"]["combined"]
    told = expected_flags(bundle, "combined", 0.05, len(values))
    assert bundle.metrics["reference"]["worth"]["combined"] == wanted
    assert (told["low"], told["high"]) == flag_interval(0.05, wanted)
    assert told["kind"] == "out of fold"


def test_an_audit_by_it_reads_every_pair_once(suspected, pairs_dir, tmp_path, monkeypatch):
    bundle = open_artifact(suspected.artifacts["auditor"].path, "auditor")
    read, forward = [], passes.forward_pairs

    def counted(reward, tokens, **asked):
        read.extend(pair.pair_id for pair in tokens)
        return forward(reward, tokens, **asked)

    monkeypatch.setattr(passes, "forward_pairs", counted)
    scores = audited(ScoresConfig(detector="combined"), pairs_dir, bundle, tmp_path)
    assert len(read) == len(scores) > 0


def test_a_model_in_parts_suspects_by_it_as_the_whole_does(suspected, pairs_dir):
    bundle = open_artifact(suspected.artifacts["auditor"].path, "auditor")
    config, rows = ScoresConfig(detector="combined"), read_parts(pairs_dir)
    rows = rows.append_column("texts", pa.array(["{}"] * len(rows)))
    whole = AuditPairs(bundle, config)(rows)
    halves = [AuditPairs(bundle, config, Part(number, 2)) for number in range(2)]
    assert_same_rows(halves[1](halves[0](rows)), whole, "in two parts")


def test_a_bundle_without_one_says_how_to_get_one(made, pairs_dir, tmp_path):
    bundle = made.folds[0].auditor
    assert best_detector(bundle) == "reward_margin"
    with pytest.raises(UserError, match="has no combined detector; build the bundle by a run with `cross_fit`"):
        audited(ScoresConfig(detector="combined"), pairs_dir, bundle, tmp_path / "audit")


def test_a_combined_detector_needs_folds_that_share_what_it_reads(config, tmp_path):
    update = {"scores": ScoresConfig(detector="combined"), "root": tmp_path}
    with pytest.raises(ValueError, match="combined is fitted across folds; add `cross_fit`"):
        RunConfig.model_validate(config.model_dump() | update | {"cross_fit": None})
    deep = config.model_copy(update=update | {"cross_fit": CrossFitConfig(vector_layers=(3,))})
    with pytest.raises(UserError, match=r"combined: reward\.frozen_layers is 2, below layer 3"):
        run(deep, LocalRunner())


# The lab


@pytest.fixture(scope="module")
def lab(config, tmp_path_factory):
    root = tmp_path_factory.mktemp("lab-runs")
    section = LabConfig(noises={"uniform": NoiseConfig(swap_percent=10)}, seeds=(0, 1), models=2, draws=100)
    full = config.model_copy(update={"lab": section, "root": root, "curate": {}})
    return full, run_lab(full, LocalRunner())


@pytest.mark.slow
def test_the_lab_measures_every_detector_both_ways(lab):
    _, made = lab
    found = json.loads((made.path / "detection.json").read_text(encoding="utf-8"))["uniform"]
    assert (found["pairs"], found["planted"]) == (120, 12)
    for kind in ("out_of_fold", "in_sample"):
        by_detector = found[kind]["detectors"]
        assert {"safer", "reward_margin", "combined", "confident_learning", "influence"} <= set(by_detector)
        for values in by_detector.values():
            value, low, high = values["auroc"]
            assert 0 <= low <= value <= high <= 1
        assert set(found[kind]["combined_minus"]) == set(by_detector) - {"combined"}
        assert {len(each) for each in found[kind]["seeds"].values()} == {2}
    inside, outside = (found[k]["detectors"]["reward_margin"]["auroc"][0] for k in ("in_sample", "out_of_fold"))
    assert inside > outside - 0.05  # a model that saw the pair flatters itself


@pytest.mark.slow
def test_the_lab_goes_on_where_it_was_and_ends_the_same(lab, tmp_path):
    config, made = lab
    again = run_lab(config, LocalRunner())
    assert again.manifest == made.manifest
    section = config.lab.model_copy(update={"seeds": (0,), "models": 1, "in_sample": False})
    fewer = [config.model_copy(update={"lab": section, "root": root}) for root in (config.root, tmp_path)]
    assert run_lab(fewer[0], LocalRunner()).metrics == run_lab(fewer[1], LocalRunner()).metrics


@pytest.mark.slow
def test_no_detector_can_read_the_truth(config, tmp_path):
    """Evidence is the same whatever the truth folder says."""
    root = tmp_path / "lab"
    section = LabConfig(noises={"uniform": NoiseConfig(swap_percent=10)}, seeds=(0,), in_sample=False, draws=100)
    full = config.model_copy(update={"lab": section, "root": root})
    ctx = StageContext(Place(root / "lab"), LocalRunner(), 100)
    corpus = model_stages.corpus(ctx, full.corpus)
    pairs = model_stages.pairs(ctx, full.pairs, corpus)
    (first,) = plantings(ctx, full, section, pairs, section.noises["uniform"], corpus)
    noisy = model_stages.noise(ctx, section.noises["uniform"].model_copy(update={"seed": 0}), pairs)
    for path in part_files(noisy.path / "truth"):
        rows = pa.parquet.read_table(path)
        flipped = rows.set_column(1, "planted", pa.array([not p for p in rows["planted"].to_pylist()]))
        pa.parquet.write_table(flipped, path)
    (second,) = plantings(ctx, full, section, pairs, section.noises["uniform"], corpus)
    assert (first.planted == ~second.planted).all()
    for name in ("margin", "score_paper", "head", "fold"):
        np.testing.assert_array_equal(getattr(first.out_of_fold, name), getattr(second.out_of_fold, name))
    for ours, theirs in zip(first.out_of_fold.read, second.out_of_fold.read, strict=True):
        assert abs(ours - theirs).max() == 0


def test_a_lab_without_a_frozen_trunk_is_refused(config, tmp_path):
    section = LabConfig(noises={"uniform": NoiseConfig()})
    loose = config.model_copy(
        update={"lab": section, "reward": config.reward.model_copy(update={"frozen_layers": 1}), "root": tmp_path}
    )
    with pytest.raises(UserError, match=r"reward\.frozen_layers is 1, below layer 2"):
        run_lab(loose, LocalRunner())
    with pytest.raises(UserError, match="needs a `lab` and a `cross_fit` section"):
        run_lab(config, LocalRunner())


def test_tables_of_folds_are_the_pairs(made, pairs_dir):
    whole = read_parts(pairs_dir)
    for fold in made.folds:
        inside = set(read_parts(fold.held.path, ["pair_id"])["pair_id"].to_pylist())
        mask = pa.array([key in inside for key in whole["pair_id"].to_pylist()])
        assert_same_rows(tables(fold.held.path)["."], whole.filter(mask), "held")
