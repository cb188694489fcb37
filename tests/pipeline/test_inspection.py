"""An inspection says how much of a data set it saw."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safer_ray.cli.data import _show
from safer_ray.pipeline.inspection import inspect


def rows(count):
    return [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(count)]


def lines(path, count, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)) + end)
    return path


def shown(capsys, path, count):
    _show(inspect(str(path), rows=count))
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rows"))


def test_it_says_that_there_are_more_rows(tmp_path, capsys):
    assert shown(capsys, lines(tmp_path / "a.jsonl", 10), 10) == "rows      10 read, 10 good, 0 refused"
    assert shown(capsys, lines(tmp_path / "a.jsonl", 11), 10) == "rows      10 read, the first ones, 10 good, 0 refused"
    lines(tmp_path / "b.jsonl", 1)
    assert shown(capsys, tmp_path, 12) == "rows      12 read, 12 good, 0 refused"
    assert shown(capsys, tmp_path, 11) == "rows      11 read, the first ones, 11 good, 0 refused"


def test_it_says_how_many_rows_there_are_where_the_file_does(tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist(rows(4800)), tmp_path / "a.parquet")
    assert shown(capsys, tmp_path, 1000) == "rows      1000 read of 4,800, 1000 good, 0 refused"
    assert shown(capsys, tmp_path, 5000) == "rows      4800 read, 4800 good, 0 refused"


def test_rows_behind_those_that_were_matched_are_more(tmp_path):
    made = [{"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = inspect(str(tmp_path), rows=20)
    assert (found.rows, found.more, found.total) == (10, True, None)
    assert not inspect(str(tmp_path), rows=40).more


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt,chosen,rejected\n")])
def test_a_file_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert inspect(str(tmp_path / name)).told == (f"no rows in {tmp_path / name}",)
