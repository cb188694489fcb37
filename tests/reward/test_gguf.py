"""GGUF files as bases of reward models: the weights, tokenizer and template in them, and nothing that lies beside."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import save_adapter
from support.gguf_files import gguf_name, write_gguf
from support.made import TINY, make_pairs
from support.templates import CHAT_TEMPLATE
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig
from safer_ray.data.hub import pinned
from safer_ray.errors import UserError
from safer_ray.pipeline.inputs import base_input, with_lasting_base
from safer_ray.pipeline.roles import open_as
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.bases import resolve_base
from safer_ray.reward.checkpoints import layer_count, load_pair_tokenizer, load_reward_model, new_reward_model
from safer_ray.reward.forward import forward
from safer_ray.reward.text import both_sides
from safer_ray.reward.tiny_llama import make_tiny_llama
from safer_ray.reward.train import train_reward
from safer_ray.reward.training_pairs import pair_texts
from safer_ray.storage.work import TrainJob

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
NAME = "tiny.F32.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A language model with another vocabulary size than its tokenizer's, and the same in a GGUF file."""
    folder, files = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("gguf")
    model, tokenizer = make_tiny_llama(TINY, lambda: pair_texts(make_pairs(48)), 0)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_gguf(folder, files / NAME)
    return folder, files / NAME


def config_of(path, **values):
    return RewardConfig(base=str(path), max_length=96, epochs=1, batch_size=8, micro_batch_size=8, **values)


