"""A frozen trunk: trained behind it, models are what they would be if it had run every time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.made import make_pairs

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model
from safer_ray.reward.forward import forward, trunk_states
from safer_ray.reward.packing import unpacked
from safer_ray.reward.text import both_sides
from safer_ray.reward.train import train_reward
from safer_ray.reward.training_steps import KnownStates, reward_step
from safer_ray.reward.trunk import cached_trunk
from safer_ray.storage.work import TrainJob


@pytest.fixture
def model(model_dir):
    return load_reward_model(model_dir)


def tokens(model, n=6):
    return model.pairs(make_pairs(n).to_pylist())


def sides(batch):
    return [side.ids for side in both_sides(batch)]


def rows_of(batch):
    return [unpacked(side.ids, side.types) for side in both_sides(batch)]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_step_behind_known_states_has_the_loss_and_the_gradients_of_a_whole_one(model, layer):
    model = model.freeze(layer)
    batch = tokens(model)
    found = []
    states = trunk_states(model, rows_of(batch))
    known = KnownStates(layer, [states[2 * i + side] for side in (0, 1) for i in range(len(batch))])
    for given in (None, known):
        model.model.zero_grad()
        step = reward_step(model, batch, known=given)
        step.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
        found.append((step, gradients))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert set(found[1][1]) == set(found[0][1])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_what_is_frozen_is_what_comes_before(model):
    model = model.freeze(2)
    free = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert not any("embed" in name or ".0." in name or ".1." in name for name in free)
    assert any(".2." in name for name in free)
    assert any("score" in name or "classifier" in name for name in free)


def test_behind_known_states_no_frozen_block_runs_and_afterwards_all_do(model):
    model = model.freeze(2)
    batch = tokens(model)
    before = reward_step(model, batch).margin
    ran = []
    handles = [block.register_forward_hook(lambda m, i, o: ran.append(len(i))) for block in model.blocks()]
    states = trunk_states(model, rows_of(batch))
    wrong = KnownStates(2, [torch.zeros_like(states[2 * i + side]) for side in (0, 1) for i in range(len(batch))])
    assert not torch.allclose(reward_step(model, batch, known=wrong).margin, before)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(reward_step(model, batch).margin, before)


def test_a_trunk_longer_than_the_model_is_refused(model):
    with pytest.raises(UserError, match="layer 4 lies past the 3 layers"):
        model.freeze(4)


def train(base: Path, pairs: Path, out: Path, **options):
    config = RewardConfig(
        base=str(base), max_length=96, epochs=2, batch_size=8, micro_batch_size=4, learning_rate=1e-3,
        validation_percent=20, evaluations=2, **options,
    )  # fmt: skip
    out.mkdir()
    (metrics,) = LocalRunner().train([TrainJob("reward", train_reward, {"pairs": pairs, "config": config}, out)])
    return metrics, load_file(out / "model.safetensors")


def test_training_leaves_the_trunk_as_it_was_and_is_that_of_a_trunk_that_runs(
    reward_dir, pairs_dir, tmp_path, monkeypatch
):
    metrics, cached = train(reward_dir, pairs_dir, tmp_path / "cached", frozen_layers=2)
    base = load_file(reward_dir / "model.safetensors")
    for name, tensor in cached.items():
        frozen = "embed" in name or "layers.0." in name or "layers.1." in name
        assert torch.equal(tensor, base[name]) == frozen, name
    assert metrics["frozen_layers"] == 2
    monkeypatch.setattr("safer_ray.reward.train._Batches.known", lambda self, rows: None)
    _, whole = train(reward_dir, pairs_dir, tmp_path / "whole", frozen_layers=2)
    for name, tensor in cached.items():
        # States are rounded to half precision: a gradient that is nearly zero may turn, and with it a step of Adam.
        assert (tensor - whole[name]).abs().mean() < 1e-5
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=5e-3)


def test_a_remembered_trunk_runs_once_a_text_and_changes_nothing(model):
    model = model.freeze(2)
    sequences = sides(tokens(model))
    places = [np.arange(len(s)) for s in sequences]
    asked = {"layers": [3], "positions": places}
    before, heads = forward(model, sequences, **asked), forward(model, sequences, rewards=False, heads=True).heads
    below = forward(model, sequences, layers=[1], positions=places)
    ran = []

    def note(block, inputs):
        if "forward" not in vars(block):  # no known states in its place
            ran.append(len(inputs[0]))

    model.blocks()[0].register_forward_pre_hook(note)
    with cached_trunk() as memory:
        for _ in range(2):
            after = forward(model, sequences, **asked)
            torch.testing.assert_close(after.rewards, before.rewards, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(after.hidden, before.hidden, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                forward(model, sequences, rewards=False, heads=True).heads, heads, rtol=1e-5, atol=1e-5
            )
        assert sum(ran) == len({s.tobytes() for s in sequences})
        assert memory.used == 4 * 32 * sum(len(s) for s in {s.tobytes(): s for s in sequences}.values())
        torch.testing.assert_close(forward(model, sequences, layers=[1], positions=places).hidden, below.hidden)
    ran.clear()
    forward(model, sequences)
    assert sum(ran) == len(sequences)


def test_another_trunk_is_not_taken_for_this_one(model, model_dir):
    one, other = model.freeze(2), load_reward_model(model_dir).freeze(2)
    rows = rows_of(tokens(one))
    assert one.trunk_key == other.trunk_key
    with torch.no_grad():
        other.trunk_parameters()[0].add_(0.1)
    changed = replace(other)
    assert changed.trunk_key != one.trunk_key
    with cached_trunk():
        trunk_states(one, rows)
        assert not torch.allclose(trunk_states(changed, rows)[0], trunk_states(one, rows)[0])


def test_a_full_memory_takes_no_more_and_answers_all_the_same(model):
    model = model.freeze(2)
    rows = rows_of(tokens(model))
    with cached_trunk(gigabytes=2e-5) as memory:
        found = trunk_states(model, rows)
    assert 0 < memory.used <= 2e4
    assert [len(states) for states in found] == [len(row.ids) for row in rows]
    for ours, theirs in zip(found, trunk_states(model, rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_training_on_a_remembered_trunk_is_training_on_one(reward_dir, pairs_dir, tmp_path):
    _, alone = train(reward_dir, pairs_dir, tmp_path / "alone", frozen_layers=2)
    with cached_trunk():
        train(reward_dir, pairs_dir, tmp_path / "first", frozen_layers=2)
        _, second = train(reward_dir, pairs_dir, tmp_path / "second", frozen_layers=2)
    for name, tensor in alone.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-4)
    assert load_reward_model(tmp_path / "second").frozen_layers == 2


def test_dropout_is_off_unless_it_is_wanted(bert_dir):
    for disabled in (True, False):
        config = RewardConfig(base=str(bert_dir), disable_dropout=disabled)
        model = new_reward_model(config, list).model
        rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert (rates == {0.0}) == disabled


def test_the_head_reads_what_makes_the_reward(model):
    sequences = [side.ids for t in tokens(model) for side in (t.chosen, t.rejected)]
    read = forward(model, sequences, rewards=False, heads=True, budget=100).heads
    head = model.model.score if hasattr(model.model, "score") else model.model.classifier
    with torch.inference_mode():
        rewards = head(read)[:, 0]
    torch.testing.assert_close(rewards, forward(model, sequences).rewards, rtol=1e-5, atol=1e-6)
    assert not np.isnan(read.numpy()).any()


def test_a_model_made_on_the_spot_has_no_trunk_worth_keeping():
    with pytest.raises(ValueError, match="frozen_layers needs a pretrained base"):
        RewardConfig(frozen_layers=1)
