"""Where a reward is read, whatever pads; and how long a sequence can be."""

import json

import numpy as np
import pytest
import torch
from support.made import make_pair, make_pairs
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import load_pair_tokenizer, load_reward_model, new_reward_model, save_reward_model
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.positions import counts_positions_from_pad, longest_sequence
from safer_ray.reward.text import both_sides
from safer_ray.reward.tiny_llama import train_tokenizer
from safer_ray.reward.training_steps import reward_step

ENDS_IN_EOS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}
ENCODER = SIZES["bert"]


def saved(directory, kind, *, pad, tokenizer_pad=None, more=(), spare=0, template=ENDS_IN_EOS, first="<s>", **values):
    """A random model whose texts end in EOS (`<end>`), with these ideas of a pad token."""
    made = json.loads(train_tokenizer(lambda: ["some text"], 300).backend_tokenizer.to_str().replace("<pad>", first))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<end>")
    tokenizer.add_tokens(list(more), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer_pad
    config_pad = {"eos": tokenizer.eos_token_id, "spare": len(tokenizer) + 2}.get(pad, pad)
    if isinstance(config_pad, str):
        config_pad = tokenizer.get_vocab()[config_pad]
    values = (
        SIZES.get(kind, {})
        | {"vocab_size": len(tokenizer) + spare, "pad_token_id": config_pad, "num_labels": 1}
        | values
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


@torch.inference_mode()
def plain_rewards(directory, sequences, pads=True):
    """By transformers alone: one by one, and all in a batch that the tokenizer pads."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    alone = torch.stack([model(input_ids=torch.from_numpy(ids)[None]).logits[0, 0] for ids in sequences])
    if pads:
        batch = tokenizer.pad({"input_ids": [ids.tolist() for ids in sequences]}, return_tensors="pt")
        torch.testing.assert_close(model(**batch).logits[:, 0], alone, rtol=1e-5, atol=1e-5)
    return alone


BASES = {
    "none": {"pad": None},
    "EOS in both": {"pad": "eos", "tokenizer_pad": "<end>"},
    "EOS in the tokenizer": {"pad": None, "tokenizer_pad": "<end>"},
    "EOS in the config": {"pad": "eos"},
    "EOS, and a reserved token": {"pad": "eos", "tokenizer_pad": "<end>", "more": ["<|reserved_special_token_0|>"]},
    "EOS, and spare rows": {"pad": "eos", "spare": 8},
    "no token": {"pad": "spare", "spare": 8},
    "negative": {"pad": -1},
    "its own": {"pad": 0, "tokenizer_pad": "<pad>", "first": "<pad>"},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("base", list(BASES))
def test_a_trained_model_is_read_where_it_is_trained_by_us_and_by_transformers(tmp_path, kind, base, caplog):
    caplog.set_level("INFO")
    tokenizer = saved(tmp_path / "base", kind, **BASES[base])
    reward = new_reward_model(RewardConfig(base=str(tmp_path / "base"), max_length=64), lambda: ["text"])
    reward.model.eval()
    pairs = reward.pairs(make_pairs(4).to_pylist())
    sequences = [side.ids for side in both_sides(pairs)]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in sequences)
    trained = reward_step(reward, pairs).margin
    found = forward_pairs(reward, pairs).rewards
    save_reward_model(reward, tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    exported = AutoTokenizer.from_pretrained(tmp_path / "trained")
    assert config["pad_token_id"] == exported.pad_token_id == reward.unread == reward.pad
    assert exported.pad_token_id != exported.eos_token_id
    assert not any((ids == exported.pad_token_id).any() for ids in sequences)
    assert config["vocab_size"] >= len(exported)
    torch.testing.assert_close(plain_rewards(tmp_path / "trained", sequences), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0::2] - found[1::2], trained, rtol=1e-4, atol=1e-5)
    again = load_reward_model(tmp_path / "trained")
    torch.testing.assert_close(forward_pairs(again, pairs).rewards, found, rtol=1e-5, atol=1e-5)
    told = [record.getMessage() for record in caplog.records if "has the pad token" in record.getMessage()]
    assert len(told) == (base != "its own")
    if "reserved" in base:
        (token,), pad, end = BASES[base]["more"], exported.pad_token_id, tokenizer.eos_token_id
        assert f"has the pad token {token!r} ({pad}), since its own ({end}) ends texts" in told[0]


def test_a_token_that_the_template_writes_is_no_pad_token(tmp_path):
    """Some templates end turns with what the tokenizer pads with, though EOS is another token."""
    template = ENDS_IN_EOS.replace("eos_token", "'<stop>'")
    saved(tmp_path, "llama", pad="<stop>", tokenizer_pad="<stop>", more=["<stop>"], template=template)
    reward = new_reward_model(RewardConfig(base=str(tmp_path), max_length=64), lambda: ["text"])
    assert reward.unread == reward.pairs.tokenizer.pad_token_id
    assert reward.pairs.tokenizer.pad_token == "<|pad|>"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("base", list(BASES))
def test_anybodys_model_is_read_where_plain_transformers_reads_it(tmp_path, kind, base):
    saved(tmp_path, kind, **BASES[base])
    reward = load_reward_model(tmp_path)
    pairs = reward.pairs(make_pairs(4).to_pylist())
    sequences = [side.ids for side in both_sides(pairs)]
    wanted = plain_rewards(tmp_path, sequences, pads=False)
    torch.testing.assert_close(forward_pairs(reward, pairs).rewards, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward(reward, sequences).rewards, wanted, rtol=1e-5, atol=1e-5)
    save_reward_model(reward, tmp_path / "copy")
    torch.testing.assert_close(plain_rewards(tmp_path / "copy", sequences, False), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_reward_is_the_heads_output_whatever_the_config_calls_it(tmp_path, problem):
    saved(tmp_path, "llama", pad=0, problem_type=problem)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        model.score.weight *= 20
    model.save_pretrained(tmp_path)
    reward = load_reward_model(tmp_path)
    pairs = reward.pairs(make_pairs(4).to_pylist())
    found = forward_pairs(reward, pairs).rewards
    assert found.abs().max() > 5
    wanted = plain_rewards(tmp_path, [side.ids for side in both_sides(pairs)], pads=False)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_an_encoder_keeps_its_pad_token(tmp_path):
    saved(tmp_path, "bert", pad=0, tokenizer_pad="<pad>", first="<pad>")
    reward = new_reward_model(RewardConfig(base=str(tmp_path), max_length=64), lambda: ["text"])
    assert (reward.pad, reward.unread, reward.pairs.tokenizer.pad_token) == (0, 0, "<pad>")


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta", "mpnet", "data2vec-text", "xmod"])
def test_positions_that_begin_behind_that_of_the_pad_token_limit_the_length(tmp_path, kind):
    """Whatever the model type is called."""
    values = ENCODER | {"vocab_size": 300, "max_position_embeddings": 40, "num_labels": 1, "pad_token_id": 3}
    config = AutoConfig.for_model(kind, **values, bos_token_id=1, eos_token_id=2)
    if kind == "xmod":
        config.default_language = "en_XX"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    train_tokenizer(lambda: ["some text"], 300).save_pretrained(tmp_path)
    reward = load_reward_model(tmp_path)
    wanted = 40 - 1 - config.pad_token_id
    assert reward.pairs.limit == load_pair_tokenizer(tmp_path).limit == wanted
    pair = make_pair("long", "words " * 99, "more " * 99, "other " * 99)
    assert torch.isfinite(forward_pairs(reward, reward.pairs([pair])).rewards).all()
    assert torch.isfinite(forward(reward, [np.full(wanted, 5), np.full(3, 5)]).rewards).all()


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart", "electra"])
def test_other_models_count_positions_from_none(kind):
    config = AutoConfig.for_model(kind)
    assert not counts_positions_from_pad(config)
    assert longest_sequence(config) == config.max_position_embeddings


ENDLESS = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    | {"max_position_embeddings": 16},
    "deberta-v2": ENCODER
    | {"relative_attention": True, "position_biased_input": False, "max_position_embeddings": 16}
    | {"position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
}


@pytest.mark.parametrize("kind", list(ENDLESS))
def test_a_model_that_knows_distances_alone_reads_sequences_of_any_length(tmp_path, kind):
    config = AutoConfig.for_model(kind, vocab_size=300, pad_token_id=0, num_labels=1, **ENDLESS[kind])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    train_tokenizer(lambda: ["some text"], 300).save_pretrained(tmp_path)
    reward = load_reward_model(tmp_path)
    assert longest_sequence(config) is None
    assert reward.pairs.limit > 10**6
    ids = [np.random.default_rng(0).integers(3, 300, 90), np.arange(3, 9)]
    with torch.inference_mode():
        wanted = torch.stack([model(input_ids=torch.from_numpy(own)[None]).logits[0, 0] for own in ids])
    torch.testing.assert_close(forward(reward, ids).rewards, wanted, rtol=1e-5, atol=1e-5)


UNPADDED = {
    "fnet": ENCODER | {"tpu_short_seq_length": 64},  # masks nothing
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},  # reads the last place
}


@pytest.mark.parametrize("kind", list(UNPADDED))
def test_a_model_whose_rewards_padding_moves_runs_sequences_one_by_one(tmp_path, kind, caplog):
    tokenizer = saved_as(tmp_path, kind, UNPADDED[kind])
    reward = load_reward_model(tmp_path)
    assert not reward.pads
    (told,) = [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    assert told.endswith("padding moves its rewards, so its sequences run one by one, which takes longer")
    pairs = reward.pairs(make_pairs(4).to_pylist())
    sequences = [side.ids for side in both_sides(pairs)]
    wanted = plain_rewards(tmp_path, sequences, pads=False)
    torch.testing.assert_close(forward_pairs(reward, pairs).rewards, wanted, rtol=1e-5, atol=1e-5)
    margin = reward_step(reward, pairs).margin
    torch.testing.assert_close(margin, wanted[0::2] - wanted[1::2], rtol=1e-4, atol=1e-5)
    assert tokenizer.pad_token_id == reward.pad
    with pytest.raises(UserError, match="sequences run one by one, so no layers can be frozen"):
        reward.freeze(1)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_masks_its_padding_runs_side_by_side(tmp_path, kind):
    saved_as(tmp_path, kind, SIZES[kind])
    assert load_reward_model(tmp_path).pads


def saved_as(directory, kind, sizes):
    return saved(directory, kind, pad=0, tokenizer_pad="<pad>", first="<pad>", **sizes)


def test_a_word_of_the_vocabulary_is_no_pad_token(tmp_path):
    """A word that became a special token would be cut out of the texts that hold it."""
    tokenizer = saved(tmp_path, "llama", pad="eos", tokenizer_pad="<end>")
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    first = len(made["model"]["vocab"]) - 3
    words = {token: number for token, number in made["model"]["vocab"].items() if number < first}
    merges = [merge for merge in made["model"]["merges"] if "".join(merge) in words]
    made["model"] |= {"vocab": words | {"pad": first, "reserved": first + 1, "unused": first + 2}, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    reward = new_reward_model(RewardConfig(base=str(tmp_path), max_length=64), lambda: [])
    assert reward.pairs.tokenizer.pad_token not in ("pad", "reserved", "unused")
    plain = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("A reserved pad.", "unused"):
        assert reward.pairs.tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert len(tokenizer)
