"""The experiment's page is what its results say."""

import re
from pathlib import Path

import pytest

from bench import experiment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told():
    return experiment.document(experiment.results())


def test_the_page_is_what_the_results_say(told):
    assert experiment.DOCUMENT.read_text(encoding="utf-8") == told[0]


def test_every_figure_of_the_page_is_there_and_none_else(told):
    named = set(re.findall(r"\(images/([\w.]+)\)", told[0]))
    assert named == set(told[1]) == {path.name for path in experiment.IMAGES.glob("*.svg")}


def test_no_place_of_the_template_stays_empty(told):
    assert "<!--" not in told[0]


def test_the_configs_that_it_names_are_there(told):
    assert all((ROOT / path).is_file() for path in re.findall(r"configs/[\w.]+\.yaml", told[0]))
