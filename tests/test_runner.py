"""Mapping over fragments: commit, resume, quarantine."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pyarrow as pa
import pytest

from safer_ray import schema
from safer_ray.artifacts import part_files, part_fragments, part_name, read_fragment, read_parts, write_parquet
from safer_ray.errors import SaferError, UserError
from safer_ray.runner import LocalRunner, MapJob, count, pending, quarantine_rows

WRITTEN = pa.schema([("pair_id", pa.string()), ("double", pa.int64())])


@pytest.fixture
def fragments(tmp_path):
    """Three parts of ten rows."""
    for number in range(3):
        ids = range(10 * number, 10 * number + 10)
        columns = {"pair_id": [f"p{i}" for i in ids], "row_key": [f"in.jsonl#{i}" for i in ids], "value": list(ids)}
        write_parquet(pa.table(columns), tmp_path / "in" / part_name(number))
    return part_fragments(tmp_path / "in")


def double(rows):
    return pa.table({"pair_id": rows["pair_id"], "double": [2 * v for v in rows["value"].to_pylist()]})


def job(function=double, **options):
    return MapJob("codes", read_fragment, lambda: function, WRITTEN, batch_rows=options.pop("batch_rows", 4), **options)


def doubles(out):
    return read_parts(out)["double"].to_pylist()


def test_every_fragment_becomes_a_part_of_its_number(fragments, tmp_path):
    counts = LocalRunner().map(job(metadata={"mark": "x"}), fragments, tmp_path / "out")
    assert doubles(tmp_path / "out") == [2 * i for i in range(30)]
    assert [p.name for p in part_files(tmp_path / "out")] == [part_name(i) for i in range(3)]
    assert (counts.read, counts.written, counts.quarantined, counts.reasons) == (30, 30, 0, {})
    assert read_parts(tmp_path / "out").schema.metadata == {b"mark": b"x"}


def test_rows_come_in_batches_of_at_most_the_size_asked_for(fragments, tmp_path):
    sizes = []

    def watch(rows):
        sizes.append(len(rows))
        return double(rows)

    LocalRunner().map(job(watch), fragments[:1], tmp_path / "out")
    assert sizes == [4, 4, 2]


def test_nothing_to_map_is_an_error(tmp_path):
    with pytest.raises(UserError, match="stage codes: no input rows; check the sources"):
        LocalRunner().map(job(), [], tmp_path)


def test_resume_does_only_the_missing_fragments_and_nothing_comes_twice(fragments, tmp_path):
    seen = []

    def dies(rows):
        seen.append(rows["value"][0].as_py())
        if 14 in rows["value"].to_pylist() and len(seen) < 6:
            raise KeyboardInterrupt
        return double(rows)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        LocalRunner().map(job(dies), fragments, out)
    assert [f.number for f in pending(fragments, out)] == [1, 2]
    assert len(part_files(out)) == 1
    seen[:] = [0] * 9
    LocalRunner().map(job(dies), fragments, out)
    assert seen[9:] == [10, 14, 18, 20, 24, 28]
    assert doubles(out) == [2 * i for i in range(30)]
    LocalRunner().map(job(dies), fragments, out)
    assert len(seen) == 15


def test_a_retry_overwrites_the_part_it_left(fragments, tmp_path):
    out = tmp_path / "out"
    LocalRunner().map(job(), fragments, out)
    (out / "done" / "00000001.json").unlink()  # killed between the part and its entry
    counts = LocalRunner().map(job(), fragments, out)
    assert doubles(out) == [2 * i for i in range(30)]
    assert counts.written == 30


def test_a_single_bad_row_is_found_by_halving_and_quarantined(fragments, tmp_path):
    sizes = []

    def chokes(rows):
        sizes.append(len(rows))
        if 13 in rows["value"].to_pylist():
            raise ValueError("thirteen")
        return double(rows)

    out = tmp_path / "out"
    counts = LocalRunner().map(job(chokes, batch_rows=8), fragments, out)
    assert doubles(out) == [2 * i for i in range(30) if i != 13]
    assert (counts.read, counts.written, counts.quarantined) == (30, 29, 1)
    (row,) = quarantine_rows(out).to_pylist()
    assert (row["row_key"], row["pair_id"], row["stage"]) == ("in.jsonl#13", "p13", "codes")
    assert (row["source"], row["position"]) == ("in.jsonl", 13)
    assert row["reason"] == "failed twice: ValueError: thirteen"
    assert sizes == [8, 2, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1, 4, 2, 8, 2]
    assert counts.reasons == {"failed twice": 1}


def test_a_failure_that_passes_is_tried_again_whole(fragments, tmp_path):
    sizes = []

    def hiccups(rows):
        sizes.append(len(rows))
        if len(sizes) == 1:
            raise RuntimeError("once")
        return double(rows)

    counts = LocalRunner().map(job(hiccups, batch_rows=10), fragments, tmp_path / "out")
    assert sizes == [10, 10, 10, 10]
    assert counts.quarantined == 0


def test_a_whole_bad_fragment_leaves_an_empty_part(fragments, tmp_path):
    def chokes(rows):
        if rows["value"][0].as_py() < 10:
            raise ValueError("no")
        return double(rows)

    out = tmp_path / "out"
    LocalRunner().map(job(chokes), fragments, out)
    assert len(read_parts(out)) == 20
    assert read_parts(out).schema.equals(WRITTEN)
    assert len(quarantine_rows(out)) == 10


def test_refused_rows_go_to_the_quarantine_with_their_reason(fragments, tmp_path):
    def refuses(rows):
        odd = [v % 2 == 1 for v in rows["value"].to_pylist()]
        made = double(rows).append_column("row_key", rows["row_key"])
        return made.append_column("refused", pa.array(["odd: it is" if o else None for o in odd]))

    out = tmp_path / "out"
    counts = LocalRunner().map(job(refuses), fragments, out)
    assert doubles(out) == [4 * i for i in range(15)]
    assert counts.reasons == {"odd": 15}
    quarantine = quarantine_rows(out)
    assert quarantine.schema.equals(schema.QUARANTINE)
    assert quarantine["row_key"].to_pylist() == [f"in.jsonl#{i}" for i in range(1, 30, 2)]
    assert json.loads(quarantine["raw"][0].as_py())["double"] == 2


@pytest.mark.parametrize(
    "error",
    [UserError("the layer is wrong"), OSError(errno.ENOSPC, "No space left on device"), MemoryError("no more")],
)
def test_trouble_that_no_row_is_to_blame_for_ends_the_stage_at_once(fragments, tmp_path, error):
    calls = []

    def fails(rows):
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        LocalRunner().map(job(fails), fragments, tmp_path / "out")
    assert calls == [1]
    assert list((tmp_path / "out" / "journal").iterdir()) == []
    assert count(tmp_path / "out").read == 0


def test_a_disk_that_fills_at_commit_leaves_the_fragment_undone(fragments, tmp_path, monkeypatch):
    from safer_ray import artifacts

    out = tmp_path / "out"
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == part_name(1):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(artifacts.os, "replace", full)
    with pytest.raises(SaferError, match=r"No space left.*finished work is kept"):
        LocalRunner().map(job(), fragments, out)
    assert doubles(out) == [2 * i for i in range(10)]
    assert [f.number for f in pending(fragments, out)] == [1, 2]
    assert not [p for p in out.rglob(".*") if p.is_file()]


KILLER = """
import os, sys
from pathlib import Path
import pyarrow as pa
from safer_ray.artifacts import part_fragments, read_fragment
from safer_ray.runner import LocalRunner, MapJob

