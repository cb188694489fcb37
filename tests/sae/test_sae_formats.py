"""SAEs on disk: SAELens' layout both ways, the published checkpoint, model cards."""

import json

import pytest
import torch
from support.made import random_sae
from typer.testing import CliRunner

from safer_ray.cli import app as cli
from safer_ray.errors import UserError
from safer_ray.sae.formats import load_sae, read_published, sae_layer, save_sae
from safer_ray.sae.model import standardise
from safer_ray.sae.model_card import write_model_card
from safer_ray.sae.variants.batch_topk import BatchTopKSae
from safer_ray.sae.variants.signed_topk import SignedTopKSae


@pytest.fixture
def raw():
    return 3 + 5 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sae():
    return random_sae(32, 64, 4)


@pytest.fixture
def batch_sae(sae):
    batch = BatchTopKSae(32, 64, 4)
    batch.load_state_dict(sae.state_dict() | {"threshold": torch.full((64,), 1.5), "batches": batch.batches})
    return batch


def dense(codes, latents):
    return torch.zeros(len(codes.features), latents).scatter_add(1, codes.features, codes.values)


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


@pytest.mark.filterwarnings("ignore")
def test_saelens_opens_a_batch_topk_sae_as_jumprelu(batch_sae, raw, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    save_sae(batch_sae, tmp_path, model="some model", layer=2)
    theirs = SAE.load_from_disk(str(tmp_path), device="cpu")
    ours = load_sae(tmp_path)
    assert isinstance(ours, BatchTopKSae)
    assert ours.k == 4
    codes = ours.encode(standardise(raw).x)
    assert torch.equal(codes.values, batch_sae.encode(standardise(raw).x).values)
    assert 0 < (codes.values > 0).sum() < 20 * 64
    torch.testing.assert_close(theirs.encode(raw), dense(codes, 64), rtol=0, atol=1e-5)


def trained_by_saelens(kind, raw, **more):
    """A training SAE of theirs with weights that are not trivial."""
    from sae_lens.saes import batchtopk_sae, topk_sae

    config, module = {
        "topk": (topk_sae.TopKTrainingSAEConfig, topk_sae.TopKTrainingSAE),
        "batchtopk": (batchtopk_sae.BatchTopKTrainingSAEConfig, batchtopk_sae.BatchTopKTrainingSAE),
    }[kind]
    theirs = module(config(d_in=32, d_sae=64, k=4, normalize_activations="layer_norm", **more))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_what_saelens_saves_is_read_with_the_same_codes_and_reconstruction(kind, more, raw, tmp_path):
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    theirs = trained_by_saelens(kind, raw, **more)
    if kind == "batchtopk":
        theirs.topk_threshold += 0.7
    theirs.save_inference_model(tmp_path)
    read = SAE.load_from_disk(str(tmp_path), device="cpu")
    ours, found = load_sae(tmp_path), standardise(raw)
    codes = ours.encode(found.x)
    assert ours.k == 4
    with torch.inference_mode():
        wanted = read.encode(raw)
        decoded = read.decode(wanted)
    assert 0 < (wanted > 0).sum() < 20 * 64
    torch.testing.assert_close(dense(codes, 64), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.decode(codes) * found.std[:, None] + found.mean[:, None], decoded, rtol=1e-4, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_saelens_training_is_read_with_its_threshold(raw, tmp_path):
    pytest.importorskip("sae_lens")
    theirs = trained_by_saelens("batchtopk", raw)
    theirs.topk_threshold += 0.7
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "final")
    x = standardise(raw).x
    one, other = (load_sae(tmp_path / name).encode(x) for name in ("checkpoint", "final"))
    torch.testing.assert_close(dense(one, 64), dense(other, 64), rtol=1e-4, atol=1e-4)


def published(tmp_path, **change):
    generator = torch.Generator().manual_seed(3)
    shapes = {"encoder.weight": (64, 32), "latent_bias": (64,), "decoder.weight": (32, 64), "pre_bias": (32,)}
    state = {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}
    state["latent_bias"] -= 4
    path = tmp_path / "stage2.pt"
    torch.save({name: value for name, value in (state | change).items() if value is not None}, path)
    return path, state


def test_the_published_checkpoint_gives_signed_codes(raw, tmp_path):
    path, state = published(tmp_path)
    sae = read_published(path, 8)
    x = standardise(raw, sae.epsilon).x
    torch.testing.assert_close(x * (raw.std(1) + 1e-6)[:, None], raw - raw.mean(1)[:, None])
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    kept = pre.topk(8)
    z = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    codes = sae.encode(x)
    assert (codes.values < 0).any()
    torch.testing.assert_close(dense(codes, 64), z)
    torch.testing.assert_close(sae.decode(codes), z @ state["decoder.weight"].T + state["pre_bias"])


def test_a_published_sae_keeps_its_signs_on_the_way_through_our_layout(raw, tmp_path):
    sae = read_published(published(tmp_path)[0], 8)
    save_sae(sae, tmp_path / "ours", model="m", layer=12)
    loaded = load_sae(tmp_path / "ours")
    assert isinstance(loaded, SignedTopKSae)
    assert loaded.epsilon == 1e-6
    x = standardise(raw, loaded.epsilon).x
    assert torch.equal(loaded.encode(x).values, sae.encode(x).values)
    assert "SAELens cuts negative activations off" in (tmp_path / "ours" / "README.md").read_text()


def test_a_published_checkpoint_is_imported_by_a_command(raw, tmp_path):
    path, _ = published(tmp_path)
    line = ["import-sae", "--checkpoint", str(path), "--out", str(tmp_path / "sae"), "--layer", "12", "--k", "8"]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 0, done.output
    assert "64 latents of 32 dimensions, k 8, layer 12" in " ".join(done.output.split())
    assert sae_layer(tmp_path / "sae") == 12
    x = standardise(raw, 1e-6).x
    assert torch.equal(load_sae(tmp_path / "sae").encode(x).values, read_published(path, 8).encode(x).values)
    again = CliRunner().invoke(cli.app, line)
    assert isinstance(again.exception, UserError)
    assert "is not empty; choose another --out" in str(again.exception)


@pytest.mark.parametrize("change", [{"pre_bias": None}, {"latent_bias": torch.zeros(3)}, {"encoder.weight": 5}])
def test_another_checkpoint_is_no_published_sae(change, tmp_path):
    path, _ = published(tmp_path, **change)
    with pytest.raises(UserError, match=r"is no SAE of the published code: .*wanted the tensors decoder.weight"):
        read_published(path, 8)


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return print, ("it ran",)


def test_a_published_checkpoint_runs_no_code(tmp_path, capsys):
    path, _ = published(tmp_path, extra=Runs())
    with pytest.raises(UserError, match="is no SAE of the published code"):
        read_published(path, 8)
    assert "it ran" not in capsys.readouterr().out
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="is no SAE of the published code"):
        read_published(path, 8)
    with pytest.raises(UserError, match="no checkpoint"):
        read_published(tmp_path / "absent.pt", 8)


def test_the_model_card_says_what_it_is_and_how_well_it_does(sae, tmp_path):
    save_sae(sae, tmp_path, model="some/model", layer=3)
    facts = {"nmse": 0.12345, "train_vectors": 123456, "history": [1, 2], "stages": "text, then pairs"}
    write_model_card(tmp_path, facts)
    card = (tmp_path / "README.md").read_text()
    assert "# Sparse autoencoder of layer 3 of some/model" in card
    assert "| kind | TopK, 4 active latents a vector |" in card
    assert "| width, latents | 32, 64 |" in card
    assert "| nmse | 0.1235 |" in card or "| nmse | 0.1234 |" in card
    assert "| train vectors | 123,456 |" in card
    assert "| stages | text, then pairs |" in card
    assert "history" not in card
    assert "SAE.load_from_disk" in card


def test_the_card_of_a_batch_topk_sae_says_so(batch_sae, tmp_path):
    save_sae(batch_sae, tmp_path, model="m", layer=1)
    assert "BatchTopK, 4 active latents a vector on average" in (tmp_path / "README.md").read_text()


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
