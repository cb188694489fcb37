"""Tables that are no rows, and columns with almost the names of a layout, are refused by what they are."""

import json

import pytest

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import plan_sources
from safer_ray.errors import UserError

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
SPLIT = {"columns": ["prompt", "chosen", "rejected"], "index": [0], "data": [["p", "a", "b"]]}
TABLES = {
    "data": ({"data": [ROW, ROW]}, "its rows lie in a list under 'data'; write that array alone"),
    "version": ({"version": 1, "rows": [ROW]}, "its rows lie in a list under 'rows'"),
    "lists": ({name: [value] * 2 for name, value in ROW.items()}, "it holds one list a column, and not rows"),
    "columns": ({name: {"0": value} for name, value in ROW.items()}, "it holds a table by its columns, as pandas"),
    "index": ({"0": ROW, "1": ROW}, "it holds rows under their numbers or names"),
    "split": (SPLIT, "it holds a table as pandas splits it .*orient='records', lines=True"),
}


def plan(path):
    return plan_sources([SourceConfig(path=str(path))])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_no_rows_is_refused_by_what_it_is(tmp_path, table, indent):
    value, told = TABLES[table]
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    with pytest.raises(UserError, match=f"a.json: {told}"):
        plan(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("Prompt,Chosen,Rejected", "format canonical .* rename 'Chosen' to 'chosen', 'Prompt' to 'prompt', 'Rejected'"),
        ("prompt ,chosen,rejected", "format canonical .* rename 'prompt ' to 'prompt'"),
        ("prompt, chosen, rejected", "format canonical .* rename ' chosen' to 'chosen', ' rejected' to 'rejected'"),
        ("Question,chosen,rejected", "format .* rename 'Question' to 'question'"),
    ],
)
def test_names_that_differ_in_capitals_or_blanks_are_told(tmp_path, header, told):
    (tmp_path / "a.csv").write_text(f"{header}\nHow are you?,Fine,Go\n")
    with pytest.raises(UserError, match=f"a.csv: its columns would be those of {told}"):
        plan(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"Prompt": "p"},
        ROW | {"Model": "x", "data": [ROW]},
        ROW | {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_rows_are_rows_whatever_lies_beside(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert len(plan(tmp_path / "a.jsonl")) == 1
