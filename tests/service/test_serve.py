"""The service on Ray: its arguments, its gate, and a real Serve on loopback under load, deaths and rolls."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.environment import SOCKETS
from support.made import write_parts
from support.served import PAIR, SECRET, body, bundle_of, corpus_of
from support.tiny_run import audited, finished

from safer_ray import schema
from safer_ray.client import Client, Failed, Scored, ServiceError
from safer_ray.config.sections import ScoresConfig
from safer_ray.errors import UserError
from safer_ray.features.bundle import best_detector
from safer_ray.service.batch_queue import Gate
from safer_ray.service.keys import new_key
from safer_ray.service.problems import PROBLEM_JSON, ProblemDetails
from safer_ray.service.serve_settings import free_ports
from safer_ray.storage.artifacts import open_artifact
from safer_ray.storage.files import read_parquet

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`", DeprecationWarning)  # in Ray Serve
    from safer_ray.service.app import build, check_binding
    from safer_ray.service.arguments import read_args

WAITING = 40  # requests that the service under test takes


# Arguments


def test_arguments_from_the_command_line_are_coerced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_args({"auditor": "here", "scorers": "2", "flag_quantile": "0.1", "insecure": "true"})
    assert (config.scorers, config.flag_quantile, config.insecure) == (2, 0.1, True)
    assert config.auditor == tmp_path / "here"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "serve: no auditor; write auditor=DIR"),
        ({"auditor": ""}, "serve: no auditor; write auditor=DIR"),
        ({"auditor": "x", "max_batch": "4"}, "serve: unknown key 'max_batch'; known are detector, flag_quantile"),
        ({"auditor": "x", "scorers": "0"}, r"serve: scorers: .*greater than 0 \(got '0'\)"),
        ({"auditor": "x", "threads": "many"}, "serve: threads: .*integer"),
        ({"auditor": "x", "scorers": 3, "max_scorers": 2}, "max_scorers 2 is smaller than scorers 3"),
        ({"auditor": "missing-bundle"}, "no such auditor: .*missing-bundle"),
    ],
)
def test_wrong_arguments_are_explained_before_anything_is_deployed(args, message):
    with pytest.raises(UserError, match=message):
        build(args)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path, tmp_path_factory):
    with pytest.raises(UserError, match=r"is no auditor bundle \(manifest.json is missing\)"):
        build({"auditor": str(tmp_path)})
    sae = finished(tmp_path_factory.getbasetemp()).artifacts["sae"]
    with pytest.raises(UserError, match="holds 'sae', wanted 'auditor'"):
        build({"auditor": str(sae.path)})


def test_a_bundle_of_another_format_is_refused(tmp_path, bundle):
    other = renamed(bundle, tmp_path / "auditor", metrics={"format": 99})
    with pytest.raises(UserError, match="bundle format 99"):
        build({"auditor": str(other)})


def test_a_detector_that_the_bundle_lacks_and_keys_that_are_none_are_refused(tmp_path, bundle):
    with pytest.raises(UserError, match="no combined detector"):
        build({"auditor": str(bundle.path), "detector": "combined"})
    (tmp_path / "keys").write_text("safer_atokeninplaceofitshash", encoding="utf-8")
    with pytest.raises(UserError, match=r"keys, line 1: wanted NAME:sha256:HEX") as told:
        build({"auditor": str(bundle.path), "keys": str(tmp_path / "keys")})
    assert "atoken" not in str(told.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_key(host):
    check_binding(host, keys=False, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "example.org"])
def test_strangers_are_let_in_by_keys_or_by_will_alone(host):
    with pytest.raises(UserError, match=f"listening on {host} without keys would let strangers in; make one by"):
        check_binding(host, keys=False, insecure=False)
    check_binding(host, keys=True, insecure=False)
    check_binding(host, keys=False, insecure=True)


def test_other_thresholds_make_no_other_deployment(bundle):
    one, two = (read_args({"auditor": str(bundle.path), "flag_quantile": q}) for q in (0.05, 0.5))
    assert one.lasting() == two.lasting()
    assert one.thresholds() != two.thresholds()


def test_the_ingress_imports_no_torch():
    code = "import sys, safer_ray.service.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=120).returncode == 0


# The gate


def batches(sizes, tokens, cancelled=()):
    """Which requests are inside together, where each batch takes as long as any other."""

    async def run():
        gate, seen, inside = Gate(tokens), [], set()

        async def one(number, size):
            async with gate.passed(size):
                inside.add(number)
                await asyncio.sleep(0)
                seen.append(frozenset(inside))
                await asyncio.sleep(0.001)
                inside.discard(number)

        tasks = [asyncio.create_task(one(*row)) for row in enumerate(sizes)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert len(gate) == 0
        return [sorted(batch) for batch in dict.fromkeys(seen)]

    return asyncio.run(run())


def test_an_idle_model_takes_a_request_at_once_and_a_busy_one_then_all_that_fit():
    assert batches([5, 5, 5, 5, 5], tokens=10) == [[0], [1, 2], [3, 4]]


def test_a_request_larger_than_a_batch_is_one_alone():
    assert batches([1, 50, 1, 1], tokens=10) == [[0], [1], [2, 3]]


def test_nobody_is_overtaken():
    assert batches([1, 9, 9, 1, 1], tokens=10) == [[0], [1], [2, 3], [4]]


@given(st.lists(st.integers(0, 20), max_size=12), st.sets(st.integers(0, 11)))
def test_the_gate_lets_everybody_through_whoever_gives_up(sizes, cancelled):
    through = {n for batch in batches(sizes, 10, [n for n in cancelled if n < len(sizes)]) for n in batch}
    assert through >= set(range(len(sizes))) - cancelled


# A real Serve


def renamed(bundle, path, **changes):
    """A copy of a bundle, with another manifest."""
    shutil.copytree(bundle.path, path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def deployed(ray_session, bundle):
    """Deploys a bundle with these arguments, as text; a service that is there goes over to them."""
    from ray import serve

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def deploy(path=bundle.path, **args):
        args = {"auditor": str(path), "waiting": str(WAITING), "threads": "1", **args}
        serve.run(build(args), name="scoring", route_prefix="/")
        return f"http://127.0.0.1:{port}"

    yield deploy
    serve.delete("scoring")
    serve.shutdown()


@pytest.fixture(scope="module")
def url(deployed):
    return deployed()


@pytest.fixture
def client(url):
    with Client(url) as client:
        yield client


@pytest.fixture
def http(url):
    limits = httpx.Limits(max_connections=400)
    with httpx.Client(base_url=url, timeout=120, limits=limits) as client:
        yield client


def close(value):
    return pytest.approx(value, abs=1e-5)


@pytest.fixture(scope="module")
def expected(bundle, corpus, tmp_path_factory):
    """What a batch audit says of the corpus, by pair id."""
    folder = tmp_path_factory.mktemp("audited")
    pairs = write_parts(schema.table(corpus, schema.PAIRS), folder / "pairs", 30)
    auditor = open_artifact(bundle.path, "auditor")
    scores = audited(ScoresConfig(detector=best_detector(auditor)), pairs, auditor, folder / "out")
    return {row["pair_id"]: row for row in scores.to_pylist()}


def of_haproxy():
    """The processes that stand before this service: one, and those that it has taken over from."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(SOCKETS) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_haproxy_listens_on_loopback_alone_and_its_socket_is_its_users(http, url):
    assert http.get("/healthz").status_code == 200
    found = [found for process in of_haproxy() for found in process.net_connections("inet")]
    listening = [one for one in found if one.status == psutil.CONN_LISTEN]
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
    assert int(url.rsplit(":", 1)[1]) in {one.laddr.port for one in listening}
    (admin,) = SOCKETS.glob("*/admin.sock")
    assert admin.stat().st_mode & 0o077 == 0


