"""CSV: what a stray quote swallows is refused line by line, and other dialects are told."""

import csv
import json

import pytest

from safer_ray.errors import UserError
from safer_ray.storage.rows import read_rows

HEADER = "prompt,chosen,rejected"


def read(path, *lines):
    path.write_text("\n".join((HEADER, *lines, "")), encoding="utf-8", newline="")
    return [(position, raw, refused) for position, raw, refused in read_rows(path, 0, 10**9)]


def lines(count, odd):
    return [odd.get(i, f"q{i},good{i},bad{i}") for i in range(count)]


def test_a_quote_that_is_never_closed_refuses_every_line_behind_it(tmp_path):
    found = read(tmp_path / "a.csv", *lines(1000, {100: 'q100,"5 inch screen,bad100'}))
    assert [position for position, *_ in found] == [*range(1000)]
    assert [refused is None for *_, refused in found] == [True] * 100 + [False] * 900
    assert found[100][1] == 'q100,"5 inch screen,bad100'
    assert "a quote opens in line 102, and what it holds goes on to line 1,001" in found[100][2]


@pytest.mark.parametrize("end", ['q900,good900,"it ends"', 'q900,good900,it ends"', 'q900,it ends",bad'])
def test_what_lies_between_two_stray_quotes_is_refused_and_the_rest_is_read(tmp_path, end):
    found = read(tmp_path / "a.csv", *lines(1000, {100: 'q100,good100,"Quoted start', 900: end}))
    assert [position for position, *_ in found] == [*range(1000)]
    assert [i for i, (*_, refused) in enumerate(found) if refused is not None] == [*range(100, 901)]
    assert "line 102, and what it holds goes on to line 902" in found[500][2]
    cut = [row for start in range(0, 1000, 7) for row in read_rows(tmp_path / "a.csv", start, start + 7)]
    assert cut == found


def test_a_stray_quote_closed_a_row_later_in_the_same_column_is_refused(tmp_path):
    found = read(tmp_path / "a.csv", 'q1,"good,bad', 'q2,good",bad', "q3,good,bad")
    assert ["stray quote: each of its 2 lines has 3 cells" in (refused or "") for *_, refused in found] == [1, 1, 0]


def test_cells_of_several_lines_are_read(tmp_path):
    texts = ["a\nb, c\nd", "one, two, three\n\nfour", "x\ny,z,1\ny", '"q"\n, "r"\n', "a, b\nc, d\ne, f\ng, h"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([HEADER.split(","), *([text, "x", text] for text in texts)])
    found = list(read_rows(tmp_path / "a.csv", 0, 100))
    assert [refused for *_, refused in found] == [None] * len(texts)
    assert [json.loads(raw)["rejected"] for _, raw, _ in found] == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r'"a \"b\" c","x","y"', "and not behind a backslash"),
        ('"a, b", "x y", "y z"', "a space before a quote; write no blanks behind commas"),
        ('"a, b", "x, y", z', "wrong type: the row is 4 cells, wanted 3 as in the header; write no blanks"),
        ('"a "b" c",x,y', "a cell in quotes has each quote in it written twice"),
        ("p,nan,b", "empty text: chosen, written as 'nan'"),
        ("None,a,b", "empty text: prompt, written as 'None'"),
        ("p,a,NULL", "empty text: rejected, written as 'NULL'"),
        ("p,NA,b", "empty text: chosen, written as 'NA'"),
        ("p,a,\\N", r"empty text: rejected, written as '\\N'"),
        ("p,#NAME?,b", "empty text: chosen, written as '#NAME?'"),
        ("prompt,chosen,rejected", "header again: the row holds the names of the columns"),
        ("rejected,chosen,prompt", "header again"),
        ("\ufeffprompt,chosen,rejected", "header again"),
    ],
)
def test_other_dialects_are_refused_with_the_remedy(tmp_path, line, reason):
    (one, two) = read(tmp_path / "a.csv", line, "p,a,b")
    assert reason in one[2]
    assert two[2] is None


@pytest.mark.parametrize(
    "line", ['"he said, ""hi""",x,y', '" ""x""",a,b', "p, a, b", 'p,5" long,b', "p,a,none of it", "prompt,chosen,x"]
)
def test_what_only_looks_like_another_dialect_is_read(tmp_path, line):
    assert [refused for *_, refused in read(tmp_path / "a.csv", line)] == [None]


def test_what_no_text_stands_in_may_be_called_so(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEADER},model\np,a,b,None\n")
    assert [refused for *_, refused in read_rows(tmp_path / "a.csv", 0, 9)] == [None]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("prompt;chosen;rejected", r"its cells are separated by ';', wanted commas; .*sep=';'"),
        ("prompt\tchosen\trejected", r"its cells are separated by tabs, wanted commas; .*sep='\\t'"),
        ("prompt|chosen|rejected", r"its cells are separated by '\|', wanted commas"),
        ("sep=,\nprompt,chosen,rejected", "its first line, 'sep=,', is no header; delete it"),
        ("sep=;\nprompt;chosen;rejected", "its first line, 'sep=;', is no header; delete it"),
        ('prompt,"chosen,rejected', "its header is no CSV"),
    ],
)
def test_a_header_that_is_none_is_refused_by_what_it_is(tmp_path, header, reason):
    (tmp_path / "a.csv").write_text(f"{header}\na,b,c\n")
    with pytest.raises(UserError, match=reason):
        list(read_rows(tmp_path / "a.csv", 0, 10))
