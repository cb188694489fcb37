"""Nodes that are lost and drivers that are killed: work goes on, and ends as if nobody had disturbed it."""

import json
import signal
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray
import ray._private.state
from support.made import write_parts
from support.ray_processes import at_work, environment, interrupt, kill, ray_folder, running, script, wait_until
from support.ray_work import (
    REWARD,
    ROWS,
    Note,
    dawdle,
    fragments,
    fragments_done,
    mapping,
    notes,
    steps_done,
    write_input,
)
from support.same_rows import assert_same_rows

from safer_ray.distributed.ray_runner import RayRunner
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.train import train_reward
from safer_ray.storage.artifacts import part_files, part_name, read_parts
from safer_ray.storage.work import TrainJob

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

FRAGMENTS = 6
AGENTS = ("ray::DashboardAg", "ray::RuntimeEnv")  # of a node; they end a minute after it
QUICK_DETECTION = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


@pytest.fixture(scope="module")
def pairs(pairs, tmp_path_factory):
    return write_parts(pairs, tmp_path_factory.mktemp("fault-pairs"), 20)


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory, ray_session):
    """The folder of the same map in one process, and of the same training on two workers without a checkpoint."""
    folder = write_input(tmp_path_factory.mktemp("undisturbed"), FRAGMENTS)
    LocalRunner().map(mapping(folder), fragments(folder), folder / "out")
    (metrics,) = RayRunner().train(
        [TrainJob("reward", train_reward, {"pairs": pairs, "config": REWARD}, folder / "reward")]
    )
    return folder, metrics


def assert_same_map(folder, undisturbed):
    theirs, ours = undisturbed[0] / "out", folder / "out"
    assert [path.name for path in part_files(ours)] == [part_name(number) for number in range(FRAGMENTS)]
    assert_same_rows(read_parts(ours), read_parts(theirs), "out")
    assert sorted(path.name for path in (ours / "done").iterdir()) == [f"{n:08}.json" for n in range(FRAGMENTS)]


def assert_same_training(folder, undisturbed, metrics):
    """To the bit: both had two workers."""
    weights = [(one / "reward/model.safetensors").read_bytes() for one in (folder, undisturbed[0])]
    assert weights[0] == weights[1]
    assert metrics | {"train_seconds": 0} == undisturbed[1] | {"train_seconds": 0}


# Nodes


@pytest.fixture(scope="module")
def lost(pairs, tmp_path_factory):
    """The folder of work in which nodes were lost, and what `ray_lost_nodes.py` told of it."""
    folder = write_input(tmp_path_factory.mktemp("lost"), FRAGMENTS)
    with ray_folder() as files:
        command = script("ray_lost_nodes.py", folder, pairs)
        with running(command, environment(files, **QUICK_DETECTION), folder / "said") as process:
            process.wait(600)
        assert process.returncode == 0, (folder / "said.err").read_text()
    return folder, json.loads((folder / "said.out").read_text())


def test_a_node_lost_in_the_middle_of_a_map_loses_and_doubles_no_row(lost, undisturbed):
    folder, told = lost
    assert 1 <= told["fragments"] < FRAGMENTS
    assert told["counts"] == {"read": 60, "written": 60, "quarantined": 0, "reasons": {}}
    assert_same_map(folder, undisturbed)


def test_a_node_lost_in_the_middle_of_a_training_changes_no_weight(lost, undisturbed):
    folder, told = lost
    work = notes(folder, "train")
    assert 3 <= told["step"] < told["metrics"]["steps"]
    assert {note.node for note in work if note.value == told["step"]} >= {told["trainer"]}
    assert len({note.node for note in work}) == 3  # two workers on a node each, and the node that came
    assert {note.node for note in work if note.value == told["metrics"]["steps"]}.isdisjoint({told["trainer"]})
    assert_same_training(folder, undisturbed, told["metrics"])


# Drivers


class Life(NamedTuple):
    """Of a driver: how it ended, what was done by then, and the seconds until nothing of it went on."""

    code: int
    out: str
    err: str
    fragments: int
    step: int
    mapped: list[Note]
    trained: list[Note]
    lingered: float


class Lives(NamedTuple):
    """Of a driver that was killed in its map, then in its training, perhaps interrupted there, then left alone."""

    folder: Path
    mapping: Life
    training: Life
    interrupted: Life | None
    last: Life

    @property
    def disturbed(self):
        return [life for life in self[1:-1] if life is not None]


