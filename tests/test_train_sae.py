"""SAE training on vectors made from a known dictionary."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import random_sae
from safetensors.torch import load_file

from safer_ray import schema, training
from safer_ray import train_sae as module
from safer_ray.artifacts import part_name
from safer_ray.config import SaeConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.files import write_parquet
from safer_ray.sae import standardise
from safer_ray.sae_formats import load_sae, sae_layer
from safer_ray.train_sae import read_vectors, sae_quality, train_sae
from safer_ray.training import OneProcess

WIDTH = 24
CONFIG = SaeConfig(
    latents=64, k=4, steps=120, batch_size=64, learning_rate=5e-3, validation_percent=10, dead_after=2000
)


def dictionary_vectors(n, seed=0):
    """Sums of 3 of 32 directions with positive weights."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(32, WIDTH))
    raw = np.zeros((n, WIDTH))
    for row in raw:
        row += generator.uniform(0.5, 2, 3) @ directions[generator.choice(32, 3, replace=False)]
    return raw.astype(np.float32)


def activations(raw):
    made = standardise(torch.from_numpy(raw))
    n = len(raw)
    x = pa.FixedSizeListArray.from_arrays(pa.array(made.x.numpy().astype(np.float16).reshape(-1)), WIDTH)
    columns = {
        "pair_id": [f"p{i // 4}" for i in range(n)],
        "side": ["chosen"] * n,
        "token": np.arange(n, dtype=np.int32),
    }
    columns |= {"end": np.full(n, -1, dtype=np.int32), "norm": made.norm.numpy(), "mean": made.mean.numpy()}
    return pa.table({**columns, "std": made.std.numpy(), "x": x}, schema=schema.activations(WIDTH))


def write(table, directory, rows=500):
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), directory / part_name(number))
    return directory


@pytest.fixture(scope="module")
def vectors_dir(tmp_path_factory):
    return write(activations(dictionary_vectors(1500)), tmp_path_factory.mktemp("activations"))


@pytest.fixture
def train(vectors_dir, tmp_path):
    """Train in a folder of its name; returns where the SAE is, and the metrics."""

    def train(name, config=CONFIG, **options):
        out = tmp_path / name
        workers = OneProcess(out / "state", **options)
        return out, train_sae(vectors_dir, out, config, workers, model="tiny", layer=2)

    return train


def test_training_finds_a_known_dictionary(train, vectors_dir):
    out, metrics = train("run")
    _, start = train("start", CONFIG.model_copy(update={"steps": 1}))
    assert metrics["nmse"] < 0.5 * start["nmse"]
    assert metrics["nmse"] < 0.3
    assert metrics["explained_variance"] > 0.7
    assert metrics["explained_variance"] > start["explained_variance"]
    assert 0 < metrics["l0"] <= 4
    assert 0 <= metrics["dead_share"] < 0.5
    assert metrics["train_vectors"] + metrics["held_out_vectors"] + metrics["outliers"] == 1500
    assert metrics["steps"] == 120
    sae = load_sae(out)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert sae_layer(out) == 2
    vectors = read_vectors(vectors_dir, CONFIG)
    assert sae_quality(sae, vectors.held_out) == pytest.approx({k: metrics[k] for k in sae_quality(sae, vectors.train)})


def test_quality_equals_a_plain_recomputation():
    sae = random_sae(WIDTH, 300, 4)
    x = standardise(torch.from_numpy(dictionary_vectors(200))).x.numpy().astype(np.float16)
    found = sae_quality(sae, x)
    rows = x.astype(np.float64)
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in sae.state_dict().items()}
    pre = (rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=1)[:, [-4]], np.maximum(pre, 0), 0)
    error = ((z @ weights["W_dec"] + weights["b_dec"] - rows) ** 2).sum(axis=1)
    assert found["nmse"] == pytest.approx((error / (rows**2).sum(axis=1)).mean(), rel=1e-5)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert found["explained_variance"] == pytest.approx(1 - error.sum() / spread, rel=1e-4)
    assert found["l0"] == pytest.approx((z > 0).sum(axis=1).mean())
    assert found["dead_share"] == pytest.approx(1 - (z > 0).any(axis=0).mean())
    assert found["dead_share"] > 0


def die_at(step):
    def die(done, total):
        if done == step:
            raise KeyboardInterrupt

    return die


