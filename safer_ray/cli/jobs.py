"""Jobs on a cluster on the command line: submit."""

from pathlib import Path
from typing import Annotated

import typer

from safer_ray.cli.options import (
    path_option,
    text_argument,
    text_option,
)

app = typer.Typer()


@app.command("submit")
def submit_command(
    command: Annotated[list[str] | None, text_argument(help="After --, a command of safer-ray: run CONFIG …")] = None,
    address: Annotated[str | None, text_option(help="The cluster's dashboard, say http://HEAD:8265.")] = None,
    working_dir: Annotated[
        Path, path_option(help="Uploaded for the job, less runs/ and what .gitignore or .rayignore name.")
    ] = Path(),
    env: Annotated[
        list[str] | None,
        text_option(help="KEY=VALUE for the job, may be repeated; whoever may see the job can read it: no secrets."),
    ] = None,
    node_env: Annotated[
        list[str] | None,
        text_option(help="KEY, a variable the nodes have, say a secret; the job ends where it is not set."),
    ] = None,
    job_id: Annotated[str | None, text_option(help="The job's id; a job that is there is followed.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the job has ended.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster; Ctrl-C leaves it running.

    Exit codes: 0 succeeded, 1 failed, 2 wrong use or no cluster, 3 stopped, 4 cluster lost, 130 Ctrl-C.
    """
    from safer_ray.distributed.submit import submit

    submit(
        command or [],
        address=address,
        working_dir=working_dir,
        env=env or [],
        job_id=job_id,
        wait=wait,
        node_env=node_env or [],
    )
