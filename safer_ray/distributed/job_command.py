"""A command line of `safer-ray` as a job on a cluster needs it: the ray runner, and results where they last."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from safer_ray.errors import UserError
from safer_ray.storage.locations import a_source, anywhere, shipped_configs

VALUE_OPTIONS = (
    "--runner",
    "--actors",
    "--config",
    "--until",
    "--out",
    "--auditor",
    "--reward",
    "--pairs",
    "--format",
    "--split",
    "--encoding",
    "--flag-quantile",
    "--detector",
    "--max-chars",
    "--max-refused-share",
    "--fragment-rows",
    "--shards",
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
OF_CONFIGS = ("run", "lab", "sweep")  # commands that take a config, whose results lie below its root
FLAGS = ("-v", "--verbose", "--fresh", "--dry-run", "--i-am-red-teaming", "--trust-remote-code")


def complete(args: Sequence[str], working_dir: Path, local: bool) -> list[str]:
    """`args` of `safer-ray` as a job needs them: the ray runner, and results outside the copy that it runs in.

    Raises:
        UserError: no such config, or results would stay on some node of a cluster that is not `local`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--set", action="append", default=[])
    for name in VALUE_OPTIONS:
        parser.add_argument(name)
    for name in FLAGS:
        parser.add_argument(name, action="store_true")
    try:
        given = parser.parse_known_intermixed_args(args)[0]
    except argparse.ArgumentError as error:
        raise UserError(f"{shlex.join(args)}: {error}") from None
    command = given.words[0] if given.words else None
    if command not in (*OF_CONFIGS, "audit", "fit"):
        return list(args)
    runner = [] if given.runner else ["--runner", "ray"]
    if command in OF_CONFIGS:
        root = _root(given.set, given.words[1:2], working_dir)
        kept = _kept(root, working_dir, local, "--set root=DIR")
        return [*args, *runner, *([] if kept == root else ["--set", f"root={kept}"])]
    paths = [("--out", _kept(given.out, working_dir, local, "--out DIR"))] if given.out else []
    for name, path in (("--auditor", given.auditor), ("--pairs", given.pairs), ("--reward", given.reward)):
        if local and path and (working_dir / a_source(path)).exists():  # perhaps where nothing is uploaded from
            paths.append((name, str(working_dir / a_source(path))))
    return [*args, *runner, *(word for pair in paths for word in pair)]


def _kept(path: str, working_dir: Path, local: bool, option: str) -> str:
    """A path of results as it is if absolute or a URI, else the folder here that it means."""
    path = anywhere(path)
    if "://" in path or Path(path).is_absolute():
        return path
    if not local:
        raise UserError(
            f"results would go to {path!r}, a folder that each node of that cluster has for itself; "
            f"give {option} on storage that all nodes see"
        )
    return str(working_dir / path)


def _root(assignments: Sequence[str], config: Sequence[str], working_dir: Path) -> str:
    """A run's root: of the last `--set root=`, else of the config, else the default."""
    roots = [value.removeprefix("root=") for value in assignments if value.startswith("root=")]
    if roots:
        return roots[-1]
    path = working_dir.joinpath(*config)
    if config and not path.exists():
        path = shipped_configs().get(config[0], path)  # which the nodes have, too
    if path.is_relative_to(working_dir) and not path.is_file():
        raise UserError(f"no config at {path}; write run CONFIG, with CONFIG below the --working-dir that is uploaded")
    try:
        return str(yaml.safe_load(path.read_text(encoding="utf-8"))["root"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return "runs"  # not set, or not readable from here: the job tells


def check_names(names: Sequence[str]) -> list[str]:
    """Names of variables of the nodes, each once.

    Raises:
        UserError: one that no variable has; it is not shown, for it may be a secret.
    """
    for number, name in enumerate(names, 1):
        if not NAME.fullmatch(name):
            raise UserError(f"--node-env number {number}: write the name of a variable alone; its value is the nodes'")
    return list(dict.fromkeys(names))


def require(names: Sequence[str], entrypoint: str) -> str:
    """A shell's command line that ends, with the name, where the node it runs on lacks one of these variables."""
    told = "is not set on this node; set it where the nodes start"
    return "".join(f': "${{{name}:?{told}}}" && ' for name in names) + entrypoint


def parse_env(entries: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE entries as a mapping.

    Raises:
        UserError: an entry without a key or `=`, called by its number, for it may be a secret.
    """
    pairs = [entry.partition("=") for entry in entries]
    for number, (key, equals, _) in enumerate(pairs, 1):
        if not key or not equals:
            raise UserError(f"--env number {number}: write it as KEY=VALUE")
    return {key: value for key, _, value in pairs}