def dies(rows):
    if 17 in rows["value"].to_pylist():
        os._exit(9)
    return pa.table({"pair_id": rows["pair_id"], "double": rows["value"]})

written = pa.schema([("pair_id", pa.string()), ("double", pa.int64())])
job = MapJob("codes", read_fragment, lambda: dies, written, batch_rows=4)
LocalRunner().map(job, part_fragments(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_row_that_kills_the_process_is_quarantined_after_restarts(fragments, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path / "in"), str(tmp_path / "out")]
    codes = []
    while len(codes) < 10 and (not codes or codes[-1]):
        codes.append(subprocess.run(command, check=False).returncode)
    assert codes == [9] * 6 + [0]  # two deaths each for four rows, two rows and one row
    assert doubles(tmp_path / "out") == [i for i in range(30) if i != 17]
    (row,) = quarantine_rows(tmp_path / "out").to_pylist()
    assert row["row_key"] == "in.jsonl#17"
    assert row["reason"] == "failed twice: the process ended while it worked on these rows"


def test_a_changed_input_is_refused_on_resume(fragments, tmp_path):
    LocalRunner().map(job(), fragments[:1], tmp_path / "out")
    write_parquet(pa.table({"pair_id": ["x"]}), tmp_path / "in" / part_name(0))
    with pytest.raises(UserError, match=r"part-00000000.parquet changed since the unfinished run"):
        LocalRunner().map(job(), part_fragments(tmp_path / "in"), tmp_path / "out")


def test_training_runs_in_this_process_and_is_timed():
    metrics = LocalRunner().train(lambda steps: {"steps": steps}, {"steps": 3})
    assert metrics["steps"] == 3
    assert metrics["train_seconds"] >= 0
