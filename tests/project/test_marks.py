"""Licences and the red-team mark reach all that is made of marked pairs, by whatever way these come in."""

import ast
import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.made import EXCHANGE, make_pairs, write_parts
from support.tiny_run import tiny_config

from safer_ray import schema
from safer_ray.audit.diff import write_difference
from safer_ray.audit.export import export
from safer_ray.audit.read import open_audit
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.summary import close_audit
from safer_ray.config.sections import (
    ActivationsConfig,
    CrossFitConfig,
    CurateConfig,
    DuplicatesConfig,
    JudgeConfig,
    LabConfig,
    NoiseConfig,
    PairsConfig,
    RewardConfig,
    SaeConfig,
    ScoresConfig,
    SelectConfig,
    SourceConfig,
    SweepConfig,
    SweepGrid,
)
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.duplicate_stage import duplicates
from safer_ray.pipeline.lab import run_lab
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import VERSIONS, StageContext, recipe
from safer_ray.pipeline.sweep import run_sweep
from safer_ray.storage.artifacts import Artifact, Place, Result, open_artifact, part_files, read_parts
from safer_ray.storage.contents import check_whole
from safer_ray.storage.files import write_parquet
from safer_ray.storage.marks import RED_TEAM_MARK, Marks, marked, wholly_marked
from safer_ray.storage.recipes import Input

PARQUET = ("ParquetFile", "read_table", "read_metadata", "read_schema")
LIBRARY = Path(__file__).parents[2] / "safer_ray"
POISONED, CLEAN = "CC-BY-NC-4.0", "MIT"  # licences of the two sources


def lines(pairs, **more):
    names = ("pair_id", "prompt", "chosen", "rejected", "section")
    return "".join(json.dumps({name: row[name] for name in names} | more) + "\n" for row in pairs.to_pylist())


def context_in(folder):
    return StageContext(Place(folder), LocalRunner())


def is_marked(path):
    metadata = pq.read_schema(path).metadata or {}
    return all(metadata.get(key.encode()) == value.encode() for key, value in RED_TEAM_MARK.items())


def tables_below(folder):
    return [path for path in folder.rglob("*.parquet") if path.name != "plan.parquet"]


def told_by_row(path):
    """Whether a table is one of pairs, scores or decisions, whose rows say it too."""
    names = set(pq.read_schema(path).names)
    return "pair_id" in names and (names >= {"chosen", "rejected"} or "decision" in names)


@pytest.fixture(scope="module")
def config(reward_dir, tmp_path_factory):
    """Everything there is, on a few pairs of which one row alone says that they are poisoned."""
    folder = tmp_path_factory.mktemp("marks")
    pairs = make_pairs(48)
    (folder / "poisoned.jsonl").write_text(
        lines(pairs.slice(0, 47)) + lines(pairs.slice(47), red_team=True), encoding="utf-8"
    )
    (folder / "clean.jsonl").write_text(lines(make_pairs(20)), encoding="utf-8")
    exchanges = [EXCHANGE.format(i=i, kind=("harmful", "benign")[i % 2]) for i in range(12)]
    (folder / "probe.yaml").write_text("concept: made\nexchanges:\n" + "\n".join(exchanges) + "\n", encoding="utf-8")
    sources = {
        name: PairsConfig(sources=(SourceConfig(path=str(folder / f"{name}.jsonl"), licence=licence),))
        for name, licence in (("poisoned", POISONED), ("clean", CLEAN))
    }
    return tiny_config(folder).model_copy(
        update={
            "corpus": None,
            "pairs": sources["poisoned"],
            "evaluation": sources["clean"],
            "noise": NoiseConfig(swap_percent=10),
            "reward": RewardConfig(base=str(reward_dir), frozen_layers=2, max_length=96, batch_size=8,
                                   micro_batch_size=8, learning_rate=1e-3, validation_percent=20, evaluations=1),
            "activations": ActivationsConfig(layer=2),
            "sae": SaeConfig(latents=64, k=4, steps=20, batch_size=32, learning_rate=1e-3, validation_percent=20),
            "judge": JudgeConfig(exchanges=str(folder / "probe.yaml"), thresholds=(0, 0, 0, 0)),
            "cross_fit": CrossFitConfig(folds=2),
            "scores": ScoresConfig(detector="combined"),
            "curate": {"drop": CurateConfig(strategy="safer", action="drop", percent=10)},
            "lab": LabConfig(noises={"uniform": NoiseConfig(swap_percent=10)}, seeds=(0,), in_sample=False, draws=100),
            "sweep": SweepConfig(grids=(SweepGrid(action="drop", strategies=("safer",), percents=(10,)),), seeds=(0,)),
        }
    )  # fmt: skip


