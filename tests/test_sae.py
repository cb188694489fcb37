"""The sparse autoencoder: its layout, its gradients and its dead latents."""

import json

import pytest
import torch
from conftest import random_sae

from safer_ray.errors import UserError
from safer_ray.sae import TopKSae, standardise
from safer_ray.sae_formats import load_sae, sae_layer, save_sae
from safer_ray.sae_loss import remove_parallel_gradient, sae_step
from safer_ray.sparse import SparseCodes
from safer_ray.training import EngineOptions, TorchEngine


@pytest.fixture
def raw():
    return 3 + 5 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae():
    return random_sae(32, 64, 4)


def dense(codes, latents):
    return torch.zeros(len(codes.features), latents).scatter_(1, codes.features, codes.values)


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


def test_a_saved_sae_loads_with_the_same_codes(sae, raw, tmp_path):
    save_sae(sae, tmp_path, model="some model", layer=7)
    loaded = load_sae(tmp_path)
    x = standardise(raw).x
    assert loaded.k == 4
    assert sae_layer(tmp_path) == 7
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), sae.state_dict().values(), strict=True))
    assert torch.equal(loaded.encode(x).values, sae.encode(x).values)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore")
def test_saelens_opens_the_directory_with_the_same_codes_and_reconstruction(sae, raw, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    save_sae(sae, tmp_path, model="some model", layer=2)
    theirs = SAE.load_from_disk(str(tmp_path), device="cpu")
    found = standardise(raw)
    ours = sae.encode(found.x)
    with torch.inference_mode():
        codes = theirs.encode(raw)  # it applies layer_norm itself
        decoded = theirs.decode(codes)
    torch.testing.assert_close(codes, dense(ours, 64).detach(), rtol=0, atol=1e-5)
    expected = sae.decode(ours) * (found.std + 1e-5)[:, None] + found.mean[:, None]
    torch.testing.assert_close(decoded, expected.detach(), rtol=1e-5, atol=1e-4)


def test_the_decoder_stays_of_unit_norm_and_its_gradient_tangential(sae, raw):
    engine = TorchEngine(sae, EngineOptions(learning_rate=0.05))
    x = standardise(raw).x
    for _ in range(5):
        engine.backward(sae_step(sae, x, torch.zeros(64, dtype=torch.bool), 0).loss)
        remove_parallel_gradient(sae)
        radial = (sae.W_dec.grad * sae.W_dec).sum(-1)
        torch.testing.assert_close(radial, torch.zeros(64), rtol=0, atol=1e-6)
        engine.step(1.0)
        sae.normalise_decoder()
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


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


def change_config(directory, **more):
    path = directory / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_another_architecture_is_refused(sae, tmp_path):
    save_sae(sae, tmp_path, model="m", layer=1)
    change_config(tmp_path, architecture="gated")
    with pytest.raises(UserError, match=r"architecture 'gated'.*wanted 'topk'"):
        load_sae(tmp_path)


def test_another_normalisation_is_refused(sae, tmp_path):
    save_sae(sae, tmp_path, model="m", layer=1)
    change_config(tmp_path, normalize_activations="none")
    with pytest.raises(UserError, match="normalize_activations 'none' is not supported"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_and_corrupt_files_are_named(sae, tmp_path, name):
    save_sae(sae, tmp_path, model="m", layer=1)
    (tmp_path / name).write_bytes(b"{ no")
    with pytest.raises(UserError, match=r"corrupt SAE in .*copy it again"):
        load_sae(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"no SAE in .*: {name} is missing"):
        load_sae(tmp_path)


@pytest.mark.parametrize("more", [{"k": None}, {"k": "many"}, {"k": 65}])
def test_a_config_that_does_not_fit_the_weights_is_refused(sae, tmp_path, more):
    save_sae(sae, tmp_path, model="m", layer=1)
    change_config(tmp_path, **more)
    with pytest.raises(UserError, match=r"k|corrupt"):
        load_sae(tmp_path)


def test_weights_of_the_wrong_shape_are_refused(sae, tmp_path):
    from safetensors.torch import load_file, save_file

    save_sae(sae, tmp_path, model="m", layer=1)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**weights, "b_enc": torch.zeros(3)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="corrupt SAE"):
        load_sae(tmp_path)
    save_file({"b_enc": torch.zeros(3)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="corrupt SAE"):
        load_sae(tmp_path)


def test_an_sae_that_does_not_say_its_layer_is_refused(sae, tmp_path):
    save_sae(sae, tmp_path, model="m", layer=1)
    change_config(tmp_path, metadata={})
    with pytest.raises(UserError, match=r"does not say its layer; add metadata.safer_ray_layer"):
        sae_layer(tmp_path)


def test_a_folder_without_sae_has_no_layer(tmp_path):
    with pytest.raises(UserError, match="no SAE in"):
        sae_layer(tmp_path)
