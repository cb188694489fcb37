"""Heads: one reward of whatever a model gives, as plain transformers would compute it."""

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.made import make_pairs
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from safer_ray.config.head import HeadConfig
from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.features.passes import EncodePairs, HeadPairs, RewardPairs
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model, save_reward_model
from safer_ray.reward.execution import rewards_of
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.packing import pack, unpacked
from safer_ray.storage.artifacts import Artifact, Place, read_parts
from safer_ray.storage.work import Part

WEIGHTS = "model.safetensors"
SEQUENCES = [np.random.default_rng(i).integers(5, 300, size=n) for i, n in enumerate((3, 40, 17, 61))]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS = {
    "llama": {},
    "bert": {},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 160},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
    "falcon": {},
}
CHOICES = {
    "output": (HeadConfig(output=2), [0, 0, 1]),
    "weights": (HeadConfig(weights=(0.5, -2, 0.25)), [0.5, -2, 0.25]),
    "difference": (HeadConfig(difference=(1, 0)), [-1, 1, 0]),
}


def save(reward_dir, folder, kind, auto=AutoModelForSequenceClassification, outputs=1, **more):
    """A random model with the tokenizer of `reward_dir`, of weights that tell texts apart."""
    sizes = {} if kind == "gpt2" else SIZES
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | sizes | KINDS[kind] | more
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, num_labels=outputs, **values))
    for weight in model.parameters():
        weight.data = weight.data + torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def given(folder, auto=AutoModelForSequenceClassification):
    """Logits of each sequence alone, without padding, by plain transformers."""
    model = auto.from_pretrained(folder).eval()
    return [model(input_ids=torch.tensor(ids)[None]).logits[0] for ids in SEQUENCES]


def agree(found, wanted):
    wanted = torch.stack([torch.as_tensor(value) for value in wanted]).float()
    assert wanted.std() > 1e-3
    assert ((found - wanted).abs() <= 1e-5 * wanted.abs().clamp(min=1)).all()


# Several outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_one_of_several_outputs_is_what_was_chosen(reward_dir, tmp_path, kind, choice):
    save(reward_dir, tmp_path, kind, outputs=3, problem_type="multi_label_classification")
    head, weights = CHOICES[choice]
    wanted = [float(logits.double() @ torch.tensor(weights, dtype=torch.float64)) for logits in given(tmp_path)]
    reward = load_reward_model(tmp_path, reading=Reading(head=head))
    found = forward(reward, SEQUENCES, heads=True)
    agree(found.rewards, wanted)
    with torch.inference_mode():
        agree(rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]), wanted)
        if kind in ("llama", "gpt2", "falcon"):
            agree(reward.head()(found.heads)[:, 0], wanted)


def test_a_packed_pair_gives_the_chosen_output_of_both_sides(reward_dir, tmp_path):
    save(reward_dir, tmp_path, "llama", outputs=3)
    reward = load_reward_model(tmp_path, reading=Reading(head=HeadConfig(difference=(1, 0))))
    wanted = [float(logits[1] - logits[0]) for logits in given(tmp_path)]
    with torch.inference_mode():
        agree(rewards_of(reward, [pack(SEQUENCES[0], SEQUENCES[1])]), wanted[:2])
    assert reward.model.config.num_labels == 1


def test_several_outputs_are_refused_with_their_number_and_how_to_choose(reward_dir, tmp_path):
    save(reward_dir, tmp_path, "llama", outputs=2)
    told = r"it has 2 outputs, and a reward is one; choose a reward with head: \{output: 0\}"
    for part in (Part(0, 1), Part(1, 2)):
        with pytest.raises(UserError, match=told):
            load_reward_model(tmp_path, part=part)
    for head, told in (
        (HeadConfig(output=2), r"head names output 2, and the model has 2, from 0 on; write `head` for these"),
        (HeadConfig(weights=(1, 2, 3)), r"head\.weights are 3, and the model has 2 outputs"),
    ):
        with pytest.raises(UserError, match=told):
            load_reward_model(tmp_path, reading=Reading(head=head))


