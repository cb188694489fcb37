"""Packed pairs give what plain transformers gives on their two sequences alone, for every family."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_types import COMMON, FAMILIES, MORE_PACKED, PAD, build

from safer_ray.reward import forward as forward_module
from safer_ray.reward import pretrained
from safer_ray.reward.dropout import disable_dropout, has_dropout
from safer_ray.reward.forward import can_pack_pair, forward_pairs, pack_to_train
from safer_ray.reward.loss import bradley_terry
from safer_ray.reward.packing import last_token, pack, pack_batch, smallest_window
from safer_ray.reward.text import PairTokens, Side
from safer_ray.reward.training_steps import reward_step
from safer_ray.reward.trunk import cached_trunk


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("LlamaConfig")


def pair(prompt, chosen, rejected, key="p"):
    def side(response):
        ids = np.array([*prompt, *response], dtype=np.int64)
        return Side(ids, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), False, len(prompt))

    return PairTokens(key, side(chosen), side(rejected))


def tokens(rng, n):
    return rng.integers(1, COMMON["vocab_size"], n).tolist()


def cases():
    rng = np.random.default_rng(0)
    long, short, one = tokens(rng, 90), tokens(rng, 7), tokens(rng, 1)
    same = tokens(rng, 12)
    return {
        "plain": pair(tokens(rng, 20), tokens(rng, 9), tokens(rng, 14)),
        "no prompt": pair([], tokens(rng, 9), tokens(rng, 4)),
        "one token each": pair(tokens(rng, 5), one, tokens(rng, 1)),
        "equal responses": pair(tokens(rng, 5), same, same),
        "one begins the other": pair(tokens(rng, 5), same, same[:4]),
        "equal beginnings": pair(tokens(rng, 5), [*same, *short], [*same, *one]),
        "long": pair(long, tokens(rng, 110), tokens(rng, 40)),
        "one token in all": pair([], one, tokens(rng, 1)),
        "pad inside": pair([3, PAD, 5], [7, 8, PAD], [9, PAD, 4]),
    }


@torch.inference_mode()
def plainly(model, ids, layer):
    """Reward and output of a block of one unpadded sequence, by transformers alone."""
    output = model.model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True)
    return output.logits[0, 0], output.hidden_states[layer][0]


def check(model, pairs, layer=3, budget=16_384):
    positions = [np.arange(len(side.ids)) for p in pairs for side in (p.chosen, p.rejected)]
    found = forward_pairs(model, pairs, layers=[layer], positions=positions, heads=True, budget=budget)
    early = forward_pairs(model, pairs, layers=[layer], positions=positions, rewards=False, budget=budget)
    assert early.rewards is None
    for i, side in enumerate(side for p in pairs for side in (p.chosen, p.rejected)):
        reward, hidden = plainly(model, side.ids, layer)
        torch.testing.assert_close(found.rewards[i], reward, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.hidden[i], hidden, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(early.hidden[i], hidden, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model.model.score(found.heads[i])[0], reward, rtol=1e-5, atol=1e-4)
    few = [at[[len(at) // 3, -1]] if i % 4 else at[:0] for i, at in enumerate(positions)]
    last = len(model.blocks())
    for asked in ({"layers": [layer], "rewards": False}, {"layers": [layer]}, {"layers": [1, last]}):
        thin = forward_pairs(model, pairs, positions=few, budget=budget, **asked)
        for i, side in enumerate(side for p in pairs for side in (p.chosen, p.rejected)):
            wanted = [plainly(model, side.ids, number)[1][few[i]] for number in asked["layers"] if number < last]
            torch.testing.assert_close(
                thin.hidden[i][:, : 32 * len(wanted)], torch.cat(wanted, -1), rtol=1e-5, atol=1e-4
            )


@pytest.mark.parametrize("case", list(cases()))
def test_a_packed_pair_is_its_two_sequences(model, case):
    check(model, [cases()[case]])


def test_a_batch_is_its_pairs(model):
    check(model, list(cases().values()))
    check(model, list(cases().values()), budget=64)


def gradients(model, loss):
    model.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["short", "all"])
def test_a_training_step_on_packed_pairs_has_the_gradients_of_plain_transformers(model, kind, checkpointing):
    """One sequence after another, without padding. Past a window, "all" run apart."""
    pairs = [p for p in cases().values() if kind == "all" or len(p.chosen.ids) <= 16 >= len(p.rejected.ids)]
    assert len(pairs) > 3
    assert (pack_to_train(model, pairs) is None) == ("window" in model.name and kind == "all")
    model.model.train()
    if checkpointing:
        model.model.activation_checkpointing_enable()
    try:
        step = reward_step(model, pairs)
        found = gradients(model, step.loss)
        sides = [[torch.from_numpy(side.ids)[None] for side in (p.chosen, p.rejected)] for p in pairs]
        margin = torch.stack(
            [model.model(input_ids=c).logits[0, 0] - model.model(input_ids=r).logits[0, 0] for c, r in sides]
        )
        wanted = gradients(model, bradley_terry(margin))
    finally:
        model.model.activation_checkpointing_disable()
        model.model.eval()
    torch.testing.assert_close(step.margin, margin.detach(), rtol=1e-4, atol=1e-4)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", list(MORE_PACKED))
def test_other_causal_models_take_packed_pairs(name):
    """Whole models; `test_a_packed_pair_is_its_two_sequences` goes into detail for those that are known best."""
    model, window = build(name), name.endswith("window")
    assert can_pack_pair(model, cases()["plain"]) == (not window)
    check(model, list(cases().values()))
    test_a_training_step_on_packed_pairs_has_the_gradients_of_plain_transformers(model, "short", checkpointing=False)


def test_every_family_that_is_packed_is_tried():
    tried = {build(name).model.config.model_type for name in FAMILIES | MORE_PACKED}
    assert tried == set(pretrained.FAMILIES)


@pytest.mark.parametrize("name", ["residual_dropout", "layerdrop", "attention_dropout", "dropout"])
def test_dropout_is_seen_and_disabled_whatever_a_class_calls_its_rate(name):
    model = build("Starcoder2Config").model
    assert not has_dropout(model)
    setattr(model.base_model.layers[1].mlp, name, 0.1)
    assert has_dropout(model)
    disable_dropout(model)
    assert not has_dropout(model)


def test_with_dropout_the_sides_of_a_pair_are_trained_on_apart():
    model = build("LlamaConfig")
    pairs = [cases()["plain"]]
    model.model.train()
    assert pack_to_train(model, pairs) is not None
    for module in model.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert pack_to_train(model, pairs) is None
    model.model.eval()
    assert pack_to_train(model, pairs) is not None


def test_a_batch_whose_mask_would_fill_the_memory_is_trained_on_apart(llama, monkeypatch):
    pairs = [cases()["plain"], cases()["long"]]
    width = max(len(pack(p.chosen.ids, p.rejected.ids).ids) for p in pairs)
    monkeypatch.setattr(forward_module, "MASK", 2 * width**2)
    assert pack_to_train(llama, pairs) is not None
    monkeypatch.setattr(forward_module, "MASK", 2 * width**2 - 1)
    assert pack_to_train(llama, pairs) is None


@pytest.mark.parametrize("rewards", [True, False])
def test_the_last_blocks_feed_forward_part_runs_on_what_is_looked_at_alone(llama, rewards):
    pairs = [cases()["plain"], cases()["long"]]
    ran: dict[int, int] = {}

    def count(n):
        return lambda module, given, output: ran.update({n: ran.get(n, 0) + given[0].shape[:-1].numel()})

    handles = [block.mlp.register_forward_hook(count(n)) for n, block in enumerate(llama.blocks(), 1)]
    forward_pairs(llama, pairs, layers=[2], positions=[np.array([2])] * 4, rewards=rewards)
    for handle in handles:
        handle.remove()
    last = len(llama.blocks()) if rewards else 2
    assert sorted(ran) == list(range(1, last + 1))
    assert ran.pop(last) == 4
    assert set(ran.values()) == {2 * (90 + 110 + 40)}  # padded


def test_threads_side_by_side_give_what_one_gives(model, monkeypatch):
    pairs = [p._replace(pair_id=str(i)) for i, p in enumerate(list(cases().values()) * 4)]
    positions = [np.array([0, len(side.ids) - 1]) for p in pairs for side in (p.chosen, p.rejected)]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(forward_pairs(model, pairs, layers=[2], positions=positions, heads=True, budget=256))
        monkeypatch.undo()
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0].rewards, found[1].rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].heads, found[1].heads, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].hidden, found[1].hidden, rtol=1e-5, atol=1e-5)


def test_pairs_past_the_window_run_apart(model):
    window = smallest_window(model.model.config)
    for one in cases().values():
        assert can_pack_pair(model, one) == (
            window is None or max(len(one.chosen.ids), len(one.rejected.ids)) <= window
        )


def test_a_window_is_that_of_the_shortest_sighted_layer():
    windows = {name: smallest_window(build(name).model.config) for name in FAMILIES}
    assert {name for name, window in windows.items() if window == 16} == {n for n in FAMILIES if n.endswith("window")}
    assert windows["LlamaConfig"] is windows["MistralConfig"] is windows["Qwen2Config"] is None
    assert windows["Gemma2Config"] == 256


def test_the_responses_do_not_see_each_other(llama):
    """Another rejected response changes nothing of the chosen side."""
    rng = np.random.default_rng(1)
    prompt, chosen = tokens(rng, 6), tokens(rng, 8)
    first, second = (pair(prompt, chosen, tokens(rng, 8)) for _ in range(2))
    rewards = [forward_pairs(llama, [p]).rewards for p in (first, second)]
    torch.testing.assert_close(rewards[0][0], rewards[1][0], rtol=1e-5, atol=1e-5)
    assert abs(rewards[0][1] - rewards[1][1]) > 1e-3


def test_a_packed_pair_is_as_long_as_what_its_sides_do_not_share(llama, monkeypatch):
    rng = np.random.default_rng(2)
    one = pair(tokens(rng, 30), [1, *tokens(rng, 4)], [2, *tokens(rng, 6)])
    widths = []
    handle = llama.model.base_model.register_forward_pre_hook(
        lambda m, a, k: widths.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    forward_pairs(llama, [one])
    handle.remove()
    assert widths == [(1, 30 + 5 + 7)]


def test_a_model_that_looks_ahead_runs_apart():
    model = build("Gemma3TextConfig")
    assert can_pack_pair(model, cases()["plain"])
    model.model.config.use_bidirectional_attention = True
    assert not can_pack_pair(model, cases()["plain"])


def test_an_encoder_reads_its_sides_apart(bert_dir):
    from support.made import make_pairs

    from safer_ray.reward.checkpoints import load_reward_model

    reward = load_reward_model(bert_dir)
    pairs = reward.pairs(make_pairs(3).to_pylist())
    assert not any(can_pack_pair(reward, p) for p in pairs)
    sides = [p._replace(rejected=p.chosen) for p in pairs] + [p._replace(chosen=p.rejected) for p in pairs]
    alone = forward_pairs(reward, sides).rewards
    torch.testing.assert_close(forward_pairs(reward, pairs).rewards.view(-1, 2), alone.view(2, -1, 2)[:, :, 0].T)


def test_where_the_trunk_is_remembered_pairs_run_apart(llama):
    one = cases()["plain"]
    frozen = replace(llama, frozen_layers=2)
    assert can_pack_pair(frozen, one)
    with cached_trunk():
        assert not can_pack_pair(frozen, one)
        rewards = forward_pairs(frozen, [one]).rewards
    torch.testing.assert_close(rewards, forward_pairs(llama, [one]).rewards, rtol=1e-5, atol=1e-5)


SEQUENCE = st.lists(st.integers(1, COMMON["vocab_size"] - 1), min_size=1, max_size=12)
PAIR = st.tuples(st.lists(st.integers(1, COMMON["vocab_size"] - 1), max_size=9), SEQUENCE, SEQUENCE)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 59), max_size=9), SEQUENCE, SEQUENCE), min_size=1, max_size=6),
    st.integers(16, 200),
)
def test_results_do_not_depend_on_batches(llama, drawn, budget):
    pairs = [pair(*texts) for texts in drawn]
    together = forward_pairs(llama, pairs, budget=budget).rewards
    alone = torch.cat([forward_pairs(llama, [p]).rewards for p in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(SEQUENCE, SEQUENCE)
def test_packing_loses_no_token(chosen, rejected):
    packed = pack(np.array(chosen), np.array(rejected))
    for side, ids in enumerate((chosen, rejected)):
        at = packed.columns(side, np.arange(len(ids)))
        assert packed.ids[at].tolist() == ids
        assert packed.position_ids[at].tolist() == list(range(len(ids)))


def test_the_mask_is_a_float_one():
    batch = pack_batch([pack(np.array([1, 2, 3]), np.array([1, 4]))], PAD, torch.device("cpu"), torch.float32)
    seen = batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"].dtype == torch.float32
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, False, False, True],
    ]


def test_the_last_token_is_the_last_that_is_no_padding():
    assert last_token(np.array([5, 6, PAD]), PAD) == 1
    assert last_token(np.array([PAD]), PAD) == 0
    assert last_token(np.array([5, 6, PAD]), None) == 2
