"""The page of all config keys is what the config says."""

import pytest

from safer_ray.config.values import Frozen
from scripts import config_page


def test_the_page_is_what_the_config_says():
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.Page().text()


KINDS = [kind for kind in config_page.sections().values() if kind.__module__.startswith("safer_ray.config.")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_says_what_it_means(kind):
    assert [key for key in kind.model_fields if not config_page.field_docstrings(kind).get(key)] == []


def test_a_key_of_a_section_is_told_with_its_value_default_and_meaning():
    class Made(Frozen):
        """A section."""

        rows: int = 3
        """How many | are read. Default: as many as there are."""

    page = config_page.Page()
    page.kinds |= {"Made": Made}
    last = page.table("Made", Made.model_json_schema()).splitlines()[-1]
    assert last == "| `rows` | whole number | as many as there are | How many \\| are read. |"
