"""The command line: commands in groups, a module each, which load heavy modules inside commands; errors and signals."""

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from safer_ray import __version__
from safer_ray.cli import audit_tools, audits, data, experiments, jobs, runs, saes, service, stages
from safer_ray.cli.shared import ServiceEnded, console, state
from safer_ray.errors import SaferError, explained, one_line

app = typer.Typer(
    name="safer-ray",
    help="Find the preference pairs that teach a reward model the wrong thing (SAFER, arXiv 2507.00665).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


INTERRUPTED = 130  # what typer makes of Ctrl-C
TERMINATED = 143  # as a shell tells SIGTERM; a cluster's driver ends with its number alone


def main() -> None:
    """Run the command line; a SaferError, and what a disk or the memory refuses, becomes one line on stderr and an exit
    code."""
    signal.signal(signal.SIGTERM, _end)
    try:
        app(standalone_mode=True)
    except (SaferError, OSError, MemoryError) as error:
        told = error if isinstance(error, SaferError) else explained(error)
        print(f"safer-ray: {one_line(str(told))}", file=sys.stderr)
        if state["verbose"]:
            raise
        sys.exit(told.exit_code)
    except SystemExit as ended:
        if isinstance(ended, ServiceEnded) or ended.code not in (INTERRUPTED, TERMINATED, signal.SIGTERM):
            raise
        print("safer-ray: interrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(INTERRUPTED if ended.code == INTERRUPTED else TERMINATED)


def _end(*_: object) -> None:
    """SIGTERM as Ctrl-C: locks are given back and what was begun is left as the next run wants it."""
    sys.exit(TERMINATED)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    state["verbose"] = verbose
    level = logging.INFO if verbose else logging.WARNING
    if console.is_terminal:
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    else:
        from safer_ray.pipeline.progress import JsonLog

        logging.basicConfig(level=level, handlers=[JsonLog()])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


for group in (runs, data, stages, audits, audit_tools, saes, experiments, service, jobs):
    app.add_typer(group.app)
