"""SAE training on vectors made from a known dictionary."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.made import random_sae
from support.preloaded import started
from support.sae_vectors import CONFIG, WIDTH, activations, dictionary_vectors, write

from safer_ray.config.sae import SaeConfig
from safer_ray.config.sae_variants import BatchTopKVariant, JumpReluVariant, TopKVariant
from safer_ray.errors import SaferError, UserError
from safer_ray.reward import training_steps as training
from safer_ray.reward.split import validation_split
from safer_ray.reward.training_steps import OneProcess
from safer_ray.sae import data as sae_data
from safer_ray.sae import training_loop as sae_fit
from safer_ray.sae.data import held_out_vectors, open_vectors
from safer_ray.sae.formats import load_sae, sae_layer, save_sae
from safer_ray.sae.quality import sae_quality
from safer_ray.sae.train import SpliceEvaluation, held_out_pairs, train_sae


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that even few vectors are several windows."""
    monkeypatch.setattr(sae_data, "BLOCK", 100)
    monkeypatch.setattr(sae_data, "WINDOW", 4)


@pytest.fixture
def train(vectors_dir, tmp_path):
    """Train in a folder of its name; returns where the SAE is, and the metrics."""

    def train(name, config=CONFIG, start=None, **options):
        out = tmp_path / name
        workers = OneProcess(out / "state", **options)
        return out, train_sae(vectors_dir, out, config, workers, model="tiny", layer=2, start=start)

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
    vectors = open_vectors(vectors_dir, CONFIG)
    found = sae_quality(sae, held_out_vectors(vectors, 0)).figures()
    assert found == pytest.approx({name: metrics[name] for name in found})


def die_at(step):
    def die(done, total):
        if done == step:
            raise KeyboardInterrupt

    return die


def assert_equal_weights(one, other):
    one, other = (load_file(path / "sae_weights.safetensors") for path in (one, other))
    assert all(torch.equal(one[name], other[name]) for name in one)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in ("read_share", "fit_seconds")}


@pytest.mark.parametrize(
    ("step", "variant"),
    [(3, TopKVariant()), (25, BatchTopKVariant()), (77, TopKVariant()), (34, JumpReluVariant())],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_weights(train, monkeypatch, step, variant):
    config = CONFIG.model_copy(update={"variant": variant})
    wanted, metrics = train("undisturbed", config)
    due_every(10, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("killed", config, on_step=die_at(step))
    steps = []
    out, again = train("killed", config, on_step=lambda done, total: steps.append(done))
    assert steps[0] == (step - 1) // 10 * 10 + 1
    assert steps[-1] == 120
    assert_equal_weights(wanted, out)
    assert without_times(again) == without_times(metrics)
    assert (out / "metrics.jsonl").read_text() == (wanted / "metrics.jsonl").read_text()


def test_a_run_killed_when_a_checkpoint_was_due_resumes_to_the_same_weights(train, monkeypatch):
    wanted, metrics = train("undisturbed")
    always_due(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("killed", on_step=die_at(50))
    steps = []
    out, again = train("killed", on_step=lambda done, total: steps.append(done))
    assert steps == list(range(50, 121))
    assert_equal_weights(wanted, out)
    assert without_times(again) == without_times(metrics)


def due_every(steps, monkeypatch):
    """Have checkpoints saved at every so-manieth step, whatever they cost."""
    monkeypatch.setattr(sae_fit, "CHECKPOINT_STEPS", steps)
    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)


def always_due(monkeypatch):
    monkeypatch.setattr(training.Checkpoints, "due", lambda self, wanted=False: True)


def mortal(source, out, *deadly):
    """Train, killed at a step; print the first step."""
    sae_data.BLOCK, sae_data.WINDOW, sae_fit.CHECKPOINT_STEPS = 100, 4, 7
    training.SAVE_SHARE = 1e9
    steps = []

    def on_step(done, total):
        steps.append(done)
        if deadly and done == deadly[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    train_sae(source, out, CONFIG, OneProcess(out / "state", on_step), model="tiny", layer=2)
    print(steps[0], flush=True)


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_the_weights_of_one_that_was_left_alone(vectors_dir, tmp_path):
    def life(out, *deadly):
        said = tmp_path / f"said-{out.name}-{deadly}"
        process = started(mortal, vectors_dir, out, *deadly, said=said)
        process.join(200)
        return process.exitcode, said.read_text()

    for step in (5, 40, 99):
        assert life(tmp_path / "killed", step) == (-signal.SIGKILL, "")
    assert life(tmp_path / "killed") == (0, "99\n")
    assert life(tmp_path / "quiet") == (0, "1\n")
    assert_equal_weights(tmp_path / "quiet", tmp_path / "killed")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with a megabyte of room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_training_in_one_line_and_the_last_checkpoint_stays(
    train, vectors_dir, small_disk, tmp_path, monkeypatch
):
    wanted, _ = train("undisturbed")
    due_every(10, monkeypatch)
    filler = small_disk / "filler"

    def fill(done, total):
        if done == 25:
            room = os.statvfs(small_disk)
            filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - 8192)))

    with pytest.raises(SaferError, match=r"^cannot write .*free some space"):
        train_sae(vectors_dir, tmp_path / "out", CONFIG, OneProcess(small_disk, fill), model="tiny", layer=2)
    assert max(path.name for path in small_disk.glob("step-*")) == "step-00000020"
    filler.unlink()
    steps = []
    again = OneProcess(small_disk, lambda done, total: steps.append(done))
    train_sae(vectors_dir, tmp_path / "out", CONFIG, again, model="tiny", layer=2)
    assert steps[0] == 21
    assert_equal_weights(wanted, tmp_path / "out")


