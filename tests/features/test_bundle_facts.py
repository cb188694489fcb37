"""What `safer-ray show` tells of a bundle: all that it must, in a screen, of new ones and of old."""

import json
import shutil

import pytest
from support.finished_models import finished_model, run_of

from safer_ray.cli.shared import console
from safer_ray.errors import UserError
from safer_ray.features.bundle import best_detector
from safer_ray.features.bundle_facts import bundle_facts, expected_flags, in_lines
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import open_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finished_model(tmp_path_factory.mktemp("facts") / "model")


@pytest.fixture(scope="module")
def made(model):
    config = run_of(model.parent / "run", model, pairs=240, reward={"validation_percent": 50})
    return run(config, LocalRunner(), until="auditor").artifacts


@pytest.fixture
def bundle(made):
    return made["auditor"].path


@pytest.fixture
def old(bundle, tmp_path):
    """A bundle of before these facts were recorded."""
    folder = shutil.copytree(bundle, tmp_path / bundle.name)
    for file in (folder / "manifest.json", folder / "reward/manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["metrics"] = {"format": manifest["metrics"].get("format")}
        file.write_text(json.dumps(manifest))
    return folder


def test_the_object_has_what_whoever_gets_a_bundle_asks(safer, bundle, made, model):
    code, out, err = safer("show", bundle, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts == bundle_facts(bundle)
    files = made["reward"].metrics["files"]
    wanted = {
        "named": str(model),
        "blocks": 3,
        "hidden": 48,
        "weights": files,
        "held_by": "copy",
        "trained_here": False,
    }
    assert wanted.items() <= facts["model"].items()
    assert facts["reading"] == {"template": "chat", "max_length": 2048, "sentence_ends": "every_script"}
    assert facts["sae"] == {"layer": 2, "architecture": "topk", "latents": 64, "k": 4}
    assert facts["features"] == {
        name: json.loads((bundle / "features.json").read_text())[name] for name in ("mode", "safe", "unsafe")
    }
    assert facts["reference"]["kind"] == "held out"
    low, high = facts["reference"]["flags"]["safer"]
    assert low < 0.05 < high
    assert facts["data"][0]["pairs"] == 240
    assert facts["data"][0]["licence"] == "MIT"
    assert facts["licences"] == ["MIT"]
    assert set(facts["packages"]) >= {"safer_ray", "torch"}
    assert facts["detectors"] == ["safer", "reward_margin"]
    assert facts["flags_by"] == best_detector(open_artifact(bundle, "auditor"))
    assert set(facts["made_from"]) >= {"reward", "sae", "codes", "features"}


def test_it_fits_a_narrow_screen(safer, bundle, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    code, out, _ = safer("show", bundle)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) <= 60
    for words in ("3 blocks of 48", "held out", "template chat", "flags", "MIT"):
        assert words in out


@pytest.mark.parametrize("what", ["reward", "nothing", "file", "empty"])
def test_what_is_no_bundle_is_told_in_a_line(what, safer, made, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    path = made["reward"].path if what == "reward" else tmp_path / what
    code, _, err = safer("show", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is no auditor bundle; pass the folder of stage `auditor`" in err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stage": "auditor"}', '{"stage": "auditor", "metrics": 3}'])
def test_a_damaged_manifest_is_told_in_a_line(text, safer, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "manifest.json").write_text(text)
    code, _, err = safer("show", folder)
    assert (code, err.count("\n")) == (2, 1), err


@pytest.mark.parametrize("gone", ["safer_ray.json", "config.json", "manifest.json"])
def test_a_bundle_without_one_of_its_files_is_still_shown(gone, safer, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "reward" / gone).unlink()
    code, out, err = safer("show", folder)
    assert (code, err) == (0, "")
    assert "bundle" in out


def test_an_old_bundle_says_what_it_does_not_know(safer, old):
    code, out, err = safer("show", old)
    assert (code, err) == (0, "")
    assert "not recorded" in out
    code, out, _ = safer("show", old, "--json")
    assert json.loads(out)["reference"]["flags"] == {}
    assert expected_flags(open_artifact(old), "safer", 0.05, 9) == {
        "kind": "not recorded",
        "pairs": 9,
        "low": None,
        "high": None,
    }


def test_a_bundle_of_a_model_that_was_trained_here_says_so(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "reward/manifest.json").read_text())
    del manifest["metrics"]["use"]
    (folder / "reward/manifest.json").write_text(json.dumps(manifest))
    assert bundle_facts(folder)["model"]["trained_here"]
    assert "trained here" in dict(in_lines(bundle_facts(folder)))["model"]


def test_a_bundle_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="is no auditor bundle"):
        bundle_facts(tmp_path / "nowhere")
