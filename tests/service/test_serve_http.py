"""The service's routes, in process, around a real bundle."""

import asyncio
import json
import logging
from collections import Counter

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from support.served import PAIR, SECRET, alike, body, bundle_of, corpus_of

from safer_ray.config.sections import ScoresConfig
from safer_ray.service.auth import COOKIE, Keys
from safer_ray.service.http import create_api, shared
from safer_ray.service.keys import Key, digest_of, new_key
from safer_ray.service.problems import PROBLEM_JSON, overloaded, unavailable
from safer_ray.service.request_limits import LimitBodies, Limits
from safer_ray.service.service import LocalService

JSON = {"content-type": "application/json"}
BROKEN = SECRET + " \ud800"  # half a surrogate pair: JSON can say it, UTF-8 cannot
LIMITS = Limits(body_bytes=200_000, pairs=20, chars=20_000, text_chars=5_000)
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return LocalService(bundle_of(tmp_path_factory.getbasetemp()).path)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(create_api(service, LIMITS), base_url="http://localhost") as client:
        yield client


def post(client, *pairs, explain=False):
    """The results of a request that must succeed."""
    content = json.dumps({"pairs": pairs, "explain": explain})  # in ASCII, so that half a surrogate pair passes
    answer = client.post("/v1/score", content=content, headers=JSON)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def assert_problem(answer, status, *words):
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM_JSON), answer.text
    told = answer.json()
    assert told.keys() == {"type", "title", "status", "detail"}
    assert told["status"] == status
    for word in words:
        assert word in told["detail"]
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text


# Scores


def test_text_and_messages_get_the_same_score(client):
    as_messages = {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in PAIR.items()
    }
    one, two = post(client, PAIR, as_messages)
    assert alike(one, two | {"id": "0"})


def test_a_pair_without_id_is_named_by_its_position(client):
    results = post(client, PAIR, PAIR | {"id": "mine"}, PAIR | {"id": 7}, PAIR)
    assert [r["id"] for r in results] == ["0", "mine", "7", "3"]


def test_a_flag_proposes_review(client, tmp_path_factory):
    results = post(client, *body(corpus_of(tmp_path_factory.getbasetemp(), 20))["pairs"])
    assert {(r["flag"], r["decision"]) for r in results} <= {(True, "review"), (False, "keep")}
    assert all(0 <= r["suspicion"] <= 1 and 0 <= r["percentile"] <= 100 for r in results)


def test_swapped_responses_negate_score_and_margin(client):
    one, two = post(client, PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]})
    assert one["score"] == pytest.approx(-two["score"], abs=1e-6)
    assert one["reward_margin"] == pytest.approx(-two["reward_margin"], abs=1e-6)


def test_reasons_are_told_on_request_alone(client):
    (plain,) = post(client, PAIR)
    (told,) = post(client, PAIR, explain=True)
    assert (plain["features"], plain["spans"]) == (None, None)
    assert {k: told[k] for k in ("score", "suspicion")} == {k: plain[k] for k in ("score", "suspicion")}
    assert sum(span["contribution"] for span in told["spans"]) == pytest.approx(told["score"])
    for span in told["spans"]:
        text = PAIR[span["side"] if span["part"] == "response" else "prompt"]
        assert text[span["start"] : span["end"]] in ("Very well,", "thank you.", "Go away,", "will you.")
    names = {feature["id"]: feature["name"] for feature in client.get("/v1/features").json()["features"]}
    assert {f["feature"]: f["name"] for f in told["features"]}.items() <= names.items()


def test_a_pair_that_cannot_be_scored_errs_alone(client):
    results = post(
        client,
        PAIR,
        PAIR | {"chosen": PAIR["rejected"]},
        PAIR | {"chosen": " "},
        PAIR | {"prompt": BROKEN},
        PAIR | {"chosen": "x" * 6_000},
        PAIR,
    )
    codes = [r["error"]["code"] if "error" in r else "scored" for r in results]
    assert codes == ["scored", "refused", "refused", "not_unicode", "too_long", "scored"]
    assert results[1]["error"]["detail"] == "equal responses"
    assert results[4]["error"]["detail"] == "chosen has 6,000 characters, at most 5,000 are taken"
    assert SECRET not in json.dumps(results)
    assert alike(results[0] | {"id": "5"}, results[5])


