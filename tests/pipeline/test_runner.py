"""Mapping over fragments: commit, resume, quarantine; and training that is not done twice."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pyarrow as pa
import pytest

from safer_ray import schema
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline import alone
from safer_ray.pipeline.runner import ENDED, LOST_TRIES, LocalRunner, pending
from safer_ray.reward.tokens import TokenisePairs, token_count
from safer_ray.storage import files
from safer_ray.storage.accounts import count
from safer_ray.storage.artifacts import part_files, part_fragments, part_name, read_fragment, read_parts
from safer_ray.storage.files import write_json, write_parquet
from safer_ray.storage.quarantine import quarantine_rows
from safer_ray.storage.work import MapJob, TrainJob

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


class Forgets:
    """A batch function that takes back what was committed before."""

    def __init__(self, out):
        self.out = out

    def __call__(self, rows):
        for path in sorted((self.out / "done").glob("*.json"))[:1]:
            path.unlink()
        return double(rows)


def test_a_stage_whose_fragments_are_not_all_done_is_an_error_that_names_the_first(fragments, tmp_path):
    out = tmp_path / "out"
    message = (
        r"^codes: 2 of 3 fragments are not done, first number 0 \(.*part-00000000.parquet, rows 0 to 9\); "
        "run the same command again: finished work is kept$"
    )
    with pytest.raises(SaferError, match=message):
        LocalRunner().map(job(Forgets(out), batch_rows=10), fragments, out)
    assert LocalRunner().map(job(), fragments, out).read == 30


@pytest.mark.parametrize("name", ["done/00000007.json", part_name(7)])
def test_what_belongs_to_no_planned_fragment_is_an_error_that_names_it(fragments, tmp_path, name):
    out = tmp_path / "out"
    LocalRunner().map(job(), fragments, out)
    (out / name).write_bytes((out / name.replace("7", "0")).read_bytes())
    with pytest.raises(SaferError, match=rf"^codes: {out / name} is of no planned fragment .*3 fragments planned"):
        LocalRunner().map(job(), fragments, out)


def test_a_part_that_is_gone_though_its_fragment_is_done_is_named(fragments, tmp_path):
    out = tmp_path / "out"
    LocalRunner().map(job(), fragments, out)
    (out / part_name(1)).unlink()
    with pytest.raises(SaferError, match=rf"^codes: {out / part_name(1)} is missing, though its fragment is done"):
        LocalRunner().map(job(), fragments, out)


@pytest.mark.parametrize("content", ["", '{"read": 10, "writ', "{}", "[]", "null"])
def test_a_fragment_with_a_torn_entry_is_done_again(fragments, tmp_path, content, caplog):
    out, seen = tmp_path / "out", []

    def watch(rows):
        seen.append(rows["value"][0].as_py())
        return double(rows)

    LocalRunner().map(job(), fragments, out)
    (out / "done/00000001.json").write_text(content)
    (out / part_name(1)).write_bytes(b"")
    assert [f.number for f in pending(fragments, out)] == [1]
    counts = LocalRunner().map(job(watch, batch_rows=10), fragments, out)
    assert seen == [10]
    assert counts.read == 30
    assert doubles(out) == [2 * i for i in range(30)]
    assert f"{out / 'done/00000001.json'} is empty or torn; its fragment is done again" in caplog.text


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
    [UserError("the layer is wrong"), OSError(errno.ENOSPC, "No space left on device"), PermissionError("not yours")],
)
def test_trouble_that_no_row_is_to_blame_for_ends_the_stage_at_once(fragments, tmp_path, error):
    calls = []

    def fails(rows):
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        LocalRunner().map(job(fails), fragments, tmp_path / "out")
    assert calls == [1]
    assert not [path for path in (tmp_path / "out" / "journal").rglob("*") if path.is_file()]
    assert count(tmp_path / "out").read == 0


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_rows_that_do_not_fit_the_memory_together_are_halved_and_one_that_never_does_is_quarantined(
    fragments, tmp_path, error
):
    def large(rows):
        if len(rows) > 2 or 13 in rows["value"].to_pylist():
            raise error
        return double(rows)

    out = tmp_path / "out"
    counts = LocalRunner().map(job(large, batch_rows=8), fragments, out)
    assert doubles(out) == [2 * i for i in range(30) if i != 13]
    assert counts.quarantined == 1
    (row,) = quarantine_rows(out).to_pylist()
    assert row["pair_id"] == "p13"
    assert str(error) in row["reason"]


def test_a_disk_that_fills_at_commit_leaves_the_fragment_undone(fragments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == part_name(1):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(SaferError, match=r"No space left.*finished work is kept"):
        LocalRunner().map(job(), fragments, out)
    assert doubles(out) == [2 * i for i in range(10)]
    assert [f.number for f in pending(fragments, out)] == [1, 2]
    assert not [p for p in out.rglob(".*") if p.is_file()]


KILLER = """
import ctypes, os, signal, sys
from pathlib import Path
import pyarrow as pa
from safer_ray.pipeline import alone
from safer_ray.storage.artifacts import part_fragments, read_fragment
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.work import MapJob

