"""Training with LoRA: what is trained, exact resume, and exports that transformers and peft open by themselves."""

import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.made import make_pairs, write_parts
from support.reward_models import save_reward_model_of
from transformers import AutoConfig, AutoModelForSequenceClassification

from safer_ray.config.reading import Reading
from safer_ray.config.reward import LORA_RATE, LoraConfig
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.feature_stages import _write_reward_model
from safer_ray.reward import training_steps
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model
from safer_ray.reward.forward import forward, pack_to_train, trunk_states
from safer_ray.reward.lora import add_lora, check_targets
from safer_ray.reward.packing import unpacked
from safer_ray.reward.text import both_sides
from safer_ray.reward.train import train_reward
from safer_ray.reward.training_steps import KnownStates, OneProcess, OptimizerOptions, TorchOptimizer, reward_step
from safer_ray.storage.artifacts import Artifact

LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture
def base(model_dir):
    return model_dir


@pytest.fixture(params=["reward_dir", "bert_dir", "gpt2_dir"])
def model_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory):
    return save_reward_model_of("GPT-2", tmp_path_factory.mktemp("gpt2"))


def config_of(base, **values):
    given = {"lora": LORA, "max_length": 96, "epochs": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3}
    return RewardConfig(base=str(base), validation_percent=25, evaluations=3, **given | values)


def train(base, pairs_dir, out, on_step=lambda done, total: None, **values):
    return train_reward(pairs_dir, out, config_of(base, **values), OneProcess(out / "state", on_step))


class KilledError(Exception):
    pass


def die(done, total):
    if done == 5:
        raise KilledError


def rewards_of(reward):
    sides = [side.ids for side in both_sides(reward.pairs(make_pairs(3).to_pylist()))]
    return sides, np.asarray(forward(reward, sides).rewards)


@torch.inference_mode()
def own_rewards(model, sequences):
    return np.array([float(model(input_ids=torch.from_numpy(ids)[None].long()).logits[0, 0]) for ids in sequences])


@pytest.fixture
def llama(reward_dir):
    """A tiny Llama with additions that are not nothing."""

    def made(**values):
        config = config_of(reward_dir, **values)
        reward = new_reward_model(config, list)
        if config.frozen_layers:
            reward = reward.freeze(config.frozen_layers)
        reward = add_lora(reward, config.lora, config.seed)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in reward.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        return reward

    return made


def trained_names(reward):
    return {name for name, parameter in reward.model.named_parameters() if parameter.requires_grad}


def test_exports_open_with_transformers_and_with_peft_on_the_base(base, pairs_dir, tmp_path):
    metrics = train(base, pairs_dir, tmp_path / "out")
    trained = load_reward_model(tmp_path / "out")
    sides, rewards = rewards_of(trained)
    assert np.abs(rewards - rewards_of(load_reward_model(base))[1]).max() > 1e-3
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    whole = AutoModelForSequenceClassification.from_pretrained(base)
    with warnings.catch_warnings(action="ignore"):  # peft's, of names in transformers
        adapted = PeftModel.from_pretrained(whole, tmp_path / "out/adapter").eval()
    if "bert" not in type(plain).__name__.lower():  # else with token types
        np.testing.assert_allclose(own_rewards(plain, sides), rewards, atol=1e-4)
        np.testing.assert_allclose(own_rewards(adapted, sides), rewards, atol=1e-4)
    ours, theirs = plain.state_dict(), adapted.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    for name in ours.keys() - {"transformer.wte.weight"}:  # GPT-2 gets a pad token, which nothing reads
        tensor = ours[name]
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
    again = load_reward_model(tmp_path / "out/adapter")
    np.testing.assert_allclose(rewards_of(again)[1], rewards, atol=1e-4)
    assert metrics["trained_parameters"] < metrics["parameters"] / 2
    written = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    assert written["target_modules"] == sorted(written["target_modules"])


@pytest.mark.parametrize("frozen", [0, 2])
def test_additions_and_head_alone_are_trained(llama, frozen):
    names = trained_names(llama(frozen_layers=frozen))
    assert "score.weight" in names
    added = {name for name in names if ".lora_" in name}
    assert names == added | {"score.weight"}
    assert {name.split(".")[2] for name in added} == {str(block) for block in range(frozen, 3)}
    assert len(added) == (3 - frozen) * 7 * 2


