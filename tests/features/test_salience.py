"""Salience, selection and pair scores against hand-made numbers and the published implementation's."""

import csv
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import HAND, make_codes, make_pair, shared
from typer.testing import CliRunner

from safer_ray import schema
from safer_ray.cli.app import app
from safer_ray.config.sections import SelectConfig
from safer_ray.errors import UserError
from safer_ray.features.codes import flatten
from safer_ray.features.judge import read_ratings
from safer_ray.features.salience import SumFeatures, candidates, reduce_sums, salience, salience_table, select
from safer_ray.features.scoring import Features, pair_scores
from safer_ray.pipeline import feature_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Artifact, Place, part_name, read_parts
from safer_ray.storage.files import write_parquet


def sums_of(codes, mode, latents, cuts=()):
    edges = [0, *sorted(cuts), len(codes)]
    parts = [SumFeatures(mode)(codes.slice(a, b - a)) for a, b in itertools.pairwise(edges)]
    return reduce_sums(parts, latents)


def test_paper_sums_count_prompt_and_response_ends_but_no_fallback():
    sums = sums_of(make_codes(HAND), "paper", 4)
    assert sums.chosen.tolist() == [4, 2, 0, 9]
    assert sums.rejected.tolist() == [1, 4, 0, 9]
    assert sums.n_chosen.tolist() == [2, 1, 0, 1]
    assert (sums.ends_chosen, sums.ends_rejected) == (3, 4)
    mu = (4 + 2 + 9 + 1 + 4 + 9) / 8
    wanted = [3 / (5 + 2 * mu), -2 / (6 + 2 * mu), 0, 0]
    assert salience(sums, "paper").tolist() == pytest.approx(wanted)


def test_response_sums_count_response_ends_and_the_fallback_by_the_ends_of_their_side():
    sums = sums_of(make_codes(HAND), "response", 4)
    assert sums.chosen.tolist() == [4, 2, 2, 0]
    assert sums.rejected.tolist() == [1, 4, 0, 0]
    assert (sums.ends_chosen, sums.ends_rejected) == (3, 3)
    c, r = np.array([4, 2, 2, 0]) / 3, np.array([1, 4, 0, 0]) / 3
    mu = (c.sum() + r.sum()) / 8
    assert salience(sums, "response") == pytest.approx((c - r) / (c + r + 2 * mu))


def test_a_longer_side_does_not_make_its_features_salient_in_response_mode():
    long = [(5 * i, {0: 1.0}) for i in range(1, 11)]
    codes = make_codes([{"chosen": long, "rejected": long[:2]}])
    assert salience(sums_of(codes, "response", 1), "response").tolist() == [0]
    assert salience(sums_of(codes, "paper", 1), "paper")[0] > 0.3


def test_nothing_that_fires_gives_no_salience():
    codes = make_codes([{"chosen": [], "rejected": [(5, {})]}])
    sums = sums_of(codes, "paper", 3)
    assert salience(sums, "paper").tolist() == [0, 0, 0]
    assert candidates(salience_table(sums, "paper"), 10) == []


def test_empty_and_sliced_tables_flatten(pairs):
    assert len(flatten(schema.CODES.empty_table(), "chosen", "response").value) == 0
    codes = make_codes(HAND * 3)
    for start in range(6):
        one = flatten(codes.slice(start, 1), "rejected", "response")
        assert one.value.tolist() == [[4.0], [1.0]][start % 2]
        assert one.ends_per_row.tolist() == [[1], [2]][start % 2]


def test_codes_that_disagree_in_length_are_refused():
    rows = make_codes(HAND).to_pylist()
    rows[0]["chosen_values"] = rows[0]["chosen_values"][:-1]
    with pytest.raises(UserError, match="chosen tokens, ends, features and values differ in length"):
        flatten(schema.table(rows, schema.CODES), "chosen", "paper")
    with pytest.raises(UserError, match="no column 'chosen_end'; pass the directory of stage `codes`"):
        flatten(make_codes(HAND).drop_columns("chosen_end"), "chosen", "paper")


