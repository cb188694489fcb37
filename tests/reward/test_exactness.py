"""Every reward is that of the model's own tokenizer, template and forward pass, one unpadded sequence at a time."""

import json
import shutil
from functools import cache

import pytest
import torch
from support.own_rewards import assert_exact, own_rewards, own_sides, rows
from support.reward_models import KINDS, save_reward_model_of

from safer_ray.reward.checkpoints import SETTINGS, load_reward_model
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.text import both_sides

QUICK = (
    "Llama 3 without a pad token",
    "Llama 2",
    "Qwen 3",
    "Gemma 2",
    "Phi 3",
    "GPT-2",
    "BERT",
    "DeBERTa v3",
    "RoBERTa",
)
LIMIT = 110  # tokens, of the truncated ones


kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.long]) for kind in KINDS]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by kind, made when they are first asked for."""
    return cache(lambda kind: save_reward_model_of(kind, tmp_path_factory.mktemp("model")))


@kinds
def test_the_tokens_are_the_models_own(models, kind):
    directory = models(kind)
    own = own_sides(directory)
    reward = load_reward_model(directory)
    for name, tokens in zip(own, reward.pairs(rows(own)), strict=True):
        for side, inputs in zip((tokens.chosen, tokens.rejected), own[name], strict=True):
            assert side.ids.tolist() == inputs["input_ids"][0].tolist(), name


@kinds
def test_the_rewards_are_the_models_own(models, kind):
    """All pairs at once: padded, and packed where the model takes that; and one by one."""
    directory = models(kind)
    own = own_sides(directory)
    assert len(own) >= 8
    reward = load_reward_model(directory)
    pairs = reward.pairs(rows(own))
    wanted = own_rewards(directory, [inputs for sides in own.values() for inputs in sides])
    assert len(set(wanted.tolist())) >= len(own)
    assert_exact(forward_pairs(reward, pairs).rewards, wanted)
    assert_exact(forward_pairs(reward, pairs, budget=100_000).rewards, wanted)
    assert_exact(torch.cat([forward_pairs(reward, [one]).rewards for one in pairs]), wanted)


@kinds
def test_the_rewards_of_the_tokens_that_are_read_are_the_models_own(models, kind, tmp_path):
    """Cut or not, padded or packed."""
    directory = models(kind)
    whole = load_reward_model(directory)
    shutil.copytree(directory, tmp_path / "cut")
    (tmp_path / "cut" / SETTINGS).write_text(json.dumps({"max_length": LIMIT}))
    cut = load_reward_model(tmp_path / "cut")
    names = list(own_sides(directory))
    for reward in (whole, cut):
        pairs = reward.pairs(rows(names))
        sides = both_sides(pairs)
        wanted = own_rewards(directory, [inputs_of(side) for side in sides])
        assert_exact(forward_pairs(reward, pairs, budget=100_000).rewards, wanted)
        if all(side.types is None for side in sides):
            assert_exact(forward(reward, [side.ids for side in sides]).rewards, wanted)
        assert any(side.truncated for side in sides) == (reward is cut)
        if reward is cut:
            assert max(len(side.ids) for side in sides) <= LIMIT


def inputs_of(side):
    """What transformers is given of a side."""
    inputs = {"input_ids": side.ids} | ({} if side.types is None else {"token_type_ids": side.types})
    return {name: torch.from_numpy(values)[None] for name, values in inputs.items()}
