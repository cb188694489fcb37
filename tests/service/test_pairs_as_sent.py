"""Pairs of every layout, sent to the service in process: the canonical pair's score, or a reason in their place."""

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layout_rows import ASKED, BAD, GOOD, ROWS, SIDES, SYSTEM, USER
from support.served import alike, bundle_of

from safer_ray.formats.registry import FORMATS
from safer_ray.service.api import ScoreRequest
from safer_ray.service.http import create_api
from safer_ray.service.request_limits import Limits
from safer_ray.service.request_parsing import Read, read_pairs
from safer_ray.service.service import LocalService

PLAIN = {"prompt": ASKED, **SIDES}
CALL = {"id": "1", "type": "function", "function": {"name": "alarm", "arguments": {"at": [6]}}}
ONE_A_ROW = [name for name in ROWS if not FORMATS[name].several]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    service = LocalService(bundle_of(tmp_path_factory.getbasetemp()).path)
    with TestClient(create_api(service), base_url="http://localhost") as client:
        yield client


def results_of(client, pairs, **more):
    """The results of a request that must succeed, by id."""
    content = json.dumps({"pairs": pairs, **more})
    answer = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()["results"]
    assert len(found) == len(pairs)
    return {result["id"]: result for result in found}


def same_but(result, other, *names):
    return alike(
        *({name: value for name, value in one.items() if name not in ("id", *names)} for one in (result, other))
    )


def test_one_bad_pair_is_told_in_its_place_and_null_keys_are_as_if_absent(client):
    messages = {"chosen": [GOOD], "rejected": [BAD]}
    found = results_of(
        client,
        [
            PLAIN | {"id": "good1"},
            {"id": "null_content", "prompt": [USER, {"role": "assistant", "content": None}], **messages},
            {"id": "null_keys", "prompt": [{**USER, "name": None, "tool_calls": None}], **messages},
            {"id": "good2", "prompt": [USER], **messages},
        ],
    )
    assert [*found] == ["good1", "null_content", "null_keys", "good2"]
    for result in found.values():  # a message that says nothing is none, as in an audit
        assert same_but(result, found["good1"]), result


@pytest.mark.parametrize("explain", [False, True])
def test_a_row_of_every_layout_scores_as_the_canonical_pair(client, explain):
    rows = [ROWS[name] | {"id": name} for name in ONE_A_ROW]
    found = results_of(client, [PLAIN | {"id": "plain"}, *rows], explain=explain)
    assert [*found] == ["plain", *ONE_A_ROW]
    for name in ONE_A_ROW:
        assert same_but(found[name], found["plain"], "spans", "notes"), name  # Nectar is cut into turns, which is noted
    if explain:
        values = [sum(span["contribution"] for span in found[name]["spans"]) for name in ("plain", "helpsteer2", "shp")]
        assert values == pytest.approx([found["plain"]["score"]] * 3, abs=1e-6)
        columns = {span["column"] for span in found["helpsteer2"]["spans"]}
        assert columns <= {"prompt", "response_1", "response_2"}
        for span in found["sharegpt"]["spans"]:
            value = ROWS["sharegpt"][span["column"]]
            item = value[span["message"]] if isinstance(value, list) else value
            assert item["value"][span["start"] : span["end"]] in ("How are you?", "Fine,", "thanks.", "Go away.")


def test_a_layout_may_be_named_and_a_system_column_is_read(client):
    texts = {"chosen": "How are you? Fine, thanks.", "rejected": "How are you? Go away."}
    named = results_of(client, [texts], format="trl_implicit")["0"]
    found = results_of(client, [PLAIN, texts, PLAIN | {"system": "Be kind."}, PLAIN | {"prompt": [SYSTEM, USER]}])
    assert same_but(named, found["0"])
    assert found["1"]["error"]["detail"].startswith("no column holds the prompt of chosen and rejected")
    assert same_but(found["2"], found["3"])
    assert not same_but(found["2"], found["0"])


def test_a_column_that_is_no_part_of_the_prompt_is_carried_where_the_request_says_so(client):
    row = PLAIN | {"context": "Of something else."}
    assert results_of(client, [row])["0"]["error"]["detail"].startswith("two prompts: context says what the prompt")
    assert "score" in results_of(client, [row], carried=["context"])["0"]


def test_what_was_done_to_a_text_is_told(client):
    markup = PLAIN | {"prompt": f"<|im_start|>user\n{ASKED}<|im_end|>\n"}
    found = results_of(client, [PLAIN, markup, PLAIN | {"rejected": json.dumps([BAD])}])
    assert found["0"]["notes"] == []
    assert found["1"]["notes"] == ["chat markup unwrapped: <|im_start|>"]
    assert same_but(found["1"], found["0"], "notes")
    assert same_but(found["2"], found["0"])


