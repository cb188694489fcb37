"""What inputs do not say is not guessed: it is refused with the option named, or told in a line."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.made import HAND, make_codes, make_pair, make_pairs, random_sae

from safer_ray import schema
from safer_ray.config.sections import CurateConfig, ScoresConfig, SelectConfig
from safer_ray.config.where import where_mask
from safer_ray.detection.evaluation import on_the_same, paired_tests
from safer_ray.errors import UserError
from safer_ray.features.bundle import read_features, reference_values, vector_layers
from safer_ray.features.codes import flatten
from safer_ray.features.scoring import Features, ScoreCodes, margins
from safer_ray.pipeline import feature_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.reward.reading import SETTINGS
from safer_ray.sae import quality
from safer_ray.sae.formats import load_sae, save_sae
from safer_ray.sae.quality import spliced
from safer_ray.storage.artifacts import Artifact, Place, open_artifact, part_name, read_parts
from safer_ray.storage.files import write_json, write_parquet
from safer_ray.strategies import StrategyInput, reward_margin

FEATURES = Features([0], [1], "response")


@pytest.fixture
def ctx(tmp_path) -> StageContext:
    return StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner())


def artifact(path, stage: str, **metrics: object) -> Artifact:
    return Artifact(path, f"{stage}-x", {"metrics": metrics})


@pytest.fixture
def codes(tmp_path):
    write_parquet(make_codes(HAND), tmp_path / "codes" / part_name(0))
    return tmp_path / "codes"


def test_salience_wants_to_know_how_wide_the_sae_is(ctx, codes):
    """Its mean over features that never fire counts in every value."""
    with pytest.raises(UserError, match=r"codes does not record how wide its SAE is, .*; pass --latents"):
        feature_stages.salience(ctx, Artifact(codes, "codes-x"), "paper")
    with pytest.raises(UserError, match=r"is of an SAE of 64 latents, not 8; leave --latents out"):
        feature_stages.salience(ctx, artifact(codes, "codes", latents=64), "paper", 8)
    narrow = read_parts(feature_stages.salience(ctx, Artifact(codes, "codes-x"), "paper", 4).path)
    wide = read_parts(
        feature_stages.salience(
            StageContext(Place(codes.parent, out=codes.parent / "wide"), LocalRunner()),
            artifact(codes, "codes", latents=64),
            "paper",
        ).path
    )
    values = [dict(zip(t["feature"].to_pylist(), t["salience"].to_pylist(), strict=True)) for t in (narrow, wide)]
    assert abs(values[0][0] - values[1][0]) > 0.01


def test_the_command_line_names_the_option(safer, codes, tmp_path):
    code, _, err = safer("salience", "--codes", codes, "--out", tmp_path / "out")
    assert code == 2
    assert "pass --latents" in err
    code, _, err = safer("salience", "--codes", codes, "--latents", 4, "--out", tmp_path / "out")
    assert code == 0, err


def test_select_wants_to_know_the_mode(ctx, codes, tmp_path):
    made = feature_stages.salience(ctx, Artifact(codes, "codes-x"), "paper", 4)
    foreign = Artifact(made.path, "salience-x")
    write_json({"0": 5, "1": 5}, tmp_path / "rated.json")

    def select(source, mode=None):
        place = StageContext(Place(tmp_path, out=tmp_path / f"select-{mode}"), LocalRunner())
        return feature_stages.select(
            place, SelectConfig(rating=5), source, ratings=open_artifact(tmp_path / "rated.json"), mode=mode
        )

    with pytest.raises(UserError, match="does not record its mode; pass --mode paper or --mode response"):
        select(foreign)
    with pytest.raises(UserError, match="was made in mode 'paper', not 'response'; leave --mode out"):
        select(made, "response")
    assert json.loads((select(foreign, "paper").path / "features.json").read_text())["mode"] == "paper"


def test_a_selection_without_a_mode_is_told(tmp_path, caplog):
    write_json({"safe": [1], "unsafe": []}, tmp_path / "features.json")
    assert read_features(tmp_path).mode == "response"
    assert "features.json names no mode" in caplog.text
    caplog.clear()
    assert read_features(tmp_path, "paper").mode == "paper"
    assert not caplog.text


def test_a_selection_of_another_sae_is_refused(ctx, codes, tmp_path):
    write_json({"safe": [1], "unsafe": [70], "mode": "paper"}, tmp_path / "features.json")
    selected = open_artifact(tmp_path / "features.json")
    with pytest.raises(UserError, match=r"features: 70 is selected, but .*codes has 64 latents; select the features"):
        feature_stages.rescore(ctx, ScoresConfig(), artifact(codes, "codes", latents=64), selected)


def test_codes_that_do_not_say_where_a_response_begins_serve_paper_mode_alone():
    rows = make_codes(HAND)
    index = rows.schema.get_field_index("rejected_prompt_tokens")
    unknown = rows.set_column(index, "rejected_prompt_tokens", pa.nulls(len(rows), pa.int32()))
    for given in (unknown, rows.drop_columns(["rejected_prompt_tokens"])):
        with pytest.raises(UserError, match=r"`rejected_prompt_tokens` is missing or null.*mode `paper`"):
            flatten(given, "rejected", "response")
        assert len(flatten(given, "chosen", "paper").value)


def test_pairs_without_rewards_are_not_taken_for_harmless():
    """A margin that nobody knows is in no place among those of the reference."""
    score = ScoreCodes(FEATURES, np.array([0.0, 1.0]), 0.5, 0, lambda codes, _: margins(codes))
    rows = [row | {"chosen_reward": 1.0, "rejected_reward": 0.0} for row in HAND]
    assert len(score(make_codes(rows))) == len(rows)
    with pytest.raises(UserError, match=r"pairs, the first is 'p1', have nothing to be suspected by.*--detector safer"):
        score(make_codes([rows[0], HAND[1]]))
    assert len(ScoreCodes(FEATURES, np.array([0.0]), 0.5, 0)(make_codes(HAND))) == len(HAND)


def test_margins_that_are_not_finite_order_nothing():
    table = pa.table({"reward_margin": pa.array([1.0, float("nan")])})
    with pytest.raises(UserError, match="1 pairs have no reward_margin; score them first"):
        reward_margin(StrategyInput(table, 0))


def test_an_empty_reference_is_refused(tmp_path):
    write_parquet(
        pa.table({"score": pa.array([], pa.float64()), "reward_margin": pa.array([], pa.float64())}),
        tmp_path / "reference.parquet",
    )
    for detector in ("safer", "reward_margin"):
        with pytest.raises(UserError, match="its reference is empty or not finite"):
            reference_values(Artifact(tmp_path, "auditor-x"), detector)


def test_a_combined_detector_says_which_layers_it_reads(tmp_path):
    assert vector_layers(artifact(tmp_path, "auditor", vector_layers=[2, 3])) == [2, 3]
    with pytest.raises(UserError, match="does not say the vector_layers of its combined detector"):
        vector_layers(artifact(tmp_path, "auditor"))


def test_an_sae_of_weights_that_are_not_finite_is_refused(tmp_path):
    """Its latents would fire never or always, without a word."""
    save_sae(random_sae(8, 16, 2), tmp_path, model="m", layer=1)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    broken = {name: value.clone() for name, value in weights.items()}
    broken["W_enc"][0, 3] = float("nan")
    save_file(broken, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"corrupt SAE in .*: W_enc holds NaN or infinite values"):
        load_sae(tmp_path)
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    write_json(config | {"d_sae": 17}, tmp_path / "cfg.json")
    with pytest.raises(UserError, match=r"cfg.json says 17 latents, W_dec has 16"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"template": "chatml"}', "template 'chatml' is unknown; choose auto, chat, plain"),
        ('{"max_length": "long"}', "max_length is 'long', wanted a whole number from 1 on"),
        ('{"frozen_layers": -1}', "frozen_layers is -1, wanted a whole number from 0 on"),
        ("{", "is not a JSON object"),
    ],
)
def test_how_a_model_reads_text_is_not_guessed(reward_dir, tmp_path, settings, told):
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model" / SETTINGS).write_text(settings)
    with pytest.raises(UserError, match=told):
        load_pair_tokenizer(tmp_path / "model")


def test_a_format_that_is_made_up_is_told(reward_dir, tmp_path, caplog):
    shutil.copytree(reward_dir, tmp_path / "model")
    load_pair_tokenizer(tmp_path / "model")
    assert not caplog.text
    (tmp_path / "model" / SETTINGS).unlink()
    load_pair_tokenizer(tmp_path / "model")
    assert "model has no chat template: pairs are read as Human: and Assistant: turns" in caplog.text


def test_a_filter_that_meets_nothing_is_told(caplog):
    assert not where_mask(make_pairs(4), "section == safty").any()
    assert "none of 4 pairs meets `section == safty`" in caplog.text


def test_another_layer_than_the_activations_are_of_is_refused(safer, tmp_path):
    columns = {"x": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float16(), 2))}
    write_parquet(pa.table(columns), tmp_path / "vectors" / part_name(0))
    manifest = {"stage": "activations", "name": "activations-x", "metrics": {"layer": 2}}
    write_json(manifest, tmp_path / "vectors/manifest.json")
    code, _, err = safer("sae", "--activations", tmp_path / "vectors", "--layer", 3, "--out", tmp_path / "out")
    assert code == 2
    assert "are of layer 2, not 3; leave --layer out" in err


# Pairs that a model quarantined


def test_curation_keeps_the_few_pairs_that_have_no_score(tmp_path):
    pairs = make_pairs(20)
    write_parquet(pairs, tmp_path / "pairs" / part_name(0))
    scores = {"pair_id": pairs["pair_id"][2:], "score": np.arange(18.0)}
    scores |= {"reward_margin": np.arange(18.0), "suspicion": np.zeros(18)}
    write_parquet(pa.table(scores), tmp_path / "scores" / part_name(0))
    config = CurateConfig(strategy="safer", action="drop", percent=10)
    given = Artifact(tmp_path / "pairs", "pairs-x"), Artifact(tmp_path / "scores", "scores-x")
    made = feature_stages.curate(StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner()), config, *given)
    assert made.manifest["rows"] == {"keep": 19, "drop": 1, "unscored": 2}
    decisions = read_parts(made.path / "decisions")
    assert decisions["pair_id"].equals(pairs["pair_id"])
    assert decisions["value"].to_pylist()[:3] == [None, None, 0.0]
    assert decisions["decision"].to_pylist()[:3] == ["keep", "keep", "drop"]
    strict = StageContext(Place(tmp_path, out=tmp_path / "strict"), LocalRunner(), max_refused_share=0.05)
    with pytest.raises(UserError, match="2 pairs have no score, the first is 'pair-000'"):
        feature_stages.curate(strict, config, *given)


def test_models_are_compared_on_the_pairs_that_both_could_read():
    def rewards(ids):
        columns = {"pair_id": ids, "section": ["a"] * len(ids), "group": ids} | dict.fromkeys(
            ("reward_chosen", "reward_rejected", "reward_margin"), [1.0] * len(ids)
        )
        columns |= dict.fromkeys(schema.TRUNCATED, [False] * len(ids))
        return pa.table(columns, schema=schema.REWARDS)

    one, other = on_the_same(rewards(["a", "b", "c"]), rewards(["c", "b", "d"]))
    assert paired_tests(one, other)["a"].n == 2
    with pytest.raises(UserError, match="measured on different pairs"):
        paired_tests(rewards(["a"]), rewards(["b"]))


def test_what_reconstructions_cost_is_measured_on_the_pairs_that_have_rewards(reward, monkeypatch):
    rows = [*make_pairs(4).to_pylist(), make_pair("odd", "Hi.", "Yes. Yes.", "No.")]
    tokens, sae = reward.pairs(rows), random_sae(reward.hidden_size, 64, 4)
    wanted = spliced(reward, 2, sae, tokens[:4])
    forward = quality.forward_pairs

    def odd(*given, **more):
        found = forward(*given, **more)
        if len(found.rewards) == 10:
            found.rewards[8] = torch.nan
        return found

    monkeypatch.setattr(quality, "forward_pairs", odd)
    found = spliced(reward, 2, sae, tokens)
    assert found.pairs == 4
    assert found.reward_mse == pytest.approx(wanted.reward_mse, rel=1e-4)
