"""A finished model in a run: it is read as its makers read it, named by what it holds, and refused before any work."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.finished_models import LAYERS, altered, finished_model, run_of, write_rows

from safer_ray.cli.stages import reward
from safer_ray.config.read import load_config
from safer_ray.config.sections import RewardConfig, RunConfig
from safer_ray.data.curation import USED
from safer_ray.errors import UserError
from safer_ray.pipeline import crossfit, model_stages
from safer_ray.pipeline.finished_model import settled
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.storage.artifacts import Place, read_parts

KINDS = {"Llama 3": "score.weight", "BERT": "classifier.weight"}  # with the name of its head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, folder):
    return finished_model(folder / kind.replace(" ", ""), kind)


@pytest.fixture(scope="module")
def llama(folder):
    return finished_model(folder / "model")


@pytest.fixture(scope="module")
def whole(llama, folder):
    """A run to the end, its config without an evaluation."""
    return run(run_of(folder / "whole", llama), LocalRunner())


def reward_of(config):
    return run(config, LocalRunner(), until="reward").artifacts["reward"]


def own_rewards(folder, kind, rows):
    """Rewards of the responses by plain transformers, one text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            if kind == "BERT":
                given = tokenizer(row["prompt"][0]["content"], row[side][0]["content"], return_tensors="pt")
            else:
                text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
                given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                found.append(float(model(**given).logits[0, 0]))
    return np.array(found).reshape(-1, 2)


def test_rewards_in_codes_are_those_of_plain_transformers(kind, model, folder):
    made = run(run_of(folder / f"rewards-{model.name}", model, pairs=30), LocalRunner(), until="codes").artifacts
    pairs, codes = read_parts(made["pairs"].path).to_pylist(), read_parts(made["codes"].path)
    assert codes["pair_id"].to_pylist() == [pair["pair_id"] for pair in pairs]
    ours = np.stack([codes[f"{side}_reward"].to_numpy() for side in ("chosen", "rejected")], axis=1)
    np.testing.assert_allclose(ours, own_rewards(model, kind, pairs), rtol=1e-5, atol=1e-5)
    reading = json.loads((made["reward"].path / "safer_ray.json").read_text())
    assert reading["template"] == {"Llama 3": "chat", "BERT": "pair"}[kind]
    assert made["codes"].metrics["reading"] == reading


def test_a_finished_model_is_named_by_what_it_holds(llama, tmp_path):
    first = reward_of(run_of(tmp_path / "a", llama))
    copied = shutil.copytree(llama, tmp_path / "elsewhere")
    assert reward_of(run_of(tmp_path / "b", copied)).name == first.name
    altered(copied, "score.weight", lambda head: -head)
    assert reward_of(run_of(tmp_path / "c", copied)).name != first.name
    shorter = run_of(tmp_path / "d", llama, reward={"max_length": 64})
    assert reward_of(shorter).name != first.name
    assert first.metrics["use"] == str(llama)
    assert first.metrics["read_as_it_is"]
    assert list(first.metrics["files"]) == ["model.safetensors"]


def test_the_weights_of_a_local_model_are_links_to_it(llama, tmp_path):
    made = reward_of(run_of(tmp_path, llama))
    assert (made.path / "model.safetensors").readlink() == llama / "model.safetensors"
    assert not (made.path / "config.json").is_symlink()


def test_links_follow_a_model_that_was_moved(llama, tmp_path):
    first = shutil.copytree(llama, tmp_path / "first")
    made = reward_of(run_of(tmp_path / "run", first))
    first.rename(tmp_path / "second")
    with pytest.raises(UserError, match=r"no model in .*first"):
        reward_of(run_of(tmp_path / "run", first))
    again = reward_of(run_of(tmp_path / "run", tmp_path / "second"))
    assert again.name == made.name
    assert (made.path / "model.safetensors").readlink() == tmp_path / "second/model.safetensors"


