"""The sparse autoencoder: its layout, its gradients and its dead latents."""

import copy

import pytest
import torch
from support.made import random_sae

from safer_ray.config.sections import SaeConfig
from safer_ray.errors import UserError
from safer_ray.reward.training_steps import OneProcess, OptimizerOptions
from safer_ray.sae.loss import remove_parallel_gradient, sae_step
from safer_ray.sae.model import TopKSae, geometric_median, standardise
from safer_ray.sae.optimizer import SaeOptimizer
from safer_ray.sae.sparse import SparseCodes
from safer_ray.sae.variants.batch_topk import BatchTopKSae
from safer_ray.sae.variants.registry import new_sae


@pytest.fixture
def raw():
    return 3 + 5 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae():
    return random_sae(32, 64, 4)


def dense(codes, latents):
    return torch.zeros(len(codes.features), latents).scatter_add(1, codes.features, codes.values)


def test_standardised_vectors_use_the_unbiased_std(raw):
    found = standardise(raw)
    std = ((raw - raw.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).div(31).sqrt()
    torch.testing.assert_close(found.x, (raw - raw.mean(1, keepdim=True)) / (std + 1e-5))
    torch.testing.assert_close(found.std, std[:, 0])
    torch.testing.assert_close(found.norm, raw.norm(dim=1))
    torch.testing.assert_close(found.mean, raw.mean(1))


def test_codes_are_the_k_largest_latents_and_never_negative(sae, raw):
    x = standardise(raw).x
    codes = sae.encode(x)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert codes.features.shape == (20, 4)
    torch.testing.assert_close(codes.values.sort().values, pre.topk(4).values.relu().sort().values)
    assert torch.equal(codes.features.sort().values, pre.topk(4).indices.sort().values)


def test_decoding_adds_the_active_directions_and_the_bias(sae, raw):
    codes = sae.encode(standardise(raw).x)
    torch.testing.assert_close(sae.decode(codes), dense(codes, 64) @ sae.W_dec + sae.b_dec)


def test_gradients_of_sparse_decoding_equal_dense_autograd(sae, raw):
    x = standardise(raw).x
    weights = torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for sparse in (True, False):
        sae.zero_grad()
        codes = sae.encode(x)
        output = sae.decode(codes) if sparse else dense(codes, 64) @ sae.W_dec + sae.b_dec
        (output * weights).sum().backward()
        gradients.append([p.grad.clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)])
    for one, two in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.fixture
def engine(sae, tmp_path):
    return SaeOptimizer(sae, OptimizerOptions(learning_rate=0.05, max_grad_norm=0.1), OneProcess(tmp_path))


def test_the_decoder_stays_of_unit_norm_and_its_gradient_tangential(sae, engine, raw):
    x = standardise(raw).x
    for _ in range(5):
        engine.backward(sae_step(sae, x, torch.zeros(64, dtype=torch.bool), 0).loss)
        engine.reduce_gradients(torch.zeros(0))
        remove_parallel_gradient(engine.decoder)
        radial = (engine.decoder.grad * sae.W_dec).sum(-1)
        torch.testing.assert_close(radial, torch.zeros(64), rtol=0, atol=1e-6)
        engine.step(1.0)
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["short gradients", "long gradients"])
def test_an_engines_steps_are_those_of_adamw_under_a_bounded_norm(sae, engine, raw, scale):
    other = copy.deepcopy(sae)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.0)
    x = standardise(raw).x
    for number in range(5):
        for one in (sae, other):
            (scale / 30 * sae_step(one, x, torch.zeros(64, dtype=torch.bool), 0).loss).backward()
        engine.reduce_gradients(torch.zeros(0))
        engine.step(1 / (1 + number))
        remove_parallel_gradient(other.W_dec)
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        assert (norm > 0.1) == (scale > 1)
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        optimizer.step()
        optimizer.zero_grad()
        other.normalise_decoder()
        for name, wanted in other.state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], wanted, rtol=0, atol=1e-5)


def test_the_main_loss_is_the_mean_normalised_error(sae, raw):
    x = standardise(raw).x
    step = sae_step(sae, x, torch.zeros(64, dtype=torch.bool), 1 / 32)
    error = (sae.decode(sae.encode(x)) - x).square().sum(1) / x.square().sum(1)
    torch.testing.assert_close(step.loss, error.mean())
    assert step.aux == 0


def test_dead_latents_get_encoder_gradient_through_the_auxiliary_loss_alone(sae, raw):
    x = standardise(raw).x
    with torch.no_grad():
        sae.b_enc[:8] -= 50  # never among the k largest, so dead
        sae.W_enc[:, :8] *= 20
    dead = torch.zeros(64, dtype=torch.bool)
    dead[:8] = True
    with torch.no_grad():
        pre = sae.pre_activations(x)[:, :8]
        sae.b_enc[:8] += 50 - 40  # some of them fire, weakly
        assert (pre < 0).any()
    sae.zero_grad()
    sae_step(sae, x, dead, 0.0).loss.backward()
    without = sae.W_enc.grad.clone()
    fired = torch.isin(torch.arange(8), sae.encode(x).features)
    sae.zero_grad()
    sae_step(sae, x, dead, 1 / 32).loss.backward()
    change = (sae.W_enc.grad - without).abs().amax(0)
    assert (without[:, :8][:, ~fired] == 0).all()
    assert (change[:8] > 0).any()
    assert (change[8:] == 0).all()  # the residual is detached, the living ones are not touched


