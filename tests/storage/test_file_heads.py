"""What a file is by its first bytes: another encoding is read, and what holds no rows is refused by name."""

import codecs
import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.storage.heads import Recoded, encoding_of, known_encoding
from safer_ray.storage.rows import Cut, cut_rows, grows, read_rows

ROWS = [{"prompt": f"Où est n° {n}? 猫", "chosen": "a\nb", "rejected": "é" * n} for n in range(300)]
CSV = "prompt,chosen,rejected\r\n" + "".join(f'{row["prompt"]},"{row["chosen"]}",{row["rejected"]}\r\n' for row in ROWS)
TEXTS = {
    "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    "csv": CSV,
}
BOMS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def packed(data, ending):
    return {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}[ending](data)


def all_rows(path, step=70, **options):
    """The rows by the ranges that a file is cut into."""
    cuts = list(cut_rows(path, step, 2**20, 2**62, **options))
    assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    return [row for cut in cuts for row in read_rows(path, cut.start, cut.stop, cut.offset, **options)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("marked", [True, False])
def test_text_is_read_in_the_encoding_that_it_begins_with(tmp_path, kind, encoding, ending, marked):
    path = tmp_path / f"rows.{kind}{ending}"
    path.write_bytes(packed((BOMS[encoding] if marked else b"") + TEXTS[kind].encode(encoding), ending))
    rows = all_rows(path)
    assert [refused for _, _, refused in rows] == [None] * len(ROWS)
    assert [json.loads(raw) for _, raw, _ in rows] == ROWS


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("encoding", ["cp1252", "gb18030", "utf-16-le", "shift_jis"])
def test_an_encoding_that_is_told_is_read(tmp_path, kind, encoding):
    path = tmp_path / f"rows.{kind}"
    text = (
        TEXTS[kind].replace("猫", "").replace("ù", "u").replace("°", "").replace("é", "e" if "s" in encoding else "é")
    )
    path.write_bytes(text.encode(encoding))
    rows = all_rows(path, encoding=encoding)
    assert [refused for _, _, refused in rows] == [None] * len(ROWS)
    assert json.loads(rows[3][1])["rejected"] in ("ééé", "eee")


def test_lines_of_another_encoding_can_be_entered_and_grow_unless_a_newline_is_more_than_a_byte(tmp_path):
    (tmp_path / "narrow.jsonl").write_bytes(TEXTS["jsonl"].replace("猫", "").encode("cp1252"))
    (tmp_path / "wide.jsonl").write_bytes(TEXTS["jsonl"].encode("utf-16"))
    assert grows(tmp_path / "narrow.jsonl")
    assert not grows(tmp_path / "wide.jsonl")
    *_, last = cut_rows(tmp_path / "narrow.jsonl", 299, 2**30, 2**62, whole_lines=True, encoding="cp1252")
    assert last.offset > 0
    ((_, raw, refused),) = read_rows(tmp_path / "narrow.jsonl", *last[:3], "cp1252")
    assert (json.loads(raw)["rejected"], refused) == ("é" * 299, None)
    assert list(cut_rows(tmp_path / "wide.jsonl", 400, 2**30, 2**62)) == [Cut(0, 300)]


def test_a_last_line_in_another_encoding_is_whole_without_its_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "表"}'.encode("shift_jis"))  # of which a byte is that of a backslash
    cut = {name: list(cut_rows(path, 9, 99, 9, whole_lines=True, encoding=name)) for name in ("shift_jis", None)}
    assert cut == {"shift_jis": [Cut(0, 1, 0, 11)], None: []}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "bad"), [("utf-16", b"\x00\xd8"), ("cp1252", b"\x81"), ("shift_jis", b"\x85\x20")]
)
def test_what_is_no_text_in_its_encoding_is_refused_by_row(tmp_path, kind, encoding, bad):
    path = tmp_path / f"rows.{kind}"
    data = TEXTS[kind].encode("ascii", "ignore").decode().encode(encoding)
    there = "n 17?".encode(encoding).removeprefix(codecs.BOM_UTF16_LE)
    assert there in data
    path.write_bytes(data.replace(there, bad + there))
    refused = {position: reason for position, _, reason in all_rows(path, encoding=encoding) if reason}
    assert list(refused) == [17]
    assert refused[17].startswith(f"bad {'utf-16-le' if encoding == 'utf-16' else encoding}: at character")


def test_a_mark_of_utf8_holds_whatever_is_told(tmp_path):
    for kind, text in TEXTS.items():
        (tmp_path / f"rows.{kind}").write_bytes(text.encode("utf-8-sig"))
        assert [json.loads(raw) for _, raw, _ in all_rows(tmp_path / f"rows.{kind}", encoding="cp1252")] == ROWS


