"""From a finished model and pairs to a bundle: what is derived, what each setting overrides, and going on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from support.finished_models import finished_model, write_probe, write_rows

from safer_ray.errors import UserError
from safer_ray.pipeline import fit as fitting
from safer_ray.pipeline.fit import Estimate, check_room, estimate, fit, fit_config, rating_of, with_steps
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.schema import rows_of
from safer_ray.storage.artifacts import Artifact, part_name, read_parts
from safer_ray.storage.files import write_parquet

PAIRS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def model(folder):
    return finished_model(folder / "model")


@pytest.fixture(scope="module")
def rows(folder):
    return write_rows(folder / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def small(folder):
    """Settings by which a fit takes seconds, and finds features in noise."""
    probe = write_probe(folder / "probe.yaml")
    return ["sae.steps=20", "sae.latents=64", "sae.k=4", f"judge.exchanges={probe}", "judge.thresholds=[0,0,0,0]"]


def config_of(model, rows, out, *settings):
    return fit_config(str(model), [{"path": str(rows)}], Path(out), list(settings))


def fitted(config, **options):
    """The run, the estimates that were shown, and what was made and found, in order."""
    shown, told = [], []
    made = fit(
        config,
        LocalRunner(),
        on_stage=lambda name, artifact: told.append((name.rpartition("-")[0], artifact is not None)),
        on_estimate=shown.append,
        **options,
    )
    return made, shown, told


@pytest.fixture(scope="module")
def whole(model, rows, folder, small):
    return fitted(config_of(model, rows, folder / "whole", *small))


def stamps(folder):
    return {path: os.stat(path).st_mtime_ns for path in folder.rglob("manifest.json")}


def test_defaults_are_derived_from_the_model(model, rows, tmp_path):
    config = config_of(model, rows, tmp_path / "out")
    assert (config.name, config.root) == ("out", tmp_path)
    assert config.activations.layer == 2  # of three
    assert (config.sae.latents, config.sae.k) == (8 * 48, 12)
    assert (config.reward.use, config.reward.validation_percent) == (str(model), 20)
    assert config.auditor.weights == "copy"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("activations.layer=1", lambda c: c.activations.layer == 1),
        ("sae.latents=100", lambda c: c.sae.latents == 100),
        ("sae.k=3", lambda c: c.sae.k == 3),
        ("sae.steps=7", lambda c: with_steps(c.sae, 10**6).steps == 7),
        ("sae.batch_size=64", lambda c: with_steps(c.sae, 10**6).batch_size == 64),
        ("select.rating=5", lambda c: c.select.rating == 5 and "rating" in c.select.model_fields_set),
        ("reward.validation_percent=30", lambda c: c.reward.validation_percent == 30),
        ("reward={validation_percent: 30}", lambda c: c.reward.validation_percent == 30 and c.reward.use),
        ("auditor.weights=reference", lambda c: c.auditor.weights == "reference"),
        ("scores.detector=safer", lambda c: c.scores.detector == "safer"),
        ("report.title=Mine", lambda c: c.report.title == "Mine"),
        ("pairs={max_chars: 900}", lambda c: c.pairs.max_chars == 900 and len(c.pairs.sources) == 1),
    ],
)
def test_each_default_can_be_overridden(setting, read, model, rows, tmp_path):
    assert read(config_of(model, rows, tmp_path / "out", setting))


@pytest.mark.parametrize(
    ("out", "settings", "told"),
    [
        ("a folder", [], r"--out a folder: a run is called by letters, digits.*choose another folder"),
        ("-x", [], r"--out -x: a run is called by"),
        ("out", ["root=/elsewhere"], r"--set name and root: a fit lies in the folder that --out names; leave them out"),
        ("out", ["name=other"], r"--set name and root"),
        ("out", ["reward.use=other"], r"--set reward.use: --reward names the model; leave it out"),
        ("out", ["reward={use: other}"], r"--set reward.use: --reward names the model"),
        ("out", ["reward.base=other"], r"use names a finished model, base one that is trained on; keep one"),
        ("out", ["reward=5"], r"reward: .*"),
        ("out", ["sae=null"], r"sae: .*"),
        ("out", ["reward.template=nothing"], r"no template is called 'nothing'"),
        ("out", ["sae.latent=5"], r"sae.latent"),
        ("out", ["evaluation"], r"write it as key=value"),
    ],
)
def test_what_cannot_be_set_is_refused_in_a_line(out, settings, told, model, rows, tmp_path):
    with pytest.raises(UserError, match=told) as caught:
        config_of(model, rows, tmp_path / out, *settings)
    assert "\n" not in str(caught.value)


def test_a_layer_past_the_model_is_refused_before_the_pairs_are_read(model, rows, tmp_path):
    with pytest.raises(UserError, match=r"activations.layer 9 lies past the 3 layers .*choose 1..3"):
        fitted(config_of(model, rows, tmp_path / "out", "activations.layer=9"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("until", "told"), [("nothing", "is no stage"), ("noise", "this config makes none")])
def test_a_stage_that_there_is_not_is_refused_before_the_pairs_are_read(until, told, model, rows, tmp_path):
    with pytest.raises(UserError, match=f"--until '?{until}'?:? {told}"):
        fitted(config_of(model, rows, tmp_path / "out"), until=until)
    assert not (tmp_path / "out").exists()


def test_a_fit_ends_with_a_bundle_and_a_report(whole):
    made, shown, told = whole
    assert (made.artifacts["auditor"].path / "features.json").is_file()
    assert (made.directory / "report.html").is_file()
    assert (made.directory / "summary.json").is_file()
    (expected,) = shown
    assert (expected.layer, expected.layers, expected.latents, expected.k) == (2, 3, 64, 4)
    assert (expected.pairs, expected.steps) == (PAIRS, 20)
    vectors = made.artifacts["activations"].manifest["rows"]["written"]
    assert expected.vectors == pytest.approx(vectors, rel=0.1)
    assert min(expected.hours, expected.memory_gb, expected.disk_gb) > 0
    stages = [stage for stage, there in told if there]
    assert len(stages) == len(set(stages))  # each is told once
    assert stages[0] == "pairs"
    assert stages[-1] == "scores"
    assert made.config.select.rating == 5


def test_the_same_fit_again_makes_nothing(whole, model, rows, folder, small):
    before = stamps(folder / "whole")
    _, shown, told = fitted(config_of(model, rows, folder / "whole", *small))
    assert shown == []
    assert {there for _, there in told} == {True}
    assert stamps(folder / "whole") == before


def test_a_fresh_fit_makes_everything_once(whole, model, rows, folder, small):
    copied = shutil.copytree(folder / "whole", folder / "fresh/whole", symlinks=True)
    before = stamps(copied)
    _, shown, told = fitted(config_of(model, rows, copied, *small), fresh=True)
    assert len(shown) == 1
    made = [stage for stage, there in told if not there]
    assert sorted(made) == sorted(stage for stage, there in told if there)
    assert len(made) == len(set(made)) == len([path for path in before if path.parent.parent == copied])
    assert all(stamp != before[path] for path, stamp in stamps(copied).items() if path.parent.parent == copied)


def test_a_fit_stops_where_it_is_told_and_goes_on(whole, model, rows, tmp_path, small):
    config = config_of(model, rows, tmp_path / "whole", *small)
    for until in ("pairs", "reward", "activations", "sae"):
        made, shown, _ = fitted(config, until=until)
        assert until in made.artifacts
        assert not (made.directory / "report.html").exists()
        assert bool(shown) == (until == "activations")
    before = stamps(tmp_path)
    made, shown, _ = fitted(config)
    assert shown == []
    assert before.items() <= stamps(tmp_path).items()
    assert {name: a.name for name, a in made.artifacts.items()} == {
        name: a.name for name, a in whole[0].artifacts.items()
    }


def test_a_fit_of_pairs_with_planted_errors_stops_behind_them(model, rows, tmp_path):
    config = config_of(model, rows, tmp_path / "out", "noise={swap_percent: 5}")
    made, _, _ = fitted(config, until="noise")
    assert set(made.artifacts) >= {"pairs", "noise"}
    assert "activations" not in made.artifacts


def verdicts(folder, ratings):
    folder.mkdir()
    rows = pa.table({"feature": range(len(ratings)), "rating": pa.array(ratings, pa.int64())})
    write_parquet(rows, folder / part_name(0))
    return Artifact(folder, "verdicts-x", {})


@pytest.mark.parametrize(
    ("ratings", "chosen"),
    [
        ([5, 5, 5, 5, 4, 3], 5),
        ([5, 5, 5, 4, 4, 4, 4], 4),
        ([5, 3, 3, 3, 3], 3),
        ([5, 4, 3, 2], 3),  # never four: as many as there are
        ([None, 1, 3, 2], 3),
    ],
)
def test_the_rating_is_the_highest_that_a_few_features_have(ratings, chosen, tmp_path):
    assert rating_of(verdicts(tmp_path / "v", ratings)) == chosen


def test_a_score_of_very_few_features_is_warned_of(tmp_path, caplog):
    rating_of(verdicts(tmp_path / "few", [None, 1, 3, 2]))
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("fit: only 1 of 4 features that tell chosen from rejected are rated 3 or better")
    assert "activations.layer=N" in line
    caplog.clear()
    rating_of(verdicts(tmp_path / "enough", [4] * 4))
    assert [record.message for record in caplog.records] == [
        "fit: 4 features are rated 4 or better by the probe, and make the score"
    ]


def test_a_fit_suspects_its_own_pairs_as_an_audit_with_its_bundle_does(whole, safer, tmp_path):
    """Two pages of the same pairs and the same bundle named other pairs as the worst."""
    made, _, _ = whole
    words = ["audit", "--auditor", made.artifacts["auditor"].path, "--pairs", made.artifacts["pairs"].path]
    code, _, err = safer(*words, "--out", tmp_path / "audit")
    assert code == 0, err
    theirs, ours = (read_parts(at) for at in (tmp_path / "audit/scores", made.artifacts["scores"].path))
    found, missing = rows_of(theirs, ours["pair_id"].to_pylist())
    assert not missing
    np.testing.assert_allclose(found["suspicion"].to_numpy(), ours["suspicion"].to_numpy(), atol=1e-3)
    page = (made.directory / "report.html").read_text()
    assert "Suspected by <code>reward_margin</code>" in page


def test_a_layer_without_features_of_safety_is_told_in_a_line(model, rows, tmp_path, small):
    strict = [*small, "judge.thresholds=[1,1,1,1]"]
    with pytest.raises(UserError, match=r"none is rated 3 or better by the probe.*activations.layer=N") as caught:
        fitted(config_of(model, rows, tmp_path / "out", *strict))
    assert "\n" not in str(caught.value)


def test_too_few_pairs_are_told_in_a_line(model, tmp_path, small):
    rows = write_rows(tmp_path / "few.jsonl", 1)
    with pytest.raises(
        UserError, match=r"fit: 1 pairs give about \d\d vectors, .* takes 32, .*pass more pairs"
    ) as caught:
        fitted(config_of(model, rows, tmp_path / "out", *small))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").glob("activations-*")) == []


def test_steps_go_by_the_vectors():
    sae = fitting.SaeConfig(validation_percent=1)
    assert (with_steps(sae, 100).batch_size, with_steps(sae, 100).steps) == (32, 1000)
    many = with_steps(sae, 10_000_000)
    assert (many.batch_size, many.steps) == (1024, -(-2 * 9_900_000 // 1024))


def test_a_disk_without_room_is_told_before_the_work(tmp_path, monkeypatch):
    expected = Estimate(2, 3, 64, 4, 10, 100, 20, 0.1, 1.0, 2.0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1.5e9))
    with pytest.raises(UserError, match=r"about 2.0 GB are wanted in .*its disk has 1.5 GB free; make room"):
        check_room(expected, tmp_path)
    with (tmp_path / "there").open("wb") as file:
        file.truncate(600_000_000)  # of an interrupted fit
    check_room(expected, tmp_path)


def test_a_model_that_reads_no_pair_is_told(model, rows, tmp_path):
    config = config_of(model, rows, tmp_path / "out", "reward.truncation=quarantine", "reward.max_length=8")
    with pytest.raises(UserError, match=r"can read none of 64 pairs; the first: "):
        fitted(config)


def test_the_estimate_counts_half_floats(whole):
    made, (expected,), _ = whole
    held = sum(file.stat().st_size for file in made.directory.rglob("*") if file.is_file())
    assert held / 4 < expected.disk_gb * 1e9 < held * 4
    assert estimate(made.config, made.artifacts["pairs"], made.artifacts["reward"]).vectors == expected.vectors


# The command


def test_the_command_shows_what_it_takes_and_what_comes_next(safer, model, rows, tmp_path, small):
    settings = [word for setting in small for word in ("--set", setting)]
    code, out, err = safer("fit", "--reward", model, "--pairs", rows, "--out", tmp_path / "out", *settings)
    assert code == 0, err
    for name in ("layer", "autoencoder", "pairs", "time", "memory", "disk"):
        assert f"\n {name} " in out or f"\n{name} " in out, name
    assert "2 of 3" in out
    (line,) = [line for line in out.splitlines() if line.startswith("next")]
    words = line.split()[2:]
    given = {"DATA": str(write_rows(tmp_path / "new.jsonl", 5, 500)), "OUT": str(tmp_path / "audit")}
    code, out, err = safer(*[given.get(word, word) for word in words])
    assert code == 0, err
    assert len(read_parts(tmp_path / "audit/scores")) == 5
    summary = json.loads((tmp_path / "audit/summary.json").read_text())
    assert summary["reference"]["pairs"] > 0


def test_the_command_refuses_in_a_line(safer, model, rows, tmp_path):
    code, _, err = safer("fit", "--reward", model, "--pairs", rows, "--out", tmp_path / "out", "--until", "nothing")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = safer("fit", "--reward", tmp_path / "none", "--pairs", rows, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "hub:OWNER/NAME" in err
    assert not (tmp_path / "out").exists()


def test_a_fresh_fit_deletes_nothing_that_it_reads(model, tmp_path, small):
    out = tmp_path / "out"
    out.mkdir()
    rows = write_rows(out / "pairs.jsonl", 60)
    inside = shutil.copytree(model, out / "model")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for _ in range(2):
        fitted(config_of(inside, rows, out, *small), until="pairs", fresh=True)
    assert all(path.read_bytes() == held for path, held in before.items())
