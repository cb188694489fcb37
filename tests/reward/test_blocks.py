"""A base cut to its first blocks: they give what they give in the whole, and a head behind them is trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.made import TINY, make_pairs
from support.model_types import COMMON, FAMILIES, build, states_of
from support.tiny_run import tiny_config
from transformers import AutoModelForSequenceClassification

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.run import preflight
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.checkpoints import layer_count, load_reward_model, new_reward_model
from safer_ray.reward.forward import forward
from safer_ray.reward.pretrained import Checkpoint, open_classifier
from safer_ray.reward.text import both_sides
from safer_ray.reward.train import train_reward
from safer_ray.storage.work import TrainJob

LAYERS = COMMON["num_hidden_layers"]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("blocks", [1, LAYERS - 1, LAYERS])
def test_the_first_blocks_give_what_they_give_in_the_whole(family, blocks, tmp_path):
    whole = build(family).model.eval()
    whole.save_pretrained(tmp_path / "base")
    cut, found = open_classifier(Checkpoint("base", str(tmp_path / "base")), blocks=blocks)
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    ids = torch.randint(1, COMMON["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    wanted, _ = states_of(whole, input_ids=ids)
    states, last = states_of(cut.eval(), input_ids=ids)
    assert len(states) == blocks
    for own, of_whole in zip(states, wanted, strict=False):
        torch.testing.assert_close(own, of_whole)
    with torch.inference_mode():
        torch.testing.assert_close(last, whole.base_model.norm(wanted[blocks - 1]))
    cut.save_pretrained(tmp_path / "cut")
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["num_hidden_layers"] == blocks
    assert len(config.get("layer_types") or [0] * blocks) == blocks
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=ids).logits, cut(input_ids=ids).logits)


def config_of(base, **values):
    return RewardConfig(base=str(base), max_length=64, epochs=1, batch_size=8, micro_batch_size=8, **values)


def trained(config, pairs_dir, out):
    LocalRunner().train([TrainJob("reward", train_reward, {"pairs": pairs_dir, "config": config}, out)])
    return load_reward_model(out)


def test_a_cut_base_is_trained_behind_frozen_blocks(model_dir, pairs_dir, tmp_path):
    reward = trained(config_of(model_dir, blocks=2, frozen_layers=1), pairs_dir, tmp_path / "made")
    assert len(reward.blocks()) == 2
    sides = [side.ids for side in both_sides(reward.pairs(make_pairs(3).to_pylist()))]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made").eval()
    with torch.inference_mode():
        own = [float(plain(input_ids=torch.from_numpy(ids)[None]).logits) for ids in sides]
    if reward.pairs.tokenizer.cls_token_id is None:  # an encoder is given token types, too
        np.testing.assert_allclose(forward(reward, sides).rewards, own, atol=1e-5)
    first = dict(load_reward_model(model_dir).blocks()[0].named_parameters())
    for name, parameter in reward.blocks()[0].named_parameters():
        torch.testing.assert_close(parameter, first[name], rtol=0, atol=0)


def test_a_file_or_a_folder_of_fewer_blocks_is_refused(reward_dir):
    assert layer_count(str(reward_dir), blocks=2) == 2
    for opened in (
        lambda: layer_count(str(reward_dir), blocks=4),
        lambda: new_reward_model(config_of(reward_dir, blocks=4), list),
    ):
        with pytest.raises(UserError, match=r"reward\.blocks 4 lies past the 3 layers of .*tiny; choose 1\.\.3"):
            opened()


def test_a_family_that_is_not_known_to_split_up_is_refused(tmp_path, reward_dir):
    config = {"model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 2}
    shutil.copy(reward_dir / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"reward\.blocks: a gpt2 \(.*\) is not known to split up .* llama, .*leave it"):
        layer_count(str(tmp_path), blocks=2)


def test_keys_that_cannot_go_with_it_are_refused(reward_dir, tmp_path):
    with pytest.raises(ValidationError, match="frozen_layers 3 lies past the 2 blocks that are kept"):
        config_of("x", blocks=2, frozen_layers=3)
    with pytest.raises(ValidationError, match="blocks needs a pretrained base"):
        RewardConfig(base=TINY, blocks=2)
    with pytest.raises(UserError, match=r"activations\.layer 3 lies past the 2 blocks that reward\.blocks keeps"):
        tiny_config(tmp_path, f"reward.base={reward_dir}", "reward.blocks=2", "activations.layer=3")
    config = tiny_config(tmp_path, f"reward.base={reward_dir}", "reward.blocks=2", "activations.layer=2")
    preflight(config)
    deep = tiny_config(tmp_path, f"reward.base={reward_dir}", "reward.frozen_layers=5", "activations.layer=2")
    with pytest.raises(UserError, match=r"reward\.frozen_layers 5 lies past the 3 layers"):
        preflight(deep)


def test_it_is_in_a_recipe_where_it_is_set():
    assert "blocks" not in config_of("x").recorded()
    assert config_of("x", blocks=2).recorded()["blocks"] == 2
