"""A Ray of our own: where its files lie, what it is kept by, and what is put back after it."""

import os
import stat
import subprocess
import sys

import pytest

from safer_ray.distributed import own_ray as own
from safer_ray.distributed.own_ray import own_folder
from safer_ray.errors import UserError


@pytest.fixture
def base(tmp_path_factory, monkeypatch):
    """A short folder as RAY_TMPDIR."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sr-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield own.Path(folder)


def test_ray_lies_in_a_folder_that_nobody_else_can_open(base):
    mine = base / f"safer-ray-{os.getuid()}"
    mine.mkdir(mode=0o777)
    mine.chmod(0o777)
    assert own_folder() == mine / "ray"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_another_user_made_under_our_name_is_left_to_them(base):
    theirs = base / f"safer-ray-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    found = own_folder().parent
    assert found != theirs
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert found.stat().st_uid == os.getuid()


def test_a_link_that_another_user_laid_is_not_followed(base):
    (base / "elsewhere").mkdir()
    (base / f"safer-ray-{os.getuid()}").symlink_to(base / "elsewhere")
    assert own_folder().parent.parent == base
    assert list((base / "elsewhere").iterdir()) == []


def test_a_path_too_long_for_sockets_is_refused_with_the_remedy(base, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(base / ("x" * 60)))
    (base / ("x" * 60)).mkdir()
    with pytest.raises(UserError, match=r"is too long a path for Ray's sockets, .*; set RAY_TMPDIR to a folder with a"):
        own_folder()


def test_a_folder_that_cannot_be_made_is_named(base, monkeypatch):
    (base / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(base / "file"))
    with pytest.raises(
        UserError, match=r"^no folder for Ray's sockets can be made in .*/file: Not a directory; set RAY_"
    ):
        own_folder()


BEHIND_EACH_OTHER = """
import os, sys
import ray  # as a process that has read its variables already
from ray._raylet import AuthenticationMode, get_authentication_mode
from safer_ray.distributed.own_ray import own_ray

def state():
    from ray._private import ray_constants
    named = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    return named, get_authentication_mode(), ray_constants.ENABLE_RAY_CLUSTER

before, tokens = state(), []
for _ in range(int(sys.argv[1])):
    with own_ray(num_cpus=1, include_dashboard=False, log_to_driver=False):
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        tokens.append(os.environ["RAY_AUTH_TOKEN"])
        assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
        assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote()) == tokens[-1]
    assert state() == before, (state(), before)
assert len(set(tokens)) == len(tokens)
print("ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rays", "set_by_the_user"),
    [(2, {}), (1, {"RAY_AUTH_MODE": "disabled"}), (1, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32})],
)
def test_each_ray_has_a_token_of_its_own_and_what_the_user_set_is_put_back(base, rays, set_by_the_user):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environ = kept | {"HOME": str(base), "RAY_TMPDIR": str(base)} | set_by_the_user
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEHIND_EACH_OTHER, str(rays)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr
    assert not list(base.rglob("auth_token"))
    assert ("does not count here" in done.stderr) == (set_by_the_user.get("RAY_AUTH_MODE") == "disabled")
