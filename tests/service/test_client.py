"""The client's patience, and what it makes of answers; the service itself is in test_serve."""

import email.utils
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_ray import client as module
from safer_ray.client import Client, Contribution, Failed, Patience, Scored, ServiceError, Span, pause, seconds_of

PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
SCORED = {
    "id": "0",
    "score": 1.0,
    "percentile": 50.0,
    "suspicion": 0.5,
    "flag": False,
    "decision": "keep",
    "reward_chosen": 1.0,
    "reward_rejected": 0.0,
    "reward_margin": 1.0,
    "truncated": False,
    "features": None,
    "spans": None,
}
GOOD = httpx.Response(200, json={"auditor": "a", "results": [SCORED]})
PROBLEM = {"type": "about:blank", "title": "No", "status": 422, "detail": "body.pairs: Field required"}


@pytest.fixture
def slept(monkeypatch):
    """Seconds that the client would have slept."""
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    return waits


class Told:
    """A service that gives these answers in turn, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, request):
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **more):
        return Client("http://service", transport=httpx.MockTransport(self), **more)


def test_it_asks_again_while_the_service_is_busy_or_away(slept):
    told = Told(
        httpx.Response(429, headers={"retry-after": "2"}, json=PROBLEM),
        httpx.ConnectError("refused"),
        httpx.Response(503, text="no replicas"),
        httpx.ReadError("cut"),
        GOOD,
    )
    with told.client() as client:
        (scored,) = client.score([PAIR])
    assert isinstance(scored, Scored)
    assert len(told.asked) == 5
    assert 2.0 <= slept[1] <= 3.0  # as asked, and a little more by chance
    assert {request.content for request in told.asked} == {told.asked[0].content}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_final_and_says_why(slept, status):
    told = Told(httpx.Response(status, json=PROBLEM))
    with told.client() as client, pytest.raises(ServiceError, match=f"{status}, body.pairs: Field required") as error:
        client.score([PAIR])
    assert error.value.status == status
    assert len(told.asked) == 1


def test_patience_ends(slept):
    told = Told(*[httpx.Response(503, text="gone")] * 3)
    with told.client(patience=Patience(tries=3)) as client, pytest.raises(ServiceError, match="in 3 tries: 503"):
        client.score([PAIR])
    told = Told(*[httpx.ConnectError("refused")] * 2)
    with told.client(patience=Patience(tries=2)) as client, pytest.raises(ServiceError, match="ConnectError"):
        client.score([PAIR])


def test_many_pairs_go_in_requests_of_a_few_and_keep_their_numbers(slept):
    answers = [httpx.Response(200, json={"results": [SCORED] * n}) for n in (2, 2, 1)]
    told = Told(*answers)
    with told.client() as client:
        assert len(client.score([PAIR, PAIR | {"id": "mine"}, PAIR, PAIR, PAIR], at_once=2)) == 5
    ids = [
        pair["id"] for request in told.asked for pair in httpx.Response(200, content=request.content).json()["pairs"]
    ]
    assert ids == ["0", "mine", "2", "3", "4"]


def test_a_layout_is_named_and_a_null_id_is_none():
    told = Told(httpx.Response(200, json={"results": [SCORED]}))
    with told.client() as client:
        client.score([PAIR | {"id": None}], format="trl_implicit", carried=["context"])
    sent = httpx.Response(200, content=told.asked[0].content).json()
    assert (sent["format"], sent["carried"], sent["pairs"][0]["id"]) == ("trl_implicit", ["context"], "0")


def test_a_token_is_sent_as_bearer():
    told = Told(httpx.Response(200, json={"name": "a"}))
    with told.client(token="safer_x") as client:
        assert client.auditor() == {"name": "a"}
    assert told.asked[0].headers["authorization"] == "Bearer safer_x"


def test_answers_are_typed_and_what_is_new_in_them_is_left_out():
    span = {"side": "chosen", "part": "response", "message": 0, "start": 0, "end": 3, "contribution": -1.0}
    feature = {"feature": 7, "name": "n", "sign": -1, "contribution": -1.0, "later": 1}
    spans = [span | {"features": [7]}, span | {"features": [7], "column": "response_1", "later": 3}]
    result = SCORED | {"features": [feature], "spans": spans, "later": 2}
    failed = {"id": "1", "error": {"code": "refused", "detail": "equal responses"}}
    told = Told(httpx.Response(200, json={"results": [result, failed]}))
    with told.client() as client:
        scored, error = client.score([PAIR, PAIR], explain=True)
    assert scored.features == [Contribution(7, "n", -1, -1.0)]
    assert scored.spans == [Span("chosen", "response", 0, 0, 3, -1.0, [7], column) for column in (None, "response_1")]
    assert error == Failed("1", "refused", "equal responses")


def test_a_key_that_has_asked_enough_is_waited_for_as_long_as_the_service_says(slept):
    told = Told(httpx.Response(429, headers={"retry-after": "47"}, json=PROBLEM), GOOD)
    with told.client() as client:
        client.score([PAIR])
    assert 47 <= slept[1] <= 51


@given(st.integers(0, 20), st.one_of(st.none(), st.integers(0, 100).map(str)))
def test_pauses_grow_are_bounded_and_never_shorter_than_was_asked_within_reason(attempt, asked):
    patience = Patience()
    wait = pause(patience, attempt, asked)
    assert 0 < wait <= patience.longest_asked_s + patience.longest_s / 2
    if asked is None:
        assert wait <= patience.longest_s
    else:
        assert wait >= min(float(asked), patience.longest_asked_s)


def test_a_retry_after_may_be_a_date():
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert seconds_of(later) == pytest.approx(30, abs=2)
    assert seconds_of("soon") is None
    assert seconds_of(email.utils.formatdate(0, usegmt=True)) == 0
