"""What a run says while it works: JSON lines for machines, lines and a bar on a terminal."""

import io
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from support.tiny_run import write_config

from safer_ray.pipeline import progress
from safer_ray.pipeline.progress import JsonLines, JsonLog, Terminal, json_line, report_on
from safer_ray.storage.artifacts import Artifact

MADE = Artifact(Path("codes-abc"), "codes-abc", {"wall_seconds": 12.34, "rows": {"read": 5, "written": 4}})


@pytest.fixture
def lines(capsys):
    """What was written to stderr as JSON; nothing goes to stdout."""

    def lines():
        out, err = capsys.readouterr()
        assert out == ""
        return [json.loads(line) for line in err.splitlines()]

    return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


# JSON lines


def test_a_line_has_its_time_its_run_and_its_event(lines):
    json_line("something", answer=42, text="ünï\ncode")
    (line,) = lines()
    assert list(line) == ["time", "run", "event", "answer", "text"]
    assert (line["run"], line["event"], line["answer"], line["text"]) == (progress.RUN_ID, "something", 42, "ünï\ncode")
    said = datetime.fromisoformat(line["time"])
    assert said.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)


def test_a_stage_that_is_made_has_one_line(lines):
    report = JsonLines()
    report.stage("codes-abc", None)
    for done in range(1, 9):
        report.progress("codes", done, 8)
    report.stage("codes-abc", MADE)
    (made,) = lines()
    assert (made["event"], made["stage"], made["artifact"], made["state"]) == ("stage", "codes", "codes-abc", "made")
    assert (made["seconds"], made["rows"]) == (12.34, {"read": 5, "written": 4})


def test_a_stage_that_is_there_is_found(lines):
    JsonLines().stage("codes-abc", MADE)
    (line,) = lines()
    assert (line["event"], line["stage"], line["state"], line["seconds"]) == ("stage", "codes", "found", 12.34)


def test_progress_is_told_every_minute_stage_by_stage(lines, clock):
    report = JsonLines()
    for second in range(185):
        clock[0] = second
        report.progress("reward", second + 1, 185)
        report.progress("sae", second + 1, 185)
    found = lines()
    assert all((line["event"], line["total"]) == ("progress", 185) for line in found)
    for stage in ("reward", "sae"):
        assert [line["done"] for line in found if line["stage"] == stage] == [61, 121, 181]


def test_the_rate_and_the_time_left_are_those_since_the_first_news(lines, clock):
    report = JsonLines()
    for second, done in ((0, 10), (60, 22), (120, 34)):  # ten were there from an earlier run
        clock[0] = second
        report.progress("audit", done, 100, rows=300)
    second, third = lines()
    assert (second["rows_per_s"], second["seconds_left"]) == (5.0, 390)
    assert (third["rows_per_s"], third["seconds_left"]) == (5.0, 330)


def test_a_stage_that_begins_again_with_another_model_has_a_pace_of_its_own(lines, clock):
    report = JsonLines()
    for second, done in ((0, 90), (60, 95), (500, 1), (560, 5)):
        clock[0] = second
        report.progress("audit", done, 100)
    first, last = lines()
    assert first["seconds_left"] == 60
    assert last["seconds_left"] == 1425


@pytest.mark.parametrize("kind", ["lines", "terminal"])
def test_where_nothing_moves_a_line_a_minute_says_so(kind, lines, screen, clock):
    def told():
        return lines() if kind == "lines" else screen.file.getvalue().splitlines()

    with report_on(Console(file=io.StringIO()) if kind == "lines" else screen) as report:
        clock[0] = 1000
        report.look()  # no stage is under way
        report.stage("codes-abc", None)
        clock[0] = 1059
        report.look()
        assert not [line for line in told() if "codes is" in str(line) or "waiting" in str(line)]
        clock[0] = 1061
        report.look()
        report.progress("codes", 3, 8)
        clock[0] = 1100
        report.progress("codes", 3, 8)  # the same again is no news
        clock[0] = 1122
        report.look()
        clock[0] = 1182
        report.look()
        report.progress("codes", 4, 8)
        report.look()
        report.stage("codes-abc", MADE)
        clock[0] = 2000
        report.look()
        found = told()
    if kind == "lines":
        waits = [(line["stage"], line["state"], line["unchanged_s"]) for line in found if line["event"] == "waiting"]
        assert waits == [("codes", "under way", 61), ("codes", "at 3 of 8", 61), ("codes", "at 3 of 8", 121)]
    else:
        waits = [line.replace("\x1b[2K", "").strip() for line in found if "unchanged" in line]
        assert waits == [
            "codes is under way, unchanged for 61 s",
            "codes is at 3 of 8, unchanged for 61 s",
            "codes is at 3 of 8, unchanged for 121 s",
        ]