entries = st.dictionaries(st.integers(0, 5), st.floats(0.0078125, 10, width=32), max_size=3)
sides = st.lists(entries, max_size=3).map(lambda found: [(6 * (i + 1), values) for i, values in enumerate(found)])
code_rows = st.fixed_dictionaries({"n_prompt_tokens": st.sampled_from([0, 7, 13]), "chosen": sides, "rejected": sides})


@settings(deadline=None, max_examples=60)
@given(st.lists(code_rows, min_size=1, max_size=8), st.sets(st.integers(0, 8)), st.sampled_from(["paper", "response"]))
def test_sums_do_not_depend_on_how_the_corpus_is_cut(rows, cuts, mode):
    codes = make_codes(rows)
    whole = sums_of(codes, mode, 6)
    cut = sums_of(codes, mode, 6, [c for c in cuts if c <= len(codes)])
    for one, two in zip(whole, cut, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    values = salience(whole, mode)
    assert (np.abs(values) <= 1).all()
    brute = np.zeros(6)
    for row in rows:
        for token, found in row["chosen"]:
            for feature, value in found.items():
                brute[feature] += value if mode == "paper" or token >= row["n_prompt_tokens"] else 0
    np.testing.assert_allclose(whole.chosen, brute, rtol=1e-6)


def ranked(values):
    """A salience table from `{feature: salience}`."""
    columns = {"feature": np.array(list(values), dtype=np.int32), "salience": np.array(list(values.values()), float)}
    zero = np.zeros(len(values))
    columns |= {"chosen_sum": zero, "rejected_sum": zero}
    counts = np.zeros(len(values), dtype=np.int64)
    return pa.table({**columns, "n_chosen": counts, "n_rejected": counts}, schema=schema.SALIENCE)


def test_ties_go_to_the_lower_id_and_zero_is_no_candidate():
    table = ranked({7: 0.2, 3: -0.2, 5: 0.9, 1: 0.0, 2: 0.2})
    assert candidates(table, 10) == [5, 2, 3, 7]
    assert candidates(table, 2) == [5, 2]


def test_selection_splits_the_first_features_of_the_rating_by_sign():
    table = ranked({0: 0.9, 1: -0.8, 2: 0.7, 3: -0.6, 4: 0.5})
    ratings = {0: 5, 1: 5, 2: 4, 3: 5, 4: 5}
    chosen = select(table, ratings, count=5, rating=5, limit=3)
    assert chosen == {"candidates": [0, 1, 2, 3, 4], "safe": [0], "unsafe": [1, 3]}


def test_only_candidates_are_selected():
    table = ranked({0: 0.9, 1: -0.8, 2: 0.7})
    assert select(table, {2: 5}, count=2, rating=5, limit=9)["safe"] == []


def test_an_unrated_feature_is_never_selected():
    table = ranked({0: 0.9, 1: -0.8, 2: 0.7})
    assert select(table, {0: None, 2: 5}, count=3, rating=5, limit=9) == {
        "candidates": [0, 1, 2],
        "safe": [2],
        "unsafe": [],
    }


def test_nothing_rated_high_enough_is_an_error_with_the_remedy(tmp_path):
    write_parquet(ranked({0: 0.9, 1: -0.8}), tmp_path / "salience" / part_name(0))
    ctx = StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner())
    source = Artifact(tmp_path / "salience", "salience-x")
    (tmp_path / "ratings.json").write_text('{"0": 4, "1": null}', encoding="utf-8")
    ratings = Artifact(tmp_path / "ratings.json", "ratings-x")
    with pytest.raises(
        UserError, match=r"none of the 2 candidates is rated 5 or better \(highest: 4\); lower judge.thresholds"
    ):
        feature_stages.select(ctx, SelectConfig(), source, ratings=ratings)
    assert not (tmp_path / "out").exists()


