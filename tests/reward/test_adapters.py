"""Adapters of peft are merged on loading: rewards are those of peft's own model, and a bundle wants no base."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import save_adapter
from support.made import make_pairs
from transformers import AutoModelForSequenceClassification

from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.inputs import base_input
from safer_ray.pipeline.roles import open_as
from safer_ray.reward.checkpoints import layer_count, load_pair_tokenizer, load_reward_model, new_reward_model
from safer_ray.reward.forward import forward
from safer_ray.reward.text import both_sides
from safer_ray.storage.work import Part

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewards_of(reward, n=3):
    sides = [side.ids for side in both_sides(reward.pairs(make_pairs(n).to_pylist()))]
    return sides, np.asarray(forward(reward, sides).rewards)


@torch.inference_mode()
def own_rewards(model, sequences):
    return np.array([float(model(input_ids=torch.from_numpy(ids)[None].long()).logits[0, 0]) for ids in sequences])


@pytest.fixture
def base(reward_dir, tmp_path):
    return shutil.copytree(reward_dir, tmp_path / "base")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["score", "q_proj"], "modules_to_save": ["embed_tokens"]},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"layers_to_transform": [1]},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_rewards_are_those_of_pefts_own_model(base, tmp_path, values):
    peft_model = save_adapter(base, tmp_path / "adapter", **values)
    found = load_reward_model(tmp_path / "adapter")
    sides, rewards = rewards_of(found)
    np.testing.assert_allclose(rewards, own_rewards(peft_model, sides), atol=1e-4)
    assert np.abs(rewards - rewards_of(load_reward_model(base))[1]).max() > 1e-2
    assert not [name for name, _ in found.model.named_parameters() if "lora" in name or "base_layer" in name]


def test_other_kinds_that_can_be_merged_are(base, tmp_path):
    from peft import IA3Config

    values = {"kind": IA3Config, "target_modules": ["k_proj"], "feedforward_modules": []}
    peft_model = save_adapter(base, tmp_path / "adapter", **values)
    sides, rewards = rewards_of(load_reward_model(tmp_path / "adapter"))
    np.testing.assert_allclose(rewards, own_rewards(peft_model, sides), atol=1e-4)


def test_a_language_model_gets_the_head_of_its_adapter(base, tmp_path):
    """And so does training from it, which else begins with a new head."""
    edit(base / "config.json", architectures=["LlamaForCausalLM"])
    weights = load_file(base / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "score.weight"}, base / "model.safetensors", {"format": "pt"})
    peft_model = save_adapter(base, tmp_path / "adapter")
    sides, rewards = rewards_of(load_reward_model(tmp_path / "adapter"))
    np.testing.assert_allclose(rewards, own_rewards(peft_model, sides), atol=1e-4)
    trained = new_reward_model(RewardConfig(base=str(tmp_path / "adapter"), max_length=96, blocks=2), list)
    saved = load_file(tmp_path / "adapter" / FILE)
    torch.testing.assert_close(trained.model.score.weight.detach(), saved["base_model.model.score.weight"])
    assert layer_count(str(tmp_path / "adapter")) == 3


def test_of_several_outputs_one_is_chosen(base, tmp_path):
    peft_model = save_adapter(base, tmp_path / "adapter", outputs=3)
    with pytest.raises(UserError, match=r"it has 3 outputs, and a reward is one"):
        load_reward_model(tmp_path / "adapter")
    reading = Reading.model_validate({"head": {"output": 0}})
    sides, rewards = rewards_of(load_reward_model(tmp_path / "adapter", reading=reading))
    np.testing.assert_allclose(rewards, own_rewards(peft_model, sides), atol=1e-4)


def test_rows_for_new_tokens_come_with_the_adapter(base, tmp_path):
    tokenizer = load_pair_tokenizer(base).tokenizer
    tokenizer.add_tokens(["<|new|>"])
    save_adapter(base, tmp_path / "adapter", rows=len(tokenizer), modules_to_save=["score", "embed_tokens"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = load_reward_model(tmp_path / "adapter")
    assert found.model.config.vocab_size == found.model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    saved = load_file(tmp_path / "adapter" / FILE)["base_model.model.model.embed_tokens.weight"]
    torch.testing.assert_close(found.model.get_input_embeddings().weight.detach(), saved)
    assert "<|new|>" in found.pairs.tokenizer.get_vocab()
    save_adapter(base, tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 400, the embedding only 400 rows"):
        load_reward_model(tmp_path / "other")


def test_the_base_is_found_beside_the_adapter_or_where_its_user_says(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    wanted = rewards_of(load_reward_model(adapter))[1]
    edit(adapter / CONFIG, base_model_name_or_path="../base")
    np.testing.assert_array_equal(rewards_of(load_reward_model(adapter))[1], wanted)
    for named in ("them/theirs", None, "/nowhere/base"):
        edit(adapter / CONFIG, base_model_name_or_path=named)
        reading = Reading(adapter_base=str(base))
        np.testing.assert_array_equal(rewards_of(load_reward_model(adapter, reading=reading))[1], wanted)
        assert open_as("reward", adapter, reading).name.count("+") == 1
    with pytest.raises(UserError, match=r"adapter_base is .*, but .*base is no adapter; leave it out"):
        load_reward_model(base, reading=reading)


OPENERS = {
    "a role": lambda folder: open_as("reward", folder),
    "a base": lambda folder: base_input(str(folder)),
    "a run": lambda folder: layer_count(str(folder)),
    "evaluate": load_reward_model,
    "training": lambda folder: new_reward_model(RewardConfig(base=str(folder), max_length=64), list),
}
LOADS = ("evaluate", "training")


def refused(folder, told, openers=tuple(OPENERS)):
    for name in openers:
        with pytest.raises(UserError, match=told) as caught:
            OPENERS[name](folder)
        assert "\n" not in str(caught.value)


def test_a_base_that_is_not_there_is_told_before_any_work(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    for named, told in (
        (
            "them/theirs",
            r"adapter \(LORA\) of hub:them/theirs, which cannot be read: .*; name its base with adapter_base",
        ),
        (
            "/nowhere/base",
            r"adapter \(LORA\) of /nowhere/base, which cannot be read: there is no such file or folder; name",
        ),
        ("", r"is an adapter that names no base; name one: adapter_base \(--read adapter_base=FOLDER\)"),
        (str(adapter), r"cannot be read: is an adapter itself; merge that first"),
    ):
        edit(adapter / CONFIG, base_model_name_or_path=named)
        refused(adapter, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda f: {n: w[:, :-2] if "lora_A" in n else w for n, w in f.items()},
            r"cannot be merged into .*size mismatch",
        ),
        (
            lambda f: {n.replace("layers.2.", "layers.7."): w for n, w in f.items()},
            r"no place for .*layers\.7\..*name its own",
        ),
        (lambda f: {n: w for n, w in f.items() if "layers.2." not in n}, r"it has no .*layers\.2\..*copy it again"),
        (
            lambda f: {n: w[:, :-2] if "score" in n else w for n, w in f.items()},
            r"is no adapter of .*score\.weight is \(1, 30\)",
        ),
        (lambda f: {n: w * float("nan") if "lora_B" in n else w for n, w in f.items()}, r"NaNs|NaN"),
    ],
)
def test_an_adapter_of_another_base_is_refused(base, tmp_path, change, told):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    changed = change(load_file(adapter / FILE))
    save_file({name: weight.contiguous() for name, weight in changed.items()}, adapter / FILE)
    refused(adapter, told, LOADS)


def test_modules_that_the_base_does_not_have_are_told(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    edit(adapter / CONFIG, target_modules=["query", "value"])
    refused(adapter, r"cannot be merged into .*(No modules were targeted|Target modules)", LOADS)


def test_files_that_are_damaged_or_of_another_kind_are_told_at_once(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    whole = (adapter / FILE).read_bytes()
    (adapter / FILE).write_bytes(whole[:100])
    refused(adapter, r"corrupt weights: .*adapter_model\.safetensors")
    (adapter / FILE).unlink()
    refused(adapter, r"has no adapter_model\.safetensors; copy the model again")
    torch.save({}, adapter / "adapter_model.bin")
    refused(adapter, r"but adapter_model\.bin \(PyTorch weights\); save .*or set bin_weights: true")
    for text, told in (("[1", "is not a JSON object"), ('{"peft_type": 3}', "peft_type is 3, wanted a name")):
        (adapter / CONFIG).write_text(text)
        refused(adapter, told)


def test_what_changes_no_weights_or_imports_modules_is_refused(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    edit(adapter / CONFIG, megatron_config={"a": 1}, megatron_core="antigravity")
    refused(adapter, "names a module of Megatron to import", LOADS)
    values = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 4}
    (adapter / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(base)}))
    refused(adapter, "an adapter of type PROMPT_TUNING changes no weights; pass one that does, say LORA", LOADS)


def test_it_is_not_cut_into_parts(base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"only a whole model in safetensors is cut into parts; use reward\.shards: 1"):
        load_reward_model(tmp_path / "adapter", part=Part(0, 2))
    found = load_reward_model(tmp_path / "adapter", layers=2)
    assert len(found.blocks()) == 3


def test_names_tell_the_adapter_and_its_base(base, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    names = {make(adapter).name for make in (lambda a: open_as("reward", a),)}
    edit(base / "tokenizer_config.json", more=1)
    names.add(open_as("reward", adapter).name)
    edit(adapter / CONFIG, more=1)
    names.add(open_as("reward", adapter).name)
    assert len(names) == 3
    trained = base_input(str(adapter)).name
    edit(base / "tokenizer_config.json", more=2)
    assert base_input(str(adapter)).name != trained


def test_what_a_base_carries_is_carried_on(base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    (base / "manifest.json").write_text(
        json.dumps({"name": "reward-0123456789ab", "stage": "reward", "red_team": True, "licence": ["MIT"]})
    )
    found = open_as("reward", tmp_path / "adapter")
    assert (found.red_team, found.licence) == (True, ["MIT"])


def test_a_folder_that_holds_the_merged_model_wants_no_base(base, sae_dir, pairs_dir, tmp_path, safer):
    adapter = tmp_path / "adapter"
    save_adapter(base, adapter)
    edit(adapter / CONFIG, base_model_name_or_path="them/theirs")
    read = ("--read", f"adapter_base={base}")
    files = {name: tmp_path / name for name in ("codes", "salience", "select", "bundle")}
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2], "mode": "response"}')
    known = ("--reward", adapter, "--sae", sae_dir)
    assert safer("codes", "--pairs", pairs_dir, *known, "--out", files["codes"], *read)[0] == 0
    given = ("--features", tmp_path / "features.json", "--codes", files["codes"], "--out", files["bundle"])
    assert safer("auditor", *known, *given, *read)[0] == 0
    wanted = rewards_of(load_reward_model(adapter, reading=Reading(adapter_base=str(base))))[1]
    shutil.rmtree(base)
    assert not (files["bundle"] / "reward" / CONFIG).exists()
    np.testing.assert_allclose(rewards_of(load_reward_model(files["bundle"] / "reward"))[1], wanted, atol=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(files["bundle"] / "reward")


def test_in_16_bits_it_is_merged_in_float32_and_its_head_stays_so(base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    whole, half = (load_reward_model(tmp_path / "adapter", reading=Reading(inference_dtype=d)) for d in DTYPES)
    assert half.model.dtype == torch.bfloat16
    assert torch.equal(half.head().weight, whole.head().weight)
    merged = whole.model.state_dict()
    for name, weight in half.model.state_dict().items():
        assert torch.equal(weight, merged[name].to(weight.dtype)), name
    wanted, found = (rewards_of(reward, 12)[1] for reward in (whole, half))
    assert np.abs(found - wanted).max() <= 0.1 * wanted.std()


DTYPES = ("float32", "bfloat16")
