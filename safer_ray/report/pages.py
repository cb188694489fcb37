"""Render HTML pages: templates of this package, all text escaped, nothing undefined."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def page(template: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """A template of `templates/` with its filters."""
    environment = Environment(
        loader=PackageLoader("safer_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template)
