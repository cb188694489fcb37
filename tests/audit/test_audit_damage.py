"""What an audit's folder and bundle may look like when somebody, or a power cut, has been at them."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny_run import finished

from safer_ray.audit.read import open_audit
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.summary import close_audit
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.features.bundle import check_auditor
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import open_artifact, read_parts
from safer_ray.storage.contents import artifact_hash
from safer_ray.storage.files import read_json, write_json, write_parquet
from safer_ray.storage.lock import locked
from safer_ray.storage.marks import RED_TEAM_MARK, says_red_team

ROWS = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp()).artifacts["auditor"]


@pytest.fixture(scope="module")
def lines():
    rows = [
        {"id": f"p{i}", "prompt": f"Why {i}?", "chosen": f"Since {i} is so. Really.", "rejected": f"No {i}. Go away."}
        for i in range(ROWS)
    ]
    return [json.dumps(row) + "\n" for row in rows]


@pytest.fixture
def corpus(lines, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("".join(lines))
    return tmp_path / "data"


def audit_of(bundle, path):
    return Audit(bundle, SourceConfig(path=str(path)), ScoresConfig(flag_quantile=1.0), fragment_rows=10)


def run(audit, out, **options):
    out.mkdir(exist_ok=True)
    return close_audit(audit, out, audit_corpus(audit, out, LocalRunner(), **options), 1.0)


@pytest.fixture(scope="module")
def first(bundle, lines, tmp_path_factory):
    """A finished audit, to be copied."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "data").mkdir()
    (folder / "data/a.jsonl").write_text("".join(lines))
    run(audit_of(bundle, folder / "data"), folder / "out")
    return folder / "out"


@pytest.fixture
def refused(safer):
    """Run a command that must end with exit code 2 and one clear line, which is returned."""

    def call(*words):
        code, _, err = safer(*words)
        assert code == 2, err
        return err.splitlines()[-1]

    return call


@pytest.fixture
def out(first, corpus, tmp_path):
    return shutil.copytree(first, tmp_path / "out")


# The bundle


def edit_features(path):
    tree = read_json(path / "features.json")
    write_json(tree | {"safe": tree["unsafe"], "unsafe": tree["safe"]}, path / "features.json")
    return "features.json"


def edit_weights(path):
    file = path / "sae" / "cfg.json"
    file.write_text(file.read_text() + " ")
    return "sae/cfg.json"


def edit_reference(path):
    rows = pq.read_table(path / "reference.parquet")
    write_parquet(rows.slice(0, len(rows) - 1), path / "reference.parquet")
    return "reference.parquet"


def add_a_file(path):
    (path / "reward" / "adapter_config.json").write_text("{}")
    return "reward/adapter_config.json"


@pytest.mark.parametrize("edit", [edit_features, edit_weights, edit_reference, add_a_file])
def test_a_bundle_that_was_edited_in_place_is_refused(bundle, corpus, tmp_path, edit):
    copy = open_artifact(shutil.copytree(bundle.path, tmp_path / bundle.name), "auditor")
    check_auditor(copy)
    name = edit(copy.path)
    with pytest.raises(UserError, match=rf"{copy.path} is not the {bundle.name} that was made: .*newest: {name}\)"):
        run(audit_of(copy, corpus), tmp_path / "out")
    assert not (tmp_path / "out/audit.json").exists()


def test_stage_scores_and_an_estimate_refuse_it_too(refused, bundle, tmp_path, tmp_path_factory, corpus):
    made = finished(tmp_path_factory.getbasetemp()).artifacts
    copy = shutil.copytree(bundle.path, tmp_path / bundle.name)
    edit_features(copy)
    words = ["scores", "--codes", made["codes"].path, "--pairs", made["pairs"].path, "--auditor", copy]
    assert "its files differ from the content_sha256" in refused(*words, "--out", tmp_path / "scores")
    words = ["audit", "--auditor", copy, "--pairs", corpus, "--out", tmp_path / "out", "--dry-run"]
    assert "its files differ from the content_sha256" in refused(*words)


def test_a_bundle_whose_manifest_tells_no_content_is_refused(bundle):
    manifest = {name: value for name, value in bundle.manifest.items() if name != "content_sha256"}
    with pytest.raises(UserError, match=r"manifest.json tells no content_sha256 .*; make it again"):
        check_auditor(replace(bundle, manifest=manifest))