@pytest.mark.parametrize("named", [1, 2, 7])
def test_how_many_outputs_there_are_is_what_the_weights_say(reward_dir, tmp_path, named):
    save(reward_dir, tmp_path, "llama", outputs=3)
    wanted = [float(logits[2]) for logits in given(tmp_path)]
    config = json.loads((tmp_path / "config.json").read_text())
    labels = {str(i): f"LABEL_{i}" for i in range(named)}
    config |= {"id2label": labels, "label2id": {value: int(key) for key, value in labels.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for head in (HeadConfig(output=2), HeadConfig(weights=(0, 0, 1))):
        agree(forward(load_reward_model(tmp_path, reading=Reading(head=head)), SEQUENCES).rewards, wanted)


def test_one_output_may_be_chosen_too(reward_dir):
    chosen = load_reward_model(reward_dir, reading=Reading(head=HeadConfig(weights=(-1,))))
    found = forward(load_reward_model(reward_dir), SEQUENCES).rewards
    torch.testing.assert_close(forward(chosen, SEQUENCES).rewards, -found)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"output": 0, "difference": (1, 0)},
        {"difference": (1, 1)},
        {"weights": ()},
        {"weights": (0, 0)},
        {"weights": (float("nan"),)},
        {"output": -1},
    ],
)
def test_a_head_is_one_choice_that_says_something(values):
    with pytest.raises(ValidationError):
        HeadConfig(**values)


def test_a_model_made_on_the_spot_has_no_outputs_to_choose_from():
    with pytest.raises(ValidationError, match="head needs a pretrained base"):
        RewardConfig(head={"output": 0})


def test_parts_of_a_model_give_what_the_whole_gives(reward_dir, tmp_path):
    save(reward_dir, tmp_path, "llama", outputs=3)
    reading = Reading(head=HeadConfig(weights=(1, -1, 0.5)))
    pairs = make_pairs(4)
    whole = load_reward_model(tmp_path, reading=reading)
    tokens = whole.pairs(pairs.to_pylist())
    parts = [load_reward_model(tmp_path, reading=reading, part=Part(number, 2)) for number in (0, 1)]
    first = forward_pairs(parts[0], tokens, rewards=False, states=True)
    found = forward_pairs(parts[1], tokens, heads=True, before=first)
    wanted = forward_pairs(whole, tokens, heads=True)
    torch.testing.assert_close(found.rewards, wanted.rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.heads, wanted.heads, rtol=1e-5, atol=1e-5)


def test_every_pass_over_pairs_reads_the_chosen_output(reward_dir, sae_dir, tmp_path):
    save(reward_dir, tmp_path, "llama", outputs=3)
    reading, pairs = Reading(head=HeadConfig(output=1)), make_pairs(4)
    rewards = RewardPairs(tmp_path, reading=reading)(pairs)
    codes = EncodePairs(tmp_path, sae_dir, reading=reading)(pairs)
    np.testing.assert_allclose(codes["chosen_reward"], rewards["reward_chosen"], rtol=1e-5, atol=1e-5)
    heads = np.stack(HeadPairs(tmp_path, reading=reading)(pairs)["head"].to_pylist())
    layer = load_reward_model(tmp_path, reading=reading).head()
    margins = np.asarray(rewards["reward_chosen"]) - np.asarray(rewards["reward_rejected"])
    np.testing.assert_allclose(heads @ layer.weight.detach().numpy()[0], margins, rtol=1e-4, atol=1e-4)


def test_what_was_chosen_is_in_the_name_of_what_is_made(reward_dir, pairs_dir, tmp_path):
    save(reward_dir, tmp_path / "model", "llama", outputs=2)
    reward, pairs = Artifact(tmp_path / "model", "model"), Artifact(pairs_dir, "pairs")
    made = []
    for head in (HeadConfig(output=0), HeadConfig(output=1)):
        ctx = StageContext(Place(tmp_path / "runs"), LocalRunner(), reading=Reading(head=head))
        made.append(model_stages.evaluate(ctx, reward, pairs))
    assert [each.manifest["config"]["reading"] for each in made] == [{"head": {"output": 0}}, {"head": {"output": 1}}]
    one, other = (read_parts(each.path)["reward_chosen"] for each in made)
    assert one != other


