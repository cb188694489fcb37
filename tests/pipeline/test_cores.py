"""How many CPUs a process may use."""

import os

import pytest

from safer_ray.config.sections import RayConfig
from safer_ray.pipeline import cores
from safer_ray.pipeline.cores import usable_cpus


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 64 CPUs whose control groups are in files."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    own = {}

    def read(path):
        return own.get(str(path)) or (path.read_text() if path.exists() else "")

    monkeypatch.setattr(cores, "_read", read)

    def groups(line, **files):
        own["/proc/self/cgroup"] = line + "\n"
        for name, text in files.items():
            file = tmp_path / "cgroup" / name.replace("__", "/").replace("-", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return groups


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 64), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_a_container_of_version_2_limits(groups, quota, cpus):
    groups("0::/", **{"cpu-max": quota})
    assert usable_cpus() == cpus


def test_a_group_above_limits_too(groups):
    groups("0::/user/one", **{"user__one__cpu-max": "800000 100000", "user__cpu-max": "300000 100000"})
    assert usable_cpus() == 3


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 64), ("250000", 2)])
def test_a_container_of_version_1_limits(groups, quota, cpus):
    groups("4:cpu,cpuacct:/", **{"cpu__cpu-cfs_quota_us": quota, "cpu__cpu-cfs_period_us": "100000"})
    assert usable_cpus() == cpus


def test_an_affinity_limits(groups, monkeypatch):
    groups("0::/", **{"cpu-max": "max 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus() == 2


def test_without_affinity_and_groups_the_machines_cpus_count(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cpus() == 12


def test_a_ray_of_ones_own_has_no_more_cpus_than_the_container(groups, monkeypatch):
    session = pytest.importorskip("safer_ray.distributed.session")
    groups("0::/", **{"cpu-max": "600000 100000"})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert session._options(RayConfig(), 1, False)["num_cpus"] == 6
