"""Every command, every option, values that cannot be: one line that says so, exit code 2, and nothing left behind."""

import os
import shutil

import pytest
from support.every_command import GROUP, OPTIONS, Words, is_path, made_anew, numeric, takes_out
from support.tiny_run import audited, finished

from safer_ray.config.sections import ScoresConfig

PATHS = [(command, parameter) for command, parameter in OPTIONS if is_path(parameter)]
NUMBERS = [(command, parameter) for command, parameter in OPTIONS if numeric(parameter)]
TEXTS = [
    (command, parameter)
    for command, parameter in OPTIONS
    if not is_path(parameter) and not numeric(parameter) and parameter.type_descriptor.annotation is not bool
]
# What is no error: a folder without runs or leftovers, a text, an empty file of pairs, what is to be written.
FINE = {
    ("ls", "root", "folder"),
    ("gc", "root", "folder"),
    ("activations", "text", "file"),
    ("diff", "json", "missing"),
    ("inspect", "path", "empty file"),
    *((command, "out", kind) for command in GROUP.commands for kind in ("missing", "folder")),
}


def ids(cases):
    return [f"{command}-{parameter.name}" for command, parameter in cases]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    run = finished(tmp_path_factory.getbasetemp())
    at = {name: artifact.path for name, artifact in run.artifacts.items()}
    folder = tmp_path_factory.mktemp("words")
    audited(ScoresConfig(), at["corpus"] / "heldout.jsonl", run.artifacts["auditor"], folder / "audit")
    (folder / "audit/manifest.json").write_text('{"stage": "audit", "name": "audit-0", "packages": {}}')
    return Words(at, run.directory.parent.parent / "tiny.yaml", folder / "audit", folder)


@pytest.fixture
def refused(safer, tmp_path, monkeypatch):
    """Run a command that must be refused; returns its line. Nothing is left of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))

    def call(*words, left=(), code=2):
        before = set(tmp_path.iterdir())
        ended, _, err = safer(*words)
        assert ended == code, (words, err)
        assert "Traceback" not in err
        *events, line = err.splitlines()
        assert line.startswith("safer-ray: "), err
        assert all(event.startswith("{") for event in events), err
        assert {path.name for path in set(tmp_path.iterdir()) - before} <= set(left), words
        return line

    return call


def bad_paths(folder):
    """What may stand in the place of a path, by kind."""
    made_anew(folder / "folder")
    (folder / "file").write_text("hello\n")
    (folder / "empty.jsonl").write_text("")
    return {
        "file": folder / "file",
        "folder": folder / "folder",
        "missing": folder / "none",
        "empty file": folder / "empty.jsonl",
        "below a file": folder / "file/x",
        "long": folder / ("n" * 300),
        "NUL": "a\0b",
        "not UTF-8": os.fsdecode(bytes(folder) + b"/\xff"),
        "nobody's home": "~nobody-here/x",
        "nothing": " ",
    }


@pytest.mark.parametrize(("command", "parameter"), PATHS, ids=ids(PATHS))
def test_a_path_that_cannot_be_is_one_line(command, parameter, words, refused, tmp_path):
    for kind, path in bad_paths(tmp_path).items():
        if (command, parameter.name, kind) in FINE:
            continue
        call = words.of(command, parameter.name, path, tmp_path / "out")
        left = ["out"] if command == "audit" and kind == "empty file" else []  # which may grow
        refused(*call, left=left)


@pytest.mark.parametrize(("command", "parameter"), [(c, p) for c, p in PATHS if p.name in ("out", "json")], ids=str)
def test_what_is_written_is_not_called_as_on_the_hub(command, parameter, words, refused, tmp_path):
    for name in ("hub:x/y", "corpus:x", "package:x/y"):
        line = refused(*words.of(command, parameter.name, name, tmp_path / "out"))
        assert f"{name} is a name on the hub or the like" in line


@pytest.mark.parametrize(("command", "parameter"), NUMBERS, ids=ids(NUMBERS))
def test_a_number_that_cannot_be_is_refused_with_its_option(command, parameter, words, safer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("-1", "nan", "inf", "-inf", "1e400", "1" + "0" * 30, "-0.5", "x", ""):
        code, _, err = safer(*words.of(command, parameter.name, value, tmp_path / "out"))
        assert code == 2, (value, err)
        assert parameter.opts[0] in err
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == [], value


@pytest.mark.parametrize(("command", "parameter"), TEXTS, ids=ids(TEXTS))
def test_an_empty_text_is_refused_with_its_option(command, parameter, words, refused, tmp_path):
    for value in ("", " "):
        line = refused(*words.of(command, parameter.name, value, tmp_path / "out"))
        assert f"{parameter.opts[0] if parameter.param_type_name == 'option' else parameter.name} is empty" in line


# What --fresh would destroy

# `fit` makes artifacts below --out, as `run` does below its root: a test of its own.
READ = [(c, p) for c, p in PATHS if takes_out(c) and p.name not in ("out", "working_dir")]
READ = [(c, p) for c, p in READ if c not in ("import-sae", "fit")]


@pytest.mark.parametrize(("command", "parameter"), READ, ids=ids(READ))
@pytest.mark.parametrize("where", ["equal", "above", "far above", "behind a link"])
def test_fresh_deletes_nothing_that_the_command_reads(command, parameter, where, words, safer, tmp_path):
    if (command, parameter.name) == ("auditor", "detector"):
        pytest.skip("the tiny run has none")
    given = words.value(command, parameter.name)
    out = tmp_path / "out"
    lies = {"equal": out, "above": out / given.name, "far above": out / "x/y" / given.name}.get(where, out / given.name)
    out.mkdir(parents=True)
    if given.is_dir():
        shutil.copytree(given, lies, dirs_exist_ok=True)
    elif where == "equal":
        pytest.skip("a file is no folder")
    else:
        lies.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given, lies)
    stage = {"rescore": "scores"}.get(command, command)
    if where != "equal":  # as if an earlier run of the same command had written it
        made = {"audit": "audit.json"}.get(command, "manifest.json")
        tree = '{"auditor": "", "source": {}, "scores": {}, "path": ""}'
        tree = tree if command == "audit" else f'{{"stage": "{stage}", "name": "{stage}-0", "packages": {{}}}}'
        (out / made).write_text(tree)
        if command == "audit":  # it deletes what an audit wrote, and nothing else
            (out / "scores").mkdir()
            lies = shutil.move(lies, out / "scores" / lies.name)
    before = contents(out)
    target = out
    if where == "behind a link":
        target = tmp_path / "link"
        target.symlink_to(out)
    code, _, err = safer(*words.of(command, parameter.name, lies, target), "--fresh")
    assert contents(out) == before
    assert code == 2, err
    assert "which this command reads" in err or "holds manifest.json, but no audit" in err


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
