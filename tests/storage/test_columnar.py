"""Parquet and Arrow files: a range of rows goes on where the last one ended, in a row group, too."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safer_ray.storage import columnar, reader_cache
from safer_ray.storage.rows import read_rows

ROWS = 2000
TABLE = pa.table({"n": range(ROWS), "text": [f"text {n}" for n in range(ROWS)]})


def parquet(rows):
    return lambda path: pq.write_table(TABLE, path, row_group_size=rows)


def arrow(begin, rows, compression=None):
    def write(path):
        with begin(path, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(TABLE, rows)

    return write


def with_an_empty_group(path):
    with pq.ParquetWriter(path, TABLE.schema) as writer:
        for piece in (TABLE.slice(0, 0), TABLE.slice(0, 700), TABLE.slice(0, 0), TABLE.slice(700)):
            writer.write_table(piece)


KINDS = {
    "one group.parquet": parquet(ROWS),
    "some groups.parquet": parquet(630),
    "many groups.parquet": parquet(7),
    "empty group.parquet": with_an_empty_group,
    "one batch.arrow": arrow(pa.ipc.new_file, ROWS),
    "batches.arrow": arrow(pa.ipc.new_file, 630, "zstd"),
    "stream.arrow": arrow(pa.ipc.new_stream, 130),
}


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    KINDS[request.param](tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def decoded(monkeypatch):
    """Rows that were decoded, a number for each batch."""
    counts = []
    before = pq.ParquetFile.iter_batches

    def iter_batches(*args, **kwargs):
        for batch in before(*args, **kwargs):
            counts.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return counts


@pytest.mark.parametrize(
    "starts", [range(0, ROWS, 80), range(1920, -1, -80), (600, 0, 640, 560, 640, 1840, 400, 1920, 1840)]
)
def test_ranges_in_any_order_give_the_rows_that_they_hold(path, starts):
    for start in starts:
        found = [
            (position, json.loads(raw)["n"], refused) for position, raw, refused in read_rows(path, start, start + 80)
        ]
        assert found == [(n, n, None) for n in range(start, start + 80)]
    assert list(read_rows(path, ROWS, ROWS + 80)) == []


def test_a_row_group_is_decoded_once_for_all_ranges_that_it_is_cut_into(tmp_path, decoded):
    parquet(ROWS)(tmp_path / "a.parquet")
    for start in range(0, ROWS, 90):
        list(read_rows(tmp_path / "a.parquet", start, min(ROWS, start + 90)))
    assert sum(decoded) == ROWS


def test_two_readers_that_take_turns_decode_it_once_each(tmp_path, decoded):
    """As two processes do that each take every other fragment."""
    parquet(ROWS)(tmp_path / "a.parquet")
    for first in (0, 90):
        reader_cache._kept.clear()
        for start in range(first, ROWS - 90, 180):
            list(read_rows(tmp_path / "a.parquet", start, start + 90))
    assert sum(decoded) <= 2 * ROWS


def test_row_groups_that_no_range_asks_for_are_left_out(tmp_path, decoded):
    parquet(200)(tmp_path / "a.parquet")
    for start in (0, 1500, 1600):
        list(read_rows(tmp_path / "a.parquet", start, start + 50))
    assert sum(decoded) == 600


def test_record_batches_are_decoded_once_for_all_ranges(tmp_path, monkeypatch):
    arrow(pa.ipc.new_stream, 500)(tmp_path / "a.arrow")
    opened = []
    before = pa.ipc.open_stream
    monkeypatch.setattr(pa.ipc, "open_stream", lambda source: opened.append(source) or before(source))
    for start in range(0, ROWS, 90):
        list(read_rows(tmp_path / "a.arrow", start, min(ROWS, start + 90)))
    assert len(opened) == 1


def test_of_a_large_row_group_little_is_held(tmp_path):
    random = np.random.default_rng(0)
    columns = {name: [random.bytes(10_000).hex() for _ in range(1500)] for name in "abc"}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=50)
    size = (tmp_path / "a.parquet").stat().st_size
    reader_cache._kept.clear()
    del columns
    before = pa.total_allocated_bytes()
    assert len(list(read_rows(tmp_path / "a.parquet", 0, 50))) == 50
    held = pa.total_allocated_bytes() - before
    assert size > 45 * 10**6
    assert held < 1.2 * columnar.BATCH_BYTES  # a batch, and a page and a buffer of each column