def test_salience_by_the_stage_is_the_same_to_the_bit_in_any_run(tmp_path):
    codes = make_codes(HAND * 20)
    for number in range(4):
        write_parquet(codes.slice(10 * number, 10), tmp_path / "codes" / part_name(number))
    tables = []
    for name in ("one", "two"):
        ctx = StageContext(Place(tmp_path, out=tmp_path / name), LocalRunner())
        artifact = feature_stages.salience(ctx, Artifact(tmp_path / "codes", "codes-x"), "response", 4)
        tables.append(artifact.manifest["content_sha256"])
        assert artifact.metrics == {"mode": "response", "latents": 4, "ends_chosen": 60, "ends_rejected": 60}
    assert tables[0] == tables[1]


def test_a_feature_past_the_width_is_an_error(tmp_path):
    write_parquet(make_codes(HAND), tmp_path / "codes" / part_name(0))
    ctx = StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner())
    with pytest.raises(UserError, match="feature 3 fires, but the SAE has 2 latents; check --latents"):
        feature_stages.salience(ctx, Artifact(tmp_path / "codes", "codes-x"), "paper", 2)


def test_directories_of_other_stages_are_refused(pairs_dir, tmp_path):
    (tmp_path / "ratings.json").write_text('{"1": 5}')
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": []}')
    commands = [
        ("salience", "--codes", pairs_dir),
        ("select", "--salience", pairs_dir, "--ratings", tmp_path / "ratings.json"),
        ("rescore", "--codes", pairs_dir, "--features", tmp_path),
        (
            "curate",
            "--pairs",
            pairs_dir,
            "--scores",
            pairs_dir,
            "--strategy",
            "safer",
            "--action",
            "drop",
            "--percent",
            5,
        ),
    ]
    for command in commands:
        with pytest.raises(UserError, match=r"no column '\w+'; pass the directory of"):
            call(*command, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_part_of_which_nothing_was_kept_counts_nothing(tmp_path):
    write_parquet(schema.CODES.empty_table(), tmp_path / "codes" / part_name(0))
    write_parquet(make_codes(HAND), tmp_path / "codes" / part_name(1))
    ctx = StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner())
    made = feature_stages.salience(ctx, Artifact(tmp_path / "codes", "codes-x"), "response", 4)
    assert (made.metrics["latents"], made.metrics["ends_chosen"]) == (4, 3)


# The published implementation's outputs


@pytest.fixture(scope="module")
def golden():
    return shared("golden")


@pytest.fixture(scope="module")
def published(golden):
    """feature -> (salience, chosen_sum, rejected_sum), and pair_id -> score."""
    with (golden / "salience.csv").open() as stream:
        rows = {int(r["feature"]): [float(r[k]) for k in schema_names()] for r in csv.DictReader(stream)}
    with (golden / "scores.csv").open() as stream:
        scores = {r["pair_id"]: float(r["score"]) for r in csv.DictReader(stream)}
    return rows, scores, json.loads((golden / "features.json").read_text())


def schema_names():
    return ("salience", "chosen_sum", "rejected_sum")


def check_salience(table, rows):
    found = {r["feature"]: r for r in table.to_pylist()}
    assert set(rows) <= set(found)
    for feature, (value, chosen, rejected) in rows.items():
        assert found[feature]["salience"] == pytest.approx(value, abs=1e-6)
        assert found[feature]["chosen_sum"] == pytest.approx(chosen, rel=1e-5, abs=1e-12)
        assert found[feature]["rejected_sum"] == pytest.approx(rejected, rel=1e-5, abs=1e-12)


def check_order(ids, scores):
    """`ids` rise by published score wherever two differ by more than 1e-5."""
    highest = -np.inf
    for key in ids:
        assert scores[key] > highest - 1e-5
        highest = max(highest, scores[key])