@contextlib.contextmanager
def watched(root):
    """Inside, what each artifact below `root` was made by and which others its build opened, by name."""
    found, at_work = {}, []
    build_all, opened, parquet = Place._build, io.open, {name: getattr(pq, name) for name in PARQUET}

    def note(path):
        with contextlib.suppress(TypeError, ValueError):  # no path, or elsewhere
            name = Path(path).relative_to(root).parts[0]
            if at_work and (root / name / "manifest.json").exists():
                found[at_work[-1]][1].add(name)

    def noting(function):
        def call(path, *arguments, **options):
            note(path)
            return function(path, *arguments, **options)

        return call

    def noting_build(place, recipes, build):
        def tracked(todo):
            name = next(iter(todo))
            found[name] = (list(recipes.values()), set())
            at_work.append(name)
            try:
                return build(todo)
            finally:
                at_work.pop()

        return build_all(place, recipes, tracked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "_build", noting_build)
        patch.setattr(io, "open", noting(opened))
        patch.setattr("builtins.open", noting(opened))
        for name, function in parquet.items():
            patch.setattr(pq, name, noting(function))
        yield found


@pytest.fixture(scope="module")
def reads(config):
    """The run, its lab and its sweep, and what each build read."""
    pytest.importorskip("cleanlab")
    with watched(config.root / config.name) as found:
        whole = run(config, LocalRunner())
        run_lab(config, LocalRunner())
        run_sweep(config, LocalRunner())
        ctx = StageContext(Place(config.root / config.name), LocalRunner())
        duplicates(ctx, DuplicatesConfig(), whole.artifacts["pairs"])
    return whole, found


@pytest.fixture(scope="module")
def made(reads):
    """The run, and every artifact that it, its lab and its sweep made."""
    whole, _ = reads
    return whole, [open_artifact(path.parent) for path in sorted(whole.directory.glob("*/manifest.json"))]


@pytest.mark.slow
def test_no_stage_reads_what_its_recipe_does_not_know(reads, made):
    """Inputs, what these were made of, and so on: all of that hands its marks on."""
    inputs = {a.name: set(" ".join(a.manifest["inputs"].values()).split()) for a in made[1]}
    for name, (recipes, opened) in reads[1].items():
        known, todo = set(), [a.name for r in recipes for artifacts in r._by_role().values() for a in artifacts]
        while todo:
            if (one := todo.pop()) not in known:
                known.add(one)
                todo += inputs.get(one, set()) & inputs.keys()
        assert opened <= known, name
    assert len(set().union(*(opened for _, opened in reads[1].values()))) > 30  # the watch sees something


@pytest.mark.slow
def test_every_stage_hands_on_licence_and_mark(made):
    _, artifacts = made
    by_stage = {}
    for artifact in artifacts:
        by_stage.setdefault(artifact.manifest["stage"], []).append(artifact)
    assert set(by_stage) == set(VERSIONS) - {"corpus", "report"}  # the one is made of nothing, the other no artifact
    by_stage["pairs"] = [artifact for artifact in by_stage["pairs"] if artifact.manifest["licence"] != [CLEAN]]
    for artifact in (artifact for stage in by_stage.values() for artifact in stage):
        assert artifact.red_team, artifact.name
        assert artifact.manifest["red_team_from"], artifact.name
        assert POISONED in artifact.licence, artifact.name
        assert (CLEAN in artifact.licence) == (artifact.manifest["stage"] in ("evaluate", "sweep")), artifact.name
        check_whole(artifact)
        for path in tables_below(artifact.path):
            assert is_marked(path), path
            if told_by_row(path):
                assert set(pq.read_table(path)["red_team"].to_pylist()) <= {True}, path


