"""Reward training: learns, resumes exactly, splits by prompt, and is shared out among workers."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.made import TINY, make_pairs, write_parts

from safer_ray import schema
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.reward import train as module
from safer_ray.reward import training_steps as training
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model
from safer_ray.reward.ending import asked_to_end, saves_first
from safer_ray.reward.forward import forward
from safer_ray.reward.loss import bradley_terry
from safer_ray.reward.split import validation_split
from safer_ray.reward.train import (
    _Batches,
    _one_step,
    _Training,
    engine_options,
    held_out,
    train_reward,
)
from safer_ray.reward.training_pairs import TrainingPairs, as_batch, pair_texts
from safer_ray.reward.training_steps import (
    Checkpoints,
    OneProcess,
    OptimizerOptions,
    TorchOptimizer,
    bucketed_batches,
    my_share,
    reward_step,
    warmup_cosine,
    warmup_decay,
)
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.digests import check_digests, record_digests
from safer_ray.storage.files import write_parquet
from safer_ray.storage.quarantine import quarantine_rows

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


class OneOfMany(OneProcess):
    """One worker of several, asked alone: its sums are its own part."""

    def __init__(self, state, rank, size):
        super().__init__(state)
        self.rank, self.size = rank, size


@pytest.fixture
def train(pairs_dir, tmp_path, monkeypatch):
    """Train in a folder of its name; returns where the model is, and the metrics."""
    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)  # so that those wanted are saved, whatever they cost

    def train(name, config=CONFIG, pairs=pairs_dir, **options):
        out = tmp_path / name
        return out, train_reward(pairs, out, config, OneProcess(out / "state", **options))

    return train


@pytest.fixture(scope="module")
def trained(pairs_dir, tmp_path_factory):
    """The undisturbed run: its folder and metrics."""
    out = tmp_path_factory.mktemp("trained")
    return out, train_reward(pairs_dir, out, CONFIG, OneProcess(out / "state"))


def weights_in(out):
    return load_file(out / "model.safetensors")


def assert_equal_weights(one, other):
    one, other = weights_in(one), weights_in(other)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def die_at(step):
    def die(done, total):
        if done == step:
            raise Killed

    return die


def test_training_learns_an_easy_rule(trained, pairs):
    out, metrics = trained
    assert metrics["validation_accuracy"] > 0.9
    losses = [entry["loss"] for entry in metrics["history"]]
    assert losses[-1] < losses[0] / 2 < 0.4
    assert metrics["train_pairs"] + metrics["validation_pairs"] == len(pairs)
    assert metrics["steps"] == 5 * -(-metrics["train_pairs"] // 8)
    reward = load_reward_model(out)
    tokens = reward.pairs(make_pairs(60).slice(50).to_pylist())  # not among the 48 it was trained on
    rewards = forward(reward, [s.ids for t in tokens for s in (t.chosen, t.rejected)]).rewards
    assert (rewards[0::2] > rewards[1::2]).all()


@pytest.mark.parametrize("step", [1, 7, 19])
def test_a_run_killed_between_marks_resumes_to_the_same_weights(trained, train, monkeypatch, step):
    monkeypatch.setattr(training.Checkpoints, "due", lambda self, wanted=False: True)
    with pytest.raises(Killed):
        train("killed", on_step=die_at(step))
    seen = []
    out, metrics = train("killed", on_step=lambda done, total: seen.append(done))
    assert seen[0] == step  # the step before it is the last in a checkpoint
    assert seen[-1] == metrics["steps"]
    assert_equal_weights(out, trained[0])
    assert metrics == trained[1]


def test_a_run_killed_long_after_a_mark_goes_back_to_it(trained, train):
    marks = [entry["step"] for entry in trained[1]["history"]]
    with pytest.raises(Killed):
        train("killed", on_step=die_at(marks[1]))  # a checkpoint is so young that only marks made one
    seen = []
    out, metrics = train("killed", on_step=lambda done, total: seen.append(done))
    assert seen[0] == marks[0] + 1
    assert_equal_weights(out, trained[0])
    assert metrics == trained[1]


def test_a_run_killed_between_an_export_and_its_checkpoint_exports_the_same(trained, train, monkeypatch):
    def die(*given):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OneProcess, "save", die)
        with pytest.raises(Killed):
            train("killed")
    out, metrics = train("killed")
    assert_equal_weights(out, trained[0])
    assert metrics == trained[1]


def test_a_finished_run_takes_no_step_again(trained, train):
    out, _ = train("again")
    steps = []
    assert train("again", on_step=lambda done, total: steps.append(done))[1] == trained[1]
    assert steps == []
    assert_equal_weights(out, trained[0])


def test_the_weights_of_lowest_held_out_loss_are_exported(train, monkeypatch):
    exported = []
    save = module.save_reward_model

    def watch(reward, directory, weights):
        exported.append({name: weight.clone() for name, weight in weights.items()})
        save(reward, directory, weights)

    monkeypatch.setattr(module, "save_reward_model", watch)
    measured = iter([(0.5, 0.9), (0.8, 0.4), (0.9, 0.6)])
    monkeypatch.setattr(module, "held_out", lambda *given: next(measured))
    out, metrics = train("run")
    assert (metrics["validation_accuracy"], metrics["validation_loss"]) == (0.8, 0.4)
    assert metrics["best_step"] == metrics["history"][1]["step"] < metrics["steps"]
    assert len(exported) == 2  # the third was no better
    found = weights_in(out)
    assert all(torch.equal(found[name], exported[1][name]) for name in found)
    assert any(not torch.equal(found[name], exported[0][name]) for name in found)


def test_a_checkpoint_of_another_group_of_workers_is_refused_with_the_remedy(train, pairs_dir, tmp_path):
    with pytest.raises(Killed):
        train("killed", on_step=die_at(19))
    others = OneProcess(tmp_path / "killed/state")
    others.checkpoints.group = {"workers": 4, "engine": "torch"}
    with pytest.raises(UserError, match=r"made with .*'workers': 1.* this run has .*'workers': 4") as caught:
        train_reward(pairs_dir, tmp_path / "killed", CONFIG, others)
    assert f"go on with the same, or delete {tmp_path / 'killed/state'} to train anew" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bfloat16_training_learns_and_keeps_its_weights_in_float32(train):
    out, metrics = train("half", CONFIG.model_copy(update={"dtype": "bfloat16", "epochs": 3}))
    losses = [entry["loss"] for entry in metrics["history"]]
    assert metrics["validation_accuracy"] > 0.9
    assert losses[-1] < losses[0] / 2
    assert {weight.dtype for weight in weights_in(out).values()} == {torch.float32}


def test_bfloat16_changes_the_losses_a_little(fresh, pairs):
    reward = fresh()
    batch = reward.pairs(pairs.slice(0, 8).to_pylist())
    whole, half = (reward_step(reward, batch, bfloat16).margin for bfloat16 in (False, True))
    assert whole.dtype == half.dtype == torch.float32
    assert not torch.equal(whole, half)
    torch.testing.assert_close(whole, half, rtol=0.05, atol=0.02)


@pytest.fixture
def fresh(pairs):
    def fresh():
        return new_reward_model(CONFIG, lambda: pair_texts(pairs))

    return fresh


def training_of(reward, workers, **changes):
    config = CONFIG.model_copy(update=changes)
    options = engine_options(config, workers.size)
    return _Training(reward, TorchOptimizer(reward.model, options), workers, config, options)


def batches_of(reward, pairs):
    return _Batches(TrainingPairs.of([as_batch(reward.pairs(pairs.to_pylist()), [False] * len(pairs))]))


def gradients(reward, pairs, workers, **changes):
    """The loss of all of `pairs` as one batch, and this worker's share of the gradients."""
    step = training_of(reward, workers, **changes)
    loss = _one_step(step, batches_of(reward, pairs), np.arange(len(pairs)))
    return loss, [p.grad.clone() for p in reward.model.parameters() if p.grad is not None]


