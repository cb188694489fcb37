"""A run's config from YAML and `key=value` assignments, with errors that fit on a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from safer_ray.config.sections import RayConfig, RunConfig
from safer_ray.errors import UserError
from safer_ray.storage.locations import shipped_configs


def explain_validation(error: ValidationError, where: str, known: Sequence[str] = ()) -> UserError:
    """The first problem of a pydantic error as one line, with how many more there are; the `known` keys are named where
    there is one that is not."""
    first, *rest = error.errors()
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        choice = (
            f"choose one of {', '.join(known)}" if known else "check the spelling against that of the config `demo`"
        )
        message = f"unknown key; {choice}"
    elif "input" in first and not isinstance(first["input"], dict | BaseModel):
        message = f"{message} (got {first['input']!r})"
    more = f" (and {len(rest)} more)" if rest else ""
    return UserError(": ".join(filter(None, (where, place, f"{message}{more}"))))


def _set(tree: dict[str, Any], assignment: str, option: str) -> None:
    key, equals, value = assignment.partition("=")
    if not equals:
        raise UserError(f"{option} {assignment!r}: write it as key=value, say epochs=2")
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{option} {key}: {parent!r} is a value, not a section")
        tree = child
    try:
        tree[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # YAML raises ValueError over days that are none
        raise UserError(f"{option} {assignment!r} is not readable YAML: {' '.join(str(error).split())}") from None


def assigned(tree: dict[str, Any], assignments: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """Return the tree with `key=value` assignments laid over it.

    Raises:
        UserError: an assignment that is none, or whose value is no YAML.
    """
    for assignment in assignments or []:
        _set(tree, assignment, option)
    return tree


def _variants(tree: dict[str, Any]) -> list[Any]:
    """All that may poison."""
    curate, sweep = tree.get("curate"), tree.get("sweep")
    grids = sweep.get("grids") if isinstance(sweep, dict) else None
    return [*(curate.values() if isinstance(curate, dict) else ()), *(grids if isinstance(grids, list) else ())]


def load_config(path: Path, assignments: list[str] | None = None, *, red_team: bool = False) -> RunConfig:
    """A run's config from YAML, with `key=value` assignments laid over it; `red_team` allows every poison variant.

    Raises:
        UserError: no such file, no YAML, an unknown key, or values that cannot work together.
    """
    tree = assigned(_tree(path), assignments)
    if red_team:
        for variant in _variants(tree):
            if isinstance(variant, dict) and variant.get("action") == "poison":
                variant["red_team"] = True
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explain_validation(error, str(path)) from None


def load_cluster(path: Path, assignments: list[str] | None = None) -> RayConfig:
    """Return the section `ray` of a run's config, or of a file that holds nothing else, with assignments laid over it.

    Raises:
        UserError: as of `load_config`.
    """
    tree = _tree(path)
    if set(tree) != {"ray"} or not isinstance(tree["ray"], dict):
        return load_config(path, [f"ray.{assignment}" for assignment in assignments or []]).ray
    try:
        return RayConfig.model_validate(assigned(tree["ray"], assignments))
    except ValidationError as error:
        raise explain_validation(error, f"{path}: ray", [*RayConfig.model_fields]) from None


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config at {path}; give a file, or one of {', '.join(shipped_configs())}") from None
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}; pass a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also over days that are none
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, got {type(tree).__name__}")
    return tree