AS_RAY_WRITES = """
global
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :{ports[0]}
    mode http
frontend http_frontend
    bind 127.0.0.1:{ports[1]}
    default_backend nobody
backend nobody
    server none 127.0.0.1:{ports[2]}
listen stats
  bind *:{ports[3]}
  stats enable
"""


def test_haproxy_says_as_a_problem_that_nobody_answers(tmp_path):
    ports = free_ports(4)
    (tmp_path / "haproxy.cfg").write_text(AS_RAY_WRITES.format(folder=tmp_path, ports=ports), encoding="utf-8")
    script = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = subprocess.Popen([script, "-db", "-f", str(tmp_path / "haproxy.cfg")])
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as http:
            answer = http.get(f"http://127.0.0.1:{ports[1]}/v1/auditor")
        assert {found.laddr.ip for found in psutil.Process(process.pid).net_connections("inet")} == {"127.0.0.1"}
    finally:
        process.terminate()
        process.wait(10)
    assert (answer.status_code, answer.headers["content-type"], answer.headers["retry-after"]) == (
        503,
        PROBLEM_JSON,
        "2",
    )
    assert ProblemDetails.model_validate(answer.json()).status == 503
    assert sorted(path.name for path in tmp_path.iterdir()) == ["admin.sock", "haproxy.cfg"]
    assert "    timeout connect 1s\n    timeout http-request 20s\n" in (tmp_path / "haproxy.cfg").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("written", "otherwise"),
    [
        ("stats socket", "stats  bind-socket"),
        ("mode 666", "mode 0666"),
        ("bind *:", "bind ipv4@*:"),
        ("bind *:", "bind  *:"),
        ("bind :", "bind  :"),
        ("errorfile 502", "errorfiles 502"),
        ("timeout connect", "timeout  connect"),
    ],
)
def test_settings_that_are_written_otherwise_are_refused(tmp_path, written, otherwise):
    text = AS_RAY_WRITES.format(folder=tmp_path, ports=[1, 2, 3, 4])
    assert written in text
    (tmp_path / "haproxy.cfg").write_text(text.replace(written, otherwise), encoding="utf-8")
    script = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    done = subprocess.run(
        [script, "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert "Ray writes it otherwise than 2.60 does" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7])
def test_http_scores_equal_those_of_an_audit_in_any_batch(http, bundle, corpus, expected, size):
    references = len(read_parquet(bundle.path / "reference.parquet"))
    requests = [corpus[start : start + size] for start in range(0, len(corpus), size)]
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda rows: http.post("/v1/score", json=body(rows)), requests))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["auditor"] for answer in answers} == {bundle.name}
    results = [result for answer in answers for result in answer.json()["results"]]
    assert [result["id"] for result in results] == [row["pair_id"] for row in corpus]
    for result in results:
        wanted = expected[result["id"]]
        for name in ("score", "reward_chosen", "reward_rejected", "reward_margin"):
            assert result[name] == close(wanted[name]), name
        if abs(result["suspicion"] - wanted["suspicion"]) > 1e-5:  # a rank: it moves by one where values all but tie
            assert result["suspicion"] == pytest.approx(wanted["suspicion"], abs=1 / references + 1e-9)
        else:
            assert (result["flag"], result["decision"]) == (wanted["flag"], wanted["decision"])