def test_an_audit_goes_on_with_no_other_bundle_of_that_name(bundle, corpus, out, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / bundle.name)
    edit_features(copy)
    write_json(bundle.manifest | {"content_sha256": artifact_hash(copy)}, copy / "manifest.json")
    with pytest.raises(UserError, match=rf"{out} was audited by another {bundle.name} than the one in {copy}"):
        run(audit_of(open_artifact(copy), corpus), out)


def test_an_audit_that_did_not_tell_the_content_of_its_bundle_goes_on_and_tells_it(bundle, corpus, out, caplog):
    asked = read_json(out / "audit.json")
    del asked["auditor_sha256"]
    write_json(asked, out / "audit.json")
    run(audit_of(bundle, corpus), out)
    assert "begun by an earlier version" in caplog.text
    assert read_json(out / "audit.json")["auditor_sha256"] == bundle.manifest["content_sha256"]


# What is done


def test_work_without_its_plan_is_refused(bundle, corpus, out):
    (out / "plan.parquet").unlink()
    told = rf"{out}/done/00000000.json was done by a plan, but {out}/plan.parquet is gone, .*\(4 such files\); put that"
    with pytest.raises(UserError, match=told):
        run(audit_of(bundle, corpus), out)
    with pytest.raises(UserError, match=r"plan.parquet is gone"):
        open_audit(out)
    assert run(audit_of(bundle, corpus), out, fresh=True)["rows"]["scored"] == ROWS


def test_a_copy_of_another_fragments_part_is_seen(bundle, corpus, out):
    shutil.copy(out / "scores/part-00000000.parquet", out / "scores/part-00000001.parquet")
    with pytest.raises(SaferError, match=r"in 1 of 4 fragments \(fragment 1: its part in scores is not the one"):
        run(audit_of(bundle, corpus), out)
    (out / "done/00000001.json").unlink()
    run(audit_of(bundle, corpus), out)
    assert read_parts(out / "scores")["row_key"].to_pylist() == [f"a.jsonl#{i}" for i in range(ROWS)]


@pytest.mark.parametrize("how", ["copied", "gone"])
def test_flagged_pairs_of_another_fragment_and_none_are_seen(bundle, corpus, out, how):
    part = out / "flagged/part-00000001.jsonl"
    if how == "copied":
        shutil.copy(out / "flagged/part-00000000.jsonl", part)
    else:
        part.unlink()
    with pytest.raises(UserError, match=rf"{part} is gone, or not what was .*; delete {out}/done/00000001.json"):
        run(audit_of(bundle, corpus), out)
    (out / "done/00000001.json").unlink()
    run(audit_of(bundle, corpus), out)
    listed = [json.loads(line)["row_key"] for line in (out / "flagged.jsonl").read_text().splitlines()]
    assert listed == [f"a.jsonl#{i}" for i in range(ROWS)]


def test_a_done_entry_of_other_rows_is_seen(bundle, corpus, out):
    shutil.copy(out / "done/00000000.json", out / "done/00000001.json")
    told = r"done/00000001.json is the account of a.jsonl#0-9, and the plan has a.jsonl#10-19 under that number; delete"
    with pytest.raises(UserError, match=told):
        run(audit_of(bundle, corpus), out)


@pytest.mark.parametrize("change", [{"read": None}, {"written": "10"}, {"quarantined": -1}, {"reasons": None}])
def test_a_done_entry_without_accounts_is_done_again(bundle, corpus, out, change, caplog):
    entry = read_json(out / "done/00000001.json")
    write_json(entry | change, out / "done/00000001.json")
    run(audit_of(bundle, corpus), out)
    assert "00000001.json is empty or torn; its fragment is done again" in caplog.text
    again = read_json(out / "done/00000001.json")
    assert {name: again[name] for name in ("read", "written", "of")} == {"read": 10, "written": 10, "of": entry["of"]}


@pytest.mark.parametrize("figures", [None, {}, {"pairs": 1}, []])
def test_a_done_entry_without_figures_is_named(bundle, corpus, out, figures):
    path = out / "done/00000001.json"
    write_json(read_json(path) | {"figures": figures}, path)
    with pytest.raises(UserError, match=rf"{path} has no figures of its rows .*; delete it, then run the same command"):
        run(audit_of(bundle, corpus), out)


def test_a_users_file_among_the_done_entries_is_left_alone(bundle, corpus, out):
    (out / "done/notes.json").write_text("mine")
    with pytest.raises(SaferError, match=r"done/notes.json is of no planned fragment .*; move it away"):
        run(audit_of(bundle, corpus), out)
    assert (out / "done/notes.json").read_text() == "mine"