def test_the_library_matches_the_published_numbers(golden, published):
    rows, scores, features = published
    codes = read_parts(golden / "codes")
    table = salience_table(sums_of(codes, "paper", 2048), "paper")
    check_salience(table, rows)
    chosen = select(table, read_ratings(golden / "ratings.json"), count=256, rating=5, limit=32)
    assert set(chosen["candidates"]) == set(features["candidates"])
    assert set(chosen["safe"]) == set(features["safe"])
    assert set(chosen["unsafe"]) == set(features["unsafe"])
    got = pair_scores(codes, Features(chosen["safe"], chosen["unsafe"], "paper"))
    ids = codes["pair_id"].to_pylist()
    assert len(ids) == len(scores)
    assert dict(zip(ids, got, strict=True)) == pytest.approx(scores, abs=1e-5)
    check_order([ids[i] for i in np.argsort(got, kind="stable")], scores)


@pytest.fixture(scope="module")
def golden_run(golden, tmp_path_factory):
    """The same through the command line: salience, select, rescore."""
    run = tmp_path_factory.mktemp("golden")
    call("salience", "--codes", golden / "codes", "--mode", "paper", "--latents", 2048, "--out", run / "salience")
    call("select", "--salience", run / "salience", "--ratings", golden / "ratings.json", "--out", run / "select")
    features = run / "select/features.json"
    call("rescore", "--codes", golden / "codes", "--features", features, "--out", run / "scores")
    ids = read_parts(golden / "codes")["pair_id"].to_pylist()
    pairs = schema.table([make_pair(key, f"prompt {key}", "chosen", "rejected") for key in ids], schema.PAIRS)
    write_parquet(pairs, run / "pairs" / part_name(0))
    return run


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_command_line_matches_the_published_numbers(golden_run, published):
    rows, scores, features = published
    check_salience(read_parts(golden_run / "salience"), rows)
    chosen = json.loads((golden_run / "select/features.json").read_text())
    assert chosen["mode"] == "paper"
    for name in ("candidates", "safe", "unsafe"):
        assert set(chosen[name]) == set(features[name])
    found = read_parts(golden_run / "scores")
    got = dict(zip(found["pair_id"].to_pylist(), found["score"].to_pylist(), strict=True))
    assert got == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("percent", [0.5, 1, 2.5, 5])
def test_the_flip_list_is_the_published_one(golden_run, published, tmp_path, percent):
    decisions = curate(golden_run, tmp_path, "poison", percent)
    check_taken(decisions, published[1], "flip", percent, highest=True)


@pytest.mark.parametrize("percent", [2, 4, 6, 8, 10])
def test_the_drop_list_is_the_published_one(golden_run, published, tmp_path, percent):
    decisions = curate(golden_run, tmp_path, "drop", percent)
    check_taken(decisions, published[1], "drop", percent, highest=False)


def curate(run, out, action, percent):
    arguments = ["--strategy", "safer", "--action", action, "--percent", percent, "--i-am-red-teaming"]
    call("curate", "--pairs", run / "pairs", "--scores", run / "scores", *arguments, "--out", out / "curated")
    return read_parts(out / "curated/decisions").to_pylist()


def check_taken(decisions, scores, decision, percent, highest):
    sign = -1 if highest else 1
    signed = {key: sign * value for key, value in scores.items()}
    taken = [row["pair_id"] for row in decisions if row["decision"] == decision]
    kept = [row["pair_id"] for row in decisions if row["decision"] == "keep"]
    assert len(taken) == int(len(scores) * percent / 100 + 1e-9)
    assert len(taken) + len(kept) == len(scores)
    if taken:
        assert max(signed[k] for k in taken) <= min(signed[k] for k in kept) + 1e-5
    ours = {row["pair_id"]: sign * row["value"] for row in decisions}
    check_order(sorted(taken, key=lambda k: (ours[k], k)), signed)
