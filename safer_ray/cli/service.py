"""The scoring service on the command line: serve, and keys for it."""

import time
from typing import Annotated

import typer

from safer_ray.cli.options import (
    count_option,
    days_option,
    text_argument,
)
from safer_ray.cli.shared import ServiceEnded

app = typer.Typer()


@app.command()
def key(
    name: Annotated[str, text_argument(help="Whose key it is, say a team's or a platform's name.")],
    days: Annotated[float | None, days_option(help="It expires after so many days; without this, never.")] = None,
    requests: Annotated[int | None, count_option(help="Requests a minute that it may send.")] = None,
    pairs: Annotated[int | None, count_option(help="Pairs a minute that it may have scored.")] = None,
) -> None:
    """Make a key of the scoring service: its token, shown this once, and the line for the keys file."""
    from safer_ray.service.keys import expiry_in, new_key

    token, line = new_key(name, None if days is None else expiry_in(days, time.time()), requests, pairs)
    typer.echo(f"token  {token}\nline   {line}")


@app.command("serve")
def serve_command(
    words: Annotated[
        list[str] | None,
        text_argument(
            metavar="KEY=VALUE …", help="auditor=DIR, host=127.0.0.1, port=8000, keys=FILE, …: see docs/service.md"
        ),
    ] = None,
) -> None:
    """Answer pairs over HTTP with their scores, on Ray Serve, until Ctrl-C or SIGTERM."""
    from safer_ray.service.main import main as serve

    raise ServiceEnded(serve(words or []))