def assert_equal_weights(one, other):
    one, other = (load_file(path / "sae_weights.safetensors") for path in (one, other))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [3, 25, 77])
def test_a_killed_run_resumes_to_the_same_weights(train, monkeypatch, step):
    wanted, metrics = train("undisturbed")
    monkeypatch.setattr(module, "CHECKPOINT_STEPS", 10)
    with pytest.raises(KeyboardInterrupt):
        train("killed", on_step=die_at(step))
    steps = []
    out, again = train("killed", on_step=lambda done, total: steps.append(done))
    assert steps[0] == (step - 1) // 10 * 10 + 1
    assert steps[-1] == 120
    assert_equal_weights(wanted, out)
    assert again == metrics


def test_a_run_killed_when_a_checkpoint_was_due_resumes_to_the_same_weights(train, monkeypatch):
    wanted, metrics = train("undisturbed")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train("killed", on_step=die_at(50))
    steps = []
    out, again = train("killed", on_step=lambda done, total: steps.append(done))
    assert steps == list(range(50, 121))
    assert_equal_weights(wanted, out)
    assert again == metrics


def test_a_checkpoint_of_another_group_of_workers_is_refused(train, vectors_dir, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_STEPS", 10)
    out, _ = train("run", CONFIG.model_copy(update={"steps": 20}))
    others = OneProcess(out / "state")
    others.checkpoints.group = {"workers": 3, "engine": "torch"}
    with pytest.raises(UserError, match=r"'workers': 1.* this run has .*'workers': 3.*go on with the same, or delete"):
        train_sae(vectors_dir, out, CONFIG, others, model="tiny", layer=2)


def test_dead_latents_are_counted_and_helped(train):
    _, helped = train("helped", CONFIG.model_copy(update={"dead_after": 100}))
    assert any(entry["aux"] > 0 for entry in helped["history"])
    _, left = train("left", CONFIG.model_copy(update={"aux_coefficient": 0.0, "dead_after": 100}))
    assert all(entry["aux"] == 0 for entry in left["history"])


def test_a_nan_row_is_named_by_its_pair(tmp_path):
    table = activations(dictionary_vectors(300))
    norm = table["norm"].to_pylist()
    norm[41] = float("nan")
    table = table.set_column(4, "norm", pa.array(norm, pa.float32()))
    with pytest.raises(UserError, match=r"row 41 \(pair 'p10'\) is NaN or infinite; rebuild stage `activations`"):
        read_vectors(write(table, tmp_path), CONFIG)


def test_an_infinite_vector_is_named_by_its_pair(tmp_path):
    raw = dictionary_vectors(300)
    table = activations(raw)
    x = np.stack(table["x"].to_pylist()).astype(np.float16)
    x[7, 3] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH)
    with pytest.raises(UserError, match=r"row 7 \(pair 'p1'\)"):
        read_vectors(write(table.set_column(7, "x", column), tmp_path), CONFIG)


def test_fewer_vectors_than_a_batch_are_refused(tmp_path):
    directory = write(activations(dictionary_vectors(40)), tmp_path)
    with pytest.raises(UserError, match=r"wanted at least 64 and 1; lower sae.batch_size or harvest more pairs"):
        read_vectors(directory, CONFIG)


def test_outliers_are_left_out_and_counted(tmp_path):
    raw = dictionary_vectors(400)
    raw[[5, 100, 301]] *= 100
    vectors = read_vectors(write(activations(raw), tmp_path), CONFIG)
    assert vectors.outliers == 3
    assert len(vectors.train) + len(vectors.held_out) == 397


def test_all_vectors_of_a_pair_fall_on_one_side(vectors_dir):
    vectors = read_vectors(vectors_dir, CONFIG)
    assert len(vectors.held_out) % 4 == 0
    assert 60 < len(vectors.held_out) < 240


def test_a_loss_that_is_no_number_ends_training_with_the_remedy(train, monkeypatch):
    def overflows(*given):
        result = step(*given)
        return result._replace(loss=result.loss * float("nan"))

    step = module.sae_step
    monkeypatch.setattr(module, "sae_step", overflows)
    with pytest.raises(SaferError, match=r"sae: the loss is nan at step 0; lower sae.learning_rate"):
        train("nan")
