"""Audits under fire, in short; `make chaos` is the long form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_run import copied, finished

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    """Where the bundle is made already."""
    copied(finished(tmp_path_factory.getbasetemp()), tmp_path)
    return tmp_path


def test_an_audit_that_loses_processes_ends_as_one_that_nobody_disturbed(folder):
    few = ["--kills", "3", "--rows", "1500", "--nodes", "2", "--actors", "2"]
    command = [sys.executable, Path(__file__).with_name("fire.py"), folder, *few]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert sum(found["kills"].values()) == 3
    assert (found["lost"], found["duplicated"], found["different"]) == (0, 0, 0)
    assert found["begun_again"] <= found["begun_again_at_most"]  # a fragment an actor and kill


def test_rows_that_nobody_should_send_are_all_in_the_quarantine(folder):
    command = [sys.executable, Path(__file__).with_name("hostile.py"), folder, "--rows", "2000"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["quarantined"] == 1998