@pytest.fixture(
    scope="module",
    params=[pytest.param("a Ray of its own", marks=pytest.mark.long), "the cluster of this session"],
)
def lives(request, pairs, tmp_path_factory):
    """Only on the session's cluster is it interrupted: workers outlive a Ray of their own by some steps."""
    folder = write_input(tmp_path_factory.mktemp("killed"), FRAGMENTS)
    joins = request.param == "the cluster of this session"
    with ray_folder() as files:
        environ = environment(files)
        if joins:
            environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        dawdle(folder, "map", True)
        mapping = live(environ, folder, pairs, lambda: fragments_done(folder) >= 1, kill)
        dawdle(folder, "map", False)
        dawdle(folder, "train", True)
        training = live(environ, folder, pairs, lambda: steps_done(folder) >= 3, kill)
        interrupted = None
        if joins:
            interrupted = live(environ, folder, pairs, lambda: steps_done(folder) > training.step, interrupt)
        dawdle(folder, "train", False)
        return Lives(folder, mapping, training, interrupted, live(environ, folder, pairs))


def live(environ, folder, pairs, moment=None, disturb=None):
    """Run until the moment comes and the driver is disturbed, or to the end."""
    said = folder / f"life-{time.monotonic_ns()}"
    with running(script("ray_driver.py", folder, pairs), environ, said) as process:
        if moment is None:
            process.wait(300)
            children = []
        else:
            wait_until(moment, 300, process)
            children = disturb(process)
        began = time.monotonic()
        wait_until(lambda: not anything_left(folder, children), 60)
        lingered = time.monotonic() - began
    out, err = (said.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    done = fragments_done(folder), steps_done(folder)
    return Life(process.returncode, out, err, *done, notes(folder, "map"), notes(folder, "train"), lingered)


def anything_left(folder, children):
    """Of what a driver started, or of its actors on this session's cluster."""
    noted = {note.pid for what in ("map", "train") for note in notes(folder, what)}
    mine = ray.get_runtime_context().get_job_id()
    actors = [a for a in ray._private.state.actors().values() if a["JobID"] != mine and not a["IsDetached"]]
    return (
        any(psutil.pid_exists(pid) for pid in noted)
        or [actor for actor in actors if actor["State"] != "DEAD"]
        or [process for process in at_work(children) if not process.name().startswith(AGENTS)]
    )


def test_a_driver_is_killed_in_its_map_and_in_its_training(lives):
    assert [lives.mapping.code, lives.training.code, lives.last.code] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert 1 <= lives.mapping.fragments < FRAGMENTS
    assert (lives.mapping.step, lives.mapping.trained) == (0, [])
    assert (lives.training.fragments, lives.last.fragments) == (FRAGMENTS, FRAGMENTS)
    assert 3 <= lives.training.step < json.loads(lives.last.out)["metrics"]["steps"]


def test_a_training_that_is_interrupted_ends_as_interrupted(lives):
    if lives.interrupted is not None:
        assert lives.interrupted.code == -signal.SIGINT
        assert lives.interrupted.err.endswith("\nKeyboardInterrupt\n")


def test_nothing_of_a_driver_that_ended_goes_on_working(lives):
    assert max(life.lingered for life in [*lives.disturbed, lives.last]) < 30


def test_the_same_command_again_ends_with_the_same_rows(lives, undisturbed):
    assert json.loads(lives.last.out)["counts"] == {"read": 60, "written": 60, "quarantined": 0, "reasons": {}}
    assert_same_map(lives.folder, undisturbed)


def test_the_same_command_again_ends_with_the_same_weights(lives, undisturbed):
    assert_same_training(lives.folder, undisturbed, json.loads(lives.last.out)["metrics"])


def test_what_was_done_before_a_kill_is_not_done_again(lives):
    before, mapped = ([note.value for note in life.mapped] for life in (lives.mapping, lives.training))
    twice = [value for value in before if mapped.count(value) > 1]
    assert len(twice) <= ROWS // 2 * (FRAGMENTS - lives.mapping.fragments)  # begun before the kill, but not committed
    assert set(before) < set(mapped)
    assert set(lives.last.mapped) == set(lives.training.mapped)
    last_but_one = lives.disturbed[-1]
    assert min(note.value for note in set(lives.last.trained) - set(last_but_one.trained)) == last_but_one.step + 1


def test_a_driver_prints_nothing_of_rays(lives):
    assert [life.err for life in (lives.mapping, lives.training, lives.last)] == ["", "", ""]
    assert [life.out.count("\n") for life in (*lives.disturbed, lives.last)] == [0] * len(lives.disturbed) + [1]
