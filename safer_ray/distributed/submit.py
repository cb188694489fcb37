"""A command line as a job on a Ray cluster: upload, submit, follow its log until it ends, whatever breaks meanwhile."""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from safer_ray.distributed.job_command import check_names, complete, parse_env, require
from safer_ray.distributed.ray_internals import each_uploaded, upload_limit
from safer_ray.errors import SaferError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
UPLOAD_LIMIT = upload_limit()  # bytes; the dashboard takes no larger request
EXCLUDES = [".git", ".venv", "venv", "/runs", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"]
EXCLUDES += [".hypothesis", ".ipynb_checkpoints", "*.egg-info", "node_modules"]
FAULTS = (RuntimeError, OSError, ValueError, AuthenticationError)  # what a cluster that is away or restarting causes
FAILED, STOPPED, LOST, DETACHED = 1, 3, 4, 130  # exit codes
say: Callable[[str], None] = functools.partial(print, flush=True)


class JobError(SaferError):
    """A job that did not succeed, or that is no longer watched: FAILED, STOPPED, LOST (its cluster) or DETACHED."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Job:
    """A job on a cluster, and what it runs; without an `entrypoint` it is one that is there already."""

    id: str
    address: str
    named: bool = False  # by the user
    entrypoint: str | None = None
    working_dir: Path = Path()  # is uploaded
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # Ray shows it to whoever may see the job

    @property
    def handles(self) -> str:
        """Return how to follow and to stop the job."""
        follow = f"safer-ray submit --address {self.address} --job-id {self.id}"
        return f"follow it: {follow}; stop it: ray job stop {self.id} --address {self.address}"

    @property
    def resume(self) -> str:
        """Return how to go on after the job has ended, and where its log is."""
        again = "submit it again under another --job-id" if self.named else "run the same command again"
        log = f"ray job logs {self.id} --address {self.address}"
        return f"{again} to go on from there (finished work is kept); its log: {log}"


@dataclass(frozen=True)
class Patience:
    """Seconds: until a silent cluster is given up, until a silent log is opened anew, and between attempts."""

    lost: float = 120
    silent: float = 60
    first: float = 0.5
    longest: float = 10


class _Log:
    """Prints the lines of a log once each, although every connection sends it from the start."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit, self.printed = emit, 0  # whole lines
        self.restart()

    def restart(self) -> None:
        """The next text is the log from its start."""
        self._known, self._rest = self.printed, ""

    def feed(self, text: str) -> None:
        """The next text of the log; what follows its last newline waits for the rest of its line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._known:
                self._known -= 1
            else:
                self.emit(line)
                self.printed += 1


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits for ever for a server that is silent."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
        timeout = 10 if method == "GET" else 600  # seconds; an upload may be slow
        return super()._do_request(method, endpoint, timeout=timeout, **kwargs)


def find_address(option: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The dashboard's URL: the option, else what the environment names over HTTP, else this machine's.

    Raises:
        UserError: the option is not the URL of a dashboard.
    """
    named = (environ.get("RAY_API_SERVER_ADDRESS", ""), environ.get("RAY_ADDRESS", ""))
    address = option or next((a for a in named if a.startswith(("http://", "https://"))), DEFAULT_ADDRESS)
    url = urlsplit(address if "://" in address else f"http://{address}")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"--address {address}: give the URL of the cluster's dashboard, say http://HEAD:8265")
    return url.geturl().rstrip("/")


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, which RAY_API_SERVER_ADDRESS names from then on.

    Raises:
        UserError: nobody answers there within ten seconds, it wants another token, or it is no Ray that takes jobs.
    """
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)  # says that .git stays here
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray heeds it, and RAY_ADDRESS, rather than its argument
    try:
        return _Client(address)
    except (ConnectionError, requests.Timeout):
        raise UserError(
            f"no Ray cluster answers at {address}; start one (ray start --head), "
            "or name the dashboard of a running one: --address http://HEAD:8265"
        ) from None
    except (*FAULTS, KeyError) as error:
        raise UserError(
            f"{address} takes no jobs from here: {_one_line(error)}; wanted is the dashboard of Ray 2.0 or later "
            "(--address), with its token in RAY_AUTH_TOKEN and RAY_AUTH_MODE=token if it asks for one"
        ) from None


def on_this_machine(address: str) -> bool:
    """Return whether every node of the cluster is this host; that its port is forwarded to here is not enough."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    try:
        nodes = {node.node_ip for node in list_nodes(address, timeout=10)}
    except (RayStateApiException, *FAULTS):
        return False
    return bool(nodes) and nodes <= own