def test_targets_are_chosen_by_the_end_of_their_names(llama):
    names = trained_names(llama(lora=LoraConfig(rank=1, targets=("q_proj", "mlp.down_proj"))))
    assert {name.split(".")[4] for name in names - {"score.weight"}} == {"q_proj", "down_proj"}


def test_the_head_of_a_model_with_additions_of_rank_one_is_its_head(llama):
    reward = llama(lora=LoraConfig(rank=1))
    assert reward.head() is reward.model.score


def test_additions_begin_as_nothing_and_are_drawn_by_the_seed(reward_dir):
    config = config_of(reward_dir)
    plain = new_reward_model(config, list)
    wanted = rewards_of(plain)[1]
    one, other = (add_lora(new_reward_model(config, list), LORA, seed) for seed in (0, 1))
    np.testing.assert_array_equal(rewards_of(one)[1], wanted)
    drawn = [dict(reward.model.named_parameters()) for reward in (one, other)]
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert not torch.equal(drawn[0][name], drawn[1][name])
    assert torch.equal(
        drawn[0][name], dict(add_lora(new_reward_model(config, list), LORA, 0).model.named_parameters())[name]
    )


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_killed_run_resumes_to_the_same_weights_from_a_checkpoint_of_what_is_trained(
    reward_dir, pairs_dir, tmp_path, monkeypatch, frozen
):
    monkeypatch.setattr(training_steps.Checkpoints, "due", lambda self, wanted=False: True)
    whole = train(reward_dir, pairs_dir, tmp_path / "whole", frozen_layers=frozen)

    with pytest.raises(KilledError):
        train(reward_dir, pairs_dir, tmp_path / "killed", die, frozen_layers=frozen)
    *_, checkpoint = sorted((tmp_path / "killed/state").glob("step-*"))
    held = torch.load(checkpoint / "torch.pt", weights_only=True)["module"]
    assert all(".lora_" in name or name == "score.weight" for name in held)
    assert train(reward_dir, pairs_dir, tmp_path / "killed", frozen_layers=frozen) == whole
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_target_that_no_block_has_is_refused_with_those_there_are(reward_dir, pairs_dir, tmp_path):
    lora = LoraConfig(targets=("q_proj", "qkv"))
    wanted = (
        rf"reward.lora.targets: blocks 3 to 3 of {reward_dir} have no linear layer 'qkv'; choose among "
        r"self_attn.q_proj, .*mlp.down_proj, or all-linear$"
    )
    with pytest.raises(UserError, match=wanted):
        check_targets(config_of(reward_dir, lora=lora, frozen_layers=2))
    with pytest.raises(UserError, match=wanted):
        train(reward_dir, pairs_dir, tmp_path / "out", lora=lora, frozen_layers=2)


def test_additions_want_a_block_that_is_not_frozen(reward_dir):
    with pytest.raises(UserError, match="no linear layer in the blocks behind frozen_layers 3 of 3; lower it, or"):
        check_targets(config_of(reward_dir, frozen_layers=3))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": {}}, "lora needs a pretrained base"),
        ({"base": "some", "blocks": 2, "frozen_layers": 2}, "all 2 are frozen; set it lower"),
        ({"use": "some"}, "all of a finished model's .use. are frozen; set frozen_layers to fewer"),
        ({"base": "some", "lora": {"targets": []}}, "at least 1 item"),
        ({"base": "some", "lora": {"rank": 0}}, "greater than 0"),
        ({"base": "some", "lora": {"targets": "q_proj"}}, r"write a list of names, as \[q_proj\], or all-linear"),
    ],
)
def test_what_cannot_be_adapted_is_an_error_of_the_config(values, said):
    with pytest.raises(ValueError, match=said):
        RewardConfig(**{"lora": {}} | values)


def test_the_learning_rate_is_that_of_additions_unless_it_is_said():
    assert RewardConfig(base="some", lora={}).learning_rate == LORA_RATE > RewardConfig(base="some").learning_rate
    assert RewardConfig(base="some", lora={}, learning_rate=1e-5).learning_rate == 1e-5


def test_a_recipe_holds_the_additions_alone_where_there_are_some():
    assert "lora" not in RewardConfig(base="some").recorded()
    recorded = RewardConfig(base="some", lora={"rank": 2, "targets": ["q_proj"]}).recorded()["lora"]
    assert recorded == {"rank": 2, "alpha": 32, "targets": ["q_proj"]}