KTO = {"prompt": ASKED, "completion": "Fine.", "label": True}
BAD_PAIRS = [
    (None, "refused", "wrong type: the pair is null, wanted a mapping of columns"),
    (7, "refused", "wrong type: the pair is number, wanted a mapping"),
    ("text", "refused", "wrong type: the pair is text, wanted a mapping"),
    ([PLAIN], "refused", "wrong type: the pair is list, wanted a mapping"),
    ({}, "refused", "wanted prompt, chosen and rejected, or another preference format; got the keys (none)"),
    ({"text": "x"}, "refused", "got the keys text"),
    ({"prompt": ASKED, "chosen": "x"}, "refused", "missing column: rejected"),
    (PLAIN | {"chosen": None}, "refused", "empty text: chosen"),
    (PLAIN | {"chosen": " "}, "refused", "empty text: chosen"),
    (PLAIN | {"chosen": 5}, "refused", "wrong type: chosen is number, wanted text or messages"),
    (PLAIN | {"chosen": SIDES["rejected"]}, "refused", "equal responses"),
    (PLAIN | {"prompt": [{"role": None, "content": "x"}]}, "refused", "wrong type: prompt[0].role is null"),
    (PLAIN | {"prompt": [{**USER, "images": ["x"]}]}, "refused", "unread field: prompt[0].images"),
    (PLAIN | {"prompt": [{"role": "x" * 65, "content": "x"}]}, "too_long", "prompt has a role of 65 characters"),
    (PLAIN | {"chosen": "x" * 20_001}, "too_long", "chosen has 20,001 characters, at most 20,000 are taken"),
    (PLAIN | {"chosen": "\ud800"}, "not_unicode", "chosen is no Unicode text: half a surrogate pair at character"),
    (PLAIN | {"prompt": [{"role": "\ud800", "content": "x"}]}, "not_unicode", "prompt is no Unicode text"),
    ({"\ud800": 1}, "refused", "got the keys ?"),
    (PLAIN | {"chosen": '[{"role": ' + "[" * 10_000}, "refused", "not JSON: chosen begins as messages in JSON do"),
    (PLAIN | {"chosen": [{**GOOD, "tool_calls": [CALL]}]}, "unscorable", "has tool_calls, which"),
    (KTO, "refused", "a row of format kto holds one response of a pair, wanted both"),
    (ROWS["rm_bench"], "refused", "a row of format rm_bench holds several pairs, wanted one"),
    (ROWS["arena"] | {"winner_model_b": 0}, "refused", "no preference: winner_tie, or no winner"),
    (PLAIN | {"id": "x" * 201}, "refused", "id of 201 characters, at most 200 are allowed"),
    (PLAIN | {"id": "\ud800"}, "not_unicode", "id is no Unicode text"),
    (PLAIN | {"id": [1]}, "refused", "wrong type: id is list, wanted text or a whole number"),
    (PLAIN | {"id": 2**53}, "refused", "id is a number beyond 9,007,199,254,740,991"),
]


def test_pairs_that_are_none_are_told_in_their_places_and_the_others_are_scored(client):
    """Bad pairs stand between good ones; those whose id cannot be read have their position."""
    sent = [row for bad, _, _ in BAD_PAIRS for row in (bad, PLAIN)]
    content = json.dumps({"pairs": sent})
    answer = client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()["results"]
    assert all(same_but(result, found[1]) for result in found[1::2])
    told = [(result["error"]["code"], result["error"]["detail"]) for result in found[::2]]
    for (code, detail), (_, wanted, words) in zip(told, BAD_PAIRS, strict=True):
        assert (code, words in detail) == (wanted, True), (detail, words)
    ids = ["7" if bad in (ROWS["rm_bench"],) else str(2 * i) for i, (bad, _, _) in enumerate(BAD_PAIRS)]
    assert [result["id"] for result in found[::2]] == ids


def test_a_request_of_bad_pairs_alone_is_answered(client):
    assert [result["error"]["code"] for result in results_of(client, [None, {}, 0]).values()] == ["refused"] * 3


@pytest.mark.parametrize("number", range(len(BAD_PAIRS)))
def test_the_page_reads_a_row_as_the_service_does(client, number):
    bad, code, words = BAD_PAIRS[number]
    content = f"{json.dumps(bad)}\n{json.dumps(PLAIN)}\n".encode()
    uploaded = client.post("/upload", files={"file": ("a.jsonl", content)}, data={"answer": "file"})
    first, second = [json.loads(line)["safer_ray"] for line in uploaded.text.splitlines()]
    if isinstance(bad, dict):
        assert first["error"]["code"] == code
        assert words in first["error"]["detail"]
    assert "score" in second
    page = client.post("/", data={"row": json.dumps(bad)})
    assert page.status_code == 422


@pytest.mark.parametrize("name", ONE_A_ROW)
def test_the_page_takes_a_row_of_every_layout(client, name):
    page = client.post("/", data={"row": json.dumps(ROWS[name])})
    assert page.status_code == 200
    assert "thanks." in page.text


def test_a_scored_file_keeps_what_messages_say_beside_their_content(client):
    row = PLAIN | {"chosen": [{**GOOD, "name": "Ann"}], "note": "mine", "system": "Be kind."}
    content = json.dumps(row).encode()
    answers = [
        client.post("/upload", files={"file": ("a.jsonl", content)}, data={"answer": kind}).text
        for kind in ("file", "page")
    ]
    scored = json.loads(answers[0])
    assert scored["chosen"] == [{**GOOD, "name": "Ann"}]
    assert scored["prompt"] == [SYSTEM, USER]
    assert "leaves out what else the rows have: note." in answers[1]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600)
@given(st.sampled_from([*ROWS, "kto"]), st.data())
def test_whatever_a_column_holds_a_row_is_read_or_refused(unforeseen, name, data):
    """No error but the registry's own reasons: what the service cannot foresee it logs."""
    row = dict(ROWS.get(name, KTO))
    for column in data.draw(
        st.lists(st.sampled_from([*row, "system", "history", "labels", "score_chosen"]), max_size=2)
    ):
        row[column] = data.draw(
            JSON_VALUES | st.sampled_from([value for other in ROWS.values() for value in other.values()])
        )
    format = data.draw(st.just("auto") | st.sampled_from([*FORMATS]))
    (found,) = read_pairs(ScoreRequest(pairs=[row], format=format), Limits())
    assert isinstance(found, Read) or found.error.code in ("refused", "not_unicode")
    assert unforeseen == []


@pytest.fixture(scope="module")
def unforeseen():
    """The errors that nobody foresaw."""
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safer_ray.service.request_parsing.log_without_texts", errors.append)
        yield errors