def _check_upload(working_dir: Path) -> None:
    """See that the folder, less what stays here, fits into one request; archives are not compressed."""
    if not working_dir.is_dir():
        raise UserError(f"--working-dir {working_dir} is not a folder")
    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(working_dir).parts[0]] += path.stat().st_size + 2 * len(str(path)) + 128

    each_uploaded(working_dir, EXCLUDES, add)
    if sizes.total() >= UPLOAD_LIMIT:
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.most_common(3))
        raise UserError(
            f"{working_dir} is too large to upload: {sizes.total() / 2**20:.0f} MiB (largest: {largest}), the limit is "
            f"{UPLOAD_LIMIT / 2**20:.0f} MiB; name in .rayignore what the job does not need, and keep data on storage "
            "that all nodes see"
        )


def _submit(client: JobSubmissionClient, job: Job) -> None:
    """Upload and submit."""
    _check_upload(job.working_dir)
    runtime_env = {"working_dir": str(job.working_dir), "excludes": EXCLUDES, "env_vars": dict(job.env)}
    try:
        client.submit_job(entrypoint=job.entrypoint or "", runtime_env=runtime_env, submission_id=job.id)
    except FAULTS as error:
        raise SaferError(
            f"the Ray cluster at {job.address} did not take the job: {_one_line(error, job.env)}; "
            f"if it did after all, {job.handles}"
        ) from None
    except KeyboardInterrupt:
        raise JobError(f"interrupted; if job {job.id} was taken already, {job.handles}", DETACHED) from None


def _find(client: JobSubmissionClient, job: Job, patience: Patience) -> JobDetails | None:
    """Return what the cluster knows of a job, None if it has no such job; asks again for `patience.lost` seconds."""
    deadline = time.monotonic() + patience.lost
    pause = patience.first
    while True:
        try:
            return client.get_job_info(job.id)
        except FAULTS as error:
            told = _one_line(error)
        if "status code 404" in told and "does not exist" in told:
            return None
        if time.monotonic() > deadline:
            raise JobError(
                f"no answer from the Ray cluster at {job.address} for {patience.lost:.0f} s ({told}); "
                f"if it comes back, {job.handles}; if not, {job.resume}",
                LOST,
            )
        time.sleep(pause)
        pause = min(2 * pause, patience.longest)


async def _tail(client: JobSubmissionClient, job: Job, log: _Log, silent: float) -> None:
    """Feed the log from its start until the stream ends, breaks or says nothing for `silent` seconds."""
    log.restart()
    async with contextlib.aclosing(client.tail_job_logs(job.id)) as stream:  # type: ignore[type-var]
        while True:
            try:
                async with asyncio.timeout(silent):
                    text = await anext(stream, None)
            except (aiohttp.ClientError, *FAULTS):
                return
            if text is None:
                return
            log.feed(text)


def _follow(client: JobSubmissionClient, job: Job, emit: Callable[[str], None], patience: Patience) -> JobDetails:
    """Print the log until the job has ended, opening it anew whenever it closes before that."""
    log = _Log(emit)
    pause = patience.first
    while True:
        before = log.printed
        asyncio.run(_tail(client, job, log, patience.silent))
        info = _find(client, job, patience)
        if info is None:
            raise JobError(f"the Ray cluster at {job.address} has forgotten job {job.id}; {job.resume}", LOST)
        if info.status.is_terminal():
            break
        time.sleep(pause)
        pause = patience.first if log.printed > before else min(2 * pause, patience.longest)
    log.restart()
    try:
        text = client.get_job_logs(job.id)  # for what the stream did not bring
    except FAULTS as error:
        print(f"the end of the log could not be read: {_one_line(error)}", file=sys.stderr)
    else:
        log.feed(text if text.endswith("\n") or not text else f"{text}\n")
    return info


