"""How good an SAE is, against plain recomputations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.made import make_pairs, random_sae
from support.sae_vectors import WIDTH, dictionary_vectors

from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import forward_pairs
from safer_ray.sae import quality as sae_quality_module
from safer_ray.sae.model import SparseCodes, TopKSae, standardise
from safer_ray.sae.quality import decoder_clusters, density_histogram, sae_quality, spliced

LAYER = 2


def vectors(n):
    return standardise(torch.from_numpy(dictionary_vectors(n))).x.numpy().astype(np.float16)


def test_quality_equals_a_plain_recomputation_however_the_vectors_come():
    sae = random_sae(WIDTH, 300, 4)
    x = vectors(200)
    found = sae_quality(sae, [x[:3], x[3:150], x[150:]])
    rows = x.astype(np.float64)
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in sae.state_dict().items()}
    pre = (rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=1)[:, [-4]], np.maximum(pre, 0), 0)
    error = ((z @ weights["W_dec"] + weights["b_dec"] - rows) ** 2).sum(axis=1)
    assert found.nmse == pytest.approx((error / (rows**2).sum(axis=1)).mean(), rel=1e-5)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - error.sum() / spread, rel=1e-4)
    assert found.l0 == pytest.approx((z > 0).sum(axis=1).mean())
    assert found.dead_share == pytest.approx(1 - (z > 0).any(axis=0).mean())
    assert found.dead_share > 0
    assert found.fired.tolist() == (z > 0).sum(axis=0).tolist()
    assert found.vectors == 200


def test_the_density_histogram_has_every_latent_that_fires_once():
    found = sae_quality(random_sae(WIDTH, 300, 4), [vectors(200)])
    histogram = density_histogram(found)
    assert sum(histogram["counts"]) == (found.fired > 0).sum()
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    rarest = np.log10(found.fired[found.fired > 0].min() / 200)
    first = next(i for i, count in enumerate(histogram["counts"]) if count)
    assert histogram["edges"][first] <= rarest < histogram["edges"][first + 1]


def test_latents_with_nearly_the_same_direction_are_clusters():
    sae = random_sae(WIDTH, 100, 4)
    assert decoder_clusters(sae) == (0.0, 0)
    with torch.no_grad():
        sae.W_dec[[10, 50]] = sae.W_dec[3] * 2
        sae.W_dec[80] = sae.W_dec[20] + 0.01
        sae.W_dec[99] = -sae.W_dec[98]
    assert decoder_clusters(sae) == (0.05, 2)
    share, number = decoder_clusters(sae, compared=50)
    assert 0 < share <= 0.1
    assert number <= 2


class Perfect(TopKSae):
    """Gives back what it is given."""

    def encode(self, x):
        self.given = x
        return SparseCodes(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))

    def decode(self, codes):
        return self.given


class Blind(Perfect):
    def decode(self, codes):
        return torch.zeros_like(self.given)


@pytest.fixture
def tokens(reward):
    return reward.pairs(make_pairs(24).to_pylist())


def test_pairs_are_read_in_pieces_as_if_at_once(reward, tokens, monkeypatch):
    sae = random_sae(reward.hidden_size, 64, 4)
    whole = spliced(reward, LAYER, sae, tokens)
    monkeypatch.setattr(sae_quality_module, "PAIRS", 5)
    assert spliced(reward, LAYER, sae, tokens) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_perfect_reconstruction_costs_nothing(reward, tokens, everywhere):
    found = spliced(reward, LAYER, Perfect(reward.hidden_size, 8, 1), tokens, all_tokens=everywhere)
    assert found.pairs == 24
    assert found.reward_nmse < 1e-6
    assert (found.accuracy_change, found.sign_flips) == (0, 0)
    rewards = forward_pairs(reward, tokens).rewards
    assert found.accuracy == pytest.approx(float((rewards[0::2] > rewards[1::2]).float().mean()))


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_blind_one_costs_the_model_its_rewards(reward, tokens, everywhere):
    found = spliced(reward, LAYER, Blind(reward.hidden_size, 8, 1), tokens, all_tokens=everywhere)
    assert found.reward_nmse > 1
    assert found.sign_flips > 0.1


def test_splicing_works_on_encoders_too(bert_dir):
    reward = load_reward_model(bert_dir)
    found = spliced(reward, LAYER, Perfect(reward.hidden_size, 8, 1), reward.pairs(make_pairs(6).to_pylist()))
    assert found.reward_nmse < 1e-4


def test_splicing_works_where_sequences_run_one_by_one(reward, tokens):
    sae = random_sae(reward.hidden_size, 64, 4)
    alone = spliced(replace(reward, pads=False), LAYER, sae, tokens)
    assert alone == pytest.approx(spliced(reward, LAYER, sae, tokens), rel=1e-4)


def test_what_is_spliced_in_is_the_reconstruction_in_the_layers_own_units(reward, tokens):
    """Against a hook that replaces every token of one side at a time."""
    sae = random_sae(reward.hidden_size, 64, 4)
    found = spliced(reward, LAYER, sae, tokens[:3], all_tokens=True)

    def replace(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        made = standardise(hidden[0])
        x = sae.decode(sae.encode(made.x)) * (made.std[:, None] + 1e-5) + made.mean[:, None]
        return (x[None], *output[1:]) if isinstance(output, tuple) else x[None]

    changes = []
    with torch.inference_mode():
        for pair in tokens[:3]:
            for side in (pair.chosen, pair.rejected):
                ids = torch.from_numpy(side.ids)[None]
                before = reward.model(input_ids=ids).logits[0, 0]
                handle = reward.blocks()[LAYER - 1].register_forward_hook(replace)
                changes.append(float(reward.model(input_ids=ids).logits[0, 0] - before))
                handle.remove()
    assert found.reward_mse == pytest.approx(np.mean(np.square(changes)), rel=1e-3)