def test_an_adapter_of_another_base_is_refused(reward_dir, bert_dir, pairs_dir, tmp_path):
    train(reward_dir, pairs_dir, tmp_path / "out")
    with pytest.raises(UserError, match=r"^[^\n]*name its own base with adapter_base[^\n]*$"):
        load_reward_model(tmp_path / "out/adapter", reading=Reading(adapter_base=str(bert_dir)))


def gradients(reward, loss):
    reward.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in reward.model.named_parameters() if p.grad is not None}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("frozen", [0, 2])
def test_gradients_are_those_of_padded_pairs_and_of_blocks_that_run_again(llama, frozen, monkeypatch):
    """In float32, packed, padded, with gradient checkpointing, and behind known states: equal to 1e-4 of a tensor's
    largest entry."""
    reward = llama(frozen_layers=frozen)
    batch = reward.pairs(make_pairs(6).to_pylist())
    reward.model.train()
    assert pack_to_train(reward, batch) is not None
    wanted = gradients(reward, reward_step(reward, batch).loss)
    assert set(wanted) == trained_names(reward)
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    known = None
    if frozen:
        states = trunk_states(reward, [unpacked(side.ids, side.types) for side in both_sides(batch)])
        known = KnownStates(frozen, [states[2 * i + side] for side in (0, 1) for i in range(len(batch))])
        assert_close(gradients(reward, reward_step(reward, batch, known=known).loss), wanted)
    reward.model.activation_checkpointing_enable()
    assert_close(gradients(reward, reward_step(reward, batch, known=known).loss), wanted)
    monkeypatch.setattr(training_steps, "pack_to_train", lambda *given: None)
    assert_close(gradients(reward, reward_step(reward, batch).loss), wanted)
    reward.model.activation_checkpointing_disable()
    assert_close(gradients(reward, reward_step(reward, batch).loss), wanted)


def test_an_adapter_reads_where_its_model_does_though_its_base_takes_the_end_of_a_text_for_padding(pairs_dir, tmp_path):
    base = save_reward_model_of("Llama, DeepSeek's template", tmp_path / "base")
    train(base, pairs_dir, tmp_path / "out", max_length=256)
    merged, adapted = (load_reward_model(tmp_path / name) for name in ("out", "out/adapter"))
    pad = AutoConfig.from_pretrained(base).pad_token_id
    sides, rewards = rewards_of(merged)
    assert {int(ids[-1]) for ids in sides} == {pad} != {merged.unread}
    np.testing.assert_allclose(rewards_of(adapted)[1], rewards, atol=1e-4)


def test_a_checkpoint_that_holds_what_is_frozen_too_is_gone_on_from(llama, tmp_path):
    def fresh():
        return TorchOptimizer(llama().model, OptimizerOptions(1e-2))

    made, other = fresh(), fresh()
    with torch.no_grad():
        made.module.score.weight.fill_(1.0)
    whole = {"module": made.module.state_dict(), "optimizer": made.optimizer.state_dict()}
    torch.save(whole, tmp_path / "torch.pt")
    other.load(tmp_path)
    assert torch.equal(other.module.score.weight, made.module.score.weight)


def test_a_bundle_holds_the_merged_model_alone(reward_dir, pairs_dir, tmp_path):
    train(reward_dir, pairs_dir, tmp_path / "out")
    _write_reward_model(
        Reading(), Artifact(tmp_path / "out", "reward"), Artifact(tmp_path, "codes"), tmp_path / "bundle"
    )
    wanted, found = (rewards_of(load_reward_model(tmp_path / name))[1] for name in ("out", "bundle"))
    np.testing.assert_array_equal(found, wanted)
    assert not (tmp_path / "bundle/adapter").exists()


def test_of_a_cut_base_no_adapter_is_left_that_would_open_on_the_whole_one(reward_dir, pairs_dir, tmp_path):
    train(reward_dir, pairs_dir, tmp_path / "cut", blocks=2)
    assert load_reward_model(tmp_path / "cut").model.config.num_hidden_layers == 2
    assert not (tmp_path / "cut/adapter").exists()


def test_a_training_does_not_go_on_with_other_pairs(reward_dir, pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(training_steps.Checkpoints, "due", lambda self, wanted=False: True)
    with pytest.raises(KilledError):
        train(reward_dir, pairs_dir, tmp_path / "killed", die)
    others = write_parts(make_pairs(40), tmp_path / "others", 20)
    with pytest.raises(UserError, match=r"^reward: the unfinished training was on other pairs .*--fresh$"):
        train(reward_dir, others, tmp_path / "killed")
