"""Which rows an audit reads: nothing twice, nothing lost, wherever the corpus lies and whatever it becomes."""

import json
import os
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest

from safer_ray.audit.plan import FileNotes, in_words, plan_audit
from safer_ray.audit.read import open_audit
from safer_ray.config.sections import SourceConfig
from safer_ray.data.source_files import find_files
from safer_ray.data.sources import read_raw
from safer_ray.errors import UserError
from safer_ray.storage.artifacts import SETTINGS_FILE, part_name, read_plan
from safer_ray.storage.files import read_parquet, write_json, write_parquet

OLD_COLUMNS = ("number", "source", "path", "start", "stop", "size", "etag", "offset", "digest")  # before `file`


def row(number):
    return json.dumps({"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": f"No {number}."})


def lines(*numbers):
    return "".join(f"{row(number)}\n" for number in numbers)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_text(lines(*range(5)))
    (folder / "more/b.jsonl").write_text(lines(*range(5, 8)))
    table = pa.table({"prompt": ["p", "q"], "chosen": ["yes", "yes"], "rejected": ["no", "no"]})
    write_parquet(table, folder / "c.parquet")
    return folder


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


class Audited:
    """An audit without a model: its plan, what it reads of it, and the row keys that were read."""

    def __init__(self, out):
        self.out, self.read = out, []

    def __call__(self, path, rows=2, stop_after=None, **settings):
        """Plan, and read what is not done; the notes."""
        source = SourceConfig(path=str(path), **settings)
        plan = plan_audit(source, rows, self.out)
        for fragment in plan.fragments[:stop_after]:
            done = self.out / "done" / f"{fragment.number:08}.json"
            if not done.exists():
                keys = read_raw(fragment, source)["row_key"].to_pylist()
                self.read += keys
                write_parquet(pa.table({"row_key": keys}), self.out / "scores" / part_name(fragment.number))
                write_json({}, done)
        return plan.notes

    def plan(self):
        return read_plan(self.out / "plan.parquet")


@pytest.fixture
def audited(out):
    return Audited(out)


ALL = [*(f"a.jsonl#{i}" for i in range(5)), "c.parquet#0", "c.parquet#1", *(f"more/b.jsonl#{i}" for i in range(3))]
NOTHING = FileNotes({}, {}, {}, {}, [])


# The same corpus elsewhere


def moved(corpus):
    return corpus.rename(corpus.with_name("elsewhere"))


def linked(corpus):
    link = corpus.with_name("link")
    link.symlink_to(corpus, target_is_directory=True)
    return link


def relative(corpus):
    os.chdir(corpus.parent)
    return "corpus"


def copied(corpus):
    return shutil.copytree(corpus, corpus.with_name("copy"))


ELSEWHERE = {
    "moved": moved,
    "copied": copied,
    "linked": linked,
    "relative": relative,
    "file URI": lambda corpus: f"file://{corpus}",
    "glob": lambda corpus: corpus / "**/*.*",
    "dots": lambda corpus: corpus / "../corpus",
}


@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_corpus_under_another_path_is_read_once(corpus, audited, way, monkeypatch):
    monkeypatch.chdir(corpus)
    assert audited(corpus, stop_after=2) == NOTHING
    assert audited(ELSEWHERE[way](corpus)) == NOTHING
    assert sorted(audited.read) == ALL
    planned = audited.plan()
    assert audited(ELSEWHERE[way](corpus) if way == "relative" else audited_path(planned)) == NOTHING
    assert sorted(audited.read) == ALL


def audited_path(planned):
    """The folder that a plan's files lie in now."""
    (first, *_) = (fragment.path for fragment in planned if fragment.file == "a.jsonl")
    return first.removesuffix("/a.jsonl")


def test_a_corpus_that_was_moved_and_has_grown_is_read_where_it_is_new(corpus, audited):
    audited(corpus)
    corpus = moved(corpus)
    with (corpus / "a.jsonl").open("a") as more:
        more.write(lines(8, 9))
    audited(corpus)
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5", "a.jsonl#6"])


def test_a_touched_file_of_any_kind_is_the_same_file(corpus, audited):
    audited(corpus, stop_after=1)
    for file in corpus.rglob("*.*"):
        os.utime(file, ns=(1, 1))
    assert audited(corpus) == NOTHING
    assert sorted(audited.read) == ALL


