"""The page of layouts is what the registry says."""

from pathlib import Path

from safer_ray.formats.registry import FORMATS
from scripts import layouts_page

NAMED = {  # in the README, by what people call them
    "TRL": ("trl_explicit", "trl_implicit"),
    "hh-rlhf": ("hh_rlhf",),
    "PKU-SafeRLHF": ("pku_saferlhf",),
    "UltraFeedback": ("ultrafeedback", "ultrafeedback_raw"),
    "HelpSteer 2 and 3": ("helpsteer2", "helpsteer3"),
    "Skywork": ("skywork",),
    "Nectar": ("nectar",),
    "Chatbot Arena": ("arena", "arena_conversations"),
    "SHP": ("shp",),
    "ShareGPT": ("sharegpt",),
    "Alpaca": ("alpaca",),
    "distilabel": ("distilabel",),
    "KTO": ("kto",),
    "RewardBench": ("rewardbench", "rewardbench2"),
}


def test_the_page_is_what_the_registry_says():
    assert layouts_page.PAGE.read_text(encoding="utf-8") == layouts_page.text()


def test_the_readme_names_layouts_that_there_are():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMED if name not in readme] == []
    assert {format for formats in NAMED.values() for format in formats} <= FORMATS.keys()
