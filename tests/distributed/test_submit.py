"""Jobs on a cluster: what is sent, how a job is followed through faults, and real jobs on a real head node."""

import asyncio
import contextlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import typer
from ray.job_submission import JobDetails, JobStatus
from support.head_node import free_port, start_head, stop_head

from safer_ray import __version__
from safer_ray.cli import app as cli
from safer_ray.distributed import job_command as command
from safer_ray.distributed import submit as module
from safer_ray.distributed.job_command import check_names, complete, parse_env, require
from safer_ray.distributed.submit import (
    DETACHED,
    FAILED,
    LOST,
    STOPPED,
    Job,
    JobError,
    Patience,
    connect,
    find_address,
    on_this_machine,
    run_job,
    submit,
)
from safer_ray.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # in Ray's tail_job_logs

QUICK = Patience(lost=0.05, silent=0.05, first=0.01, longest=0.02)
HERE = "http://127.0.0.1:8265"


@pytest.fixture(autouse=True)
def no_address_in_environment(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `connect` sets it; this takes it back
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "demo.yaml").write_text("name: demo\n")
    return tmp_path


# What a job runs


def test_a_run_gets_the_ray_runner_and_a_root_below_the_working_folder(folder):
    args = ["run", "demo.yaml", "--until", "pairs"]
    assert complete(args, folder, local=True) == [*args, "--runner", "ray", "--set", f"root={folder}/runs"]


@pytest.mark.parametrize("command", ["lab", "sweep"])
def test_other_commands_of_a_config_are_completed_as_a_run_is(folder, command):
    done = [complete([name, "demo.yaml"], folder, local=True)[1:] for name in (command, "run")]
    assert done[0] == done[1]


@pytest.mark.parametrize("given", [["--runner", "local"], ["--runner=local"]])
def test_a_runner_that_is_given_stays(folder, given):
    done = complete(["-v", "run", *given, "demo.yaml"], folder, local=True)
    assert [word for word in done if word.startswith("--runner")] == [given[0]]


def test_the_root_of_the_config_is_heeded(folder):
    (folder / "demo.yaml").write_text("name: demo\nroot: out/here\n")
    assert complete(["run", "demo.yaml"], folder, local=True)[-1] == f"root={folder}/out/here"
    (folder / "demo.yaml").write_text("name: demo\nroot: /shared/runs\n")
    assert complete(["run", "demo.yaml"], folder, local=False) == ["run", "demo.yaml", "--runner", "ray"]


@pytest.mark.parametrize("root", ["/shared/runs", "s3://bucket/runs"])
@pytest.mark.parametrize("local", [True, False])
def test_a_root_that_all_nodes_see_is_left_alone(folder, root, local):
    args = ["run", "demo.yaml", f"--set=root={root}"]
    assert complete(args, folder, local) == [*args, "--runner", "ray"]


def test_the_last_root_on_the_command_line_counts(folder):
    args = ["run", "--set", "root=/a", "demo.yaml", "--set", "root=b", "--set", "name=x"]
    assert complete(args, folder, local=True)[-1] == f"root={folder}/b"


def test_a_relative_root_on_a_cluster_elsewhere_is_refused(folder):
    with pytest.raises(UserError, match=r"results would go to 'runs'.*give --set root=DIR on storage that all nodes"):
        complete(["run", "demo.yaml"], folder, local=False)


def test_a_config_that_is_not_uploaded_is_refused_before_anything_is_sent(folder):
    with pytest.raises(UserError, match=rf"no config at {folder}/nosuch.yaml.*--working-dir"):
        complete(["run", "--fresh", "nosuch.yaml"], folder, local=True)


def test_an_audit_writes_here_and_reads_from_here(folder):
    (folder / "runs" / "auditor").mkdir(parents=True)
    args = ["audit", "--auditor", "runs/auditor", "--pairs", "hub:a/b", "--out=out"]
    added = ["--runner", "ray", "--out", f"{folder}/out", "--auditor", f"{folder}/runs/auditor"]
    assert complete(args, folder, local=True) == [*args, *added]
    with pytest.raises(UserError, match=r"'out'.*give --out DIR on storage that all nodes see"):
        complete(args, folder, local=False)