@pytest.mark.slow
def test_reasons_over_http_are_those_of_an_audit(client, corpus, expected):
    pairs = body(corpus[:20])["pairs"]
    for scored in client.score(pairs, explain=True):
        audit = {reason["feature"]: reason["contribution"] for reason in expected[scored.id]["reasons"]}
        told = {part.feature: part.contribution for part in scored.features[: len(audit)]}
        assert told == close(audit)


@pytest.mark.slow
def test_the_text_of_a_pair_is_in_no_log(client, http):
    import ray

    bad = PAIR | {"prompt": f"{SECRET} \ud800", "rejected": SECRET}
    headers = {"content-type": "application/json"}
    answer = http.post(f"/v1/score?q={SECRET}", content=json.dumps({"pairs": [PAIR, bad, PAIR]}), headers=headers)
    assert [r.get("error", {}).get("code") for r in answer.json()["results"]] == [None, "not_unicode", None]
    http.post("/v1/score", content=json.dumps({"pairs": [{"prompt": SECRET}]}), headers=headers)
    http.post("/", data=PAIR | {"prompt": SECRET})
    assert isinstance(client.score([PAIR | {"prompt": SECRET}])[0], Scored)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert any((logs / "serve").iterdir())
    assert not [path for path in logs.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_overload_is_answered_429_at_once_and_the_rest_is_scored(http, corpus, expected):
    sent = body(corpus[:30])
    began = time.perf_counter()

    def ask(_):
        answer = http.post("/v1/score", json=sent)
        return answer, time.perf_counter() - began

    with ThreadPoolExecutor(4 * WAITING) as threads:
        answers = list(threads.map(ask, range(4 * WAITING)))
    codes = Counter(answer.status_code for answer, _ in answers)
    assert set(codes) == {200, 429}
    assert codes[200] >= WAITING
    last = max(seconds for answer, seconds in answers if answer.status_code == 200)
    for answer, seconds in answers:
        if answer.status_code == 429:
            kind, told = answer.headers["content-type"], answer.text
            assert kind == PROBLEM_JSON or told.startswith("Request dropped due to backpressure")  # by Ray Serve
            assert answer.headers["retry-after"] == "1"
            assert seconds < last
        else:
            scores = [result["score"] for result in answer.json()["results"]]
            assert scores == close([expected[pair["id"]]["score"] for pair in sent["pairs"]])
    assert http.get("/readyz").status_code == 200


class Load:
    """Clients that score pairs until told to stop; what they were told, and what went wrong."""

    def __init__(self, url, pairs, clients=6):
        self.url = url
        self.pairs = pairs
        self.stopping = threading.Event()
        self.scored = Counter()
        self.failures = []
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, number):
        with Client(self.url) as client:
            while not self.stopping.is_set():
                try:
                    results = client.score(self.pairs[number::6])
                    self.failures += [result for result in results if isinstance(result, Failed)]
                    self.scored[number] += len(results)
                except Exception as error:  # noqa: BLE001  # it is counted
                    self.failures.append(error)


