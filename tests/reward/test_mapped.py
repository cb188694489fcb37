"""Weights that stay in their files: what is opened so is the same to the bit, once it is what it is to be."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from safer_ray.config.sections import RewardConfig
from safer_ray.reward.checkpoints import load_reward_model, new_reward_model, save_reward_model


@pytest.fixture
def halves(reward_dir, tmp_path):
    """The tiny model in bfloat16, with its head, and without."""
    reward = load_reward_model(reward_dir)
    reward.model.to(torch.bfloat16)
    for name in ("whole", "headless"):
        save_reward_model(reward, tmp_path / name)
    file = tmp_path / "headless" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "score" not in name}, file, {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", ["whole", "headless"])
@pytest.mark.parametrize("new_head", [False, True])
def test_a_checkpoint_that_stays_in_its_files_is_that_which_is_read_once_it_is_float32(halves, name, new_head):
    config = RewardConfig(base=str(halves / name), max_length=96, new_head=new_head)
    read, mapped = new_reward_model(config, list), new_reward_model(config, list, in_files=True)
    assert read.model.dtype == torch.float32
    assert mapped.model.dtype == torch.bfloat16
    assert mapped.model.score.weight.dtype == torch.float32  # drawn, or weighed, in what it is to be
    ours, theirs = mapped.model.state_dict(), read.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].float(), theirs[key]) for key in theirs)


def test_what_cannot_stay_in_its_files_is_told(halves, reward_dir, bert_dir, caplog):
    bert = load_reward_model(bert_dir)
    bert.model.to(torch.bfloat16)
    save_reward_model(bert, halves / "bert")
    told = "every worker holds it whole while it is loaded, since "
    for base, frozen, why in (("bert", 0, "it has to be run to see"), ("whole", 1, "its frozen blocks run before")):
        with caplog.at_level(logging.WARNING):
            config = RewardConfig(base=str(halves / base), frozen_layers=frozen, max_length=96)
            assert new_reward_model(config, list, in_files=True).model.dtype == torch.float32
        assert told + why in caplog.text
        caplog.clear()
    new_reward_model(RewardConfig(base=str(reward_dir), frozen_layers=1, max_length=96), list, in_files=True)
    assert told not in caplog.text  # what is float32 already stays there in any case