def own_rewards(folder, sequences):
    """By transformers alone, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [float(model(input_ids=torch.from_numpy(ids)[None]).logits) for ids in sequences]


def test_the_model_in_a_file_is_the_one_that_it_was_written_of(made):
    folder, file = made
    torch.manual_seed(1)
    found = new_reward_model(config_of(file), lambda: [])
    wanted = load_file(folder / "model.safetensors")
    weights = found.model.state_dict()
    assert {*weights} == {*wanted} - {"lm_head.weight"} | {"score.weight"}
    for name in weights.keys() & wanted.keys():
        torch.testing.assert_close(weights[name], wanted[name], rtol=0, atol=0)
    assert found.pairs.template == "chat"
    row = make_pairs(1).to_pylist()[0]
    plain = AutoTokenizer.from_pretrained(folder)
    ids = plain.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
    assert found.pairs([row])[0].chosen.ids.tolist() == ids


def test_a_model_trained_from_a_file_is_saved_as_anybody_reads_it(made, pairs_dir, tmp_path):
    trained = tmp_path / "reward"
    LocalRunner().train(
        [TrainJob("reward", train_reward, {"pairs": pairs_dir, "config": config_of(made[1], frozen_layers=2)}, trained)]
    )
    assert "quantization_config" not in json.loads((trained / "config.json").read_text())
    reward = load_reward_model(trained)
    tokens = reward.pairs(make_pairs(4).to_pylist())
    sides = [side.ids for side in both_sides(tokens)]
    plain = AutoTokenizer.from_pretrained(trained)
    row = make_pairs(1).to_pylist()[0]
    assert sides[0].tolist() == plain.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
    rewards = forward(reward, sides).rewards
    np.testing.assert_allclose(rewards, own_rewards(trained, sides), atol=1e-5)
    assert not [path for path in trained.glob("*.json") if b"safer_ray-gguf" in path.read_bytes()]


def test_what_lies_beside_a_file_is_not_read(made, tmp_path):
    file = tmp_path / NAME
    shutil.copy(made[1], file)
    wanted = load_pair_tokenizer(file).tokenizer
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Y"}, "chat_template": "no"}')
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "x.Y"}}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "them/theirs"}')
    found = load_pair_tokenizer(file).tokenizer
    assert found.chat_template == wanted.chat_template
    assert new_reward_model(config_of(file), lambda: [])
    assert layer_count(str(file)) == TINY.layers


def test_a_recipe_names_a_file_by_its_content(made, tmp_path):
    first, second = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    for file in (first, second):
        file.parent.mkdir()
        shutil.copy(made[1], file)
    (second.parent / "more.txt").write_text("beside it")
    assert base_input(str(first)).name == base_input(str(second)).name
    write_gguf(made[0], second, **{"cls.output.weight": np.ones((1, TINY.hidden), np.float32)})
    assert base_input(str(first)).name != base_input(str(second)).name


def test_tensors_that_are_not_read_are_told(made, tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / NAME
    write_gguf(made[0], file, **{"rope_freqs.weight": np.ones(8, np.float32)})
    new_reward_model(config_of(file), lambda: [])
    assert "no use for are left out: rope_freqs.weight" in caplog.text
    assert "lm_head.weight is not read" in caplog.text


def test_a_package_that_holds_a_file_is_not_imported(made, tmp_path, monkeypatch):
    package = tmp_path / "holds_a_model"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
        shutil.copy(made[1], folder / NAME)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("holds_a_model", "holds_a_model.inner"):
        base = f"package:{module}/{NAME}"
        assert resolve_base(base) == (str(tmp_path / module.replace(".", "/") / NAME), None)
        assert layer_count(base) == TINY.layers
    assert not [name for name in sys.modules if name.startswith("holds_a_model")]


@pytest.mark.parametrize("module", ["", ".x", "a b", "os.path..x"])
def test_a_name_that_no_package_has_is_refused(module):
    with pytest.raises(UserError, match=r"is no name of a package; write package:MODULE/FOLDER"):
        resolve_base(f"package:{module}/{NAME}")


COMMIT = "0123456789" * 4


def test_a_file_on_the_hub_is_found_by_its_commit(made, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    folder = cache / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    shutil.copy(made[1], folder / "snapshots" / COMMIT / NAME)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", {"HF_HUB_CACHE": str(cache)}.get(name, True))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    base = f"hub:owner/name/{NAME}"
    assert pinned(base, "model") == f"{base}@{COMMIT}"
    lasting = with_lasting_base(config_of(base)).base
    assert base_input(lasting).name == f"{base}@{COMMIT}"
    assert layer_count(lasting) == TINY.layers
    with pytest.raises(UserError, match=r"cannot load hub:owner/name/no.gguf: ") as caught:
        layer_count("hub:owner/name/no.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_without_a_head_is_no_reward_model(made):
    artifact = open_as("reward", made[1])
    with pytest.raises(UserError, match=r"is no reward model: it has no weights for score\.weight"):
        load_reward_model(artifact.path)


def test_an_adapter_of_a_file_is_merged(made, tmp_path):
    peft_model = save_adapter(made[0], tmp_path / "adapter")
    reading = Reading(adapter_base=str(made[1]))
    reward = load_reward_model(tmp_path / "adapter", reading=reading)
    sides = [side.ids for side in both_sides(reward.pairs(make_pairs(2).to_pylist()))]
    with torch.inference_mode():
        own = [float(peft_model(input_ids=torch.from_numpy(ids)[None].long()).logits) for ids in sides]
    np.testing.assert_allclose(np.asarray(forward(reward, sides).rewards), own, atol=1e-4)
    assert open_as("reward", tmp_path / "adapter", reading).name.endswith(base_input(str(made[1])).name)


OPENERS = {
    "a role": lambda file: open_as("reward", file),
    "a base": lambda file: base_input(str(file)),
    "a run": lambda file: layer_count(str(file)),
    "training": lambda file: new_reward_model(config_of(file), lambda: []),
}


def refused(file, told, openers=tuple(OPENERS)):
    for name in openers:
        with pytest.raises(UserError, match=told) as caught:
            OPENERS[name](file)
        assert "\n" not in str(caught.value)
        assert "safer_ray-gguf" not in str(caught.value)


def test_what_is_no_such_file_is_told_as_what_it_is(made, tmp_path):
    file = tmp_path / NAME
    refused(file, r"has no tiny\.F32\.gguf|no such reward")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32)
    refused(file, "is a Git LFS pointer")
    file.write_bytes(b"PK\x03\x04")
    refused(file, r"is no GGUF file, though its name ends so; copy the file again")
    shard = tmp_path / "tiny-00001-of-00003.gguf"
    shutil.copy(made[1], shard)
    refused(shard, r"one of several files of a model; join them with `llama-gguf-split --merge`")
    whole = made[1].read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:size])
        refused(file, r"cannot read the (config|tokenizer) of .*tiny\.F32\.gguf", ("a run", "training"))


def test_packages_that_read_files_are_asked_for(made, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    refused(made[1], r"gguf is not installed; pip install 'safer-ray\[gguf\]'")


def test_names_of_tensors_are_llama_cpps():
    assert gguf_name("model.layers.2.self_attn.q_proj.weight") == "blk.2.attn_q.weight"
