"""The smoke recipe as a job on a cluster of its own, by Ray's command and by ours."""

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.same_rows import assert_same_rows
from support.tiny_run import tables

from safer_ray.distributed.session import quiet  # noqa: F401  (sets what Ray reads when it is imported)
from safer_ray.storage.artifacts import open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BY_MAPPING = {"corpus", "pairs", "noise"}


def command(*words, **environ):
    known = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return subprocess.run(
        [str(BIN / words[0]), *map(str, words[1:])],
        cwd=REPOSITORY,
        env=known | environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def artifacts(root):
    return {path.parent.name: open_artifact(path.parent) for path in (root / "smoke").glob("*/manifest.json")}


@pytest.mark.parametrize(
    ("last", "stages"),
    [
        ("noise", BY_MAPPING),
        pytest.param("activations", {*BY_MAPPING, "reward", "activations"}, marks=pytest.mark.long),
    ],
)
def test_both_ways_to_submit_make_the_same_artifacts(cluster, tmp_path, last, stages):
    until = ["configs/smoke.yaml", "--until", last, "--set"]
    ways = {
        "ray": [
            "ray",
            "job",
            "submit",
            "--address",
            cluster,
            "--working-dir",
            ".",
            "--",
            "python",
            "-m",
            "jobs.pipeline",
        ],
        "us": ["safer-ray", "submit", "--address", cluster, "--", "run"],
    }
    with ThreadPoolExecutor() as pool:
        done = dict(
            zip(ways, pool.map(lambda way: command(*ways[way], *until, f"root={tmp_path / way}"), ways), strict=True)
        )
    for way in done.values():
        assert way.returncode == 0, way.stdout + way.stderr
    assert '"event": "stage"' in done["ray"].stdout
    ours, theirs = artifacts(tmp_path / "us"), artifacts(tmp_path / "ray")
    assert set(ours) == set(theirs)
    assert {name.split("-")[0] for name in ours} == stages
    for name, artifact in theirs.items():
        found, wanted = tables(ours[name].path), tables(artifact.path)
        assert set(found) == set(wanted)
        for folder, rows in wanted.items():
            assert_same_rows(found[folder], rows, f"{name}/{folder}")


def test_a_job_that_fails_ends_with_its_code_and_one_clear_line(cluster):
    by_ray = command(
        "ray", "job", "submit", "--address", cluster, "--working-dir", ".",
        "--", "python", "-m", "jobs.pipeline", "configs/nosuch.yaml",
    )  # fmt: skip
    assert by_ray.returncode != 0
    assert "safer-ray: no config at configs/nosuch.yaml" in by_ray.stdout


@pytest.mark.parametrize("job", ["pipeline", "audit", "train_reward", "train_sae", "sweep"])
def test_every_job_tells_its_options(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert not ended.value.code
    assert "--runner" in capsys.readouterr().out