def test_the_auxiliary_reconstruction_has_no_bias(sae, raw):
    x = standardise(raw).x
    with torch.no_grad():
        sae.b_dec += 2
    dead = torch.arange(64) < 16
    step = sae_step(sae, x, dead, 1.0)
    pre = sae.pre_activations(x)
    residual = (x - sae.decode(sae.encode(x))).detach()
    values, features = pre[:, :16].topk(16)
    guess = dense(SparseCodes(features, values.relu()), 64) @ sae.W_dec
    wanted = ((guess - residual).square().sum(1) / residual.square().sum(1)).mean()
    torch.testing.assert_close(step.aux, wanted.detach())
    bias = torch.autograd.grad(step.loss - sae_step(sae, x, dead, 0.0).loss, sae.b_dec)[0]
    through_encoder = torch.autograd.grad(wanted, sae.b_dec)[0]
    torch.testing.assert_close(bias, through_encoder, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [0, 9])
def test_k_must_fit_the_latents(k):
    with pytest.raises(UserError, match=rf"k {k} must lie in 1\.\.8 latents"):
        TopKSae(4, 8, k)


def test_the_pre_bias_starts_at_the_geometric_median():
    sample = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    sample[:20] += 100  # outliers that drag a mean along
    found = geometric_median(sample)
    distance = (sample - found).norm(dim=1, keepdim=True)
    assert ((sample - found) / distance).sum(0).norm() < 0.01 * len(sample)  # the summed distance is flat there
    assert found.norm() < 1 < sample.mean(0).norm()
    sae = TopKSae(8, 16, 2)
    sae.initialise(sample, 0)
    assert torch.equal(sae.b_dec, found)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))


def test_the_encoder_starts_as_the_decoder_scaled_to_reconstruct_best():
    sample = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    sae = TopKSae(8, 64, 6)
    sae.initialise(sample, 0)
    factor = sae.W_enc[0, 0] / sae.W_dec[0, 0]
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T * factor)
    assert 0.1 < factor < 0.9
    errors = []
    for change in (0.95, 1.0, 1.05):
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_dec.T * factor * change)
            errors.append(float((sae.decode(sae.encode(sample)) - sample).square().sum()))
    assert errors[1] == min(errors)


def test_a_sample_that_is_its_own_median_leaves_an_encoder_without_nan():
    sae = TopKSae(8, 16, 2)
    sae.initialise(torch.ones(5, 8), 0)
    assert sae.W_enc.isfinite().all()


def test_a_sample_of_one_vector_is_its_own_median():
    torch.testing.assert_close(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_a_step_says_which_latents_fired(sae, raw):
    x = standardise(raw).x
    step = sae_step(sae, x, torch.zeros(64, dtype=torch.bool), 0.0)
    codes = sae.encode(x)
    assert torch.equal(step.fired, torch.isin(torch.arange(64), codes.features[codes.values > 0]))
    assert 0 < step.fired.sum() < 64


def batch_sae():
    sae = BatchTopKSae(32, 64, 4)
    sae.load_state_dict(random_sae(32, 64, 4).state_dict() | {"threshold": sae.threshold, "batches": sae.batches})
    return sae


def test_a_batch_shares_its_active_latents_between_vectors(raw):
    sae = batch_sae()
    x = standardise(raw).x
    entries, values = sae.active(x)
    wanted = sae.pre_activations(x).flatten().topk(4 * 20).values
    torch.testing.assert_close(values.sort().values, wanted.sort().values)
    assert entries.start.diff().float().mean() == 4
    assert entries.start.diff().unique().numel() > 1


def test_the_threshold_learns_the_smallest_activation_of_batches(raw):
    sae = batch_sae()
    x = standardise(raw).x
    least = [float(sae.active(part).values.min().detach()) for part in (x[:10], x[10:])]
    torch.testing.assert_close(sae.threshold, torch.full((64,), sum(least) / 2))
    sae.eval().active(x)
    assert int(sae.batches) == 2


def test_vectors_alone_are_read_by_the_threshold(raw):
    sae = batch_sae()
    x = standardise(raw).x
    sae.active(x)
    sae.threshold -= 1e-3  # so that nothing lies right on it
    codes = sae.encode(x)
    pre = sae.pre_activations(x)
    torch.testing.assert_close(dense(codes, 64), pre.where(pre > sae.threshold, 0))
    alone = torch.cat([dense(sae.encode(row[None]), 64) for row in x])
    torch.testing.assert_close(alone, dense(codes, 64), rtol=1e-4, atol=1e-5)
    assert (codes.values > 0).sum(1).unique().numel() > 1
    torch.testing.assert_close(sae.decode(codes), dense(codes, 64) @ sae.W_dec + sae.b_dec)


def test_a_vector_below_every_threshold_is_its_bias_alone(raw):
    sae = batch_sae()
    sae.threshold += 1000
    codes = sae.encode(standardise(raw).x)
    assert codes.values.shape == (20, 1)
    torch.testing.assert_close(sae.decode(codes), sae.b_dec.expand(20, 32))


def test_a_config_names_the_variant():
    plain = SaeConfig(latents=64, k=4)
    assert type(new_sae(32, plain)) is TopKSae
    batch = SaeConfig.model_validate({"latents": 64, "k": 4, "variant": {"kind": "batch_topk", "threshold_rate": 0.1}})
    made = new_sae(32, batch)
    assert isinstance(made, BatchTopKSae)
    assert (made.d, made.latents, made.k, made.rate) == (32, 64, 4, 0.1)
    with pytest.raises(ValueError, match="variant"):
        SaeConfig.model_validate({"variant": {"kind": "gated"}})
