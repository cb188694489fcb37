"""Mapping on Ray: the same rows as in one process, whatever dies on the way."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import torch
from support.made import make_pair, write_parts
from support.own_rewards import PAIRS, assert_exact, own_rewards, own_sides
from support.ray_work import (
    WRITTEN,
    Explains,
    Slow,
    Times,
    Undoes,
    mortal,
    notes,
    one_file,
    read_after_first,
    read_noted,
    write_input,
)
from support.reward_models import save_reward_model_of
from support.same_rows import assert_same_tables

from safer_ray import schema
from safer_ray.config.sections import ActivationsConfig, RayConfig
from safer_ray.distributed import ray_runner as runner_module
from safer_ray.distributed.ray_data import LONGEST, dataset, following
from safer_ray.distributed.ray_runner import RayRunner
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.accounts import count
from safer_ray.storage.artifacts import (
    Place,
    open_artifact,
    part_files,
    part_fragments,
    part_name,
    read_fragment,
    read_parts,
)
from safer_ray.storage.quarantine import quarantine_rows
from safer_ray.storage.work import MapJob, Work

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

ONE, TWO = RayConfig(max_actors=1), RayConfig(min_actors=2, max_actors=2)


@pytest.fixture
def fragments(tmp_path):
    """Eight parts of ten rows."""
    return part_fragments(write_input(tmp_path, 8) / "in")


def doubles(out):
    return read_parts(out)["double"].to_pylist()


@pytest.mark.parametrize("loads_model", [True, False])
def test_every_fragment_is_committed_under_its_number(fragments, tmp_path, loads_model):
    seen = []
    runner = RayRunner(RayConfig(), lambda stage, done, total, rows: seen.append((stage, done, total)))
    counts = runner.map(mortal(tmp_path, loads_model=loads_model), fragments, tmp_path / "out")
    assert doubles(tmp_path / "out") == [2 * i for i in range(80)]
    assert [p.name for p in part_files(tmp_path / "out")] == [part_name(i) for i in range(8)]
    assert (counts.read, counts.written, counts.quarantined) == (80, 80, 0)
    assert seen == [("codes", done, 8) for done in range(9)]
    if loads_model:  # a new process, which loads torch with a function that works with it alone
        assert not (tmp_path / "torch").exists()


def test_what_is_done_is_not_done_again(fragments, tmp_path):
    out = tmp_path / "out"
    LocalRunner().map(mortal(tmp_path), fragments, out)
    (out / "done" / "00000003.json").unlink()
    for file in tmp_path.glob("seen-*"):
        file.unlink()
    RayRunner().map(mortal(tmp_path), fragments, out)
    (seen,) = tmp_path.glob("seen-*")
    assert seen.read_text().split() == ["30", "35"]
    assert doubles(out) == [2 * i for i in range(80)]


@pytest.mark.parametrize("loads_model", [True, False])
def test_a_killed_process_loses_and_doubles_nothing(fragments, tmp_path, loads_model):
    made = mortal(tmp_path, loads_model=loads_model, dies_once_at=42)
    counts = RayRunner().map(made, fragments, tmp_path / "out")
    assert (tmp_path / "died").exists()
    assert doubles(tmp_path / "out") == [2 * i for i in range(80)]
    assert (counts.written, counts.quarantined) == (80, 0)


def test_a_row_that_kills_every_actor_is_found_and_quarantined(fragments, tmp_path):
    counts = RayRunner().map(mortal(tmp_path, batch_rows=2, dies_at=42), fragments, tmp_path / "out")
    assert doubles(tmp_path / "out") == [2 * i for i in range(80) if i != 42]
    assert (counts.written, counts.quarantined) == (79, 1)
    (row,) = quarantine_rows(tmp_path / "out").to_pylist()
    assert (row["row_key"], row["pair_id"]) == ("in.jsonl#42", "p42")
    how = "SIGKILL, each of 5 times that it was tried alone"
    assert row["reason"] == f"failed twice: the process ended while it worked on these rows: {how}"


@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_whose_actors_are_killed_from_outside_is_not_quarantined(fragments, tmp_path, rows):
    def kills():
        """SIGKILL to four processes, each when it has begun with row 40."""
        killed: set[str] = set()
        end = time.monotonic() + 120
        while len(killed) < 4 and time.monotonic() < end:
            for file in set(tmp_path.glob("at-*")) - killed:
                killed.add(file)
                os.kill(int(file.name.removeprefix("at-")), signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kills)
    thread.start()
    made = MapJob("codes", read_fragment, partial(Slow, tmp_path, 4), WRITTEN, loads_model=True, batch_rows=rows)
    counts = RayRunner(ONE).map(made, fragments[3:5], tmp_path / "out")
    thread.join()
    assert len(list(tmp_path.glob("at-*"))) == 4
    assert (counts.written, counts.quarantined) == (20, 0)


def test_a_fragment_that_is_not_committed_when_the_work_ends_is_done_again(fragments, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "SEEN_SECONDS", 0.0)
    made = MapJob("codes", read_fragment, partial(Undoes, tmp_path), WRITTEN, loads_model=True, batch_rows=10)
    counts = RayRunner(ONE).map(made, fragments, tmp_path / "out")
    assert (tmp_path / "taken").exists()
    assert (counts.read, counts.written) == (80, 80)
    assert doubles(tmp_path / "out") == [2 * i for i in range(80)]


def test_a_stage_that_never_comes_to_its_end_says_what_is_missing(fragments, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "SEEN_SECONDS", 0.0)
    committed = runner_module.map_fragments

    def loses_one(todo, config):
        (work,) = todo
        if kept := [fragment for fragment in work.fragments if fragment.number != 3]:
            yield from committed([work._replace(fragments=kept)], config)

    monkeypatch.setattr(runner_module, "map_fragments", loses_one)
    message = (
        r"^codes: 1 of 8 fragments are not done, first number 3 \(.*part-00000003.parquet, rows 0 to 9\): the cluster "
        r"failed 3 times, last with an end of its work before all of it was done; run the same command again: .* kept$"
    )
    with pytest.raises(SaferError, match=message):
        RayRunner(ONE).map(mortal(tmp_path), fragments, tmp_path / "out")
    monkeypatch.undo()
    assert RayRunner(ONE).map(mortal(tmp_path), fragments, tmp_path / "out").read == 80


def test_failures_count_since_something_was_committed(tmp_path):
    fragments, failures = part_fragments(write_input(tmp_path, 32) / "in"), []

    def fails(stage, done, total, rows):
        if rows and len(failures) < 4:
            failures.append(done)
            raise ray.exceptions.RayError("a node is gone")

    counts = RayRunner(ONE, fails).map(mortal(tmp_path), fragments, tmp_path / "out")
    assert len(failures) == 4
    assert (counts.read, counts.written) == (320, 320)


def test_a_row_that_fails_is_quarantined_as_in_one_process(fragments, tmp_path):
    found = []
    for runner, name in ((LocalRunner(), "local"), (RayRunner(ONE), "ray")):
        runner.map(mortal(tmp_path, chokes_at=17), fragments, tmp_path / name)
        found.append((doubles(tmp_path / name), quarantine_rows(tmp_path / name).to_pylist(), count(tmp_path / name)))
    assert found[0] == found[1]
    assert found[0][2].reasons == {"failed twice": 1}


@pytest.mark.parametrize("kind", [UserError, SaferError])
def test_an_error_that_is_explained_comes_back_as_it_was(fragments, tmp_path, kind):
    made = MapJob(
        "codes", read_fragment, lambda: Explains(kind("pair 'p3' is NaN; retrain")), WRITTEN, loads_model=True
    )
    with pytest.raises(SaferError, match=r"^pair 'p3' is NaN; retrain$") as caught:
        RayRunner(ONE).map(made, fragments, tmp_path / "out")
    assert type(caught.value) is kind


def test_a_worker_without_the_models_files_says_which(fragments, tmp_path, pairs_dir):
    ctx = StageContext(Place(tmp_path), RayRunner(ONE))
    missing = open_artifact(pairs_dir).__class__(tmp_path / "gone", "reward-gone")
    made = MapJob(
        "evaluate",
        read_fragment,
        lambda: __import__("safer_ray.features.passes", fromlist=["RewardPairs"]).RewardPairs(missing.path),
        WRITTEN,
        loads_model=True,
    )
    with pytest.raises(UserError, match=r"no model in .*gone \(config.json is missing\)"):
        ctx.runner.map(made, fragments, tmp_path / "out")


def test_fragments_of_a_file_that_follow_each_other_are_read_by_one_process(tmp_path):
    runs = [[fragment.number for fragment in run] for run in following(one_file(tmp_path, 32), 2)]
    assert runs == [[*range(start, start + 4)] for start in range(0, 32, 4)]


def test_those_of_other_files_are_not_and_no_run_is_long(fragments, tmp_path):
    assert [len(run) for run in following(fragments, 1)] == [1] * 8
    assert max(len(run) for run in following(one_file(tmp_path / "in", 1000), 1)) == LONGEST
    assert [len(run) for run in following(one_file(tmp_path / "more", 4), 2)] == [1] * 4


@pytest.mark.parametrize("loads_model", [True, False])
def test_a_reader_that_is_killed_among_them_loses_and_doubles_nothing(tmp_path, loads_model):
    planned = one_file(tmp_path, 32)
    job = replace(mortal(tmp_path, loads_model=loads_model), read=partial(read_noted, folder=tmp_path, dies_once_at=6))
    counts = RayRunner(RayConfig(max_actors=1, tasks=2)).map(job, planned, tmp_path / "out")
    assert (tmp_path / "died").exists()
    assert doubles(tmp_path / "out") == [2 * i for i in range(320)]
    assert (counts.read, counts.written) == (320, 320)
    by = {n: {note.pid for note in notes(tmp_path, "read") if note.value == n} for n in range(32)}
    assert all(by[n] == by[n + 1] for start in range(8, 32, 4) for n in range(start, start + 3))


def test_each_of_them_goes_on_as_soon_as_it_is_read(tmp_path):
    job = replace(mortal(tmp_path), read=partial(read_after_first, folder=tmp_path))
    RayRunner(RayConfig(max_actors=1, tasks=1)).map(job, one_file(tmp_path, 8), tmp_path / "out")
    assert doubles(tmp_path / "out") == [2 * i for i in range(80)]


def test_the_read_step_is_not_fused_into_the_actors(fragments, tmp_path):
    config = RayConfig(task_cpus=0.5, max_actors=1)
    assert config.task_cpus == config.actor_cpus  # operators of equal shares are fused, if nothing is done about it
    said = dataset([Work(mortal(tmp_path), fragments[:2], tmp_path / "out")], config).materialize().stats()
    assert "Map(run)->Map(Map)" not in said
    assert "Map(Map)" in said


@pytest.fixture(scope="module")
def local(pairs_dir, reward_dir, sae_dir, tmp_path_factory):
    return harvest(LocalRunner(), tmp_path_factory.mktemp("local"), pairs_dir, reward_dir, sae_dir)


def harvest(runner, folder: Path, pairs_dir, reward_dir, sae_dir):
    """What is mapped by a model, and one stage that is not; `evaluate` has a test of its own."""
    ctx = StageContext(Place(folder), runner)
    pairs, reward, sae = (open_artifact(p) for p in (pairs_dir, reward_dir, sae_dir))
    made = {
        "activations": model_stages.activations(ctx, ActivationsConfig(layer=2), pairs, reward),
        "codes": model_stages.codes(ctx, pairs, reward, sae),
    }
    return made | {"salience": feature_stages.salience(ctx, made["codes"], "response")}


@pytest.mark.parametrize(
    "config", [pytest.param(ONE, id="one actor", marks=pytest.mark.long), pytest.param(TWO, id="two actors")]
)
def test_mapped_artifacts_have_equal_rows_for_any_number_of_actors(
    local, config, tmp_path, pairs_dir, reward_dir, sae_dir
):
    found = harvest(RayRunner(config), tmp_path, pairs_dir, reward_dir, sae_dir)
    for stage, artifact in local.items():
        assert found[stage].name == artifact.name
        assert found[stage].manifest["rows"] == artifact.manifest["rows"]
        assert_same_tables(found[stage].path, artifact.path)


@pytest.mark.parametrize("loads_model", [True, False])
def test_several_works_go_through_the_same_processes_which_hold_one_model_at_a_time(fragments, tmp_path, loads_model):
    def job(factor):
        make = partial(Times, tmp_path, factor)
        return MapJob("codes", read_fragment, make, WRITTEN, loads_model=loads_model, batch_rows=5)

    done = LocalRunner().map(job(2), fragments, tmp_path / "2")  # of which nothing is left
    for file in tmp_path.glob("told-*"):
        file.unlink()
    seen = []
    runner = RayRunner(ONE, lambda *said: seen.append(said))
    works = [Work(job(factor), fragments, tmp_path / str(factor)) for factor in (2, 3, 5)]
    counts = runner.map_all(works)
    assert [(c.read, c.written) for c in counts] == [(80, 80)] * 3
    assert counts[0] == done
    for factor in (2, 3, 5):
        assert doubles(tmp_path / str(factor)) == [factor * i for i in range(80)]
    assert [said[1:3] for said in seen] == [(n, 24) for n in range(8, 25)]
    if loads_model:
        (told,) = tmp_path.glob("told-*")
        what = [line.split() for line in told.read_text().splitlines()]
        built = [factor for done, factor in what if done == "built"]
        assert set(built) == {"3", "5"}
        assert len(built) <= 6  # fragments of two works may overtake each other where one follows the other
        assert all(before == ["gone", was] for before, was in zip(what[1::2], built, strict=False))  # one at a time


def test_several_models_are_evaluated_as_each_alone(tmp_path, pairs_dir, reward_dir, other_reward_dir):
    pairs, models = open_artifact(pairs_dir), [open_artifact(reward_dir), open_artifact(other_reward_dir)]
    began = time.monotonic()
    found = model_stages.evaluations(StageContext(Place(tmp_path / "ray"), RayRunner(TWO)), [*models, models[0]], pairs)
    assert sum(artifact.manifest["wall_seconds"] for artifact in found[:2]) <= time.monotonic() - began
    alone = StageContext(Place(tmp_path / "local"), LocalRunner())
    wanted = [model_stages.evaluate(alone, model, pairs) for model in models]
    assert [artifact.name for artifact in found] == [wanted[0].name, wanted[1].name, wanted[0].name]
    for one, other in zip(found, wanted, strict=False):
        assert one.metrics == other.metrics
        assert_same_tables(one.path, other.path)
    assert found[0].metrics["sections"] != found[1].metrics["sections"]


def test_what_the_product_counts_is_on_the_prometheus_endpoint(fragments, tmp_path):
    import httpx

    RayRunner(ONE).map(mortal(tmp_path, chokes_at=17), fragments, tmp_path / "out")
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = ("ray_safer_ray_pairs", "ray_safer_ray_quarantined", "ray_safer_ray_seconds")
    end = time.monotonic() + 60
    lines: list[str] = []
    while time.monotonic() < end:
        text = httpx.get(address, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith(wanted) and 'stage="codes"' in line]
        if len({line.split("{")[0] for line in lines}) == len(wanted):
            break
        time.sleep(1)
    assert {line.split("{")[0].removesuffix("_total") for line in lines} == set(wanted)
    assert all('run="' in line for line in lines)


def test_three_workers_give_the_rewards_that_models_give_by_themselves(tmp_path):
    """Of every kind what its card says how to read; pairs that its template refuses are left out."""
    kinds = ["Llama 3 without a pad token", "Gemma 2", "RoBERTa"]
    rewards = [save_reward_model_of(kind, tmp_path / f"model-{number}") for number, kind in enumerate(kinds)]
    names = [*PAIRS] * 3
    made = [make_pair(str(number), "", "", "") | PAIRS[name] for number, name in enumerate(names)]
    pairs = open_artifact(write_parts(schema.table(made, schema.PAIRS), tmp_path / "pairs", len(PAIRS) // 2))
    runner = RayRunner(RayConfig(min_actors=3, max_actors=3))
    ctx = StageContext(Place(tmp_path), runner, max_refused_share=1.0)
    for reward, artifact in zip(
        rewards, model_stages.evaluations(ctx, [*map(open_artifact, rewards)], pairs), strict=True
    ):
        own, rows = own_sides(reward), read_parts(artifact.path)
        told = [str(number) for number, name in enumerate(names) if name in own]
        found = rows.filter(pc.is_in(rows["pair_id"], pa.array(told)))
        assert found["pair_id"].to_pylist() == told
        sides = torch.tensor([found["reward_chosen"].to_pylist(), found["reward_rejected"].to_pylist()]).T.flatten()
        assert_exact(sides, own_rewards(reward, [inputs for both in own.values() for inputs in both]).repeat(3))
