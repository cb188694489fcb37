"""Reward models: the same numbers as plain transformers, and one clear line where a model cannot be used."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.made import TINY, make_pair, make_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.features.encoder import Encoder, codes_table
from safer_ray.reward import execution
from safer_ray.reward.bases import resolve_base
from safer_ray.reward.checkpoints import (
    SETTINGS,
    load_pair_tokenizer,
    load_reward_model,
    new_reward_model,
    save_reward_model,
)
from safer_ray.reward.execution import rewards_of
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.packing import pack, unpacked
from safer_ray.reward.tiny_llama import train_tokenizer
from safer_ray.sae.formats import load_sae
from safer_ray.sae.model import standardise
from safer_ray.sae.variants.batch_topk import BatchTopKSae
from safer_ray.storage.work import Part


@pytest.fixture
def sequences():
    generator = np.random.default_rng(0)
    return [generator.integers(5, 300, size=n) for n in (3, 40, 17, 17, 61, 1, 28)]


@torch.inference_mode()
def plainly(directory, sequence):
    """Reward and hidden states of one unpadded sequence by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    output = model(input_ids=torch.tensor(sequence)[None], output_hidden_states=True)
    return output.logits[0, 0], output.hidden_states


def test_rewards_equal_transformers_on_separate_unpadded_sequences(model_dir, sequences):
    rewards = forward(load_reward_model(model_dir), sequences).rewards
    wanted = torch.stack([plainly(model_dir, s)[0] for s in sequences])
    assert wanted.std() > 1e-4
    torch.testing.assert_close(rewards, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layers_output_equals_transformers_hidden_states(model_dir, sequences, layer):
    places = [np.arange(len(s)) for s in sequences]
    model = load_reward_model(model_dir)
    with_rewards = forward(model, sequences, layers=[layer], positions=places)
    without = forward(model, sequences, layers=[layer], positions=places, rewards=False)
    assert without.rewards is None
    for i, sequence in enumerate(sequences):
        wanted = plainly(model_dir, sequence)[1][layer][0]
        torch.testing.assert_close(with_rewards.hidden[i], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(without.hidden[i], with_rewards.hidden[i], rtol=1e-5, atol=1e-6)


def test_early_exit_does_not_run_later_blocks(reward, sequences):
    ran = []
    handles = [
        block.register_forward_hook(lambda m, i, o, n=n: ran.append(n)) for n, block in enumerate(reward.blocks())
    ]
    forward(reward, sequences[:1], layers=[2], positions=[np.array([0])], rewards=False)
    for handle in handles:
        handle.remove()
    assert ran[0] == 0
    assert 2 not in ran


@pytest.mark.parametrize("budget", [1, 70, 10**6])
def test_results_do_not_depend_on_order_or_token_budget(reward, sequences, budget):
    places = [np.array([0, len(s) - 1]) for s in sequences]
    straight = forward(reward, sequences, layers=[2], positions=places)
    order = [4, 0, 6, 2, 1, 5, 3]
    mixed = forward(
        reward, [sequences[i] for i in order], layers=[2], positions=[places[i] for i in order], budget=budget
    )
    torch.testing.assert_close(mixed.rewards, straight.rewards[order], rtol=1e-5, atol=1e-5)
    for j, i in enumerate(order):
        torch.testing.assert_close(mixed.hidden[j], straight.hidden[i], rtol=1e-5, atol=1e-5)


def test_micro_batches_hold_at_most_the_budget(reward, sequences, monkeypatch):
    seen = []
    run = execution.run_micro_batch

    def watch(reward, rows, *more):
        seen.append((len(rows), max(len(row.ids) for row in rows)))
        return run(reward, rows, *more)

    monkeypatch.setattr("safer_ray.reward.forward.run_micro_batch", watch)
    forward(reward, sequences, budget=70)
    assert sum(n for n, _ in seen) == len(sequences)
    assert all(n == 1 or n * longest <= 70 for n, longest in seen)


def test_the_exported_directory_opens_in_transformers_with_the_same_rewards(reward, reward_dir, tmp_path, sequences):
    save_reward_model(reward, tmp_path)
    wanted = forward(reward, sequences).rewards
    got = torch.stack([plainly(tmp_path, s)[0] for s in sequences])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"
    assert json.loads((tmp_path / SETTINGS).read_text()) == {"template": "plain", "max_length": 96, "frozen_layers": 0}
    assert load_pair_tokenizer(tmp_path).limit == 96


def test_given_weights_are_exported_in_the_place_of_the_models_own(reward, tmp_path, sequences):
    weights = {name: weight.clone() for name, weight in reward.model.state_dict().items()}
    weights["score.weight"] *= -2
    save_reward_model(reward, tmp_path, weights)
    found = forward(load_reward_model(tmp_path), sequences).rewards
    torch.testing.assert_close(found, -2 * forward(reward, sequences).rewards, rtol=1e-5, atol=1e-5)


def test_an_export_over_an_older_one_leaves_nothing_of_it(reward, tmp_path):
    weights = {name: torch.zeros_like(weight) for name, weight in reward.model.state_dict().items()}
    save_reward_model(reward, tmp_path, weights)
    names = sorted(path.name for path in tmp_path.iterdir())
    save_reward_model(reward, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = load_reward_model(tmp_path).model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in reward.model.state_dict().items())


def test_a_pair_tokenizer_without_the_weights_reads_as_the_model_does(model_dir, pairs):
    alone, model = load_pair_tokenizer(model_dir), load_reward_model(model_dir)
    assert (alone.limit, alone.template) == (model.pairs.limit, model.pairs.template)
    rows = pairs.slice(0, 5).to_pylist()
    for one, other in zip(alone(rows), model.pairs(rows), strict=True):
        assert one.chosen.ids.tolist() == other.chosen.ids.tolist()
        assert one.rejected.token.tolist() == other.rejected.token.tolist()


def test_a_pair_tokenizer_keeps_to_the_models_positions(reward_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model" / SETTINGS).write_text(json.dumps({"template": "plain", "max_length": 4000}))
    assert load_pair_tokenizer(tmp_path / "model").limit == TINY.positions
    assert load_reward_model(tmp_path / "model").pairs.limit == TINY.positions


def test_equal_seeds_make_equal_models(pairs):
    def made(seed):
        return new_reward_model(RewardConfig(base=TINY, seed=seed), lambda: ["some text, to learn from."]).model

    one, two, other = made(1), made(1), made(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.score.weight, other.score.weight)


def test_a_missing_model_names_the_folder_and_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"no model in .*config.json is missing.*hub:OWNER/NAME"):
        load_reward_model(tmp_path / "none")


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="package 'no_such_package' is not installed; install it, or the extra"):
        resolve_base("package:no_such_package/model")


def test_hub_names_carry_a_revision():
    assert resolve_base("hub:owner/name@abc") == ("owner/name", "abc")
    assert resolve_base("hub:owner/name") == ("owner/name", None)


def test_corrupt_weights_are_one_line(reward_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"corrupt weights: .*model\.safetensors") as caught:
        load_reward_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_model_without_reward_head_is_refused_and_can_be_trained_on(reward_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "base")
    load_reward_model(reward_dir).model.base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"is no reward model: it has no weights for score.weight; train one on it"):
        load_reward_model(tmp_path / "base")
    assert new_reward_model(RewardConfig(base=str(tmp_path / "base")), lambda: []).hidden_size == TINY.hidden


