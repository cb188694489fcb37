"""Files that are read from their beginning alone: a range of rows goes on where the last one ended."""

import gzip
import json
import os

import pytest
import zstandard

from safer_ray.storage import reader_cache, rows
from safer_ray.storage.rows import read_rows

ROWS = [f'{{"n": {n}, "text": "a, b"}}' for n in range(200)]
LINES = "".join(f"{row}\n" * (n != 50) + "\n" * (n == 50) for n, row in enumerate(ROWS)).encode()
ARRAY = f"[{', '.join(ROWS)}]".encode()
CELLS = ("n,text\n" + "".join(f'{n},"two\nlines"\n' for n in range(200))).encode()
KINDS = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.json": ARRAY,
    "a.json.gz": gzip.compress(ARRAY),
    "lines.json": LINES,
    "a.csv": CELLS,
    "a.csv.gz": gzip.compress(CELLS),
}


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    (tmp_path / request.param).write_bytes(KINDS[request.param])
    return tmp_path / request.param


@pytest.fixture
def opened(monkeypatch):
    calls = []
    before = rows._open
    monkeypatch.setattr(rows, "_open", lambda path, *more: calls.append(path) or before(path, *more))
    return calls


@pytest.mark.parametrize("starts", [range(0, 200, 20), range(180, -1, -20), (60, 0, 100, 20, 20, 180, 40)])
def test_ranges_in_any_order_give_the_rows_that_they_hold(path, starts):
    whole = list(read_rows(path, 0, 1000))
    for start in starts:
        assert list(read_rows(path, start, start + 20)) == [row for row in whole if start <= row[0] < start + 20]


def test_ranges_in_order_open_a_file_once(path, opened):
    for start in range(0, 200, 20):
        list(read_rows(path, start, start + 20))
    assert len(opened) == 1


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    list(read_rows(path, 0, 20))
    path.write_bytes(gzip.compress(LINES.replace(b"a, b", b"c")))
    os.utime(path, ns=(1, 1))
    assert json.loads(next(iter(read_rows(path, 20, 21)))[1]) == {"n": 20, "text": "c"}


def test_a_range_that_nobody_reads_to_its_end_is_not_gone_on_with(path):
    begun = read_rows(path, 0, 20)
    next(begun)
    begun.close()
    assert [position for position, *_ in read_rows(path, 0, 20)] == list(range(20))


def test_few_readers_are_kept(tmp_path):
    for n in range(10):
        path = tmp_path / f"{n}.jsonl.gz"
        path.write_bytes(gzip.compress(LINES))
        list(read_rows(path, 0, 20))
    assert len(reader_cache._kept) == reader_cache.KEPT