def replicas(name):
    """The actors of a deployment's replicas."""
    import ray

    names = [
        found["name"]
        for found in ray.util.list_named_actors(all_namespaces=True)
        if f"scoring#{name}#" in found["name"]
    ]
    return [ray.get_actor(found, namespace="serve") for found in names]


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["Scorer", "Ingress"])
def test_a_killed_replica_costs_no_client_a_request(url, corpus, deployment):
    import ray

    with Load(url, body(corpus)["pairs"]) as load:
        time.sleep(1.0)
        before = load.scored.total()
        for replica in replicas(deployment):
            ray.kill(replica, no_restart=False)
        ends = time.monotonic() + 60
        while load.scored.total() < before + 200 and time.monotonic() < ends:
            time.sleep(0.1)
    assert load.failures == []
    assert load.scored.total() >= before + 200


@pytest.mark.slow
def test_a_roll_to_another_bundle_costs_no_client_a_request(deployed, url, bundle, corpus, tmp_path):
    other = renamed(bundle, tmp_path / "other", name="auditor-other")
    with Load(url, body(corpus)["pairs"]) as load, Client(url) as client:
        time.sleep(0.5)
        deployed(other)
        ends = time.monotonic() + 60
        while client.auditor()["name"] != "auditor-other" and time.monotonic() < ends:
            time.sleep(0.1)
        time.sleep(1.0)
    assert load.failures == []
    with Client(url) as client:
        assert client.auditor()["name"] == "auditor-other"
        assert client._ask("POST", "/v1/score", {"pairs": [PAIR]})["auditor"] == "auditor-other"


