"""A pass that goes on from a block's output is the whole pass, for blocks of every form."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from safer_ray.reward import trunk
from safer_ray.reward.execution import rewards_of
from safer_ray.reward.forward import forward, trunk_states
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import unpacked
from safer_ray.reward.trunk import start_after

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60, "num_labels": 1}
DEBERTA = {
    **{"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    **{"norm_rel_ebd": "layer_norm", "position_biased_input": False, "pooler_hidden_size": 32, "type_vocab_size": 0},
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60, "num_labels": 1, "n_positions": 64}
BART = {
    **{"d_model": 32, "decoder_layers": 3, "encoder_layers": 2, "decoder_attention_heads": 4, "vocab_size": 60},
    **{"encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "num_labels": 1, "eos_token_id": 2},
}
TYPES = {
    "bert": SIZE,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60, "num_labels": 1},
    "ctrl": {**GPT, "dff": 48},
    "deberta": {**SIZE, **DEBERTA, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**SIZE, **DEBERTA, "conv_kernel_size": 3},
    "electra": {**SIZE, "embedding_size": 32},
    "falcon": SIZE,
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "llama": {**SIZE, "intermediate_size": 48},
    "longformer": {**SIZE, "attention_window": 8, "pad_token_id": 1, "max_position_embeddings": 66},
    "modernbert": {**SIZE, "intermediate_size": 48, "global_attn_every_n_layers": 2, "local_attention": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 60, "max_seq_len": 64, "num_labels": 1},
    "openai-gpt": GPT,
    "roformer": SIZE,
}
GIVE_MORE = ("bloom", "gptj", "mpt", "roformer")  # attention weights, whether asked for or not


def made(kind, values):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, **values})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)

    class Pairs:
        class tokenizer:  # noqa: N801
            pad_token_id = config.pad_token_id

    return RewardModel(model, Pairs(), kind, pad=config.pad_token_id, unread=config.pad_token_id)


@pytest.mark.parametrize("kind", list(TYPES))
def test_a_pass_behind_a_block_is_the_whole_pass(kind, monkeypatch):
    monkeypatch.setattr(trunk, "_seen", {})
    model = made(kind, TYPES[kind])
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, 60, n) for n in (5, 11, 8)]
    rows = [unpacked(ids) for ids in sequences]
    wanted = forward(model, sequences).rewards
    assert len({round(float(reward), 3) for reward in wanted}) == 3
    everywhere = [np.arange(len(ids)) for ids in sequences]
    for layer in (1, 2, 3, 2):
        states = forward(model, sequences, layers=[layer], positions=everywhere, rewards=False).hidden
        with start_after(model, layer, pad_sequence(states, batch_first=True)), torch.no_grad():
            torch.testing.assert_close(rewards_of(model, rows), wanted, rtol=1e-4, atol=1e-4)
        other = [state.flip(0) for state in states]
        with start_after(model, layer, pad_sequence(other, batch_first=True)), torch.no_grad():
            assert not torch.allclose(rewards_of(model, rows), wanted, atol=1e-3)
    runs = {type(block) for block in model.blocks()}.isdisjoint(trunk._seen)
    assert runs == (kind in GIVE_MORE)


@pytest.mark.parametrize("kind", ["falcon", "longformer", "llama"])
def test_behind_a_trunk_no_block_of_it_runs_from_the_first_pass_on(kind, monkeypatch):
    monkeypatch.setattr(trunk, "_seen", {})
    model = made(kind, TYPES[kind]).freeze(2)
    sequences = [np.arange(3, 12), np.arange(20, 26)]
    states = trunk_states(model, [unpacked(ids) for ids in sequences])
    ran = []
    for block in model.blocks():
        for name, module in block.named_modules():
            if name and not list(module.children()):
                module.register_forward_hook(lambda module, inputs, output, block=block: ran.append(block))
    with start_after(model, 2, pad_sequence(states, batch_first=True)), torch.no_grad():
        rewards_of(model, [unpacked(ids) for ids in sequences])
    assert set(ran) == {model.blocks()[2]}


def test_blocks_that_give_more_than_states_run(monkeypatch):
    """What comes with the states is theirs, and the states behind the last of them are those that are given."""
    monkeypatch.setattr(trunk, "_seen", {})

    class Block(torch.nn.Module):
        def forward(self, hidden, bias):
            bias = hidden.sum() if bias is None else bias
            return hidden + 1, bias

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block(), Block()])

        def forward(self, hidden):
            bias = None
            for layer in self.layers:
                hidden, bias = layer(hidden, bias)
            return hidden + bias

    model = Model()
    model.base_model = model

    class Reward:
        def blocks(self):
            return model.layers

    hidden, states = torch.ones(1, 2, 3), torch.full((1, 2, 3), 5.0)
    for _ in range(2):
        with start_after(Reward(), 2, states):
            assert torch.equal(model(hidden), torch.full((1, 2, 3), 5.0 + 1 + 6))
