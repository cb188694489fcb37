"""Where sentences end is a matter of codes and of the bundle made of them, not of the model that reads them."""

import json
import shutil

import pytest
from support.made import HAND, make_codes, make_pair
from support.tiny_run import tiny_config, write_config

from safer_ray.config.reading import ASCII_ENDS, ENDS, EVERY_SCRIPT, Reading
from safer_ray.errors import UserError
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.reward.reading import SETTINGS
from safer_ray.storage.artifacts import MANIFEST, Artifact, Place, part_name
from safer_ray.storage.files import write_parquet

ASCII = Reading(sentence_ends=ASCII_ENDS)
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb\u516c\u56ed\u5427\uff01\u597d\u7684\u3002"


def context(folder, **options):
    return StageContext(Place(folder), LocalRunner(), **options)


def test_a_response_in_chinese_has_more_than_one_end(reward_dir):
    pair = make_pair("a", CHINESE, CHINESE, CHINESE)
    many, one = (load_pair_tokenizer(reward_dir, reading)([pair])[0].chosen for reading in (Reading(), ASCII))
    assert len(many.token) > 3
    assert len(one.token) == 1
    assert one.fallback


def bundled(tmp_path, reward_dir, sae_dir, pairs_dir, reading):
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "response"}')
    reward, sae, chosen, pairs = (
        Artifact(path, path.stem) for path in (reward_dir, sae_dir, tmp_path / "features.json", pairs_dir)
    )
    ctx = context(tmp_path / "runs", reading=reading)
    codes = model_stages.codes(ctx, pairs, reward, sae)
    return codes, feature_stages.auditor(context(tmp_path / "runs"), reward, sae, chosen, codes).path


@pytest.mark.parametrize("reading", [Reading(), ASCII])
def test_a_bundle_ends_sentences_as_its_codes_did(tmp_path, reward_dir, sae_dir, pairs_dir, reading):
    codes, bundle = bundled(tmp_path, reward_dir, sae_dir, pairs_dir, reading)
    assert codes.metrics[ENDS] == reading.sentence_ends
    assert load_pair_tokenizer(bundle / "reward").ends == reading.sentence_ends
    assert load_pair_tokenizer(reward_dir).ends == EVERY_SCRIPT


def test_a_bundle_made_before_the_rule_ends_them_in_ascii(tmp_path, reward_dir, sae_dir, pairs_dir):
    _, bundle = bundled(tmp_path, reward_dir, sae_dir, pairs_dir, Reading())
    said = json.loads((bundle / MANIFEST).read_text())
    assert said["metrics"].pop(ENDS) == EVERY_SCRIPT
    (bundle / MANIFEST).write_text(json.dumps(said))
    assert load_pair_tokenizer(bundle / "reward").ends == ASCII_ENDS
    (bundle / "reward" / SETTINGS).unlink()
    assert load_pair_tokenizer(bundle / "reward").ends == ASCII_ENDS
    shutil.copytree(bundle / "reward", tmp_path / "elsewhere")
    (tmp_path / MANIFEST).write_text("{}")  # somebody else's
    assert load_pair_tokenizer(tmp_path / "elsewhere").ends == EVERY_SCRIPT


def test_a_bundle_does_not_change_its_rule(tmp_path, reward_dir, sae_dir, pairs_dir):
    _, bundle = bundled(tmp_path, reward_dir, sae_dir, pairs_dir, Reading())
    with pytest.raises(UserError, match="read with sentence_ends 'every_script', not 'ascii'; leave it out"):
        load_pair_tokenizer(bundle / "reward", ASCII)


def test_a_run_in_paper_mode_ends_sentences_as_published(tmp_path):
    assert tiny_config(tmp_path).reading.sentence_ends == EVERY_SCRIPT
    assert tiny_config(tmp_path, "reward.sentence_ends=ascii").reading.sentence_ends == ASCII_ENDS
    assert tiny_config(tmp_path, "salience.mode=paper").reading.sentence_ends == ASCII_ENDS


@pytest.mark.parametrize(("rule", "told"), [(EVERY_SCRIPT, 1), (ASCII_ENDS, 0), (None, 0)])
def test_paper_mode_on_codes_of_every_script_is_told(tmp_path, caplog, rule, told):
    write_parquet(make_codes(HAND), tmp_path / "codes" / part_name(0))
    codes = Artifact(tmp_path / "codes", "codes-x", {"metrics": {"latents": 4} | ({ENDS: rule} if rule else {})})
    feature_stages.salience(context(tmp_path / "runs"), codes, "paper")
    assert caplog.text.count("--read sentence_ends=ascii") == told


def test_only_what_reads_ends_records_their_rule(tmp_path, reward_dir, sae_dir, pairs_dir):
    dry = StageContext(Place(tmp_path, dry=True), LocalRunner(), reading=ASCII)
    plain = StageContext(Place(tmp_path, dry=True), LocalRunner())
    reward, pairs, sae = (
        Artifact(path, f"{name}-0") for path, name in ((reward_dir, "r"), (pairs_dir, "p"), (sae_dir, "s"))
    )
    assert dry.reading.asked() == {ENDS: ASCII_ENDS}
    assert model_stages.evaluate(dry, reward, pairs).name == model_stages.evaluate(plain, reward, pairs).name
    assert model_stages.codes(dry, pairs, reward, sae).name != model_stages.codes(plain, pairs, reward, sae).name


def test_a_command_with_the_config_of_a_run_in_paper_mode_does_as_that_run(tmp_path):
    from safer_ray.cli.shared import reading_of

    config = write_config(tmp_path)
    assert reading_of(None, False, config).sentence_ends == EVERY_SCRIPT
    config.write_text(config.read_text() + "\nsalience: {mode: paper}\n")
    assert reading_of(None, False, config).sentence_ends == ASCII_ENDS
    assert reading_of(["sentence_ends=every_script"], False, config).sentence_ends == EVERY_SCRIPT
