"""Inputs are what they are said to be, and what is refused or replaced costs nobody anything."""

import json
import os
import shutil

import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file
from support.tiny_run import audited, finished, write_config

from safer_ray.audit.read import open_audit
from safer_ray.config.sections import ScoresConfig
from safer_ray.errors import UserError, explained, one_line
from safer_ray.storage.artifacts import content_hash, read_parts
from safer_ray.storage.files import write_parquet

ROW = '{"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}'


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    run = finished(tmp_path_factory.getbasetemp())
    return {name: artifact.path for name, artifact in (*run.artifacts.items(), *run.curated.items())}


@pytest.fixture
def refused(safer):
    """Run a command that ends with exit code 2; returns its last line."""

    def call(*words):
        code, _, err = safer(*words)
        assert code == 2, err
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return call


def made(safer, *words):
    code, out, err = safer(*words)
    assert code == 0, err
    return out


# Models


def bundle(at, out, **other):
    given = {"reward": at["reward"], "sae": at["sae"], "features": at["select"], "codes": at["codes"]} | other
    return ["auditor", *(f"--{name}={path}" for name, path in given.items()), f"--out={out}"]


def without(folder, copy, name):
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    return copy


def torn(folder, copy, name):
    shutil.copytree(folder, copy)
    (copy / name).write_bytes((folder / name).read_bytes()[:100])
    return copy


