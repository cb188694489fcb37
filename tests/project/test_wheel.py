"""What `pip install safer_ray` gives a user who has no checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ("safer_ray", "configs", "pyproject.toml", "README.md", "LICENSE")


def run(words, folder, packages):
    environ = os.environ | {"PYTHONPATH": str(packages)}
    return subprocess.run(
        [sys.executable, *words], check=False, cwd=folder, env=environ, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's packages, beside which those of the test environment are found."""
    source, wheels, packages = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "packages"))
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", wheels], cwd=source, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel], check=True)
    return packages


def test_the_wheel_has_one_package_at_its_top(installed):
    assert sorted(path.name for path in installed.iterdir() if "dist-info" not in path.name) == ["bin", "safer_ray"]


def test_all_modules_and_files_of_the_library_are_in_the_wheel(installed):
    def files(folder):
        return {
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".pyc" not in path.name
        }

    configs = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert files(installed / "safer_ray") == files(ROOT / "safer_ray") | configs
    assert os.access(installed / "safer_ray/service/haproxy.sh", os.X_OK)


def test_a_shipped_config_runs_by_its_name_and_a_path_wins(installed, tmp_path):
    where = run(["-c", "import safer_ray; print(safer_ray.__file__)"], tmp_path, installed)
    assert where.stdout.startswith(str(installed))
    done = run(["-m", "safer_ray", "run", "smoke", "--until", "pairs", "--set", "root=there"], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    (manifest,) = tmp_path.glob("there/*/pairs-*/manifest.json")
    assert json.loads(manifest.read_text())["rows"]["pairs"] > 0
    (tmp_path / "smoke").write_text("name: [")
    refused = run(["-m", "safer_ray", "run", "smoke"], tmp_path, installed)
    assert "smoke is not readable YAML" in refused.stderr
    (tmp_path / "smoke").unlink()
    (tmp_path / "smoke").symlink_to("nowhere")
    refused = run(["-m", "safer_ray", "plan", "smoke"], tmp_path, installed)
    assert "no config at smoke; give a file" in refused.stderr
    (tmp_path / "smoke").unlink()
    (tmp_path / "smoke").mkdir()
    assert run(["-m", "safer_ray", "plan", "smoke"], tmp_path, installed).returncode == 0
    refused = run(["-m", "safer_ray", "run", "smoky"], tmp_path, installed)
    assert "no config at smoky; give a file, or one of demo, " in refused.stderr


def test_folders_of_the_user_keep_their_names(installed, tmp_path):
    for name in ("serve", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWN = True\n")
    told = run(["-c", "import jobs, serve, safer_ray.service.app; print(jobs.OWN, serve.OWN)"], tmp_path, installed)
    assert told.stdout == "True True\n", told.stderr
    asked = run(["-m", "safer_ray", "serve"], tmp_path, installed)
    assert asked.returncode == 2
    assert "no auditor; write auditor=DIR" in asked.stderr
