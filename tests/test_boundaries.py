"""What modules may import and how large they may be."""

import ast
import functools
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "safer_ray"
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(tree):
    """Top-level packages that a module imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def calls(tree, name):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split("(")[0].endswith(name)
    ]


def literal(call, keyword):
    """The value of a keyword where it is written out, else None."""
    for argument in call.keywords:
        if argument.arg == keyword and isinstance(argument.value, ast.Constant):
            return argument.value.value
    return None


@pytest.fixture(params=MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def module(request):
    return request.param


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture
def tree(module):
    return parsed(module)


def test_ray_and_deepspeed_stay_in_distributed(module, tree):
    if module.relative_to(LIBRARY).parts[0] != "distributed":
        assert {"ray", "deepspeed"}.isdisjoint(imported(tree))


def test_no_module_pickles(tree):
    assert {"pickle", "dill", "cloudpickle", "joblib", "shelve"}.isdisjoint(imported(tree))


def test_torch_loads_weights_only(tree):
    for call in calls(tree, "torch.load"):
        assert literal(call, "weights_only") is True, ast.unparse(call)


def test_remote_code_is_never_trusted_by_the_library_itself(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert literal(node, "trust_remote_code") is not True, ast.unparse(node)


@pytest.mark.parametrize("folder", ["safer_ray", "serve", "bench", "jobs", "scripts"])
def test_one_module_alone_opens_checkpoints(folder):
    """transformers' Auto classes ask at a terminal whether to run a checkpoint's code, unless they are told."""
    for path in sorted((LIBRARY.parent / folder).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if path.name != "pretrained.py" and isinstance(node, ast.ImportFrom) and node.module == "transformers":
                assert not [alias.name for alias in node.names if alias.name.startswith("Auto")], path


def test_numpy_never_unpickles(tree):
    for call in calls(tree, "np.load"):
        assert not literal(call, "allow_pickle"), ast.unparse(call)


def test_modules_stay_under_five_hundred_lines(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 500


def test_there_are_modules_to_read():
    assert len(MODULES) > 20
