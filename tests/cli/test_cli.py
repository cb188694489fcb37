"""The command line: a command a stage, and one clear line for whatever is wrong."""

import contextlib
import errno
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.tiny_run import POISONED, every, finished, tiny_config, write_config

from safer_ray.cli import app as cli
from safer_ray.cli import runs
from safer_ray.cli.shared import console, ray_config
from safer_ray.pipeline import progress
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.sae.formats import sae_layer
from safer_ray.storage import files
from safer_ray.storage.artifacts import open_artifact, read_parts
from safer_ray.storage.files import write_parquet

COMMANDS = (
    "run",
    "plan",
    "ls",
    "inspect",
    "report",
    "audit",
    "pairs",
    "reward",
    "activations",
    "sae",
    "codes",
    "salience",
    "contexts",
    "verdicts",
    "select",
    "auditor",
    "scores",
    "rescore",
    "curate",
    "evaluate",
)
LENIENT = ("--set", "thresholds=[0.0, 0.0, 0.0, 0.0]")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def at(tiny):
    """Directories of the finished run by stage."""
    return {name: artifact.path for name, artifact in tiny.artifacts.items()}


def events(err):
    """The JSON lines that a command whose output is no terminal writes while it works."""
    return [json.loads(line) for line in err.splitlines()]


@pytest.fixture
def refused(safer):
    """Run a command that must end with exit code 2 and, behind what it did so far, one clear line; returns the line."""

    def call(*words, code=2):
        ended, _, err = safer(*words)
        assert ended == code, err
        *before, line = err.splitlines(keepends=True)
        assert all({"time", "run", "event"} <= set(event) for event in events("".join(before)))
        assert line.startswith("safer-ray: ")
        assert line.endswith("\n")
        return line

    return call


def ok(answer):
    code, out, err = answer
    assert code == 0, err
    return out


def incomplete(directory):
    """Whether nothing at `directory` could be taken for a whole artifact."""
    return not (directory / "manifest.json").exists()


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_what_a_command_does(safer, command):
    out = ok(safer(*([command] if command else []), "--help"))
    assert "Usage" in out
    assert "--help" in out


