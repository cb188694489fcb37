"""In what a model computes is a matter of codes and of the bundle made of them; recipes of float32 do not say it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_run import tiny_config

from safer_ray.audit.score import AuditPairs
from safer_ray.config.reading import Reading
from safer_ray.config.sections import RayConfig, ScoresConfig
from safer_ray.errors import UserError
from safer_ray.features.bundle_facts import bundle_facts, in_lines
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.storage.artifacts import MANIFEST, Artifact, Place, open_artifact

HALF = Reading(inference_dtype="bfloat16")


def context(folder, reading=HALF, **place):
    return StageContext(Place(folder, **place), LocalRunner(), reading=reading)


@pytest.fixture
def inputs(tmp_path, reward_dir, sae_dir, pairs_dir):
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "response"}')
    return [Artifact(path, path.stem) for path in (reward_dir, sae_dir, tmp_path / "features.json", pairs_dir)]


def bundled(tmp_path, inputs, codes_by=HALF, auditor_by=None):
    reward, sae, chosen, pairs = inputs
    codes = model_stages.codes(context(tmp_path / "runs", codes_by), pairs, reward, sae)
    return codes, feature_stages.auditor(
        context(tmp_path / "runs", auditor_by or Reading()), reward, sae, chosen, codes
    ).path


@pytest.mark.parametrize("reading", [Reading(), HALF])
def test_a_bundle_computes_as_its_codes_were(tmp_path, inputs, reading):
    dtype = "bfloat16" if reading is HALF else "float32"
    codes, bundle = bundled(tmp_path, inputs, reading)
    assert codes.metrics["dtype"] == dtype
    assert codes.manifest["config"].get("reading") == (reading.asked() or None)
    auditor = open_artifact(bundle, "auditor")
    assert auditor.metrics["dtype"] == dtype
    facts = bundle_facts(bundle)
    assert facts["model"]["dtype"] == dtype
    assert ("weights", f"copy, computes in {dtype}") in in_lines(facts)
    assert AuditPairs(auditor, ScoresConfig()).reward.model.dtype == getattr(torch, dtype)
    made = load_reward_model(bundle / "reward", dtype=torch.float32)
    assert torch.equal(made.head().weight, load_reward_model(inputs[0].path).head().weight)


def test_a_bundle_made_before_there_was_a_choice_computes_in_float32(tmp_path, inputs):
    _, bundle = bundled(tmp_path, inputs)
    said = json.loads((bundle / MANIFEST).read_text())
    assert said["metrics"].pop("dtype") == "bfloat16"
    (bundle / MANIFEST).write_text(json.dumps(said))
    assert load_reward_model(bundle / "reward").model.dtype == torch.float32
    assert bundle_facts(bundle)["model"]["dtype"] == "float32"


def test_a_bundle_does_not_change_its_dtype(tmp_path, inputs):
    _, bundle = bundled(tmp_path, inputs)
    with pytest.raises(UserError, match="with inference_dtype 'bfloat16', not 'float32'; leave it out"):
        load_reward_model(bundle / "reward", reading=Reading(inference_dtype="float32"))


def test_a_bundle_is_not_asked_to_compute_otherwise_than_its_codes(tmp_path, inputs):
    with pytest.raises(UserError, match="holds codes that were computed in float32, and a bundle computes as its"):
        bundled(tmp_path, inputs, Reading(), HALF)


def test_float32_is_recorded_as_before_there_was_a_choice(tmp_path, inputs):
    reward, sae, _, pairs = inputs
    names = [
        model_stages.codes(context(tmp_path, reading, dry=True), pairs, reward, sae).name
        for reading in (Reading(), Reading(inference_dtype="float32"), HALF)
    ]
    assert names[0] == names[1] != names[2]


def test_all_that_runs_a_model_in_another_dtype_has_another_name_and_the_model_has_not(tmp_path):
    before, after = (
        {
            role: made.name
            for role, made in run(tiny_config(tmp_path, *given), LocalRunner(), dry=True).artifacts.items()
        }
        for given in ((), ("reward.inference_dtype=bfloat16",))
    )
    kept = {role for role in before if before[role] == after[role]}
    assert kept == {"corpus", "pairs", "noise", "training_pairs", "evaluation_pairs", "reward"}


def test_a_run_in_bfloat16_makes_a_bundle_and_scores_in_it(tmp_path):
    made = run(tiny_config(tmp_path, "reward.inference_dtype=bfloat16"), LocalRunner(), until="scores").artifacts
    assert {made[role].metrics["dtype"] for role in ("activations", "codes", "auditor")} == {"bfloat16"}
    assert made["scores"].manifest["rows"]["written"] > 300


def test_evaluations_say_their_dtype(tmp_path, inputs):
    reward, _, _, pairs = inputs
    assert model_stages.evaluate(context(tmp_path / "runs"), reward, pairs).metrics["dtype"] == "bfloat16"


def test_auto_goes_by_what_runs_the_model_and_not_by_the_process_that_asks(tmp_path, inputs, monkeypatch):
    reward, sae, _, pairs = inputs
    weights = {name: weight.half() for name, weight in load_file(reward.path / "model.safetensors").items()}
    halved = Artifact(shutil.copytree(reward.path, tmp_path / "halved"), "halved")
    save_file(weights, halved.path / "model.safetensors", {"format": "pt"})
    ctx = context(tmp_path / "runs", Reading())
    assert ctx.reading_of(halved).inference_dtype == "float32"
    monkeypatch.setattr(LocalRunner, "on_gpu", lambda self: True)
    assert ctx.reading_of(reward).inference_dtype == "float32"
    assert ctx.reading_of(halved) == HALF
    codes = model_stages.codes(ctx, pairs, halved, sae)  # whatever a process has that loads it
    assert codes.metrics["dtype"] == "bfloat16"
    assert codes.manifest["config"]["reading"] == {"inference_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("asked", "on_gpu"),
    [
        ({}, False),
        ({"actor_gpus": 0.5}, True),
        ({"actor_gpus": 1, "shard_pools": [{"actor_gpus": 1}, {"actor_gpus": 0}]}, False),
    ],
)
def test_on_a_cluster_its_actors_decide(asked, on_gpu):
    from safer_ray.distributed.ray_runner import RayRunner

    assert RayRunner(RayConfig.model_validate(asked)).on_gpu() is on_gpu
