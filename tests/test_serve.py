"""The scoring service: its pure parts, its arguments, and a real Serve on loopback."""

import json
import logging
import shutil
import socket
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from conftest import make_pair
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import finished

from safer_ray import schema
from safer_ray.artifacts import open_artifact, read_parts
from safer_ray.audit import AuditPairs
from safer_ray.config import ScoresConfig
from safer_ray.errors import UserError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`", DeprecationWarning)  # in Ray Serve
    from serve.app import MAX_CHARS, MAX_PAIRS, MAX_TOTAL_CHARS, Pair, build, read_args, read_rows, score_requests

SECRET = "the moon is a lantern"
BROKEN = SECRET + " \ud800"  # a lone surrogate: JSON can say it, Arrow cannot
PAIR = {"prompt": "How are you today?", "chosen": "Very well, thank you.", "rejected": "Go away, will you."}
BATCH, QUEUE = 4, 32  # of the service under test
CAPACITY = 2 * BATCH + QUEUE


class ByLength:
    """Scores a pair by the length of its chosen response, and fails on tables that hold a bad one."""

    def __init__(self, error=None):
        self.calls = []
        self.error = error or ValueError(f"cannot read {SECRET}")

    def __call__(self, pairs):
        rows = pairs.to_pylist()
        self.calls.append(len(rows))
        if any(row["prompt"][0]["content"] == "bad" for row in rows):
            raise self.error
        made = [
            {"pair_id": row["pair_id"], "row_key": row["row_key"], "score": len(row["chosen"][0]["content"])}
            for row in reversed(rows)  # whoever matches by position notices
        ]
        return schema.table(made, schema.SCORES)


def request(*lengths):
    """Rows with chosen responses of these lengths; None makes a bad one. Ids repeat from request to request."""
    return [make_pair(f"p{i}", "bad" if n is None else "good", "x" * (n or 1), "y") for i, n in enumerate(lengths)]


def outcomes(answers):
    return [[(o["id"], "error" if "error" in o else o["score"]) for o in answer] for answer in answers]


# Pure parts


def test_several_requests_are_scored_in_one_call_and_cut_apart():
    score = ByLength()
    answers = score_requests(score, [request(3, 1), request(2), request(), request(5, 4, 6)])
    assert score.calls == [6]
    assert outcomes(answers) == [[("p0", 3), ("p1", 1)], [("p0", 2)], [], [("p0", 5), ("p1", 4), ("p2", 6)]]


def test_ids_may_repeat_within_a_request():
    rows = [row | {"pair_id": "same"} for row in request(3, 1)]
    assert outcomes(score_requests(ByLength(), [rows])) == [[("same", 3), ("same", 1)]]


def test_a_bad_pair_errs_alone():
    answers = score_requests(ByLength(), [request(3, 1), request(2, None, 4), request(5)])
    assert outcomes(answers) == [[("p0", 3), ("p1", 1)], [("p0", 2), ("p1", "error"), ("p2", 4)], [("p0", 5)]]


def test_a_bad_pair_costs_few_calls():
    score = ByLength()
    score_requests(score, [request(*[1] * 16)] * 3 + [request(*[1] * 15, None)])
    assert len(score.calls) <= 1 + 2 * 6  # log2(64)


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(1, 9)), max_size=5), max_size=5))
def test_every_pair_gets_its_own_outcome_in_any_batch(requests):
    answers = score_requests(ByLength(), [request(*lengths) for lengths in requests])
    assert outcomes(answers) == [[(f"p{i}", n or "error") for i, n in enumerate(lengths)] for lengths in requests]


def test_an_error_holds_neither_texts_nor_a_stack_trace(caplog):
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="ray.serve"):  # a session in an earlier test may have hushed it
            [[failed]] = score_requests(ByLength(), [request(None)])
    finally:
        logger.removeHandler(caplog.handler)
    assert failed == {"id": "p0", "error": "this pair cannot be scored (ValueError)"}
    assert "ValueError at" in caplog.text
    assert SECRET not in caplog.text


def test_an_error_that_is_explained_keeps_its_line():
    [[failed]] = score_requests(ByLength(UserError("pair 'p0': layer 1 gives NaN")), [request(None)])
    assert failed["error"] == "pair 'p0': layer 1 gives NaN"


def test_text_and_messages_make_the_same_row():
    as_messages = {
        "prompt": [{"role": "user", "content": PAIR["prompt"]}],
        "chosen": [{"role": "assistant", "content": PAIR["chosen"]}],
        "rejected": [{"role": "assistant", "content": PAIR["rejected"]}],
    }
    (text,) = read_rows([Pair(id="a", **PAIR)])
    assert read_rows([Pair(id="a", **as_messages)]) == [text] == [{"pair_id": "a", **as_messages}]


def test_a_pair_without_id_is_named_by_its_position():
    rows = read_rows([Pair(**PAIR), Pair(id="mine", **PAIR), Pair(id=7, **PAIR), Pair(**PAIR)])
    assert [row["pair_id"] for row in rows] == ["0", "mine", "7", "3"]


def test_what_an_audit_would_quarantine_is_refused_for_its_reason():
    read = read_rows([Pair(**PAIR), Pair(**PAIR | {"chosen": PAIR["rejected"]}), Pair(**PAIR | {"chosen": " "})])
    assert [row.get("error") for row in read] == [None, "equal responses", "empty text: chosen"]


def test_the_ingress_imports_no_torch():
    code = "import sys, serve.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# Arguments


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def bundle(tiny):
    """The auditor of the finished tiny run."""
    return tiny.artifacts["auditor"]


def test_arguments_from_the_command_line_are_coerced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_args({"auditor": "here", "replicas": "2", "batch_wait_s": "0.5", "threads": "3"})
    assert (config.replicas, config.batch_wait_s, config.threads) == (2, 0.5, 3)
    assert config.auditor == tmp_path / "here"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "serve: no auditor; write auditor=DIR"),
        ({"auditor": ""}, "serve: no auditor; write auditor=DIR"),
        ({"auditor": "x", "max_batch": "4"}, "serve: unknown key 'max_batch'; known are auditor, max_batch_size"),
        ({"auditor": "x", "replicas": "0"}, r"serve: replicas: .*greater than 0 \(got '0'\)"),
        ({"auditor": "x", "threads": "many"}, "serve: threads: .*integer"),
        ({"auditor": "missing-bundle"}, "no such auditor: .*missing-bundle"),
    ],
)
def test_wrong_arguments_are_explained_before_anything_is_deployed(args, message):
    with pytest.raises(UserError, match=message):
        build(args)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path, tiny):
    with pytest.raises(UserError, match=r"is no auditor bundle \(manifest.json is missing\)"):
        build({"auditor": str(tmp_path)})
    with pytest.raises(UserError, match="holds 'sae', wanted 'auditor'"):
        build({"auditor": str(tiny.artifacts["sae"].path)})


def test_a_bundle_of_another_format_is_refused(tmp_path, bundle):
    other = shutil.copytree(bundle.path, tmp_path / "auditor")
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["metrics"]["format"] = 99
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="bundle format 99"):
        build({"auditor": str(other)})


# A real Serve


@pytest.fixture(scope="module")
def client(ray_session, bundle):
    """HTTP to a running service; its arguments are text, as from the command line."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = {"auditor": str(bundle.path), "max_batch_size": str(BATCH), "max_queued": str(QUEUE)}
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(args | {"batch_wait_s": "0.05", "threads": "1"}), name="scoring", route_prefix="/")
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as http:
        yield http
    serve.delete("scoring")
    serve.shutdown()


@pytest.fixture(scope="module")
def corpus(tiny):
    """Pairs of the tiny run's corpus."""
    return read_parts(tiny.artifacts["noise"].path / "pairs").slice(0, 60)


@pytest.fixture(scope="module")
def expected(bundle, corpus):
    """What the batch function makes of the corpus, by pair id."""
    scores = AuditPairs(open_artifact(bundle.path, "auditor"), ScoresConfig())(corpus)
    return {row["pair_id"]: row for row in scores.to_pylist()}


def body(rows):
    return {"pairs": [{"id": r["pair_id"]} | {k: r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]}


def post(client, *pairs):
    """The results of a request that must succeed."""
    content = json.dumps({"pairs": pairs})  # in ASCII, so that a lone surrogate passes
    answer = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def close(value):
    return pytest.approx(value, abs=1e-5)


def assert_scored(result, wanted, references):
    """Equal within 1e-5; a rank may move by one reference pair where scores all but tie."""
    assert result["id"] == wanted["pair_id"]
    for name in ("score", "reward_chosen", "reward_rejected", "reward_margin"):
        assert result[name] == close(wanted[name]), name
    assert result["suspicion"] == pytest.approx(wanted["suspicion"], abs=1 / references + 1e-9)
    assert result["flag"] == (result["decision"] == "review")
    contributions = {reason["feature"]: reason["contribution"] for reason in wanted["reasons"]}
    assert {reason["feature"]: reason["contribution"] for reason in result["reasons"]} == close(contributions)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7])
def test_http_scores_equal_batch_scores_in_any_batch(client, bundle, corpus, expected, size):
    references = len(pa.parquet.read_table(bundle.path / "reference.parquet"))
    requests = [corpus.slice(start, size).to_pylist() for start in range(0, len(corpus), size)]
    before = client.get("/healthz").json()
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda rows: client.post("/v1/score", json=body(rows)), requests))
    after = client.get("/healthz").json()
    for rows, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["auditor"] == bundle.name
        for row, result in zip(rows, answer.json()["results"], strict=True):
            assert_scored(result, expected[row["pair_id"]], references)
    assert after["requests"] - before["requests"] == len(requests)
    assert after["batches"] - before["batches"] < len(requests)
    assert after["pairs"] - before["pairs"] == len(corpus)


@pytest.mark.slow
def test_a_bad_pair_fails_alone_over_http_and_its_text_is_nowhere(client):
    import ray

    bad = PAIR | {"prompt": BROKEN}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda i: post(client, PAIR, bad, PAIR) if i == 3 else post(client, PAIR), range(8)))
    assert answers[3][1] == {"id": "1", "error": "this pair cannot be scored (UnicodeEncodeError)"}
    good = [r for results in answers for r in results if "error" not in r]
    assert [r["score"] for r in good] == close([good[0]["score"]] * 9)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert any((logs / "serve").iterdir())
    assert not [path for path in logs.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_pairs_without_ids_are_answered_in_order_with_their_positions(client):
    results = post(client, PAIR, PAIR | {"chosen": "No."}, PAIR | {"rejected": PAIR["chosen"]})
    assert [r["id"] for r in results] == ["0", "1", "2"]
    assert results[0]["score"] != results[1]["score"]
    assert results[2] == {"id": "2", "error": "equal responses"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "body.pairs: Field required"),
        ({"pairs": []}, "body.pairs: .*at least 1"),
        ({"pairs": [PAIR] * (MAX_PAIRS + 1)}, f"body.pairs: .*at most {MAX_PAIRS}"),
        ({"pairs": [PAIR, {"prompt": "a"}]}, r"body.pairs\[1\].chosen: Field required"),
        ({"pairs": [PAIR | {"promt": SECRET}]}, r"body.pairs\[0\].promt: Extra inputs"),
        ({"pairs": [PAIR | {"chosen": 5}]}, r"body.pairs\[0\].chosen: wanted text or a list of \{role, content\}"),
        ({"pairs": [PAIR | {"prompt": [{"role": "user"}]}]}, r"prompt.messages\[0\].content: Field required"),
        ({"pairs": [PAIR | {"chosen": SECRET * MAX_CHARS}]}, r"pairs\[0\]: chosen has .* at most 20,000 are"),
        ({"pairs": [PAIR | {"chosen": [{"role": "r" * MAX_CHARS, "content": "a"}]}]}, "chosen has 20,001 characters"),
        ({"pairs": [PAIR | {"chosen": "a" * 10_000}] * 60}, f"at most {MAX_TOTAL_CHARS:,} are allowed; send fewer"),
    ],
)
def test_a_request_that_cannot_be_read_is_answered_422(client, sent, message):
    answer = client.post("/v1/score", json=sent)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    with pytest.raises(ValueError, match=message):
        raise ValueError(detail)
    assert SECRET not in detail


@pytest.mark.slow
def test_no_json_is_answered_422(client):
    answer = client.post("/v1/score", content="{", headers={"content-type": "application/json"})
    assert (answer.status_code, "JSON decode error" in answer.json()["detail"]) == (422, True)


@pytest.mark.slow
def test_overload_is_answered_503_and_the_rest_is_scored(client, corpus, expected):
    sent = body(corpus.slice(0, 30).to_pylist())
    with ThreadPoolExecutor(3 * CAPACITY) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/score", json=sent), range(3 * CAPACITY)))
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}
    assert codes[200] >= QUEUE
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 503} == {"1"}
    for answer in answers:
        if answer.status_code == 200:
            scores = [r["score"] for r in answer.json()["results"]]
            assert scores == close([expected[pair["id"]]["score"] for pair in sent["pairs"]])


@pytest.mark.slow
def test_health_says_that_the_scorer_answers(client, bundle):
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json().keys() == {"status", "auditor", "batches", "requests", "pairs", "failed"}
    assert (answer.json()["status"], answer.json()["auditor"]) == ("ok", bundle.name)