# What says what is asked, and what is planned


@pytest.mark.parametrize("content", ["", '{"auditor"'])
def test_a_torn_question_is_told_with_what_is_lost(bundle, corpus, out, content):
    (out / "audit.json").write_text(content)
    told = rf"{out}/audit.json, .* is empty or torn .* put it back .*--fresh: 4 finished fragments are done again"
    for use in (lambda: run(audit_of(bundle, corpus), out), lambda: open_audit(out)):
        with pytest.raises(UserError, match=told):
            use()
    assert run(audit_of(bundle, corpus), out, fresh=True)["rows"]["scored"] == ROWS


@pytest.mark.parametrize("content", ["null", "[1]", '{"a": 1}', '{"auditor": 1, "source": 0, "scores": 1, "path": 1}'])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_question_of_somebody_else_is_told_and_left_alone(bundle, corpus, out, content, fresh):
    (out / "audit.json").write_text(content)
    with pytest.raises(UserError, match=rf"{out}/audit.json is none of ours: {out} holds no audit; choose another"):
        run(audit_of(bundle, corpus), out, fresh=fresh)
    assert (out / "audit.json").read_text() == content


def torn(path):
    path.write_bytes(path.read_bytes()[:100])


def of_other_columns(path):
    write_parquet(pa.table({"a": [1]}), path)


def without_a_column(path):
    write_parquet(pq.read_table(path).drop_columns(["start"]), path)


def of_other_types(path):
    rows = pq.read_table(path)
    write_parquet(rows.set_column(rows.column_names.index("start"), "start", rows["start"].cast(pa.string())), path)


@pytest.mark.parametrize("damage", [torn, of_other_columns, without_a_column, of_other_types])
def test_a_damaged_plan_is_named_and_nobody_is_told_to_delete_the_folder(bundle, corpus, out, damage):
    damage(out / "plan.parquet")
    with pytest.raises(UserError, match=rf"{out}/plan.parquet.*; it says what rows .*: put it back .*--fresh") as told:
        run(audit_of(bundle, corpus), out)
    assert "delete" not in str(told.value)


def test_a_part_whose_pages_are_torn_is_named_with_its_entry(bundle, corpus, out):
    part = out / "scores/part-00000002.parquet"
    held = part.read_bytes()
    start = pq.read_metadata(part).row_group(0).column(0).dictionary_page_offset
    part.write_bytes(held[:start] + b"\xff" * 60 + held[start + 60 :])
    with pytest.raises(UserError, match=rf"{part}: .*; delete it and {out}/done/00000002.json, then run the same"):
        run(audit_of(bundle, corpus), out)


# Files where folders belong, and the other way round


@pytest.mark.parametrize("name", ["done", "scores", "flagged", "quarantine"])
def test_a_file_where_a_folder_belongs_is_told(bundle, corpus, out, name):
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).write_text("")
    with pytest.raises(UserError, match=rf"{out}/{name} is a file where a folder belongs; move it away"):
        run(audit_of(bundle, corpus), out)


NAMES = ["done/00000001.json", "scores/part-00000001.parquet", "flagged/part-00000001.jsonl", "flagged.jsonl"]
NAMES += ["summary.json", "manifest.json", "report.html", "audit.json", "plan.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_where_a_file_belongs_is_told_in_a_line(bundle, corpus, out, name):
    (out / name).unlink()
    (out / name).mkdir()
    (out / name / "mine").write_text("kept")
    with pytest.raises(UserError, match=name):
        run(audit_of(bundle, corpus), out)
    assert (out / name / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("below", "told"),
    [("", "is no folder, and --out is"), ("/deep/er", "is a file where a folder belongs; move it away")],
)
def test_an_out_that_is_a_file_is_told(refused, bundle, corpus, tmp_path, below, told):
    (tmp_path / "out").write_text("mine")
    words = ["audit", "--auditor", bundle.path, "--pairs", corpus, "--out", f"{tmp_path}/out{below}"]
    assert f"{tmp_path}/out {told}" in refused(*words)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_where_the_lock_belongs_is_told(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(UserError, match=r"run.lock is a folder where a file belongs; move it away"), locked(tmp_path):
        pass


# Options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shards", "0"], "--shards 0: wanted 1 or more"),
        (["--fragment-rows", "0"], "--fragment-rows 0: wanted 1 or more"),
        (["--fragment-rows", "-1"], "--fragment-rows -1: wanted 1 or more"),
        (["--max-chars", "0"], "--max-chars 0: wanted 1 or more"),
        (["--max-refused-share", "nan"], "--max-refused-share nan: wanted a number from 0 to 1"),
        (["--actors", "2"], "--actors 2: they work on a cluster; add --runner ray, or leave them out"),
    ],
)
def test_numbers_that_no_audit_can_go_by_are_refused(refused, bundle, corpus, tmp_path, words, told):
    line = refused("audit", "--auditor", bundle.path, "--pairs", corpus, "--out", tmp_path / "out", *words)
    assert told in line
    assert not (tmp_path / "out").exists()