def test_links_leave_a_place_where_another_model_lies_now(llama, tmp_path):
    first = shutil.copytree(llama, tmp_path / "first")
    second = shutil.copytree(llama, tmp_path / "second")
    made = reward_of(run_of(tmp_path / "run", first))
    altered(first, "score.weight", lambda head: -head)
    again = reward_of(run_of(tmp_path / "run", second))
    assert again.name == made.name
    assert (made.path / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_weights_in_folders_of_their_own_are_written_out(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "below").mkdir()
    (model / "model.safetensors").rename(model / "below/all.safetensors")
    names = dict.fromkeys(load_file(model / "below/all.safetensors"), "below/all.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    made = run(run_of(tmp_path / "run", model), LocalRunner(), until="activations").artifacts["reward"]
    assert not made.metrics["read_as_it_is"]
    assert not (made.path / "model.safetensors").is_symlink()
    ours, theirs = load_file(made.path / "model.safetensors"), load_file(llama / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_pickled_weights_are_written_out_as_safetensors(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bin_weights"):
        reward_of(run_of(tmp_path / "no", model))
    made = reward_of(run_of(tmp_path / "yes", model, reward={"bin_weights": True}))
    assert not made.metrics["read_as_it_is"]
    ours, theirs = load_file(made.path / "model.safetensors"), load_file(llama / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# What is refused


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"reward": {"base": "/x"}}, "use names a finished model, base one that is trained on; keep one"),
        ({"reward": {"blocks": 1}}, "blocks cuts a base that is trained on; a finished model is read whole"),
    ],
)
def test_what_does_not_go_with_a_finished_model_is_refused(more, told, llama, tmp_path):
    with pytest.raises(ValueError, match=told):
        run_of(tmp_path, llama, **more)


def refused(config, tmp_path, capsys=None):
    """What a run is refused with, of which nothing was made."""
    with pytest.raises(UserError) as caught:
        run(config, LocalRunner(), until="activations")
    assert "\n" not in str(caught.value)
    made = list((tmp_path / "runs").glob("*/activations-*/manifest.json"))
    assert made == []
    return str(caught.value)


def test_the_combined_detector_says_why_it_is_not_fitted(llama, tmp_path):
    config = run_of(tmp_path, llama, scores={"detector": "combined"}, cross_fit={"folds": 2})
    told = refused(config, tmp_path)
    assert "combined is fitted on margins of heads that are trained here" in told
    assert f"base: {llama}, frozen_layers: N, new_head: true" in told


def test_a_missing_folder_is_told_with_the_other_forms(tmp_path):
    told = refused(run_of(tmp_path, tmp_path / "nowhere"), tmp_path)
    assert "nowhere" in told
    assert "hub:OWNER/NAME" in told


def test_a_layer_past_the_model_is_refused_before_the_pairs_are_read(llama, tmp_path):
    told = refused(run_of(tmp_path, llama, activations={"layer": LAYERS + 1}), tmp_path)
    assert told == f"activations.layer 4 lies past the 3 layers of {llama}; choose 1..3"
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_head_is_no_reward_model(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "score.weight" in refused(run_of(tmp_path, model), tmp_path)


def with_nan(head):
    head[0, 0] = float("nan")
    return head


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_nan, "model: its reward of a short pair is not finite; copy the model again"),
        (lambda head: head * float("nan"), "score.weight is NaN or infinite all over; copy the model again"),
    ],
)
def test_a_model_whose_reward_is_not_finite_is_refused(change, told, llama, tmp_path):
    model = altered(shutil.copytree(llama, tmp_path / "model"), "score.weight", change)
    assert told in refused(run_of(tmp_path, model), tmp_path)


def test_several_outputs_are_chosen_from_or_refused(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    altered(model, "score.weight", lambda head: torch.cat([head, -head]))
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "num_labels": 2}
    (model / "config.json").write_text(json.dumps(config))
    assert "it has 2 outputs, and a reward is one" in refused(run_of(tmp_path / "no", model), tmp_path / "no")
    chosen = run_of(tmp_path / "yes", model, pairs=30, reward={"head": {"output": 1}})
    plain = run_of(tmp_path / "plain", llama, pairs=30)
    of = [read_parts(run(c, LocalRunner(), until="codes").artifacts["codes"].path) for c in (chosen, plain)]
    np.testing.assert_allclose(of[0]["chosen_reward"].to_numpy(), -of[1]["chosen_reward"].to_numpy(), rtol=1e-5)


# Heads on its blocks


@pytest.fixture(scope="module")
def folds(kind, model, folder):
    config = settled(run_of(folder / f"folds-{model.name}", model, cross_fit={"folds": 2}, reward={"max_length": 80}))
    ctx = StageContext.of(Place(folder / f"folds-{model.name}/runs"), LocalRunner(), config)
    pairs = model_stages.pairs(ctx, config.pairs)
    return crossfit.cross_fit(ctx, config, pairs), reward_of(
        run_of(folder / f"of-{model.name}", model, reward={"max_length": 80})
    )


def test_the_model_of_a_fold_is_the_used_one_but_for_its_head(kind, folds, model):
    fitted, _ = folds
    used = load_file(model / "model.safetensors")
    trunk = [name for name in used if "layer" in name or "embed" in name]
    assert len(trunk) > 20
    for fold in fitted.folds:
        own = load_file(fold.reward.path / "model.safetensors")
        assert set(own) == set(used)
        assert all(torch.equal(own[name], used[name]) for name in trunk)
        assert not torch.equal(own[KINDS[kind]], used[KINDS[kind]])
    one, other = (load_file(fold.reward.path / "model.safetensors")[KINDS[kind]] for fold in fitted.folds)
    assert not torch.equal(one, other)
    assert fitted.shared_sae


def test_the_model_of_a_fold_reads_as_the_used_one(folds):
    fitted, reward = folds
    wanted = load_pair_tokenizer(reward.path)
    for fold in fitted.folds:
        own = load_pair_tokenizer(fold.reward.path)
        assert (own.template, own.limit, own.arguments, own.fold) == (
            wanted.template,
            wanted.limit,
            wanted.arguments,
            wanted.fold,
        )
        assert own.limit == 80