ends = {
    "exit": lambda: os._exit(9),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
alone.PAUSES = (0.0,) * 5

def dies(rows):
    if 17 in rows["value"].to_pylist():
        ends[sys.argv[3]]()
    return pa.table({"pair_id": rows["pair_id"], "double": rows["value"]})

written = pa.schema([("pair_id", pa.string()), ("double", pa.int64())])
job = MapJob("codes", read_fragment, lambda: dies, written, batch_rows=4)
LocalRunner().map(job, part_fragments(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("kind", "code", "how"),
    [
        ("exit", 9, "exit code 9"),
        ("abort", -6, "SIGABRT"),
        ("segfault", -11, "SIGSEGV"),
        ("kill", -9, "SIGKILL, each of 5 times that it was tried alone"),
    ],
)
def test_a_row_that_kills_the_process_is_quarantined_after_restarts(fragments, tmp_path, kind, code, how):
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path / "in"), str(tmp_path / "out"), kind]
    codes = []
    while len(codes) < 10 and (not codes or codes[-1]):
        codes.append(subprocess.run(command, check=False).returncode)
    assert codes == [code] * 6 + [0]  # two deaths each for four rows, two rows and one row
    assert doubles(tmp_path / "out") == [i for i in range(30) if i != 17]
    (row,) = quarantine_rows(tmp_path / "out").to_pylist()
    assert row["row_key"] == "in.jsonl#17"
    assert row["reason"] == f"failed twice: the process ended while it worked on these rows: {how}"


STRANGER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from safer_ray.storage.artifacts import part_fragments, read_fragment
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.work import MapJob

def slow(rows):
    if 3 in rows["value"].to_pylist():
        print("at it", flush=True)
        time.sleep(float(sys.argv[3]))
    return pa.table({"pair_id": rows["pair_id"], "double": rows["value"]})

