"""Models that packed pairs or batches may make read a sequence otherwise than plain transformers reads it alone."""

import numpy as np
import pytest
import torch
from support.made import make_pair
from support.model_types import COMMON
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification

from safer_ray.config.sections import RewardConfig
from safer_ray.features.encoder import Encoder
from safer_ray.reward.by_length import forget_last_sequence, reads_otherwise_past
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.text import both_sides
from safer_ray.reward.tiny_llama import train_tokenizer
from safer_ray.reward.training_steps import reward_step
from safer_ray.storage.work import Part

WORDS = "some text that is long enough to be read otherwise "
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE |= {"original_max_position_embeddings": 32, "rope_theta": 100.0}
SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
KINDS = {
    "llama": {"is_causal": False},
    "qwen2": {"is_causal": False},
    "mistral": {"is_causal": False, "sliding_window": None},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "hidden_act": "gelu"},
    "bart": SMALL,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}
PAIRS = [
    make_pair("short", "a", "b", "c"),
    make_pair("long", "a", WORDS * 3, "no"),
    make_pair("middle", WORDS, "</s> yes", WORDS),
]
ALONE = ("phi3", "big_bird")


def save(directory, kind):
    tokenizer = train_tokenizer(lambda: [WORDS], 300)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    end = tokenizer.eos_token_id
    if kind in ("bart", "t5"):
        ends = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)])
        tokenizer.backend_tokenizer.post_processor = ends
    values = COMMON | {"vocab_size": end + 9, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": end}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **values | KINDS[kind]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.inference_mode()
def plain(directory, sequences, layer=0):
    """Rewards of a model opened anew for each sequence, or what its block `layer` gives."""
    found = []
    for ids in sequences:
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        given = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=bool(layer))
        found.append(given.hidden_states[layer][0] if layer else given.logits[0, 0])
    return found


@pytest.fixture(scope="module", params=list(KINDS))
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save(directory, request.param)
    return request.param, directory


def test_rewards_are_those_of_plain_transformers_one_by_one(saved, caplog):
    kind, directory = saved
    reward = load_reward_model(directory)
    assert reward.pads == (kind not in ALONE)
    told = [record.getMessage() for record in caplog.records if "run one by one" in record.getMessage()]
    assert len(told) == (kind in ALONE)
    pairs = reward.pairs(PAIRS)
    sequences = [side.ids for side in both_sides(pairs)]
    found = forward_pairs(reward, pairs).rewards
    wanted = torch.stack(plain(directory, sequences))
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward(reward, sequences[::-1]).rewards, wanted.flip(0), rtol=1e-5, atol=1e-5)


def test_training_reads_as_plain_transformers_does(saved):
    _, directory = saved
    reward = new_reward_model(RewardConfig(base=str(directory), max_length=128), lambda: ["text"])
    reward.model.eval()
    pairs = reward.pairs(PAIRS)
    margin = reward_step(reward, pairs).margin
    wanted = torch.stack(plain(directory, [side.ids for side in both_sides(pairs)]))
    torch.testing.assert_close(margin, wanted[0::2] - wanted[1::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_activations_are_those_of_plain_transformers_in_parts_and_up_to_a_layer(tmp_path, kind):
    save(tmp_path, kind)
    early = Encoder.load(tmp_path, 2, rewards=False).reward
    assert len(early.blocks()) == 2
    pairs = early.pairs(PAIRS)
    sequences = [side.ids for side in both_sides(pairs)]
    everywhere = [np.arange(len(ids)) for ids in sequences]
    wanted = plain(tmp_path, sequences, layer=2)
    found = forward_pairs(early, pairs, layers=(2,), positions=everywhere, rewards=False).hidden
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    first, last = (load_reward_model(tmp_path, part=Part(index, 2)) for index in range(2))
    before = forward_pairs(first, pairs, rewards=False, states=True)
    both = forward_pairs(last, pairs, before=before).rewards
    torch.testing.assert_close(both, torch.stack(plain(tmp_path, sequences)), rtol=1e-5, atol=1e-5)


def test_texts_too_short_to_change_anything_run_side_by_side(tmp_path, caplog):
    save(tmp_path, "phi3")
    reward = new_reward_model(RewardConfig(base=str(tmp_path), max_length=32), lambda: ["text"])
    assert reward.pads
    assert "one by one" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        ("phi3", COMMON | KINDS["phi3"], 32),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}, 2048),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}, None),
        ("big_bird", {"block_size": 4, "num_random_blocks": 1}, 28),
        ("big_bird", {"attention_type": "original_full"}, None),
        ("bert", {}, None),
    ],
)
def test_the_length_that_changes_how_a_model_reads_is_in_its_config(kind, values, wanted):
    assert reads_otherwise_past(AutoConfig.for_model(kind, **values)) == wanted


@torch.inference_mode()
def test_positions_that_grow_with_a_long_text_are_those_of_the_next_text_again():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    config = AutoConfig.for_model("llama", **COMMON | {"max_position_embeddings": 16, "rope_parameters": rope})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.2) if weight.ndim > 1 else None
    longest, long = torch.arange(1, 51)[None], torch.arange(1, 31)[None]
    first = model(input_ids=long).logits
    model(input_ids=longest)
    assert not torch.allclose(model(input_ids=long).logits, first, atol=1e-4)
    forget_last_sequence(model)
    torch.testing.assert_close(model(input_ids=long).logits, first)
