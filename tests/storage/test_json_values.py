"""JSON arrays, and rows that go over several lines: nothing of a file is lost without a word."""

import gzip
import json

import pytest

from safer_ray.errors import UserError
from safer_ray.storage import json_values
from safer_ray.storage.rows import cut_rows, read_rows

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
LINE = json.dumps(ROW)


def rows(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return [json.loads(raw) for _, raw, refused in read_rows(path, 0, 10**9) if refused is None]


@pytest.fixture(params=[2**20, 7], ids=["large", "small"])
def block(request, monkeypatch):
    monkeypatch.setattr(json_values, "BLOCK", request.param)


DAMAGED = {
    f'[{LINE},\n{{"prompt": "a "quoted" b"}},\n{LINE}]': "row 1 (from 0), line 2, column 16: no JSON",
    f"[{LINE},\n{LINE[:-20]}": "row 1 (from 0), line 2, column",
    f"[{LINE},\n{LINE}": "row 2 (from 0), line 2, column 48: the file ends where a comma",
    f"[{LINE} ,\n ,, {LINE}]": "row 1 (from 0), line 2, column 2: no JSON",
    f"[,{LINE}]": "row 0 (from 0), line 1, column 2: no JSON",
    f"[{LINE}\n{LINE}]": "stands where a comma or the end of the array should be",
    f"[{LINE}]\n garbage": "row 1 (from 0), line 2, column 2: 'garba",
    f"[{LINE}]]": "line 1, column 50: ']' stands behind the rows",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_is_no_json_at_some_place_is_refused_with_the_place(tmp_path, block, text):
    with pytest.raises(UserError) as error:
        rows(tmp_path / "a.json", text)
    assert DAMAGED[text] in str(error.value)
    assert "mend it there, or write a row a line" in str(error.value)
    with pytest.raises(UserError):
        list(cut_rows(tmp_path / "a.json", 10, 2**20, 10**9))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"[{LINE}, {LINE}]", 2),
        (f"\ufeff \n[\r\n{LINE}\r\n,\r\n{LINE},\r\n]\r\n", 2),
        (f"[{LINE}]\n[{LINE},{LINE}]", 3),
        (f"[{LINE}]\n{LINE}\n{LINE}\n", 3),
        ("[]", 0),
        (" [ ] [ ] ", 0),
        (json.dumps([ROW] * 50, indent=2), 50),
        (json.dumps(ROW, indent=1), 1),
        ((json.dumps(ROW, indent=1) + "\n") * 3, 3),
        ('{"prompt": "p", "chosen": "a",\n "rejected": "b"}', 1),
        (f"{LINE}\n{LINE}\n", 2),
    ],
)
def test_every_row_is_read(tmp_path, block, text, count):
    assert rows(tmp_path / "a.json", text) == [ROW] * count


def test_numbers_are_read_to_their_end(tmp_path, block):
    assert rows(tmp_path / "a.json", "[1234567, 89012345678, 1.5e10]") == [1234567, 89012345678, 1.5e10]


def test_a_row_that_is_nested_too_deeply_stands_in_its_place(tmp_path, block):
    deep = '{"a": "]}\\"", "b": ' + "[" * 3000 + "]" * 3000 + "}"
    (tmp_path / "a.json").write_text(f"[{LINE},{deep},\n{LINE}]")
    assert [raw for _, raw, _ in read_rows(tmp_path / "a.json", 0, 10)] == [LINE, deep, LINE]
    (tmp_path / "a.json").write_text(f"[{LINE},{deep[:-3]}")
    with pytest.raises(UserError, match=r"row 1 .*nested too deep, and not closed"):
        list(read_rows(tmp_path / "a.json", 0, 10))


def test_a_row_that_is_too_long_refuses_its_array(tmp_path, monkeypatch):
    monkeypatch.setattr("safer_ray.storage.rows.MAX_ROW", 2**21)
    (tmp_path / "a.json").write_text(f'[{LINE},{{"a": "{"long " * 2**20}"}},{LINE}]')
    with pytest.raises(UserError, match=r"row 1 .*longer than 2,097,152 characters"):
        list(read_rows(tmp_path / "a.json", 0, 10))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "ndjson"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps([ROW]), "one JSON array"),
        (json.dumps([ROW] * 2, indent=1), "one JSON array"),
        (json.dumps(ROW, indent=1), "JSON whose first row goes over several lines"),
        (f'{{"data": [\n{LINE},\n{LINE}]}}', "JSON whose first row goes over several lines"),
    ],
)
def test_what_is_no_row_a_line_is_refused_by_what_it_is(tmp_path, ending, text, what):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    for read in (read_rows(path, 0, 10), cut_rows(path, 10, 2**20, 10)):
        with pytest.raises(UserError, match=f"a.{ending} is {what}, and not a row a line; give it a name that ends"):
            list(read)


@pytest.mark.parametrize("first", ["[1, 2]", '{"prompt": "cut', "{", "no JSON", "[" * 3000])
def test_a_bad_first_line_is_refused_alone(tmp_path, first):
    (tmp_path / "a.jsonl").write_text(f"{first}\n{LINE}\n{LINE}\n")
    assert [raw for _, raw, _ in read_rows(tmp_path / "a.jsonl", 0, 10)] == [first, LINE, LINE]