def test_bytes_that_are_no_utf8_are_told_with_the_remedy_once(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXTS["jsonl"].replace("猫", "").encode("cp1252"))
    source = SourceConfig(path=str(path))
    rows = [row for part in plan_sources([source], rows=70) for row in read_raw(part, source).to_pylist()]
    assert len(rows) == len(ROWS)
    assert all(row["refused"].startswith("bad UTF-8: at character") for row in rows)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("rows.jsonl holds text that is no UTF-8; where it is in another encoding, say which by "
                         "--encoding NAME")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["base64", "rot13", "idna", "punycode", "utf-7", "unicode_escape", "cp500", "undefined", "nonesuch", "", "\0"],
)
def test_what_is_no_encoding_of_files_is_refused(name):
    with pytest.raises(UserError, match=r"is no encoding of text files; write one that Python knows, say cp1252"):
        known_encoding(name)


def test_encodings_have_one_name():
    assert [known_encoding(name) for name in ("UTF8", "utf-8-sig", "ascii")] == [None] * 3
    assert {known_encoding(name) for name in ("Windows-1252", "cp1252", "CP1252")} == {"cp1252"}
    assert known_encoding("UTF-16") == "utf-16"


def test_short_and_odd_heads_are_utf8():
    assert [encoding_of(head) for head in (b"", b"{", b"\x00", b"\x00\x00", b"\x00\x00\x00\x00", b"{}")] == [None] * 6


def test_a_recoded_stream_gives_the_same_however_it_is_read():
    text = "aé猫😀\n" * 5000
    for size in (1, 7, 4096, 2**20):
        if size > 1 or len(text) < 10**5:
            stream = Recoded(io.BufferedReader(io.BytesIO(text.encode("utf-16-le"))), "utf-16-le")
            found = b"".join(iter(lambda: stream.read(size), b""))  # noqa: B023  # read within the loop
            assert found.decode() == text


# No rows


def workbook():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


def table(write):
    sink = pa.BufferOutputStream()
    write(sink)
    return sink.getvalue().to_pybytes()


PARQUET = table(lambda sink: pq.write_table(pa.table({"a": [1]}), sink))
LINES = TEXTS["jsonl"].encode()
FOREIGN = {
    "pointer": (POINTER, r"is a Git LFS pointer, not the data; run `git lfs pull`"),
    "annex": (b"/annex/objects/MD5E-s12--9f.jsonl\n", "is a git-annex pointer"),
    "page": (b"\n<!DOCTYPE html><html><head>", "is an HTML page, say of an error or a login"),
    "page in capitals": (b"\xef\xbb\xbf<HTML>", "is an HTML page"),
    "error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
    "workbook": (workbook(), "is a zip archive or an Excel workbook; unpack it, or save its sheet as CSV"),
    "gzip": (gzip.compress(gzip.compress(LINES)), "is compressed by gzip"),
    "zstd": (zstandard.compress(zstandard.compress(LINES)), "is compressed by zstd"),
    "bzip2": (b"BZh91AY&SY\x00", "is compressed by bzip2"),
    "parquet": (PARQUET, "is a Parquet file; give it a name that ends in .parquet"),
    "database": (b"SQLite format 3\x00", "is an SQLite database"),
}
OWN = {("parquet", "parquet")}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "csv.zst", "parquet", "arrow"])
def test_a_file_that_is_something_else_than_its_name_says_is_named(tmp_path, what, ending):
    data, message = FOREIGN[what]
    if what == ending:
        pytest.skip("it is what its name says")
    path = tmp_path / f"rows.{ending}"
    packing = {"gzip": ".gz", "zstd": ".zst"}.get(what)
    path.write_bytes(data)
    if packing and ending.endswith(packing):
        message = f"{message}|damaged"  # packed twice
    for reads in (lambda: list(read_rows(path, 0, 10)), lambda: list(cut_rows(path, 10, 100, 100))):
        with pytest.raises(UserError, match=message) as error:
            reads()
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_what_is_packed_is_looked_at_too(tmp_path, ending):
    (tmp_path / f"rows.csv.{ending}").write_bytes(packed(b"<html><body>404", f".{ending}"))
    with pytest.raises(UserError, match="is an HTML page"):
        list(read_rows(tmp_path / f"rows.csv.{ending}", 0, 1))


def test_text_under_the_name_of_a_packed_file_or_a_table_is_told(tmp_path):
    for name, kind in (("a.jsonl.gz", "gzip"), ("a.csv.zst", "zstd"), ("a.parquet", "parquet")):
        (tmp_path / name).write_bytes(LINES)
        with pytest.raises(UserError, match=rf"{name} is no {kind} file, whatever its name says: it begins with b'{{"):
            list(read_rows(tmp_path / name, 0, 1))
        (tmp_path / name).write_bytes(b"")
        if kind == "parquet":
            with pytest.raises(UserError, match="is empty, and no parquet file"):
                list(read_rows(tmp_path / name, 0, 1))


def test_free_text_may_be_markup(tmp_path):
    (tmp_path / "corpus.txt").write_text("<html>\n<p>a</p>\n")
    assert len(list(read_rows(tmp_path / "corpus.txt", 0, 9))) == 2
    (tmp_path / "corpus.txt").write_bytes(POINTER)
    with pytest.raises(UserError, match="Git LFS pointer"):
        list(read_rows(tmp_path / "corpus.txt", 0, 9))