def test_micro_batches_give_the_same_gradients(fresh, pairs, tmp_path):
    results = []
    for micro in (8, 2):
        workers = OneProcess(tmp_path)
        results.append(gradients(fresh(), pairs.slice(0, 7), workers, micro_batch_size=micro))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 7, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_all_workers_sum_to_the_gradients_of_one(fresh, pairs, tmp_path, size, rows):
    batch = pairs.slice(0, rows)
    loss, wanted = gradients(fresh(), batch, OneProcess(tmp_path))
    shares = [gradients(fresh(), batch, OneOfMany(tmp_path, rank, size), micro_batch_size=2) for rank in range(size)]
    assert sum(share for share, _ in shares) == pytest.approx(loss, rel=1e-5)
    for whole, *parts in zip(wanted, *(found for _, found in shares), strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)


def test_every_worker_runs_equally_many_micro_batches_even_without_rows(fresh, pairs, tmp_path, monkeypatch):
    ran = []
    step = module.reward_step
    monkeypatch.setattr(module, "reward_step", lambda *given: ran.append(len(given[1])) or step(*given))
    reward = fresh()
    for rank in range(3):
        loss, _ = gradients(reward, pairs.slice(0, 2), OneOfMany(tmp_path, rank, 3), micro_batch_size=2)
    assert ran == [1, 1, 1, 1, 1, 1]  # two each: a share of three in micro-batches of two
    assert loss == 0  # the third has no row
    ran.clear()
    gradients(reward, pairs.slice(0, 2), OneProcess(tmp_path), micro_batch_size=2)
    assert ran == [2]  # a single process has nobody to keep step with


