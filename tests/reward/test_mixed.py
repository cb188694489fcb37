"""Models in 16 bits: which of their parts stay in float32, and how far their rewards are from those of float32."""

import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_types import COMMON, FAMILIES, MORE_PACKED, build
from support.reward_models import save_reward_model_of

from safer_ray.config.reading import Reading
from safer_ray.reward import precision
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.mixed import keep_exact
from safer_ray.reward.precision import has_16_bits, precision_of
from safer_ray.reward.pretrained import lower_trunk
from safer_ray.reward.text import PairTokens, Side
from safer_ray.storage.work import Part

HALVES = {"bfloat16": 0.1, "float16": 0.02}  # and how far a reward may lie from that in float32, by their spread
BETWEEN = 0.1  # as far as docs/own-data.md says that micro-batches of other sizes may move a margin


def drawn_pair(seed):
    rng = np.random.default_rng(seed)
    prompt, *responses = (rng.integers(1, COMMON["vocab_size"], rng.integers(3, 40)) for _ in range(3))
    sides = [np.concatenate([prompt, response]) for response in responses]
    return PairTokens("p", *(Side(ids, np.arange(2), np.arange(2), False, len(prompt)) for ids in sides))


def spread(rewards):
    return float(rewards.std())


@pytest.fixture(autouse=True)
def _say_again():
    precision._say_faster.cache_clear()
    precision.tell_emulated.cache_clear()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*FAMILIES, *MORE_PACKED])
def test_every_family_that_is_packed_runs_in_16_bits(name, dtype):
    reward = build(name)
    with torch.no_grad():
        for parameter in reward.model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.3  # as large as a trained model's: weights that throw everything about, throw errors too
    pairs = [drawn_pair(seed) for seed in range(12)]
    whole = forward_pairs(reward, pairs).rewards
    lower_trunk(reward.model, getattr(torch, dtype))
    keep_exact(reward)
    found = forward_pairs(reward, pairs, layers=[3], positions=[np.arange(2)] * (2 * len(pairs)))
    assert found.rewards.dtype == found.hidden[0].dtype == torch.float32
    assert (found.rewards - whole).abs().max() <= HALVES[dtype] * spread(whole)
    exact = {name for name, weight in reward.model.named_parameters() if weight.dtype == torch.float32}
    assert exact == {name for name in exact if "norm" in name and "attn." not in name} | {"score.weight"}
    assert reward.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", ["Qwen 3", "Gemma 2", "GPT-2", "BERT", "RoBERTa", "DeBERTa v3"])
def test_the_head_of_a_checkpoint_is_the_one_in_its_files(tmp_path, kind):
    folder = save_reward_model_of(kind, tmp_path)
    whole, half = (load_reward_model(folder, reading=Reading(inference_dtype=d)) for d in ("float32", "bfloat16"))
    assert half.model.dtype == torch.bfloat16
    assert torch.equal(whole.head().weight, half.head().weight)
    assert type(whole.model).__name__ == type(half.model).__name__
    rows = [{"pair_id": "a", **{side: [{"role": role, "content": text}] for side, role, text in SAID}}]
    rewards = [forward_pairs(reward, reward.pairs(rows), heads=True).rewards for reward in (whole, half)]
    assert rewards[1].isfinite().all()


SAID = (("prompt", "user", "What is it?"), ("chosen", "assistant", "A bird."), ("rejected", "assistant", "No."))


@pytest.mark.parametrize("dtype", HALVES)
def test_rewards_in_16_bits_are_within_the_bounds_that_the_docs_tell(reward_dir, pairs, dtype):
    rows = pairs.to_pylist()
    whole, half = (load_reward_model(reward_dir, reading=Reading(inference_dtype=d)) for d in ("float32", dtype))
    wanted = forward_pairs(whole, whole.pairs(rows)).rewards
    found = [forward_pairs(half, half.pairs(rows), budget=budget).rewards for budget in (128, 1024, 4096)]
    assert (torch.stack(found) - wanted).abs().max() <= HALVES[dtype] * spread(wanted)
    assert (torch.stack(found) - found[0]).abs().max() <= BETWEEN * spread(wanted)


def test_a_model_in_parts_hands_on_states_of_float32(reward_dir, pairs):
    half = Reading(inference_dtype="bfloat16")
    whole = load_reward_model(reward_dir, reading=half)
    first, last = (load_reward_model(reward_dir, part=Part(i, 2), reading=half) for i in range(2))
    tokens = whole.pairs(pairs.to_pylist())
    before = forward_pairs(first, tokens, rewards=False, states=True)
    assert before.states[0][0].dtype == torch.float32
    torch.testing.assert_close(
        forward_pairs(last, tokens, before=before).rewards, forward_pairs(whole, tokens).rewards, rtol=0, atol=0
    )


# Which dtype


@pytest.fixture
def halved_dir(reward_dir, tmp_path):
    """A checkpoint of 16 bits."""
    folder = shutil.copytree(reward_dir, tmp_path / "halved")
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_auto_is_bfloat16_on_a_gpu_for_weights_of_16_bits_alone(reward_dir, halved_dir):
    assert (has_16_bits(reward_dir), has_16_bits(halved_dir)) == (False, True)
    for on_gpu, found in ((True, "bfloat16"), (False, "float32")):
        assert precision_of(halved_dir, Reading(), lambda on_gpu=on_gpu: on_gpu) == found
        assert precision_of(reward_dir, Reading(), lambda on_gpu=on_gpu: on_gpu) == "float32"
    assert precision_of(halved_dir, Reading(inference_dtype="float16"), lambda: True) == "float16"


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_processor_that_multiplies_bfloat16_is_told_of_once_for_weights_of_16_bits(
    reward_dir, halved_dir, caplog, monkeypatch, multiplies
):
    monkeypatch.setattr(precision, "cpu_multiplies", lambda dtype: multiplies or dtype == "float32")
    load_reward_model(reward_dir, device="cpu")
    assert not caplog.text
    for _ in range(2):
        assert load_reward_model(halved_dir, device="cpu").model.dtype == torch.float32
    assert caplog.text.count("inference_dtype: bfloat16 it is read about twice as fast") == multiplies


def test_a_processor_that_emulates_a_dtype_is_told_of_in_a_line(reward_dir, caplog, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies", lambda dtype: dtype == "float32")
    for dtype in ("float32", "bfloat16", "bfloat16"):
        load_reward_model(reward_dir, device="cpu", reading=Reading(inference_dtype=dtype))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("tiny: it computes in bfloat16, which this processor emulates: slower than float32")


def test_emulation_is_seen_by_the_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not precision.cpu_multiplies("bfloat16")
    assert precision.cpu_multiplies("float32")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert precision.cpu_multiplies("bfloat16") == torch.backends.mkldnn.is_available()
