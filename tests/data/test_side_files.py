"""What lies in a folder of data and holds no rows is left out, and named."""

import json

import pytest

from safer_ray.config.sections import SourceConfig
from safer_ray.data.source_files import find_files
from safer_ray.errors import UserError
from safer_ray.pipeline.inspection import inspect

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
NO_ROWS = {
    "metadata.json": {"name": "mine", "rows": 1},
    "croissant.json": {"@context": {}, "recordSet": [{"field": ["prompt", "chosen"]}]},
    "dataset_infos.json": {"default": {}},
    "dataset_info.json": {},
    "vocabulary.json": ["a", "b"],
    "config.json": {"columns": [{"name": "prompt"}]},
    "more/labels.json": {"a": 1},
}
ROWS = {
    "rows.json": [ROW],
    "metadata.json": [ROW],
    "one.json": ROW,
    "named.json": {"version": 1, "data": [ROW]},
    "columns.json": {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]},
    "strange.json": [{"a": 1}],  # it is tried, and refused by its columns
    "empty.json": [],
}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    return tmp_path


def find(path):
    found = find_files(SourceConfig(path=str(path)))
    return [file.name for file in found.files], found.told


@pytest.mark.parametrize("name", NO_ROWS)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pattern", ["", "**/*.json*"])
def test_a_json_file_without_rows_is_left_out_and_named(data, name, indent, pattern):
    (data / name).write_text(json.dumps(NO_ROWS[name], indent=indent))
    assert find(data / pattern) == (["rows.jsonl"], (f"files that hold no rows are left out: {name}",))


@pytest.mark.parametrize("name", ROWS)
def test_a_json_file_in_which_a_row_may_lie_is_tried(data, name):
    (data / name).write_text(json.dumps(ROWS[name]))
    assert find(data) == (sorted([name, "rows.jsonl"]), ())


def test_a_file_that_is_named_itself_is_tried_and_so_are_those_that_lie_alone(data):
    (data / "metadata.json").write_text('{"a": 1}')
    assert find(data / "metadata.json") == (["metadata.json"], ())
    (data / "rows.jsonl").unlink()
    assert find(data) == (["metadata.json"], ())
    with pytest.raises(
        UserError, match=r"metadata.json: no preference format fits the columns a; the simplest is canonical"
    ):
        inspect(str(data))


def test_other_files_are_named_and_of_many_the_first(data):
    for name in ("README.md", "a.yaml", "b.tsv", "rows.jsonl.bz2", "d.png", "e.txt", ".f.jsonl", "_g.csv", "_SUCCESS"):
        (data / name).touch()
    assert find(data) == (
        ["rows.jsonl"],
        (
            "hidden files are left out: .f.jsonl, _g.csv",
            "files of other kinds are not read: README.md, a.yaml, b.tsv, d.png, e.txt and 1 more",
        ),
    )
    assert find(data / "*.jsonl") == (["rows.jsonl"], ())


def test_where_nothing_holds_rows_what_is_there_is_named(tmp_path):
    (tmp_path / "a.tsv").touch()
    with pytest.raises(UserError, match=r"no data files there; files of other kinds are not read: a.tsv; supported"):
        find(tmp_path)


@pytest.mark.parametrize("name", [".cache", ".ipynb_checkpoints", "_delta_log", "_x", "__MACOSX", "more/_temporary"])
def test_folders_of_tools_are_left_out_and_told(data, name):
    (data / name).mkdir()
    (data / name / "0.json").write_text(json.dumps([ROW]))
    found = find_files(SourceConfig(path=str(data)))
    assert [file.name for file in found.files] == ["rows.jsonl"]
    assert found.left_out == {str(data / name): 1}


def test_a_folder_of_tools_that_is_named_itself_is_read_and_so_is_a_partition(data):
    for name in ("_x", "_lang=en"):
        (data / name).mkdir()
        (data / name / "0.json").write_text(json.dumps([ROW]))
    assert find(data)[0] == ["0.json", "rows.jsonl"]
    for place in (data / "_x", data / "_x/*.json", data / "_*/0.json"):
        assert find(place)[0]


def test_a_link_that_leads_nowhere_is_refused_by_name(data):
    (data / "README.md").symlink_to(data / "none")
    (data / ".hidden.jsonl").symlink_to(data / "none")
    assert find(data)[0] == ["rows.jsonl"]
    (data / "more/lost.jsonl").symlink_to(data / "none")
    with pytest.raises(UserError, match=r"lost.jsonl is a link that leads nowhere; put back what it leads to"):
        find(data)
    assert find(data / "*.jsonl")[0] == ["rows.jsonl"]


def test_inspection_tells_it(data):
    (data / "README.md").touch()
    assert inspect(str(data)).told == ("files of other kinds are not read: README.md",)