def test_a_bundle_says_by_itself_what_was_chosen(reward_dir, sae_dir, pairs_dir, tmp_path):
    save(reward_dir, tmp_path / "model", "llama", outputs=3)
    reading = Reading(head=HeadConfig(difference=(2, 0)))
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner(), reading=reading)
    reward, sae = Artifact(tmp_path / "model", "model"), Artifact(sae_dir, "sae")
    codes = model_stages.codes(ctx, Artifact(pairs_dir, "pairs"), reward, sae)
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "response"}')
    features = Artifact(tmp_path / "features.json", "features")
    bundle = feature_stages.auditor(ctx, reward, sae, features, codes).path
    pairs = make_pairs(4)
    found = RewardPairs(bundle / "reward")(pairs)
    assert found.equals(RewardPairs(tmp_path / "model", reading=reading)(pairs))


def test_training_begins_with_the_chosen_output_or_with_a_new_head(reward_dir, tmp_path, caplog):
    save(reward_dir, tmp_path / "base", "llama", outputs=3)
    config = RewardConfig(base=str(tmp_path / "base"), max_length=96, head={"output": 2})
    reward = new_reward_model(config, lambda: [])
    agree(forward(reward, SEQUENCES).rewards.detach(), [float(logits[2]) for logits in given(tmp_path / "base")])
    assert "new head" not in caplog.text
    save_reward_model(reward, tmp_path / "trained")
    trained = load_reward_model(tmp_path / "trained")
    agree(forward(trained, SEQUENCES).rewards, [float(logits[0]) for logits in given(tmp_path / "trained")])
    new_reward_model(config.model_copy(update={"head": None}), lambda: [])
    assert "has 3 outputs: a new head of one output is trained in their place" in caplog.text


@pytest.mark.parametrize("head", [HeadConfig(difference=(1, 0)), None])
def test_two_classes_of_a_single_label_are_read_cut_trained_and_opened_again(reward_dir, tmp_path, head):
    base = save(reward_dir, tmp_path / "base", "llama", outputs=2, problem_type="single_label_classification")
    assert json.loads((base / "config.json").read_text())["problem_type"] == "single_label_classification"
    if head is not None:
        reading, wanted = Reading(head=head), [float(logits[1] - logits[0]) for logits in given(base)]
        agree(forward(load_reward_model(base, reading=reading), SEQUENCES).rewards, wanted)
        assert len(load_reward_model(base, reading=reading, layers=2).blocks()) == 2
        part = load_reward_model(base, reading=reading, part=Part(1, 2))
        assert part.model.score.out_features == 1
    reward = new_reward_model(RewardConfig(base=str(base), max_length=96, head=head), lambda: [])
    save_reward_model(reward, tmp_path / "trained")
    wanted = [float(logits[0]) for logits in given(tmp_path / "trained")]
    agree(forward(load_reward_model(tmp_path / "trained"), SEQUENCES).rewards, wanted)


XLM = {
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "pad_index": 0,
    "summary_type": "first",
    "summary_activation": "tanh",
}


def test_outputs_in_front_of_an_activation_are_chosen_from_and_not_weighed(reward_dir, tmp_path):
    sizes = XLM | dict.fromkeys(SIZES) | {"vocab_size": len(AutoTokenizer.from_pretrained(reward_dir))}
    torch.manual_seed(0)
    sizes = {name: value for name, value in sizes.items() if value is not None}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlm", num_labels=2, **sizes))
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.3
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_dir).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"outputs of a XLM.* go through Tanh, behind which they cannot be weighed"):
        load_reward_model(tmp_path, reading=Reading(head=HeadConfig(difference=(1, 0))))
    reward = load_reward_model(tmp_path, reading=Reading(head=HeadConfig(output=1)))
    wanted = [float(logits[1]) for logits in given(tmp_path)]
    agree(forward(reward, SEQUENCES).rewards, wanted)
    with torch.inference_mode():  # as it is trained
        agree(rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]), wanted)


