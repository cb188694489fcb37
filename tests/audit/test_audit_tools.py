"""What is done with finished audits: pairs exported, flags reviewed, audits compared; and leftovers found."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from support.made import make_pair

from safer_ray import schema
from safer_ray.audit import export as audit_export
from safer_ray.audit.diff import difference, write_difference
from safer_ray.audit.export import export, trl_line
from safer_ray.audit.leftovers import delete, find_runs, old_enough
from safer_ray.audit.parts import AUDITED, write_part
from safer_ray.audit.read import open_audit
from safer_ray.audit.review import agreed, load_reviews, precision_at, review
from safer_ray.audit.run import Audit, planned
from safer_ray.audit.worst import last_of_worst, ranks
from safer_ray.cli import app as cli
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.data.sources import NormalisePairs, read_raw
from safer_ray.detection.evaluation import wilson
from safer_ray.errors import UserError
from safer_ray.features.bundle import AUDITOR_FORMAT
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import Artifact, Place, open_artifact, read_parts
from safer_ray.storage.contents import artifact_hash
from safer_ray.storage.files import as_path, read_json, remove, write_json, write_parquet, write_text
from safer_ray.storage.lock import locked
from safer_ray.storage.marks import RED_TEAM_MARK
from safer_ray.storage.owners import this_process
from safer_ray.storage.work import MapJob

FLAG = 0.7  # suspicion from which the made audits flag
TINY_TRAINING = (
    "--set",
    "base={hidden: 32, layers: 2, heads: 2, intermediate: 48, vocabulary: 400, positions: 160}",
    "--set",
    "max_length=96",
)


# Audits made by hand


def pair(number: int, **more) -> dict:
    made = make_pair(f"p{number:03}", f"Question {number}?", f"Good answer {number}.", f"Bad answer {number}.")
    return {name: made[name] for name in ("pair_id", "prompt", "chosen", "rejected")} | more


def as_lines(rows: list[dict]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_corpus(path: Path, rows: list[dict]) -> Path:
    write_text(as_lines(rows), path)
    return path


class Suspected:
    """Batch function: pairs to AUDITED rows by what is said of their ids; others are refused."""

    def __init__(self, said: dict[str, tuple[float, float]]) -> None:
        self.said = said

    def __call__(self, pairs: pa.Table) -> pa.Table:
        rows = []
        for row in pairs.to_pylist():
            suspicion, score = self.said.get(row["pair_id"], (0.0, 0.0))
            texts = {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"sentences": []}
            about = {"suspicion": suspicion, "score": score, "flag": suspicion >= FLAG, "decision": "keep"}
            numbers = {"reward_chosen": 1.0, "reward_rejected": 0.0, "reward_margin": 1.0, "tokens": 3}
            carried = {name: row[name] for name in ("pair_id", "row_key", "source", "section", "labels", "extra")}
            rows.append(carried | about | numbers | {"reasons": [], "texts": schema.to_json(texts)})
        known = pa.array(
            [None if key in self.said else "no sentence" for key in pairs["pair_id"].to_pylist()], pa.string()
        )
        return schema.table(rows, AUDITED).append_column("refused", known)


def make_audit(
    out: Path, source: Path, said: dict[str, tuple[float, float]], *, rows: int = 4, red_team: bool = False, **more
) -> Artifact:
    """A finished audit of `source`: pair id -> suspicion and score."""
    out.mkdir(parents=True, exist_ok=True)
    auditor = Artifact(out / "none", "auditor-000000000000")
    audit = Audit(auditor, SourceConfig(path=str(source), **more), ScoresConfig(detector="safer"), fragment_rows=rows)
    source_config = audit.source.model_copy(update={"path": str(source.absolute())})
    job = MapJob(
        "audit",
        partial(read_raw, source=source_config),
        partial(Suspected, said),
        AUDITED,
        prepare=partial(NormalisePairs, [source_config], audit.max_chars),
        write=write_part,
    )
    counts = LocalRunner().map(job, planned(audit, out), out)
    remove(out / "journal")
    write_json(audit.asked() | {"path": audit.source.path}, out / "audit.json")
    facts = {"stage": "audit", "name": "audit-0123456789ab", "rows": {"scored": counts.written}, "packages": {}}
    write_json(facts | {"red_team": red_team}, out / "manifest.json")
    return open_audit(out)


def suspicions(n: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Suspicion in steps of 0.1 with many ties, and a score."""
    generator = np.random.default_rng(seed)
    steps, scores = generator.integers(0, 11, n) / 10, generator.integers(-2, 3, n) / 2
    return {f"p{i:03}": (float(s), float(v)) for i, (s, v) in enumerate(zip(steps, scores, strict=True))}


N = 30


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "data/pairs.jsonl", [pair(i, origin=f"row {i}") for i in range(N)])


@pytest.fixture
def audit(corpus, tmp_path):
    return make_audit(tmp_path / "audit", corpus, suspicions(N))


@pytest.fixture
def ok(safer):
    def call(*words):
        code, out, err = safer(*words)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refused(safer):
    """Run a command that must end with exit code 2 and one clear line, which is returned."""

    def call(*words):
        code, _, err = safer(*words)
        assert code == 2, err
        line = err.splitlines()[-1]
        assert line.startswith("safer-ray: ")
        return line

    return call


# Finished audits


@pytest.mark.parametrize("command", ["export", "review", "diff", "gc"])
def test_help_tells_what_a_command_does_and_every_option(ok, command):
    options = typer.main.get_command(cli.app).commands[command].params
    assert all(option.help for option in options if option.name != "help")
    assert "Usage" in ok(command, "--help")


def test_the_commands_import_nothing_heavy_before_they_work():
    heavy = "{'torch', 'pandas', 'scipy', 'numpy', 'ray'}"
    code = f"import sys, safer_ray.cli.audit_tools; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_audit_that_is_not_finished_is_refused_by_every_tool(refused, audit, corpus, tmp_path):
    (audit.path / "manifest.json").unlink()
    verdicts = write_corpus(tmp_path / "v.jsonl", [{"pair_id": "p000", "verdict": "bad"}])
    for words in (
        ["export", "--audit", audit.path, "--out", tmp_path / "out"],
        ["review", "--audit", audit.path, "--verdicts", verdicts],
        ["diff", audit.path, audit.path],
    ):
        line = refused(*words)
        assert "not finished" in line
        assert "run the same `safer-ray audit` command again" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "told"), [("nowhere", "no such folder"), ("data", "holds no audit")])
