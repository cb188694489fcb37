"""`scripts/setup.sh` on machines that lack something, with real environments and a pip that sees two small packages."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/setup.sh"
BACKEND = """
import zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("small.py", "")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    return name
"""


def torch_wheel(folder, version, cuda=None):
    """A package by the name of torch that says which build it is."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", f"from torch import version\n__version__ = {version!r}\n")
        wheel.writestr("torch/version.py", f"cuda = {cuda!r}\n")
        about = f"torch-{version}.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def project(tmp_path):
    """A project without requirements, and wheels of torch for CPUs."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "constraints.txt").write_text("torch==2.13.0\n")
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "small"\nversion = "1.0"\n'
    )
    torch_wheel(tmp_path / "wheels", "2.13.0+cpu")
    return project


@pytest.fixture
def programs(tmp_path):
    """A folder for programs that come before the machine's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def setup(project, programs, tmp_path):
    def setup(**environment):
        known = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        known |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
        known |= {"PATH": f"{programs}:{known['PATH']}", "PYTHON": sys.executable}
        known.pop("TORCH", None)
        return subprocess.run(
            ["bash", SCRIPT, ".venv", "."],
            cwd=project,
            env=known | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return setup


def said(done):
    """The error of a set-up that was refused, in one line that says no more than its own."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    return lines[-1]


def works(project):
    venv = project / ".venv"
    return all(
        subprocess.run([venv / "bin" / name, *words], capture_output=True, check=False).returncode == 0
        for name, words in (("pip", ["--version"]), ("python", ["-c", "import small, torch"]))
    )


def test_a_new_environment_has_pip_torch_and_the_project(setup, project):
    done = setup()
    assert done.returncode == 0, done.stderr
    assert works(project)
    assert "torch for cpu" in done.stderr
    assert "GB that are free" in done.stderr
    again = setup()
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize("half", ["without pip", "without python"])
def test_a_half_made_environment_is_made_anew(setup, project, half):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    if half == "without python":
        (project / ".venv/bin/python").unlink()
    done = setup()
    assert done.returncode == 0, done.stderr
    assert works(project)


def test_a_folder_that_is_no_environment_is_left_alone(setup, project):
    (project / ".venv").mkdir()
    (project / ".venv/mine.txt").write_text("mine")
    assert "no virtual environment; move it away" in said(setup())
    assert (project / ".venv/mine.txt").exists()


def test_a_python_that_cannot_make_environments_is_told_with_the_remedy(setup, project, programs):
    program(programs, "python3", f'case "$2" in venv) exit 1 ;; esac\nexec {sys.executable} "$@"')
    assert "apt-get install python3-venv" in said(setup(PYTHON="python3"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('case "$2" in *exit*) exit 1 ;; *) echo 3.10.4 ;; esac', "python3 is Python 3.10.4, and 3.11 or later"),
        (None, "there is no python3-none; install Python 3.11"),
    ],
)
def test_the_version_of_python_is_looked_at_before_anything_is_fetched(setup, project, programs, text, message):
    if text is not None:
        program(programs, "python3", text)
    assert message in said(setup(PYTHON="python3" if text is not None else "python3-none"))
    assert not (project / ".venv").exists()


def test_too_little_room_is_told_before_anything_is_fetched(setup, project, programs):
    program(programs, "df", 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "d 9 9 1048576 9% /"')
    done = setup()
    assert "too little room" in said(done)
    assert "up to 4 GB of the 1 GB" in done.stderr
    assert not (project / ".venv").exists()


def test_the_build_that_was_asked_for_is_the_one_that_is_there_or_it_is_refused(setup, project):
    message = said(setup(TORCH="cuda"))
    assert "a torch for cuda is wanted, but what was found is torch 2.13.0+cpu, a build for cpu" in message


def test_a_build_for_cuda_is_kept_where_it_is(setup, project, tmp_path):
    shutil.rmtree(tmp_path / "wheels")
    torch_wheel(tmp_path / "wheels", "2.13.0", cuda="13.0")
    done = setup(TORCH="cuda")
    assert done.returncode == 0, done.stderr
    assert "torch for cuda" in done.stderr
    torch_wheel(tmp_path / "wheels", "2.13.0+cpu")
    assert setup().returncode == 0
    words = [project / ".venv/bin/python", "-c", "import torch; print(torch.__version__)"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    assert told.stdout == "2.13.0\n"


def test_cuda_is_chosen_where_there_is_a_driver(setup, programs):
    program(programs, "nvidia-smi", "echo 'GPU 0: one'")
    assert "a torch for cuda is wanted, but what was found" in said(setup())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"TORCH": "gpu"}, "TORCH=gpu: choose cpu or cuda"),
        ({"INSTALLER": "conda"}, "INSTALLER=conda: choose pip or uv"),
    ],
)
def test_other_values_are_refused(setup, names, message):
    assert message in said(setup(**names))


def test_uv_is_used_only_where_it_is(setup, programs):
    for name in ("bash", "dirname", "df", "awk", "grep"):
        (programs / name).symlink_to(shutil.which(name))
    assert "there is no uv here" in said(setup(INSTALLER="uv", PATH=str(programs)))
