"""Parts of a model: what they give is what the whole gives there, and no other weight is read."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.made import make_pairs
from support.model_types import COMMON, FAMILIES, build, states_of

from safer_ray.errors import UserError
from safer_ray.features.encoder import Encoder
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.parts import load_part

LAYERS = COMMON["num_hidden_layers"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request, tmp_path_factory):
    model = build(request.param).model
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


@pytest.mark.parametrize("cut", [[0, 4], [0, 2, 4], [0, 1, 2, 3, 4], [0, 3, 4]])
def test_parts_in_a_row_are_the_whole(saved, cut):
    model, directory = saved
    ids = torch.randint(1, COMMON["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    wanted, last = states_of(model, input_ids=ids)
    states = None
    for start, stop in pairwise(cut):
        part = load_part(directory, start, stop)
        assert len(part.base_model.layers) == stop - start
        if start == 0:
            found, end = states_of(part, input_ids=ids)
        else:
            given = states
            handle = part.base_model.layers[0].register_forward_pre_hook(
                lambda m, args, kwargs, given=given: ((given, *args[1:]), kwargs), with_kwargs=True
            )
            found, end = states_of(part, inputs_embeds=states)
            handle.remove()
            assert part.base_model.embed_tokens.weight.numel() == COMMON["hidden_size"]  # none but a stub
        for ours, theirs in zip(found, wanted[start:stop], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        states = found[-1]
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(part.score(end), model.score(last), rtol=1e-5, atol=1e-5)


def test_a_part_reads_no_weight_of_another(saved, tmp_path):
    """The other blocks' weights are not even there."""
    _, directory = saved
    weights = load_file(directory / "model.safetensors")
    kept = {name: w for name, w in weights.items() if ".2." not in name and ".3." not in name and "score" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    first = load_part(tmp_path, 0, 2)
    for name, weight in first.state_dict().items():
        if name in kept and name.partition("model.")[2] != "norm.weight":
            assert torch.equal(weight, weights[name]), name


def test_weights_in_several_files_are_found(saved, tmp_path):
    model, directory = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for start, stop in ((0, 2), (2, 4)):
        one, other = load_part(tmp_path, start, stop).state_dict(), load_part(directory, start, stop).state_dict()
        shared = [name for name in one if ".layers." in name]
        assert shared
        assert all(torch.equal(one[name], other[name]) for name in shared)


def test_blocks_that_are_not_there_are_refused(saved):
    with pytest.raises(UserError, match=r"has blocks 1\.\.4; there are none from 4 to 5"):
        load_part(saved[1], 3, 5)


def test_a_model_that_is_not_known_to_split_up_is_refused(bert_dir):
    with pytest.raises(UserError, match=r"a bert is not known to split up by layers; use reward\.shards: 1"):
        load_part(bert_dir, 1, 2)


def test_activations_load_the_blocks_they_need(model_dir):
    pairs = make_pairs(5).to_pylist()
    whole, early = Encoder.load(model_dir, 2), Encoder.load(model_dir, 2, rewards=False)
    assert len(early.reward.blocks()) == 2 < len(whole.reward.blocks())
    for ours, theirs in zip(early.encode(pairs).vectors, whole.encode(pairs).vectors, strict=True):
        np.testing.assert_allclose(ours.x.numpy(), theirs.x.numpy(), rtol=1e-5, atol=1e-5)


def test_a_family_that_nobody_checked_is_loaded_whole(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("safer_ray.reward.checkpoints.splits_up", lambda config, start=0: False)
    assert (
        len(load_reward_model(model_dir, layers=1).blocks())
        == json.loads((model_dir / "config.json").read_text())["num_hidden_layers"]
    )
