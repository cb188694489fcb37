"""Recipes, atomic commits, and what damaged or changed directories lead to."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from safer_ray.config.sections import PairsConfig, SalienceConfig, SourceConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext, recipe
from safer_ray.storage import artifacts as module
from safer_ray.storage.artifacts import (
    MANIFEST,
    Artifact,
    Fragment,
    Place,
    Recipe,
    Result,
    open_artifact,
    part_files,
    part_fragments,
    part_name,
    read_fragment,
    read_parts,
    save_plan,
)
from safer_ray.storage.contents import artifact_hash, check_whole, content_hash
from safer_ray.storage.files import read_parquet, stamp, write_json, write_parquet, write_text
from safer_ray.storage.marks import Marks
from safer_ray.storage.recipes import Input

RECIPE = Recipe("salience", 1, {"mode": "paper"}, {"codes": Input("codes-1")})
ROWS = pa.table({"a": [1, 2, 3]})
OLD_COLUMNS = (
    "number",
    "source",
    "path",
    "start",
    "stop",
    "size",
    "etag",
    "offset",
    "digest",
)  # of plans before `file`


def build(out):
    write_parquet(ROWS, out / part_name(0))
    return Result({"written": 3}, {"mode": "paper"}, 7, Marks(("MIT",)))


# Recipes


def test_a_recipe_changes_with_everything_that_changes_the_result():
    names = {
        RECIPE.name,
        replace(RECIPE, version=2).name,
        replace(RECIPE, config={"mode": "response"}).name,
        replace(RECIPE, inputs={"codes": Input("codes-2")}).name,
        replace(RECIPE, stage="scores").name,
    }
    assert len(names) == 5
    assert all(len(name.rpartition("-")[2]) == 12 for name in names)


def test_a_recipe_does_not_change_with_the_order_of_keys():
    one = Recipe("s", 1, {"a": 1, "b": 2}, {"x": Input("1"), "y": Input("2")})
    assert one.name == Recipe("s", 1, {"b": 2, "a": 1}, {"y": Input("2"), "x": Input("1")}).name
    assert recipe("salience", SalienceConfig(mode="paper"), codes=Input("codes-1")).name == RECIPE.name


def test_pairs_are_named_by_content_not_by_path_or_fragment_size(tmp_path):
    names, parts = set(), []
    for folder, rows in (("one", 1), ("two", 100)):
        path = tmp_path / folder / "pairs.jsonl"
        lines = [json.dumps({"prompt": f"p {i}", "chosen": "yes.", "rejected": "no."}) for i in range(5)]
        write_text("\n".join(lines) + "\n", path)
        ctx = StageContext(Place(tmp_path / folder / "runs"), LocalRunner(), fragment_rows=rows)
        made = model_stages.pairs(ctx, PairsConfig(sources=(SourceConfig(path=str(path)),)))
        names.add(made.name)
        parts.append(len(part_files(made.path)))
    assert len(names) == 1
    assert parts == [5, 1]


# Places


def test_what_is_built_is_renamed_when_whole_and_found_again(tmp_path):
    seen = []
    place = Place(tmp_path, on_stage=lambda name, artifact: seen.append(artifact is not None))
    made = place.make(RECIPE, build)
    assert made.path == tmp_path / RECIPE.name
    assert (made.metrics, made.licence, made.red_team) == ({"mode": "paper"}, ["MIT"], False)
    assert made.manifest["rows"] == {"written": 3}
    assert made.manifest["packages"]["pyarrow"] == pa.__version__
    assert [p.name for p in tmp_path.iterdir()] == [RECIPE.name]

    def never(out):
        raise AssertionError("built twice")

    assert place.make(RECIPE, never).manifest == made.manifest
    assert seen == [False, True, True]


def test_weights_are_read_by_whoever_reads_the_files_beside_them(tmp_path):
    """safetensors writes them for their owner alone."""

    def weights(out):
        save_file({"x": np.zeros(2)}, out / "model.safetensors")
        return Result({"written": 1})

    made = Place(tmp_path).make(RECIPE, weights)
    modes = {(made.path / name).stat().st_mode for name in ("model.safetensors", "manifest.json")}
    assert len(modes) == 1


def test_a_partial_directory_is_never_taken_as_complete_and_is_taken_up_again(tmp_path):
    def fails(out):
        write_parquet(ROWS, out / part_name(0))
        write_json({}, out / "journal" / "a.json")
        raise KeyboardInterrupt

    place = Place(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        place.make(RECIPE, fails)
    assert place.find(RECIPE) is None
    assert [p.name for p in tmp_path.iterdir()] == [f".partial-{RECIPE.name}"]

    def goes_on(out):
        assert (out / part_name(0)).exists()
        return Result()

    made = place.make(RECIPE, goes_on)
    assert sorted(p.name for p in made.path.iterdir()) == [MANIFEST, part_name(0)]


def test_fresh_discards_what_is_there(tmp_path):
    Place(tmp_path).make(RECIPE, build)
    (tmp_path / f".partial-{RECIPE.name}").mkdir()
    write_text("old", tmp_path / f".partial-{RECIPE.name}" / "old.txt")
    built = []

    def again(out):
        built.append(list(out.iterdir()))
        return build(out)

    Place(tmp_path, fresh=True).make(RECIPE, again)
    assert built == [[]]


def test_a_dry_place_names_artifacts_and_builds_none(tmp_path):
    made = Place(tmp_path, dry=True).make(RECIPE, build)
    assert made == Artifact(tmp_path / RECIPE.name, RECIPE.name)
    assert list(tmp_path.iterdir()) == []


def test_out_is_written_exactly_there_and_found_again(tmp_path):
    place = Place(tmp_path, out=tmp_path / "here")
    assert place.make(RECIPE, build).path == tmp_path / "here"
    assert place.find(RECIPE) is not None


def test_an_empty_out_is_used(tmp_path):
    (tmp_path / "here").mkdir()
    assert Place(tmp_path, out=tmp_path / "here").make(RECIPE, build).manifest["stage"] == "salience"


@pytest.mark.parametrize("fresh", [False, True])
def test_an_out_that_holds_something_else_is_never_overwritten(tmp_path, fresh):
    (tmp_path / "here").mkdir()
    write_text("precious", tmp_path / "here" / "thesis.txt")
    place = Place(tmp_path, out=tmp_path / "here", fresh=fresh)
    with pytest.raises(UserError, match="is not empty and holds no artifact; choose another --out"):
        place.make(RECIPE, build)
    with pytest.raises(UserError, match="holds no artifact"):
        replace(place, out=tmp_path / "here" / "thesis.txt").make(RECIPE, build)
    assert (tmp_path / "here" / "thesis.txt").read_text() == "precious"


def test_an_out_of_another_recipe_needs_fresh(tmp_path):
    place = Place(tmp_path, out=tmp_path / "here")
    place.make(RECIPE, build)
    other = replace(RECIPE, config={"mode": "response"})
    with pytest.raises(UserError, match=f"holds {RECIPE.name}, this command makes {other.name}.*--fresh"):
        place.make(other, build)
    assert replace(place, fresh=True).make(other, build).name == other.name


# Several at once

RECIPES = [replace(RECIPE, config={"mode": mode}) for mode in ("a", "b", "c")]


def build_all(asked):
    """A build of several that writes down what it was asked for."""

    def build_them(partials):
        asked.append(list(partials))
        return {name: build(path) for name, path in partials.items()}

    return build_them


def test_missing_artifacts_are_built_by_one_call_and_found_ones_kept(tmp_path):
    asked, seen = [], []
    place = Place(tmp_path, on_stage=lambda name, artifact: seen.append((name, artifact is not None)))
    found = Place(tmp_path).make(RECIPES[1], build)
    stamp = (found.path / MANIFEST).stat().st_mtime_ns
    made = place.make_all(RECIPES, build_all(asked))
    names = [recipe.name for recipe in RECIPES]
    assert asked == [[names[0], names[2]]]
    assert [artifact.name for artifact in made] == names
    assert [artifact.path for artifact in made] == [tmp_path / name for name in names]
    assert (found.path / MANIFEST).stat().st_mtime_ns == stamp
    assert seen == [
        (names[1], True),
        (names[0], False),
        (names[2], False),
        (names[0], True),
        (names[2], True),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert place.make_all(RECIPES, build_all(asked)) == [open_artifact(tmp_path / name) for name in names]
    assert len(asked) == 1


def test_equal_recipes_are_built_once_and_given_to_each_who_asked(tmp_path):
    asked = []
    same = Recipe(RECIPES[0].stage, RECIPES[0].version, dict(RECIPES[0].config), dict(RECIPES[0].inputs))
    made = Place(tmp_path).make_all([RECIPES[0], RECIPES[1], same], build_all(asked))
    assert asked == [[RECIPES[0].name, RECIPES[1].name]]
    assert made[0] == made[2] != made[1]


def test_nothing_to_make_builds_nothing(tmp_path):
    asked = []
    assert Place(tmp_path).make_all([], build_all(asked)) == []
    dry = Place(tmp_path, dry=True).make_all(RECIPES, build_all(asked))
    assert [artifact.name for artifact in dry] == [recipe.name for recipe in RECIPES]
    assert asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closes", [1, 2])
def test_a_crash_between_two_closes_builds_only_what_was_not_closed(tmp_path, monkeypatch, closes):
    closed, asked = [], []
    close = module._close

    def dies(recipe, *given):
        if len(closed) == closes:
            raise KeyboardInterrupt
        close(recipe, *given)
        closed.append(recipe.name)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_close", dies)
        with pytest.raises(KeyboardInterrupt):
            Place(tmp_path).make_all(RECIPES, build_all(asked))
    assert all(Place(tmp_path).find(recipe) is None for recipe in RECIPES)
    made = Place(tmp_path).make_all(RECIPES, build_all(asked))
    assert asked[1] == [recipe.name for recipe in RECIPES[closes:]]
    for artifact in made:
        check_whole(artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(recipe.name for recipe in RECIPES)


def test_a_crash_between_two_renames_builds_nothing_again(tmp_path, monkeypatch):
    asked = []
    replace_path = os.replace

    def dies(source, target):
        if str(target).endswith(RECIPES[1].name):
            raise KeyboardInterrupt
        replace_path(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            Place(tmp_path).make_all(RECIPES, build_all(asked))
    assert [Place(tmp_path).find(recipe) is not None for recipe in RECIPES] == [True, False, False]
    made = Place(tmp_path).make_all(RECIPES, build_all(asked))
    assert len(asked) == 1
    assert [artifact.manifest["rows"] for artifact in made] == [{"written": 3}] * 3


def test_artifacts_built_together_tell_each_its_own_seconds(tmp_path):
    seconds = dict(zip((recipe.name for recipe in RECIPES), (1.5, 20.25, None), strict=True))
    made = Place(tmp_path).make_all(
        RECIPES, lambda partials: {name: Result({"n": 1}, wall_seconds=seconds[name]) for name in partials}
    )
    assert [artifact.manifest["wall_seconds"] for artifact in made[:2]] == [1.5, 20.25]
    assert made[2].manifest["wall_seconds"] < 1.5  # as long as the call took


# Opening


def test_a_missing_input_names_the_stage(tmp_path):
    with pytest.raises(UserError, match=r"no such codes: .*none; check the path"):
        open_artifact(tmp_path / "none", "codes")


@pytest.mark.parametrize("content", ["", "{"])
def test_a_torn_manifest_is_named(tmp_path, content):
    write_text(content, tmp_path / MANIFEST)
    with pytest.raises(UserError, match=r"corrupt artifact: .*manifest.json is empty or torn; put it back .* or move"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"stage": "codes"}', "null", '{"name": "a site", "icons": []}'])
def test_somebody_elses_manifest_is_told_and_nobody_is_told_to_delete(tmp_path, content):
    write_text(content, tmp_path / MANIFEST)
    with pytest.raises(UserError, match=r"manifest.json is no manifest of ours: .* is no artifact; pass") as told:
        open_artifact(tmp_path)
    assert "delete" not in str(told.value)


def test_an_artifact_of_another_stage_is_refused(tmp_path):
    made = Place(tmp_path).make(RECIPE, build)
    with pytest.raises(UserError, match="holds 'salience', wanted 'codes'; pass the directory of that stage"):
        open_artifact(made.path, "codes")


def test_foreign_directories_are_named_by_content(tmp_path):
    for name in ("one", "two"):
        write_text("same", tmp_path / name / "file.txt")
    write_text("other", tmp_path / "three" / "file.txt")
    names = [open_artifact(tmp_path / n, "sae").name for n in ("one", "two", "three")]
    assert names[0] == names[1] != names[2]
    assert names[0] == f"sae:{content_hash(tmp_path / 'one')}"


def test_a_corrupt_parquet_file_is_named(tmp_path):
    (tmp_path / part_name(0)).write_bytes(b"PAR1 no more")
    for read in (read_parts, part_fragments):
        with pytest.raises(UserError, match=r"corrupt artifact: .*part-00000000.parquet: .*run again"):
            read(tmp_path)
    with pytest.raises(UserError, match="corrupt artifact"):
        read_parquet(tmp_path / "none.parquet")


def test_a_missing_column_is_named(tmp_path):
    write_parquet(ROWS, tmp_path / part_name(0))
    with pytest.raises(UserError, match=r"part-00000000.parquet has no column 'b'; pass the directory of the stage"):
        read_parts(tmp_path, ["a", "b"])


def test_a_directory_without_parts_is_refused(tmp_path):
    save_plan([], tmp_path)
    with pytest.raises(UserError, match="no Parquet files in"):
        part_files(tmp_path)


def test_what_is_not_there_has_no_content(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder: .*nothing; check the path"):
        content_hash(tmp_path / "nothing")


def test_a_changed_artifact_is_told_from_its_manifest(tmp_path):
    made = Place(tmp_path).make(RECIPE, build)
    check_whole(made)
    write_parquet(pa.table({"a": [1, 2, 4]}), made.path / part_name(0))
    with pytest.raises(UserError, match=r"corrupt artifact: .* is not the salience-.* that was made: its files differ"):
        check_whole(made)


def test_the_content_hash_does_not_depend_on_chunks_compression_or_scratch(tmp_path):
    write_parquet(ROWS, tmp_path / "one" / part_name(0))
    (tmp_path / "two").mkdir()
    pq.write_table(ROWS, tmp_path / "two" / part_name(0), row_group_size=1, compression="none")
    write_json({}, tmp_path / "two" / "done" / "0.json")
    assert artifact_hash(tmp_path / "one") == artifact_hash(tmp_path / "two")


# Writing


@pytest.fixture
def full_disk(monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda target, name: monkeypatch.setattr(target, name, full)


@pytest.mark.parametrize(("target", "name"), [(pq, "write_table"), (os, "replace")])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(tmp_path, full_disk, target, name):
    full_disk(target, name)
    with pytest.raises(SaferError, match=r"cannot write under .*No space left.*finished work is kept"):
        write_parquet(ROWS, tmp_path / "out" / part_name(0))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_while_text_is_written_leaves_the_old_text(tmp_path, full_disk):
    write_text("old", tmp_path / "a.txt")
    full_disk(os, "replace")
    with pytest.raises(SaferError, match="No space left"):
        write_text("new", tmp_path / "a.txt")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_disk_that_fills_while_an_artifact_is_built_leaves_no_complete_one(tmp_path, full_disk):
    def fails(out):
        build(out)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SaferError, match="No space left"):
        Place(tmp_path).make(RECIPE, fails)
    assert Place(tmp_path).find(RECIPE) is None


def test_other_disk_errors_are_not_disguised(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(PermissionError):
        write_text("x", tmp_path / "a.txt")


# Plans


def test_parts_are_fragments_that_read_back(tmp_path):
    for number in range(3):
        write_parquet(ROWS, tmp_path / part_name(number))
    fragments = part_fragments(tmp_path)
    assert [(f.number, f.start, f.stop) for f in fragments] == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    assert read_fragment(replace(fragments[1], start=1, stop=2))["a"].to_pylist() == [2]
    saved = save_plan(fragments, tmp_path)
    assert [replace(f, digest="") for f in saved] == fragments
    assert all(len(f.digest) == 64 for f in saved)
    assert len(part_files(tmp_path)) == 3  # the plan is no part


def planned_file(folder, text, **more):
    """A file of this text, as a fragment of its ten rows."""
    path = folder / "a.txt"
    write_text(text, path)
    return replace(Fragment(0, 0, str(path), 0, 10, *stamp(path), file="a.txt"), **more)


def test_an_unfinished_plan_holds_when_the_fragments_are_cut_anew(tmp_path):
    whole = planned_file(tmp_path / "in", "ten rows")
    old = save_plan([replace(whole, stop=5), replace(whole, number=1, start=5)], tmp_path)
    assert save_plan([whole], tmp_path) == old


def test_an_unfinished_plan_holds_where_its_files_were_moved_or_touched(tmp_path):
    before = planned_file(tmp_path / "in", "ten rows")
    save_plan([before], tmp_path)
    os.utime(before.path, ns=(1, 1))
    touched = replace(before, etag="1")
    assert save_plan([touched], tmp_path)[0].etag == "1"
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    moved = replace(touched, path=str(tmp_path / "elsewhere/a.txt"))
    (found,) = save_plan([moved], tmp_path)
    assert (found.path, found.file) == (moved.path, "a.txt")


@pytest.mark.parametrize("change", [{"text": "too many rows"}, {"text": "TEN ROWS"}, {"file": "b.txt"}, {"source": 1}])
def test_a_changed_input_is_refused_on_resume(tmp_path, change):
    text = change.pop("text", "ten rows")
    save_plan([planned_file(tmp_path / "in", "ten rows")], tmp_path)
    os.utime(tmp_path / "in/a.txt", ns=(1, 1))  # so that what is written next has another time
    now = planned_file(tmp_path / "in", text, **change)
    with pytest.raises(UserError, match=r"a.txt changed since the unfinished run .* began; put it back.*--fresh"):
        save_plan([now], tmp_path)
    with pytest.raises(UserError, match=r"changed since the unfinished run"):
        save_plan([], tmp_path)


def test_an_unfinished_plan_of_an_earlier_version_holds_where_its_files_lie(tmp_path):
    now = planned_file(tmp_path / "in", "ten rows")
    old = pa.table({name: [getattr(now, name)] for name in OLD_COLUMNS})
    write_parquet(old, tmp_path / "plan.parquet")
    with pytest.raises(UserError, match="changed since the unfinished run"):
        save_plan([replace(now, path=str(tmp_path / "elsewhere.txt"))], tmp_path)
    assert save_plan([now], tmp_path) == [now]


def test_fresh_replaces_nothing_but_an_artifact_of_its_stage(safer, tmp_path):
    source, site = tmp_path / "a.jsonl", tmp_path / "site"
    source.write_text('{"prompt": "p?", "chosen": "Yes.", "rejected": "No."}\n')
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "my web app"}')
    (site / "thesis.txt").write_text("years")
    code, _, err = safer("pairs", "--source", source, "--out", site, "--fresh")
    assert code == 2
    assert "holds a manifest.json that is none of ours; --fresh replaces pairs alone" in err
    assert (site / "thesis.txt").read_text() == "years"
    made = tmp_path / "pairs"
    assert safer("pairs", "--source", source, "--out", made)[0] == 0
    assert safer("pairs", "--source", source, "--out", made, "--fresh")[0] == 0
    code, _, err = safer("pairs", "--source", source, "--out", "")
    assert code == 2
    assert "a path is empty" in err


def test_work_of_a_stage_whose_plan_is_gone_is_refused(tmp_path):
    write_parquet(ROWS, tmp_path / "in" / part_name(0))
    fragments = part_fragments(tmp_path / "in")
    save_plan(fragments, tmp_path / "out")
    write_json({}, tmp_path / "out/done/00000000.json")
    (tmp_path / "out/plan.parquet").unlink()
    with pytest.raises(UserError, match=r"done/00000000.json was done by a plan, but .*plan.parquet is gone"):
        save_plan(fragments, tmp_path / "out")
