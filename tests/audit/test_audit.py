"""An audit: every row ends once, in the scores or in the quarantine, whatever came before and whatever came since."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_1samp, uniform
from support.ray_processes import wait_until
from support.tiny_run import finished

from safer_ray import schema
from safer_ray.audit.estimate import estimate
from safer_ray.audit.parts import AUDITED, BINS, figures_of, flagged_line, from_tree, sum_figures, to_tree
from safer_ray.audit.run import Audit, audit_corpus, check_accounts
from safer_ray.audit.score import AuditPairs
from safer_ray.audit.summary import close_audit, drift
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline.runner import ENDED, Counts, LocalRunner
from safer_ray.storage.artifacts import Artifact, read_parts, read_plan
from safer_ray.storage.files import read_json, write_json, write_parquet
from safer_ray.storage.quarantine import quarantine_rows

ROWS = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def bundle(made) -> Artifact:
    return made.artifacts["auditor"]


@pytest.fixture(scope="module")
def lines(made) -> list[str]:
    """Rows that can be used, as the corpus has them."""
    found = (made.artifacts["corpus"].path / "train.jsonl").read_bytes().splitlines()
    known = {key: int(at.rpartition("#")[2]) for key, at in _keys(read_parts(made.artifacts["pairs"].path))}
    return [f"{found[position].decode()}\n" for position in known.values()]


def _keys(pairs: pa.Table) -> list[tuple[str, str]]:
    return [(row["pair_id"], row["row_key"]) for row in pairs.select(["pair_id", "row_key"]).to_pylist()]


def audit_of(bundle: Artifact, path: Path, **more) -> Audit:
    return Audit(bundle, SourceConfig(path=str(path)), ScoresConfig(flag_quantile=0.3), fragment_rows=20, **more)


def run(audit: Audit, out: Path) -> dict:
    out.mkdir(exist_ok=True)
    counts = audit_corpus(audit, out, LocalRunner())
    return close_audit(audit, out, counts, 1.0)


def is_marked_in(path: Path) -> bool:
    return b"safer_ray.red_team" in (pq.read_schema(path).metadata or {})


def scores_in(out: Path) -> pa.Table:
    return read_parts(out / "scores")


@pytest.fixture
def corpus(lines, tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(lines[:ROWS]), encoding="utf-8")
    return path


def test_every_row_is_scored_as_the_bundle_scores_it_alone(bundle, made, corpus, tmp_path):
    summary = run(audit_of(bundle, corpus), tmp_path / "out")
    found = scores_in(tmp_path / "out")
    assert found.schema.remove_metadata() == schema.SCORES.append(pa.field("red_team", pa.bool_()))
    assert summary["rows"] == {"read": ROWS, "scored": ROWS, "quarantined": 0}
    pairs = read_parts(made.artifacts["pairs"].path)
    wanted = AuditPairs(bundle, ScoresConfig(flag_quantile=0.3))(pairs)
    place = {key: i for i, key in enumerate(wanted["pair_id"].to_pylist())}
    wanted = wanted.take([place[key] for key in found["pair_id"].to_pylist()])
    rank = 1 / len(read_parts(made.artifacts["scores"].path))  # these pairs are the reference: ties fall to either side
    for name, tolerance in (("score", 1e-5), ("reward_margin", 1e-5), ("suspicion", rank)):
        np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), rtol=1e-5, atol=tolerance)
    assert found["row_key"].to_pylist() == [f"pairs.jsonl#{i}" for i in range(ROWS)]


def test_flagged_pairs_are_listed_with_texts_and_the_sentences_that_decided(bundle, corpus, tmp_path):
    summary = run(audit_of(bundle, corpus), tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out/flagged.jsonl").read_text().splitlines()]
    flagged = scores_in(tmp_path / "out").filter(pa.compute.field("flag"))
    assert len(listed) == summary["flagged"] == len(flagged) > 0
    assert [row["row_key"] for row in listed] == flagged["row_key"].to_pylist()
    source = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in listed:
        own = source[int(row["row_key"].rpartition("#")[2])]
        texts = {side: "\n".join(message["content"] for message in row[side]) for side in schema.SIDES}
        assert own["id"] == row["pair_id"]
        for reason in row["reasons"]:
            prompt = "".join(message["content"] for message in row["prompt"])
            assert reason["sentence"]
            assert reason["sentence"] in texts[reason["side"]] or reason["sentence"] in prompt
    page = (tmp_path / "out/report.html").read_text()
    assert listed[0]["pair_id"] in page or len(listed) > 20
    assert "<script" not in page


def test_what_is_there_is_not_done_again(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    first = run(audit_of(bundle, corpus), out)
    before = {path: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    assert run(audit_of(bundle, corpus), out) == first
    assert {path: path.stat().st_mtime_ns for path in (out / "scores").iterdir()} == before
    assert not (out / "journal").exists()


def test_a_corpus_that_grows_is_audited_where_it_is_new(bundle, lines, corpus, tmp_path):
    out = tmp_path / "out"
    folder = corpus.parent / "corpus"
    folder.mkdir()
    corpus = Path(shutil.move(corpus, folder / "a.jsonl"))
    run(audit_of(bundle, folder), out)
    old = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir()}
    with corpus.open("a", encoding="utf-8") as more:
        more.write("".join(lines[ROWS : ROWS + 25]))
    (folder / "b.jsonl").write_text("".join(lines[ROWS + 25 : ROWS + 30]), encoding="utf-8")
    grown = run(audit_of(bundle, folder), out)
    assert grown["rows"]["scored"] == ROWS + 30
    assert {name: (out / "scores" / name).stat().st_mtime_ns for name in old} == old
    at_once = run(audit_of(bundle, folder), tmp_path / "again")
    key = [("row_key", "ascending")]
    one, other = (scores_in(at).sort_by(key) for at in (out, tmp_path / "again"))
    assert one["row_key"].to_pylist() == other["row_key"].to_pylist()
    np.testing.assert_allclose(one["score"].to_numpy(), other["score"].to_numpy(), rtol=1e-5, atol=1e-5)
    assert at_once["rows"] == grown["rows"]
    os.utime(corpus)  # touched, not changed
    assert run(audit_of(bundle, folder), out) == grown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_text(path.read_text().replace("e", "a")), "pairs.jsonl changed since it was planned"),
        (lambda path: path.write_text(path.read_text()[:-200]), "changed since it was planned"),
        (lambda path: path.write_text(path.read_text() + "{}\n" * 3 + '{"a": 1}'), None),
    ],
)
def test_a_corpus_that_changes_otherwise_is_refused_and_named(bundle, corpus, tmp_path, change, told):
    out = tmp_path / "out"
    run(audit_of(bundle, corpus), out)
    change(corpus)
    if told is None:
        assert run(audit_of(bundle, corpus), out)["rows"]["quarantined"] == 4
        corpus.write_text(corpus.read_text() + "y\n")  # behind a last line that was whole
        told = "its last line has grown"
    with pytest.raises(UserError, match=told):
        run(audit_of(bundle, corpus), out)


def test_another_question_is_refused_and_what_differs_is_named(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    run(audit_of(bundle, corpus), out)
    other = audit_of(bundle, corpus)._replace(scores=ScoresConfig(flag_quantile=0.1))
    with pytest.raises(UserError, match=r"another scores.flag_quantile: 0.3 then, 0.1 now"):
        run(other, out)
    with pytest.raises(UserError, match="another fragment_rows: 20 then, 30 now"):
        run(audit_of(bundle, corpus)._replace(fragment_rows=30), out)
    with pytest.raises(UserError, match="another auditor"):
        run(audit_of(bundle, corpus)._replace(auditor=Artifact(bundle.path, "auditor-x", bundle.manifest)), out)
    counts = audit_corpus(other, out, LocalRunner(), fresh=True)
    assert counts.written == ROWS


def test_a_file_that_is_gone_is_missed_only_while_its_rows_are(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    (corpus.parent / "other.jsonl").write_text(corpus.read_text())
    both = audit_of(bundle, corpus.parent / "*.jsonl")
    run(both, out)
    corpus.unlink()
    assert run(both, out)["rows"]["read"] == 2 * ROWS
    (out / "done/00000000.json").unlink()
    (corpus.parent / "other.jsonl").rename(corpus)
    with pytest.raises(UserError, match=r"other.jsonl is gone, and not all of its rows are audited"):
        run(both, out)


def test_rows_of_no_use_are_in_the_quarantine_and_the_accounts_close(bundle, lines, tmp_path):
    bad = [
        '{"prompt": 3',
        "[1, 2]",
        '{"chosen": "a"}',
        '{"prompt": "p", "chosen": "", "rejected": "x"}',
        "\x00\x00",
        '"\\ud800"',
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("".join(lines[:10]).encode() + "\n".join(bad).encode() + b"\n\xff\xfe{}\n" + b"[" * 5000 + b"\n")
    summary = run(audit_of(bundle, path), tmp_path / "out")
    assert summary["rows"] == {"read": 18, "scored": 10, "quarantined": 8}
    refused = quarantine_rows(tmp_path / "out").to_pylist()
    assert sorted(row["position"] for row in refused) == list(range(10, 18))
    assert all(row["reason"] for row in refused)


def test_a_corpus_without_one_usable_row_fails_with_the_commonest_reason(bundle, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("[]\n" * 5 + "x\n")
    with pytest.raises(SaferError, match=r"none of 6 rows could be scored, most: '.*'"):
        run(audit_of(bundle, path), tmp_path / "out")
    assert len(quarantine_rows(tmp_path / "out")) == 6


def test_accounts_that_do_not_close_are_told(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    run(audit_of(bundle, corpus), out)
    fragments = read_plan(out / "plan.parquet")
    part = out / "scores/part-00000001.parquet"
    write_parquet(read_parts(out / "scores").slice(20, 19), part)
    with pytest.raises(SaferError, match=r"do not close in 1 of 3 fragments \(fragment 1: 20 rows read, 19 scored"):
        check_accounts(out, fragments, Counts(60, 60, 0, {}))
    (out / "done/00000002.json").unlink()
    with pytest.raises(SaferError, match="in 2 of 3 fragments"):
        check_accounts(out, fragments, Counts(60, 60, 0, {}))


@pytest.mark.parametrize("step", ["read", "map"])
def test_a_pair_that_processes_were_lost_at_is_scored_as_any_other(bundle, corpus, tmp_path, step):
    audit = audit_of(bundle, corpus)._replace(fragment_rows=1)
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:3]))
    wanted = run(audit, tmp_path / "undisturbed")
    out = tmp_path / "out"
    write_json(read_json(tmp_path / "undisturbed/audit.json"), out / "audit.json")
    write_json([ENDED] * 3, out / f"journal/{step}/00000001-0-1.json")
    found = run(audit, out)
    assert found["rows"] == wanted["rows"] == {"read": 3, "scored": 3, "quarantined": 0}
    for name in ("score", "reward_margin"):
        np.testing.assert_allclose(
            scores_in(out)[name].to_numpy(), scores_in(tmp_path / "undisturbed")[name].to_numpy(), rtol=1e-5, atol=1e-5
        )


def test_rows_of_no_planned_fragment_are_told(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    run(audit_of(bundle, corpus), out)
    strange = out / "scores/part-00000009.parquet"
    strange.write_bytes((out / "scores/part-00000000.parquet").read_bytes())
    with pytest.raises(SaferError, match=rf"^{strange} is of no planned fragment"):
        run(audit_of(bundle, corpus), out)


@pytest.mark.parametrize("size", [0, 100])
def test_an_empty_or_torn_part_is_named_with_the_remedy(bundle, corpus, tmp_path, size):
    out = tmp_path / "out"
    run(audit_of(bundle, corpus), out)
    part = out / "scores/part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:size])
    message = rf"^corrupt artifact: {part}: .*; delete it and {out}/done/00000001.json, then run the same command again"
    with pytest.raises(UserError, match=message):
        run(audit_of(bundle, corpus), out)
    part.unlink()
    (out / "done/00000001.json").unlink()
    assert run(audit_of(bundle, corpus), out)["rows"]["scored"] == ROWS


def test_a_folder_of_something_else_is_left_alone(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_json({"mine": 1}, out / "summary.json")
    with pytest.raises(UserError, match=r"holds summary\.json, but no audit"):
        run(audit_of(bundle, corpus), out)
    assert read_json(out / "summary.json") == {"mine": 1}


def test_repeated_ids_are_scored_and_counted(bundle, lines, tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join([*lines[:30], *lines[:7]]))
    summary = run(audit_of(bundle, path), tmp_path / "out")
    assert summary["duplicates"] == 7
    assert summary["rows"]["scored"] == 37


def test_an_estimate_writes_nothing_and_is_near_what_comes(bundle, corpus, tmp_path):
    with corpus.open("a") as more:
        more.write("x\n" * 20)
    files = set(tmp_path.rglob("*"))
    found = estimate(audit_of(bundle, corpus), actors=3)
    assert set(tmp_path.rglob("*")) == files
    assert (found.files, found.rows, found.actors) == (1, 80, 3)
    assert found.refused_share == pytest.approx(0.25)
    assert found.seconds == pytest.approx(60 / found.pairs_per_s / 3)
    run(audit_of(bundle, corpus), tmp_path / "out")
    tokens = sum(read_json(path)["tokens"] for path in (tmp_path / "out/done").iterdir())
    assert found.tokens == pytest.approx(tokens)
    assert "80 rows in 1 files (0 below them left out)" in found.in_words()


# Figures


def rows_of(draws) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "pair_id": f"p{i}",
                "row_key": f"f#{i}",
                "score": score,
                "reward_margin": score / 2 if score > -2 else None,
                "suspicion": suspicion,
                "flag": suspicion > 0.8,
                "reasons": [{"feature": i % 3, "sign": -1, "contribution": -score, "side": "chosen", "end": 3}],
                "source": f"s{i % 2}",
                "section": None,
                "labels": [("kind", f"k{i % 4}")],
                "tokens": 10 * i,
            }
            for i, (score, suspicion) in enumerate(draws)
        ],
        schema=AUDITED,
    )


DRAWS = st.lists(st.tuples(st.floats(-3, 3, width=32), st.floats(0, 1, width=32)), max_size=40)


@given(DRAWS, st.lists(st.integers(0, 40), max_size=3).map(sorted))
def test_figures_of_parts_add_up_to_those_of_the_whole(draws, cuts):
    rows = rows_of(draws)
    edges = [0, *(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [figures_of(rows.slice(a, b - a)) for a, b in itertools.pairwise(edges)]
    through_json = [from_tree(json.loads(json.dumps(to_tree(part)))) for part in parts]
    total, wanted = sum_figures(through_json), sum_figures([figures_of(rows)])
    assert (total.pairs, total.flagged, total.wrong, total.groups) == (
        len(rows),
        sum(s > 0.8 for _, s in draws),
        wanted.wrong,
        wanted.groups,
    )
    assert total.suspicion.tolist() == wanted.suspicion.tolist()
    assert total.worst == wanted.worst
    np.testing.assert_allclose(total.score, wanted.score, atol=1e-4)
    assert {f: n for f, (n, _) in total.features.items()} == {f: n for f, (n, _) in wanted.features.items()}


def test_groups_have_an_end_and_what_is_left_is_counted_together():
    rows = rows_of([(0.0, i / 1000) for i in range(1000)])
    many = rows.set_column(rows.column_names.index("source"), "source", pa.array([f"s{i}" for i in range(1000)]))
    groups = sum_figures([figures_of(many), figures_of(many)]).groups["source"]
    assert len(groups) == 201
    assert sum(group.pairs for group in groups.values()) == 2000


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
def test_drift_is_the_distance_from_the_reference(shift):
    draws = np.clip(np.random.default_rng(0).uniform(0, 1, 20_000) + shift, 0, 1)
    bins = np.bincount(np.minimum((draws * BINS).astype(int), BINS - 1), minlength=BINS)
    found = drift(bins, 10_000)
    assert found.ks == pytest.approx(ks_1samp(draws, uniform.cdf).statistic, abs=1 / BINS)
    assert (found.p < 0.001) == (shift > 0)
    assert (found.psi > 0.25) == (shift == 0.3)


def test_a_flagged_line_holds_what_a_person_needs():
    row = rows_of([(1.0, 0.9)]).to_pylist()[0]
    row["texts"] = json.dumps({"prompt": [], "chosen": [], "rejected": [], "sentences": ["No."]})
    line = flagged_line(row | {"extra": '{"mine":1}'})
    assert line["reasons"][0]["sentence"] == "No."
    assert line["extra"] == {"mine": 1}
    assert line["labels"] == {"kind": "k0"}
    assert "sentences" not in line


@pytest.mark.slow
def test_sigterm_leaves_what_the_same_command_takes_up(bundle, lines, tmp_path):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_text("".join(lines * 6))
    words = ["audit", "--auditor", bundle.path, "--pairs", path, "--out", out, "--fragment-rows", "20"]
    command = [sys.executable, "-c", "from safer_ray.cli.app import main; main()", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: list((out / "done").glob("*.json")), 120, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert said.endswith("interrupted; run the same command again to go on from here\n")
    assert not (out / "run.lock").exists()
    done = {entry: entry.stat().st_mtime_ns for entry in (out / "done").iterdir()}
    planned = len(read_plan(out / "plan.parquet"))
    assert 0 < len(done) < planned
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert {entry: entry.stat().st_mtime_ns for entry in done} == done
    assert len(scores_in(out)) == 6 * len(lines)


def test_an_audit_of_poisoned_pairs_is_marked_in_manifest_files_and_rows(bundle, made, tmp_path):
    poisoned = made.curated["flip_safer_5"].path / "pairs"
    summary = run(audit_of(bundle, poisoned / "part-*.parquet"), tmp_path / "out")
    assert summary["red_team"]
    assert read_json(tmp_path / "out/manifest.json")["red_team"]
    assert all(is_marked_in(path) for path in (tmp_path / "out/scores").iterdir())
    assert all(json.loads(extra)["red_team"] for extra in scores_in(tmp_path / "out")["extra"].to_pylist())


def test_an_audit_that_goes_on_once_its_poisoned_source_is_gone_stays_marked(bundle, made, corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(made.curated["flip_safer_5"].path / "pairs", folder)
    run(audit_of(bundle, folder), tmp_path / "out")
    for path in folder.iterdir():
        path.unlink()
    shutil.copy(corpus, folder)
    assert run(audit_of(bundle, folder), tmp_path / "out")["red_team"]
    assert [is_marked_in(path) for path in sorted((tmp_path / "out/scores").iterdir())][-1] is False
