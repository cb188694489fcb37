"""Every command that takes a source takes its split and its encoding, and says what it leaves out."""

import json

import pytest
from support.tiny_run import finished

ROWS = [
    {"prompt": f"Où est {n} ?", "chosen": "Là, à côté. Voilà.", "rejected": "Non, allez. Partez."} for n in range(8)
]
COMMANDS = ("inspect", "pairs", "audit", "audit --dry-run")


@pytest.fixture(scope="module")
def auditor(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp()).artifacts["auditor"].path


@pytest.fixture
def run(safer, auditor, tmp_path, caplog):
    """Run a command on a source; returns its exit code and all that it prints."""

    def call(command, source, *options):
        words = {
            "inspect": ["inspect", source],
            "pairs": ["pairs", "--source", source, "--out", tmp_path / "out"],
            "audit": ["audit", "--auditor", auditor, "--pairs", source, "--out", tmp_path / "out"],
        }
        name, *more = command.split()
        code, out, err = safer(*words[name], *more, *options)
        assert "Traceback" not in err
        said = out + err + caplog.text
        caplog.clear()
        return code, said

    return call


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train_prefs": rows, "test_prefs": rows.select([0])}).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_remedy_of_a_missing_split_works_in_the_same_command(run, saved, command):
    code, said = run(command, saved)
    assert code == 2
    assert "no split 'train'; it has train_prefs, test_prefs: choose one by --split NAME" in said
    code, said = run(command, saved, "--split", "train_prefs")
    assert code == 0, said
    assert "plit train_prefs is read; left out: test_prefs" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_the_remedy_of_text_in_another_encoding_works_in_the_same_command(run, tmp_path, command):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("cp1252"))
    code, said = run(command, path)
    assert "bad UTF-8" in said
    assert "say which by --encoding NAME" in said
    code, said = run(command, path, "--encoding", "latin-1", *(["--fresh"] if command == "audit" else []))
    assert code == 0, said
    assert "bad UTF-8" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_encoding_is_refused_in_one_line(run, tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    code, said = run(command, tmp_path / "rows.jsonl", "--encoding", "base64")
    assert code == 2
    assert "'base64' is no encoding of text files; write one that Python knows" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_side_files_are_named(run, tmp_path, command):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data/metadata.json").write_text('{"licence": "mit"}')
    code, said = run(command, tmp_path / "data")
    assert code == 0, said
    assert "iles that hold no rows are left out: metadata.json" in said
