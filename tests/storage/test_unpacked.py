"""Compressed files: zeros behind gzip end it, damage is told."""

import gzip

import pytest

from safer_ray.errors import UserError
from safer_ray.storage.rows import read_rows

LINE = b'{"a": 1}\n'
PACKED = gzip.compress(LINE * 300_000)  # more than is read at once


def count(path, content):
    path.write_bytes(content)
    return sum(1 for _ in read_rows(path, 0, 10**9))


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (PACKED, 300_000),
        (PACKED + bytes(512), 300_000),
        (PACKED + bytes(3) + PACKED, 600_000),
        (gzip.compress(LINE) + bytes(7), 1),
        (gzip.compress(b"") + bytes(7), 0),
    ],
    ids=["end", "zeros", "two members", "one row", "no row"],
)
def test_zeros_behind_gzip_are_no_damage(tmp_path, content, rows):
    assert count(tmp_path / "a.jsonl.gz", content) == rows


@pytest.mark.parametrize(
    "content",
    [
        PACKED[:-20],
        PACKED + b"junk" * 40,
        PACKED + bytes(100) + b"x",
        PACKED[:200] + b"xx" + PACKED[202:],
        PACKED + bytes(3) + PACKED[:200] + b"xx" + PACKED[202:],
        PACKED + bytes(3) + PACKED[:-20],
    ],
)
def test_damage_is_told(tmp_path, content):
    with pytest.raises(UserError, match="the file is damaged or incomplete, write it again"):
        count(tmp_path / "a.jsonl.gz", content)