def test_accumulated_micro_batches_train_as_whole_batches_do(train):
    whole, _ = train("whole", CONFIG.model_copy(update={"steps": 10}))
    pieces, _ = train("pieces", CONFIG.model_copy(update={"steps": 10, "micro_batch_size": 13}))
    one, other = (load_file(path / "sae_weights.safetensors") for path in (whole, pieces))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


def test_bfloat16_computes_in_it_and_keeps_the_weights_as_they_are(train):
    out, metrics = train("bfloat16", CONFIG.model_copy(update={"dtype": "bfloat16"}))
    assert load_sae(out).W_dec.dtype == torch.float32
    assert metrics["nmse"] == pytest.approx(train("float32")[1]["nmse"], abs=0.05)


def test_the_second_stage_goes_on_from_the_first(train):
    first, before = train("first")
    _, after = train("second", CONFIG.model_copy(update={"steps": 1, "learning_rate": 1e-6}), start=first)
    assert after["nmse"] == pytest.approx(before["nmse"], abs=1e-3)
    again, _ = train("more", start=first)
    assert sae_layer(again) == 2


def test_a_start_of_another_shape_is_refused_with_both(train, tmp_path):
    save_sae(random_sae(WIDTH, 32, 4), tmp_path / "start", model="tiny", layer=2)
    with pytest.raises(
        UserError, match=r"a TopKSae of 32 latents, k 4, on 24 dimensions; wanted a TopKSae of 64, 4 and 24: set"
    ):
        train("run", start=tmp_path / "start")


def test_curves_and_quality_are_json_lines(train):
    out, metrics = train("run")
    *curve, quality = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert curve == metrics["history"]
    assert [entry["step"] for entry in curve][-1] == 120
    assert len(curve) == 100
    assert sum("held_out_nmse" in entry for entry in curve) == 20
    assert curve[-1]["held_out_nmse"] == pytest.approx(metrics["nmse"])
    assert curve[-1]["held_out_nmse"] < curve[0]["nmse"]
    assert quality["explained_variance"] == metrics["explained_variance"]
    assert sum(quality["density"]["counts"]) == round(64 * (1 - metrics["dead_share"]))
    assert set(quality["clusters"]) == {"share", "number"}


def test_tensorboards_event_files_hold_the_curves(train):
    pytest.importorskip("tensorboardX")
    out, _ = train("run", CONFIG.model_copy(update={"steps": 10, "tensorboard": True}))
    (events,) = (out / "tensorboard").iterdir()
    assert b"sae/nmse" in events.read_bytes()
    quiet, _ = train("quiet", CONFIG.model_copy(update={"steps": 10}))
    assert not (quiet / "tensorboard").exists()