def test_other_bytes_of_the_same_size_and_time_are_seen_under_another_path(corpus, audited, out):
    audited(corpus)
    other = copied(corpus)
    stat = (corpus / "a.jsonl").stat()
    (other / "a.jsonl").write_text(lines(*range(5)).replace("Yes", "Yep"))
    os.utime(other / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    told = rf"{out} holds the audit of another corpus: its a.jsonl was read from {corpus}/a.jsonl, and {other}/a.jsonl"
    with pytest.raises(UserError, match=told):
        audited(other)


def test_a_file_that_grew_over_changed_rows_within_a_tick_of_the_clock_is_refused(corpus, audited):
    audited(corpus)
    file = corpus / "a.jsonl"
    stat = file.stat()
    file.write_text(lines(*range(6)).replace("Yes", "Yep"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"a\.jsonl changed since it was planned"):
        audited(corpus)


def test_another_corpus_is_refused_by_name(corpus, audited, out, tmp_path):
    audited(corpus)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/z.jsonl").write_text(lines(20))
    with pytest.raises(UserError, match=rf"{out} holds the audit of another corpus: a.jsonl of {corpus}"):
        audited(tmp_path / "other")
    assert sorted(audited.read) == ALL


def test_one_file_of_a_folder_is_no_other_corpus(corpus, audited):
    audited(corpus / "a.jsonl")
    assert audited(corpus) == NOTHING
    assert audited(corpus / "a.jsonl").gone == ["c.parquet", "more/b.jsonl"]
    assert sorted(audited.read) == ALL


# Renamed and repeated files


def test_a_renamed_file_is_not_read_again_and_its_rows_keep_their_name(corpus, audited):
    audited(corpus, stop_after=1)
    (corpus / "a.jsonl").rename(corpus / "z.jsonl")
    (corpus / "c.parquet").rename(corpus / "d.parquet")
    for _ in range(2):
        assert audited(corpus).renamed == {"a.jsonl": "z.jsonl", "c.parquet": "d.parquet"}
    assert sorted(audited.read) == ALL
    with (corpus / "z.jsonl").open("a") as more:
        more.write(lines(8))
    assert audited(corpus).renamed == {"a.jsonl": "z.jsonl", "c.parquet": "d.parquet"}
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5"])


def test_a_file_that_was_renamed_and_has_grown_at_once_is_known(corpus, audited):
    audited(corpus)
    (corpus / "a.jsonl").unlink()
    (corpus / "z.jsonl").write_text(lines(*range(5), 8))
    assert audited(corpus).renamed == {"a.jsonl": "z.jsonl"}
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5"])


def test_a_source_named_one_folder_deeper_is_known(corpus, audited):
    audited(corpus)
    assert audited(corpus / "more").renamed == {"more/b.jsonl": "b.jsonl"}
    assert sorted(audited.read) == ALL


def test_a_copy_beside_a_file_is_read_and_told(corpus, audited):
    audited(corpus)
    shutil.copy(corpus / "a.jsonl", corpus / "z.jsonl")
    notes = audited(corpus)
    assert notes.repeated == {"z.jsonl": "a.jsonl"}
    assert sorted(audited.read) == sorted([*ALL, *(f"z.jsonl#{i}" for i in range(5))])
    assert in_words(notes.to_tree()) == ["The same bytes under two names are scored twice: a.jsonl as z.jsonl."]


# Lines that are still being written


def test_half_a_line_waits_until_it_is_whole(corpus, audited):
    whole, half = row(5), row(6)
    with (corpus / "a.jsonl").open("a") as more:
        more.write(f"{whole}\n{half[:20]}")
    for _ in range(2):
        notes = audited(corpus)
        assert notes.left_for_later == {"a.jsonl": 20}
        assert in_words(notes.to_tree()) == [
            "Last lines that are not whole yet are left for the next run: a.jsonl (20 bytes)."
        ]
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5"])
    with (corpus / "a.jsonl").open("a") as more:
        more.write(half[20:] + "\n" + row(7)[:5])
    assert audited(corpus).left_for_later == {"a.jsonl": 5}
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5", "a.jsonl#6"])


def test_a_file_whose_first_line_is_being_written_is_read_later(tmp_path, audited):
    path = tmp_path / "new.jsonl"
    path.write_text(row(0)[:-1])
    (tmp_path / "old.jsonl").write_text(lines(1))
    assert audited(tmp_path / "*.jsonl").left_for_later == {"new.jsonl": len(row(0)) - 1}
    path.write_text(row(0))
    assert audited(tmp_path / "*.jsonl") == NOTHING
    assert audited.read == ["old.jsonl#0", "new.jsonl#0"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "  \n"])
def test_a_last_line_that_is_whole_without_its_newline_is_read_at_once(corpus, audited, newline):
    with (corpus / "a.jsonl").open("a", newline="") as more:
        more.write(row(5))
    assert audited(corpus) == NOTHING
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5"])
    with (corpus / "a.jsonl").open("a", newline="") as more:
        more.write(newline[:-1])
    assert audited(corpus) == NOTHING
    with (corpus / "a.jsonl").open("a", newline="") as more:
        more.write("\n" + lines(6))
    assert audited(corpus) == NOTHING
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5", "a.jsonl#6"])


def test_a_whole_last_line_that_grows_is_refused(corpus, audited):
    (corpus / "a.jsonl").write_text(lines(0) + row(1))
    audited(corpus)
    with (corpus / "a.jsonl").open("a") as more:
        more.write("x\n")
    with pytest.raises(UserError, match=r"a.jsonl: its last line has grown"):
        audited(corpus)


@pytest.mark.parametrize("rest", ["12", "[1, 2]", '"text"', "nul", "{", "\x00" * 9, '{"a": 1}{'])
def test_only_an_object_is_taken_for_a_whole_line(corpus, audited, rest):
    with (corpus / "a.jsonl").open("a") as more:
        more.write(rest)
    assert audited(corpus).left_for_later == {"a.jsonl": len(rest)}
    assert sorted(audited.read) == ALL


def test_blanks_at_the_end_and_rows_behind_the_limit_are_not_left_for_later(corpus, audited):
    with (corpus / "a.jsonl").open("a") as more:
        more.write("\n \n  ")
    assert audited(corpus / "a.jsonl") == NOTHING
    (corpus / "more/b.jsonl").write_text(lines(5, 6, 7) + "{half")
    assert audited(corpus, limit=3) == NOTHING


# What is no part of the source


def fill_audit(folder):
    """What an audit writes, as far as it looks like data."""
    write_json({"auditor": "x", "source": {}, "scores": {}, "path": "y"}, folder / SETTINGS_FILE)
    write_json({"rows": 1}, folder / "summary.json")
    (folder / "flagged.jsonl").write_text(lines(30))
    write_parquet(pa.table({"row_key": ["a#0"]}), folder / "scores/part-00000000.parquet")


@pytest.mark.parametrize("name", ["out", "deep/er/out"])
def test_what_an_audit_writes_into_its_own_source_is_left_out(corpus, name):
    out = corpus / name
    out.mkdir(parents=True)
    audited = Audited(out)
    assert audited(corpus) == NOTHING
    fill_audit(out)
    notes = audited(corpus)
    assert list(notes.left_out) == [str(out)]
    assert sorted(audited.read) == ALL
    assert audited(corpus / "**/*.*").left_out == notes.left_out
    (told,) = in_words(notes.to_tree())
    assert told.startswith(f"Folders below the source that are no part of it are left out: {out} (")


@pytest.mark.parametrize("pattern", ["", "*.*", "**/*.*"])
def test_an_audit_into_the_folder_of_its_source_leaves_its_own_files_out(corpus, pattern):
    audited = Audited(corpus)
    audited(corpus / pattern)
    fill_audit(corpus)
    notes = audited(corpus / pattern)
    written = {"summary.json", "flagged.jsonl", "scores"} - ({"scores"} if pattern == "*.*" else set())
    assert written <= {os.path.relpath(path, corpus) for path in notes.left_out}
    assert sorted(audited.read) == [key for key in ALL if "/" not in key or pattern != "*.*"]


def test_other_audits_unfinished_stages_and_hidden_folders_are_left_out(corpus, audited):
    fill_audit(corpus / "last week")
    for folder in (".partial-pairs-0123456789ab", ".ipynb_checkpoints", "more/.git"):
        (corpus / folder).mkdir()
        (corpus / folder / "x.jsonl").write_text(lines(40))
    assert audited(corpus).left_out == {
        str(corpus / "last week"): 4,
        str(corpus / ".partial-pairs-0123456789ab"): 1,
        str(corpus / ".ipynb_checkpoints"): 1,
        str(corpus / "more/.git"): 1,
    }
    assert sorted(audited.read) == ALL


def test_a_folder_that_is_named_itself_is_read(corpus, tmp_path):
    (corpus / ".hidden").mkdir()
    shutil.copy(corpus / "a.jsonl", corpus / ".hidden")
    fill_audit(tmp_path / "audit")
    for path in (corpus / ".hidden", corpus / ".hidden/*.jsonl", corpus / "*/../.hidden/*.jsonl"):
        assert len(find_files(SourceConfig(path=str(path))).files) >= 1
    assert len(find_files(SourceConfig(path=str(tmp_path / "audit/flagged.jsonl"))).files) == 1
    fill_audit(tmp_path / "only/out")
    with pytest.raises(UserError, match=r"no data files there, other than those in .*/out, which is left out"):
        find_files(SourceConfig(path=str(tmp_path / "only")))


def test_artifacts_below_a_source_are_left_out(corpus, audited):
    write_json({"stage": "pairs", "name": "pairs-x", "packages": {}, "rows": {}}, corpus / "made/manifest.json")
    (corpus / "made/pairs").mkdir()
    (corpus / "made/pairs/x.jsonl").write_text(lines(50))
    assert audited(corpus).left_out == {str(corpus / "made"): 2}
    assert sorted(audited.read) == ALL


def test_a_link_to_a_folder_is_not_followed_and_told(corpus, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/b.jsonl").write_text(lines(3))
    (corpus / "sub").symlink_to(tmp_path / "other")
    assert find_files(SourceConfig(path=str(corpus))).left_out == {str(corpus / "sub"): 1}


def test_of_an_artifact_that_is_named_itself_its_rows_alone_are_read(corpus):
    write_json({"stage": "pairs", "name": "pairs-x", "packages": {}, "rows": {}}, corpus / "manifest.json")
    rows = sorted(find_files(SourceConfig(path=str(corpus))).files)
    for name in ("plan.parquet", "done/00000000.json", "quarantine/part-00000000.parquet"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_bytes(b"")
    found = find_files(SourceConfig(path=str(corpus)))
    assert sorted(found.files) == rows
    told = ("manifest.json", "plan.parquet", "done", "quarantine")
    assert found.left_out == {str(corpus / name): 1 for name in told}


@pytest.mark.parametrize("name", ["audit.json", "manifest.json"])
def test_a_users_own_file_of_that_name_is_data_like_any_other(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text('[{"prompt": "p", "chosen": "a", "rejected": "b"}]')
    assert len(find_files(SourceConfig(path=str(tmp_path))).files) == 1


# Audits of an earlier version


def make_old(out):
    """The plan as it was written before files had names: digests of lines alone, in the last fragment."""
    fragments = read_plan(out / "plan.parquet")
    last = {fragment.path: fragment.number for fragment in fragments}
    old = [
        replace(f, digest=f.digest if f.path.endswith(".jsonl") and last[f.path] == f.number else "") for f in fragments
    ]
    write_parquet(pa.table({n: [getattr(f, n) for f in old] for n in OLD_COLUMNS}), out / "plan.parquet")
    assert "file" not in read_parquet(out / "plan.parquet").column_names


def test_an_audit_of_an_earlier_version_goes_on_where_its_corpus_lies(corpus, audited, out):
    audited(corpus, stop_after=2)
    make_old(out)
    with (corpus / "a.jsonl").open("a") as more:
        more.write(lines(8))
    assert audited(corpus) == NOTHING
    assert sorted(audited.read) == sorted([*ALL, "a.jsonl#5"])
    assert {fragment.file for fragment in audited.plan()} == {"a.jsonl", "c.parquet", "more/b.jsonl"}


def test_an_audit_of_an_earlier_version_knows_lines_elsewhere_and_refuses_the_rest_by_name(corpus, audited, out):
    (corpus / "c.parquet").rename(corpus.parent / "c.parquet")
    audited(corpus)
    make_old(out)
    assert audited(moved(corpus)) == NOTHING
    assert len(audited.read) == 8
    shutil.rmtree(out)
    corpus = corpus.with_name("elsewhere")
    (corpus.parent / "c.parquet").rename(corpus / "c.parquet")
    audited = Audited(out)
    audited(corpus)
    make_old(out)
    with pytest.raises(UserError, match=rf"whether .*/c.parquet is what {out} audited as .*/c.parquet cannot be told"):
        audited(corpus.rename(corpus.with_name("again")))


def test_an_audit_that_holds_a_corpus_twice_is_refused_by_name(corpus, audited, out):
    audited(corpus)
    make_old(out)
    fragments = read_plan(out / "plan.parquet")
    twice = [replace(f, number=f.number + len(fragments), path=f.path.replace("/corpus/", "/link/")) for f in fragments]
    for number, fragment in enumerate(twice, len(fragments)):
        shutil.copy(out / "scores" / part_name(number - len(fragments)), out / "scores" / part_name(number))
        write_json({}, out / "done" / f"{fragment.number:08}.json")
    write_parquet(
        pa.table({n: [getattr(f, n) for f in [*fragments, *twice]] for n in OLD_COLUMNS}), out / "plan.parquet"
    )
    with pytest.raises(UserError, match=rf"{out} holds a.jsonl twice, read from {corpus}/a.jsonl and from .*/link/a"):
        audited(corpus)


def test_an_unfinished_audit_is_not_opened_because_its_plan_is_written(out, audited, corpus):
    audited(corpus)
    write_json({"auditor": "x"}, out / SETTINGS_FILE)
    with pytest.raises(UserError, match="is not finished"):
        open_audit(out)


# Names that went round, and lines that end otherwise


def exchange(one, other):
    held = one.with_name("held")
    one.rename(held)
    other.rename(one)
    held.rename(other)


def test_files_that_changed_names_are_known_by_their_bytes_and_rows_keep_their_names(corpus, audited):
    audited(corpus, stop_after=1)
    exchange(corpus / "a.jsonl", corpus / "more/b.jsonl")
    for _ in range(2):
        assert audited(corpus).renamed == {"a.jsonl": "more/b.jsonl", "more/b.jsonl": "a.jsonl"}
    assert sorted(audited.read) == ALL
    with (corpus / "a.jsonl").open("a") as more:
        more.write(lines(9))
    audited(corpus)
    assert sorted(audited.read) == sorted([*ALL, "more/b.jsonl#3"])
    exchange(corpus / "a.jsonl", corpus / "more/b.jsonl")
    assert audited(corpus) == NOTHING


def test_a_file_whose_name_another_took_over_is_refused(corpus, audited):
    audited(corpus)
    (corpus / "a.jsonl").rename(corpus / "a.jsonl.1.jsonl")
    (corpus / "a.jsonl").write_text(lines(*range(20, 25)))
    with pytest.raises(UserError, match=r"a.jsonl changed since it was planned"):
        audited(corpus)


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("", "mac.jsonl: its lines end with a CR alone; write them with"),
        (lines(1), rf"mac.jsonl: behind byte {len(lines(1))} its lines end with a CR alone; write them"),
    ],
)
def test_lines_that_end_with_a_carriage_return_alone_are_told(tmp_path, audited, first, told):
    (tmp_path / "mac.jsonl").write_bytes((first + lines(2, 3).replace("\n", "\r")).encode())
    with pytest.raises(UserError, match=told):
        audited(tmp_path / "mac.jsonl")


def test_lines_that_end_as_on_windows_are_lines(tmp_path, audited):
    (tmp_path / "dos.jsonl").write_bytes(lines(2, 3).replace("\n", "\r\n").encode()[:-1])
    assert audited(tmp_path / "dos.jsonl") == NOTHING
    assert audited.read == ["dos.jsonl#0", "dos.jsonl#1"]