written = pa.schema([("pair_id", pa.string()), ("double", pa.int64())])
job = MapJob("codes", read_fragment, lambda: slow, written, batch_rows=1)
LocalRunner().map(job, part_fragments(Path(sys.argv[1]))[:1], Path(sys.argv[2]))
"""


def strangers_run(tmp_path, number, seconds=60):
    """A run that is sent a signal while it works on row 3 alone."""
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "in"), str(tmp_path / "out"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "at it\n"
        if number:
            process.send_signal(number)
        process.stdout.read()
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_row_whose_processes_are_killed_from_outside_is_not_quarantined(fragments, tmp_path, number):
    for _ in range(3):
        assert strangers_run(tmp_path, number) == -number
    assert strangers_run(tmp_path, 0, seconds=0) == 0
    assert doubles(tmp_path / "out") == list(range(10))
    assert len(quarantine_rows(tmp_path / "out")) == 0


def test_ctrl_c_is_held_against_no_row(fragments, tmp_path):
    def interrupted(rows):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        LocalRunner().map(job(interrupted, batch_rows=1), fragments, out)
    assert not list((out / "journal").rglob("*.json"))


def lost_at_row_3(out, times):
    """The journal of a row that so many processes were lost at."""
    write_json([f"{ENDED} (process 1 on elsewhere)"] * times, out / "journal/map/00000000-3-1.json")


@pytest.mark.parametrize("entry", [ENDED, f"{ENDED} (process 1 on elsewhere)"])
def test_a_row_that_processes_were_lost_at_is_scored_if_it_does_no_harm(fragments, tmp_path, entry):
    out = tmp_path / "out"
    write_json([entry] * 7, out / "journal/map/00000000-3-1.json")
    counts = LocalRunner().map(job(batch_rows=1), fragments, out)
    assert (counts.written, counts.quarantined) == (30, 0)
    assert done_entries(out)[0]["restarts"] == 1


def test_a_row_that_fails_once_and_loses_a_process_once_is_tried_again(fragments, tmp_path):
    out = tmp_path / "out"
    write_json(["ValueError: once", ENDED], out / "journal/map/00000000-3-1.json")
    assert LocalRunner().map(job(batch_rows=1), fragments, out).quarantined == 0


def test_processes_lost_again_and_again_at_a_harmless_row_end_the_run_and_not_the_row(fragments, tmp_path):
    out = tmp_path / "out"
    lost_at_row_3(out, LOST_TRIES)
    with pytest.raises(
        SaferError, match=r"^8 processes were lost while they worked on row in.jsonl#3, which does no harm"
    ):
        LocalRunner().map(job(batch_rows=1), fragments, out)
    assert LocalRunner().map(job(batch_rows=1), fragments, out).quarantined == 0


def test_where_rows_cannot_be_watched_more_losses_are_needed(fragments, tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "is_possible", lambda: False)  # as on a GPU
    for times, quarantined in ((LOST_TRIES - 1, 0), (LOST_TRIES, 1)):
        out = tmp_path / f"out-{times}"
        lost_at_row_3(out, times)
        assert LocalRunner().map(job(batch_rows=1), fragments, out).quarantined == quarantined
    (row,) = quarantine_rows(out).to_pylist()
    assert row["reason"] == f"failed twice: {ENDED}, 8 times"


def test_a_changed_input_is_refused_on_resume(fragments, tmp_path):
    LocalRunner().map(job(), fragments[:1], tmp_path / "out")
    write_parquet(pa.table({"pair_id": ["x"]}), tmp_path / "in" / part_name(0))
    with pytest.raises(UserError, match=r"part-00000000.parquet changed since the unfinished run"):
        LocalRunner().map(job(), part_fragments(tmp_path / "in"), tmp_path / "out")


def done_entries(out):
    return [json.loads(path.read_text()) for path in sorted((out / "done").glob("*.json"))]


def test_progress_is_told_by_stage_and_counts_what_was_done_before(fragments, tmp_path):
    seen = []
    runner = LocalRunner(lambda *given: seen.append(given))
    runner.map(job(), fragments, tmp_path / "out")
    assert seen == [("codes", 0, 3, 0), ("codes", 1, 3, 10), ("codes", 2, 3, 10), ("codes", 3, 3, 10)]
    (tmp_path / "out/done/00000001.json").unlink()
    seen.clear()
    runner.map(job(), fragments, tmp_path / "out")
    assert seen == [("codes", 2, 3, 0), ("codes", 3, 3, 10)]
    runner.map(job(), fragments, tmp_path / "out")
    assert len(seen) == 2


def test_a_batch_function_is_built_once_and_not_at_all_where_nothing_is_to_do(fragments, tmp_path):
    built = []

    def counting(name, function):
        return lambda: built.append(name) or function

    both = MapJob("codes", read_fragment, counting("map", double), WRITTEN, prepare=counting("read", lambda rows: rows))
    LocalRunner().map(both, fragments, tmp_path / "out")
    assert sorted(built) == ["map", "read"]
    LocalRunner().map(both, fragments, tmp_path / "out")
    assert len(built) == 2


def test_an_entry_tells_the_fragments_rows_tokens_and_seconds(pairs_dir, pairs, reward_dir, tmp_path):
    tokenised = MapJob(
        "codes",
        read_fragment,
        lambda: lambda rows: rows.select(["pair_id"]),
        pa.schema([("pair_id", pa.string())]),
        prepare=lambda: TokenisePairs(reward_dir),
        batch_rows=7,
    )
    LocalRunner().map(tokenised, part_fragments(pairs_dir), tmp_path / "out")
    entries = done_entries(tmp_path / "out")
    assert [entry["read"] for entry in entries] == [20, 20, 8]
    wanted = TokenisePairs(reward_dir)(pairs)
    assert [entry["tokens"] for entry in entries] == [token_count(wanted.slice(i, 20)) for i in (0, 20, 40)]
    assert all(0 < entry["seconds"] < 60 for entry in entries)
    assert read_parts(tmp_path / "out")["pair_id"].equals(pairs["pair_id"])


def test_rows_without_tokens_count_none(fragments, tmp_path):
    LocalRunner().map(job(), fragments, tmp_path / "out")
    assert [entry["tokens"] for entry in done_entries(tmp_path / "out")] == [0, 0, 0]


# Making rows ready


def prepared(prepare, function=double, **options):
    return job(function, prepare=lambda: prepare, **options)


def test_rows_are_made_ready_before_the_function_sees_them(fragments, tmp_path):
    def triple(rows):
        return rows.set_column(2, "value", pa.array([3 * value for value in rows["value"].to_pylist()]))

    counts = LocalRunner().map(prepared(triple), fragments, tmp_path / "out")
    assert doubles(tmp_path / "out") == [6 * i for i in range(30)]
    assert (counts.read, counts.written) == (30, 30)


def test_rows_that_cannot_be_made_ready_are_quarantined_and_the_function_gets_the_others(fragments, tmp_path):
    sizes = []

    def refuses(rows):
        odd = [value % 5 == 0 for value in rows["value"].to_pylist()]
        return rows.append_column("refused", pa.array(["fifth: it is" if o else None for o in odd]))

    def watch(rows):
        assert rows.column_names == ["pair_id", "row_key", "value"]
        sizes.append(len(rows))
        return double(rows)

    out = tmp_path / "out"
    counts = LocalRunner().map(prepared(refuses, watch), fragments, out)
    assert doubles(out) == [2 * i for i in range(30) if i % 5]
    assert (counts.read, counts.written, counts.quarantined, counts.reasons) == (30, 24, 6, {"fifth": 6})
    assert quarantine_rows(out)["row_key"].to_pylist() == [f"in.jsonl#{i}" for i in range(0, 30, 5)]
    assert sizes == [3, 3, 2] * 3


def test_a_row_that_cannot_be_made_ready_is_found_by_halving(fragments, tmp_path):
    sizes, seen = [], []

    def chokes(rows):
        sizes.append(len(rows))
        if 13 in rows["value"].to_pylist():
            raise ValueError("thirteen")
        return rows

    def watch(rows):
        seen.append(rows["value"].to_pylist())
        return double(rows)

    out = tmp_path / "out"
    counts = LocalRunner().map(prepared(chokes, watch, batch_rows=8), fragments, out)
    assert sizes == [8, 2, 8, 8, 4, 4, 2, 2, 2, 1, 1, 1, 4, 2, 8, 2]
    assert seen[2:7] == [[10, 11], [12], [14, 15, 16, 17], [18, 19], [*range(20, 28)]]
    assert doubles(out) == [2 * i for i in range(30) if i != 13]
    assert (counts.read, counts.written, counts.reasons) == (30, 29, {"failed twice": 1})
    (row,) = quarantine_rows(out).to_pylist()
    assert (row["pair_id"], row["stage"]) == ("p13", "codes")
    assert row["reason"] == "failed twice: ValueError: thirteen"


def test_either_step_quarantines_its_own_rows(fragments, tmp_path):
    def chokes_on(bad):
        def chokes(rows):
            if bad in rows["value"].to_pylist():
                raise ValueError(f"no {bad}")
            return double(rows) if bad == 7 else rows

        return chokes

    out = tmp_path / "out"
    counts = LocalRunner().map(prepared(chokes_on(6), chokes_on(7)), fragments, out)
    assert doubles(out) == [2 * i for i in range(30) if i not in (6, 7)]
    assert quarantine_rows(out)["reason"].to_pylist() == [
        "failed twice: ValueError: no 6",
        "failed twice: ValueError: no 7",
    ]
    assert counts.quarantined == 2


def test_a_fragment_of_which_no_row_can_be_made_ready_leaves_an_empty_part(fragments, tmp_path):
    def chokes(rows):
        if rows["value"][0].as_py() < 10:
            raise ValueError("no")
        return rows

    out = tmp_path / "out"
    LocalRunner().map(prepared(chokes), fragments, out)
    assert doubles(out) == [2 * i for i in range(10, 30)]
    assert [entry["written"] for entry in done_entries(out)] == [0, 10, 10]
    assert len(quarantine_rows(out)) == 10


def test_each_step_writes_its_attempts_in_a_journal_of_its_own(fragments, tmp_path):
    out, seen = tmp_path / "out", []

    def watch(step):
        def function(rows):
            (entry,) = [path for path in (out / "journal").rglob("*.json") if path.parent.name == step]
            seen.append((step, entry.name, json.loads(entry.read_text())))
            return double(rows) if step == "map" else rows

        return function

    LocalRunner().map(prepared(watch("read"), watch("map"), batch_rows=8), fragments[1:2], out)
    died = [f"the process ended while it worked on these rows (process {os.getpid()} on {socket.gethostname()})"]
    assert seen == [
        ("read", "00000001-0-8.json", died),
        ("read", "00000001-8-2.json", died),
        ("map", "00000001-0-8.json", died),
        ("map", "00000001-8-2.json", died),
    ]
    assert not list((out / "journal").rglob("*.json"))


@pytest.mark.parametrize("step", ["read", "map"])
def test_rows_on_which_two_processes_ended_are_halved_in_that_step(fragments, tmp_path, step):
    sizes = {"read": [], "map": []}

    def watch(name):
        def function(rows):
            sizes[name].append(len(rows))
            return double(rows) if name == "map" else rows

        return function

    journal = tmp_path / "out/journal" / step / "00000000-4-4.json"
    journal.parent.mkdir(parents=True)
    journal.write_text(json.dumps(["the process ended", "the process ended"]))
    LocalRunner().map(prepared(watch("read"), watch("map")), fragments[:1], tmp_path / "out")
    assert sizes[step] == [4, 2, 2, 2]
    assert doubles(tmp_path / "out") == [2 * i for i in range(10)]


def test_trouble_while_rows_are_made_ready_that_none_is_to_blame_for_ends_the_stage(fragments, tmp_path):
    def fails(rows):
        raise UserError("no tokenizer there")

    with pytest.raises(UserError, match="no tokenizer there"):
        LocalRunner().map(prepared(fails), fragments, tmp_path / "out")
    assert count(tmp_path / "out").read == 0
    assert not list((tmp_path / "out/journal").rglob("*.json"))


# Training


def counting_loop(calls):
    """A loop of three steps that counts its calls."""

    def loop(out, workers, name):
        calls.append(name)
        for step in range(3):
            workers.on_step(step + 1, 3)
        (out / "weights").write_text(name)
        return {"steps": 3, "name": name, "workers": workers.size}

    return loop


def train_jobs(tmp_path, calls, names):
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
    return [TrainJob("reward", counting_loop(calls), {"name": name}, tmp_path / name) for name in names]


def test_trainings_run_one_after_another_in_this_process_and_are_timed(tmp_path):
    calls, seen = [], []
    runner = LocalRunner(lambda *given: seen.append(given))
    found = runner.train(train_jobs(tmp_path, calls, ["a", "b"]))
    assert [(metrics["name"], metrics["workers"]) for metrics in found] == [("a", 1), ("b", 1)]
    assert all(metrics["train_seconds"] >= 0 for metrics in found)
    assert seen == [("reward", step, 3, 0) for step in (1, 2, 3)] * 2
    assert (tmp_path / "b/weights").read_text() == "b"


def test_a_training_that_ended_is_not_done_again_though_its_artifact_was_not_closed(tmp_path):
    calls = []
    jobs = train_jobs(tmp_path, calls, ["a", "b"])
    first = LocalRunner().train(jobs[:1])
    assert json.loads((tmp_path / "a/state/metrics.json").read_text()) == first[0]
    again = LocalRunner().train(jobs)
    assert again[0] == first[0]
    assert calls == ["a", "b"]


def test_a_training_that_fails_keeps_those_before_it(tmp_path):
    calls = []

    def fails(out, workers):
        raise SaferError("the loss is nan")

    jobs = train_jobs(tmp_path, calls, ["a", "b"])
    broken = [jobs[0], TrainJob("reward", fails, {}, tmp_path / "b")]
    with pytest.raises(SaferError, match="the loss is nan"):
        LocalRunner().train(broken)
    assert not (tmp_path / "b/state/metrics.json").exists()
    LocalRunner().train(jobs)
    assert calls == ["a", "b"]
