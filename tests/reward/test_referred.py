"""Bundles that name the weights of their reward model by hash, and find them."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from support.finished_models import altered, finished_model, run_of, write_rows

from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.referred import ELSEWHERE, REFERENCE, reward_folder
from safer_ray.storage.artifacts import open_artifact, read_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finished_model(tmp_path_factory.mktemp("referred") / "model")


@pytest.fixture(scope="module")
def bundles(model):
    """The same bundle twice: with its weights, and with their names."""
    made = {}
    for weights in ("copy", "reference"):
        config = run_of(model.parent / "run", model, auditor={"weights": weights})
        made[weights] = run(config, LocalRunner(), until="auditor").artifacts["auditor"].path
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def named(bundles, model, tmp_path):
    """A bundle that names a model which may be damaged."""
    shutil.copytree(model, tmp_path / "model")
    folder = shutil.copytree(bundles["reference"], tmp_path / bundles["reference"].name)
    tree = json.loads((folder / "reward" / REFERENCE).read_text())
    (folder / "reward" / REFERENCE).write_text(json.dumps(tree | {"model": str(tmp_path / "model")}))
    return folder


def audited(bundle, pairs, out):
    audit = Audit(open_artifact(bundle, "auditor"), SourceConfig(path=str(pairs)), ScoresConfig(detector="safer"))
    audit_corpus(audit, out, LocalRunner())
    return read_parts(out / "scores")


def test_both_give_the_same_rows(bundles, tmp_path):
    assert not list(bundles["reference"].rglob("reward/*.safetensors"))
    pairs = write_rows(tmp_path / "new.jsonl", 5, 500)
    rows = [audited(bundle, pairs, tmp_path / name) for name, bundle in bundles.items()]
    assert rows[0].to_pylist() == rows[1].to_pylist()


def test_the_weights_are_those_of_the_model(named, model):
    here = load_file(model / "model.safetensors")
    found = load_file(reward_folder(named) / "model.safetensors")
    assert here.keys() == found.keys()
    assert all(here[name].equal(found[name]) for name in here)
    assert reward_folder(named) == reward_folder(named)


def test_other_weights_are_refused_also_when_they_come_later(named, tmp_path):
    reward_folder(named)
    altered(tmp_path / "model", "score.weight", lambda tensor: tensor + 1)
    with pytest.raises(UserError, match=r"is not the model.safetensors that the bundle was made with .*_MODEL"):
        reward_folder(named)


def test_a_model_that_was_moved_is_found_where_it_is_said_to_lie(named, tmp_path, monkeypatch):
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"does not hold it: .* or set {ELSEWHERE} to where it lies now"):
        reward_folder(named)
    monkeypatch.setenv(ELSEWHERE, str(tmp_path / "elsewhere"))
    assert (reward_folder(named) / "model.safetensors").is_file()


def test_a_file_that_is_gone_is_named(named, tmp_path):
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model.safetensors in .*put the model back"):
        reward_folder(named)


HOSTILE = {
    "no JSON": "{",
    "a list": "[]",
    "no files": '{"model": "x", "files": {}}',
    "above": '{"model": "x", "files": {"../x.safetensors": {"sha256": "0"}}}',
    "absolute": '{"model": "x", "files": {"/etc/x.safetensors": {"sha256": "0"}}}',
    "other": '{"model": "x", "files": {"run.py": {"sha256": "0"}}}',
    "no hash": '{"model": "x", "files": {"model.safetensors": {}}}',
    "no name": '{"model": 3, "files": {"model.safetensors": {"sha256": "0"}}}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_names_no_weights_is_refused_in_a_line(named, cache, text):
    (named / "reward" / REFERENCE).write_text(text)
    with pytest.raises(UserError) as caught:
        reward_folder(named)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_model_that_was_trained_here_has_to_be_held(tmp_path, model):
    config = run_of(tmp_path / "run", model, auditor={"weights": "reference"})
    trained = config.model_copy(update={"reward": config.reward.model_copy(update={"use": None, "base": str(model)})})
    with pytest.raises(UserError, match=r"auditor.weights: reference is for a finished model"):
        run(trained, LocalRunner(), until="auditor")
