"""Reward training: learns, resumes exactly, splits by prompt."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TINY, make_pairs, write_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from safer_ray import train_reward as module
from safer_ray.config import RewardConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward import load_reward_model, new_reward_model
from safer_ray.train_reward import _one_step, pair_texts, train_reward, validation_split
from safer_ray.training import (
    TorchEngine,
    bradley_terry,
    bucketed_batches,
    load_checkpoint,
    reward_step,
    save_checkpoint,
    warmup_cosine,
    warmup_decay,
)

CONFIG = RewardConfig(
    base=TINY,
    max_length=96,
    epochs=5,
    batch_size=8,
    micro_batch_size=8,
    learning_rate=3e-3,
    validation_percent=25,
    evaluations=3,
)


class Killed(Exception):  # noqa: N818
    """Stands for a kill in the middle of training."""


@pytest.fixture
def folders(tmp_path):
    def folders(name):
        state = tmp_path / name / "state"
        state.mkdir(parents=True)
        return tmp_path / name / "out", state

    return folders


@pytest.fixture(scope="module")
def trained(pairs_dir, tmp_path_factory):
    """The undisturbed run: its folder and metrics."""
    out = tmp_path_factory.mktemp("trained")
    (out / "state").mkdir()
    return out / "out", train_reward(pairs_dir, out / "out", out / "state", CONFIG)


def test_training_learns_an_easy_rule(trained, pairs):
    out, metrics = trained
    assert metrics["validation_accuracy"] > 0.9
    losses = [entry["loss"] for entry in metrics["history"]]
    assert losses[-1] < losses[0] / 2 < 0.4
    assert metrics["train_pairs"] + metrics["validation_pairs"] == len(pairs)
    assert metrics["steps"] == 5 * -(-metrics["train_pairs"] // 8)
    reward = load_reward_model(out)
    tokens = reward.pairs(make_pairs(60).slice(50).to_pylist())  # not among the 48 it was trained on
    rewards = reward.forward([s.ids for t in tokens for s in (t.chosen, t.rejected)]).rewards
    assert (rewards[0::2] > rewards[1::2]).all()


@pytest.mark.parametrize("step", [1, 7, 19])
def test_a_killed_run_resumes_to_the_same_weights(trained, pairs_dir, folders, monkeypatch, step):
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    out, state = folders("killed")

    def die(done, total):
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        train_reward(pairs_dir, out, state, CONFIG, die)
    assert not out.exists()
    seen = []
    metrics = train_reward(pairs_dir, out, state, CONFIG, lambda done, total: seen.append(done))
    assert seen[0] == step
    wanted = load_file(trained[0] / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {k: v for k, v in metrics.items() if k != "train_seconds"} == trained[1]


def test_a_finished_run_only_exports_again(trained, pairs_dir, folders):
    out, state = folders("again")
    train_reward(pairs_dir, out, state, CONFIG)
    steps = []
    train_reward(pairs_dir, out, state, CONFIG, lambda done, total: steps.append(done))
    assert steps == []


@pytest.fixture
def fresh(pairs):
    def fresh():
        return new_reward_model(CONFIG, lambda: pair_texts(pairs))

    return fresh


def gradients(reward, batch, micro):
    config = CONFIG.model_copy(update={"micro_batch_size": micro})
    engine = TorchEngine(reward.model, learning_rate=1e-3)
    loss = _one_step(reward, engine, config, batch)
    return loss, [p.grad.clone() for p in reward.model.parameters() if p.grad is not None]


def test_micro_batches_give_the_same_gradients(fresh, pairs):
    results = []
    for micro in (7, 2):
        reward = fresh()
        results.append(gradients(reward, reward.pairs(pairs.slice(0, 7).to_pylist()), micro))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_losses(pairs_dir, folders):
    histories = []
    for checkpointing in (False, True):
        config = CONFIG.model_copy(update={"gradient_checkpointing": checkpointing, "epochs": 1, "evaluations": 5})
        histories.append(train_reward(pairs_dir, *folders(f"{checkpointing}"), config)["history"])
    losses = [[entry["loss"] for entry in history] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_is_bradley_terrys(fresh, pairs):
    reward = fresh()
    batch = reward.pairs(pairs.slice(0, 4).to_pylist())
    step = reward_step(reward, batch)
    rewards = [reward.forward([t.chosen.ids, t.rejected.ids]).rewards for t in batch]
    margin = torch.stack([r[0] - r[1] for r in rewards])
    torch.testing.assert_close(step.margin, margin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.loss.detach(), torch.log(1 + torch.exp(-margin)).mean(), rtol=1e-4, atol=1e-5)
    assert bradley_terry(torch.zeros(3)) == pytest.approx(np.log(2))
    assert bradley_terry(torch.tensor([5.0])) < bradley_terry(torch.tensor([-5.0]))


def test_a_nan_loss_ends_training_with_the_remedy(pairs_dir, folders, monkeypatch):
    monkeypatch.setattr(module, "_one_step", lambda *a: float("nan"))
    out, state = folders("nan")
    with pytest.raises(SaferError, match=r"the loss is nan at step 0; lower reward.learning_rate"):
        train_reward(pairs_dir, out, state, CONFIG)


@pytest.mark.parametrize("keep", [0, 1])
def test_no_pairs_left_is_an_error(pairs, tmp_path, keep):
    from safer_ray.artifacts import part_name, write_parquet

    write_parquet(pairs.slice(0, keep), tmp_path / "pairs" / part_name(0))
    with pytest.raises(UserError, match=rf"reward: no pairs left to train on \({keep} in .*check sources"):
        train_reward(tmp_path / "pairs", tmp_path / "out", tmp_path, CONFIG)


def test_without_held_out_pairs_the_training_pairs_are_measured(pairs, folders, tmp_path):
    out, state = folders("none")
    config = CONFIG.model_copy(update={"validation_percent": 0.0, "epochs": 0.5})
    metrics = train_reward(write_parts(pairs.slice(0, 8), tmp_path / "few", 8), out, state, config)
    assert metrics["validation_pairs"] == 0
    assert metrics["steps"] == 1


@given(st.lists(st.text(max_size=4), max_size=60), st.floats(0, 50), st.integers(0, 5))
def test_the_split_keeps_groups_together(groups, percent, seed):
    held = validation_split(groups, percent, seed)
    assert held.shape == (len(groups),)
    for group in set(groups):
        assert len({bool(h) for h, g in zip(held, groups, strict=True) if g == group}) == 1


def test_the_split_takes_about_its_share():
    held = validation_split([str(i) for i in range(4000)], 10, 0)
    assert 0.08 < held.mean() < 0.12
    assert not validation_split(["a", "b"], 0, 0).any()


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_index_once(lengths, size, seed, epoch):
    lengths = np.array(lengths)
    batches = list(bucketed_batches(lengths, size, seed, epoch, window=3))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(b) <= size for b in batches)
    assert len(batches) >= -(-len(lengths) // size)
    again = list(bucketed_batches(lengths, size, seed, epoch, window=3))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_differ_and_batches_hold_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 500, 640)
    first, second = (list(bucketed_batches(lengths, 8, 0, epoch)) for epoch in (0, 1))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert np.mean([np.ptp(lengths[b]) for b in first]) < 100


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_schedules_stay_in_the_unit_interval(total, warmup, decay):
    for step in {0, total // 3, total // 2, total - 1}:
        assert 0 <= warmup_cosine(step, total, warmup) <= 1
        assert 0 < warmup_decay(step, total, warmup, decay) <= 1


def test_schedules_do_not_jump():
    cosine = np.array([warmup_cosine(s, 1000, 0.05) for s in range(1000)])
    linear = np.array([warmup_decay(s, 1000, 0.05, 0.2) for s in range(1000)])
    for values in (cosine, linear):
        assert np.abs(np.diff(values)).max() <= 1 / 50 + 1e-9
        assert values.max() == 1
        assert values[0] == 1 / 50
        assert values[-1] < 0.01
    assert (linear[50:800] == 1).all()


def test_a_checkpoint_brings_back_the_random_state(tmp_path):
    torch.manual_seed(3)
    save_checkpoint({"a": 1}, tmp_path / "last.pt")
    wanted = torch.rand(3)
    assert load_checkpoint(tmp_path / "last.pt")["a"] == 1
    assert torch.equal(torch.rand(3), wanted)
    assert load_checkpoint(tmp_path / "none.pt") is None
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_texts_for_a_tokenizer_are_all_messages():
    table = pa.table({name: [[{"role": "user", "content": name}]] for name in ("prompt", "chosen", "rejected")})
    assert list(pair_texts(table)) == ["prompt", "chosen", "rejected"]