def test_a_text_may_be_as_long_as_the_limit_on_the_page_too(client):
    """Roles are no part of a text."""
    at, over = PAIR | {"chosen": "x" * 5_000}, PAIR | {"chosen": "x" * 5_001}
    as_messages = PAIR | {"chosen": [{"role": "assistant", "content": "x" * 5_000}]}
    said = "chosen has 5,001 characters, at most 5,000 are taken"
    assert ["error" in scored for scored in post(client, at, as_messages)] == [False, False]
    assert post(client, over)[0]["error"]["detail"] == said
    assert client.post("/", data=at).status_code == 200
    assert said in client.post("/", data=over).text
    uploaded = upload(client, at, over, answer="file")
    first, second = map(json.loads, uploaded.text.splitlines())
    assert (first["chosen"], second["safer_ray"]["error"]["detail"]) == (at["chosen"], said)
    assert "chosen" not in second


def test_a_role_of_any_length_is_no_way_around_the_limit(client):
    [result] = post(client, PAIR | {"prompt": [{"role": "user" * 20, "content": "x"}]})
    assert result["error"]["detail"] == "prompt has a role of 80 characters, at most 64 are taken"


# Uploads


def upload(client, *rows, answer="page"):
    content = "\n".join(map(json.dumps, rows)).encode()
    return client.post("/upload", files={"file": ("a.jsonl", content)}, data={"answer": answer})


def test_an_upload_is_answered_with_its_pairs_alone(client):
    rows = [PAIR | {"note": "<" * 100_000}, {"a" * 100_000: 1}]
    for answer in ("page", "file"):
        found = upload(client, *rows, answer=answer)
        assert (found.status_code, len(found.content) < 40_000) == (200, True)
        assert "<<" not in found.text
        assert "\\u003c" not in found.text
    assert "leaves out what else the rows have: note." in upload(client, *rows).text


def test_an_upload_is_not_read_where_there_is_no_room(client, service, monkeypatch):
    monkeypatch.setattr(service, "full", lambda: True)
    monkeypatch.setattr("safer_ray.service.web.read_lines", None)
    answer = upload(client, PAIR)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert "The service is busy." in answer.text
    assert "the file has to be sent anew" in answer.text


def test_bodies_together_hold_no_more_than_a_process_has_room_for():
    """A second body waits at the door, not in memory; what has ended leaves its room to others."""
    answered = []

    async def run():
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            assert (await receive())["body"] == b"x" * 600
            inside.set()
            await go_on.wait()

        limited = LimitBodies(app, lambda: Limits(held_bytes=1_000))

        async def ask():
            async def receive():
                return {"type": "http.request", "body": b"x" * 600, "more_body": False}

            async def send(message):
                answered.append(message.get("status"))

            await limited({"type": "http", "method": "POST", "path": "/v1/score", "headers": []}, receive, send)

        first = asyncio.create_task(ask())
        await inside.wait()
        await ask()
        go_on.set()
        await first
        await ask()
        return limited.room.held

    assert asyncio.run(run()) == 0
    assert answered == [429, None]  # the start and the body of one answer


