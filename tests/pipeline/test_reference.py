"""The reference of a bundle: of pairs that nothing was made by, told as what it is, with what it allows to flag."""

import numpy as np
import pyarrow as pa
import pytest
from support.finished_models import finished_model, run_of

from safer_ray.features.bundle import read_features, reference_values
from safer_ray.features.bundle_facts import expected_flags, flag_interval
from safer_ray.features.salience import SumFeatures, reduce_sums, salience_table
from safer_ray.features.scoring import suspect
from safer_ray.pipeline.reference import HeldOut, Taken, facts_of, held_out_of, values_of
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import part_files, read_parts
from safer_ray.storage.files import read_json, read_parquet

HALF = {"validation_percent": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def model(folder):
    return finished_model(folder / "model")


@pytest.fixture(scope="module")
def made(folder, model):
    """A run of which about half of the prompts are held out, more than a hundred."""
    return run(run_of(folder / "half", model, pairs=240, reward=HALF), LocalRunner(), until="scores")


def held_in(made):
    pairs = read_parts(made.artifacts["pairs"].path, ["pair_id", "group"])
    return HeldOut(50, 0).of(pairs["group"].to_pylist()), pairs["pair_id"].to_pylist()


def test_a_reference_is_of_exactly_the_pairs_that_are_held_out(made):
    held, ids = held_in(made)
    assert 100 <= held.sum() < len(ids)
    bundle = made.artifacts["auditor"]
    known = values_of(made.artifacts["codes"], read_features(bundle.path / "features.json"))
    assert known["pair_id"].to_pylist() == ids
    reference = read_parquet(bundle.path / "reference.parquet")
    for name in ("score", "reward_margin"):
        np.testing.assert_array_equal(reference[name].to_numpy(), np.sort(known[name].to_numpy()[held]))
    told = bundle.metrics["reference"]
    assert (told["kind"], told["pairs"], told["prompts"]) == ("held out", held.sum(), held.sum())
    assert bundle.manifest["config"]["held_out"] == {"percent": 50, "seed": 0}


def test_salience_is_of_exactly_the_other_pairs(made):
    held, _ = held_in(made)
    codes = pa.concat_tables([read_parquet(path) for path in part_files(made.artifacts["codes"].path)])
    sums = SumFeatures("response")(codes.filter(pa.array(~held)))
    wanted = salience_table(reduce_sums([sums], 64), "response")
    found = read_parts(made.artifacts["salience"].path)
    for name in wanted.column_names:
        np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), rtol=1e-6, err_msg=name)


def test_few_held_out_pairs_are_no_reference_and_this_is_told(folder, model, caplog):
    config = run_of(folder / "few", model, pairs=60, reward=HALF)
    bundle = run(config, LocalRunner(), until="auditor").artifacts["auditor"]
    assert (bundle.metrics["reference"]["kind"], bundle.metrics["reference"]["pairs"]) == ("in sample", 60)
    (line,) = [record.message for record in caplog.records if record.message.startswith("auditor: ")]
    assert "fewer than 100 of 60 pairs are held out" in line
    assert "raise reward.validation_percent (50)" in line


def test_a_reference_of_models_that_train_is_out_of_fold(folder, model, reward_dir, caplog):
    trained = {"use": None, "base": str(reward_dir), "frozen_layers": 2, "max_length": 96}
    config = run_of(folder / "folds", model, pairs=60, cross_fit={"folds": 2}, reward=trained)
    assert held_out_of(config) is None
    done = run(config, LocalRunner(), until="scores").artifacts
    assert done["auditor"].metrics["reference"]["kind"] == "out of fold"
    (line,) = [record.message for record in caplog.records if record.message.startswith("auditor: ")]
    assert "the margins of the reference are of the models of folds" in line
    reference = read_parquet(done["auditor"].path / "reference.parquet")["score"].to_numpy()
    np.testing.assert_array_equal(reference, np.sort(read_parts(done["scores"].path)["score"].to_numpy()))


