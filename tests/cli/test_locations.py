"""Where a path may lie: every option and every config field says whether it takes a URI, and refuses it if not."""

import ast
import sys
import typing
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from safer_ray.cli import app as cli
from safer_ray.config.read import load_config
from safer_ray.config.sections import RunConfig, SourceConfig
from safer_ray.config.values import AnyPlace, LocalName, LocalPath
from safer_ray.errors import UserError
from safer_ray.service.arguments import ServiceConfig, read_args
from safer_ray.storage.files import as_path
from safer_ray.storage.locations import a_config, a_model, a_source, anywhere, on_disk

ROOT = Path(__file__).parents[2]

# Text that names no file. A new option of text stands here or is declared by `path_option` or `place_option`.
NO_PATHS = {
    "licence",
    "split",
    "encoding",
    "settings",  # of a source, key=value
    "action",
    "actors",
    "address",
    "command",
    "detector",
    "drop",
    "env",
    "format",
    "job_id",
    "mode",
    "model",
    "name",
    "node_env",
    "runner",
    "section",
    "strategy",
    "until",
    "where",
    "words",  # KEY=VALUE, which the service checks
    "assignments",  # the fields that they set are checked
    "read",  # so are these
}
# The same of config fields.
NO_PATH_FIELDS = {
    "LoraConfig.targets",
    "RunConfig.name",
    "RewardConfig.template_arguments",
    "SourceConfig.name",
    "SourceConfig.section",
    "SourceConfig.split",
    "SourceConfig.where",
    "SourceConfig.licence",
    "NoiseConfig.where",
    "NoiseConfig.matching",
    "CurateConfig.where",
    "EvaluateConfig.base",  # a variant's
    "ReportConfig.title",
    "SweepGrid.where",
    "SweepConfig.groups",  # sections
    "LabConfig.noises",  # names of kinds
    "RunConfig.curate",  # names of variants
    "RayConfig.address",  # of a cluster
    "SourceConfig.carried",  # names of columns
    "SourceConfig.encoding",
    "SourceConfig.format",  # these four: names in a registry
    "SourceConfig.pairs",
    "CurateConfig.strategy",
    "SweepGrid.strategies",
}


KINDS = (on_disk, anywhere, a_source, a_config, a_model)


def options():
    """Every parameter of every command."""
    group = typer.main.get_command(cli.app)
    return [(name, parameter) for name, command in sorted(group.commands.items()) for parameter in command.params]


def kind_of(parameter):
    """What a parameter's value is turned into: a path, a path or URI, or something else."""
    return parameter.type_descriptor.parameter_info.parser


def is_text(parameter):
    found = parameter.type_descriptor.annotation
    return any(kind in (str, Path) for kind in (found, *typing.get_args(found)))


def test_every_option_that_names_a_path_says_whether_it_takes_a_uri():
    undeclared = [
        f"{command} {parameter.name}"
        for command, parameter in options()
        if is_text(parameter) and kind_of(parameter) not in KINDS and parameter.name not in NO_PATHS
    ]
    assert undeclared == []
    assert {p.name for _, p in options() if kind_of(p) is None and is_text(p)} <= NO_PATHS
    assert len(options()) > 100


def required(command, but):
    """Words for what a command cannot do without, less one parameter."""
    words = []
    for parameter in typer.main.get_command(cli.app).commands[command].params:
        if not parameter.required or parameter.name == but:
            continue
        value = "1" if parameter.type_descriptor.annotation in (int, float) else "nowhere"
        words += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
    return words


LOCAL = [(command, p) for command, p in options() if kind_of(p) in (on_disk, a_config)]