# Refusals


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({}, 422, "body.pairs: Field required"),
        ([], 422, "body"),
        ({"pairs": []}, 422, "body.pairs: List should have at least 1"),
        ({"pairs": [PAIR] * 21}, 413, "21 pairs, at most 20"),
        ({"pairs": [PAIR | {"chosen": "x" * 4_000}] * 6}, 413, "24,216 characters in all, at most 20,000"),
        ({"pairs": {"0": PAIR}}, 422, "body.pairs: Input should be a valid list"),
        ({"pairs": None}, 422, "body.pairs"),
        ({"pairs": [PAIR], "paris": SECRET}, 422, "body.paris: Extra inputs"),
        ({"pairs": [PAIR], "format": SECRET}, 422, "body.format: unknown format; wanted one of auto, llmbar"),
        ({"pairs": [PAIR], "format": None}, 422, "body.format"),
        ({"pairs": [PAIR], "carried": [SECRET]}, 422, "body.carried[0]: no column that looks like the prompt"),
        ({"pairs": [PAIR], "explain": "yes"}, 422, "body.explain"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused_with_its_place(client, sent, status, words):
    assert_problem(client.post("/v1/score", content=json.dumps(sent), headers=JSON), status, words)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, "body"),
        (b"{", 422, "the body is no JSON"),
        (b'{"pairs": NaN}', 422, "NaN is no JSON"),
        (b"\xff\xfe{}", 422, "body is no"),
        (b'{"pairs": "\xff"}', 422, "not UTF-8"),
        (DEEP.encode(), 422, "nested deeper than 12"),
        (b'{"pairs":' + b"[" * 20, 422, "nested deeper"),
        (b"[" + b"[]," * 60_000 + b"1]", 413, "more than 50,000 lists"),
        (b'{"id":' + b"9" * 5_000 + b"}", 422, "no JSON that is understood"),
        (b'"' + b"x" * 300_000 + b'"', 413, "more than 200,000 bytes"),
    ],
)
def test_hostile_bodies_are_refused_before_anything_is_made_of_them(client, content, status, words):
    assert_problem(client.post("/v1/score", content=content, headers=JSON), status, words)


def test_brackets_inside_texts_do_not_count_as_nesting(client):
    assert "score" in post(client, PAIR | {"chosen": 'He said "[[[[[[[[[[{{{{{{{{{{" and left. \\'})[0]