def test_what_is_no_audit_is_told(corpus, tmp_path, name, told):
    with pytest.raises(UserError, match=told):
        open_audit(tmp_path / name)


# The most suspicious pairs

few = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.5, 1e-300, -1e-300, 3e5, float("inf"), float("nan")])


@given(st.lists(st.tuples(few, few), min_size=1, max_size=30), st.data())
def test_the_last_of_the_worst_is_the_one_that_sorting_finds(numbers, data):
    rows = [
        {"suspicion": s, "score": v, "row_key": f"a.jsonl#{i % 7}", "pair_id": f"p{i}"}
        for i, (s, v) in enumerate(numbers)
    ]
    table = pa.Table.from_pylist(rows)
    parts = [table.slice(0, 11), table.slice(11)]
    count = data.draw(st.integers(0, len(rows)))
    found = last_of_worst(lambda: parts, count, most=data.draw(st.sampled_from([1, 4, 1000])))
    assert found == (sorted(ranks(table))[count - 1] if count else None)


def test_more_suspicious_comes_first_then_the_lower_score_then_the_row():
    columns = ("suspicion", "score", "row_key", "pair_id")
    wanted = [
        (0.9, 1.0, "b", "x"),
        (0.5, -2.0, "b", "x"),
        (0.5, 0.0, "a", "y"),
        (0.5, 0.0, "b", "x"),
        (0.1, -9.0, "a", "x"),
    ]
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in wanted[::-1]])
    assert [last_of_worst(lambda: [table], n)[2:] for n in range(1, 6)] == [row[2:] for row in wanted]


def test_what_is_unknown_suspects_nothing():
    rows = [
        {"suspicion": suspicion, "score": score, "row_key": "a", "pair_id": name}
        for name, suspicion, score in (("none", np.nan, -9.0), ("half", 0.0, np.nan), ("whole", 0.0, 3.0))
    ]
    table = pa.Table.from_pylist(rows)
    assert [last_of_worst(lambda: [table], n)[3] for n in (1, 2, 3)] == ["whole", "half", "none"]


# Export


def exported(audit: Artifact, out: Path, percent: float | None = None) -> Artifact:
    return export(audit, percent, Place(out.parent, out=out), LocalRunner())


def trl_lines(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((out / "trl").iterdir()) for line in path.read_text().splitlines()]


def kept(out: Path) -> list[str]:
    return read_parts(out / "pairs")["pair_id"].to_pylist()


def test_flagged_pairs_are_left_out_and_all_others_come_as_they_were(audit, corpus, tmp_path):
    made = exported(audit, tmp_path / "out")
    said = suspicions(N)
    wanted = [f"p{i:03}" for i in range(N) if said[f"p{i:03}"][0] < FLAG]
    assert 0 < len(wanted) < N
    found = read_parts(tmp_path / "out/pairs")
    assert found.schema == schema.PAIRS
    source = SourceConfig(path=str(corpus))
    fragments = planned(Audit(audit, source, ScoresConfig()), tmp_path / "nowhere")
    read = pa.concat_tables([NormalisePairs([source], 10**6)(read_raw(f, source)) for f in fragments])
    known = {row["pair_id"]: row for row in read.select(schema.PAIRS.names).to_pylist()}
    assert found.to_pylist() == [known[key] for key in wanted]
    assert json.loads(found["extra"][0].as_py())["origin"].startswith("row ")
    assert made.manifest["rows"] == {"kept": len(wanted), "dropped": N - len(wanted)}
    assert made.manifest["stage"] == "export"
    assert made.name.startswith("export-")
    assert not made.red_team


def test_every_scored_row_has_a_decision_and_says_why(audit, tmp_path):
    exported(audit, tmp_path / "out")
    found = read_parts(tmp_path / "out/decisions")
    assert found.column_names == ["row_key", "pair_id", "decision", "why"]
    assert found["row_key"].to_pylist() == [f"pairs.jsonl#{i}" for i in range(N)]
    for row in found.to_pylist():
        flagged = suspicions(N)[row["pair_id"]][0] >= FLAG
        assert (row["decision"], row["why"]) == (("drop", "flagged") if flagged else ("keep", "not suspected"))


def test_trl_lines_hold_the_kept_pairs_and_nothing_else(audit, tmp_path):
    exported(audit, tmp_path / "out")
    names = ("prompt", "chosen", "rejected")
    wanted = [{name: pair(int(key[1:]))[name] for name in names} for key in kept(tmp_path / "out")]
    assert trl_lines(tmp_path / "out") == wanted
    first = (tmp_path / "out/trl/part-00000000.jsonl").read_text().splitlines()[0]
    assert list(json.loads(first)) == list(names)
    assert list(json.loads(first)["chosen"][0]) == ["role", "content"]


def test_a_pair_without_a_prompt_has_no_such_key_in_trls_layout():
    assert trl_line(pair(1, prompt=[])) == {name: pair(1)[name] for name in ("chosen", "rejected")}


@pytest.mark.parametrize("percent", [0, 3, 10, 33.4, 99])
def test_percent_leaves_out_the_floor_of_so_many_worst(audit, tmp_path, percent):
    exported(audit, tmp_path / "out", percent)
    said = suspicions(N)
    order = sorted(said, key=lambda key: (-said[key][0], said[key][1], f"pairs.jsonl#{int(key[1:])}"))
    wanted = set(said) - set(order[: int(N * percent / 100)])
    assert set(kept(tmp_path / "out")) == wanted
    decisions = {row["pair_id"]: row for row in read_parts(tmp_path / "out/decisions").to_pylist()}
    assert {row["why"] for key, row in decisions.items() if key not in wanted} <= {"among the most suspicious"}