@pytest.mark.parametrize(("command", "parameter"), LOCAL, ids=[f"{c}-{p.name}" for c, p in LOCAL])
def test_a_uri_is_refused_by_name_where_only_a_disk_will_do(command, parameter, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    uri = "s3://bucket/folder"
    given = [uri] if parameter.param_type_name == "argument" else [parameter.opts[0], uri]
    monkeypatch.setattr(sys, "argv", ["safer-ray", command, *given, *required(command, parameter.name)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert said.startswith("safer-ray: s3://bucket/folder is a URI, and only a path of this machine")
    assert list(tmp_path.iterdir()) == []


def models(model, seen):
    """A config model and all that its fields hold."""
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from models(part, seen)


def parts(annotation):
    """What an annotation is put together from; a declared kind of path is one part."""
    if annotation in (LocalPath, LocalName, AnyPlace) or not typing.get_args(annotation):
        yield annotation
    elif typing.get_origin(annotation) is not typing.Literal:
        for inner in typing.get_args(annotation):
            yield from parts(inner)


def test_every_config_field_that_names_a_path_says_whether_it_takes_a_uri():
    undeclared, declared = [], []
    for model in [*models(RunConfig, set()), *models(ServiceConfig, set())]:
        hints = typing.get_type_hints(model, include_extras=True)
        for name in model.model_fields:
            kinds = list(parts(hints[name]))
            declared += [name for kind in kinds if kind in (LocalPath, LocalName, AnyPlace)]
            if any(kind in (str, Path) for kind in kinds):
                undeclared.append(f"{model.__name__}.{name}")
    assert set(undeclared) <= NO_PATH_FIELDS
    names = ["adapter_base", "auditor", "base", "exchanges", "keys", "path", "root", "template", "text", "use"]
    assert sorted(set(declared)) == names


@pytest.mark.parametrize("field", ["root", "reward.base", "reward.use", "judge.exchanges", "sae.warm_start.text"])
@pytest.mark.parametrize("uri", ["s3://bucket/x", "S3://bucket/x", "gs://bucket/x", "s3:/bucket/x"])
def test_a_config_refuses_a_uri_and_names_the_field(field, uri):
    with pytest.raises(UserError, match=rf"demo.yaml: {field}: {uri} is a URI"):
        load_config(ROOT / "configs/demo.yaml", [f"{field}={uri}"])


def test_the_service_refuses_a_bundle_and_keys_in_a_store(tmp_path):
    with pytest.raises(UserError, match="serve: auditor: s3://b/x is a URI"):
        read_args({"auditor": "s3://b/x"})
    with pytest.raises(UserError, match="serve: keys: s3://b/x is a URI"):
        read_args({"auditor": str(tmp_path), "keys": "s3://b/x"})


def test_a_file_uri_is_the_path_that_it_names_everywhere(tmp_path):
    plain = tmp_path / "a folder"
    for uri in (f"file://{tmp_path}/a%20folder", f"file://localhost{tmp_path}/a%20folder", f"FILE:{tmp_path}/a folder"):
        assert on_disk(uri) == as_path(uri) == Path(anywhere(uri)) == plain
        assert load_config(ROOT / "configs/demo.yaml", [f"root={uri}"]).root == plain
        assert SourceConfig(path=uri).path == str(plain)
    assert Path(str(on_disk(plain))) == plain


@pytest.mark.parametrize("uri", ["file://elsewhere/x", "file://x", "file:///"[:7]])
def test_a_file_uri_of_another_machine_is_refused(uri):
    for kind in (on_disk, anywhere, as_path):
        with pytest.raises(UserError, match=r"names a file on .* machine; write file:///PATH"):
            kind(uri)


def test_a_uri_that_lost_a_slash_is_no_folder():
    for kind in (anywhere, as_path):
        with pytest.raises(UserError, match="s3:/bucket/x is no URI; write s3://BUCKET/NAME"):
            kind("s3:/bucket/x")


def test_names_that_are_looked_up_are_no_uris():
    for name in ("hub:owner/name", "hub:/a/folder", "corpus:train.jsonl", "package:module/folder"):
        assert a_source(name) == name
        for kind in (anywhere, on_disk):
            with pytest.raises(UserError, match=rf"{name} is a name on the hub or the like.*write \./"):
                kind(name)
            assert str(kind(f"./{name}")).removeprefix("./") == name
    for name in ("a:b", "C:x/y"):
        assert on_disk(name) == Path(name)
        assert anywhere(name) == a_source(name) == name


@pytest.mark.parametrize("kind", KINDS)
def test_a_tilde_that_no_shell_expanded_is_the_home_directory(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(kind("~/x")) == str(kind(f"file://{tmp_path}/x")) == f"{tmp_path}/x"
    assert str(kind("~")) == str(tmp_path)
    assert str(kind("./~x")) == str(kind(str(kind("./~x")))) == f"{tmp_path}/~x"
    assert str(kind("a/~x")) == "a/~x"
    with pytest.raises(UserError, match=r"~nobody-here/x: no such user's home; write \./~nobody-here/x"):
        kind("~nobody-here/x")
    config = load_config(ROOT / "configs/demo.yaml", ["root=~/runs", "judge.exchanges=~/probe.yaml"])
    assert (config.root, config.judge.exchanges) == (tmp_path / "runs", f"{tmp_path}/probe.yaml")
    assert SourceConfig(path="~/a.jsonl").path == f"{tmp_path}/a.jsonl"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("a/b\0c", r"the path 'a/b\\x00c' holds a NUL"),
        ("file:///a%00b", r"holds a NUL"),
        ("a/\udcff", r"the path b'a/\\xff' is not UTF-8; rename it"),
        ("a/" + "n" * 256, r"nnn… is a name of 256 characters; file systems take 255 bytes"),
        ("ü" * 128, r"üüü… is a name of 128 characters; file systems take 255 bytes"),
        (" ", r"a path is empty"),
    ],
)
def test_what_can_be_no_path_is_refused_in_one_place(kind, path, told):
    with pytest.raises(UserError, match=told):
        kind(path)


def test_the_benches_take_their_paths_by_the_same_rule():
    for module in (ROOT / "bench").glob("*.py"):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert not any(k.arg == "type" and ast.unparse(k.value) == "Path" for k in call.keywords), module