def test_workers_measure_the_held_out_pairs_together(fresh, pairs, tmp_path):
    reward = fresh()
    with torch.no_grad():
        reward.model.score.weight *= 20
    batches = batches_of(reward, pairs.slice(0, 21))
    margin = reward_step(reward, batches[np.arange(21)]).margin
    accuracy, loss = held_out(training_of(reward, OneProcess(tmp_path)), batches)
    assert accuracy == pytest.approx(float((margin > 0).float().mean()))
    assert loss == pytest.approx(float(bradley_terry(margin)), rel=1e-5)
    for size in (2, 5):  # three chunks: some workers have none
        parts = [held_out(training_of(reward, OneOfMany(tmp_path, rank, size)), batches) for rank in range(size)]
        assert np.sum(parts, axis=0) == pytest.approx([accuracy, loss], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_losses(train):
    histories = []
    for checkpointing in (False, True):
        config = CONFIG.model_copy(update={"gradient_checkpointing": checkpointing, "epochs": 1, "evaluations": 5})
        histories.append(train(f"{checkpointing}", config)[1]["history"])
    losses = [[entry["loss"] for entry in history] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_is_bradley_terrys(fresh, pairs):
    reward = fresh()
    batch = reward.pairs(pairs.slice(0, 4).to_pylist())
    step = reward_step(reward, batch)
    rewards = [forward(reward, [t.chosen.ids, t.rejected.ids]).rewards for t in batch]
    margin = torch.stack([r[0] - r[1] for r in rewards])
    torch.testing.assert_close(step.margin, margin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.loss.detach(), torch.log(1 + torch.exp(-margin)).mean(), rtol=1e-4, atol=1e-5)
    assert bradley_terry(torch.zeros(3)) == pytest.approx(np.log(2))
    assert bradley_terry(torch.tensor([5.0])) < bradley_terry(torch.tensor([-5.0]))


def test_a_nan_loss_ends_training_with_the_remedy(train, monkeypatch):
    monkeypatch.setattr(module, "_one_step", lambda *a: float("nan"))
    with pytest.raises(SaferError, match=r"the loss is nan at step 0; lower reward.learning_rate"):
        train("nan")


@pytest.mark.parametrize("keep", [0, 1])
def test_no_pairs_left_is_an_error(train, pairs, tmp_path, keep):
    write_parquet(pairs.slice(0, keep), tmp_path / "pairs" / part_name(0))
    with pytest.raises(UserError, match=rf"reward: no pairs left to train on \({keep} in .*check sources"):
        train("none", pairs=tmp_path / "pairs")


def test_without_held_out_pairs_the_training_pairs_are_measured(train, pairs, tmp_path):
    config = CONFIG.model_copy(update={"validation_percent": 0.0, "epochs": 0.5})
    _, metrics = train("none", config, write_parts(pairs.slice(0, 8), tmp_path / "few", 8))
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


# Shares


@given(st.integers(0, 40), st.integers(1, 3))
def test_the_shares_of_the_workers_partition_a_batch(rows, size):
    batch = np.random.default_rng(rows).permutation(rows)
    shares = [my_share(batch, OneOfMany(None, rank, size)) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == list(range(rows))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_rows_of_like_length_are_dealt_out_in_turn():
    shares = [my_share(np.arange(8), OneOfMany(None, rank, 3)).tolist() for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))
def test_a_workers_micro_batches_hold_its_share_of_every_batch(micro, times, workers):
    config = CONFIG.model_copy(update={"batch_size": micro * times, "micro_batch_size": micro})
    options = engine_options(config, workers)
    assert options.micro_batch_size <= micro
    assert options.micro_batches > 0
    for rows in range(1, config.batch_size + 1):  # the last batch of an epoch may be short
        longest = len(my_share(np.arange(rows), OneOfMany(None, 0, workers)))
        assert longest <= options.micro_batches * options.micro_batch_size
    assert (options.micro_batches - 1) * options.micro_batch_size < -(-config.batch_size // workers)


def test_options_for_the_engine_come_from_the_config():
    config = RewardConfig(
        batch_size=32, micro_batch_size=8, learning_rate=1e-4, weight_decay=0.1, max_grad_norm=2, dtype="bfloat16"
    )
    assert engine_options(config, 1) == OptimizerOptions(
        1e-4, 0.1, 2, micro_batches=4, micro_batch_size=8, bfloat16=True
    )
    assert engine_options(config, 3).micro_batches == 2  # 11 pairs each
    assert engine_options(config, 16) == OptimizerOptions(
        1e-4, 0.1, 2, micro_batches=1, micro_batch_size=2, bfloat16=True
    )
    assert not engine_options(RewardConfig(), 1).bfloat16


# Checkpoints


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return TorchOptimizer(torch.nn.Linear(3, 2), OptimizerOptions(1e-2, weight_decay=0.1))


def one_step(engine):
    engine.backward(engine.model(torch.ones(4, 3)).square().mean())
    engine.step(1.0)


def test_a_checkpoint_brings_back_weights_optimiser_loop_and_random_state(engine, tmp_path):
    workers = OneProcess(tmp_path)
    assert workers.load(engine) is None
    one_step(engine)
    workers.save(engine, {"progress": {"step": 1}, "idle": torch.arange(3)})
    wanted = torch.rand(3)
    one_step(engine)
    after = [p.clone() for p in engine.model.parameters()]
    other = TorchOptimizer(torch.nn.Linear(3, 2), engine.options)
    found = OneProcess(tmp_path).load(other)
    assert found["progress"] == {"step": 1}
    assert torch.equal(found["idle"], torch.arange(3))
    assert torch.equal(torch.rand(3), wanted)
    one_step(other)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), after, strict=True))