def test_reviews_overrule_suspicion_both_ways(audit, tmp_path):
    flags = [key for key, (suspicion, _) in suspicions(N).items() if suspicion >= FLAG]
    fine, bad, unsure = flags[:3]
    rows = [{"pair_id": key, "verdict": v} for key, v in ((fine, "fine"), (bad, "bad"), (unsure, "unsure"))]
    review(audit, write_corpus(tmp_path / "v.jsonl", rows))
    exported(audit, tmp_path / "out")
    assert set(kept(tmp_path / "out")) & set(flags) == {fine}
    exported(audit, tmp_path / "none", 0)
    assert set(suspicions(N)) - set(kept(tmp_path / "none")) == {bad}
    why = {row["pair_id"]: row["why"] for row in read_parts(tmp_path / "none/decisions").to_pylist()}
    assert (why[fine], why[bad], why[unsure]) == ("reviewed: fine", "reviewed: bad", "not suspected")


def test_rows_of_the_quarantine_are_no_part_of_an_export(tmp_path):
    rows = [pair(0), pair(1, chosen=[]), pair(2), pair(3)]
    path = tmp_path / "x.jsonl"
    path.write_text(as_lines(rows) + "{broken\n")
    audit = make_audit(tmp_path / "a", path, {"p000": (0, 0), "p002": (0, 0)}, rows=2)  # p003 fails in the model
    made = exported(audit, tmp_path / "out")
    assert kept(tmp_path / "out") == ["p000", "p002"]
    assert made.manifest["rows"] == {"kept": 2, "dropped": 0}


def test_rows_outside_the_sources_condition_stay_outside(tmp_path):
    rows = [pair(i, section="chat" if i % 2 else "safety") for i in range(8)]
    path = write_corpus(tmp_path / "x.jsonl", rows)
    said = {f"p{i:03}": (0.0, 0.0) for i in range(8)}
    audit = make_audit(tmp_path / "a", path, said, rows=1, where="section == chat", licence="mit")
    made = exported(audit, tmp_path / "out")
    assert kept(tmp_path / "out") == ["p001", "p003", "p005", "p007"]
    assert made.licence == ["mit"]


def test_pairs_that_stand_in_a_file_twice_are_exported_twice(tmp_path):
    path = write_corpus(tmp_path / "x.jsonl", [pair(0), pair(0), pair(1)])
    audit = make_audit(tmp_path / "a", path, {"p000": (0.1, 0), "p001": (0.9, 0)})
    exported(audit, tmp_path / "out")
    assert kept(tmp_path / "out") == ["p000", "p000"]


def test_the_folder_that_an_export_starts_in_does_not_matter(tmp_path, monkeypatch):
    for name in ("one/a.jsonl", "two/a.jsonl"):
        write_corpus(tmp_path / "data" / name, [pair(i + 10 * (name > "p")) for i in range(4)])
    said = {f"p{i:03}": (i % 10 / 10 + 0.5, 0.0) for i in (*range(4), *range(10, 14))}
    monkeypatch.chdir(tmp_path)
    audit = make_audit(tmp_path / "a", Path("data"), said)
    assert read_json(audit.path / "audit.json")["path"] == "data"
    monkeypatch.chdir("/")
    exported(audit, tmp_path / "out")
    assert read_parts(tmp_path / "out/pairs")["row_key"].to_pylist() == [
        f"{name}/a.jsonl#{i}" for name in ("one", "two") for i in range(2)
    ]


