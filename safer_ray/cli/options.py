"""The kinds of options that commands have: every path, number and text is declared as one, which says what it takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import typer

from safer_ray.config.sae import MOST_LATENTS
from safer_ray.errors import UserError
from safer_ray.storage.locations import a_config, a_model, a_source, anywhere, on_disk

MOST = 2**53  # of a whole number: as many as a JSON number tells apart

Callback = Callable[[typer.CallbackParam, Any], Any]


def _named(parameter: typer.CallbackParam) -> str:
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.name)


def _number(least: float, most: float) -> Callback:
    """Return a check that a number, where one is given, lies in a range; NaN lies in none."""
    wanted = f"{least} or more" if most == MOST else f"a number from {least} to {most}"

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            raise UserError(f"{_named(parameter)} {value}: wanted {wanted}")
        return value

    return check


def _text(parameter: typer.CallbackParam, value: Any) -> Any:
    """Refuse text that is empty, say of a variable that is not set."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str) and not text.strip():
            raise UserError(
                f"{_named(parameter)} is empty, say of a variable that is not set; give it, or leave it out"
            )
    return value


# Of this machine, also in an object store, or what a source may be: a hub's name, too.
path_option = partial(typer.Option, parser=on_disk, metavar="PATH")
path_argument = partial(typer.Argument, parser=on_disk)
config_option = partial(typer.Option, parser=a_config, metavar="PATH|NAME")
config_argument = partial(typer.Argument, parser=a_config)
place_option = partial(typer.Option, parser=anywhere, metavar="PATH|URI")
place_argument = partial(typer.Argument, parser=anywhere)
model_option = partial(typer.Option, parser=a_model, metavar="PATH|hub:NAME|package:NAME")
source_option = partial(typer.Option, parser=a_source, metavar="PATH|URI|hub:NAME")
source_argument = partial(typer.Argument, parser=a_source)

text_option = partial(typer.Option, callback=_text)
text_argument = partial(typer.Argument, callback=_text)

count_option = partial(typer.Option, callback=_number(1, MOST))
whole_option = partial(typer.Option, callback=_number(0, MOST))
latents_option = partial(typer.Option, callback=_number(1, MOST_LATENTS))
share_option = partial(typer.Option, callback=_number(0, 1))
percent_option = partial(typer.Option, callback=_number(0, 100))
days_option = partial(typer.Option, callback=_number(0, 36_500))
jaccard_option = partial(typer.Option, callback=_number(0.5, 1))