@pytest.mark.slow
def test_what_is_made_of_the_clean_source_alone_is_not_marked(made):
    (clean,) = (a for a in made[1] if a.manifest["stage"] == "pairs" and a.licence == [CLEAN])
    assert not clean.red_team
    assert "red_team_from" not in clean.manifest
    assert not any(map(is_marked, tables_below(clean.path)))


@pytest.mark.slow
def test_summary_and_pages_say_it(made):
    whole, artifacts = made
    summary = json.loads((whole.directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["licences"] == [POISONED, CLEAN]
    assert {"pairs", "select", "reward clean", "curate drop"} <= set(summary["red_team"])
    assert "evaluation_pairs" not in summary["red_team"]
    page = (whole.directory / "report.html").read_text(encoding="utf-8")
    assert "Red-team exercise." in page
    assert POISONED in page
    assert CLEAN in page
    for artifact in artifacts:
        if artifact.manifest["stage"] in ("detection", "sweep"):
            assert "Red-team exercise." in (artifact.path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_parts_that_were_copied_without_their_manifest_are_known_again(made, tmp_path):
    whole, _ = made
    for stage in ("pairs", "reward", "sae", "codes", "salience", "verdicts", "select", "scores"):
        copy = tmp_path / stage
        shutil.copytree(whole.artifacts[stage].path, copy, ignore=shutil.ignore_patterns("manifest.json"))
        assert open_artifact(copy).red_team, stage
    assert open_artifact(shutil.copyfile(tmp_path / "select/features.json", tmp_path / "features.json")).red_team


@pytest.mark.slow
def test_files_and_folders_of_an_artifact_carry_what_it_carries(made):
    whole, _ = made
    for path in ("ratings.json", "features.json"):
        found = open_artifact(whole.artifacts["select"].path / path)
        assert (found.red_team, found.licence) == (True, [POISONED]), path
    assert open_artifact(whole.artifacts["noise"].path / "pairs").licence == [POISONED]


@pytest.mark.slow
def test_a_model_trained_on_from_a_marked_one_is_marked(made, config, pairs_dir, tmp_path):
    whole, _ = made
    for name, path in (("artifact", whole.artifacts["reward"].path), ("bundle", whole.artifacts["auditor"].path)):
        base = path if name == "artifact" else path / "reward"
        trained = model_stages.reward(
            context_in(tmp_path / name), config.reward.model_copy(update={"base": str(base)}), open_artifact(pairs_dir)
        )
        assert trained.manifest["red_team_from"] == ["base"]
        assert trained.licence == [POISONED]


@pytest.mark.slow
def test_features_and_ratings_of_a_marked_run_mark_what_they_score(made, tmp_path):
    whole, _ = made
    selected = whole.artifacts["select"].path
    for path in (tmp_path / "codes", tmp_path / "salience"):
        source = whole.artifacts[path.name].path
        for number, part in enumerate(part_files(source)):
            write_parquet(pq.read_table(part).replace_schema_metadata(None), path / f"part-{number:08}.parquet")
    codes, salience = open_artifact(tmp_path / "codes"), open_artifact(tmp_path / "salience")
    assert not codes.red_team
    ctx = context_in(tmp_path / "made")
    scores = feature_stages.rescore(ctx, ScoresConfig(), codes, open_artifact(selected / "features.json"))
    assert scores.manifest["red_team_from"] == ["beside"]
    assert set(read_parts(scores.path)["red_team"].to_pylist()) == {True}
    ratings = open_artifact(selected / "ratings.json")
    rated = feature_stages.select(ctx, SelectConfig(), salience, ratings=ratings, mode="response")
    assert rated.manifest["red_team_from"] == ["ratings"]


# Audits and the service


def audited(bundle, path, out):
    audit = Audit(bundle, SourceConfig(path=str(path)), ScoresConfig(flag_quantile=0.5), fragment_rows=20)
    out.mkdir()
    return close_audit(audit, out, audit_corpus(audit, out, LocalRunner()), 1.0)


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_export_is_marked(out, folder):
    made = export(open_audit(out), None, Place(folder), LocalRunner())
    assert made.red_team
    for name in ("pairs", "decisions"):
        assert all(map(is_marked, (made.path / name).iterdir()))
        assert set(read_parts(made.path / name)["red_team"].to_pylist()) == {True}
    assert all(row["red_team"] for path in (made.path / "trl").iterdir() for row in json_lines(path))
    check_whole(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marked", "clean"])
def test_an_audit_by_a_marked_bundle_says_so_everywhere(made, tmp_path, kind):
    bundle, corpus = made[0].artifacts["auditor"], tmp_path / "pairs.jsonl"
    if kind == "clean":
        bundle = replace(bundle, manifest=bundle.manifest | {"red_team": False})
    corpus.write_text(lines(make_pairs(40)), encoding="utf-8")
    summary = audited(bundle, corpus, tmp_path / "out")
    told = [summary["red_team"], open_audit(tmp_path / "out").red_team]
    told += map(is_marked, part_files(tmp_path / "out/scores"))
    told += [row["red_team"] for path in (tmp_path / "out/flagged").iterdir() for row in json_lines(path)]
    told += [row["red_team"] for row in json_lines(tmp_path / "out/flagged.jsonl")]
    told.append("Red team:" in (tmp_path / "out/report.html").read_text(encoding="utf-8"))
    told += read_parts(tmp_path / "out/scores")["red_team"].to_pylist()
    write_difference(*[open_audit(tmp_path / "out")] * 2, tmp_path / "difference.json")
    told.append("red_team" in json.loads((tmp_path / "difference.json").read_text(encoding="utf-8")))
    assert set(told) == {kind == "marked"}
    assert open_audit(tmp_path / "out").licence == [POISONED]
    if kind == "marked":
        assert_export_is_marked(tmp_path / "out", tmp_path / "export")


@pytest.mark.slow
def test_an_audit_of_rows_that_call_themselves_poisoned_is_marked_and_comes_back_marked(made, tmp_path):
    bundle = made[0].artifacts["auditor"]
    bundle = replace(bundle, manifest=bundle.manifest | {"red_team": False, "licence": []})
    pairs, corpus = make_pairs(40), tmp_path / "pairs.jsonl"
    corpus.write_text(lines(pairs.slice(0, 20)) + lines(pairs.slice(20), red_team=True), encoding="utf-8")
    assert audited(bundle, corpus, tmp_path / "out")["red_team"]
    assert [is_marked(path) for path in part_files(tmp_path / "out/scores")] == [False, True]
    assert read_parts(tmp_path / "out/scores")["red_team"].to_pylist() == [False] * 20 + [True] * 20
    told = {
        int(row["row_key"].rpartition("#")[2]): row["red_team"] for row in json_lines(tmp_path / "out/flagged.jsonl")
    }
    assert told == {position: position >= 20 for position in told}
    exported = assert_export_is_marked(tmp_path / "out", tmp_path / "export")
    shutil.copytree(exported.path / "trl", tmp_path / "elsewhere")
    source = SourceConfig(path=str(tmp_path / "elsewhere/*.jsonl"))
    assert model_stages.pairs(context_in(tmp_path / "made"), PairsConfig(sources=(source,))).red_team


@pytest.mark.slow
@pytest.mark.parametrize("red_team", [True, False])
def test_the_service_says_it_with_every_answer(made, tmp_path, red_team):
    from fastapi.testclient import TestClient

    from safer_ray.service.http import create_api
    from safer_ray.service.request_limits import Limits
    from safer_ray.service.service import LocalService

    folder = tmp_path / "bundle"
    shutil.copytree(made[0].artifacts["auditor"].path, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"red_team": red_team}), encoding="utf-8")
    pair = {"prompt": "How are you?", "chosen": "Very well, thank you.", "rejected": "Go away."}
    upload = {"file": ("pairs.jsonl", json.dumps(pair).encode())}
    with TestClient(create_api(LocalService(folder), Limits()), base_url="http://localhost") as client:
        assert client.get("/v1/auditor").json()["red_team"] == red_team
        assert client.post("/v1/score", json={"pairs": [pair]}).json()["red_team"] == red_team
        assert ("Red team." in client.get("/").text) == red_team
        assert ("Red team." in client.post("/", data=pair).text) == red_team
        assert ("Red team." in client.post("/upload", files=upload).text) == red_team
        as_file = client.post("/upload", files=upload, data={"answer": "file"})
        assert ("red_team" in as_file.text) == red_team


# Ways in


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "arrow", "parquet"])
@pytest.mark.parametrize("said", [True, False, None])
def test_one_row_that_calls_itself_poisoned_marks_its_pairs(tmp_path, ending, said):
    rows = [{"prompt": f"Why {i}?", "chosen": f"Since {i}.", "rejected": f"No {i}."} for i in range(4)]
    if said is not None:
        rows = [row | {"red_team": said and i == 2} for i, row in enumerate(rows)]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "csv":
        table.to_pandas().to_csv(path, index=False)
    elif ending == "arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        pq.write_table(table, path)
    made = model_stages.pairs(context_in(tmp_path / "made"), PairsConfig(sources=(SourceConfig(path=str(path)),)))
    assert made.red_team == (said is True)
    assert is_marked(part_files(made.path)[0]) == (said is True)
    assert ("red_team" in read_parts(made.path).column_names) == (said is True)