def configured(path, thresholds):
    """What `serve deploy` reads."""
    from ray.serve.schema import ServeDeploySchema

    told = [{"name": name, "user_config": thresholds} for name in ("Scorer", "Ingress")]
    application = {
        "name": "scoring",
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "args": {"auditor": str(path), "waiting": WAITING, "threads": 1},
        "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
        "deployments": told,
    }
    return ServeDeploySchema.model_validate({"applications": [application]})


def wait_until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.slow
def test_thresholds_change_without_a_restart(deployed, url, bundle):
    from ray import serve
    from ray.serve.context import _get_global_client

    def quantile():
        with httpx.Client(base_url=url) as http:
            answer = http.get("/v1/auditor")
        return answer.json()["flag_quantile"] if answer.status_code == 200 else None

    def deploy(**thresholds):
        _get_global_client().deploy_apps(configured(bundle.path, thresholds))
        wait_until(lambda: serve.status().applications["scoring"].status == "RUNNING")
        wait_until(lambda: quantile() == thresholds["flag_quantile"])

    deploy(flag_quantile=0.5)
    before = {name: [actor._actor_id for actor in replicas(name)] for name in ("Scorer", "Ingress")}
    deploy(flag_quantile=1.0, reasons=2, detector="safer", limits={"pairs": 1})
    with Client(url) as client:
        assert client.auditor()["detector"] == "safer"
        (scored,) = client.score([PAIR], explain=True)
        assert (scored.flag, len(scored.features)) == (True, 2)
        with pytest.raises(ServiceError, match="413, 2 pairs, at most 1 a request are taken"):
            client.score([PAIR, PAIR])
    assert {name: [actor._actor_id for actor in replicas(name)] for name in ("Scorer", "Ingress")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["here"], "serve: 'here' is no KEY=VALUE; write auditor=DIR"),
        (["auditor=here", "port="], "serve: port is empty"),
        (["auditor=here", "auditor=there"], "serve: auditor is given twice, as 'here' and 'there'; leave one out"),
        (["auditor=x", "port=http"], "serve: port 'http' is none; wanted 1 to 65535"),
        (["auditor=x", "port=70000"], "serve: port '70000' is none"),
        (["auditor=x", "port=²"], "serve: port '²' is none"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(words, message):
    asked = [sys.executable, "-m", "serve", *words]
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
    assert (found.returncode, found.stderr.startswith(f"error: {message}")) == (2, True)


@pytest.mark.long
def test_the_command_serves_until_it_is_told_to_end(bundle):
    (port,) = free_ports(1)
    asked = [sys.executable, "-m", "serve", f"auditor={bundle.path}", f"port={port}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE")}
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True, env=own | {"RAY_ADDRESS": "local"}) as process:
        try:
            assert process.stdout.readline().startswith(f"ready: http://127.0.0.1:{port}; logs are in /")
            with Client(f"http://127.0.0.1:{port}") as client:
                assert isinstance(client.score([PAIR])[0], Scored)
                page = client.http.post("/", data=PAIR)
            assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.long
def test_what_is_wrong_with_the_keys_is_in_the_log_at_once(bundle, tmp_path):
    """Serve keeps lines back until a thousand have come."""
    (port,), (token, line), file = free_ports(1), new_key("a"), tmp_path / "keys"
    file.write_text(line, encoding="utf-8")
    asked = [sys.executable, "-m", "serve", f"auditor={bundle.path}", f"port={port}", f"keys={file}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE")}
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True, env=own | {"RAY_ADDRESS": "local"}) as process:
        try:
            logs = Path(process.stdout.readline().strip().rpartition("logs are in ")[2])
            (tmp_path / "new").touch()
            os.replace(tmp_path / "new", file)
            with Client(f"http://127.0.0.1:{port}", token=token) as client:
                assert client.auditor()
            told = "".join(path.read_text(encoding="utf-8") for path in logs.glob("replica_*Ingress*"))
            assert f"{file} holds no key; write the line there" in told
        finally:
            process.terminate()
            assert process.wait(60) == 0
