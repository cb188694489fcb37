"""Which split is read, and what is said of the others."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safer_ray.config.sections import SourceConfig
from safer_ray.data.source_files import find_files
from safer_ray.data.splits import split_of
from safer_ray.errors import UserError

ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
NAMES = {
    "data/train-00000-of-00002.parquet": "train",
    "data/test_prefs-00000-of-00001.parquet": "test_prefs",
    "data/validation-00000-of-00001-9d6c.parquet": "validation",
    "json-train-00000-of-00001.arrow": "train",
    "dev.jsonl": "validation",
    "my_eval-set.jsonl": "test",
    "train/0000.parquet": "train",
    "en/test/part.parquet": "test",
    "train/test.jsonl": "test",
    "Training 2.csv": "train",
    "data-00000-of-00001.arrow": None,
    "part-00000-of-00004.jsonl": None,
    "contest.jsonl": None,
    "pairs.jsonl": None,
    "trainer.jsonl": None,
}


def find(path, **settings):
    found = find_files(SourceConfig(path=str(path), **settings))
    return sorted(file.name for file in found.files), " | ".join(found.told)


def saved(path, **splits):
    datasets = pytest.importorskip("datasets")
    rows = {
        name: datasets.Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}] * n)
        for name, n in splits.items()
    }
    datasets.DatasetDict(rows).save_to_disk(path)
    return path


def folder(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(ROW)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_or_its_folders_tells_the_split(name):
    assert split_of(name) == NAMES[name]


# Saved


def test_of_a_saved_dict_train_is_read_and_the_others_are_named(tmp_path):
    data = saved(tmp_path / "d", train=2, held_out=1, test=1)
    assert find(data)[1] == "split train is read; left out: held_out, test (--split NAME reads another)"
    assert find(data, split="test")[1] == "split test is read; left out: train, held_out (--split NAME reads another)"
    assert find_files(SourceConfig(path=str(data), split="test")).files[0].parent.name == "test"


def test_without_train_the_splits_are_named_with_a_remedy_that_works(tmp_path):
    data = saved(tmp_path / "d", train_prefs=2, test_prefs=1)
    with pytest.raises(
        UserError,
        match=r"d has no split 'train'; it has train_prefs, test_prefs: choose one by --split NAME \(`split: NAME` in",
    ):
        find(data)
    files = find_files(SourceConfig(path=str(data), split="train_prefs")).files
    assert files[0].parent.name == "train_prefs"


def test_the_only_split_is_read_and_named(tmp_path):
    data = saved(tmp_path / "d", validation=2)
    assert find(data)[1] == "split validation is read, the only one there is"
    assert find(data, split="validation")[1] == ""
    with pytest.raises(UserError, match="no split 'train'; it has validation"):
        find(data, split="train")


def test_a_split_that_was_saved_alone_knows_its_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"a": 1}], split="test").save_to_disk(tmp_path / "d")
    assert find(tmp_path / "d")[1] == find(tmp_path / "d", split="test")[1] == ""
    with pytest.raises(UserError, match="no split 'dev'; it has test"):
        find(tmp_path / "d", split="dev")


# On the hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A data set as the hub has it."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")

    def make(*splits):
        (tmp_path / "repo/data").mkdir(parents=True)
        for number, split in enumerate(splits, 1):
            table = pa.table({"prompt": ["p"] * number, "chosen": ["a"] * number, "rejected": ["b"] * number})
            pq.write_table(table, tmp_path / f"repo/data/{split}-00000-of-00001.parquet")
        return f"hub:{tmp_path / 'repo'}"

    return make


def test_of_a_hub_name_train_is_read_and_the_others_are_named(repository):
    name = repository("train", "test")
    assert find(name)[1] == "split train is read; left out: test (--split NAME reads another)"
    assert find(name, split="test")[1] == "split test is read; left out: train (--split NAME reads another)"
    assert find(name, split="test[:1]")[0]


def test_a_hub_name_without_train_names_its_splits(repository):
    name = repository("train_prefs", "test_prefs")
    with pytest.raises(UserError, match=r"no split 'train'; it has (train|test)_prefs, (train|test)_prefs: choose one"):
        find(name)
    assert "left out: test_prefs" in find(name, split="train_prefs")[1]


def test_the_only_split_of_a_hub_name_is_read(repository):
    assert find(repository("validation"))[1] == "split validation is read, the only one there is"


# In a folder


CLONE = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl")


def test_all_files_of_a_clone_are_read_and_their_splits_are_told(tmp_path):
    names, told = find(folder(tmp_path, *CLONE))
    assert len(names) == 3
    assert told == "files of several splits are read: test (1 file), train (2 files) (--split NAME reads one)"
    assert find(tmp_path / "data/train*")[1] == ""


def test_one_split_of_a_clone_is_read_where_it_is_asked_for(tmp_path):
    folder(tmp_path, *CLONE, "more.jsonl")
    names, told = find(tmp_path, split="train")
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert told == "split train is read; left out: of no split (1 file), test (1 file)"
    assert find(tmp_path, split="eval")[0] == ["test-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match=r"no split 'dev': its files' names tell of test \(1 file\), train \(2 files\)"):
        find(tmp_path, split="dev")


def test_files_that_tell_of_no_split_are_of_train(tmp_path):
    folder(tmp_path, "a.jsonl", "b.jsonl")
    assert find(tmp_path, split="train") == find(tmp_path) == (["a.jsonl", "b.jsonl"], "")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match="no split 'test': no file's name tells of a split; choose another --split"):
            find(path, split="test")


def test_a_config_that_says_no_split_is_recorded_as_before():
    plain, said = SourceConfig(path="a"), SourceConfig(path="a", split="train")
    assert plain.recorded() == said.recorded()
    assert (plain.asked_split(), said.asked_split()) == (None, "train")
    assert plain.model_copy(update={"path": "b"}).asked_split() is None


def test_a_saved_selection_of_rows_is_refused_with_the_remedy(tmp_path):
    """Old versions of `datasets` saved all rows, and the numbers of those that were selected beside them."""
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "0.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]})
    )
    with pytest.raises(UserError, match=r"selection of its rows .*flatten_indices\(\)"):
        find_files(SourceConfig(path=str(tmp_path)))