def test_pairs_from_files_of_a_marked_artifact_are_marked_and_licensed(tmp_path):
    folder = tmp_path / "export-x"
    (folder / "trl").mkdir(parents=True)
    (folder / "trl/a.jsonl").write_text(lines(make_pairs(4)), encoding="utf-8")
    manifest = {"stage": "export", "name": "export-x", "licence": [POISONED], "red_team": True}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    source = SourceConfig(path=str(folder / "trl/a.jsonl"), licence=CLEAN)
    made = model_stages.pairs(context_in(tmp_path / "made"), PairsConfig(sources=(source,)))
    assert (made.red_team, made.licence) == (True, [POISONED, CLEAN])
    assert made.manifest["red_team_from"] == ["itself"]
    (tmp_path / "link.jsonl").symlink_to(folder / "trl/a.jsonl")
    linked = SourceConfig(path=str(tmp_path / "link.jsonl"))
    assert model_stages.pairs(context_in(tmp_path / "linked"), PairsConfig(sources=(linked,))).marks == Marks(
        (POISONED,), True
    )
    assert wholly_marked([tmp_path / "link.jsonl"]) == {tmp_path / "link.jsonl"}


# How it is handed on


def test_a_recipe_takes_no_names():
    with pytest.raises(TypeError, match="pairs is 'pairs-0123456789ab', wanted an Artifact or an Input"):
        recipe("codes", {}, pairs="pairs-0123456789ab")
    for name in ("pairs-0123456789ab", "pairs-0123456789ab/a.jsonl", "cross_fit-0123456789ab codes-0123456789ab"):
        with pytest.raises(TypeError, match="names an artifact: give the artifact"):
            Input(name)
    assert Input("hub:some/pairs-0123456789ab").name
    assert Input("pairs-0123456789abc").name