# Marks


@pytest.mark.parametrize("value", [True, 1, 1.0, 2, "1", "1.0", "yes", "true", "True", " TRUE ", "y", "poisoned", [1]])
def test_what_is_not_clearly_a_no_is_the_mark(value):
    assert says_red_team({"red_team": value})


@pytest.mark.parametrize("value", [False, None, 0, 0.0, "", "0", "no", "false", "False", "null", float("nan")])
def test_a_clear_no_is_no_mark(value):
    assert not says_red_team({"red_team": value})
    assert not says_red_team({})


def told_by_row(out):
    scores = read_parts(out / "scores").select(["row_key", "red_team"]).to_pylist()
    listed = [json.loads(line) for line in (out / "flagged.jsonl").read_text().splitlines()]
    assert {row["row_key"]: row["red_team"] for row in listed} == {row["row_key"]: row["red_team"] for row in scores}
    return {row["row_key"] for row in scores if row["red_team"]}


@pytest.mark.parametrize("type", [pa.int8(), pa.float64(), pa.string(), pa.bool_()])
def test_rows_of_any_kind_of_mark_carry_it_and_no_others(bundle, lines, tmp_path, type):
    rows = [json.loads(line) | {"red_team": i == 3} for i, line in enumerate(lines[:20])]
    table = pa.Table.from_pylist(rows)
    values = pa.array([str(i == 3).lower() if type == pa.string() else type_of(type, i == 3) for i in range(20)], type)
    write_parquet(table.set_column(table.column_names.index("red_team"), "red_team", values), tmp_path / "x.parquet")
    summary = run(audit_of(bundle, tmp_path / "x.parquet"), tmp_path / "out")
    assert told_by_row(tmp_path / "out") == {"x.parquet#3"}
    assert summary["red_team"]
    assert open_audit(tmp_path / "out").red_team


def type_of(type, value):
    return float(value) if type == pa.float64() else int(value) if type == pa.int8() else value


def test_every_row_of_a_marked_file_carries_the_mark_and_no_row_of_another(bundle, lines, corpus, tmp_path):
    rows = pa.Table.from_pylist([json.loads(line) for line in lines[:5]])
    write_parquet(rows.replace_schema_metadata(RED_TEAM_MARK), corpus / "b.parquet")
    (corpus / "c.jsonl").write_text("".join(lines[:5]))
    summary = run(audit_of(bundle, corpus), tmp_path / "out")
    assert told_by_row(tmp_path / "out") == {f"b.parquet#{i}" for i in range(5)}
    assert summary["red_team"]


def test_rows_of_an_artifact_that_is_marked_carry_the_mark(bundle, lines, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/a.jsonl").write_text("".join(lines[:5]))
    write_json({"stage": "pairs", "name": "pairs-x", "licence": [], "red_team": True}, tmp_path / "made/manifest.json")
    run(audit_of(bundle, tmp_path / "made/a.jsonl"), tmp_path / "out")
    assert told_by_row(tmp_path / "out") == {f"a.jsonl#{i}" for i in range(5)}


# Audits as sources


@pytest.mark.parametrize("pattern", ["", "/*.jsonl", "/**/*"])
def test_what_an_audit_wrote_beside_its_source_is_no_data_of_the_next(bundle, corpus, tmp_path, pattern):
    assert "left_out" not in " ".join(map(str, run(audit_of(bundle, corpus), corpus)["files"]["left_out"]))
    assert run(audit_of(bundle, f"{corpus}{pattern}"), tmp_path / "out")["rows"]["read"] == ROWS


def test_an_audits_folder_alone_is_no_source(bundle, out, tmp_path):
    write_json([], out / "reviews.json")
    with pytest.raises(UserError, match=r"no data files there, other than those in .*, which is left out"):
        run(audit_of(bundle, out), tmp_path / "next")


def test_a_first_audit_into_its_source_tells_nothing_of_its_own(bundle, corpus):
    assert run(audit_of(bundle, corpus), corpus / "out")["files"]["left_out"] == {}
