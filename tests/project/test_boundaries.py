"""What modules may import and how large they may be."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "safer_ray"
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


# A package imports only from those on lines above its own, also inside functions and for types alone.
ORDER = (
    ("errors", "schema"),
    ("strategies",),
    ("storage",),
    ("formats",),
    ("config",),
    ("data",),
    ("reward", "detection", "report"),
    ("sae",),
    ("features",),
    ("pipeline",),
    ("audit", "distributed"),
    ("service",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ALONE = {"client": {"errors"}, "__init__": set(), "__main__": {"cli"}}  # modules of no package


def of_ours(tree):
    """Modules of the library that a module imports anywhere in it, with names that may be modules themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("safer_ray."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safer_ray":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_package_imports_from_those_before_it_alone(module, tree):
    own = module.relative_to(LIBRARY).parts[0].removesuffix(".py")
    found = {name.split(".")[1] for name in of_ours(tree)} - {own, "__version__"}
    if own in ALONE:
        assert found <= ALONE[own]
    else:
        assert {name for name in found if LEVEL[name] >= LEVEL[own]} == set()


def test_every_package_has_its_place_in_the_order():
    there = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there == set(LEVEL) - {"errors", "schema", "strategies"}
    assert len(list(LIBRARY.glob("*.py"))) <= 8


def test_the_figure_of_the_architecture_shows_the_order():
    svg = (LIBRARY.parent / "docs/architecture.svg").read_text(encoding="utf-8")
    rows = {}
    for y, name in re.findall(r'<text class="package" [^>]*y="(\d+)">(\w+)<', svg):
        rows.setdefault(int(y), []).append(name)
    assert tuple(tuple(rows[y]) for y in sorted(rows, reverse=True)) == ORDER


def test_no_module_imports_itself_by_way_of_others():
    names = {".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts): path for path in MODULES}
    left = {
        name: {found if found in names else found.rpartition(".")[0] for found in of_ours(parsed(path))} & names.keys()
        for name, path in names.items()
    }
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


@pytest.mark.parametrize("folder", ["safer_ray", "jobs", "serve"])
def test_ray_stays_in_distributed_and_service(folder):
    for path in sorted((LIBRARY.parent / folder).rglob("*.py")):
        own = path.relative_to(LIBRARY.parent).parts[1]
        found = set(imported(parsed(path)))
        assert "ray" not in found or own in ("distributed", "service"), path
        assert "deepspeed" not in found or own == "distributed", path


def test_help_imports_neither_torch_nor_ray():
    code = "import sys, safer_ray.cli; sys.exit(str({'torch', 'ray', 'pyarrow', 'numpy'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], check=False, cwd=LIBRARY.parent, capture_output=True, text=True)
    assert told.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "module", ["safer_ray.pipeline.run", "safer_ray.distributed.ray_runner", "safer_ray.audit.run"]
)
def test_stages_that_run_no_model_and_drivers_that_only_map_start_without_torch(module):
    code = f"import sys, {module}; sys.exit(str({{'torch', 'transformers', 'scipy.stats'}} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], check=False, cwd=LIBRARY.parent, capture_output=True, text=True)
    assert told.stderr.strip() == "set()"


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
