"""What frozen blocks give, in half precision, in files that all workers map."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.made import make_pairs

from safer_ray.errors import UserError
from safer_ray.reward import frozen_states as module
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import trunk_states
from safer_ray.reward.frozen_states import FrozenStates, from_halves, frozen_states, to_halves
from safer_ray.reward.packing import unpacked
from safer_ray.reward.text import both_sides
from safer_ray.reward.training_pairs import TrainingPairs, as_batch
from safer_ray.reward.training_steps import OneProcess


@pytest.fixture
def frozen(reward_dir):
    return load_reward_model(reward_dir).freeze(2)


@pytest.fixture
def few(frozen):
    tokens = frozen.pairs(make_pairs(11).to_pylist())
    return TrainingPairs.of([as_batch(tokens[:4], [False] * 4), as_batch(tokens[4:], [True] * 7)])


def one_of(state, rank, size):
    return SimpleNamespace(state=state, rank=rank, size=size, sum=lambda values: values)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e4, 1e30])
def test_states_are_rounded_by_a_two_thousandth_of_themselves_at_any_scale(scale):
    states = torch.randn(50, 64) * scale
    states[3] = 0
    states[5, 7] *= 1e4  # as the largest entries of some models
    found = from_halves(to_halves(states))
    assert found.dtype == torch.float32
    assert ((found - states).abs() <= states.abs() * 2.0**-11).all()
    assert torch.equal(from_halves(to_halves(found)), found)
    worse = (states.bfloat16().float() - states).abs() > states.abs() * 2.0**-11
    assert worse.float().mean() > 0.5


def test_what_is_no_number_stays_so():
    found = from_halves(to_halves(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0]])))
    assert found.isfinite().tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_the_files_of_all_workers_hold_the_states_of_every_side(frozen, few, tmp_path, size, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 4 * frozen.hidden_size * 150)  # a few pairs at a time
    for rank in range(size):
        if rank < size - 1:  # the others' files are not there yet
            with pytest.raises(FileNotFoundError):
                frozen_states(frozen, few, one_of(tmp_path, rank, size))
        else:
            states = frozen_states(frozen, few, one_of(tmp_path, rank, size))
    order = np.random.default_rng(0).permutation(11)
    tokens = few[order]
    wanted = trunk_states(frozen, [unpacked(s.ids, s.types) for s in both_sides(tokens)])
    found = states[order]
    for place in range(11):
        for side in (0, 1):
            torch.testing.assert_close(found[side * 11 + place], wanted[2 * place + side], rtol=2.0**-10, atol=1e-5)
    _, held = few.split()
    torch.testing.assert_close(states[held.numbers[np.array([2])]][0], states[np.array([6])][0], rtol=0, atol=0)


def test_states_that_are_there_are_not_computed_again(frozen, few, tmp_path, monkeypatch):
    workers = OneProcess(tmp_path)
    first = frozen_states(frozen, few, workers)
    monkeypatch.setattr(module, "trunk_states", None)
    again = frozen_states(frozen, few, workers, gigabytes=1e-9)
    assert all(torch.equal(*both) for both in zip(first[np.arange(11)], again[np.arange(11)], strict=True))
    with pytest.raises(TypeError):  # of another layer, they are
        frozen_states(frozen.freeze(1), few, workers)


@pytest.mark.parametrize("suffix", ["float16", "exponents", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty"])
def test_states_that_are_damaged_are_computed_again(frozen, few, tmp_path, suffix, damage):
    """A training went on with wrong ones, and without a word."""
    workers = OneProcess(tmp_path)
    wanted = frozen_states(frozen, few, workers)[np.arange(11)]
    (file,) = (tmp_path / module.FOLDER).glob(f"*.{suffix}")
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(whole) // 2
        worse = {"cut": whole[:middle], "empty": b"", "changed": whole[:middle] + b"!" + whole[middle + 1 :]}
        file.write_bytes(worse[damage])
    found = frozen_states(frozen, few, workers)[np.arange(11)]
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))


def test_states_of_other_pairs_of_the_same_lengths_are_computed_again(frozen, few, tmp_path):
    workers = OneProcess(tmp_path)
    wanted = frozen_states(frozen, few, workers)[np.arange(11)]
    tokens = few[np.arange(11)]
    turned = [pair._replace(chosen=pair.chosen._replace(ids=pair.chosen.ids[::-1].copy())) for pair in tokens]
    found = frozen_states(frozen, TrainingPairs.of([as_batch(turned, [False] * 11)]), workers)[np.arange(11)]
    assert not any(torch.equal(*both) for both in zip(found[:11], wanted[:11], strict=True))


def test_a_budget_that_is_too_small_is_one_line_with_the_remedy_before_anything_is_computed(
    frozen, few, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "trunk_states", None)
    needed = int(few.side_lengths.sum()) * (2 * 32 + 1)
    told = f"reward: what 2 frozen blocks give of 11 pairs ({few.side_lengths.sum():,} tokens of width 32) takes "
    told += f"{needed / 1e9:.3g} GB in {tmp_path}/frozen-states, and "
    remedy = "lower reward.max_length, train on fewer pairs, or set reward.frozen_layers: 0"
    small = f"^{re.escape(told)}reward.frozen_states_gb is 1e-06; raise it, {remedy}$"
    with pytest.raises(UserError, match=small):
        frozen_states(frozen, few, OneProcess(tmp_path), gigabytes=1e-6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    full = f"^{re.escape(told)}{needed / 1e9:.3g} GB are free there; free some, {remedy}$"
    with pytest.raises(UserError, match=full):
        frozen_states(frozen, few, OneProcess(tmp_path))


def test_they_are_mapped_and_not_held(frozen, few, tmp_path):
    states = frozen_states(frozen, few, OneProcess(tmp_path))
    assert isinstance(states, FrozenStates)
    assert all(isinstance(part.values, np.memmap) for part in states.parts)
    assert sum(part.values.nbytes + part.exponents.nbytes for part in states.parts) == 65 * few.side_lengths.sum()
