"""Parquet and Arrow files: a range of rows goes on where the last one ended, in a row group, too."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safer_ray.errors import UserError
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


# Every type


FAR = 10**18  # microseconds, in the year 33658
WHEN = pa.timestamp("us")


def _nested():
    """Columns in whose values lie others, each with a null behind two values."""
    one_name = [pa.array([1, 2, None]), pa.array(["x", "y", None])]
    number_or_text = [pa.array([1, 2, 3]), pa.array(["a", "b", None])]
    when_or_text = [pa.array([FAR], WHEN), pa.array(["a", None])]
    side, place = pa.array([0, 1, 1], pa.int8()), pa.array([0, 0, 1], pa.int32())
    holder = pa.struct({"t": WHEN, "b": pa.binary()})
    pair = pa.list_(pa.int8(), 2)
    extended = pa.ExtensionArray.from_storage
    return {
        "map": pa.array([[("a", FAR)], [], None], pa.map_(pa.string(), WHEN)),
        "map of structs": pa.array([[("a", {"b": None})], [], None], pa.map_(pa.string(), pa.struct({"b": pa.int8()}))),
        "dictionary": pa.array(["a", "b", None]).dictionary_encode(),
        "dates in a dictionary": pa.array([0, FAR, None], WHEN).dictionary_encode(),
        "structs": pa.array([[{"t": FAR, "b": b"\xff"}, None], [], None], pa.list_(holder)),
        "fields of one name": pa.StructArray.from_arrays(one_name, ["a", "a"], mask=pa.array([False, False, True])),
        "run ends": pa.RunEndEncodedArray.from_arrays([2, 3], pa.array([FAR, None], WHEN)),
        "dense union": pa.UnionArray.from_dense(side, place, when_or_text),
        "sparse union": pa.UnionArray.from_sparse(side, number_or_text),
        "uuid": pa.array([b"0" * 16, b"1" * 16, None], pa.uuid()),
        "json": pa.array(["{}", "[1]", None], pa.json_()),
        "bool8": extended(pa.bool8(), pa.array([1, 0, None], pa.int8())),
        "opaque": extended(pa.opaque(pa.binary(), "point", "postgis"), pa.array([b"\xff", b"a", None])),
        "tensor": extended(pa.fixed_shape_tensor(pa.int8(), (2, 1)), pa.array([[1, 2], [3, 4], None], pair)),
    }


def _columns():
    """A column of every Arrow type, each with a null behind two values."""
    made = _nested() | {
        "null": pa.nulls(3),
        "bool": pa.array([True, False, None]),
        "decimal": pa.array([Decimal("1.50"), Decimal("-0.01"), None], pa.decimal128(12, 2)),
        "large decimal": pa.array([Decimal("1" * 60), Decimal(0), None], pa.decimal256(70, 2)),
        "date32": pa.array([0, 2**30, None], pa.int32()).cast(pa.date32()),
        "date64": pa.array([0, 2**60, None], pa.int64()).view(pa.date64()),
        "months": pa.array([(1, 2, 3), (0, 0, -1), None], pa.month_day_nano_interval()),
        "string": pa.array(["a", "é", None]),
        "binary": pa.array([b"text", b"\xff\x00", None]),
        "zone": pa.array([0, FAR, None], pa.timestamp("us", "Europe/Berlin")),
        "unknown zone": pa.array([0, FAR, None], pa.timestamp("us", "No/Where")),
    }
    for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()):
        made[str(kind)] = pa.array([0, 7, None], kind)
    made["uint64"] = pa.array([0, 2**64 - 1, None], pa.uint64())
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        made[str(kind)] = pa.array([np.float16(1.5), np.float16("nan"), None], kind)
    for unit in ("s", "ms", "us", "ns"):
        made[f"timestamp {unit}"] = pa.array([0, FAR + 1, None], pa.timestamp(unit))
        made[f"duration {unit}"] = pa.array([0, FAR + 1, None], pa.duration(unit))
        made[f"time {unit}"] = pa.array([0, 1, None], pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit))
    for kind in (pa.large_string(), pa.string_view()):
        made[str(kind)] = pa.array(["a", "b", None], kind)
    for kind in (pa.large_binary(), pa.binary_view(), pa.binary(1)):
        made[str(kind)] = pa.array([b"a", b"\xff", None], kind)
    for kind in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)):
        made[str(kind(pa.int8()))] = pa.array([[1, None], [2, 3], None], kind(pa.int8()))
    return made


COLUMNS = _columns()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_a_column_of_any_type_rides_along(tmp_path, name, ending):
    table = pa.table({"prompt": ["a", "b", "c"], name: COLUMNS[name], "nested": pa.nulls(3)})
    path = tmp_path / f"rows.{ending}"
    try:
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, TypeError) as error:
        pytest.skip(f"Parquet has no such type: {error}")
    rows = [(json.loads(raw), refused) for _, raw, refused in read_rows(path, 0, 3)]
    assert [refused for _, refused in rows] == [None] * 3
    assert [row["prompt"] for row, _ in rows] == ["a", "b", "c"]
    assert [row[name] is None for row, _ in rows][2]
    assert name == "null" or rows[0][0][name] is not None


VALUES = {
    "timestamp us": ["1970-01-01 00:00:00", "1000000000000000001 (timestamp[us])"],
    "duration s": ["0:00:00", "1000000000000000001 (duration[s])"],
    "time ns": ["00:00:00", "00:00:00.000000001"],
    "unknown zone": ["0 (timestamp[us, tz=No/Where])", "1000000000000000000 (timestamp[us, tz=No/Where])"],
    "binary": ["text", {"base64": "/wA="}],
    "map": [[["a", "1000000000000000000 (timestamp[us])"]], []],
    "structs": [[{"t": "1000000000000000000 (timestamp[us])", "b": {"base64": "/w=="}}, None], []],
    "fields of one name": [[["a", 1], ["a", "x"]], [["a", 2], ["a", "y"]]],
    "uint64": [0, 2**64 - 1],
    "decimal": ["1.50", "-0.01"],
    "tensor": [[1, 2], [3, 4]],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_python_has_not_is_the_number_that_the_file_holds(tmp_path, name):
    table = pa.table({name: COLUMNS[name]})
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [json.loads(raw)[name] for _, raw, _ in read_rows(tmp_path / "rows.arrow", 0, 3)] == [*VALUES[name], None]


def test_a_column_that_is_carried_as_text_is_told_once(tmp_path, caplog):
    when = pa.array([FAR] * 3000, pa.timestamp("us"))
    pq.write_table(pa.table({"when": when, "n": range(3000)}), tmp_path / "rows.parquet", row_group_size=500)
    for start in range(0, 3000, 500):
        assert len(list(read_rows(tmp_path / "rows.parquet", start, start + 500))) == 500
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("rows.parquet: column when holds values of timestamp[us] that are carried as text")


def test_two_columns_of_one_name_are_refused_by_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", "chosen", "chosen"])
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,chosen,chosen\na,b,c\n")
    for name in ("rows.parquet", "rows.csv"):
        with pytest.raises(UserError, match=rf"{name}: 3 columns, and more than one is called 'chosen'; rename them"):
            list(read_rows(tmp_path / name, 0, 1))