@pytest.mark.parametrize("damage", [without, torn])
@pytest.mark.parametrize("role", ["reward", "sae"])
def test_a_bundle_is_not_made_of_a_model_without_its_weights(damage, role, refused, at, tmp_path):
    name = {"reward": "model.safetensors", "sae": "sae_weights.safetensors"}[role]
    copy = damage(at[role], tmp_path / "copy", name)
    assert f"{copy}" in refused(*bundle(at, tmp_path / "out", **{role: copy}))
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_model_in_several_files_lacks_none_of_them(refused, at, tmp_path):
    copy = without(at["reward"], tmp_path / "copy", "model.safetensors")
    weights = load_file(at["reward"] / "model.safetensors")
    save_file(weights, copy / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert "has no model-00002-of-00002.safetensors" in refused(*bundle(at, tmp_path / "out", reward=copy))
    (copy / "model.safetensors.index.json").write_text("[]")
    assert "index.json is not readable" in refused(*bundle(at, tmp_path / "out", reward=copy))


def test_a_bundle_is_not_made_of_an_sae_of_another_width(refused, at, tmp_path):
    copy = shutil.copytree(at["reward"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    line = refused(*bundle(at, tmp_path / "out", reward=copy))
    assert f"{at['sae']} reads vectors of 32, the model in {copy} gives 16" in line
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_folder_that_no_stage_wrote_is_no_bundle_and_no_detector(refused, at, tmp_path):
    copy = without(at["auditor"], tmp_path / "copy", "manifest.json")
    for words in (
        ["audit", "--pairs", at["corpus"] / "heldout.jsonl", "--auditor", copy],
        ["scores", "--codes", at["codes"], "--pairs", at["noise"], "--auditor", copy],
    ):
        assert f"{copy} holds no auditor: it has no manifest.json" in refused(*words, "--out", tmp_path / "out")
    assert "holds no detector" in refused(*bundle(at, tmp_path / "out", detector=copy))
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_bundle_takes_the_features_file_as_it_takes_its_folder(safer, at, tmp_path):
    made(safer, *bundle(at, tmp_path / "folder"))
    made(safer, *bundle(at, tmp_path / "file", features=at["select"] / "features.json"))
    first, other = (tmp_path / name / "features.json" for name in ("folder", "file"))
    assert first.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("ids", ["[true]", "[1.5]", "[1e99]", "[-1]", "[99999999999]", '["1"]', "[null]"])
def test_features_that_are_no_ids_are_refused(refused, at, tmp_path, ids):
    file = tmp_path / "features.json"
    file.write_text(f'{{"safe": {ids}, "unsafe": [1]}}')
    words = ["rescore", "--codes", at["codes"], "--features", file, "--out", tmp_path / "out"]
    assert "wanted distinct feature ids >= 0" in refused(*words)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"1": true}', "[true]", "", "{"])
def test_ratings_that_are_none_are_refused(refused, at, tmp_path, text):
    file = tmp_path / "ratings.json"
    file.write_text(text)
    words = ["select", "--salience", at["salience"], "--ratings", file, "--out", tmp_path / "out"]
    assert str(file) in refused(*words)
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_of_another_stage_is_refused_before_anything_is_made(refused, at, tmp_path):
    for name, folder in (("codes", "noise"), ("codes", "select"), ("pairs", "codes"), ("scores", "codes")):
        words = ["curate", "--strategy=safer", "--action=drop", "--percent=5", "--pairs", at["noise"]]
        words = [*words, "--scores", at["scores"]] if name != "codes" else ["salience", "--codes", at["codes"]]
        refused(*words, f"--{name}", at[folder], "--out", tmp_path / "deep/out")
    assert list(tmp_path.iterdir()) == []


# Values


def test_a_width_that_no_memory_holds_is_refused_by_its_number(refused, at, tmp_path):
    line = refused("salience", "--codes", at["codes"], "--latents", 10**11, "--out", tmp_path / "out")
    assert line == "safer-ray: --latents 100000000000: wanted a number from 1 to 67108864"
    words = ["sae", "--activations", at["activations"], "--out", tmp_path / "out", "--set"]
    assert "latents: Input should be less than or equal to 67108864" in refused(*words, "latents=100000000000")
    for value in (".nan", ".inf", "-.inf"):
        assert "learning_rate: Input should be a finite number" in refused(*words, f"learning_rate={value}")
    assert "is not readable YAML" in refused(*words, "variant=[")


def test_what_a_disk_or_the_memory_refuses_is_one_line():
    assert str(explained(NotADirectoryError(20, "Not a directory", "/a/b"))).startswith("/a/b: Not a directory; check")
    assert isinstance(explained(PermissionError(13, "Permission denied", "/a")), UserError)
    assert not isinstance(explained(OSError(5, "Input/output error", "/a")), UserError)
    assert "ConnectionResetError" in str(explained(ConnectionResetError("peer")))
    assert "the memory does not suffice: 9 GiB" in str(explained(MemoryError("9 GiB")))
    assert one_line("a\nb\x1b[2Jü \udcff") == r"a\nb\x1b[2Jü \udcff"


def test_a_text_without_two_tokens_makes_no_activations(refused, at, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    words = ["activations", "--reward", at["reward"], "--set", "layer=1", "--out", tmp_path / "out"]
    assert "holds no text of two tokens or more" in refused(*words, "--text", tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()


# Sources


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson"])
@pytest.mark.parametrize("end", ["\r", ""])
def test_lines_that_end_with_a_return_alone_are_refused_by_name(refused, at, tmp_path, name, end):
    (tmp_path / name).write_bytes("\r".join([ROW] * 3).encode() + end.encode())
    told = f"{name}: its lines end with a CR alone"
    assert told in refused("inspect", tmp_path / name)
    assert told in refused("pairs", "--source", tmp_path / name, "--out", tmp_path / "out")
    words = ["audit", "--auditor", at["auditor"], "--out", tmp_path / "audit"]
    assert told in refused(*words, "--pairs", tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_texts_that_end_with_a_return_alone_are_refused_by_name(refused, at, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one text\ranother text\r")
    words = ["activations", "--reward", at["reward"], "--set", "layer=1", "--out", tmp_path / "out"]
    assert "a.txt: its lines end with a CR alone" in refused(*words, "--text", tmp_path / "a.txt")


def test_returns_inside_a_row_or_before_its_newline_are_as_before(safer, tmp_path):
    spread = ROW.replace('", "', '",\r"')
    (tmp_path / "rows.jsonl").write_bytes(f"{spread}\n{ROW}\r\n".replace("Yes", "Oh").encode())
    (tmp_path / "one.jsonl").write_bytes(f"{spread}\r".encode())
    for name, rows in (("rows.jsonl", 2), ("one.jsonl", 1)):
        assert f"{rows} read, {rows} good" in made(safer, "inspect", tmp_path / name)


def test_a_file_below_a_source_whose_name_is_no_text_is_refused_by_name(refused, at, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    path = os.fsencode(folder) + b"/caf\xe9.jsonl"
    with open(path, "w") as stream:
        stream.write(f"{ROW}\n")
    for words in (
        ["inspect", folder],
        ["pairs", "--source", folder, "--out", tmp_path / "out"],
        ["audit", "--pairs", folder, "--auditor", at["auditor"], "--out", tmp_path / "out"],
    ):
        assert r"caf\xe9.jsonl' is not UTF-8; rename it" in refused(*words)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_content_of_a_folder_counts_names_that_are_no_text(tmp_path):
    (tmp_path / "a").write_text("x")
    before = content_hash(tmp_path)
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xe9")
    assert content_hash(tmp_path) != before


def test_parts_whose_name_is_no_text_are_refused(refused, at, tmp_path):
    folder = shutil.copytree(at["codes"], tmp_path / "codes")
    os.rename(folder / "part-00000000.parquet", os.fsencode(folder) + b"/\xe9.parquet")
    assert "is not UTF-8; rename it" in refused("salience", "--codes", folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["noise", "drop_safer_5", "flip_safer_5", "export"])
def test_of_an_artifact_with_a_folder_of_pairs_these_are_its_rows(name, safer, at, tmp_path):
    if name == "export":
        audited_at(at, tmp_path / "audit")
        made(safer, "export", "--audit", tmp_path / "audit", "--out", tmp_path / "export")
    given = tmp_path / "export" if name == "export" else at[name]
    rows = len(read_parts(given / "pairs"))
    assert f"{rows} read, {rows} good" in made(safer, "inspect", given)
    made(safer, "pairs", "--source", given, "--out", tmp_path / "pairs")
    assert sorted(read_parts(tmp_path / "pairs")["pair_id"].to_pylist()) == sorted(
        read_parts(given / "pairs")["pair_id"].to_pylist()
    )
    made(safer, "audit", "--pairs", given, "--auditor", at["auditor"], "--out", tmp_path / "again")
    assert len(read_parts(tmp_path / "again/scores")) == rows


# What is replaced


def audited_at(at, out):
    from safer_ray.storage.artifacts import open_artifact

    audited(ScoresConfig(), at["corpus"] / "heldout.jsonl", open_artifact(at["auditor"]), out)
    (out / "manifest.json").write_text('{"stage": "audit", "name": "audit-0", "packages": {}}')
    return out


def test_a_run_made_again_deletes_no_artifact_that_its_own_config_reads(refused, safer, tmp_path):
    config = write_config(tmp_path)
    words = ["run", config, "--until", "noise"]
    made(safer, *words)
    (corpus,) = (tmp_path / "runs/tiny").glob("corpus-*")
    own = f'pairs.sources=[{{path: "{corpus}/train.jsonl", format: canonical}}]'
    before = content_hash(corpus)
    line = refused(*words, "--set", own, "--fresh")
    assert f"{corpus} is or holds {corpus}/train.jsonl, which this command reads, and would be deleted" in line
    assert content_hash(corpus) == before
    made(safer, *words, "--fresh")


def test_an_export_made_again_keeps_what_the_audit_was_of(safer, refused, at, tmp_path):
    audited_at(at, tmp_path / "first")
    made(safer, "export", "--audit", tmp_path / "first", "--out", tmp_path / "clean")
    words = ["audit", "--pairs", tmp_path / "clean", "--auditor", at["auditor"], "--out", tmp_path / "second"]
    made(safer, *words)
    line = refused("export", "--audit", tmp_path / "second", "--out", tmp_path / "clean", "--fresh")
    assert "which this command reads, and would be deleted" in line
    assert open_audit(tmp_path / "second").name


def test_nothing_is_written_into_what_is_read(refused, at, tmp_path):
    codes = shutil.copytree(at["codes"], tmp_path / "codes")
    line = refused("salience", "--codes", codes, "--out", codes / "salience")
    assert f"{codes}/salience lies in {codes}, which this command reads" in line
    auditor = shutil.copytree(at["auditor"], tmp_path / "bundle")
    words = ["audit", "--auditor", auditor, "--pairs", at["corpus"] / "heldout.jsonl"]
    assert "which this command reads" in refused(*words, "--out", auditor / "audit")
    assert not (codes / "salience").exists()
    assert not (auditor / "audit").exists()


def test_a_diff_replaces_a_diff_and_nothing_else(safer, refused, at, tmp_path):
    audit = audited_at(at, tmp_path / "audit")
    (tmp_path / "pairs.jsonl").write_text(ROW)
    for path, told in (
        (tmp_path / "pairs.jsonl", "no diff wrote it"),
        (audit / "flagged.jsonl", "which this command reads"),
        (audit / "new.json", "which this command reads"),
        (tmp_path, "no diff wrote it"),
    ):
        assert told in refused("diff", audit, audit, "--json", path)
    assert (tmp_path / "pairs.jsonl").read_text() == ROW
    for _ in range(2):
        made(safer, "diff", audit, audit, "--json", tmp_path / "new.json")


def test_an_out_behind_a_link_is_made_where_the_link_leads(safer, at, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    words = ["salience", "--codes", at["codes"], "--out", tmp_path / "link"]
    for more in ([], [], ["--fresh"]):
        made(safer, *words, *more)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/manifest.json").is_file()


def test_an_out_in_the_home_directory_is_made_there(safer, at, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made(safer, "salience", "--codes", at["codes"], "--out=~/x/out")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert (tmp_path / "home/x/out/manifest.json").is_file()


def test_a_refused_stage_leaves_work_that_is_done_and_nothing_else(refused, safer, at, tmp_path):
    words = ["curate", "--pairs", at["noise"], "--strategy=suspicion", "--action=drop", "--percent=5"]
    scores = tmp_path / "scores"
    rows = read_parts(at["scores"])
    write_parquet(
        rows.set_column(rows.schema.get_field_index("pair_id"), "pair_id", pa.array(["x"] * len(rows))),
        scores / "part-00000000.parquet",
    )
    refused(*words, "--scores", scores, "--out", tmp_path / "deep/er/out")
    assert list(tmp_path.iterdir()) == [scores]
    source = tmp_path / "rows.jsonl"
    source.write_text(f"{ROW}\nx\n")
    line = refused("pairs", "--source", source, "--out", tmp_path / "out")
    assert (tmp_path / line.rpartition("see ")[2]).is_dir()


# What is on the disk


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "[" * 100_000, '{"stage": "codes", "name": 1}', '{"stage": "codes", "name": "x", "metrics": []}'],
)
def test_a_manifest_that_is_none_is_one_line(refused, at, tmp_path, text):
    folder = shutil.copytree(at["codes"], tmp_path / "codes")
    (folder / "manifest.json").write_text(text)
    line = refused("salience", "--codes", folder, "--out", tmp_path / "out")
    assert f"{folder}/manifest.json is " in line
    assert ("is no manifest of ours" in line) != ("is empty or torn; put it back" in line)


def test_ls_tells_a_manifest_of_somebody_else_and_goes_on(safer, at, tmp_path):
    shutil.copytree(at["codes"], tmp_path / "codes")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension/manifest.json").write_text('{"manifest_version": 3}')
    (tmp_path / "small").mkdir()
    (tmp_path / "small/manifest.json").write_text('{"stage": "x", "name": "x-0", "packages": {}}')
    out = made(safer, "ls", tmp_path)
    assert "extension/manifest.json is no manifest of an artifact" in out
    assert f"{tmp_path}/codes" in out
    assert f"{tmp_path}/small" in out


@pytest.mark.parametrize("name", ["[/]", "[bold]", "[/red]x"])
def test_brackets_in_a_path_are_shown_as_they_are(safer, at, tmp_path, name):
    words = ["salience", "--codes", at["codes"], "--out", tmp_path / name / "out"]
    assert f"{name}/out" in made(safer, *words)
    assert f"{name}/out" in made(safer, "ls", tmp_path)
