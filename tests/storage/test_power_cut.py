"""What a power cut may take: nothing that a `done` entry, a manifest or a checkpoint vouches for.

A disk may forget whatever is not synced: the bytes of a file, and the names in a folder. The recorder here follows what
is synced, and looks at every rename at what would be left.
"""

import json
import os
import shutil

import pyarrow as pa
import pytest
import torch

from safer_ray.errors import UserError
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.training_steps import OneProcess, OptimizerOptions
from safer_ray.storage import files
from safer_ray.storage.artifacts import Place, Recipe, Result, open_artifact, part_fragments, part_name, read_fragment
from safer_ray.storage.files import make_folder, read_json, read_parquet, write_json, write_parquet, write_text
from safer_ray.storage.work import MapJob, TrainJob

ROWS = pa.table({"pair_id": ["a", "b"], "value": [1, 2]})
RECIPE = Recipe("salience", 1, {}, {})


class Disk:
    """What is synced below a folder, and `events`: every rename and removal with the files that would be lost then."""

    def __init__(self, root, monkeypatch):
        self.root, self.events = root, []
        self.bytes, self.names = {}, set()  # inode -> size and time when it was synced; paths whose name was
        self._patch(monkeypatch)

    def _patch(self, monkeypatch):
        fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

        def synced(descriptor):
            fsync(descriptor)
            path, stat = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
            if os.path.isdir(path):
                self.names |= {os.path.join(path, name) for name in os.listdir(path)}
            else:
                self.bytes[stat.st_ino] = (stat.st_size, stat.st_mtime_ns)

        def replaced(source, target):
            self.events.append((str(target), self.lost(), self.is_safe(source, its_name=False)))
            replace(source, target)
            below = {name for name in self.names if name.startswith(f"{source}/")}
            self.names -= {name for name in self.names if f"{name}/".startswith((f"{source}/", f"{target}/"))}
            self.names |= {f"{target}{name.removeprefix(str(source))}" for name in below}

        def removed(path, *given, **options):
            self.events.append((f"rm {path}", self.lost(), True))
            rmtree(path, *given, **options)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        monkeypatch.setattr(shutil, "rmtree", removed)

    def is_safe(self, path, its_name=True):
        """Whether a file's bytes, and the names of it and of the folders that it lies in, are synced."""
        stat = os.stat(path)
        kept = os.path.isdir(path) or self.bytes.get(stat.st_ino) == (stat.st_size, stat.st_mtime_ns)
        above = [path, *path.parents] if its_name else path.parents
        return kept and all(str(p) in self.names for p in above if p != self.root and p.is_relative_to(self.root))

    def lost(self):
        """Files that a power cut would take, in whole or in part; journals and what lies beside are of no use then."""
        below = [path for path in self.root.rglob("*") if path.is_file()]
        return [p.name for p in below if not (p.name.startswith(".") or "journal" in p.parts or self.is_safe(p))]

    def at(self, name):
        """What would be lost when this name was given, and whether what got it was synced."""
        (found,) = [
            (lost, synced) for target, lost, synced in self.events if target.endswith(name) and target[:3] != "rm "
        ]
        return found


@pytest.fixture
def disk(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    return Disk(tmp_path / "disk", monkeypatch)


def chokes(rows):
    refused = rows.append_column(
        "refused", pa.array(["bad: it is" if v == 2 else None for v in rows["value"].to_pylist()])
    )
    return refused.append_column("row_key", pa.array(["x#0", "x#1"]))


def test_the_recorder_sees_what_is_not_synced(disk):
    (disk.root / "a").write_text("x")
    assert disk.lost() == ["a"]
    files.sync(disk.root / "a")
    assert disk.lost() == ["a"]  # its name
    files.sync(disk.root)
    assert disk.lost() == []
    os.replace(disk.root / "a", disk.root / "b")
    assert disk.lost() == ["b"]


def test_a_fragments_entry_comes_when_its_rows_and_their_names_are_on_the_disk(disk, tmp_path):
    write_parquet(ROWS, tmp_path / "in" / part_name(0))
    written = pa.schema([("pair_id", pa.string()), ("value", pa.int64())])
    job = MapJob("codes", read_fragment, lambda: chokes, written)
    LocalRunner().map(job, part_fragments(tmp_path / "in"), disk.root / "new/out")
    assert disk.at(f"quarantine/{part_name(0)}") == ([], True)
    assert disk.at("done/00000000.json") == ([], True)
    assert disk.lost() == []


def test_a_quarantine_that_is_taken_back_does_not_come_back(disk, tmp_path, monkeypatch):
    write_parquet(ROWS, tmp_path / "in" / part_name(0))
    out, synced = disk.root / "out", []
    written = pa.schema([("pair_id", pa.string()), ("value", pa.int64())])
    LocalRunner().map(MapJob("codes", read_fragment, lambda: chokes, written), part_fragments(tmp_path / "in"), out)
    (out / "done/00000000.json").unlink()
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (synced.append(path.name), sync(path)))
    LocalRunner().map(
        MapJob("codes", read_fragment, lambda: lambda r: r, written), part_fragments(tmp_path / "in"), out
    )
    assert "quarantine" in synced
    assert synced.index("quarantine") < synced.index("done")


