"""What a bundle shows of its features."""

import pyarrow as pa
import pytest
from support.made import make_codes
from support.tiny_run import finished

from safer_ray import schema
from safer_ray.features.cards import BINS, CARDS, FILE, NAME_CHARS, FeatureEvidence, make_cards, name_of, read_cards
from safer_ray.features.scoring import Features
from safer_ray.storage.artifacts import open_artifact
from safer_ray.storage.files import read_parquet

FEATURES = Features([1], [3, 5], "response")
SALIENCE = schema.table(
    [{"feature": 1, "salience": 0.5, "chosen_sum": 2.0}, {"feature": 3, "salience": -0.9, "n_rejected": 4}],
    schema.SALIENCE,
)


def context(feature, rank, sentence):
    return {"feature": feature, "rank": rank, "value": 1.0 - rank / 10, "side": "chosen", "sentence": sentence}


def made(known=None, rows=()):
    known = known or FeatureEvidence(SALIENCE)
    return {row["feature"]: row for row in make_cards(FEATURES, known, [make_codes(list(rows))]).to_pylist()}


def test_cards_come_by_falling_salience_with_their_sign():
    assert [(f, row["sign"]) for f, row in made().items()] == [(3, -1), (1, 1), (5, -1)]
    assert made()[5]["salience"] is None


def test_a_histogram_counts_where_a_feature_fires_on_either_side():
    rows = [
        {"n_prompt_tokens": 1, "chosen": [(0, {3: 9.0}), (2, {3: 1.0})], "rejected": [(2, {3: 2.0}), (4, {3: 0.1})]}
    ]
    card = made(rows=rows)[3]
    assert card["edges"][0] == 0
    assert card["edges"][-1] == 2.0  # the 9.0 is of the prompt, which this mode does not count
    assert (sum(card["chosen"]), sum(card["rejected"]), len(card["chosen"])) == (1, 2, BINS)
    assert made()[1]["edges"] is None


def test_contexts_come_strongest_first_and_the_first_gives_the_name():
    contexts = schema.table([context(1, 1, "Second."), context(1, 0, " First\n one. ")], schema.CONTEXTS)
    card = made(FeatureEvidence(SALIENCE, contexts=contexts))[1]
    assert [c["sentence"] for c in card["contexts"]] == [" First\n one. ", "Second."]
    assert card["name"] == "First one."


@pytest.mark.parametrize(
    ("verdict", "contexts", "name"),
    [
        (None, [], "feature 7"),
        ({"judge": "probe:safety", "reason": "AUROC 0.9"}, [], "feature 7"),
        ({"judge": "model", "reason": "refusals"}, [context(7, 0, "No.")], "refusals"),
        ({"judge": "model", "reason": None}, [context(7, 0, " \n "), context(7, 1, "No.")], "No."),
        (None, [context(7, 0, "x" * 99)], "x" * (NAME_CHARS - 1) + "\u2026"),
    ],
)
def test_a_name_is_a_judges_words_else_a_sentence_and_never_empty(verdict, contexts, name):
    assert name_of(7, verdict, contexts) == name


def test_the_bundle_of_a_run_carries_its_features_cards(tmp_path_factory):
    auditor = finished(tmp_path_factory.getbasetemp()).artifacts["auditor"]
    cards = read_cards(auditor.path)
    assert cards.schema == CARDS
    assert {row["rating"] for row in cards.to_pylist()} == {5}
    assert all(row["contexts"] and row["edges"] for row in cards.to_pylist())


def test_a_bundle_without_cards_still_names_its_features(tmp_path, tmp_path_factory):
    auditor = finished(tmp_path_factory.getbasetemp()).artifacts["auditor"]
    features = (auditor.path / "features.json").read_text(encoding="utf-8")
    (tmp_path / "features.json").write_text(features, encoding="utf-8")
    cards = read_cards(tmp_path)
    whole = read_parquet(auditor.path / FILE)
    assert set(cards["feature"].to_pylist()) == set(whole["feature"].to_pylist())
    assert cards["rating"].null_count == len(cards)
    assert not pa.compute.any(pa.compute.equal(cards["name"], "")).as_py()
    assert open_artifact(auditor.path, "auditor").name == auditor.name


def test_a_bundle_made_by_hand_shows_its_features_where_their_salience_is_given(safer, tmp_path, tmp_path_factory):
    made = finished(tmp_path_factory.getbasetemp()).artifacts
    stages = {"reward": "reward", "sae": "sae", "features": "select", "codes": "codes", "salience": "salience"}
    options = [word for option, stage in stages.items() for word in (f"--{option}", made[stage].path)]
    code, _, err = safer("auditor", *options, "--contexts", made["contexts"].path, "--out", tmp_path / "bundle")
    assert code == 0, err
    whole, cards = (read_cards(path) for path in (made["auditor"].path, tmp_path / "bundle"))
    assert cards.drop_columns(["rating", "reason"]).equals(whole.drop_columns(["rating", "reason"]))
    assert cards["rating"].null_count == len(cards)
    without = [
        word for option in ("reward", "sae", "features", "codes") for word in (f"--{option}", made[stages[option]].path)
    ]
    code, _, err = safer("auditor", *without, "--contexts", made["contexts"].path, "--out", tmp_path / "other")
    assert (code, "--verdicts and --contexts need --salience" in err) == (2, True)