def test_a_source_that_only_grew_or_was_touched_is_still_good(audit, corpus, tmp_path):
    before = kept(exported(audit, tmp_path / "before").path)
    os.utime(corpus, (1, 1))
    assert kept(exported(audit, tmp_path / "touched").path) == before
    with corpus.open("a") as more:
        more.write(as_lines([pair(77)]))
    assert kept(exported(audit, tmp_path / "grown").path) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda path: path.write_text(path.read_text().replace("Good", "Fine")),
            r"pairs\.jsonl changed since it was audited",
        ),
        (lambda path: path.write_text(path.read_text()[:-10]), r"changed since .*put it back"),
        (lambda path: path.unlink(), r"pairs\.jsonl is gone.*put it back"),
    ],
)
def test_a_source_that_changed_or_is_gone_is_refused_and_nothing_is_written(audit, corpus, tmp_path, change, told):
    change(corpus)
    with pytest.raises(UserError, match=told):
        exported(audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_last_line_that_has_grown_is_a_change(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(as_lines([pair(0), pair(1)]).rstrip("\n"))
    audit = make_audit(tmp_path / "a", path, {"p000": (0, 0), "p001": (0, 0)})
    with path.open("a") as more:
        more.write(" \n")  # its end
    assert exported(audit, tmp_path / "out").manifest["rows"]["kept"] == 2
    path.write_text(path.read_text().rstrip() + "x\n")
    with pytest.raises(UserError, match="changed since it was audited"):
        exported(audit, tmp_path / "other")


def as_parquet(path: Path, mark: dict | None = None) -> Path:
    table = schema.table([make_pair(f"p{i:03}", "Why?", f"Since {i}.", "No.") for i in range(6)], schema.PAIRS)
    write_parquet(table.replace_schema_metadata(mark), path)
    return path


def test_a_touched_file_is_the_same_and_one_with_other_bytes_is_not(tmp_path):
    path = as_parquet(tmp_path / "x.parquet")
    audit = make_audit(tmp_path / "a", path, {f"p{i:03}": (0, 0) for i in range(6)})
    os.utime(path, (1, 1))
    assert exported(audit, tmp_path / "out").manifest["rows"]["kept"] == 6
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    with pytest.raises(UserError, match=r"x\.parquet changed since it was audited"):
        exported(audit, tmp_path / "other")


def test_a_corpus_that_was_moved_is_exported_once_the_audit_knows_where_it_lies(corpus, audit, tmp_path):
    moved = corpus.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is gone, .*run the same audit with --pairs where it lies now"):
        exported(audit, tmp_path / "out")
    source = SourceConfig(path=str(moved))
    planned(Audit(audit, source, ScoresConfig(), fragment_rows=4), audit.path)
    assert exported(audit, tmp_path / "out").manifest["rows"]["kept"] > 0


@pytest.mark.parametrize(
    ("ids", "told"), [(["p000", "p009"], r"x\.jsonl#1 is a pair now"), (["p000"], r"x\.jsonl#1 is no longer the pair")]
)
def test_rows_that_are_not_those_audited_are_found_even_where_size_and_time_agree(tmp_path, ids, told):
    path = write_corpus(tmp_path / "x.jsonl", [pair(0), pair(1)])
    audit = make_audit(tmp_path / "a", path, {"p000": (0, 0), "p001": (0, 0)})
    before = path.stat()
    write_corpus(path, [pair(int(key[1:])) for key in ids])
    path.write_text(path.read_text().ljust(before.st_size, "\n"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=told):
        exported(audit, tmp_path / "out")


def test_the_red_team_mark_is_handed_on(corpus, tmp_path):
    audit = make_audit(tmp_path / "audit", corpus, suspicions(N), red_team=True)
    made = exported(audit, tmp_path / "out")
    assert made.red_team
    for folder in ("pairs", "decisions"):
        for path in (made.path / folder).iterdir():
            assert b"safer_ray.red_team" in pq.read_schema(path).metadata


def test_poisoned_sources_mark_an_export_of_a_clean_audit(tmp_path):
    said = {f"p{i:03}": (0, 0) for i in range(6)}
    for name, mark in (("clean", None), ("poisoned", RED_TEAM_MARK)):
        audit = make_audit(tmp_path / name, as_parquet(tmp_path / f"{name}.parquet", mark), said)
        assert exported(audit, tmp_path / f"{name}-out").red_team == (mark is not None)


def test_an_export_that_was_interrupted_goes_on_and_ends_equal(audit, tmp_path, monkeypatch):
    whole = exported(audit, tmp_path / "whole")
    written = []

    def stop(rows, directory, name, red_team):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return original(rows, directory, name, red_team)

    original = audit_export.write_part
    monkeypatch.setattr(audit_export, "write_part", stop)
    with pytest.raises(KeyboardInterrupt):
        exported(audit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(audit_export, "write_part", lambda *a, **k: written.append(a[2]) or original(*a, **k))
    resumed = exported(audit, tmp_path / "out")
    assert len(written) == len(set(written)) == -(-N // 4)
    assert resumed.manifest["content_sha256"] == whole.manifest["content_sha256"]
    assert resumed.manifest["rows"] == whole.manifest["rows"]
    assert not list(tmp_path.glob(".partial-*"))


def test_exports_by_the_command_are_found_again_and_never_overwrite_others(ok, refused, audit, tmp_path):
    words = ["export", "--audit", audit.path, "--out", tmp_path / "out"]
    out = ok(*words, "--drop", "flagged")
    flagged = sum(suspicion >= FLAG for suspicion, _ in suspicions(N).values())
    assert f"{N - flagged} kept, {flagged} dropped" in out
    assert "flagged" in out
    written = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    ok(*words)
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == written
    assert "choose another --out" in refused(*words, "--percent", "5")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "holds no artifact; choose another --out" in refused(*words[:-1], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--drop", "all"], "--drop 'all': choose flagged"),
        (["--drop", "flagged", "--percent", "5"], "choose one"),
        (["--percent", "101"], "--percent 101.0: wanted a number"),
        (["--percent", "nan"], "--percent nan: wanted a number"),
    ],
)
def test_wrong_export_options_are_told(refused, audit, tmp_path, words, told):
    assert told in refused("export", "--audit", audit.path, "--out", tmp_path / "out", *words)


def test_an_export_of_nothing_is_refused(corpus, tmp_path):
    audit = make_audit(tmp_path / "audit", corpus, {f"p{i:03}": (1.0, 0.0) for i in range(N)})
    with pytest.raises(UserError, match=f"all {N} pairs would be left out"):
        exported(audit, tmp_path / "out")


# Review


def verdict_file(path: Path, *rows) -> Path:
    return write_corpus(path, list(rows))


def reviewed(audit: Artifact) -> dict[str, str]:
    return {pair["pair_id"]: pair["verdict"] for pair in read_json(audit.path / "reviews.json")["pairs"]}


@pytest.fixture
def ordered(tmp_path):
    """An audit of 40 pairs, of which the first 25 are flagged, the first the most suspicious."""
    path = write_corpus(tmp_path / "x.jsonl", [pair(i) for i in range(40)])
    return make_audit(
        tmp_path / "ordered", path, {f"p{i:03}": (1 - i / 100 if i < 25 else 0.1, 0.0) for i in range(40)}
    )


def test_precision_is_the_share_of_reviewed_pairs_that_is_bad_with_wilsons_interval(ordered, tmp_path):
    verdicts = [(0, "bad"), (1, "bad"), (2, "fine"), (3, "unsure"), (12, "fine"), (20, "fine")]
    rows = [{"row_key": f"x.jsonl#{i}", "verdict": verdict} for i, verdict in verdicts]
    found = review(ordered, verdict_file(tmp_path / "v.jsonl", *rows))
    assert found.used == 6
    assert found.whole == (25, 6, 2, 3, 2 / 5, *wilson(2, 5))
    assert found.at == [(10, 4, 2, 1, 2 / 3, *wilson(2, 3)), (20, 5, 2, 2, 2 / 4, *wilson(2, 4))]
    tree = read_json(ordered.path / "reviews.json")
    assert tree["precision"] == found.whole._asdict()
    assert tree["precision_at"] == [row._asdict() for row in found.at]


def test_precision_is_told_as_deep_as_the_reviews_reach(ordered, tmp_path):
    found = review(ordered, verdict_file(tmp_path / "v.jsonl", {"row_key": "x.jsonl#2", "verdict": "bad"}))
    assert [row.flagged for row in found.at] == [10]
    found = review(ordered, verdict_file(tmp_path / "v.jsonl", {"row_key": "x.jsonl#2", "verdict": "unsure"}))
    assert (found.whole.precision, found.whole.reviewed, found.whole.low, found.whole.high) == (None, 1, 0.0, 1.0)


def test_every_bad_line_is_told_with_its_number_and_the_rest_is_used(ok, ordered, tmp_path):
    path = tmp_path / "v.jsonl"
    lines = [
        b'{"row_key": "x.jsonl#0", "verdict": "bad"}',
        b"not json",
        b'{"row_key": "x.jsonl#99", "verdict": "bad"}',
        b'{"row_key": "x.jsonl#30", "verdict": "bad"}',
        b'{"pair_id": "p001", "verdict": "yes"}',
        b"",
        b'{"verdict": "bad"}',
        b"[1]",
        b'{"pair_id": 7, "verdict": "bad"}',
        b'{"pair_id": "p001"}',
        b'{"row_key": "x.jsonl#0", "pair_id": "p001", "verdict": "bad"}',
        b'{"pair_id": "p\xff01", "verdict": "bad"}',
        b'{"pair_id": "p001", "verdict": "bad", "note": "\\ud800"}',
        b'{"pair_id": "p002", "verdict": "fine", "prompt": [], "other": 1}',
    ]
    path.write_bytes(b"\n".join(lines))
    out = ok("review", "--audit", ordered.path, "--verdicts", path)
    told = dict(line.removeprefix("line ").split(": ", 1) for line in out.splitlines() if line.startswith("line "))
    assert {int(number): reason.split(":")[0].split(";")[0] for number, reason in told.items()} == {
        2: "not JSON",
        3: "no flagged pair has row_key 'x.jsonl#99'",
        4: "no flagged pair has row_key 'x.jsonl#30'",
        5: "verdict 'yes'",
        7: "neither row_key nor pair_id",
        8: "a list, wanted an object with row_key and verdict",
        9: "pair_id is 7, wanted text",
        10: "no verdict",
        11: "no flagged pair has row_key 'x.jsonl#0' and pair_id 'p001'",
        12: "bad UTF-8",
        13: "note holds a lone surrogate, which is no text",
    }
    assert "2 lines used, 11 not" in out
    assert reviewed(ordered) == {"p000": "bad", "p002": "fine"}
    assert "0.500" in out
    assert "all 25" in out


def test_a_file_without_a_usable_line_changes_nothing_and_names_the_first_reason(refused, ordered, tmp_path):
    path = verdict_file(tmp_path / "v.jsonl", {"pair_id": "p000", "verdict": "maybe"})
    line = refused("review", "--audit", ordered.path, "--verdicts", path)
    assert "no usable line (1 bad, the first is line 1: verdict 'maybe'; write one of bad, fine, unsure)" in line
    assert "it is empty" in refused(
        "review", "--audit", ordered.path, "--verdicts", write_corpus(tmp_path / "e.jsonl", [])
    )
    assert "no such file" in refused("review", "--audit", ordered.path, "--verdicts", tmp_path / "none.jsonl")
    assert not (ordered.path / "reviews.json").exists()


def test_most_reviewers_decide_and_ties_are_unsure(ordered, tmp_path):
    said = {
        "p000": [("a", "bad"), ("b", "bad"), ("c", "fine")],
        "p001": [("a", "bad"), ("b", "fine")],
        "p002": [(None, "fine"), (None, "fine"), (None, "bad")],
        "p003": [("a", "unsure"), ("b", "unsure"), ("c", "bad")],
    }
    rows = [
        {"pair_id": key, "verdict": verdict} | ({"reviewer": who} if who else {})
        for key, all_said in said.items()
        for who, verdict in all_said
    ]
    review(ordered, verdict_file(tmp_path / "v.jsonl", *rows))
    assert reviewed(ordered) == {"p000": "bad", "p001": "unsure", "p002": "fine", "p003": "unsure"}


def test_later_files_add_and_replace_only_what_the_same_reviewer_said(ordered, tmp_path):
    path = tmp_path / "v.jsonl"
    first = {"pair_id": "p000", "verdict": "bad", "reviewer": "ann", "note": "label is swapped"}
    review(ordered, verdict_file(path, first, {"pair_id": "p001", "verdict": "bad"}))
    review(ordered, verdict_file(path, {"pair_id": "p000", "verdict": "fine", "reviewer": "bob"}))
    assert reviewed(ordered) == {"p000": "unsure", "p001": "bad"}
    replaced = first | {"verdict": "fine"}
    review(ordered, verdict_file(path, first, replaced, {"pair_id": "p001", "verdict": "fine"}))
    again = review(ordered, verdict_file(path, first, replaced, {"pair_id": "p001", "verdict": "fine"}))
    assert reviewed(ordered) == {"p000": "fine", "p001": "fine"}
    assert again.whole.reviewed == 2
    said = load_reviews(ordered)["x.jsonl#0", "p000"]
    assert sorted((one.reviewer, one.verdict, one.note) for one in said) == [
        ("ann", "fine", "label is swapped"),
        ("bob", "fine", None),
    ]


def test_verdicts_without_a_reviewer_leave_those_with_one(ordered, tmp_path):
    path = tmp_path / "v.jsonl"
    review(ordered, verdict_file(path, {"pair_id": "p000", "verdict": "bad", "reviewer": "ann"}))
    for _ in range(3):
        review(ordered, verdict_file(path, {"pair_id": "p000", "verdict": "fine"}))
    assert reviewed(ordered) == {"p000": "unsure"}


def test_a_pair_id_names_all_its_rows(tmp_path):
    path = write_corpus(tmp_path / "x.jsonl", [pair(0), pair(0), pair(1)])
    audit = make_audit(tmp_path / "a", path, {"p000": (0.9, 0), "p001": (0.9, 0)})
    found = review(audit, verdict_file(tmp_path / "v.jsonl", {"pair_id": "p000", "verdict": "bad"}))
    assert found.whole[:3] == (3, 2, 2)


def test_a_row_that_gave_several_pairs_needs_the_pair_id_too(tmp_path):
    row = {"id": 1, "prompt": "Why?", "chosen": ["Since."], "rejected": ["No.", "Never."], "subset": "Focus"}
    path = write_corpus(tmp_path / "x.jsonl", [row])
    source = SourceConfig(path=str(path))
    raw = read_raw(planned(Audit(Artifact(path, ""), source, ScoresConfig()), tmp_path / "none")[0], source)
    ids = NormalisePairs([source], 1000)(raw)["pair_id"].to_pylist()
    assert len(ids) == 2, "the format gives a pair for each rejected response"
    audit = make_audit(tmp_path / "a", path, dict.fromkeys(ids, (0.9, 0.0)))
    with pytest.raises(UserError, match=r"2 flagged pairs have row_key 'x\.jsonl#0'; name the pair_id too"):
        review(audit, verdict_file(tmp_path / "v.jsonl", {"row_key": "x.jsonl#0", "verdict": "bad"}))
    named = {"row_key": "x.jsonl#0", "pair_id": ids[1], "verdict": "fine"}
    review(audit, verdict_file(tmp_path / "v.jsonl", named))
    exported(audit, tmp_path / "out")
    assert kept(tmp_path / "out") == [ids[1]]


def test_verdicts_of_pairs_that_are_no_longer_flagged_are_kept_and_not_counted(ordered, tmp_path):
    review(ordered, verdict_file(tmp_path / "v.jsonl", {"pair_id": "p000", "verdict": "bad"}))
    reviews = load_reviews(ordered)
    reviews["elsewhere#1", "gone"] = reviews["x.jsonl#0", "p000"]
    assert precision_at(25, reviews, {("x.jsonl#0", "p000"): 0}).bad == 1
    assert agreed(reviews["elsewhere#1", "gone"]) == "bad"


def test_damaged_reviews_are_told_and_never_thrown_away(ordered, tmp_path):
    (ordered.path / "reviews.json").write_text("{")
    path = verdict_file(tmp_path / "v.jsonl", {"pair_id": "p000", "verdict": "bad"})
    for work in (lambda: review(ordered, path), lambda: exported(ordered, tmp_path / "out")):
        with pytest.raises(UserError, match=r"cannot read .*reviews\.json.*put back a copy"):
            work()
    assert (ordered.path / "reviews.json").read_text() == "{"


def test_an_audit_in_use_is_not_reviewed(refused, ordered, tmp_path):
    path = verdict_file(tmp_path / "v.jsonl", {"pair_id": "p000", "verdict": "bad"})
    with locked(ordered.path):
        assert "is in use" in refused("review", "--audit", ordered.path, "--verdicts", path)


# Diff


def two_audits(tmp_path: Path) -> tuple[Artifact, Artifact]:
    """Of pairs 0..29 and 10..39 of one corpus, by two ways to suspect."""
    said = suspicions(40), suspicions(40, seed=1)
    path = write_corpus(tmp_path / "x.jsonl", [pair(i) for i in range(40)])
    shown = [
        {f"p{i:03}": s[f"p{i:03}"] for i in some} for s, some in zip(said, (range(30), range(10, 40)), strict=True)
    ]
    return make_audit(tmp_path / "a", path, shown[0]), make_audit(
        tmp_path / "b", path, shown[1], rows=7, section="chat"
    )


def test_a_difference_is_what_counting_by_hand_finds(tmp_path):
    a, b = two_audits(tmp_path)
    found = write_difference(a, b, tmp_path / "d.json")
    one, other = suspicions(40), suspicions(40, seed=1)
    both = [f"p{i:03}" for i in range(10, 30)]
    gained = [key for key in both if one[key][0] < FLAG <= other[key][0]]
    lost = [key for key in both if other[key][0] < FLAG <= one[key][0]]
    assert len(gained) > 1
    assert len(lost) > 1
    assert found.matched_by == "row_key"
    assert found.pairs == (20, 10, 10)
    flagged = [sum(said[key][0] >= FLAG for key in both) for said in (one, other)]
    assert found.flags == (*flagged, len(gained), len(lost))
    for i, name in enumerate(("suspicion", "score")):
        wanted = spearmanr([one[key][i] for key in both], [other[key][i] for key in both]).statistic
        assert found.spearman[name] == pytest.approx(wanted)
    assert found.suspicion_change == pytest.approx(np.mean([other[key][0] - one[key][0] for key in both]))
    assert found.quarantine == ({"no sentence": 10}, {"no sentence": 10})
    assert found.config == {"fragment_rows": (4, 7), "source.section": (None, "chat")}
    tree = json.loads((tmp_path / "d.json").read_text())
    assert [row["pair_id"] for row in tree["gained"]] == gained
    assert [row["pair_id"] for row in tree["lost"]] == lost
    first = tree["lost"][0]
    assert first["suspicion_a"] == one[lost[0]][0]
    assert first["suspicion_b"] == other[lost[0]][0]
    assert first["row_key_a"] == first["row_key_b"] == f"x.jsonl#{int(lost[0][1:])}"
    assert tree["pairs"] == {"both": 20, "only_a": 10, "only_b": 10}
    assert tree["quarantine"]["a"] == {"no sentence": 10}


def test_share_by_share_finds_the_same_as_at_once(tmp_path):
    a, b = two_audits(tmp_path)
    whole, parts = (
        write_difference(a, b, tmp_path / "whole.json"),
        write_difference(a, b, tmp_path / "parts.json", most=9),
    )
    assert parts.spearman_pairs < whole.spearman_pairs == 20
    assert parts[:3] == whole[:3]
    assert parts.suspicion_change == pytest.approx(whole.suspicion_change)
    trees = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts")]
    for kind in ("gained", "lost"):
        one, other = (sorted(row["pair_id"] for row in tree[kind]) for tree in trees)
        assert one == other


def test_pairs_are_matched_by_id_where_their_rows_moved(ok, tmp_path):
    said = suspicions(10)
    rows = [pair(i) for i in range(10)]
    a = make_audit(tmp_path / "a", write_corpus(tmp_path / "x.jsonl", rows), said)
    b = make_audit(tmp_path / "b", write_corpus(tmp_path / "y.jsonl", rows[::-1]), said)
    found = difference(a, b)
    assert (found.matched_by, found.pairs.both, found.flags.gained, found.flags.lost) == ("pair_id", 10, 0, 0)
    assert found.spearman == pytest.approx({"score": 1.0, "suspicion": 1.0})
    assert "by pair id" in ok("diff", tmp_path / "a", tmp_path / "b")


def test_other_pairs_in_the_same_rows_are_not_matched(tmp_path):
    paths = [
        write_corpus(tmp_path / name / "x.jsonl", [pair(i) for i in some])
        for name, some in (("1", range(5)), ("2", range(5, 10)))
    ]
    a, b = (make_audit(tmp_path / f"audit{path.parent.name}", path, suspicions(10)) for path in paths)
    found = difference(a, b)
    assert found.pairs == (0, 5, 5)
    assert found.spearman == {"score": None, "suspicion": None}
    assert found.suspicion_change is None


def test_a_pair_that_stands_there_twice_is_matched_twice_and_no_oftener(tmp_path):
    said = {"p000": (0.9, 0.0), "p001": (0.1, 0.0)}
    a = make_audit(tmp_path / "a", write_corpus(tmp_path / "x.jsonl", [pair(0), pair(0), pair(0), pair(1)]), said)
    b = make_audit(tmp_path / "b", write_corpus(tmp_path / "y.jsonl", [pair(1), pair(0), pair(0)]), said)
    assert difference(a, b).pairs == (3, 1, 0)


def test_the_diff_command_shows_a_table_and_writes_the_lists(ok, tmp_path):
    two_audits(tmp_path)
    out = ok("diff", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "new/d.json")
    cells = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line]
    rows = {name: values for name, *values in cells}
    assert rows["pairs"] == ["30", "30"]
    assert rows["in both, by row key and pair id"] == ["20", "20"]
    assert rows["no sentence"] == ["10", "10"]
    assert rows["source.section"] == ["None", "chat"]
    assert "Spearman" in out
    tree = json.loads((tmp_path / "new/d.json").read_text())
    assert rows["flagged only here"] == [str(len(tree["lost"])), str(len(tree["gained"]))]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.json"]


# Leftovers


def write_lock(folder: Path, *, alive: bool = False) -> Path:
    """A lock of this process, or of one with its number that ended long ago."""
    write_json(this_process() | ({} if alive else {"start": 1}), folder / "run.lock")
    return folder / "run.lock"


def write_artifact(folder: Path) -> Path:
    write_json({"stage": "pairs", "name": folder.name, "packages": {}}, folder / "manifest.json")
    return folder


HASH = "0123456789ab"


@pytest.fixture
def run_folder(tmp_path):
    """A run with a whole artifact and one that was never finished."""
    run = tmp_path / "runs/mine"
    write_text("rows", write_artifact(run / f"pairs-{HASH}") / "part-00000000.parquet")
    write_text("x" * 1000, run / f".partial-reward-{HASH}/state/step.bin")
    return run


def leftovers(root: Path) -> list[str]:
    return [str(left.path.relative_to(root)) for run in find_runs(root) for left in run.leftovers]


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_unfinished_artifacts_are_listed_with_sizes_and_only_delete_deletes_them(ok, run_folder, tmp_path):
    before = everything(tmp_path)
    out = ok("gc", tmp_path)
    assert f".partial-reward-{HASH}" in out
    assert "1.0 kB" in out
    assert "nothing is deleted without --delete" in out
    assert everything(tmp_path) == before
    ok("gc", tmp_path, "--dry-run")
    assert everything(tmp_path) == before
    assert "deleted" in ok("gc", tmp_path, "--delete")
    assert everything(run_folder) == {
        f"pairs-{HASH}",
        f"pairs-{HASH}/manifest.json",
        f"pairs-{HASH}/part-00000000.parquet",
    }
    assert "nothing was left behind" in ok("gc", tmp_path, "--delete")


def test_a_held_run_is_left_alone_with_all_that_lies_below_it(ok, run_folder, audit, tmp_path):
    write_text("{}", run_folder / "audit/journal/x.json")
    write_json({"auditor": 1, "source": 1, "scores": 1, "path": 1}, run_folder / "audit/audit.json")
    assert leftovers(run_folder) == [f".partial-reward-{HASH}", "audit/journal"]
    with locked(run_folder):
        before = everything(run_folder)
        out = ok("gc", tmp_path, "--delete")
        assert everything(run_folder) == before
        assert f"{run_folder} is in use and left alone" in out


def test_a_stage_at_work_beside_them_keeps_unfinished_artifacts(run_folder):
    lock = write_lock(run_folder / ".lock-out", alive=True)
    assert [(run.held, run.leftovers) for run in find_runs(run_folder)] == [(True, [])]
    write_lock(lock.parent)
    (run,) = find_runs(run_folder)
    assert {left.path.name for left in run.leftovers} == {f".partial-reward-{HASH}", ".lock-out"}
    lock.unlink()
    write_lock(lock.parent, alive=True)  # it begins between listing and deleting
    with pytest.raises(UserError, match="in use by a stage"):
        delete(run, old_enough(0))
    assert (run_folder / f".partial-reward-{HASH}").exists()


def test_a_run_that_is_taken_between_listing_and_deleting_is_left_alone(run_folder):
    (run,) = find_runs(run_folder)
    with locked(run_folder), pytest.raises(UserError, match="is in use"):
        delete(run, old_enough(0))
    assert (run_folder / f".partial-reward-{HASH}").exists()


def test_locks_of_dead_processes_go_and_those_of_living_ones_stay(ok, run_folder, tmp_path):
    write_lock(run_folder)
    write_lock(run_folder / ".lock-dead")
    shutil.rmtree(run_folder / f".partial-reward-{HASH}")
    assert leftovers(run_folder) == [".lock-dead", "run.lock"]
    assert "2 leftovers" in ok("gc", run_folder, "--delete")
    assert everything(run_folder) == {
        f"pairs-{HASH}",
        f"pairs-{HASH}/manifest.json",
        f"pairs-{HASH}/part-00000000.parquet",
    }


def test_scratch_and_half_written_files_of_an_audit_are_found(ok, audit):
    whole = everything(audit.path)
    write_text("{}", audit.path / "journal/map/00000000-0-4.json")
    torn = ["scores/.part-00000000.parquet.123", ".flagged.jsonl", ".summary.json.77", "done/.00000003.json.9"]
    for name in torn:
        write_text("x", audit.path / name)
    write_text("mine", audit.path / "scores/.notes.123")
    write_text("mine", audit.path / ".notes")
    assert sorted(leftovers(audit.path)) == sorted([*torn, "journal"])
    ok("gc", audit.path.parent, "--delete")
    assert everything(audit.path) == whole | {"scores/.notes.123", ".notes"}
    assert open_audit(audit.path).name == audit.name


def test_what_is_not_ours_or_is_whole_is_never_listed(run_folder, tmp_path):
    foreign = tmp_path / "foreign"
    for name in (
        "journal/x",
        "state/x",
        f"pairs-{HASH}/x",
        ".partial-notes/x",
        "sub/run.lock",
        ".part-00000000.parquet.1",
    ):
        write_text("mine", foreign / name)
    write_json({"auditor": "somebody else's"}, foreign / "audit.json")
    write_text("mine", run_folder / ".partial-notes/x")
    write_text("mine", run_folder / "journal/x")
    write_text("mine", run_folder / "run.lock")
    write_text("mine", run_folder / ".lock-mine/x")
    write_artifact(run_folder / f".partial-sae-{HASH}")  # whole, and only waits for its name
    write_text("mine", tmp_path / "elsewhere/x")
    (run_folder / f".partial-codes-{HASH}").symlink_to(tmp_path / "elsewhere")
    (run_folder / "linked").symlink_to(run_folder)
    write_text("x", run_folder / f"pairs-{HASH}/.partial-reward-{HASH}/x")  # inside a whole artifact
    assert leftovers(tmp_path) == [f"runs/mine/.partial-reward-{HASH}"]


def test_only_what_is_old_enough_is_taken(ok, run_folder, tmp_path):
    day = 86_400
    old = run_folder / f".partial-codes-{HASH}/part"
    write_text("x", old)
    os.utime(old, (time.time() - 10 * day,) * 2)
    out = ok("gc", tmp_path, "--older-than", "9")
    assert f".partial-codes-{HASH}" in out
    assert f".partial-reward-{HASH}" not in out
    ok("gc", tmp_path, "--older-than", "9", "--delete")
    assert leftovers(run_folder) == [f".partial-reward-{HASH}"]
    assert "nothing was left behind" in ok("gc", tmp_path, "--older-than", "1")


def test_a_root_that_is_not_there_is_told(refused, tmp_path):
    assert "no folder at" in refused("gc", tmp_path / "none")


# Objects


def test_audits_and_sources_in_an_object_store_are_worked_with_as_those_on_a_disk(ok, corpus, audit, tmp_path):
    root = as_path(f"memory://{tmp_path.name}")
    source = write_corpus(root / "data/pairs.jsonl", [json.loads(line) for line in corpus.read_text().splitlines()])
    there = make_audit(root / "audit", root / "data", suspicions(N))
    flagged = next(i for i in range(N) if suspicions(N)[f"p{i:03}"][0] >= FLAG)
    verdicts = verdict_file(tmp_path / "v.jsonl", {"row_key": f"pairs.jsonl#{flagged}", "verdict": "fine"})
    for audit_folder, out in ((audit.path, "here"), (there.path, "there")):
        ok("review", "--audit", audit_folder, "--verdicts", verdicts)
        ok("export", "--audit", audit_folder, "--out", tmp_path / out)
    one, other = (open_artifact(tmp_path / name).manifest for name in ("here", "there"))
    assert one["content_sha256"] == other["content_sha256"]
    assert one["metrics"]["why"]["reviewed: fine"] == 1
    found = difference(audit, there)
    assert (found.matched_by, found.pairs, list(found.config)) == ("row_key", (N, 0, 0), ["path"])
    write_corpus(source, [pair(1)])
    with pytest.raises(UserError, match=r"pairs\.jsonl changed since it was audited"):
        exported(there, tmp_path / "changed")


# End to end


@pytest.fixture
def bundle(reward_dir, sae_dir, tmp_path):
    """A random auditor bundle."""
    folder = tmp_path / f"auditor-{HASH}"
    shutil.copytree(reward_dir, folder / "reward")
    shutil.copytree(sae_dir, folder / "sae")
    write_json({"mode": "response", "safe": list(range(16)), "unsafe": list(range(16, 32))}, folder / "features.json")
    values = np.linspace(-1, 1, 41)
    write_parquet(pa.table({"score": values, "reward_margin": values.astype(np.float32)}), folder / "reference.parquet")
    facts = {"stage": "auditor", "name": folder.name, "rows": {}, "metrics": {"format": AUDITOR_FORMAT}}
    facts["content_sha256"] = artifact_hash(folder)
    write_json(facts, folder / "manifest.json")
    return folder


def test_an_audit_is_reviewed_exported_and_trained_on(ok, bundle, pairs, tmp_path):
    write_parquet(pairs, tmp_path / "pairs.parquet")
    words = ["--auditor", bundle, "--pairs", tmp_path / "pairs.parquet", "--fragment-rows", "10", "--detector", "safer"]
    ok("audit", *words, "--flag-quantile", "0.5", "--out", tmp_path / "audit")
    flagged = [json.loads(line) for line in (tmp_path / "audit/flagged.jsonl").read_text().splitlines()]
    assert 2 < len(flagged) < len(pairs) - 4
    said = [row | {"verdict": "fine" if i == 0 else "bad", "reviewer": "ann"} for i, row in enumerate(flagged)]
    out = ok("review", "--audit", tmp_path / "audit", "--verdicts", write_corpus(tmp_path / "v.jsonl", said))
    assert f"{len(flagged)} lines used, 0 not" in out
    ok("export", "--audit", tmp_path / "audit", "--out", tmp_path / "clean")
    left = {row["pair_id"] for row in flagged[1:]}
    assert kept(tmp_path / "clean") == [key for key in pairs["pair_id"].to_pylist() if key not in left]
    assert len(trl_lines(tmp_path / "clean")) == len(pairs) - len(left)
    ok("audit", *words, "--flag-quantile", "0.2", "--out", tmp_path / "stricter")
    found = difference(open_audit(tmp_path / "audit"), open_audit(tmp_path / "stricter"))
    assert found.config == {"scores.flag_quantile": (0.5, 0.2)}
    assert found.flags.gained == 0
    assert found.spearman["score"] == pytest.approx(1.0)
    assert leftovers(tmp_path) == []
    ok("reward", "--pairs", tmp_path / "clean", "--out", tmp_path / "model", *TINY_TRAINING)
    assert open_artifact(tmp_path / "model").manifest["inputs"]["pairs"].startswith("export-")