def test_a_model_of_several_outputs_is_refused(bert_dir, tmp_path):
    shutil.copytree(bert_dir, tmp_path / "model")
    BertForSequenceClassification(
        BertConfig(**BertConfig.from_pretrained(bert_dir).to_diff_dict() | {"num_labels": 3})
    ).save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError,
        match=r"cannot load a reward model from .*: it has 3 outputs, and a reward is one; choose a reward with",
    ):
        load_reward_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (
            lambda name: f"_orig_mod.{name}",
            r"no weights for model\.\S+ \(\d+ such\), but for _orig_mod\.\S+: `_orig_mod\.` is in the names of a model",
        ),
        (
            lambda name: "" if ".1." in name else name,
            r"no weights for model\.layers\.1\.\S+ \(9 such\); copy all of its",
        ),
    ],
)
def test_weights_that_are_not_there_are_never_drawn_by_chance(reward_dir, tmp_path, rename, told):
    shutil.copytree(reward_dir, tmp_path / "model")
    weights = {rename(name): weight for name, weight in load_file(reward_dir / "model.safetensors").items()}
    weights.pop("", None)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    openers = (
        lambda: new_reward_model(RewardConfig(base=str(tmp_path / "model")), lambda: []),
        lambda: load_reward_model(tmp_path / "model"),
        lambda: load_reward_model(tmp_path / "model", layers=2),
        lambda: load_reward_model(tmp_path / "model", part=Part(0, 1)),
    )
    for opener in openers:
        with pytest.raises(UserError, match=told):
            opener()