def test_an_artifact_gets_its_manifest_and_its_name_when_all_else_is_on_the_disk(disk):
    def build(out):
        write_parquet(ROWS, out / part_name(0))
        (out / "weights").mkdir()
        (out / "weights/model.safetensors").write_bytes(b"0" * 10_000)  # as others write
        return Result({"written": 2})

    made = Place(disk.root / "runs/demo").make(RECIPE, build)
    assert disk.at("manifest.json") == ([], True)
    assert disk.at(RECIPE.name) == ([], True)
    assert str(made.path) in disk.names


def test_a_checkpoint_gets_its_name_when_it_is_on_the_disk_and_the_one_before_goes_after(disk):
    state = disk.root / "reward/state"
    workers = OneProcess(state)
    engine = workers.engine(torch.nn.Linear(2, 1), OptimizerOptions(0.1))
    for step in (1, 2, 3):  # two are kept
        workers.save(engine, {"progress": {"step": step}})
    assert disk.at("step-00000001") == ([], True)
    assert disk.at("step-00000002") == ([], True)
    assert disk.at("step-00000003") == ([], True)
    assert [lost for what, lost, _ in disk.events if what == f"rm {state / 'step-00000001'}"][-1] == []


def test_a_training_has_ended_when_its_weights_are_on_the_disk(disk):
    def loop(out, workers):
        (out / "weights").write_bytes(b"0" * 10_000)
        return {"steps": 1}

    make_folder(disk.root / "reward")
    LocalRunner().train([TrainJob("reward", loop, {}, disk.root / "reward")])
    assert disk.at("metrics.json") == ([], True)
    assert disk.lost() == []


def test_what_need_not_outlive_a_power_cut_is_not_synced(disk):
    write_json([1], disk.root / "a.json", durable=False)
    assert disk.at("a.json") == ([], False)


def test_a_folder_that_cannot_be_synced_is_left_at_that_a_file_is_not(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(22, "Invalid argument")

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", broken)
    files.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "a")


# What is torn all the same


@pytest.mark.parametrize("size", [0, 200])
def test_an_empty_or_torn_part_is_named(tmp_path, size):
    path = tmp_path / part_name(0)
    write_parquet(ROWS, path)
    path.write_bytes(path.read_bytes()[:size])
    for reads in (read_parquet, files.parquet_footer):
        with pytest.raises(UserError, match=rf"{path}.*again"):
            reads(path)
    with pytest.raises(UserError, match=rf"corrupt artifact: {path}: .*; put it back from a copy, or run again"):
        part_fragments(tmp_path)


@pytest.mark.parametrize("content", ["", '{"a"'])
def test_a_torn_json_file_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(
        UserError, match=rf"cannot read {tmp_path}/a.json: .*; delete it and run the same command again"
    ):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["", '{"stage": "sal'])
def test_a_torn_manifest_of_an_unfinished_artifact_is_written_again(tmp_path, content):
    partial = tmp_path / f".partial-{RECIPE.name}"
    write_text(content, partial / "manifest.json")
    made = Place(tmp_path).make(RECIPE, lambda out: Result({"written": 2}))
    assert open_artifact(made.path).manifest["rows"] == {"written": 2}


@pytest.mark.parametrize("content", ["", '{"steps"'])
def test_a_training_whose_metrics_are_torn_is_gone_on_with(tmp_path, content):
    calls = []

    def loop(out, workers):
        calls.append(1)
        return {"steps": 1}

    write_text(content, tmp_path / "reward/state/metrics.json")
    LocalRunner().train([TrainJob("reward", loop, {}, tmp_path / "reward")])
    assert calls == [1]
    assert json.loads((tmp_path / "reward/state/metrics.json").read_text())["steps"] == 1


@pytest.mark.parametrize("name", ["torch.pt", "loop.pt", "rng-0.pt", "group.json"])
@pytest.mark.parametrize("size", [0, 20])
def test_a_torn_checkpoint_is_named(tmp_path, name, size):
    workers = OneProcess(tmp_path / "state")
    engine = workers.engine(torch.nn.Linear(2, 1), OptimizerOptions(0.1))
    workers.save(engine, {"progress": {"step": 1}})
    path = tmp_path / "state/step-00000001"
    (path / name).write_bytes((path / name).read_bytes()[:size])
    torn, changed = f"the checkpoint {path} is torn", rf"{path}/{name} is not the file that was saved \(1 of 4 files"
    with pytest.raises(UserError, match=f"{torn}|{changed}"):
        workers.load(engine)


def test_a_torn_journal_is_of_no_row(tmp_path):
    write_parquet(ROWS, tmp_path / "in" / part_name(0))
    write_text("[", tmp_path / "out/journal/map/00000000-0-2.json")
    written = pa.schema([("pair_id", pa.string()), ("value", pa.int64())])
    job = MapJob("codes", read_fragment, lambda: lambda rows: rows, written)
    assert LocalRunner().map(job, part_fragments(tmp_path / "in"), tmp_path / "out").written == 2
