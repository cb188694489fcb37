"""A frozen trunk: trained behind it, models are what they would be if it had run every time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs
from safetensors.torch import load_file

from safer_ray.config import RewardConfig
from safer_ray.errors import UserError
from safer_ray.reward import load_reward_model
from safer_ray.runner import LocalRunner, TrainJob
from safer_ray.train_reward import train_reward, trunk_states
from safer_ray.training import KnownStates, reward_step


@pytest.fixture
def model(model_dir):
    return load_reward_model(model_dir)


def tokens(model, n=6):
    return model.pairs(make_pairs(n).to_pylist())


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_step_behind_known_states_has_the_loss_and_the_gradients_of_a_whole_one(model, layer):
    model.freeze(layer)
    batch = tokens(model)
    found = []
    states = trunk_states(model, batch, layer)
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
    model.freeze(2)
    free = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert not any("embed" in name or ".0." in name or ".1." in name for name in free)
    assert any(".2." in name for name in free)
    assert any("score" in name or "classifier" in name for name in free)


def test_behind_known_states_no_frozen_block_runs_and_afterwards_all_do(model):
    batch = tokens(model)
    before = reward_step(model, batch).margin
    ran = []
    handles = [block.register_forward_hook(lambda m, i, o: ran.append(len(i))) for block in model.blocks()]
    states = trunk_states(model, batch, 2)
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
    monkeypatch.setattr("safer_ray.train_reward._Batches.known", lambda self, rows: None)
    _, whole = train(reward_dir, pairs_dir, tmp_path / "whole", frozen_layers=2)
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4)  # as in test_ray_train


def test_the_head_reads_what_makes_the_reward(model):
    sequences = [side.ids for t in tokens(model) for side in (t.chosen, t.rejected)]
    read = model.head_inputs(sequences, budget=100)
    head = model.model.score if hasattr(model.model, "score") else model.model.classifier
    with torch.inference_mode():
        rewards = head(read)[:, 0]
    torch.testing.assert_close(rewards, model.forward(sequences).rewards, rtol=1e-5, atol=1e-6)
    assert not np.isnan(read.numpy()).any()


def test_a_model_made_on_the_spot_has_no_trunk_worth_keeping():
    with pytest.raises(ValueError, match="frozen_layers needs a pretrained base"):
        RewardConfig(frozen_layers=1)
