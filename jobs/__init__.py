"""Thin entry points for `ray job submit`: each is one command of `safer-ray`, on the cluster unless told otherwise."""

import sys


def start(command: str) -> None:
    """Run `safer-ray COMMAND` with the arguments of this process, `--runner ray` unless they name another."""
    from safer_ray.cli.app import main

    arguments = sys.argv[1:]
    if not any(a == "--runner" or a.startswith("--runner=") for a in arguments):
        arguments = ["--runner", "ray", *arguments]
    sys.argv[1:] = [command, *arguments]
    main()