def test_a_body_is_refused_by_what_it_declares_and_by_what_comes(client):
    def chunks():
        for _ in range(400):
            yield b"x" * 1000

    assert_problem(client.post("/v1/score", content=chunks(), headers=JSON), 413, "more than 200,000 bytes")
    declared = {**JSON, "content-length": "999999999"}
    assert_problem(client.post("/v1/score", content=b"{}", headers=declared), 413)
    assert_problem(client.post("/v1/score", content=b"{}", headers={**JSON, "content-length": "+2"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_read_as_json(client, kind):
    assert_problem(client.post("/v1/score", content=json.dumps({"pairs": [PAIR]}), headers={"content-type": kind}), 422)


def test_unknown_paths_and_methods_are_problems_too(client):
    assert_problem(client.get("/nowhere"), 404)
    assert_problem(client.get("/v1/features/999999"), 404, "feature 999999 is none of this auditor's")
    assert_problem(client.get("/v1/features/many"), 422)
    answer = client.put("/v1/score", json={})
    assert_problem(answer, 405)
    assert "POST" in answer.headers["allow"]


class Failing(LocalService):
    """Fails as it is told to."""

    def __init__(self, service, error):
        self.error = error
        self.bundle = service.bundle

    async def score(self, pairs, explain):
        raise self.error

    async def ready(self):
        return False


@pytest.mark.parametrize(("error", "status"), [(overloaded(2.2), 429), (unavailable("the scorer is gone"), 503)])
def test_overload_and_absence_say_when_to_come_again(service, error, status):
    client = TestClient(create_api(Failing(service, error)))
    answer = client.post("/v1/score", json={"pairs": [PAIR]})
    assert_problem(answer, status)
    assert int(answer.headers["retry-after"]) >= 2


def test_an_answer_that_comes_too_late_is_given_up(service):
    class Slow(LocalService):
        def __init__(self):
            pass

        async def score(self, pairs, explain):
            import asyncio

            await asyncio.sleep(30)

    client = TestClient(create_api(Slow(), Limits(answer_s=0.05)))
    assert_problem(client.post("/v1/score", json={"pairs": [PAIR]}), 504, "no answer within 0.05 s")


def test_an_error_that_nobody_foresaw_tells_neither_trace_nor_text(service, caplog):
    client = TestClient(create_api(Failing(service, ValueError(SECRET))))
    with caplog.at_level(logging.ERROR, logger="safer_ray.serve"):
        assert_problem(client.post("/v1/score", json={"pairs": [PAIR]}), 500, "its log says where")
    assert "ValueError at" in caplog.text
    assert SECRET not in caplog.text


# What is told


def test_the_auditor_tells_of_itself(client, service):
    told = client.get("/v1/auditor").json()
    assert (told["name"], told["detector"], told["layer"], told["latents"]) == (
        service.bundle.name,
        "reward_margin",
        1,
        64,
    )
    assert sum(told["reference"]["score"]["counts"]) == told["reference"]["pairs"] == 320
    assert len(told["reference"]["value"]["edges"]) == len(told["reference"]["value"]["counts"]) + 1


def test_what_lies_below_the_threshold_is_flagged(client, tmp_path_factory):
    threshold = client.get("/v1/auditor").json()["threshold"]
    for start in (0, 20, 40):
        for result in post(client, *body(corpus_of(tmp_path_factory.getbasetemp())[start : start + 20])["pairs"]):
            assert result["flag"] == (result["reward_margin"] < threshold)


def test_features_have_pages_in_the_document_s_own_words(client):
    listed = client.get("/v1/features").json()["features"]
    detail = client.get(f"/v1/features/{listed[0]['id']}").json()
    assert listed[0].items() <= detail.items()
    assert len(detail["histogram"]["edges"]) == len(detail["histogram"]["chosen"]) + 1
    assert detail["contexts"][0].keys() == {"value", "side", "before", "sentence", "after"}


def test_health_and_readiness_tell_the_truth(client, service):
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    absent = TestClient(create_api(Failing(service, ValueError())))
    assert absent.get("/healthz").status_code == 200
    assert_problem(absent.get("/readyz"), 503, "no scorer answers")


def test_strangers_who_ask_for_readiness_together_take_no_more_room_than_one():
    asked = []

    async def ready():
        asked.append(None)
        await asyncio.sleep(0.01)
        return len(asked) != 2

    async def run():
        ask = shared(ready)
        together = asyncio.gather(*(ask() for _ in range(50)))
        gone = asyncio.create_task(ask())
        await asyncio.sleep(0)
        gone.cancel()
        return [await together, await ask(), await ask()]

    assert asyncio.run(run()) == [[True] * 50, False, True]
    assert len(asked) == 3


def test_a_scorer_that_never_answers_is_asked_again(monkeypatch):
    monkeypatch.setattr("safer_ray.service.http.READY_S", 0.02)
    waits = [3600, 0]

    async def ready():
        await asyncio.sleep(waits.pop(0))
        return True

    async def run():
        ask = shared(ready)
        return [await ask(), await ask()]

    assert asyncio.run(run()) == [False, True]


def test_every_answer_carries_the_security_headers(client):
    answers = [client.get(path) for path in ("/", "/v1/auditor", "/nowhere", "/static/page.css", "/healthz")]
    answers.append(client.post("/v1/score", content=b"{", headers=JSON))
    for answer in answers:
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    stored = Counter(answer.headers["cache-control"] for answer in answers)
    assert stored == {"no-store": 5, "no-cache": 1}


def test_thresholds_change_while_it_runs(client, service):
    before = post(client, PAIR)[0]
    try:
        service.configure(ScoresConfig(detector="safer", flag_quantile=1.0, reasons=2))
        after = post(client, PAIR, explain=True)[0]
        assert (after["flag"], len(after["features"])) == (True, 2)
        assert after["suspicion"] == pytest.approx(1 - after["percentile"] / 100)
        assert after["score"] == before["score"]
        assert client.get("/v1/auditor").json()["detector"] == "safer"
    finally:
        service.configure(ScoresConfig(detector="reward_margin", reasons=8))


# Keys


@pytest.fixture(scope="module")
def keys():
    made = {name: new_key(name) for name in ("team-a", "team-b")}
    listed = tuple(Key(name, line.rpartition(":")[2]) for name, (_, line) in made.items())
    return Keys(listed=listed), {name: token for name, (token, _) in made.items()}


@pytest.fixture
def closed(service, keys):
    with TestClient(create_api(service, LIMITS, keys[0]), base_url="http://localhost") as client:
        yield client


def test_every_key_opens_and_nothing_else_does(closed, keys):
    for token in keys[1].values():
        assert closed.get("/v1/auditor", headers={"authorization": f"Bearer {token}"}).status_code == 200
    for header in (None, "Bearer", "Bearer wrong", f"Basic {keys[1]['team-a']}", "Bearer \xff"):
        answer = closed.get("/v1/auditor", headers={"authorization": header.encode("latin-1")} if header else {})
        assert_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert closed.get("/healthz").status_code == 200
    assert closed.post("/v1/score", content=b"x" * 300_000).status_code == 401  # before the body is read


def test_people_sign_in_to_the_page_with_a_key(closed, keys):
    away = closed.get("/features", follow_redirects=False)
    assert (away.status_code, away.headers["location"]) == (303, "/sign-in?next=/features")
    assert closed.post("/sign-in", data={"key": "wrong", "next": "/features"}).status_code == 401
    form = {"key": keys[1]["team-a"], "next": "/features"}
    inside = closed.post("/sign-in", data=form, follow_redirects=False)
    assert inside.headers["location"] == "/features"
    cookie = inside.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/"))
    assert "secure" not in cookie  # on loopback
    assert keys[1]["team-a"] not in cookie
    assert closed.get("/features").status_code == 200
    closed.post("/sign-out")
    assert closed.get("/features", follow_redirects=False).status_code == 303


def test_a_sign_in_of_more_than_4_kb_is_refused_before_it_is_read(closed):
    assert_problem(closed.post("/sign-in", data={"key": "x" * 4_200}), 413, "more than 4,096 bytes")
    assert closed.post("/sign-in", data={"key": "x" * 3_000}).status_code == 401


PATHS = [
    "/v1/features", "/v1/features/", "/%76%31/features", "/v1%2Ffeatures", "/v1//features", "/v1", "/v1/",
    "//v1/features", "/V1/features", "/x/../v1/features", "/./v1/features", "/static/../v1/features",
    "/static/%2e%2e/v1/features", "/healthz/../v1/features", "/sign-in/../v1/features", "/v1/openapi.json",
    "/v1;x/features", "/v1/features?a=/healthz", "/\\v1/features", "/healthz%2f..%2fv1/features",
]  # fmt: skip


@pytest.mark.parametrize(
    "host", ["localhost", "localhost/healthz", "x/sign-in?", "a:b", "static/", "[", "\xff", "", "h/static/#"]
)
@pytest.mark.parametrize("root", ["", "/prefix"])
def test_nothing_of_the_interface_answers_without_a_key_whatever_path_host_or_prefix(service, keys, host, root):
    app = create_api(service, LIMITS, keys[0])
    with TestClient(app, base_url="http://localhost", root_path=root) as client:
        for path in PATHS:
            answer = client.get(root + path, headers={"host": host.encode("latin-1")}, follow_redirects=False)
            assert answer.status_code in (303, 401, 404, 405), (path, answer.status_code)
            assert "salience" not in answer.text
            assert "openapi" not in answer.text
        token = {"authorization": f"Bearer {keys[1]['team-a']}", "host": host.encode("latin-1")}
        assert client.get(f"{root}/v1/features", headers=token).status_code == 200


def limited(service, ingresses=1, **limits):
    token = new_key("team-c")[0]
    keys = Keys(listed=(Key("team-c", digest_of(token), **limits),))
    app = create_api(service, LIMITS, keys, ingresses=ingresses)
    return TestClient(app, base_url="http://localhost", headers={"authorization": f"Bearer {token}"}), keys, token


def test_requests_of_a_key_are_limited_by_the_minute(service):
    client, keys, _ = limited(service, requests=3)
    assert [client.get("/v1/auditor").status_code for _ in range(3)] == [200] * 3
    answer = client.get("/v1/auditor")
    assert_problem(answer, 429, "key team-c may send 3 requests a minute; try again in ")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert client.get("/healthz").status_code == 200
    client.cookies.set(COOKIE, keys.open_session("team-c"))
    assert client.get("/features").status_code == 429  # a session is its key's


def test_pairs_of_a_key_are_limited_by_the_minute_on_the_page_too(service):
    client, keys, _ = limited(service, pairs=5)
    assert_problem(client.post("/v1/score", json={"pairs": [PAIR] * 6}), 413, "send at most 5 in a request")
    assert_problem(
        client.post("/v1/score", json={"pairs": [PAIR] * 5, "paris": 0}), 422
    )  # nothing is read, nothing counts
    assert client.post("/v1/score", json={"pairs": [PAIR] * 4}).status_code == 200
    answer = client.post("/v1/score", json={"pairs": [PAIR] * 2})
    assert_problem(answer, 429, "key team-c may send 5 pairs a minute; try again in ")
    assert 55 <= int(answer.headers["retry-after"]) <= 60
    client.cookies.set(COOKIE, keys.open_session("team-c"))
    assert client.post("/", data=PAIR).status_code == 200
    refused = client.post("/", data=PAIR)
    assert (refused.status_code, "This key has scored its pairs." in refused.text) == (429, True)
    assert int(refused.headers["retry-after"]) >= 1


def test_a_key_that_expired_says_so_and_opens_nothing(service):
    client, keys, token = limited(service, expires=1000.0)
    assert_problem(client.get("/v1/auditor"), 401, "this key expired")
    client.cookies.set(COOKIE, keys.open_session("team-c"))
    assert client.get("/features", follow_redirects=False).status_code == 303
    assert client.post("/sign-in", data={"key": token}).status_code == 401


def test_a_session_opened_at_one_ingress_holds_at_another(service, keys, tmp_path):
    lines = "\n".join(key.line for key in keys[0].listed)
    (tmp_path / "keys").write_text(lines, encoding="utf-8")
    one, two = (
        TestClient(create_api(service, LIMITS, Keys(tmp_path / "keys")), base_url="http://localhost") for _ in range(2)
    )
    one.post("/sign-in", data={"key": keys[1]["team-a"]})
    two.cookies = one.cookies
    assert two.get("/features", follow_redirects=False).status_code == 200


def test_a_session_opens_the_page_and_not_the_interface(closed, keys):
    closed.cookies.set(COOKIE, keys[0].open_session("team-a"))
    assert closed.get("/features").status_code == 200
    assert closed.get("/v1/features").status_code == 401


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}])
def test_forms_of_other_sites_are_refused(client, headers):
    assert_problem(client.post("/", data=PAIR, headers=headers), 403, "another site")