def test_margins_of_a_run_in_folds_are_compared_with_those_of_the_model_that_audits(folder, model, reward_dir, safer):
    """Models of folds saw fewer pairs, and spread their margins otherwise."""
    trained = {"use": None, "base": str(reward_dir), "frozen_layers": 2, "max_length": 96, **HALF}
    config = run_of(folder / "folds-half", model, pairs=240, cross_fit={"folds": 2}, reward=trained)
    done = run(config, LocalRunner(), until="auditor").artifacts
    bundle = done["auditor"]
    known = values_of(done["codes"], read_features(bundle.path / "features.json"))
    pairs = read_parts(done["pairs"].path, ["pair_id", "group"])
    assert pairs["pair_id"].to_pylist() == known["pair_id"].to_pylist()
    held = HeldOut(50, 0).of(pairs["group"].to_pylist())
    wanted = np.sort(known["reward_margin"].to_numpy()[held])
    np.testing.assert_array_equal(reference_values(bundle, "reward_margin"), wanted)
    assert len(reference_values(bundle, "safer")) == 240
    told = bundle.metrics["reference"]
    assert told["kind"] == "out of fold"
    assert told["reward_margin"] == {"kind": "held out", "pairs": held.sum(), "prompts": held.sum()}
    assert expected_flags(bundle, "reward_margin", 0.05, held.sum())["kind"] == "held out"
    _, out, _ = safer("show", bundle.path)
    assert "240 pairs of 240 prompts, out of fold" in out
    assert f"margins: {held.sum()} pairs of {held.sum()} prompts, held out" in out
    code, _, err = safer(
        "audit",
        "--auditor",
        bundle.path,
        "--pairs",
        done["pairs"].path,
        "--out",
        folder / "a",
        "--detector",
        "reward_margin",
    )
    assert code == 0, err
    assert read_json(folder / "a" / "summary.json")["drift"]["reference"] == held.sum()


def test_a_finished_model_has_a_reference_of_its_own_scores(folder, model):
    """Heads of folds are no measure of the head that audits."""
    config = run_of(folder / "own", model, pairs=60, cross_fit={"folds": 2})
    assert held_out_of(config) == HeldOut(5, 0)


def test_the_command_takes_codes_of_held_out_pairs(safer, made, folder, model):
    names = ("reward", "sae", "codes")
    at = {name: made.artifacts[name].path for name in (*names, "select")}
    new = run(run_of(folder / "new", model, pairs=30, reward=HALF), LocalRunner(), until="pairs").artifacts["pairs"]
    words = [f"--{name}={at[name]}" for name in ("reward", "sae")]
    code, _, err = safer("codes", *words, f"--pairs={new.path}", f"--out={folder / 'held-codes'}")
    assert code == 0, err
    words += [f"--features={at['select']}", f"--codes={at['codes']}"]
    code, _, err = safer("auditor", *words, f"--held-out={folder / 'held-codes'}", f"--out={folder / 'bundle'}")
    assert code == 0, err
    code, out, _ = safer("show", folder / "bundle")
    assert "30 pairs of 30 prompts, held out" in out
    other = run(run_of(folder / "new", model, pairs=30, reward=HALF, sae={"seed": 1}), LocalRunner(), until="codes")
    strange = other.artifacts["codes"].path
    code, _, err = safer("auditor", *words, f"--held-out={strange}", f"--out={folder / 'strange'}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{strange} were made with sae" in err


# The interval


def alike(kind, rows):
    return dict.fromkeys(("score", "reward_margin"), Taken(kind, rows))


def coverage(quantile, n, repeats, values_of_group=1, seed=0):
    """In how many references of `n` uniform values the share that is flagged lies within the interval."""
    rng, inside = np.random.default_rng(seed), 0
    for _ in range(repeats):
        reference = np.repeat(rng.random(n), values_of_group)
        groups = [f"g{i}" for i in np.repeat(np.arange(n), values_of_group)]
        rows = pa.table({"score": reference, "reward_margin": reference, "group": groups})
        low, high = flag_interval(quantile, facts_of(alike("held out", rows))["worth"]["score"])
        fine = np.linspace(0, 0.5, 5001)  # of new pairs, whose share below a value is that value
        flagged = fine[suspect(fine, reference, quantile)["flag"]].max(initial=0.0)
        inside += low <= flagged <= high
    return inside / repeats


def test_an_interval_holds_the_share_that_is_flagged_as_often_as_it_says():
    assert 0.93 <= coverage(0.05, 400, 2000) <= 0.97
    assert 0.93 <= coverage(0.05, 100, 2000) <= 0.97


def test_pairs_that_say_the_same_are_worth_one():
    assert coverage(0.05, 100, 300, values_of_group=4) >= 0.90
    values = np.repeat(np.random.default_rng(0).random(200), 5)
    groups = [str(i) for i in np.repeat(np.arange(200), 5)]
    rows = pa.table({"score": values, "reward_margin": values, "group": groups})
    told = facts_of(alike("held out", rows))
    assert (told["pairs"], told["prompts"]) == (1000, 200)
    assert told["worth"]["score"] == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(("quantile", "worth"), [(0.05, 1), (0, 50), (1, 50), (0.99, 1.5), (0.5, 3), (0.05, 1e6)])
def test_an_interval_is_one_at_every_quantile(quantile, worth):
    low, high = flag_interval(quantile, worth)
    assert 0 <= low <= high <= 1


def test_what_is_not_finite_is_not_told_the_worth_of():
    rows = pa.table({"score": [0.1, 0.2], "reward_margin": [1.0, float("nan")], "group": ["a", "b"]})
    assert set(facts_of(alike("in sample", rows))["worth"]) == {"score"}