def test_the_last_two_checkpoints_are_kept(engine, tmp_path):
    workers, steps = OneProcess(tmp_path), (1, 2, 10)
    for number, step in enumerate(steps):
        workers.save(engine, {"progress": {"step": step}})
        kept = steps[max(0, number - 1) : number + 1]
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{own:08}" for own in kept]
    assert json.loads((tmp_path / "step-00000010/group.json").read_text()) == {"workers": 1, "engine": "torch"}
    workers.save(engine, {"progress": {"step": 10}})  # again, as after a resume
    assert workers.load(engine) == {"progress": {"step": 10}}


def test_a_checkpoint_that_was_not_closed_does_not_count(engine, tmp_path):
    workers = OneProcess(tmp_path)
    workers.save(engine, {"progress": {"step": 1}})
    workers.checkpoints.begin()
    workers.checkpoints.write(engine, {"progress": {"step": 2}})
    assert OneProcess(tmp_path).load(engine) == {"progress": {"step": 1}}
    workers.save(engine, {"progress": {"step": 3}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def _damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["torch.pt", "loop.pt", "rng-0.pt"])
@pytest.mark.parametrize(
    "change", [_damage, Path.unlink, lambda path: path.write_bytes(b"")], ids=["bit", "gone", "empty"]
)
def test_a_file_of_a_checkpoint_that_is_not_as_saved_is_refused_by_name_and_nothing_is_loaded(
    engine, tmp_path, name, change
):
    workers = OneProcess(tmp_path)
    workers.save(engine, {"progress": {"step": 1}})
    change(tmp_path / "step-00000001" / name)
    engine.load = lambda directory: pytest.fail("loaded")
    with pytest.raises(UserError) as told:
        OneProcess(tmp_path).load(engine)
    assert str(told.value).startswith(f"{tmp_path}/step-00000001/{name} is not the file that was saved (1 of 4 files")
    assert f"delete {tmp_path} to train anew" in str(told.value)


def test_a_file_that_came_later_and_a_checkpoint_without_digests_are_refused(engine, tmp_path):
    workers = OneProcess(tmp_path)
    workers.save(engine, {"progress": {"step": 1}})
    added = tmp_path / "step-00000001/deepspeed/zero_pp_rank_1_optim_states.pt"
    added.parent.mkdir()
    added.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"deepspeed/zero_pp_rank_1_optim_states.pt was saved without a digest, or came"
    ):
        workers.load(engine)
    added.unlink()
    assert workers.load(engine) == {"progress": {"step": 1}}
    (tmp_path / "step-00000001/sha256-0.json").unlink()
    with pytest.raises(UserError, match=r"group.json was saved without a digest, or came later \(4 of 4 files"):
        workers.load(engine)