def test_a_bias_that_transformers_leaves_out_is_left_out_and_told(reward_dir, tmp_path, caplog):
    save(reward_dir, tmp_path, "llama")
    for bias in (torch.tensor([3.0]), torch.tensor([3.0, 4.0])):
        weights = load_file(tmp_path / WEIGHTS) | {"score.bias": bias}
        save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
        caplog.clear()
        found = forward(load_reward_model(tmp_path), SEQUENCES).rewards
        agree(found, [float(logits[0]) for logits in given(tmp_path)])
        assert "no use for are left out: score.bias" in caplog.text


# Value heads, and classifiers of tokens


def of_trl(folder):
    """What TRL saves of a language model with a value head; its head beside."""
    weights = load_file(folder / WEIGHTS)
    head = weights.pop("score.weight")
    weights |= {
        "v_head.summary.weight": head,
        "v_head.summary.bias": torch.tensor([2.5]),
        "lm_head.weight": head.clone(),
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return head


@torch.inference_mode()
def at_the_last_token(folder, head, bias):
    model = AutoModel.from_pretrained(folder).eval()
    states = [model(input_ids=torch.tensor(ids)[None]).last_hidden_state[0, -1] for ids in SEQUENCES]
    return [float(state @ head[0]) + bias for state in states]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_value_head_of_trl_is_read_with_its_bias(reward_dir, tmp_path, kind):
    save(reward_dir, tmp_path / "model", kind)
    wanted = at_the_last_token(tmp_path / "model", of_trl(tmp_path / "model"), 2.5)
    reward = load_reward_model(tmp_path / "model")
    agree(forward(reward, SEQUENCES).rewards, wanted)
    save_reward_model(reward, tmp_path / "again")  # with a bias that no class foresees
    agree(forward(load_reward_model(tmp_path / "again"), SEQUENCES).rewards, wanted)
    if kind == "llama":
        assert load_reward_model(tmp_path / "again", part=Part(1, 2)).model.score.bias.tolist() == [2.5]
    with torch.inference_mode():
        agree(rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]), wanted)


def test_the_last_part_of_a_value_model_has_its_head(reward_dir, tmp_path):
    save(reward_dir, tmp_path, "llama")
    head = of_trl(tmp_path)
    part = load_reward_model(tmp_path, part=Part(1, 2))
    torch.testing.assert_close(part.model.score.weight.data, head)
    assert part.model.score.bias.tolist() == [2.5]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"weight": torch.ones(2, 32)}, r"it has 2 outputs, and a reward is one; choose"),
        ({"weight": torch.ones(1, 20)}, r"v_head\.summary\.weight is \(1, 20\), by config\.json \(1, 32\)"),
        ({"weight": torch.ones(32)}, r"v_head\.summary\.weight is \(32,\), by config\.json \(1, 32\)"),
        ({"bias": torch.ones(2)}, r"v_head\.summary\.bias is \(2,\), by config\.json \(1,\)"),
    ],
)
def test_a_value_head_that_does_not_fit_is_told(reward_dir, tmp_path, values, told):
    save(reward_dir, tmp_path, "llama")
    of_trl(tmp_path)
    weights = load_file(tmp_path / WEIGHTS) | {f"v_head.summary.{name}": value for name, value in values.items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        load_reward_model(tmp_path)


def test_outputs_of_a_value_head_are_chosen_from(reward_dir, tmp_path):
    save(reward_dir, tmp_path, "llama")
    head = of_trl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"], config["label2id"]  # as of a language model: transformers then says 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = at_the_last_token(tmp_path, head, 2.5)
    agree(forward(load_reward_model(tmp_path, reading=Reading(head=HeadConfig(output=0))), SEQUENCES).rewards, wanted)
    with pytest.raises(UserError, match=r"head names output 1, and the model has 1"):
        load_reward_model(tmp_path, reading=Reading(head=HeadConfig(output=1)))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_classifier_of_tokens_is_read_at_the_last_one_though_it_is_the_pad_token(reward_dir, tmp_path, kind):
    save(reward_dir, tmp_path, kind, auto=AutoModelForTokenClassification, outputs=1)
    pad = json.loads((tmp_path / "config.json").read_text())["pad_token_id"]
    ended = [np.append(ids, pad) for ids in SEQUENCES]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        wanted = [float(model(input_ids=torch.tensor(ids)[None]).logits[0, -1, 0]) for ids in ended]
        reward = load_reward_model(tmp_path)
        agree(forward(reward, ended).rewards, wanted)
        agree(rewards_of(reward, [unpacked(ids) for ids in ended]), wanted)


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "gpt2"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_classifier_of_tokens_is_read_at_the_last_one(reward_dir, tmp_path, kind, outputs):
    save(reward_dir, tmp_path, kind, auto=AutoModelForTokenClassification, outputs=outputs)
    logits = given(tmp_path, AutoModelForTokenClassification)
    wanted = [float(values[-1][0] if outputs == 1 else values[-1][1] - values[-1][0]) for values in logits]
    reading = Reading(head=None if outputs == 1 else HeadConfig(difference=(1, 0)))
    reward = load_reward_model(tmp_path, reading=reading)
    found = forward(reward, SEQUENCES, heads=True)
    agree(found.rewards, wanted)
    agree(reward.head()(found.heads)[:, 0].detach(), wanted)
    with torch.inference_mode():
        agree(rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]), wanted)
    if kind == "llama":
        last = load_reward_model(tmp_path, part=Part(1, 2), reading=reading)
        torch.testing.assert_close(last.head().weight, reward.head().weight)
        torch.testing.assert_close(last.head().bias, reward.head().bias)
    if outputs == 2:
        with pytest.raises(UserError, match="it has 2 outputs"):
            load_reward_model(tmp_path)