def test_help_lists_every_command(safer):
    out = ok(safer("--help"))
    assert all(f" {command} " in out for command in COMMANDS)


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys\nfrom safer_ray.cli.app import main\n"
        f"for command in {['', *COMMANDS]!r}:\n"
        "    sys.argv = ['safer-ray', *([command] if command else []), '--help']\n"
        "    try:\n        main()\n    except SystemExit as ended:\n        assert not ended.code, command\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pandas', 'scipy', 'deepspeed'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_version_is_told(safer):
    from safer_ray import __version__

    assert ok(safer("--version")).strip() == __version__


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["salience", "--codes", "x"], "--out"),
        (["curate", "--percent", "x"], "percent"),
        (["run"], "config"),
        (["polish"], "polish"),
        (["pairs", "--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_usage_ends_with_two(safer, words, named):
    code, _, err = safer(*words)
    assert code == 2
    assert named in err
    assert "Traceback" not in err


# A command a stage


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory):
    """The commands of all stages, each from the directories before it."""
    root = tmp_path_factory.mktemp("chain")
    config = write_config(root)
    corpus = tiny.artifacts["corpus"].path
    d = {name: root / name for name in COMMANDS}
    shared = ["--config", config]
    pairs, model, sae = ["--pairs", d["pairs"]], ["--reward", d["reward"]], ["--sae", d["sae"]]
    codes, ranked = ["--codes", d["codes"]], ["--salience", d["salience"]]
    return root, {
        "pairs": ["--source", corpus / "train.jsonl"],
        "reward": [*pairs, *shared],
        "activations": [*pairs, *model, *shared],
        "sae": ["--activations", d["activations"], *shared],
        "codes": [*pairs, *model, *sae],
        "salience": [*codes, "--mode", "response"],
        "contexts": [*ranked, *codes, *pairs, *model, "--set", "per_feature=3"],
        "verdicts": [*ranked, *model, *sae, *LENIENT, "--set", f"exchanges={corpus / 'probe.yaml'}"],
        "select": [*ranked, "--verdicts", d["verdicts"]],
        "auditor": [*model, *sae, "--features", d["select"], *codes],
        "scores": [*codes, *pairs, "--auditor", d["auditor"]],
        "rescore": [*codes, "--features", d["select"]],
        "curate": [*pairs, "--scores", d["scores"], "--strategy", "safer", "--action", "drop", "--percent", "5"],
        "evaluate": [*model, *pairs],
    }


def test_each_stage_by_hand_writes_exactly_its_out_and_is_found_again(safer, chain):
    root, commands = chain
    for stage, words in commands.items():
        out = ok(safer(stage, *words, "--out", root / stage))
        manifest = json.loads((root / stage / "manifest.json").read_text())
        assert manifest["stage"] == ("scores" if stage == "rescore" else stage)
        assert manifest["name"] in out
        assert str(root / stage) in out
        written = (root / stage / "manifest.json").stat().st_mtime_ns
        assert manifest["name"] in ok(safer(stage, *words, "--out", root / stage))
        assert (root / stage / "manifest.json").stat().st_mtime_ns == written, stage
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_fresh_makes_a_stage_again(safer, at, tmp_path):
    words = ["salience", "--codes", at["codes"], "--out", tmp_path / "out"]
    ok(safer(*words))
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    ok(safer(*words, "--fresh"))
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns > before


def test_features_of_a_ratings_file_rescore_pairs_in_either_mode(safer, at, tmp_path):
    salience = read_parts(at["salience"])
    features = [row["feature"] for row in salience.to_pylist() if row["salience"] != 0]
    (tmp_path / "ratings.json").write_text(json.dumps({str(f): 5 for f in features[:6]} | {str(features[6]): None}))
    ok(safer("select", "--salience", at["salience"], "--ratings", tmp_path / "ratings.json", "--out", tmp_path / "f"))
    chosen = json.loads((tmp_path / "f/features.json").read_text())
    assert sorted(chosen["safe"] + chosen["unsafe"]) == sorted(features[:6])
    for mode in ("paper", "response"):
        out = tmp_path / mode
        file = tmp_path / "f/features.json"
        ok(safer("rescore", "--codes", at["codes"], "--features", file, "--mode", mode, "--out", out))
        assert open_artifact(out, "scores").metrics["mode"] == mode
    scores = [read_parts(tmp_path / mode)["score"].to_numpy() for mode in ("paper", "response")]
    assert not np.allclose(*scores)


def test_an_audit_scores_a_file_and_lists_what_it_flags(safer, at, tmp_path):
    train = at["corpus"] / "train.jsonl"
    out = ok(safer("audit", "--auditor", at["auditor"], "--pairs", train, "--out", tmp_path / "audit"))
    flagged = [json.loads(line) for line in (tmp_path / "audit/flagged.jsonl").read_text().splitlines()]
    assert flagged
    assert all(row["flag"] and row["suspicion"] >= 0.95 and row["reasons"] for row in flagged)
    assert f"{len(flagged)} pairs (" in out
    again = ok(safer("audit", "--auditor", at["auditor"], "--pairs", train, "--out", tmp_path / "audit"))
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_run_says_what_it_made_or_found_and_closes_with_a_table(safer, tiny):
    config = tiny.directory.parent.parent / "tiny.yaml"
    code, out, err = safer("run", config)
    assert code == 0, err
    assert {(event["event"], event["state"]) for event in events(err)} == {("stage", "found")}
    assert {event["artifact"] for event in events(err)} == set(every(tiny))
    assert "AUROC" in out
    assert "flip_safer_5" in out
    assert str(tiny.directory / "report.html") in out
    assert "report.html" in ok(safer("report", config))


def test_run_on_a_terminal_says_it_in_lines(safer, tiny, monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "no_color", True)
    code, out, err = safer("run", tiny.directory.parent.parent / "tiny.yaml")
    assert code == 0
    assert err == ""
    assert all(f"found {name}" in out for name in every(tiny))
    assert "made" not in out


def test_a_stage_by_hand_tells_how_far_it_is(safer, at, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    monkeypatch.setattr(progress, "heartbeat", lambda *_: contextlib.nullcontext())
    words = ["codes", "--pairs", at["noise"], "--reward", at["reward"], "--sae", at["sae"], "--out", tmp_path / "out"]
    code, _, err = safer(*words)
    assert code == 0
    found = [line for line in events(err) if line["event"] == "progress"]
    assert [(line["stage"], line["done"], line["total"]) for line in found] == [
        ("codes", done, 4) for done in (0, 1, 2, 3, 4)
    ]


def test_plan_lists_every_artifact_and_whether_it_is_there(safer, tiny, tmp_path):
    names = set(every(tiny))
    there = ok(safer("plan", tiny.directory.parent.parent / "tiny.yaml")).splitlines()
    assert {line.split()[1] for line in there if line.startswith("there")} == names
    missing = ok(safer("plan", write_config(tmp_path))).splitlines()
    assert {line.split()[1] for line in missing if line.startswith("missing")} == names
    assert not (tmp_path / "runs").exists()


def test_ls_lists_artifacts_with_their_rows_and_marks_the_red_team(safer, tiny):
    out = ok(safer("ls", tiny.directory)).splitlines()
    for name, artifact in every(tiny).items():
        lines = [line for line in out if line.startswith(f"{artifact.path} ")]
        assert len(lines) == 1, name
        assert ("red team" in lines[0]) == artifact.red_team
    poisoned = [line for line in out if "red team" in line]
    assert len(poisoned) == 3 * len(POISONED)


def test_ls_of_nothing_says_how_to_make_a_run(refused, tmp_path):
    assert "no runs in" in refused("ls", tmp_path / "none")


def test_inspect_shows_format_counts_and_reasons(safer, at):
    out = ok(safer("inspect", at["corpus"] / "train.jsonl"))
    assert "canonical" in out
    assert "328 read" in out
    assert "refused" in out
    for reason in ("bad UTF-8", "not JSON", "wrong type"):
        assert reason in out
    assert "example 1" in out


def test_verbose_shows_the_traceback(safer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["safer-ray", "-v", "run", str(tmp_path / "none.yaml")])
    with pytest.raises(Exception, match="no config at"):
        cli.main()
    assert "no config at" in capsys.readouterr().err


# Bad input


def test_a_missing_path_is_named(refused, at, tmp_path):
    none, out = tmp_path / "none", tmp_path / "out"
    for words in (
        ["run", none],
        ["plan", none],
        ["pairs", "--source", none],
        ["inspect", none],
        ["reward", "--pairs", none],
        ["activations", "--pairs", at["pairs"], "--reward", none],
        ["sae", "--activations", none],
        ["codes", "--pairs", at["pairs"], "--reward", at["reward"], "--sae", none],
        ["salience", "--codes", none],
        ["select", "--salience", at["salience"], "--ratings", none],
        ["rescore", "--codes", at["codes"], "--features", none],
        ["audit", "--auditor", none, "--pairs", at["corpus"] / "train.jsonl"],
        ["audit", "--auditor", at["auditor"], "--pairs", none],
        ["evaluate", "--reward", none, "--pairs", at["pairs"]],
    ):
        takes_out = words[0] not in ("run", "plan", "inspect")
        assert str(none) in refused(*words, *(["--out", out] if takes_out else []))
        assert incomplete(out)
        shutil.rmtree(out, ignore_errors=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sae.widht=3", "sae.widht: unknown key"),
        ("sae.k=65", "k 65 is larger than the 64 latents"),
        ("activations.layer=3", "layer 3 lies past the model's 2 layers"),
        ("curate.drop_safer_5.percent=101", "less than or equal to 100"),
        ("curate.drop_safer_5.percent=-1", "greater than or equal to 0"),
        ("curate.flip_safer_5.red_team=false", "--i-am-red-teaming"),
        ("judge.exchanges=nowhere.yaml", "nowhere.yaml"),
        ("reward.base=package:no_such_package/model", "not installed"),
        ("reward.base=no/such/folder", "no model in no/such/folder"),
        ("noise.where=section = safety", "write it as `section == safety`"),
        ("reward.learning_rate=0", "greater than 0"),
        ("nonsense", "key=value"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_made(refused, tmp_path, assignment, message):
    assert message in refused("run", write_config(tmp_path), "--set", assignment)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_stage_or_runner_is_refused(refused, at, tmp_path):
    config = write_config(tmp_path)
    assert "'scoring' is no stage" in refused("run", config, "--until", "scoring")
    words = ["audit", "--auditor", at["auditor"], "--pairs", at["corpus"] / "train.jsonl", "--out", tmp_path / "audit"]
    for command in (["run", config], words):
        line = refused(*command, "--runner", "nosuch")
        assert "--runner 'nosuch': choose local (this process) or ray (a cluster)" in line
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("actors", "message"),
    [
        ("x", "--actors 'x': write it as MIN:MAX, say 1:8"),
        ("1:x", "--actors '1:x': write it as MIN:MAX"),
        (":4", "--actors ':4': write it as MIN:MAX"),
        ("", "--actors is empty"),
        ("-1:4", "--actors '-1:4': write it as MIN:MAX"),
        ("2:1", "min_actors 2 is larger than max_actors 1"),
        ("0:3", "min_actors: Input should be greater than 0 (got 0)"),
    ],
)
def test_actors_that_are_no_range_are_refused(refused, at, tmp_path, actors, message):
    words = ["audit", "--auditor", at["auditor"], "--pairs", at["corpus"] / "train.jsonl", "--out", tmp_path / "audit"]
    assert message in refused(*words, "--runner", "ray", "--actors", actors)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(("actors", "wanted"), [(None, (1, 2)), ("3", (3, 3)), ("1:8", (1, 8)), ("4:", (4, 4))])
def test_actors_are_a_range_or_one_number(actors, wanted):
    config = ray_config(None, None, "ray", actors)
    assert (config.min_actors, config.max_actors) == wanted


def test_the_cluster_is_set_by_a_config_and_by_single_values_over_it(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("ray: {max_actors: 7, actor_gpus: 1}\n")
    config = ray_config(file, ["ray.actor_gpus=0.5", "carried=[context]", "ray.threads=3"], "ray", "4:9")
    assert (config.min_actors, config.max_actors, config.actor_gpus, config.threads) == (4, 9, 0.5, 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ray.actor_gpus=-1", "actor_gpus: Input should be greater than or equal to 0"),
        ("ray.gpus=1", "gpus"),
    ],
)
def test_a_cluster_that_cannot_be_set_so_is_refused(refused, at, tmp_path, setting, message):
    words = ["audit", "--auditor", at["auditor"], "--pairs", at["corpus"] / "train.jsonl", "--out", tmp_path / "audit"]
    assert message in refused(*words, "--runner", "ray", "--set", setting)
    assert not (tmp_path / "audit").exists()


def test_what_sets_a_cluster_is_refused_where_there_is_none(refused, at, tmp_path):
    words = ["audit", "--auditor", at["auditor"], "--pairs", at["corpus"] / "train.jsonl", "--out", tmp_path / "audit"]
    wanted = "--set ray.actor_gpus=1: it sets a cluster; add --runner ray"
    assert wanted in refused(*words, "--set", "ray.actor_gpus=1")
    words = ["evaluate", "--pairs", at["pairs"], "--reward", at["reward"], "--out", tmp_path / "out"]
    assert wanted in refused(*words, "--set", "ray.actor_gpus=1")
    line = refused(*words, "--runner", "ray", "--set", "layer=2")
    assert "--set layer=2: of this command only the cluster is set, say ray.actor_gpus=1" in line


def test_a_layer_past_a_pretrained_base_is_refused_before_anything_is_made(refused, at, tmp_path):
    config = write_config(tmp_path)
    line = refused("run", config, "--set", f"reward.base={at['reward']}", "--set", "activations.layer=9")
    assert "layer 9 lies past the 2 layers" in line
    assert not (tmp_path / "runs").exists()
    words = ["activations", "--pairs", at["pairs"], "--reward", at["reward"], "--set", "layer=9"]
    assert "layer 9 lies past the 2 layers" in refused(*words, "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_more_refused_rows_than_allowed_end_the_run(refused, at, tmp_path):
    words = ["pairs", "--source", at["corpus"] / "train.jsonl", "--max-refused-share", "0.01"]
    line = refused(*words, "--out", tmp_path / "out")
    assert "8 of 328 rows were refused, more than pairs.max_refused_share 0.01" in line
    assert incomplete(tmp_path / "out")
    assert line == refused(*words, "--out", tmp_path / "out")


def test_no_pairs_left_ends_the_run(refused, tmp_path):
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "", "rejected": ""}\n' * 3)
    line = refused("pairs", "--source", rows, "--max-refused-share", "1", "--out", tmp_path / "out")
    assert "no pairs left of 3 rows" in line
    assert incomplete(tmp_path / "out")


def test_an_empty_file_ends_the_run(refused, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    refused("pairs", "--source", tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_activations_that_are_nan_are_refused_with_their_pair(refused, at, tmp_path):
    copy = shutil.copytree(at["activations"], tmp_path / "activations")
    part = sorted(copy.glob("part-*.parquet"))[0]
    rows = pq.read_table(part)
    norm = rows["norm"].to_numpy().copy()
    norm[3] = np.nan
    pq.write_table(rows.set_column(rows.schema.get_field_index("norm"), "norm", pa.array(norm)), part)
    line = refused("sae", "--activations", copy, "--set", "latents=64", "--set", "k=4", "--out", tmp_path / "out")
    assert f"row 3 (pair {rows['pair_id'][3].as_py()!r}) is NaN" in line
    assert incomplete(tmp_path / "out")


def test_a_reward_model_that_gives_nan_is_refused_with_the_pair(refused, at, tmp_path):
    copy = shutil.copytree(at["reward"], tmp_path / "reward")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for words in (["codes", "--sae", at["sae"]], ["activations", "--set", "layer=1"], ["evaluate"]):
        out = tmp_path / words[0]
        line = refused(*words, "--pairs", at["pairs"], "--reward", copy, "--out", out)
        assert "NaN or infinite" in line
        assert "pair 'train-" in line
        assert incomplete(out)


def test_a_tokenizer_past_the_embedding_is_refused(refused, at, tmp_path):
    copy = shutil.copytree(at["reward"], tmp_path / "reward")
    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] = 350
    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:350].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    line = refused("evaluate", "--reward", copy, "--pairs", at["pairs"], "--out", tmp_path / "out")
    assert "the embedding only 350 rows" in line
    assert incomplete(tmp_path / "out")


def test_a_model_without_a_reward_head_is_refused(refused, at, tmp_path):
    copy = shutil.copytree(at["reward"], tmp_path / "reward")
    weights = load_file(copy / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    line = refused("evaluate", "--reward", copy, "--pairs", at["pairs"], "--out", tmp_path / "out")
    assert "is no reward model: it has no weights for score.weight" in line


def test_corrupt_weights_are_refused(refused, at, tmp_path):
    copy = shutil.copytree(at["reward"], tmp_path / "reward")
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("evaluate", "--reward", copy, "--pairs", at["pairs"], "--out", tmp_path / "out")
    other = shutil.copytree(at["sae"], tmp_path / "sae")
    (other / "sae_weights.safetensors").write_bytes(b"not weights")
    words = ["codes", "--pairs", at["pairs"], "--reward", at["reward"], "--sae", other]
    assert "corrupt weights" in refused(*words, "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_an_sae_of_another_width_is_refused(refused, at, tmp_path):
    copy = shutil.copytree(at["sae"], tmp_path / "sae")
    weights = load_file(copy / "sae_weights.safetensors")
    weights["W_enc"] = torch.zeros(16, 64)
    weights["W_dec"] = torch.zeros(64, 16)
    weights["b_dec"] = torch.zeros(16)
    save_file(weights, copy / "sae_weights.safetensors")
    words = ["codes", "--pairs", at["pairs"], "--reward", at["reward"], "--sae", copy]
    assert "the SAE reads 16 dimensions" in refused(*words, "--out", tmp_path / "out")


def test_a_truncated_part_is_a_corrupt_artifact(refused, at, tmp_path):
    copy = shutil.copytree(at["codes"], tmp_path / "codes")
    part = sorted(copy.glob("part-*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:-100])
    line = refused("salience", "--codes", copy, "--out", tmp_path / "out")
    assert f"corrupt artifact: {part}" in line
    assert incomplete(tmp_path / "out")


def test_a_broken_manifest_is_a_corrupt_artifact(refused, at, tmp_path):
    copy = shutil.copytree(at["codes"], tmp_path / "codes")
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:40])
    assert "corrupt artifact" in refused("salience", "--codes", copy, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "words",
    [
        ["sae", "--activations", "codes"],
        ["reward", "--pairs", "codes"],
        ["codes", "--pairs", "pairs", "--reward", "sae", "--sae", "sae"],
        ["codes", "--pairs", "pairs", "--reward", "reward", "--sae", "reward"],
        ["salience", "--codes", "pairs"],
        ["select", "--salience", "codes", "--verdicts", "verdicts"],
        ["select", "--salience", "salience", "--verdicts", "salience"],
        ["auditor", "--reward", "reward", "--sae", "sae", "--features", "codes", "--codes", "codes"],
        ["scores", "--codes", "codes", "--pairs", "pairs", "--auditor", "select"],
        ["scores", "--codes", "pairs", "--pairs", "pairs", "--auditor", "auditor"],
        [
            "curate",
            "--pairs",
            "pairs",
            "--scores",
            "codes",
            "--strategy",
            "safer",
            "--action",
            "drop",
            "--percent",
            "5",
        ],
        ["evaluate", "--reward", "codes", "--pairs", "pairs"],
        ["evaluate", "--reward", "reward", "--pairs", "codes"],
        ["contexts", "--salience", "salience", "--codes", "codes", "--pairs", "codes", "--reward", "reward"],
    ],
    ids=lambda words: f"{words[0]}:{'-'.join(w for w in words[1:] if not w.startswith('--'))}",
)
def test_another_stages_directory_is_refused(refused, at, tmp_path, words):
    refused(*(at.get(w, w) if i else w for i, w in enumerate(words)), "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_activations_that_do_not_say_their_layer_are_refused(refused, at, tmp_path):
    foreign = shutil.copytree(at["activations"], tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    assert "does not say its layer" in refused("sae", "--activations", foreign, "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_an_sae_is_trained_on_a_file_of_vectors_from_outside_that_says_its_layer(safer, at, tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 16)).tolist()
    write_parquet(pa.table({"x": pa.array(x, pa.list_(pa.float32()))}), tmp_path / "mine.parquet")
    words = ["--activations", tmp_path / "mine.parquet", "--out", tmp_path / "out", "--layer", "3"]
    small = ["--set", "latents=32", "--set", "k=4", "--set", "steps=5", "--set", "batch_size=64"]
    ok(safer("sae", *words, *small))
    assert sae_layer(tmp_path / "out") == 3


def test_an_sae_goes_on_from_another_and_is_tried_on_pairs(safer, at, tmp_path):
    words = ["--activations", at["activations"], "--start", at["sae"], "--out", tmp_path / "out"]
    judged = ["--pairs", at["noise"], "--reward", at["reward"]]
    small = ["--set", "latents=64", "--set", "k=4", "--set", "steps=5", "--set", "batch_size=64"]
    ok(safer("sae", *words, *judged, *small))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["inputs"]["start"] == at["sae"].name
    assert manifest["metrics"]["spliced"]["all tokens"]["pairs"] > 0


@pytest.mark.parametrize("words", [["--pairs", "noise"], ["--reward", "reward"]], ids=str)
def test_pairs_and_the_model_that_reads_them_come_together(refused, at, tmp_path, words):
    given = [words[0], at[words[1]]]
    said = refused("sae", "--activations", at["activations"], *given, "--out", tmp_path / "out")
    assert "pass --pairs and --reward together" in said


def test_general_text_is_harvested_by_itself(safer, at, tmp_path, refused):
    text = tmp_path / "text.txt"
    text.write_text("One line of text.\nAnother one, which is longer.\n", encoding="utf-8")
    ok(safer("activations", "--text", text, "--reward", at["reward"], "--set", "layer=1", "--out", tmp_path / "out"))
    assert set(read_parts(tmp_path / "out")["side"].to_pylist()) == {"text"}
    both = ["--text", text, "--pairs", at["pairs"], "--reward", at["reward"]]
    assert "either --pairs DIR or --text FILE" in refused("activations", *both, "--out", tmp_path / "other")


def test_a_foreign_table_of_salience_does_for_contexts(safer, at, tmp_path):
    foreign = shutil.copytree(at["salience"], tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    words = ["--codes", at["codes"], "--pairs", at["noise"], "--reward", at["reward"], "--out", tmp_path / "out"]
    ok(safer("contexts", "--salience", foreign, *words))
    assert read_parts(tmp_path / "out").equals(read_parts(at["contexts"]))


def test_pairs_that_were_not_scored_cannot_be_curated(refused, at, tmp_path):
    words = ["--strategy", "safer", "--action", "drop", "--percent", "5", "--out", tmp_path / "out"]
    line = refused("curate", "--pairs", at["evaluation_pairs"], "--scores", at["scores"], *words)
    assert "120 pairs have no score" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--action", "poison", "--percent", "5"], "--i-am-red-teaming"),
        (["--action", "drop", "--percent", "101"], "percent"),
        (["--action", "drop", "--percent", "-1"], "percent"),
        (["--action", "drop", "--percent", "nan"], "percent"),
        (["--action", "drop", "--percent", "100"], "leaves no pairs"),
        (["--action", "burn", "--percent", "5"], "action"),
        (["--action", "drop", "--percent", "5", "--where", "colour == red"], "colour"),
        (["--action", "drop", "--percent", "5", "--where", "section ="], "cannot read the condition 'section ='"),
    ],
)
def test_a_curation_that_cannot_be_is_refused(refused, at, tmp_path, words, message):
    given = ["curate", "--pairs", at["noise"], "--scores", at["scores"], "--strategy", "safer"]
    assert message in refused(*given, *words, "--out", tmp_path / "out")
    assert incomplete(tmp_path / "out")


def test_poison_by_hand_needs_the_flag_and_is_marked(safer, at, tmp_path):
    given = ["curate", "--pairs", at["noise"], "--scores", at["scores"], "--strategy", "safer", "--action", "poison"]
    ok(safer(*given, "--percent", "2", "--i-am-red-teaming", "--out", tmp_path / "out"))
    assert open_artifact(tmp_path / "out", "curate").red_team
    assert set(read_parts(tmp_path / "out/pairs")["red_team"].to_pylist()) == {True}


def test_no_feature_rated_five_ends_the_selection(refused, at, tmp_path):
    features = read_parts(at["salience"], ["feature"])["feature"].to_pylist()
    (tmp_path / "ratings.json").write_text(json.dumps({str(f): 4 for f in features}))
    line = refused(
        "select", "--salience", at["salience"], "--ratings", tmp_path / "ratings.json", "--out", tmp_path / "o"
    )
    assert "is rated 5 or better (highest: 4)" in line
    assert incomplete(tmp_path / "o")


@pytest.mark.parametrize("content", ['{"a": 5}', '{"1": 6}', '{"1": "5"}', "[]", "nonsense", '{"1": true}'])
def test_ratings_that_are_none_are_refused(refused, at, tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    refused("select", "--salience", at["salience"], "--ratings", tmp_path / "r.json", "--out", tmp_path / "out")


def test_ratings_and_verdicts_exclude_each_other(refused, at, tmp_path):
    assert "either --ratings FILE or --verdicts DIR" in refused(
        "select", "--salience", at["salience"], "--out", tmp_path / "o"
    )


def test_an_out_that_is_not_empty_is_left_alone(refused, at, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("dear")
    line = refused("salience", "--codes", at["codes"], "--out", tmp_path / "out", "--fresh")
    assert "is not empty and holds no artifact" in line
    assert (tmp_path / "out/thesis.txt").read_text() == "dear"
    assert "the config or the inputs differ" in refused("salience", "--codes", at["codes"], "--out", at["scores"])
    assert open_artifact(at["scores"], "scores")


def test_a_bundle_of_another_format_is_refused(refused, at, tmp_path):
    copy = shutil.copytree(at["auditor"], tmp_path / "auditor")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["metrics"]["format"] = 99
    (copy / "manifest.json").write_text(json.dumps(manifest))
    words = ["audit", "--auditor", copy, "--pairs", at["corpus"] / "train.jsonl", "--out", tmp_path / "out"]
    assert "bundle format 99, this version reads 2" in refused(*words)


@pytest.mark.parametrize("broken", ["write_table", "replace"])
def test_a_full_disk_ends_with_one_line_and_the_next_run_goes_on(refused, safer, at, tmp_path, monkeypatch, broken):
    written = []

    def full(*given, **options):
        written.append(given)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **options)

    module = {"write_table": files.pq, "replace": files.os}[broken]
    real = getattr(module, broken)
    words = ["codes", "--pairs", at["noise"], "--reward", at["reward"], "--sae", at["sae"], "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(module, broken, full)
        line = refused(*words, code=1)
    assert "No space left on device; free some space" in line
    assert incomplete(tmp_path / "out")
    ok(safer(*words))
    for name in ("pair_id", "chosen_features", "rejected_reward"):
        assert read_parts(tmp_path / "out")[name].equals(read_parts(at["codes"])[name])
    assert open_artifact(tmp_path / "out").name == at["codes"].name


def test_a_full_disk_while_a_model_is_trained_ends_with_one_line(refused, at, tmp_path, monkeypatch):
    def full(*given, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    words = ["reward", "--pairs", at["noise"], "--config", write_config(tmp_path), "--set", "epochs=0.1"]
    line = refused(*words, "--out", tmp_path / "out", code=1)
    assert "free some space" in line
    assert incomplete(tmp_path / "out")


def test_an_interrupt_says_how_to_go_on(safer, at, tmp_path, monkeypatch):
    def interrupt(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalRunner, "map", interrupt)
        code, _, err = safer("salience", "--codes", at["codes"], "--out", tmp_path / "out")
    assert code == 130
    assert "run the same command again" in err
    assert "Traceback" not in err
    ok(safer("salience", "--codes", at["codes"], "--out", tmp_path / "out"))


def test_a_corrupt_artifact_in_a_run_is_named_and_made_again_once_deleted(refused, safer, tiny, tmp_path):
    config = write_config(tmp_path)
    directory = tmp_path / "runs/tiny"
    made = run(tiny_config(tmp_path), LocalRunner(), until="noise")
    (made.artifacts["noise"].path / "manifest.json").write_text("{")
    line = refused("run", config, "--until", "noise")
    assert "corrupt artifact" in line
    assert f"move {made.artifacts['noise'].path} away" in line
    shutil.rmtree(made.artifacts["noise"].path)
    ok(safer("run", config, "--until", "noise"))
    assert yaml.safe_load((directory / made.artifacts["noise"].name / "manifest.json").read_text())
    assert not list(directory.glob(".partial-*"))


def test_a_stage_by_hand_leaves_no_litter_when_it_fails(refused, at, tmp_path):
    refused("salience", "--codes", tmp_path / "none", "--out", tmp_path / "here/out")
    refused("evaluate", "--reward", at["codes"], "--pairs", at["pairs"], "--out", tmp_path / "out")
    left = {path.name for path in tmp_path.rglob("*") if not path.name.startswith(".partial-")}
    assert not {name for name in left if "lock" in name}, left


def test_duplicate_ids_are_counted_by_an_audit_and_not_refused(safer, at, tmp_path):
    rows = (at["corpus"] / "heldout.jsonl").read_text().splitlines()[:10]
    (tmp_path / "twice.jsonl").write_text("\n".join([*rows, rows[0]]) + "\n")
    words = ["audit", "--auditor", at["auditor"], "--pairs", tmp_path / "twice.jsonl", "--out", tmp_path / "out"]
    out = ok(safer(*words))
    assert "11 are scored" in out
    assert "1 rows repeat the pair_id of another" in out


def test_no_models_name_is_cut_in_a_terminal_of_80_columns():
    names = ("none", "flip_safer_5", "flip_random_5", "drop_safer_5", "drop_random_5")
    tested = {f"{name} vs none": {"chat": {"p": 0.00003, "p_holm": 0.00012}} for name in names[1:]}
    sections = {"chat": 0.9, "safety": 0.8, "chat hard": 0.7, "reasoning": 0.6}
    table = runs._accuracy_table({"sections": dict.fromkeys(names, sections), "tests": tested}, "none")
    screen = Console(width=80, file=io.StringIO())
    screen.print(table)
    assert "…" not in screen.file.getvalue()
    assert [line.split("│")[1].strip() for line in screen.file.getvalue().splitlines() if "0.900" in line] == [*names]
    assert screen.file.getvalue().count("p 0.00012") == 4
    assert "p by sign flips of prompts against none, Holm over the run's 4 tests" in " ".join(
        screen.file.getvalue().split()
    )


def test_the_root_of_the_file_system_is_nowhere_to_write(safer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    for out in ("/", "//", "/x/.."):
        code, _, told = safer("pairs", "--source", tmp_path / "a.jsonl", "--out", out, "--fresh")
        assert code == 2
        assert "the root of the file system; choose a folder in it as --out" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "tempalte=raw",
            "--read: tempalte: unknown key; choose one of template, template_arguments, system, truncation",
        ),
        ("template", "--read 'template': write it as key=value"),
        ("template=chatml", "no template is called 'chatml'; choose auto, chat, plain, pair, raw, or a .jinja file"),
        ("system=before", "--read: system: Input should be 'template' or 'fold'"),
    ],
)
def test_a_reading_that_cannot_be_is_told_with_the_choice(refused, at, tmp_path, words, told):
    line = refused(
        "evaluate", "--reward", at["reward"], "--pairs", at["pairs"], "--out", tmp_path / "out", "--read", words
    )
    assert told in line
