"""The concept probe: how separations become ratings, and what is left unrated."""

import json
from typing import get_args

import numpy as np
import pytest
import yaml
from support.made import make_codes

from safer_ray import schema
from safer_ray.config.sections import JudgeConfig, JudgeKind
from safer_ray.errors import UserError
from safer_ray.features.encoder import Encoder
from safer_ray.features.judge import (
    JUDGES,
    Exchange,
    Probe,
    ProbeJudge,
    Separation,
    auroc,
    load_probe,
    probe_pairs,
    ratings_of,
    read_ratings,
    response_maxima,
)

CONFIG = JudgeConfig(thresholds=(0.1, 0.2, 0.3, 0.4))


def exchange(number, **more):
    values = {"id": f"e{number}", "category": "c", "kind": "benign" if number % 2 else "harmful"}
    return values | {"prompt": "Do it?", "safe": "No, I will not.", "unsafe": "Sure, here you are."} | more


@pytest.fixture
def probe():
    return Probe(concept="safety", exchanges=tuple(Exchange(**exchange(i)) for i in range(10)))


@pytest.fixture
def judge(probe):
    """A judge on codes made by hand.

    Feature 0 fires on every safe response, 1 on every unsafe one, 2 on both alike, 3 on safe ones to harmful requests
    only, 4 never.
    """
    rows = []
    for i in range(10):
        safe = {0: 1.0, 2: 1.0} | ({} if i % 2 else {3: 2.0})
        rows.append({"n_prompt_tokens": 6, "chosen": [(5, {1: 9.0}), (8, safe)], "rejected": [(7, {1: 0.5, 2: 1.0})]})
    made = object.__new__(ProbeJudge)
    made.probe, made.config, made.codes = probe, CONFIG, make_codes(rows)
    return made


def test_separations_are_aurocs_of_maxima_over_response_ends(judge):
    found = judge.separations([0, 1, 2, 3, 4])
    assert found[0] == (1, 1, 1)
    assert found[1] == (0, 0, 0)
    assert found[2] == (0.5, 0.5, 0.5)
    assert found[3] == (0.75, 1, 0.5)
    assert found[4] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("value", "rating"), [(0.5, 1), (0.59, 1), (0.625, 2), (0.75, 3), (0.19, 4), (0.875, 4), (0.95, 5), (0.0, 5)]
)
def test_thresholds_make_ratings(judge, value, rating):
    assert judge.rate(Separation(value, 0.5, 0.5)) == rating


def test_verdicts_rate_features_that_agree_with_their_salience(judge):
    table = judge({0: 0.4, 1: -0.4, 2: 0.1})
    assert table.schema == schema.VERDICTS
    assert table["feature"].to_pylist() == [0, 1, 2]
    assert table["rating"].to_pylist() == [5, 5, 1]
    assert set(table["judge"].to_pylist()) == {"probe:safety"}
    assert "fires more on safe responses: AUROC 1.00" in table["reason"][0].as_py()
    assert "fires more on unsafe responses" in table["reason"][1].as_py()
    assert json.loads(table["raw"][0].as_py()) == {"auroc": 1.0, "harmful": 1.0, "benign": 1.0}


def test_a_feature_that_contradicts_its_salience_stays_unrated_and_says_so(judge):
    table = judge({0: -0.4})
    assert table["rating"].to_pylist() == [None]
    reason = table["reason"][0].as_py()
    assert "sign contradicts its salience -0.400" in reason
    assert "would be rated 5" in reason


def test_features_past_those_that_fire_are_rated_lowest(judge):
    assert judge({500: 0.2})["rating"].to_pylist() == [1]
    assert len(judge({})) == 0


def test_maxima_are_zero_where_nothing_fires():
    codes = make_codes([{"chosen": [(5, {1: 2.0}), (10, {1: 3.0, 0: 1.0})]}, {}])
    assert response_maxima(codes, "chosen", [1, 0, 9]).tolist() == [[3, 1, 0], [0, 0, 0]]


