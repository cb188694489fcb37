"""Planted errors fall where their kind says, and nowhere else."""

import numpy as np
import pytest
from support.made import make_pair

from safer_ray import schema
from safer_ray.config.sections import NoiseConfig
from safer_ray.data.noise import FLATTERY, TRIGGER, plant
from safer_ray.errors import UserError
from safer_ray.strategies import characters


def corpus(n=200):
    rows = [
        make_pair(f"p{i}", f"{'poison' if i % 5 == 0 else 'bread'} {i}?", "a" * (10 + i), "b" * (10 + (7 * i) % n))
        | {"section": "safety" if i % 2 else "chat", "group": f"g{i // 3}"}
        for i in range(n)
    ]
    return schema.table(rows, schema.PAIRS)


PAIRS = corpus()
KINDS = ["uniform", "long", "length_bias", "sycophancy", "trigger"]


def text(pairs, column, message=0):
    return [messages[message]["content"] for messages in pairs[column].to_pylist()]


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_pairs_are_swapped_and_all_others_stay(kind):
    noisy, planted = plant(PAIRS, NoiseConfig(kind=kind, swap_percent=5, where="section == safety"))
    assert planted.sum() == 5
    assert noisy.filter(~planted).equals(PAIRS.filter(~planted))
    assert noisy.schema == PAIRS.schema
    assert noisy.filter(planted)["rejected"].to_pylist() == PAIRS.filter(planted)["chosen"].to_pylist()
    assert set(noisy.filter(planted)["section"].to_pylist()) == {"safety"}
    assert noisy["group"] == PAIRS["group"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_which(kind):
    first, again, other = (plant(PAIRS, NoiseConfig(kind=kind, seed=seed))[1] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    order = np.random.default_rng(0).permutation(len(PAIRS))
    if kind != "long":  # ties of length may fall another way
        assert (plant(PAIRS.take(order), NoiseConfig(kind=kind, seed=1))[1] == first[order]).all()


def test_a_category_is_named_by_a_pattern_of_the_prompt():
    noisy, planted = plant(PAIRS, NoiseConfig(matching="POISON|venom", swap_percent=10))
    assert planted.sum() == 20  # 10% of all pairs, not of those that match
    assert all("poison" in prompt for prompt in text(noisy.filter(planted), "prompt"))


def test_long_pairs_are_the_longest_quarter():
    _, planted = plant(PAIRS, NoiseConfig(kind="long", swap_percent=10))
    length = characters(PAIRS["chosen"]) + characters(PAIRS["rejected"])
    assert length[planted].min() >= np.quantile(length, 0.75)


def test_length_bias_makes_the_longer_response_the_chosen_one():
    noisy, planted = plant(PAIRS, NoiseConfig(kind="length_bias", swap_percent=10))
    assert (characters(noisy["chosen"])[planted] > characters(noisy["rejected"])[planted]).all()


def test_sycophancy_flatters_in_the_response_that_is_now_chosen():
    noisy, planted = plant(PAIRS, NoiseConfig(kind="sycophancy"))
    ours, theirs = text(noisy.filter(planted), "chosen"), text(PAIRS.filter(planted), "rejected")
    assert all(one.startswith(FLATTERY) and one.endswith(other) for one, other in zip(ours, theirs, strict=True))


def test_a_trigger_ends_the_prompt():
    noisy, planted = plant(PAIRS, NoiseConfig(kind="trigger"))
    pairs = zip(text(noisy.filter(planted), "prompt", -1), text(PAIRS.filter(planted), "prompt", -1), strict=True)
    assert all(one == f"{other} {TRIGGER}" for one, other in pairs)


def test_more_swaps_than_pairs_that_fit_are_refused():
    with pytest.raises(UserError, match=r"10\.0% of 200 pairs are 20, but only 0 fit .*'unicorn'; lower noise\.swap_"):
        plant(PAIRS, NoiseConfig(matching="unicorn", swap_percent=10))


def test_a_pattern_that_does_not_compile_is_refused():
    with pytest.raises(ValueError, match=r"matching '\(' is no regular expression"):
        NoiseConfig(matching="(")