def test_an_outer_stage_is_watched_again_when_an_inner_one_is_there(lines, clock):
    report = JsonLines()
    report.stage("reward-1", None)
    report.stage("codes-abc", None)
    report.stage("codes-abc", MADE)
    clock[0] = 75
    report.look()
    assert [(line["event"], line["stage"]) for line in lines()] == [("stage", "codes"), ("waiting", "reward")]


def test_log_records_become_lines(lines):
    logger = logging.Logger("safer_ray.test")
    logger.addHandler(JsonLog(logging.WARNING))
    logger.warning("%d rows look\nodd", 3)
    logger.info("not this one")
    (line,) = lines()
    assert (line["event"], line["level"], line["logger"]) == ("log", "WARNING", "safer_ray.test")
    assert line["message"] == "3 rows look\nodd"
    assert {"time", "run"} <= set(line)


# A terminal


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, highlight=False)


def shown(screen):
    return screen.file.getvalue()


def test_a_terminal_gets_a_line_for_every_stage(screen):
    with report_on(screen) as report:
        assert isinstance(report, Terminal)
        report.stage("pairs-1", Artifact(Path("pairs-1"), "pairs-1", {"wall_seconds": 1.0, "rows": {}}))
        report.stage("codes-abc", None)
        report.progress("codes", 1, 2)
        report.progress("codes", 2, 2)
        report.stage("codes-abc", MADE)
    assert "found pairs-1" in shown(screen)
    assert "made  codes-abc                     12.3 s" in shown(screen)


def test_a_bar_is_shown_while_a_stage_is_under_way_and_gone_behind_it(screen):
    with report_on(screen) as report:
        task = report.bar.tasks[0]
        assert not task.visible
        report.stage("codes-abc", None)
        assert not task.visible
        report.progress("codes", 3, 8)
        assert (task.visible, task.description, task.completed, task.total) == (True, "codes", 3, 8)
        report.bar.refresh()
        assert "3/8" in shown(screen)
        report.progress("codes", 8, 8)
        assert not task.visible
        report.progress("reward", 1, 9)
        report.stage("codes-abc", MADE)
        assert not task.visible


def test_a_terminal_gets_no_json(screen, capsys):
    with report_on(screen) as report:
        report.stage("codes-abc", None)
        report.progress("codes", 3, 8)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_terminal_gets_json_lines(lines):
    with report_on(Console(file=io.StringIO())) as report:
        assert isinstance(report, JsonLines)
        report.stage("codes-abc", MADE)
    assert [line["state"] for line in lines()] == ["found"]


# A whole process


def python(*words, **environment):
    """stdout, and stderr as JSON, of a Python process whose output goes to no terminal."""
    known = {name: value for name, value in os.environ.items() if name not in ("SAFER_RAY_RUN_ID", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=True, env=known | environment
    )
    return done.stdout, [json.loads(line) for line in done.stderr.splitlines()]


def test_a_run_that_is_piped_says_json_alone_on_stderr_with_the_id_it_was_given(tmp_path):
    words = ["-m", "safer_ray", "run", write_config(tmp_path), "--until", "corpus"]
    out, lines = python(*words, SAFER_RAY_RUN_ID="nightly-7")
    assert [(line["event"], line["stage"], line["state"]) for line in lines] == [("stage", "corpus", "made")]
    assert all({"time", "run", "event"} <= set(line) for line in lines)
    assert {line["run"] for line in lines} == {"nightly-7"}
    assert out == ""


def test_a_run_without_an_id_gets_one_of_its_own():
    code = "from safer_ray.pipeline.progress import json_line; json_line('one'); json_line('two')"
    runs = [{line["run"] for line in python("-c", code)[1]} for _ in range(2)]
    assert [len(run) for run in runs] == [1, 1]
    assert runs[0] != runs[1]
    assert all(run.isalnum() for run in runs[0] | runs[1])


@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_of_libraries_are_json_lines_as_well(verbose):
    code = (
        "import logging\n"
        "from safer_ray.cli.app import options\n"
        f"options(verbose={verbose}, version=False)\n"
        "logging.getLogger('library').warning('odd %s', 'rows')\n"
        "logging.getLogger('library').info('reading')\n"
    )
    _, lines = python("-c", code)
    found = [(line["event"], line["level"], line["logger"], line["message"]) for line in lines]
    wanted = [("log", "WARNING", "library", "odd rows"), ("log", "INFO", "library", "reading")]
    assert found == wanted[: 1 + verbose]