def test_a_way_back_never_leads_off_the_service(closed, keys):
    for path in ("//evil.example", "https://evil.example", "/\\evil.example", "/\r\nx: y"):
        form = {"key": keys[1]["team-a"], "next": path}
        assert closed.post("/sign-in", data=form, follow_redirects=False).headers["location"] == "/"


def test_without_keys_only_its_own_names_are_answered(service):
    client = TestClient(create_api(service, hosts=("localhost", "127.0.0.1", "[::1]")))
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example:8000", 403)):
        assert client.get("/v1/auditor", headers={"host": host}).status_code == status


# The document


def test_the_document_is_versioned_and_tells_every_error_as_a_problem(client):
    document = client.get("/v1/openapi.json").json()
    assert document["info"]["version"] == "1.0.0"
    assert set(document["paths"]) == {
        "/v1/score",
        "/v1/auditor",
        "/v1/features",
        "/v1/features/{feature_id}",
        "/healthz",
        "/readyz",
    }
    for path in document["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                assert list(answer["content"]) == ["application/json" if status == "200" else PROBLEM_JSON]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_generated_requests_get_documented_answers(service, mode):
    from schemathesis import GenerationMode, openapi

    schema = openapi.from_asgi("/v1/openapi.json", create_api(service, LIMITS))
    statuses = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=GenerationMode[mode]))
        def check(case):
            answer = case.call()
            statuses[answer.status_code] += 1
            if answer.status_code != 413:  # of more than a server takes, which its operator says and no schema
                case.validate_response(answer)

        if mode == "POSITIVE" or operation.method == "post" or "{" in operation.path:  # others cannot be asked wrongly
            check()
    assert statuses.total() > 40
    assert not {status for status in statuses if status >= 500}


def test_what_is_no_upload_is_not_parsed_as_a_form(client, monkeypatch):
    """Sixteen million separators would hold the ingress for seconds."""

    async def parse(_):
        raise AssertionError("parsed")

    monkeypatch.setattr("starlette.formparsers.FormParser.parse", parse)
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = client.post("/upload", content=b"&" * 1000, headers=form)
    assert answer.status_code == 422
    assert "No file was chosen." in answer.text
