"""Killed anywhere and started again, a run ends as one that nobody disturbed."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from support.preloaded import command, started
from support.same_rows import assert_same_tables
from support.tiny_run import finished, write_config

from safer_ray.storage.artifacts import open_artifact
from safer_ray.storage.contents import check_whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 6
COMMAND = [sys.executable, "-c", "from safer_ray.cli.app import main; main()", "run"]


def lock_of(config):
    return config.parent / "runs/tiny/run.lock"


def wait_for_work(pid, config, ended):
    """Until the process holds the run's lock."""
    named = f'"pid": {pid},'
    while not ended() and not (lock_of(config).exists() and named in lock_of(config).read_text()):
        time.sleep(0.02)


def life(config, seconds=None):
    """Run to the end, or for so many seconds of work; the exit code."""
    said = config.with_suffix(".said")
    process = started(command, "run", config, said=said)  # as many threads as here, since weights are compared bitwise
    wait_for_work(process.pid, config, lambda: process.exitcode is not None)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), said.read_text()
    return process.exitcode


def artifacts_in(config):
    directory = config.parent / "runs/tiny"
    return {path.parent.name: open_artifact(path.parent) for path in directory.glob("*/manifest.json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The config of a run that was left alone, and the seconds its work took."""
    made = finished(tmp_path_factory.getbasetemp())
    summary = json.loads((made.directory / "summary.json").read_text())
    return made.directory.parents[1] / "tiny.yaml", sum(summary["seconds"].values())


@pytest.fixture(scope="module")
def disturbed(undisturbed, tmp_path_factory):
    """The config of a run that was killed again and again before it was let finish, and how often that hit it.

    Each life gets a random share of the work, so that the kills spread over the stages.
    """
    config = write_config(tmp_path_factory.mktemp("disturbed"))
    moments = random.Random(0)
    hits = 0
    for _ in range(KILLS):
        if life(config, moments.uniform(0, 0.2) * undisturbed[1]) == 0:
            break
        hits += 1
    assert life(config) == 0
    return config, hits


def test_the_kills_hit(disturbed):
    assert disturbed[1] >= KILLS // 2  # a machine that has become faster finishes sooner


def test_the_same_artifacts_are_there(undisturbed, disturbed):
    assert set(artifacts_in(disturbed[0])) == set(artifacts_in(undisturbed[0]))


def test_their_rows_are_the_same(undisturbed, disturbed):
    theirs = artifacts_in(disturbed[0])
    for name, artifact in artifacts_in(undisturbed[0]).items():
        assert_same_tables(theirs[name].path, artifact.path)
        assert theirs[name].manifest["rows"] == artifact.manifest["rows"], name


def test_reward_models_are_the_same_to_the_bit(undisturbed, disturbed):
    theirs = artifacts_in(disturbed[0])
    models = {name: a for name, a in artifacts_in(undisturbed[0]).items() if name.startswith("reward-")}
    assert len(models) == 4
    for name, artifact in models.items():
        weights = (artifact.path / "model.safetensors").read_bytes()
        assert (theirs[name].path / "model.safetensors").read_bytes() == weights, name


def test_every_artifact_is_whole_and_holds_no_other_file(undisturbed, disturbed):
    theirs = artifacts_in(disturbed[0])
    for name, artifact in artifacts_in(undisturbed[0]).items():
        check_whole(theirs[name])
        files = [{p.relative_to(a.path) for p in a.path.rglob("*")} for a in (artifact, theirs[name])]
        assert files[0] == files[1], name


def test_nothing_unfinished_is_left(disturbed):
    directory = disturbed[0].parent / "runs/tiny"
    assert not list(directory.glob(".partial-*"))
    assert not (directory / "run.lock").exists()


def test_the_numbers_are_the_same(undisturbed, disturbed):
    found = []
    for config in (undisturbed[0], disturbed[0]):
        summary = json.loads((config.parent / "runs/tiny/summary.json").read_text())
        del summary["seconds"]
        found.append(summary)
    assert found[0] == found[1]


def test_a_killed_runs_lock_is_taken_at_once(tmp_path):
    config = write_config(tmp_path)
    lock = lock_of(config)
    process = subprocess.Popen([*COMMAND, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_work(process.pid, config, lambda: process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert lock.exists()
    second = subprocess.run(
        [*COMMAND, str(config), "--until", "corpus"], capture_output=True, text=True, check=False, timeout=120
    )
    assert second.returncode == 0, second.stderr
    assert not lock.exists()