def test_a_tokenizer_that_exceeds_the_embedding_is_refused(reward_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    train_tokenizer(lambda: [f"word{i} other{i * 7}" for i in range(600)], 900).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"ids up to 899, the embedding only 400 rows; use the tokenizer that belongs"):
        load_reward_model(tmp_path / "model")


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_past_the_model_is_refused_with_the_range(reward, layer):
    with pytest.raises(UserError, match=rf"layer {layer} lies past the 3 layers of tiny; choose 1\.\.3"):
        Encoder(reward, layer)


def small(kind, vocabulary, pad):
    """A random decoder, of a family whose pairs are packed or of another."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "num_labels": 1, "pad_token_id": pad}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes))
    sizes |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return LlamaForSequenceClassification(LlamaConfig(hidden_size=32, **sizes))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [None, 99, "eos"])
def test_a_reward_is_read_where_the_checkpoint_reads_it_whatever_pads(tmp_path, kind, pad):
    tokenizer = train_tokenizer(lambda: ["some text"], 300)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    eos = tokenizer.eos_token_id
    small(kind, len(tokenizer), eos if pad == "eos" else pad).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sequences = [np.array(ids) for ids in ([5, 6, 7, eos], [8, 9, eos], [8, 9, 10, 11, 12])]
    wanted = torch.stack([plainly(tmp_path, s)[0] for s in sequences])
    reward = load_reward_model(tmp_path)
    found = forward(reward, sequences, heads=True)
    torch.testing.assert_close(found.rewards, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.heads @ reward.model.score.weight[0], wanted, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(
            rewards_of(reward, [unpacked(ids) for ids in sequences]), wanted, rtol=1e-5, atol=1e-5
        )


def test_the_models_positions_limit_the_length(pairs):
    reward = new_reward_model(RewardConfig(base=TINY, max_length=4000), lambda: ["text"])
    assert reward.pairs.limit == TINY.positions


def test_the_engine_gives_codes_and_rewards_of_one_pass(reward, sae_dir, pairs):
    rows = pairs.slice(0, 6).to_pylist()
    sae = load_sae(sae_dir)
    encoded = Encoder(reward, 2, sae).encode(rows)
    table = codes_table(encoded)
    assert table["pair_id"].to_pylist() == [row["pair_id"] for row in rows]
    for i, pair in enumerate(encoded.tokens):
        raw = forward(reward, [pair.chosen.ids], layers=[2], positions=[pair.chosen.token])
        codes = sae.encode(standardise(raw.hidden[0]).x)
        row = table.slice(i, 1).to_pylist()[0]
        assert row["chosen_reward"] == pytest.approx(float(raw.rewards[0]), abs=1e-5)
        assert row["chosen_token"] == pair.chosen.token.tolist()
        for features, values, wanted_f, wanted_v in zip(
            row["chosen_features"], row["chosen_values"], codes.features, codes.values, strict=True
        ):
            wanted = {int(f): float(v) for f, v in zip(wanted_f, wanted_v, strict=True) if v > 0}
            assert features == sorted(wanted)
            assert values == pytest.approx([wanted[f] for f in features], abs=1e-4)


def test_codes_do_not_depend_on_the_batch(reward, sae_dir, pairs):
    encoder = Encoder(reward, 2, load_sae(sae_dir))
    rows = pairs.slice(0, 5).to_pylist()
    together = codes_table(encoder.encode(rows)).to_pylist()
    for row, wanted in zip(rows, together, strict=True):
        alone = codes_table(encoder.encode([row])).to_pylist()[0]
        assert alone["rejected_features"] == wanted["rejected_features"]
        assert np.concatenate(alone["rejected_values"]) == pytest.approx(
            np.concatenate(wanted["rejected_values"]), rel=1e-4, abs=1e-5
        )


def test_the_engine_gives_as_many_codes_as_a_batch_topk_sae_has_active(reward, pairs):
    from support.made import random_sae

    sae = BatchTopKSae(32, 64, 4)
    sae.load_state_dict(
        random_sae(32, 64, 4).state_dict() | {"threshold": torch.full((64,), 1.5), "batches": sae.batches}
    )
    encoded = Encoder(reward, 2, sae).encode(pairs.slice(0, 6).to_pylist())
    rows = codes_table(encoded).to_pylist()
    found = [len(features) for row in rows for features in row["chosen_features"]]
    wanted = [int((sae.pre_activations(v.x) > 1.5).sum()) for v in encoded.vectors[::2]]
    assert sum(found) == sum(wanted)
    assert len(set(found)) > 1


def test_an_sae_of_another_width_is_refused(reward):
    from support.made import random_sae

    with pytest.raises(UserError, match="the SAE reads 16 dimensions, tiny has 32; train an SAE"):
        Encoder(reward, 2, random_sae(16, 32, 4))


def test_an_engine_on_a_folder_without_sae_says_so(reward_dir, tmp_path):
    with pytest.raises(UserError, match="no SAE in"):
        Encoder.load(reward_dir, sae=tmp_path)


def test_a_model_that_gives_nan_names_the_pair(reward_dir, sae_dir):
    reward = load_reward_model(reward_dir)
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="pair 'first': layer 2 of tiny gives NaN"):
        Encoder(reward, 2, load_sae(sae_dir)).encode([make_pair("first", "Hi?", "Yes, of course.", "No.")])


def test_all_tokens_are_read_when_asked_for(reward):
    encoded = Encoder(reward, 1, rewards=False).encode(make_pairs(2).to_pylist(), all_tokens=True)
    assert encoded.rewards is None
    assert encoded.codes is None
    assert [len(v.x) for v in encoded.vectors] == [
        len(side.ids) for pair in encoded.tokens for side in (pair.chosen, pair.rejected)
    ]


# Memory


@pytest.fixture
def starved(reward, monkeypatch):
    """The model where passes of more than so many padded tokens do not fit the memory; what ran is listed."""
    ran = []

    def limit(tokens, error):
        forward = reward.model.model.forward

        def limited(**inputs):
            ids = inputs["input_ids"]
            if ids.numel() > tokens:
                raise error
            ran.append(tuple(ids.shape))
            return forward(**inputs)

        monkeypatch.setattr(reward.model.model, "forward", limited)
        return ran

    return limit


def no_memory():
    """What torch says where there is none: this much is nowhere."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_micro_batch_that_does_not_fit_is_halved_once(reward, sequences, starved, device):
    wanted = forward(reward, sequences).rewards
    ran = starved(65, no_memory() if device == "cpu" else torch.OutOfMemoryError("CUDA out of memory"))
    found = forward(reward, sequences, budget=130).rewards
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert sum(rows for rows, _ in ran) == len(sequences)


def test_a_pair_that_does_not_fit_even_so_is_named(reward, pairs, starved):
    tokens = reward.pairs(pairs.slice(0, 3).to_pylist())
    longest = max(tokens, key=lambda t: len(pack(t.chosen.ids, t.rejected.ids).ids))
    n = len(pack(longest.chosen.ids, longest.rejected.ids).ids)
    starved(n - 1, no_memory())
    with pytest.raises(
        UserError, match=rf"pair '{longest.pair_id}' has {n} tokens, which do not fit the memory"
    ) as told:
        forward_pairs(reward, tokens)
    assert "raise reward.shards" in str(told.value)


def test_another_error_is_not_taken_for_want_of_memory(reward, sequences, starved):
    starved(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        forward(reward, sequences)