@pytest.mark.parametrize("args", [["ls", "runs"], ["--version"], []])
def test_other_commands_are_sent_as_they_are(folder, args):
    assert complete(args, folder, local=False) == args


def test_an_option_without_its_value_is_a_user_error(folder):
    with pytest.raises(UserError, match=r"run demo.yaml --set: .*expected one argument"):
        complete(["run", "demo.yaml", "--set"], folder, local=True)


@pytest.mark.parametrize("name", ["run", "audit"])
def test_submit_knows_which_options_take_a_value(name):
    options = [p for p in typer.main.get_command(cli.app).commands[name].params if p.param_type_name == "option"]
    assert {p.opts[0] for p in options if not p.is_flag} - {"--set"} <= set(command.VALUE_OPTIONS)
    assert {p.opts[0] for p in options if p.is_flag} <= set(command.FLAGS)


def test_environment_entries_become_a_mapping():
    assert parse_env(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}


def test_a_malformed_environment_entry_is_not_repeated():
    with pytest.raises(UserError, match="--env number 2: write it as KEY=VALUE") as caught:
        parse_env(["A=1", "hf_secret"])
    assert "secret" not in str(caught.value)


def test_a_job_does_not_show_its_environment():
    assert "secret" not in repr(Job("j", HERE, env={"TOKEN": "secret"}))


@pytest.mark.parametrize("name", ["TOKEN=sesame", "", "sesame!", "1A", "A B", "A}", "\u00c4"])
def test_variables_of_the_nodes_are_named_alone_and_what_is_no_name_is_not_shown(name):
    with pytest.raises(UserError, match=r"--node-env number 2: write the name of a variable alone") as told:
        check_names(["A_1", name])
    assert "sesame" not in str(told.value)


def test_what_a_job_requires_is_looked_for_first():
    assert check_names(["A", "B", "A"]) == ["A", "B"]
    assert require([], "true") == "true"
    for environment, code in (({"A": "x", "B": "y"}, 0), ({"A": "x"}, 2), ({"A": "x", "B": ""}, 2)):
        done = subprocess.run(
            ["sh", "-c", require(["A", "B"], "echo begun")],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stdout) == (code, "" if code else "begun\n")
        assert ("B: is not set on this node; set it where the nodes start" in done.stderr) == bool(code)


def test_what_is_too_large_is_refused_with_the_limit_and_the_largest_entries(folder, monkeypatch):
    monkeypatch.setattr(module, "UPLOAD_LIMIT", 3 * 2**20)
    (folder / ".gitignore").write_text("ignored/\n")
    for name in ("runs/a/b", ".git/x", "ignored/x", "data/pairs"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(2 * 2**20))
    module._check_upload(folder)
    (folder / "more.bin").write_bytes(bytes(2 * 2**20))
    with pytest.raises(
        UserError, match=r"4 MiB \(largest: .*more.bin 2 MiB.*the limit is 3 MiB.*\.rayignore"
    ) as caught:
        module._check_upload(folder)
    assert "ignored 2" not in str(caught.value)


def test_a_working_folder_must_be_a_folder(tmp_path):
    with pytest.raises(UserError, match="nosuch is not a folder"):
        module._check_upload(tmp_path / "nosuch")


# Where the cluster is