def test_workers_share_the_files_and_all_refuse_what_one_finds(tmp_path):
    for name in "abcde":
        (tmp_path / name).write_text(name)
    for rank in range(3):
        record_digests(tmp_path, rank, 3)
    (tmp_path / "d").write_text("x")
    seen = []
    for rank in range(2):  # another number of workers than saved it

        def over_workers(changed):
            seen.append(changed)
            return [0.0] * 3 + [1.0, 0.0]

        with pytest.raises(UserError, match=r"/d is not the file that was saved .* put it back, or begin again$"):
            check_digests(tmp_path, rank, 2, over_workers, "begin again")
    assert seen == [[0.0] * 5, [0.0, 0.0, 0.0, 1.0, 0.0]]


def test_of_two_checkpoints_the_later_counts_and_the_older_goes_with_the_next_but_one(engine, tmp_path):
    workers = OneProcess(tmp_path)
    for step in (5, 1000, 1001):
        workers.save(engine, {"progress": {"step": step}})
        assert workers.load(engine) == {"progress": {"step": step}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00001000", "step-00001001"]
    workers.save(engine, {"progress": {"step": 1001}})  # again: a run that went on from it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00001000", "step-00001001"]
    (tmp_path / "step-00001001" / "loop.pt").write_bytes(b"")
    remedy = rf"delete {tmp_path}/step-00001001 to go on from step-00001000, or all of {tmp_path} to train anew$"
    with pytest.raises(UserError, match=remedy):
        workers.load(engine)
    shutil.rmtree(tmp_path / "step-00001001")
    assert workers.load(engine) == {"progress": {"step": 1000}}


class Clock:
    """A clock that goes when it is told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def save(checkpoints, clock, seconds):
    checkpoints.begin()
    clock.now += seconds
    (checkpoints.state / "next" / "file").touch()
    checkpoints.close(round(clock.now))


@pytest.mark.parametrize("cost", [0.01, 2.0, 100.0])
def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch, cost):
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)
    checkpoints = Checkpoints(tmp_path, 0, {})
    weights = torch.nn.Linear(1, 1, bias=False)
    monkeypatch.setattr(training, "WRITE_RATE", 12 / cost)  # a weight and its moments
    checkpoints.expect(weights, 1)
    saved = []
    for step in range(20_000):
        clock.now += 1
        if checkpoints.due(wanted=step % 1000 == 999):
            save(checkpoints, clock, cost)
            saved.append(clock.now)
            assert len(saved) * cost <= 0.05 * (clock.now - 100) + 1e-9
    assert len(saved) > 0.8 * min(20_000 / 11, 0.05 * 20_000 / cost)
    assert min(np.diff(saved)) > training.LEAST_SECONDS


def test_a_checkpoint_that_is_wanted_need_not_wait_but_costs_no_more(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)
    checkpoints = Checkpoints(tmp_path, 0, {})
    clock.now += 1
    assert (checkpoints.due(), checkpoints.due(wanted=True)) == (False, True)
    save(checkpoints, clock, 1)
    clock.now += 36  # two of a second in 38
    assert not checkpoints.due(wanted=True)
    clock.now += 3
    assert checkpoints.due()


def test_a_training_that_is_told_to_end_saves_first_and_goes_on_from_there(trained, train, monkeypatch):
    monkeypatch.setattr(training.Checkpoints, "due", lambda self, wanted=False: False)
    ended = []

    def handler(*_):
        ended.append(True)
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            train("ended", on_step=lambda done, total: os.kill(os.getpid(), signal.SIGTERM) if done == 7 else None)
        assert signal.getsignal(signal.SIGTERM) is handler
        seen = []
        out, metrics = train("ended", on_step=lambda done, total: seen.append(done))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [True]
    assert seen[0] == 8
    assert_equal_weights(out, trained[0])
    assert metrics == trained[1]


def get_sigterm(signals):
    with saves_first():
        for number in range(signals):
            assert asked_to_end() == (number > 0)
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals == 1


def test_a_second_sigterm_is_obeyed_at_once():
    def handler(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        for signals in (2, 1):  # one that comes behind the last step is obeyed there
            with pytest.raises(SystemExit):
                get_sigterm(signals)
            assert not asked_to_end()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_more_workers_than_pairs_are_one_line(tmp_path):
    write_parts(make_pairs(3), tmp_path / "pairs", 3)
    workers = OneOfMany(tmp_path / "state", 0, 5)
    config = RewardConfig(base=TINY, max_length=96, validation_percent=0)
    with pytest.raises(UserError, match=r"^reward: 5 workers for 3 pairs to train on: .*; lower ray"):
        train_reward(tmp_path / "pairs", tmp_path / "out", config, workers)


def test_texts_for_a_tokenizer_are_all_messages():
    table = pa.table({name: [[{"role": "user", "content": name}]] for name in ("prompt", "chosen", "rejected")})
    assert list(pair_texts(table)) == ["prompt", "chosen", "rejected"]


def test_pairs_that_cannot_be_put_to_the_model_are_left_out_and_kept_with_the_reason(tmp_path, caplog):
    rows = make_pairs(24).to_pylist()
    rows[3]["prompt"][0]["role"] = "observer"
    write_parts(schema.table(rows, schema.PAIRS), tmp_path / "pairs", 24)
    config = RewardConfig(base=TINY, max_length=96, batch_size=8, micro_batch_size=8)
    metrics = train_reward(tmp_path / "pairs", tmp_path / "out", config, OneProcess(tmp_path / "state"))
    assert metrics["refused_pairs"] == 1
    assert metrics["train_pairs"] + metrics["validation_pairs"] == 23
    assert "1 of 24 pairs cannot be put to tiny llama and are left out, the first is pair 'pair-003'" in caplog.text
    (row,) = quarantine_rows(tmp_path / "out").to_pylist()
    assert (row["pair_id"], row["row_key"], row["stage"]) == ("pair-003", "made.jsonl#pair-003", "reward")
    assert "the role 'observer'" in row["reason"]


# DeepSpeed


class OneUnderDeepSpeed(OneProcess):
    """One process whose gradients DeepSpeed applies, as a group of one worker has it."""

    def engine(self, module, options):
        from safer_ray.config.cluster import DeepSpeedConfig
        from safer_ray.distributed.deepspeed_engine import DeepSpeedEngine

        self.opened = DeepSpeedEngine(module, options, DeepSpeedConfig(stage=1), 1, torch.device("cpu"))
        return self.opened

    def save(self, engine, state):
        """No checkpoint."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
def test_deepspeed_with_one_worker_loses_no_step_to_a_short_batch(pairs_dir, tmp_path, monkeypatch):
    """The last batch of an epoch has fewer micro-batches than the others."""
    pytest.importorskip("deepspeed")
    for name, value in {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    config = CONFIG.model_copy(update={"epochs": 2, "batch_size": 16, "micro_batch_size": 4, "evaluations": 1})
    plain = train_reward(pairs_dir, tmp_path / "plain", config, OneProcess(tmp_path / "plain/state"))
    assert 0 < plain["train_pairs"] % 16 <= 12
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        workers = OneUnderDeepSpeed(tmp_path / "deep/state")
        deep = train_reward(pairs_dir, tmp_path / "deep", config, workers)
        assert workers.opened.engine.global_steps == deep["steps"] == plain["steps"]
    finally:
        torch.distributed.destroy_process_group()
    one, other = weights_in(tmp_path / "plain"), weights_in(tmp_path / "deep")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
