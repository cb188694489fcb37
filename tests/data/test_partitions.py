"""Columns that folders tell, and files of several formats in one folder."""

import json

import pyarrow as pa
import pyarrow.dataset
import pytest

from safer_ray.config.sections import SourceConfig
from safer_ray.data.partitions import partition_columns
from safer_ray.data.sources import NormalisePairs, plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.pipeline.inspection import inspect

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
NAMES = {
    "lang=en/year=2024/part.parquet": {"lang": "en", "year": "2024"},
    "a/lang=en/b/part.parquet": {"lang": "en"},
    "lang=__HIVE_DEFAULT_PARTITION__/part.parquet": {"lang": None},
    "topic=a%2Fb%3Dc/x%20y=%C3%A9/part.parquet": {"topic": "a/b=c", "x y": "é"},
    "empty=/=none/part.parquet": {"empty": ""},
    "eq=a=b/part.parquet": {"eq": "a=b"},
    "a=1/a=2/part.parquet": {"a": "2"},
    "lang=en.jsonl": {},
}


def put(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(*paths, **settings):
    sources = [SourceConfig(path=str(path), **settings) for path in paths]
    normalise = NormalisePairs(sources, 1000)
    return [
        row
        for fragment in plan_sources(sources)
        for row in normalise(read_raw(fragment, sources[fragment.source])).to_pylist()
    ]


def extras(*paths):
    return [json.loads(row["extra"] or "{}") for row in pairs(*paths)]


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_a_file_tell_columns(name):
    assert partition_columns(name) == NAMES[name]


def test_partitions_that_arrow_wrote_ride_along_like_any_other_column(tmp_path):
    table = pa.table({name: [value] * 3 for name, value in ROW.items()} | {"lang": ["en", None, "a/b"], "n": [1, 2, 3]})
    pa.dataset.write_dataset(table, tmp_path, format="parquet", partitioning=["lang"], partitioning_flavor="hive")
    found = sorted(extras(tmp_path), key=lambda extra: extra["n"])
    assert found == [{"lang": "en", "n": 1}, {"lang": None, "n": 2}, {"lang": "a/b", "n": 3}]
    assert "lang" in inspect(str(tmp_path)).columns


def test_a_partition_is_a_section_where_it_is_called_so(tmp_path):
    put(tmp_path / "section=chat/a.jsonl", ROW)
    assert [row["section"] for row in pairs(tmp_path)] == ["chat"]


@pytest.mark.parametrize(
    ("folder", "own"),
    [("year=2024", 2024), ("year=2024", "2024"), ("year=2024", 2024.0), ("ok=true", True), ("a=x", None), ("a=x", "x")],
)
def test_a_row_may_say_what_its_folder_says(tmp_path, folder, own):
    name, _, value = folder.partition("=")
    put(tmp_path / folder / "a.jsonl", ROW | {name: own, "none": None})
    assert extras(tmp_path) == [{name: value if own is None else own, "none": None}]


@pytest.mark.parametrize(
    ("folder", "own"), [("year=2024", 2023), ("year=2024", "x"), ("year=x", 1), ("a=__HIVE_DEFAULT_PARTITION__", "x")]
)
def test_a_row_that_says_otherwise_is_refused_by_name(tmp_path, folder, own):
    name = folder.partition("=")[0]
    put(tmp_path / folder / "a.jsonl", ROW, ROW | {name: own})
    good, bad = pairs(tmp_path)
    assert good["refused"] is None
    assert bad["refused"].startswith(f"partition contradicts: the row's {name} is {str(own)!r}, and its folder says ")


def test_folders_below_the_source_alone_tell_columns(tmp_path):
    file = put(tmp_path / "lang=en/year=2024/a.jsonl", ROW)
    assert extras(tmp_path) == extras(tmp_path / "*/*/*.jsonl") == [{"lang": "en", "year": "2024"}]
    assert extras(tmp_path / "lang=en") == extras(f"{tmp_path}/lang=en/**/*.jsonl") == [{"year": "2024"}]
    assert extras(file) == [{}]


def test_two_sources_with_a_file_of_one_name_tell_the_same(tmp_path):
    for folder in ("one", "two"):
        put(tmp_path / folder / "lang=en/a.jsonl", ROW)
    assert extras(tmp_path / "one", tmp_path / "two") == [{"lang": "en"}] * 2


def test_rows_read_again_from_their_file_alone_have_the_same_columns(tmp_path):
    """As an export of an audit reads them."""
    put(tmp_path / "lang=en/a.jsonl", ROW)
    (fragment,) = plan_sources([SourceConfig(path=str(tmp_path))])
    again = read_raw(fragment, SourceConfig(path=fragment.path))
    assert again.equals(read_raw(fragment, SourceConfig(path=str(tmp_path))))


def test_every_pair_of_a_row_with_several_has_the_columns(tmp_path):
    row = {"prompt": "p", "answers": [{"answer": text, "rank": n, "model": "m"} for n, text in enumerate("abc", 1)]}
    put(tmp_path / "lang=en/a.jsonl", row)
    found = pairs(tmp_path, format="nectar")
    assert found
    assert all(json.loads(row["extra"])["lang"] == "en" for row in found if not row["refused"])


# Several formats


def test_files_of_several_formats_are_read_and_told_with_one_of_each(tmp_path):
    turns = "\n\nHuman: Hi\n\nAssistant:"
    put(tmp_path / "a.jsonl", ROW)
    put(tmp_path / "b.jsonl", {"chosen": f"{turns} Yes.", "rejected": f"{turns} No."})
    put(tmp_path / "c.jsonl", ROW | {"prompt": "Hm?"})
    put(tmp_path / "d.jsonl")
    found = inspect(str(tmp_path))
    assert (found.rows, found.good) == (3, 3)
    assert found.told == (
        f"no rows in {tmp_path}/d.jsonl",
        f"files of 2 formats are read, each by its own: canonical ({tmp_path}/a.jsonl), hh_rlhf ({tmp_path}/b.jsonl)",
    )
    assert inspect(str(tmp_path / "[ac].jsonl")).told == ()


@pytest.mark.parametrize("folder", ["system=gpt4", "id=7", "uid=7", "pair_id=7", "prompt=hi", "chosen=a", "messages=a"])
def test_a_folder_cannot_say_what_only_a_row_can(tmp_path, folder):
    put(tmp_path / folder / "lang=en/a.jsonl", ROW)
    name = folder.partition("=")[0]
    with pytest.raises(UserError, match=f"a folder's name cannot hold the {name} of all its rows; rename the folder"):
        pairs(tmp_path)
    assert pairs(tmp_path / folder)[0]["extra"] == '{"lang":"en"}'