# Code of a checkpoint's own

CONFIGURATION = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_lm"
"""
MODELING = """from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

from .configuration_own import OwnConfig


@dataclass
class Out(ModelOutput):
    {fields}


class OwnRewardModel(LlamaPreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, 5, bias=False)
        self.gating = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.ReLU(), nn.Linear(8, 5))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **more):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        ends = attention_mask.sum(1) - 1
        rows = torch.arange(len(ends), device=ends.device)
        rewards = self.regression_layer(states[rows, ends])
        score = (self.gating(states[rows, ends]).softmax(-1) * rewards).sum(-1)
        return {gives}
"""
GIVES = {
    "score": ("rewards: torch.Tensor = None\n    score: torch.Tensor = None", "Out(rewards=rewards, score=score)"),
    "scores": ("scores: torch.Tensor = None", "Out(scores=score[:, None])"),
    "rewards": ("rewards: torch.Tensor = None", "Out(rewards=score)"),
    "logits": ("logits: torch.Tensor = None", "Out(logits=score[:, None])"),
    "a mapping": ("logits: torch.Tensor = None", "{'logits': score}"),
    "a tensor": ("logits: torch.Tensor = None", "score"),
    "several": ("logits: torch.Tensor = None", "Out(logits=rewards)"),
    "states": ("last_hidden_state: torch.Tensor = None", "Out(last_hidden_state=states)"),
    "nothing": ("logits: torch.Tensor = None", "1 / 0"),
}


def bring_code(reward_dir, folder, gives, auto="AutoModelForSequenceClassification"):
    fields, expression = GIVES[gives]
    folder = folder / f"{gives.replace(' ', '_')}_{auto}"  # modules are known by their folder's name
    save(reward_dir, folder, "llama")
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.format(fields=fields, gives=expression))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "configuration_own.OwnConfig", auto: "modeling_own.OwnRewardModel"}
    config |= {"model_type": "own_lm", "auto_map": named, "architectures": ["OwnRewardModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS)
    weights.pop("score.weight")
    torch.manual_seed(1)
    weights["regression_layer.weight"] = torch.randn(5, 32)
    weights |= {"gating.0.weight": torch.randn(8, 32), "gating.0.bias": torch.randn(8)}
    weights |= {"gating.2.weight": torch.randn(5, 8), "gating.2.bias": torch.randn(5)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def by_its_code(folder, several=False):
    states = AutoModel.from_pretrained(folder, config=AutoConfig.for_model("llama", **plain_config(folder))).eval()
    weights, found = load_file(folder / WEIGHTS), []
    for ids in SEQUENCES:
        last = states(input_ids=torch.tensor(ids)[None]).last_hidden_state[0, -1]
        hidden = torch.relu(weights["gating.0.weight"] @ last + weights["gating.0.bias"])
        gate = (weights["gating.2.weight"] @ hidden + weights["gating.2.bias"]).softmax(-1)
        rewards = weights["regression_layer.weight"] @ last
        found.append(rewards if several else (gate * rewards).sum())
    return found


def plain_config(folder):
    config = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if name not in ("model_type", "auto_map", "architectures")}


TRUSTED = Reading(trust_remote_code=True)


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModel"])
@pytest.mark.parametrize("gives", ["score", "scores", "rewards", "logits", "a mapping", "a tensor"])
def test_own_code_gives_its_reward_under_any_of_its_names(reward_dir, tmp_path, gives, auto):
    own = bring_code(reward_dir, tmp_path, gives, auto)
    with pytest.raises(UserError, match="trust_remote_code is off"):
        load_reward_model(own)
    reward = load_reward_model(own, reading=TRUSTED)
    wanted = by_its_code(own)
    found = forward(reward, SEQUENCES, heads=True)
    agree(found.rewards, wanted)
    assert found.heads.shape == (len(SEQUENCES), 32)  # the last state, since no linear layer gives the reward
    assert found.heads.std() > 0
    assert rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]).requires_grad
    agree(rewards_of(reward, [unpacked(ids) for ids in SEQUENCES]).detach(), wanted)


def test_several_outputs_of_own_code_are_chosen_from(reward_dir, tmp_path):
    own = bring_code(reward_dir, tmp_path, "several")
    with pytest.raises(UserError, match=r"it has 5 outputs, and a reward is one; choose"):
        load_reward_model(own, reading=TRUSTED)
    wanted = by_its_code(own, several=True)
    head = HeadConfig(weights=(0.1, 0.2, -0.3, 0, 1))
    reward = load_reward_model(own, reading=TRUSTED.model_copy(update={"head": head}))
    wanted = [values @ torch.tensor(head.weights) for values in wanted]
    agree(forward(reward, SEQUENCES).rewards, wanted)
    save_reward_model(reward, tmp_path / "several_again")  # which says by itself what was chosen
    agree(forward(load_reward_model(tmp_path / "several_again", reading=TRUSTED), SEQUENCES).rewards, wanted)
    (tmp_path / "several_again/safer_ray.json").write_text('{"head": {"output": "one"}}')
    with pytest.raises(UserError, match=r"safer_ray\.json \(head\): .*output"):
        load_reward_model(tmp_path / "several_again", reading=TRUSTED)
    with pytest.raises(UserError, match=r"head names output 5, and the model has 5"):
        load_reward_model(own, reading=TRUSTED.model_copy(update={"head": HeadConfig(output=5)}))


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (
            "states",
            r"its code gives a Out without any of score, scores, .*; it is no reward model that can be read",
        ),
        ("nothing", r"its own code fails on a short pair: division by zero"),
    ],
)
def test_own_code_that_gives_no_reward_is_refused(reward_dir, tmp_path, gives, told):
    own = bring_code(reward_dir, tmp_path, gives)
    with pytest.raises(UserError, match=told):
        load_reward_model(own, reading=TRUSTED)


def test_own_code_of_which_weights_are_missing_is_refused_as_a_base_too(reward_dir, tmp_path):
    own = bring_code(reward_dir, tmp_path, "score")
    weights = load_file(own / WEIGHTS)
    for missing in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        kept = {name: weight for name, weight in weights.items() if name != missing}
        save_file(kept, own / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"has no weights for {missing}"):
            new_reward_model(RewardConfig(base=str(own), trust_remote_code=True), lambda: [])


def test_models_that_compare_two_responses_are_refused(reward_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for named in ({"architectures": ["DebertaV2PairRM"]}, {"ranker_type": "pairranker"}):
        (tmp_path / "model/config.json").write_text(json.dumps(config | named))
        with pytest.raises(UserError, match="compares two responses with each other"):
            load_reward_model(tmp_path / "model")
