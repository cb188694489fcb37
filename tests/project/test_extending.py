"""The examples of docs/extending.md run as they stand."""

import json
import re
from pathlib import Path

import pytest
import torch

from safer_ray.config.sae import SaeConfig
from safer_ray.config.sae_variants import BatchTopKVariant, JumpReluVariant, TopKVariant
from safer_ray.config.sections import JudgeConfig, PairsConfig, SourceConfig
from safer_ray.detection.detectors import DETECTORS
from safer_ray.features.judge import JUDGES
from safer_ray.formats.registry import FORMATS
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import VERSIONS, StageContext
from safer_ray.sae.formats import load_sae, save_sae
from safer_ray.sae.loss import sae_step
from safer_ray.sae.variants.registry import VARIANTS, new_sae
from safer_ray.storage.artifacts import Place
from safer_ray.strategies import STRATEGIES

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}


@pytest.fixture
def run():
    """Run all examples of a section in one namespace; registries are as before afterwards."""

    def run(section):
        names = {"__name__": "example"}
        for code in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
            exec(compile(code, f"docs/extending.md: {section}", "exec"), names)
        return names

    before = [(registry, dict(registry)) for registry in (FORMATS, STRATEGIES, DETECTORS, VARIANTS, JUDGES, VERSIONS)]
    yield run
    for registry, known in before:
        registry.clear()
        registry.update(known)


def test_every_section_with_examples_is_run_here():
    assert {name for name, text in SECTIONS.items() if "```" in text} == {
        "A preference format",
        "A variant of the autoencoder",
        "A detector, a curation strategy",
        "A judge",
        "A stage",
    }


def test_a_format_is_added_as_the_page_says(run):
    assert run("A preference format")["WEBGPT"].told


def test_a_variant_that_is_added_is_trained_saved_and_read(run, tmp_path):
    sae = run("A variant of the autoencoder")["sae"]
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    sae.initialise(x, 0)
    step = sae_step(sae, x, torch.zeros(32, dtype=torch.bool), 0.0)
    step.loss.backward()
    assert step.loss > step.nmse
    save_sae(sae, tmp_path, model="m", layer=1)
    assert torch.equal(load_sae(tmp_path).encode(x).values, sae.encode(x).values)
    assert "| kind | ReLU under an L1 penalty" in (tmp_path / "README.md").read_text()


def test_a_detector_and_a_strategy_are_added_as_the_page_says(run):
    names = run("A detector, a curation strategy")
    known = type("Known", (), {"chosen": ["HELLO"], "rejected": ["hello"]})
    assert DETECTORS["shouting"](known).tolist() == [5.0]
    assert names["short"] is STRATEGIES["short"]


def test_a_judge_is_added_as_the_page_says(run):
    run("A judge")
    verdicts = JUDGES["strong"](None, None, JudgeConfig())({3: 0.2, 5: -0.01})
    assert verdicts["rating"].to_pylist() == [5, 1]


def test_a_stage_that_is_added_is_made_once_and_carries_marks(run, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}\n')
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner())
    source = SourceConfig(path=str(tmp_path / "pairs.jsonl"), format="canonical", licence="CC BY-NC")
    pairs = model_stages.pairs(ctx, PairsConfig(sources=(source,)))
    lengths = run("A stage")["lengths"]
    made = lengths(ctx, pairs)
    assert json.loads((made.path / "lengths.json").read_text()) == {"mean": 1}
    assert made.manifest["licence"] == ["CC BY-NC"]
    assert lengths(ctx, pairs).path == made.path


def test_every_variant_that_a_config_may_name_is_made_and_known_again(tmp_path):
    kinds = {kind.model_fields["kind"].default: kind() for kind in (TopKVariant, BatchTopKVariant, JumpReluVariant)}
    assert kinds.keys() == VARIANTS.keys()
    for name, variant in kinds.items():
        sae = new_sae(8, SaeConfig(latents=16, k=2, variant=variant))
        assert type(sae) is VARIANTS[name]
        save_sae(sae, tmp_path / name, model="m", layer=1)
        assert type(load_sae(tmp_path / name)) is type(sae)
        assert variant.title in (tmp_path / name / "README.md").read_text()


def test_what_is_registered_is_called_as_its_function_is():
    for registry in (DETECTORS, STRATEGIES):
        assert all(name == function.__name__ for name, function in registry.items())