def test_event_files_need_a_package_and_say_which(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboardX is not installed; pip install 'safer-ray\[tensorboard\]'"):
        train("run", CONFIG.model_copy(update={"tensorboard": True}))


def test_a_checkpoint_of_another_shape_is_refused_with_both(train, monkeypatch):
    due_every(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("run", on_step=die_at(8))
    with pytest.raises(UserError, match=r"has W_dec of shape \(64, 24\), this run \(48, 24\); go on with the config"):
        train("run", CONFIG.model_copy(update={"latents": 48}))


def test_a_checkpoint_of_other_vectors_is_refused(train, monkeypatch):
    due_every(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("run", on_step=die_at(8))
    with pytest.raises(UserError, match=r"the unfinished training was on \d+ vectors, .* has \d+; put back"):
        train("run", CONFIG.model_copy(update={"validation_percent": 20}))


def test_a_checkpoint_of_another_group_of_workers_is_refused(train, vectors_dir, monkeypatch):
    due_every(10, monkeypatch)
    out, _ = train("run", CONFIG.model_copy(update={"steps": 20}))
    others = OneProcess(out / "state")
    others.checkpoints.group = {"workers": 3, "engine": "torch"}
    with pytest.raises(UserError, match=r"'workers': 1.* this run has .*'workers': 3.*go on with the same, or delete"):
        train_sae(vectors_dir, out, CONFIG, others, model="tiny", layer=2)


def test_a_latent_counts_as_dead_after_a_tenth_of_the_run_and_ten_million_at_most():
    run = {"steps": 1000, "batch_size": 1024}
    assert SaeConfig(**run).dead_vectors == 102_400
    assert SaeConfig(**run | {"steps": 1_000_000}).dead_vectors == 10_000_000
    assert SaeConfig(**run, dead_after=7).dead_vectors == 7
    assert SaeConfig(steps=1, batch_size=1).dead_vectors == 1


def test_dead_latents_are_counted_and_helped(train):
    _, helped = train("helped", CONFIG.model_copy(update={"dead_after": 100}))
    assert any(entry["aux"] > 0 for entry in helped["history"])
    _, left = train("left", CONFIG.model_copy(update={"aux_coefficient": 0.0, "dead_after": 100}))
    assert all(entry["aux"] == 0 for entry in left["history"])


def test_a_loss_that_is_no_number_ends_training_with_the_remedy(train, monkeypatch):
    def overflows(*given):
        result = step(*given)
        return result._replace(loss=result.loss * float("nan"))

    step = sae_fit.sae_step
    monkeypatch.setattr(sae_fit, "sae_step", overflows)
    with pytest.raises(SaferError, match=r"sae: the loss is nan at step 0; lower sae.learning_rate"):
        train("nan")


def test_the_pairs_that_reconstructions_are_tried_on_are_held_out_ones(pairs, pairs_dir):
    config = CONFIG.model_copy(update={"validation_percent": 50})
    held = validation_split(pairs["group"].to_pylist(), 50, 0)
    wanted = [row["pair_id"] for row, out in zip(pairs.to_pylist(), held, strict=True) if out]
    assert [pair["pair_id"] for pair in held_out_pairs(pairs_dir, config)] == wanted
    some = held_out_pairs(pairs_dir, config.model_copy(update={"spliced_pairs": 5}))
    assert len(some) == 5
    assert {pair["pair_id"] for pair in some} < set(wanted)
    assert set(some[0]) == {"pair_id", "prompt", "chosen", "rejected"}


def test_an_sae_is_kept_where_what_it_costs_the_reward_model_cannot_be_measured(pairs_dir, tmp_path, caplog):
    vectors, out = write(activations(dictionary_vectors(300)), tmp_path / "vectors"), tmp_path / "run"
    judged = SpliceEvaluation(pairs_dir, tmp_path / "gone")
    config = CONFIG.model_copy(update={"steps": 1, "validation_percent": 50})
    metrics = train_sae(vectors, out, config, OneProcess(out / "state"), model="tiny", layer=2, judged=judged)
    assert "spliced" not in metrics
    assert "nmse" in metrics
    assert sae_layer(out) == 2
    assert (out / "README.md").is_file()
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("sae: it is kept without what its reconstructions cost the reward model, which failed: no m")


@pytest.mark.parametrize(
    ("rows", "sizes"), [(0, []), (1, [1]), (64, [64]), (70, [70]), (72, [72]), (73, [37, 36]), (130, [65, 65])]
)
def test_a_few_vectors_too_many_make_no_micro_batch_of_their_own(rows, sizes):
    assert [len(piece) for piece in sae_fit._pieces(np.zeros((rows, 2), np.float16), 64)] == sizes
