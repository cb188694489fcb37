"""The page's templates: everything escaped, nothing undefined, control characters made visible."""

from collections.abc import Callable, Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from safer_ray.report import plots
from safer_ray.service import histograms as figures
from safer_ray.service import verdict
from safer_ray.service.highlighting import parted, storable, visible

WEB = Path(__file__).parent / "web"
STATIC = WEB / "static"  # mounted at /static


class Example(NamedTuple):
    """A pair to try; prompts may be Human:/Assistant: transcripts."""

    name: str
    title: str
    note: str
    prompt: str
    chosen: str
    rejected: str


@cache
def examples() -> tuple[Example, ...]:
    """The pairs that the page offers."""
    rows = yaml.safe_load((WEB / "examples.yaml").read_text(encoding="utf-8"))
    return tuple(Example(**row) for row in rows)


def respond(template: str, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any) -> HTMLResponse:
    """A page; what it shows is nobody else's to keep."""
    text = _environment().get_template(template).render(**values)
    return HTMLResponse(text, status, {"Cache-Control": "no-store", **(headers or {})})


def error_page(status: int, detail: str, retry_after_s: float | None = None) -> HTMLResponse:
    """An error as people read it."""
    headers = {} if retry_after_s is None else {"Retry-After": f"{max(1, round(retry_after_s))}"}
    return respond(
        "error.html", status, headers, here="", signed_in=False, title=HTTPStatus(status).phrase, detail=detail
    )


def sign_in_page(failed: bool = False, next_path: str = "/") -> HTMLResponse:
    """The form that asks for a key: POST /sign-in with `key` and `next`."""
    return respond("sign_in.html", 401 if failed else 200, here="", signed_in=False, failed=failed, next_path=next_path)


def _shown(value: object) -> object:
    """Return what templates put out: plain text with its control characters visible, markup as it is."""
    return visible(value) if type(value) is str else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("safer_ray.service", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    filters: dict[str, Callable[..., Any]] = {
        "signed": verdict.signed,
        "fixed": verdict.number_of,
        "percent": verdict.percent,
        "place": verdict.place,
        "number": plots.number,
        "bar": lambda value, reach=1.0: Markup(plots.salience_bar(value / reach if reach else 0.0)),
        "as_typed": lambda text: escape(storable(text)),  # in a field, where nothing stands around it
        "parted": parted,
        "trim_start": str.lstrip,
        "trim_end": str.rstrip,
        "strength": lambda value, strongest: Markup(figures.strength_bar(value, strongest)),
    }
    environment.filters |= filters
    return environment