def test_heads_read_no_further_than_the_model_itself(reward_dir, tmp_path):
    """One that was trained here says how far: to 96 tokens, of the 128 that it has positions for."""
    config = settled(run_of(tmp_path, reward_dir, pairs=20)).reward
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner())
    pairs = model_stages.pairs(ctx, run_of(tmp_path, reward_dir, pairs=20).pairs)
    made = model_stages.reward(ctx, config, pairs)
    assert load_pair_tokenizer(made.path).limit == load_pair_tokenizer(reward_dir).limit == 96


def test_heads_are_new_by_the_seed(llama):
    from safer_ray.reward.checkpoints import new_reward_model

    def head(seed):
        config = RewardConfig(use=str(llama), seed=seed)
        config = config.model_copy(update={"base": str(llama), "new_head": True})
        return new_reward_model(config, lambda: ()).model.score.weight.detach()

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    assert float(head(0).abs().max()) < 0.2
    assert not torch.equal(head(0), load_file(llama / "model.safetensors")["score.weight"])


def test_curating_compares_heads_with_a_head(llama, tmp_path):
    rows = [{"path": str(write_rows(tmp_path / "held.jsonl", 20, 100))}]
    curate = {"drop": {"strategy": "reward_margin", "action": "drop", "percent": 10}}
    made = run(run_of(tmp_path, llama, evaluation={"sources": rows}, curate=curate), LocalRunner())
    assert list(made.models) == [USED, "clean", "drop"]
    assert list(made.evaluations) == [USED, "clean", "drop"]
    assert made.models["clean"].manifest["inputs"]["pairs"] == made.artifacts["pairs"].name
    own, head = (load_file(made.models[name].path / "model.safetensors") for name in (USED, "clean"))
    assert torch.equal(own["model.layers.2.mlp.up_proj.weight"], head["model.layers.2.mlp.up_proj.weight"])
    summary = json.loads((made.directory / "summary.json").read_text())
    assert set(summary["sections"]) == {USED, "clean", "drop"}
    assert set(summary["tests"]) == {"used vs clean", "drop vs clean"}
    page = (made.directory / "report.html").read_text()
    assert USED in page


@pytest.mark.parametrize("name", ["clean", "used"])
def test_a_variant_does_not_take_the_name_of_a_model(name, llama, tmp_path):
    with pytest.raises(ValueError, match=f"curate: '{name}' names the model .*choose another name"):
        run_of(tmp_path, llama, curate={name: {"strategy": "random", "action": "drop", "percent": 5}})


def test_out_of_fold_scores_flag_their_quantile(llama, tmp_path):
    config = run_of(tmp_path, llama, pairs=100, cross_fit={"folds": 2}, scores={"detector": "reward_margin"})
    scores = read_parts(run(config, LocalRunner(), until="scores").artifacts["scores"].path)
    assert scores["flag"].to_pylist().count(True) == 5
    assert set(scores.filter(scores["flag"])["decision"].to_pylist()) == {"review"}


# Whole runs


def test_a_run_without_an_evaluation_ends_with_a_report(whole):
    summary = json.loads((whole.directory / "summary.json").read_text())
    assert summary["sections"] == summary["tests"] == {}
    assert 0 <= summary["reward"]["agreement"] <= 1
    page = (whole.directory / "report.html").read_text()
    assert "Llama" in page or str(whole.config.reward.use) in page
    assert list(whole.evaluations) == []


def test_a_plan_loads_no_weights_and_makes_nothing(llama, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("safer_ray.reward.pretrained.open_classifier", never)
    monkeypatch.setattr("safer_ray.reward.checkpoints.open_classifier", never)
    monkeypatch.setattr("safer_ray.reward.finished._fetched", never)
    seen = {}
    config = run_of(
        tmp_path, llama, cross_fit={"folds": 2}, curate={"d": {"strategy": "safer", "action": "drop", "percent": 5}}
    )
    run(config, LocalRunner(), dry=True, on_stage=seen.__setitem__)
    assert set(seen.values()) == {None}
    assert {name.partition("-")[0] for name in seen} >= {"reward", "auditor", "cross_fit", "curate"}
    assert not (tmp_path / "runs").exists()


def test_the_same_run_again_makes_nothing(whole, folder, llama):
    seen = {}
    stamp = {path: os.stat(path).st_mtime_ns for path in whole.directory.rglob("manifest.json")}
    run(run_of(folder / "whole", llama), LocalRunner(), on_stage=seen.__setitem__)
    assert None not in seen.values()
    assert stamp == {path: os.stat(path).st_mtime_ns for path in whole.directory.rglob("manifest.json")}


def test_a_config_file_may_name_a_finished_model(llama, tmp_path):
    tree = run_of(tmp_path, llama).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    assert isinstance(load_config(tmp_path / "run.yaml", []), RunConfig)
    with pytest.raises(UserError, match="a finished model is not trained"):
        reward(pairs=tmp_path, out=tmp_path / "out", config=tmp_path / "run.yaml")
