"""Configs are checked before anything is computed, and cost nothing to read."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from safer_ray.config.read import load_config
from safer_ray.config.sections import (
    CurateConfig,
    JudgeConfig,
    RayConfig,
    RewardConfig,
    RunConfig,
    SaeConfig,
    TinyLlamaConfig,
)
from safer_ray.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SOURCE = {"sources": [{"path": "pairs.jsonl"}]}
LEAST = {"name": "run", "pairs": SOURCE, "evaluation": SOURCE}


@pytest.fixture
def write(tmp_path):
    def write(**more):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(LEAST | more), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).name == yaml.safe_load(path.read_text(encoding="utf-8"))["name"]


def test_there_are_shipped_configs():
    assert "demo.yaml" in [path.name for path in CONFIGS]


def test_the_least_config_has_defaults_for_every_stage(write):
    config = load_config(write())
    assert config.salience.mode == "response"
    assert config.select.limit == 32
    assert config.contexts.candidates == config.select.candidates == 256


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rewards": {}}, "rewards: unknown key; check the spelling"),
        ({"sae": {"latent": 8}}, "sae.latent: unknown key"),
        ({"sae": {"latents": 8, "k": 9}}, "k 9 is larger than the 8 latents; lower k"),
        ({"sae": {"k": 0}}, r"sae.k: .*greater than 0 \(got 0\)"),
        ({"sae": {"variant": {"kind": "jumprelu", "bandwidth": float("inf")}}}, "bandwidth: .*finite number"),
        ({"activations": {"layer": 5}}, r"activations.layer 5 lies past the model's 4 layers; choose 1\.\.4"),
        ({"activations": {"layer": 0}}, "activations.layer"),
        ({"reward": {"base": {"hidden": 30, "heads": 4}}}, "hidden 30 must be an even multiple of heads 4"),
        ({"reward": {"base": {"hidden": 12, "heads": 4}}}, "hidden 12 must be an even multiple of heads 4"),
        ({"reward": {"batch_size": 32, "micro_batch_size": 5}}, "batch_size 32 must be a multiple"),
        ({"noise": {"swap_percent": 101}}, r"noise.swap_percent: .*less than or equal to 100 \(got 101\)"),
        ({"noise": {"where": "section = x"}}, "cannot read the condition"),
        ({"curate": {"a": {"strategy": "safer", "action": "drop", "percent": -1}}}, r"curate.a.percent.*\(got -1\)"),
        ({"curate": {"a": {"strategy": "best", "action": "drop", "percent": 1}}}, r"strategy.*\(got 'best'\)"),
        (
            {"curate": {"a": {"strategy": "safer", "action": "poison", "percent": 1}}},
            "poison .* needs `red_team: true`",
        ),
        ({"curate": {"clean": {"strategy": "safer", "action": "drop", "percent": 1}}}, "'clean' names the model"),
        ({"evaluate": {"base": "other"}}, "evaluate.base 'other' is neither"),
        ({"judge": {"thresholds": [0.1, 0.05, 0.2, 0.3]}}, "must rise"),
        ({"judge": {"exchanges": "corpus:probe.yaml"}}, "'corpus:probe.yaml' needs a `corpus` section"),
        ({"pairs": {"sources": [{"path": "corpus:train.jsonl"}]}}, "'corpus:train.jsonl' needs a `corpus` section"),
        ({"pairs": {"sources": []}}, "pairs.sources"),
        ({"name": "../escape"}, "name: "),
        ({"reward": {"dtype": "float16"}}, r"reward.dtype: .*'float32' or 'bfloat16' \(got 'float16'\)"),
        ({"ray": {"actors": 3}}, "ray.actors: unknown key"),
        ({"ray": {"min_actors": 0}}, r"ray.min_actors: .*greater than 0 \(got 0\)"),
        ({"ray": {"min_actors": 4, "max_actors": 3}}, "ray: min_actors 4 is larger than max_actors 3"),
        ({"ray": {"min_actors": 3}}, "ray: min_actors 3 is larger than max_actors 2"),
        ({"ray": {"actor_cpus": 0}}, r"ray.actor_cpus: .*greater than 0 \(got 0\)"),
        ({"ray": {"worker_gpus": -1}}, "ray.worker_gpus: "),
        ({"ray": {"worker_gpus": 0.5}}, "worker_gpus 0.5 for 2 train_workers: NCCL refuses two workers on one GPU"),
        ({"ray": {"deepspeed": {"stage": 4}}}, r"ray.deepspeed.stage: .*\(got 4\)"),
        (
            {"ray": {"deepspeed": {"stage": 2, "offload_parameters": True}}},
            "ray: offload_parameters needs deepspeed.stage 3, got 2",
        ),
    ],
)
def test_values_that_cannot_work_are_named(write, more, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(**more))
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_further_problems_are_counted(write):
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        load_config(write(first=1, second=2))


def test_assignments_lie_over_the_file(write):
    path = write(sae={"latents": 64})
    config = load_config(path, ["sae.k=4", "reward.base.layers=6", "salience.mode=paper", "corpus={seed: 3}"])
    assert config.sae == SaeConfig(latents=64, k=4)
    assert config.reward.base == TinyLlamaConfig(layers=6)
    assert config.salience.mode == "paper"
    assert config.corpus is not None
    assert config.corpus.seed == 3


def test_the_width_of_a_cluster_is_set_like_any_other_value(write):
    config = load_config(write(), ["ray.max_actors=8", "ray.deepspeed.stage=3", "ray.deepspeed.offload_parameters=on"])
    assert (config.ray.min_actors, config.ray.max_actors) == (1, 8)
    assert config.ray.deepspeed.offload_parameters
    assert load_config(write()).ray == RayConfig()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sae.k", "write it as key=value"),
        ("sae.kk=3", "sae.kk: unknown key"),
        ("name.deep=3", "'name' is a value, not a section"),
        ("sae.k=[1", "not readable YAML"),
    ],
)
def test_bad_assignments_are_explained(write, assignment, message):
    with pytest.raises(UserError, match=message):
        load_config(write(), [assignment])


def test_red_teaming_allows_every_poison_variant(write):
    variants = {
        "a": {"strategy": "safer", "action": "poison", "percent": 1},
        "b": {"strategy": "safer", "action": "drop", "percent": 1},
    }
    config = load_config(write(curate=variants), red_team=True)
    assert config.curate["a"].red_team
    assert not config.curate["b"].red_team


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a list\n", "a config is a mapping"), ("a: [1\n", "not readable YAML"), ("", "a config is a mapping")],
)
def test_files_that_are_no_config_are_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_missing_config_says_where_the_shipped_ones_are(tmp_path):
    with pytest.raises(UserError, match=r"no config at .*none.yaml; give a file, or one of demo, "):
        load_config(tmp_path / "none.yaml")


def test_configs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        SaeConfig().k = 3


def test_defaults_are_valid():
    for made in (RewardConfig(), SaeConfig(), JudgeConfig(), TinyLlamaConfig(), RayConfig()):
        assert type(made).model_validate(made.model_dump()) == made
    assert CurateConfig(strategy="safer", action="poison", percent=5, red_team=True).red_team
    assert RunConfig.model_validate(LEAST).curate == {}


def test_reading_configs_and_help_needs_no_heavy_library():
    code = (
        "import sys, safer_ray.config.sections, safer_ray.cli.app\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'pandas', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
