"""JumpReLU: its gradients, its training, its files, and codes of any number a vector on their way to scores."""

import numpy as np
import pytest
import torch
from support.made import random_sae
from support.sae_vectors import CONFIG, activations, dictionary_vectors, write

from safer_ray.config.sae_variants import JumpReluVariant
from safer_ray.config.sections import SaeConfig
from safer_ray.features.encoder import Encoder, codes_table
from safer_ray.features.salience import SumFeatures, reduce_sums, salience_table
from safer_ray.features.scoring import Features, pair_scores
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.training_steps import OneProcess
from safer_ray.sae.formats import load_sae, save_sae
from safer_ray.sae.loss import sae_step
from safer_ray.sae.model import standardise
from safer_ray.sae.train import train_sae
from safer_ray.sae.variants.jumprelu import JumpReluSae
from safer_ray.sae.variants.registry import new_sae


@pytest.fixture
def raw():
    return 3 + 5 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae():
    """Random weights, and thresholds about the middle of what is positive."""
    made = JumpReluSae(32, 64, 4)
    threshold = 0.5 + torch.rand(64, generator=torch.Generator().manual_seed(2))
    made.load_state_dict(random_sae(32, 64, 4).state_dict() | {"threshold": threshold})
    return made


def dense(codes, latents=64):
    return torch.zeros(len(codes.features), latents).scatter_add(1, codes.features, codes.values)


def test_a_config_names_the_variant():
    named = {"kind": "jumprelu", "bandwidth": 0.2, "sparsity_coefficient": 0.3}
    made = new_sae(32, SaeConfig.model_validate({"latents": 64, "k": 4, "variant": named}))
    assert isinstance(made, JumpReluSae)
    assert (made.d, made.latents, made.k, made.bandwidth, made.sparsity) == (32, 64, 4, 0.2, 0.3)


class Gate(torch.autograd.Function):
    """H(pre - threshold) with the rectangle as its gradient, to the threshold alone, as the paper has it."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return ((pre > threshold) & (pre > 0)).to(pre.dtype)

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() < ctx.bandwidth / 2) & (pre > 0)
        return None, -(gradient * inside / ctx.bandwidth).sum(0), None


class Jump(torch.autograd.Function):
    """pre H(pre - threshold), likewise."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * ((pre > threshold) & (pre > 0))

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() < ctx.bandwidth / 2) & (pre > 0)
        of_threshold = -(gradient * inside * threshold / ctx.bandwidth).sum(0)
        return gradient * ((pre > threshold) & (pre > 0)), of_threshold, None


def test_a_step_has_the_gradients_of_the_papers_dense_one(sae, raw):
    x = standardise(raw).x
    found = sae_step(sae, x, torch.zeros(64, dtype=torch.bool), 0.0)
    found.loss.backward()
    ours = {name: value.grad.clone() for name, value in sae.named_parameters()}
    sae.zero_grad()
    pre = sae.pre_activations(x)
    reconstruction = Jump.apply(pre, sae.threshold, sae.bandwidth) @ sae.W_dec + sae.b_dec
    nmse = ((reconstruction - x).square().sum(-1) / x.square().sum(-1)).mean()
    l0 = Gate.apply(pre, sae.threshold, sae.bandwidth).sum(-1)
    loss = nmse + sae.sparsity * (l0 / sae.k - 1).square().mean()
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.nmse, nmse.detach())
    assert ours["threshold"].abs().sum() > 0
    for name, value in sae.named_parameters():
        torch.testing.assert_close(ours[name], value.grad, rtol=1e-4, atol=1e-6)


def test_thresholds_begin_where_a_sample_has_k_active_latents(raw):
    made = JumpReluSae(32, 64, 4)
    x = standardise(raw).x
    made.initialise(x, 0)
    assert (made.encode(x).values > 0).sum() / len(x) == pytest.approx(4, abs=0.1)