def _outcome(info: JobDetails, job: Job) -> str:
    """The closing line of a job that succeeded."""
    if info.status == JobStatus.SUCCEEDED:
        return f"job {job.id} succeeded in {((info.end_time or 0) - (info.start_time or 0)) / 1000:.0f} s"
    if info.status == JobStatus.STOPPED:
        raise JobError(f"job {job.id} was stopped; {job.resume}", STOPPED)
    ended = info.driver_exit_code and f"its command ended with exit code {info.driver_exit_code}"
    told = ended or _one_line(info.message or "no reason given", job.env)
    raise JobError(f"job {job.id} failed: {told}; put that right, then {job.resume}", FAILED)


def run_job(
    client: JobSubmissionClient,
    job: Job,
    *,
    wait: bool = True,
    emit: Callable[[str], None] = say,
    patience: Patience = Patience(),
) -> None:
    """Submit a job unless it is there already, print its id, then follow it to its end.

    Raises:
        UserError: no such job and nothing to run, that job runs something else, or too large an upload.
        SaferError: the cluster does not take the job.
        JobError: it did not succeed, its cluster is lost, or Ctrl-C; the job goes on then.
    """
    known = _find(client, job, patience) if job.named else None
    if not known and not job.entrypoint:
        raise UserError(f"the Ray cluster at {job.address} has no job {job.id}; see ray job list")
    if known and job.entrypoint not in (None, known.entrypoint):
        raise UserError(f"job {job.id} is there and runs {known.entrypoint!r}; choose another --job-id")
    if not known:
        _submit(client, job)
    emit(job.id)
    if not wait:
        print(job.handles, file=sys.stderr)
        return
    try:
        info = _follow(client, job, emit, patience)
    except KeyboardInterrupt:
        raise JobError(f"job {job.id} keeps running; {job.handles}", DETACHED) from None
    emit(_outcome(info, job))


def submit(
    args: Sequence[str],
    *,
    address: str | None,
    working_dir: Path,
    env: Sequence[str],
    job_id: str | None,
    wait: bool,
    node_env: Sequence[str] = (),
) -> None:
    """`safer-ray submit`: `safer-ray ARGS` as a job, or following job `job_id` where there are no ARGS. The variables
    `node_env` are those of the cluster's nodes, which no job needs to be told.

    Raises:
        SaferError: what `connect`, `complete` and `run_job` raise.
    """
    if not args and not job_id:
        raise UserError("nothing to submit; write a command after --, say: safer-ray submit -- run CONFIG.yaml")
    variables, folder, required = parse_env(env), working_dir.resolve(), check_names(node_env)
    if variables:
        print(
            f"--env: {', '.join(variables)} can be read by whoever may see the job (dashboard, `ray job list`); for "
            "secrets set variables where the nodes start, and name them by --node-env",
            file=sys.stderr,
        )
    job = Job(job_id or f"safer-{secrets.token_hex(6)}", find_address(address), bool(job_id), None, folder, variables)
    client = connect(job.address)
    if args:
        command = complete(args, folder, on_this_machine(job.address))
        job = replace(job, entrypoint=require(required, shlex.join(["python", "-m", "safer_ray", *command])))
    run_job(client, job, wait=wait)


def _one_line(error: object, env: Mapping[str, str] | None = None) -> str:
    """Return what an error says (of a server's traceback the last line), without values of the job's environment."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    text = " ".join(lines[-1:] if "Traceback" in str(error) else lines)
    for value in sorted((env or {}).values(), key=len, reverse=True):
        text = text.replace(value, "***") if len(value) > 3 else text
    return text[:400]
