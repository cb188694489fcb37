"""What names the inputs of a run: their content, wherever they lie and however long the process lives."""

import json
import logging
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from safer_ray.config.sections import PairsConfig, RewardConfig, SourceConfig
from safer_ray.data import hub
from safer_ray.errors import UserError
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.inputs import base_input, file_input, with_lasting_base
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Place, read_parts

ONE, OTHER = "1" * 40, "2" * 40  # commits


def row(number):
    return json.dumps({"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": f"No {number}."})


def write_lines(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row(number)}\n" for number in numbers))
    return path


def made(place, *paths, **settings):
    sources = tuple(SourceConfig(path=str(path), **settings) for path in paths)
    return model_stages.pairs(StageContext(place, LocalRunner()), PairsConfig(sources=sources))


def keys(artifact):
    return read_parts(artifact.path)["row_key"].to_pylist()


# Content


def test_a_file_that_changes_within_one_process_is_another_one(tmp_path):
    path, place = write_lines(tmp_path / "a.jsonl", 0, 1), Place(tmp_path / "runs")
    first = made(place, path)
    write_lines(path, 0, 2)
    assert made(place, path).name != first.name
    write_lines(path, 0, 1)
    assert made(place, path).name == first.name


def test_a_checkpoint_that_changes_within_one_process_is_another_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    first = base_input(str(tmp_path)).name
    save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    assert base_input(str(tmp_path)).name != first


def test_what_is_not_there_is_an_error_and_no_content(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        file_input(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"no model in .*nothing_here \(config.json is missing\)"):
        base_input("package:safer_ray/nothing_here")


def test_files_that_change_places_below_a_source_are_other_pairs(tmp_path):
    place = Place(tmp_path / "runs")
    write_lines(tmp_path / "data/a/x.jsonl", 0)
    write_lines(tmp_path / "data/b/x.jsonl", 1)
    first = made(place, tmp_path / "data", format="canonical")
    (tmp_path / "data/b").rename(tmp_path / "data/c")
    second = made(place, tmp_path / "data", format="canonical")
    assert first.name != second.name


# Names


def test_files_of_two_sources_with_one_name_stay_apart(tmp_path):
    paths = [write_lines(tmp_path / folder / "a.jsonl", number) for folder, number in (("one", 0), ("two", 1))]
    assert keys(made(Place(tmp_path / "runs"), *paths)) == ["source0:a.jsonl#0", "source1:a.jsonl#0"]
    named = tuple(SourceConfig(path=str(path), name=path.parent.name) for path in paths)
    found = model_stages.pairs(StageContext(Place(tmp_path / "runs"), LocalRunner()), PairsConfig(sources=named))
    assert keys(found) == ["one:a.jsonl#0", "two:a.jsonl#0"]
    assert read_parts(found.path)["source"].to_pylist() == ["one", "two"]


def test_names_that_are_apart_by_themselves_stay_as_they_were(tmp_path):
    one, two = write_lines(tmp_path / "one/a.jsonl", 0), write_lines(tmp_path / "two/b.jsonl", 1)
    assert keys(made(Place(tmp_path / "runs"), one, two)) == ["a.jsonl#0", "b.jsonl#0"]


def test_pairs_from_two_sources_of_one_name_are_not_those_that_were_made_before(tmp_path):
    """Whose rows were called alike."""
    paths = [write_lines(tmp_path / folder / "a.jsonl", number) for folder, number in (("one", 0), ("two", 1))]
    found = made(Place(tmp_path / "runs"), *paths)
    assert json.loads(found.manifest["inputs"]["names"]) == ["source0:a.jsonl", "source1:a.jsonl"]


# What is no part of a source


def test_pairs_that_are_written_below_their_source_are_left_out_and_told(tmp_path, caplog):
    write_lines(tmp_path / "data/a.jsonl", 0, 1)
    place = Place(tmp_path / "data", out=tmp_path / "data/out")
    first = made(place, tmp_path / "data")
    again = made(place, tmp_path / "data")
    assert again.name == first.name
    runs = Place(tmp_path / "data/runs")
    assert made(runs, tmp_path / "data/*.jsonl").name == first.name
    caplog.set_level(logging.WARNING)
    (tmp_path / "data/.hidden").mkdir()
    write_lines(tmp_path / "data/.hidden/b.jsonl", 5)
    third = made(Place(tmp_path / "data/runs/demo"), tmp_path / "data")
    left_out = third.metrics["left_out_files"]
    assert left_out.pop(str(tmp_path / "data/.hidden")) == 1
    assert left_out.keys() == {str(tmp_path / "data/out"), str(tmp_path / "data/runs" / first.name)}
    assert f"pairs: 1 data files in {tmp_path}/data/.hidden are left out" in caplog.text


def test_a_last_line_without_a_newline_is_read_and_half_of_one_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row(0)}\n{row(1)}")
    assert keys(made(Place(tmp_path / "runs"), path)) == ["a.jsonl#0", "a.jsonl#1"]
    path.write_text(f"{row(0)}\n{row(1)}\n{row(2)[:-3]}")
    config = PairsConfig(sources=(SourceConfig(path=str(path)),), max_refused_share=0.5)
    found = model_stages.pairs(StageContext(Place(tmp_path / "runs"), LocalRunner()), config)
    assert found.manifest["rows"] == {"read": 3, "pairs": 2, "quarantined": 1, "left_out": 0}


# The hub


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that makes a commit the one that a downloaded model's branch stands for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._commit.cache_clear()

    def point(commit, branch="main"):
        folder = tmp_path / "models--owner--name"
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)

    return point


def test_a_model_on_the_hub_is_named_by_the_commit_that_it_stands_for(cached):
    base = RewardConfig(base="hub:owner/name")
    cached(ONE)
    assert with_lasting_base(base).base == base_input(f"hub:owner/name@{ONE}").name == f"hub:owner/name@{ONE}"
    cached(OTHER)
    assert with_lasting_base(base).base == f"hub:owner/name@{OTHER}"
    cached(ONE, "dev")
    assert hub.pinned("hub:owner/name@dev", "model") == f"hub:owner/name@{ONE}"
    assert hub.pinned(f"hub:owner/name@{OTHER}", "model") == f"hub:owner/name@{OTHER}"


def test_a_commit_that_cannot_be_found_out_is_told(cached, caplog):
    assert hub.pinned("hub:owner/other", "model") == "hub:owner/other"
    assert "hub:owner/other: which commit this is cannot be found out" in caplog.text
    assert "write hub:owner/other@COMMIT" in caplog.text


def test_the_hub_is_asked_for_the_commit(monkeypatch, tmp_path):
    """By the hub's own protocol, of a server on this machine."""
    asked = []
    with hub_server(asked, ONE) as url:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        hub._commit.cache_clear()
        assert hub.pinned("hub:owner/data@main", "dataset") == f"hub:owner/data@{ONE}"
    assert asked == ["/api/datasets/owner/data/revision/main"]


def hub_server(asked, commit):
    import contextlib
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"id": "owner/data", "sha": commit}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    @contextlib.contextmanager
    def served():
        server = HTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    return served()


def test_a_data_set_in_a_folder_is_named_by_its_content(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    place, file = Place(tmp_path / "runs"), tmp_path / "repo/train.jsonl"
    write_lines(file, 0, 1)
    first = made(place, f"hub:{tmp_path / 'repo'}")
    assert made(place, f"hub:{tmp_path / 'repo'}").name == first.name
    write_lines(file, 0, 2)
    os.utime(file, ns=(1, 1))
    assert made(place, f"hub:{tmp_path / 'repo'}").name != first.name