@pytest.mark.parametrize(
    ("option", "environ", "address"),
    [
        (None, {}, HERE),
        ("head:8265", {"RAY_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("https://head/ray/", {}, "https://head/ray"),
        (None, {"RAY_ADDRESS": "http://other:1"}, "http://other:1"),
        (None, {"RAY_ADDRESS": "http://other:1", "RAY_API_SERVER_ADDRESS": "http://api:2"}, "http://api:2"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, HERE),
        (None, {"RAY_ADDRESS": "ray://head:10001"}, HERE),
    ],
)
def test_the_option_comes_before_the_environment_and_both_before_this_machine(option, environ, address):
    assert find_address(option, environ) == address


@pytest.mark.parametrize("option", ["ray://head:10001", "http://", "ftp://head"])
def test_an_address_that_is_no_dashboard_is_refused(option):
    with pytest.raises(UserError, match=f"--address {option}: .* say http://HEAD:8265"):
        find_address(option, {})


def test_no_cluster_is_one_line_with_the_address_and_the_remedy():
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"no Ray cluster answers at {address}; start one \(ray start --head\)"):
        connect(address)


@contextlib.contextmanager
def answering(status, body):
    """A server that says the same to everyone."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, '{"ray_version": "1.13.0"}', "Ray version 1.13.0 is running on the cluster"),
        (200, '{"ray_version": "1.8.0"}', "Jobs API is not supported"),
        (200, "<html>hello</html>", "Expecting value"),
        (200, "{}", "ray_version"),
        (404, "", "Version check returned 404"),
        (500, "", "500 Server Error"),
        (401, "", "Authentication required"),
    ],
)
def test_a_server_that_takes_no_jobs_is_one_line(status, body, told):
    with (
        answering(status, body) as address,
        pytest.raises(UserError, match=f"{address} takes no jobs.*{told}") as caught,
    ):
        connect(address)
    assert "wanted is the dashboard of Ray 2.0 or later" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_accepts_and_stays_silent_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        with pytest.raises(UserError, match="no Ray cluster answers"):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - start < 12


def test_there_must_be_something_to_submit_or_to_follow(tmp_path):
    with pytest.raises(UserError, match=r"nothing to submit.*safer-ray submit -- run CONFIG.yaml"):
        submit([], address=None, working_dir=tmp_path, env=[], job_id=None, wait=True)


# Following through faults, with a client that fails as told


def details(status, **more):
    return JobDetails(type="SUBMISSION", status=status, entrypoint="true", **more)


DROP = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
AWAY = ConnectionError("connection refused")
GONE = RuntimeError("Request failed with status code 404: Job j does not exist.")


class FakeClient:
    """Streams and answers in the order given; the last answer is repeated."""

    def __init__(self, streams=(), answers=(None,), log=""):
        self.streams, self.answers, self.log = list(streams), list(answers), log
        self.submitted = []

    async def tail_job_logs(self, job_id):
        for chunk in self.streams.pop(0) if self.streams else [DROP]:
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                await asyncio.sleep(60)
            yield chunk

    def get_job_info(self, job_id):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_logs(self, job_id):
        if isinstance(self.log, Exception):
            raise self.log
        return self.log

    def submit_job(self, **request):
        self.submitted.append(request)
        if isinstance(self.log, KeyboardInterrupt):
            raise self.log


def followed(client, **job):
    """The lines that following a job prints."""
    lines = []
    run_job(client, Job("j", HERE, entrypoint="true", **job), emit=lines.append, patience=QUICK)
    return lines


@pytest.fixture(autouse=True)
def small_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


RUNNING, SUCCEEDED = details("RUNNING"), details("SUCCEEDED", start_time=1000, end_time=4000)


def test_the_id_comes_first_then_the_log_then_one_line():
    client = FakeClient([["a\nb", "\nc"]], [SUCCEEDED], log="a\nb\nc")
    assert followed(client) == ["j", "a", "b", "c", "job j succeeded in 3 s"]


def test_streams_that_drop_in_mid_line_neither_repeat_nor_lose_lines():
    streams = [["a\nb\nhal", DROP], [DROP], ["a\n", "b\nhalf\n\nc", OSError("reset")], ["a\nb\nhalf\n\nc\n"]]
    client = FakeClient(streams, [RUNNING, AWAY, RUNNING, RUNNING, SUCCEEDED], log="a\nb\nhalf\n\nc\nd\ne")
    assert followed(client)[1:-1] == ["a", "b", "half", "", "c", "d", "e"]


def test_a_stream_that_closes_early_is_not_the_end():
    client = FakeClient([["a\n"], [], ["a\nb\n"]], [RUNNING, RUNNING, SUCCEEDED], log="a\nb\n")
    assert followed(client)[1:-1] == ["a", "b"]


def test_a_stream_that_hangs_is_opened_anew():
    client = FakeClient([["a\n", None], ["a\nb\n", None]], [RUNNING, SUCCEEDED], log="a\nb\nc\n")
    assert followed(client)[1:-1] == ["a", "b", "c"]


def test_a_job_that_ends_while_the_stream_is_down_is_read_to_the_end():
    assert followed(FakeClient([], [AWAY, RUNNING, SUCCEEDED], log="a\nb\n"))[1:-1] == ["a", "b"]


def test_a_job_without_a_log_prints_none():
    assert followed(FakeClient([[]], [SUCCEEDED], log=""))[1:-1] == []


def test_a_log_that_cannot_be_read_to_the_end_is_told_and_does_not_change_the_outcome(capsys):
    assert followed(FakeClient([["a\n"]], [SUCCEEDED], log=RuntimeError("status code 500")))[-1].endswith("in 3 s")
    assert "the end of the log could not be read: status code 500" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        (details("FAILED", driver_exit_code=2), FAILED, "failed: its command ended with exit code 2"),
        (details("FAILED", message="no such package"), FAILED, "failed: no such package"),
        (details("STOPPED"), STOPPED, "was stopped"),
    ],
)
def test_a_job_that_does_not_succeed_says_how_to_resume_and_where_its_log_is(answer, code, told):
    with pytest.raises(JobError, match=f"job j {told}.*run the same command again") as caught:
        followed(FakeClient([[]], [answer]))
    assert caught.value.exit_code == code
    assert f"ray job logs j --address {HERE}" in str(caught.value)


def test_a_job_whose_id_was_chosen_is_resumed_under_another():
    with pytest.raises(JobError, match="submit it again under another --job-id"):
        followed(FakeClient([[]], [details("STOPPED")]), named=True)


def test_a_cluster_that_stays_away_is_given_up():
    with pytest.raises(JobError, match=rf"no answer from the Ray cluster at {HERE}.*connection refused") as caught:
        followed(FakeClient([["a\n", DROP]], [AWAY]))
    assert caught.value.exit_code == LOST
    assert "safer-ray submit --address" in str(caught.value)


def test_a_cluster_that_forgot_the_job_is_told_at_once():
    with pytest.raises(JobError, match="has forgotten job j; run the same command again") as caught:
        followed(FakeClient([["a\n"]], [GONE]))
    assert caught.value.exit_code == LOST


def test_values_of_the_environment_are_not_repeated():
    failure = details("FAILED", message="pip install --token sesame failed")
    with pytest.raises(JobError, match=r"--token \*\*\* failed"):
        followed(FakeClient([[]], [failure]), env={"TOKEN": "sesame"})


def test_a_named_job_that_is_there_is_followed_and_not_submitted():
    client = FakeClient([["a\n"]], [RUNNING, SUCCEEDED], log="a\n")
    assert followed(client, named=True)[:2] == ["j", "a"]
    assert not client.submitted


def test_a_named_job_that_runs_something_else_is_not_followed():
    other = details("RUNNING").model_copy(update={"entrypoint": "false"})
    with pytest.raises(UserError, match="job j is there and runs 'false'; choose another --job-id"):
        followed(FakeClient([], [other]), named=True)


def test_following_a_job_that_is_not_there_is_a_user_error():
    with pytest.raises(UserError, match="has no job j"):
        run_job(FakeClient([], [GONE]), Job("j", HERE, named=True), patience=QUICK)


def test_no_wait_prints_the_id_alone_and_the_handles_aside(capsys):
    run_job(FakeClient(), Job("j", HERE, entrypoint="true"), wait=False)
    printed = capsys.readouterr()
    assert printed.out == "j\n"
    assert f"ray job stop j --address {HERE}" in printed.err


def test_an_interrupt_while_submitting_says_that_the_job_may_be_there():
    with pytest.raises(JobError, match="interrupted; if job j was taken already, follow it") as caught:
        followed(FakeClient(log=KeyboardInterrupt()))
    assert caught.value.exit_code == DETACHED


# Real jobs


@pytest.fixture
def short_folder():
    path = tempfile.mkdtemp(prefix="sr-", dir="/tmp")  # sockets lie below it, and their paths must be short
    yield path
    shutil.rmtree(path, ignore_errors=True)


def command_line(*args, **options):
    """`safer-ray submit` as a person runs it."""
    command = [sys.executable, "-m", "safer_ray", "submit", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def python(code):
    return f'python -u -c "{code}"'


def until_running(client, job_id):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):  # not there yet
            if client.get_job_status(job_id) == JobStatus.RUNNING:
                return
        time.sleep(0.2)
    raise TimeoutError(job_id)


@pytest.mark.slow
def test_a_cluster_on_this_machine_is_known_as_such(cluster, monkeypatch):
    connect(cluster)
    assert on_this_machine(cluster)
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert not on_this_machine(cluster)


@pytest.mark.slow
def test_a_command_runs_as_a_job_and_no_value_of_env_is_told_but_that_others_can_read_it(cluster, tmp_path):
    done = command_line(
        "--address", cluster, "--working-dir", tmp_path, "--env", "TOKEN=sesame", "--", "--version",
        env=os.environ | {"RAY_ADDRESS": "http://127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *log, last = done.stdout.splitlines()
    assert first.startswith("safer-")
    assert __version__ in log
    assert last.startswith(f"job {first} succeeded in ")
    assert "sesame" not in done.stdout + done.stderr
    assert done.stderr.startswith(
        "--env: TOKEN can be read by whoever may see the job (dashboard, `ray job list`); for "
    )
    assert connect(cluster).get_job_info(first).runtime_env["env_vars"]["TOKEN"] == "sesame"  # as was said


READS = """
import os, sys, ray
ray.init(log_to_driver=False)

@ray.remote
def seen():
    return os.environ.get('SAFER_NODE_SECRET'), os.environ.get('RENAMED')

print('driver', os.environ.get('SAFER_NODE_SECRET'), os.environ.get('RENAMED'), 'task', *ray.get(seen.remote()))
"""


@pytest.mark.slow
def test_the_nodes_environment_reaches_drivers_and_tasks_and_the_job_tells_no_value(cluster, tmp_path):
    (tmp_path / "reads.py").write_text(READS, encoding="utf-8")
    client, lines = connect(cluster), []
    entrypoint = require(["SAFER_NODE_SECRET"], "python -u reads.py")
    env = {"RENAMED": "${SAFER_NODE_SECRET}"}
    run_job(client, Job("nodes", cluster, entrypoint=entrypoint, working_dir=tmp_path, env=env), emit=lines.append)
    assert "driver open-sesame open-sesame task open-sesame open-sesame" in lines
    assert "open-sesame" not in str(client.get_job_info("nodes"))


@pytest.mark.slow
def test_a_job_whose_node_lacks_a_variable_ends_before_it_begins_and_names_it(cluster, tmp_path):
    done = command_line(
        "--address", cluster, "--working-dir", tmp_path, "--node-env", "SAFER_NODE_SECRET",
        "--node-env", "NO_SUCH_SECRET", "--", "--version",
    )  # fmt: skip
    assert done.returncode == FAILED
    assert "NO_SUCH_SECRET: is not set on this node; set it where the nodes start" in done.stdout
    assert __version__ not in done.stdout
    assert "open-sesame" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_command_that_fails_ends_with_its_message_and_the_way_on(cluster, tmp_path):
    done = command_line("--address", cluster, "--working-dir", tmp_path, "--", "run", "/nosuch.yaml")
    assert done.returncode == FAILED
    assert "safer-ray: no config at /nosuch.yaml" in done.stdout
    assert f"--runner ray --set root={tmp_path}/runs" in done.stdout
    assert done.stderr.startswith("safer-ray: job safer-")
    assert "its command ended with exit code 2" in done.stderr
    assert "run the same command again" in done.stderr


@pytest.mark.slow
def test_the_working_folder_and_the_environment_reach_the_job(cluster, tmp_path):
    (tmp_path / "here.txt").write_text("from the folder")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large.bin").write_text("stays")
    code = "import os; print(open('here.txt').read(), os.environ['WORD'], os.path.exists('runs/large.bin'))"
    lines = []
    job = Job("folder", cluster, entrypoint=python(code), working_dir=tmp_path, env={"WORD": "sesame"})
    run_job(connect(cluster), job, emit=lines.append)
    assert "from the folder sesame False" in lines


@pytest.mark.slow
def test_a_job_that_somebody_stops_ends_with_the_code_for_it(cluster, tmp_path):
    client = connect(cluster)
    job = Job("stopped", cluster, entrypoint=python("import time; time.sleep(600)"), working_dir=tmp_path)

    def stop():
        until_running(client, job.id)
        client.stop_job(job.id)

    with ThreadPoolExecutor() as threads:
        stopping = threads.submit(stop)
        with pytest.raises(JobError, match="job stopped was stopped; run the same command again") as caught:
            run_job(client, job)
        stopping.result()
    assert caught.value.exit_code == STOPPED


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_stop_it(cluster, tmp_path):
    client = connect(cluster)
    job = Job("left", cluster, entrypoint=python("import time; print('begun'); time.sleep(600)"), working_dir=tmp_path)
    run_job(client, job, wait=False)
    until_running(client, "left")
    command = [sys.executable, "-m", "safer_ray", "submit", "--address", cluster, "--job-id", "left"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        while follower.stdout.readline() != "begun\n":
            assert follower.poll() is None
        follower.send_signal(signal.SIGINT)
        _, told = follower.communicate(timeout=30)
    assert follower.returncode == DETACHED
    assert told == (
        f"safer-ray: job left keeps running; follow it: safer-ray submit --address {cluster} --job-id left; "
        f"stop it: ray job stop left --address {cluster}\n"
    )
    assert client.get_job_status("left") == JobStatus.RUNNING
    client.stop_job("left")


class DroppingProxy:
    """Passes connections on to a port, and breaks all that are open when told."""

    def __init__(self, port):
        self.port, self.open = port, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.server.accept()
                there = socket.create_connection(("127.0.0.1", self.port))
                self.open += [here, there]
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def drop(self):
        broken, self.open = self.open, []
        for end in broken:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self):
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.drop()


@pytest.mark.slow
def test_a_network_that_breaks_again_and_again_costs_no_line_and_repeats_none(cluster, tmp_path, monkeypatch):
    proxy = DroppingProxy(int(cluster.rsplit(":", 1)[1]))
    code = "import time; [(print('line', i), time.sleep(0.05)) for i in range(300)]"
    client, lines, over = connect(proxy.address), [], threading.Event()
    job = Job("dropped", proxy.address, entrypoint=python(code), working_dir=tmp_path)
    tail, printed_before = client.tail_job_logs, []
    monkeypatch.setattr(client, "tail_job_logs", lambda job_id: printed_before.append(len(lines)) or tail(job_id))
    run_job(client, job, wait=False)

    def break_it():
        while not over.wait(3.5):
            proxy.drop()

    breaker = threading.Thread(target=break_it)
    breaker.start()
    try:
        run_job(client, Job("dropped", proxy.address, named=True), emit=lines.append)
    finally:
        over.set()
        breaker.join()
        proxy.close()
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(300)]
    assert max(Counter(lines).values()) == 1
    assert len(set(printed_before)) > 2  # streams that brought lines and broke


@pytest.mark.long
@pytest.mark.slow
def test_a_cluster_that_dies_is_lost_and_one_that_comes_back_without_the_job_says_so(short_folder, tmp_path):
    ports = free_port(), free_port()
    address = f"http://127.0.0.1:{ports[1]}"
    job = Job("lost", address, entrypoint=python("import time; time.sleep(600)"), working_dir=tmp_path)
    head = start_head(short_folder, *ports)
    try:
        client = connect(address)
        run_job(client, job, wait=False)
        until_running(client, "lost")
    finally:
        stop_head(head)
    with pytest.raises(JobError, match="no answer from the Ray cluster") as caught:
        module._follow(client, job, print, Patience(lost=2))
    assert caught.value.exit_code == LOST
    with ThreadPoolExecutor() as threads:
        head = threads.submit(start_head, short_folder, *ports)
        try:
            with pytest.raises(JobError, match="has forgotten job lost; run the same command again"):
                module._follow(client, job, print, Patience())
        finally:
            stop_head(head.result())


def test_a_home_directory_that_no_shell_expanded_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    words = ["audit", "--auditor", "B", "--pairs", "P", "--out=~/audit"]
    assert complete(words, tmp_path, local=True)[-2:] == ["--out", f"{tmp_path}/home/audit"]
    assert complete(["run", "--set", "root=~/runs"], tmp_path, local=False)[-1] == f"root={tmp_path}/home/runs"
    with pytest.raises(UserError, match="hub:x/y is a name on the hub"):
        complete([*words[:-1], "--out=hub:x/y"], tmp_path, local=True)