def test_a_threshold_is_never_negative(sae):
    with torch.no_grad():
        sae.threshold[3] = -1
    sae.project()
    assert sae.threshold.min() == 0


def test_training_lowers_the_loss_and_ends_near_k_active_latents(tmp_path):
    vectors = write(activations(dictionary_vectors(1500)), tmp_path / "vectors")
    found = {}
    for steps in (1, 300):
        config = CONFIG.model_copy(update={"variant": JumpReluVariant(), "steps": steps})
        out = tmp_path / str(steps)
        workers = OneProcess(out / "state")
        found[steps] = train_sae(vectors, out, config, workers, model="tiny", layer=2)
    assert found[300]["nmse"] < 0.5 * found[1]["nmse"]
    assert 2 < found[300]["l0"] < 6
    sae = load_sae(tmp_path / "300")
    assert isinstance(sae, JumpReluSae)
    assert sae.threshold.std() > 0  # each latent has its own
    assert (
        "| kind | JumpReLU, a threshold for each latent, trained towards 4 active"
        in (tmp_path / "300/README.md").read_text()
    )


@pytest.mark.filterwarnings("ignore")
def test_saelens_opens_the_directory_with_the_same_codes_and_reconstruction(sae, raw, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    save_sae(sae, tmp_path, model="some model", layer=2)
    ours, found = load_sae(tmp_path), standardise(raw)
    assert isinstance(ours, JumpReluSae)
    assert ours.k == 4
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in ours.state_dict().items())
    theirs = SAE.load_from_disk(str(tmp_path), device="cpu")
    assert theirs.cfg.architecture() == "jumprelu"
    codes = ours.encode(found.x)
    assert (codes.values > 0).sum(1).unique().numel() > 1
    with torch.inference_mode():
        wanted = theirs.encode(raw)
        decoded = theirs.decode(wanted)
    torch.testing.assert_close(dense(codes), wanted, rtol=0, atol=1e-5)
    expected = ours.decode(codes) * (found.std + 1e-5)[:, None] + found.mean[:, None]
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_saelens_trains_is_read_with_the_same_codes(raw, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens import SAE
    from sae_lens.saes import jumprelu_sae

    config = jumprelu_sae.JumpReLUTrainingSAEConfig(d_in=32, d_sae=64, normalize_activations="layer_norm")
    theirs = jumprelu_sae.JumpReLUTrainingSAE(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() / 3)
    theirs.save_inference_model(tmp_path)
    ours = load_sae(tmp_path)
    assert isinstance(ours, JumpReluSae)
    with torch.inference_mode():
        wanted = SAE.load_from_disk(str(tmp_path), device="cpu").encode(raw)
    assert 0 < (wanted > 0).sum() < 20 * 64
    torch.testing.assert_close(dense(ours.encode(standardise(raw).x)), wanted, rtol=1e-4, atol=1e-4)


def test_codes_of_any_number_a_vector_travel_to_salience_and_scores(sae, reward_dir, pairs, tmp_path):
    with torch.no_grad():
        sae.threshold += 0.5
    save_sae(sae, tmp_path, model="tiny", layer=2)
    encoder = Encoder(load_reward_model(reward_dir), 2, load_sae(tmp_path))
    encoded = encoder.encode(pairs.slice(0, 6).to_pylist())
    codes = codes_table(encoded)
    counts = [len(features) for row in codes.to_pylist() for features in row["chosen_features"]]
    wanted = [int(n) for v in encoded.vectors[::2] for n in (sae.pre_activations(v.x) > sae.threshold).sum(1)]
    assert counts == wanted
    assert len(set(counts)) > 1
    table = salience_table(reduce_sums([SumFeatures("response")(codes)], 64), "response")
    assert len(table) == 64
    assert np.isfinite(table["salience"].to_numpy()).all()
    scores = pair_scores(codes, Features(list(range(32)), list(range(32, 64)), "response"))
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0