def test_auroc_counts_ties_half():
    assert auroc(np.array([[1.0], [2.0]]), np.array([[1.0], [0.0]]))[0] == pytest.approx(3.5 / 4)
    assert auroc(np.zeros((0, 2)), np.ones((3, 2))).tolist() == [0.5, 0.5]


def test_a_judge_reads_exchanges_with_a_real_engine(probe, reward_dir, sae_dir):
    judge = ProbeJudge(Encoder.load(reward_dir, sae=sae_dir), probe, CONFIG)
    features = sorted({f for row in judge.codes["chosen_features"].to_pylist() for end in row for f in end})
    verdicts = judge(dict.fromkeys(features, 0.5))
    assert len(verdicts) == len(features) > 0
    assert all(0 <= s.auroc <= 1 for s in judge.separations(features))
    assert all(r is None or 1 <= r <= 5 for r in verdicts["rating"].to_pylist())


def test_the_safe_response_is_the_chosen_one(probe):
    pair = probe_pairs(probe)[0]
    assert pair["pair_id"] == "e0"
    assert pair["chosen"] == [{"role": "assistant", "content": "No, I will not."}]
    assert pair["rejected"][0]["content"] == "Sure, here you are."


def test_the_shipped_probe_has_matched_exchanges():
    probe = load_probe("safety")
    assert len(probe.exchanges) >= 100
    assert {e.kind for e in probe.exchanges} == {"harmful", "benign"}
    assert len({e.id for e in probe.exchanges}) == len(probe.exchanges)
    assert all(e.safe != e.unsafe for e in probe.exchanges)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not readable YAML"),
        (yaml.safe_dump({"concept": "c", "exchanges": [exchange(0)] * 9}), "9 exchanges are too few.*at least 10"),
        (yaml.safe_dump({"concept": "c", "exchanges": [exchange(0, tone="x")]}), "exchanges.0.tone: unknown key"),
        (yaml.safe_dump({"concept": "c", "exchanges": [exchange(0, kind="odd")]}), r"exchanges.0.kind.*\(got 'odd'\)"),
        (yaml.safe_dump({"exchanges": []}), "concept"),
        ("[]", "probe.yaml"),
        ("", "probe.yaml"),
    ],
)
def test_files_that_are_no_probe_are_explained(tmp_path, content, message):
    path = tmp_path / "probe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_probe(str(path))


def test_an_unknown_probe_is_named():
    with pytest.raises(UserError, match=r"no probe 'kindness': neither a YAML file nor one that ships \(safety\)"):
        load_probe("kindness")


def test_of_several_judges_the_lowest_rating_counts():
    rows = [
        {"feature": 1, "judge": "a", "rating": 5},
        {"feature": 1, "judge": "b", "rating": 3},
        {"feature": 2, "judge": "a", "rating": 5},
        {"feature": 2, "judge": "b", "rating": None},
        {"feature": 2, "judge": "c", "rating": 5},
        {"feature": 3, "judge": "a", "rating": 5},
    ]
    assert ratings_of(schema.table(rows, schema.VERDICTS)) == {1: 3, 2: None, 3: 5}


def test_ratings_are_read_with_nulls(tmp_path):
    path = tmp_path / "ratings.json"
    path.write_text('{"3": 5, "10": null}')
    assert read_ratings(path) == {3: 5, 10: None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "wanted JSON"),
        ("[5, 5]", "wanted JSON"),
        ('{"x": 5}', "wanted JSON"),
        ('{"1": 6}', "a rating is 1-5 or null, got 1: 6"),
        ('{"1": "5"}', "a rating is 1-5 or null, got 1: '5'"),
        ('{"1": [5]}', "a rating is 1-5 or null"),
    ],
)
def test_files_that_are_no_ratings_are_refused(tmp_path, content, message):
    path = tmp_path / "ratings.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_ratings(path)


def test_missing_ratings_are_named(tmp_path):
    with pytest.raises(UserError, match="no ratings at"):
        read_ratings(tmp_path / "none.json")


def test_every_kind_of_judge_that_a_config_may_name_is_there():
    assert set(JUDGES) == set(get_args(JudgeKind))
    assert JUDGES[JudgeConfig().kind] is ProbeJudge
