"""Artifacts and the recipes that they are made by: recipes take artifacts, not names, and hand on what these carry."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safer_ray.errors import UserError
from safer_ray.schema import to_json
from safer_ray.storage.marks import MANIFEST, NOTHING, Marks, together

NAMED = re.compile(r"[a-z_]+-[0-9a-f]{12}(?![^/ ])")  # an artifact, or a file of one


# Of what a manifest says, by key.
KINDS: dict[str, type] = {"stage": str, "name": str, "version": int, "red_team": bool, "licence": list}
KINDS |= dict.fromkeys(("config", "inputs", "packages", "rows", "metrics"), dict)


@dataclass(frozen=True)
class Artifact:
    """A complete artifact, or a foreign directory or file used as one; `manifest` then says what it carries at most."""

    path: Path
    name: str
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.get("metrics", {})

    @property
    def red_team(self) -> bool:
        return bool(self.manifest.get("red_team"))

    @property
    def licence(self) -> list[str]:
        return self.manifest.get("licence", [])

    @property
    def marks(self) -> Marks:
        """Return what it hands on to all that is made of it."""
        return Marks(tuple(self.licence), self.red_team)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest in a folder says.

    Raises:
        UserError: it is none of ours, or damaged.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"corrupt artifact: {path} is empty or torn; put it back from a copy, or move {folder} away and run the "
            "stage again that made it"
        ) from None
    is_ours = isinstance(tree, dict) and tree.keys() >= {"stage", "name"}
    if not is_ours or not all(isinstance(tree[key], kind) for key, kind in KINDS.items() if key in tree):
        raise UserError(
            f"{path} is no manifest of ours: {folder} is no artifact; pass a folder that a stage wrote, or move it away"
        )
    return dict(tree)


@dataclass(frozen=True)
class Input:
    """An input that a recipe names otherwise than as one artifact: a file of one, several in a row, or what is no
    artifact; and the artifacts that it is `of`, which hand on what they carry; `paths` say where it lies, and name
    nothing."""

    name: str
    of: tuple[Artifact, ...] = ()
    paths: tuple[Path, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.of and NAMED.match(self.name):
            raise TypeError(f"{self.name!r} names an artifact: give the artifact, which hands on licence and mark")


@dataclass(frozen=True)
class Recipe:
    """The recipe of an artifact: equal recipes give equal artifacts. Hardware, paths and worker counts never enter.

    What comes in, by role, comes as artifacts, so that licences and the red-team mark are handed on here and nowhere
    else. Those `beside` are read too, but the others' names imply them.
    """

    stage: str
    version: int
    config: dict[str, Any]
    inputs: Mapping[str, Artifact | Input]
    beside: tuple[Artifact, ...] = ()

    def __post_init__(self) -> None:
        if wrong := [role for role, given in self.inputs.items() if not isinstance(given, Artifact | Input)]:
            raise TypeError(f"{self.stage}: {wrong[0]} is {self.inputs[wrong[0]]!r}, wanted an Artifact or an Input")

    @property
    def name(self) -> str:
        text = to_json([self.stage, self.version, self.config, self.names])
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def names(self) -> dict[str, str]:
        """Return for each role the name of an artifact, or what else names its input."""
        return {role: given.name for role, given in self.inputs.items()}

    @property
    def inherited(self) -> Marks:
        """Return what all inputs hand on."""
        return together(*(artifact.marks for artifacts in self._by_role().values() for artifact in artifacts))

    @property
    def folders(self) -> list[Path]:
        """Return where the artifacts lie that it reads."""
        return [artifact.path for artifacts in self._by_role().values() for artifact in artifacts]

    @property
    def paths(self) -> list[Path]:
        """Return where all lies that it reads."""
        return [*self.folders, *(path for i in self.inputs.values() if isinstance(i, Input) for path in i.paths)]

    @property
    def red_team_from(self) -> list[str]:
        """The roles of the inputs that carry the red-team mark."""
        return [role for role, artifacts in self._by_role().items() if any(a.red_team for a in artifacts)]

    def _by_role(self) -> dict[str, tuple[Artifact, ...]]:
        given = {role: (i,) if isinstance(i, Artifact) else i.of for role, i in self.inputs.items()}
        return given | ({"beside": self.beside} if self.beside else {})


@dataclass(frozen=True)
class Result:
    """The result of a stage's build, about what it wrote; its `own` marks are those that no input of its recipe
    carries."""

    rows: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    own: Marks = NOTHING
    wall_seconds: float | None = None  # where several were built together; else as long as the build took