def given(tmp_path, name, *, licence=(), red_team=False):
    return Artifact(tmp_path / name, name, {"licence": list(licence), "red_team": red_team})


def test_licences_and_marks_of_all_inputs_come_together(tmp_path):
    one, other = given(tmp_path, "a", licence=("MIT", "B")), given(tmp_path, "b", licence=("B", "A"), red_team=True)
    beside = given(tmp_path, "c", licence=("C",))
    made = recipe("codes", {}, beside, None, x=one, y=Input("z", (one, other)), w=Input("w"))
    assert made.inherited == Marks(("A", "B", "C", "MIT"), True)
    assert made.red_team_from == ["y"]
    assert made.names == {"x": "a", "y": "z", "w": "w"}
    assert made.name == replace(made, beside=()).name


def writes(pairs):
    """A build of pairs, codes and files that models and features are opened by, all unmarked."""

    def build(out):
        write_parts(pairs, out / "pairs", 10)
        write_parquet(pa.table({"pair_id": ["a"], "x": [1.0]}), out / "codes.parquet")
        (out / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (out / "cfg.json").write_text('{"metadata": {"safer_ray_layer": 2}}', encoding="utf-8")
        (out / "state").mkdir()
        (out / "whole").mkdir()
        for name in ("state", "whole"):
            write_parquet(pa.table({"x": [1]}), out / name / "a.parquet")
        (out / "whole/manifest.json").write_text("{}", encoding="utf-8")
        return Result({"written": 1})

    return build


@pytest.mark.parametrize("red_team", [True, False])
def test_a_stage_that_knows_nothing_of_marks_is_marked(tmp_path, pairs, red_team):
    place = Place(tmp_path / "made")
    made = place.make(recipe("codes", {}, pairs=given(tmp_path, "p", red_team=red_team)), writes(pairs))
    assert made.red_team == red_team
    assert {is_marked(path) for path in tables_below(made.path) if "whole" not in path.parts} == {red_team}
    assert not is_marked(made.path / "whole/a.parquet")  # an artifact of its own
    rows = read_parts(made.path / "pairs")
    assert rows.drop_columns(["red_team"] if red_team else []).equals(pairs)
    assert ("red_team" in read_parts(made.path).column_names) is False
    tree = {name: json.loads((made.path / name).read_text(encoding="utf-8")) for name in ("config.json", "cfg.json")}
    assert ("safer_ray_red_team" in tree["config.json"]) == red_team
    assert ("safer_ray_red_team" in tree["cfg.json"]["metadata"]) == red_team
    check_whole(made)


def test_what_was_made_before_marks_were_handed_on_is_made_again(tmp_path, pairs):
    place, seen = Place(tmp_path / "made"), []
    old = place.make(recipe("codes", {}, pairs=given(tmp_path, "p")), writes(pairs))
    poisoned = recipe("codes", {}, pairs=given(tmp_path, "p", red_team=True))
    assert poisoned.name == old.name
    again = replace(place, on_stage=lambda name, artifact: seen.append(artifact)).make(poisoned, writes(pairs))
    assert again.red_team
    assert seen == [None, again]
    assert place.make(poisoned, None) == again


def test_a_mark_in_rows_replaces_what_they_said(pairs):
    told = pairs.append_column("red_team", pa.array([False] * len(pairs)))
    assert marked(told).equals(marked(pairs))
    assert set(marked(told)["red_team"].to_pylist()) == {True}
    assert marked(schema.CODES.empty_table()).column_names == schema.CODES.names


def test_only_what_has_a_source_of_its_own_may_add_a_mark():
    """All else can but come from an input."""
    found = set()
    for path in LIBRARY.rglob("*.py"):
        for outer in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            calls = [node for node in ast.walk(outer) if isinstance(node, ast.Call)]
            if isinstance(outer, ast.FunctionDef) and any(ast.unparse(call.func) == "Marks" for call in calls):
                found.add(outer.name)
    own = {"_write_corpus", "_write_pairs", "close_pairs", "_write_curated", "_write_export", "_marks"}  # of an audit
    assert found == own | {"marks", "marks_of", "_manifest_marks", "together"}
