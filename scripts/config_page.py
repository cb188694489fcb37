"""Write docs/config.md from the sections in safer_ray/config: `python scripts/config_page.py`.

Types, bounds and defaults come from the JSON schema, meanings from the docstrings of fields, which are read from the
source: pydantic's own `use_attribute_docstrings` would parse it in every process that imports the config.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safer_ray.config.sections import RunConfig
from safer_ray.config.values import Frozen

PAGE = Path(__file__).parents[1] / "docs/config.md"
INTRO = """# Config keys

A run's config is a YAML file of the sections below; `configs/demo.yaml` has most of them. A key that is left out has
its default, an unknown key is an error, and `--set reward.epochs=2` sets one on the command line. `[]` stands for each
entry of a list, `NAME` for a name of yours. Numbers are finite.

This page is written by `python scripts/config_page.py`, from the classes in `safer_ray/config`.
"""
HEAD = "| key | value | default | meaning |\n|---|---|---|---|"
REFERENCE = "#/$defs/"


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstring of each field that has one, its own or inherited."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not issubclass(each, Frozen):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = " ".join(after.value.value.split())
    return found


def sections(kind: type[Frozen] = Frozen) -> dict[str, type[Frozen]]:
    """Return all kinds of sections, by the names that the schema has for them."""
    found = {kind.__name__: kind}
    for each in kind.__subclasses__():
        found |= sections(each)
    return found


def variants(value: dict[str, Any]) -> dict[str, str]:
    """Return the sections among which a value's `kind` chooses, by it, in the order of the union."""
    kinds = {name: kind for kind, name in value.get("discriminator", {}).get("mapping", {}).items()}
    return {kinds[each["$ref"]]: each["$ref"].removeprefix(REFERENCE) for each in value.get("oneOf", ())}


def references(value: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yield each section that a value may hold, with its path in the config."""
    if "$ref" in value:
        yield value["$ref"].removeprefix(REFERENCE), path
    for each in value.get("anyOf", ()):
        yield from references(each, path)
    for kind, name in variants(value).items():
        yield name, f"{path}, kind: {kind}"
    if "items" in value:
        yield from references(value["items"], f"{path}[]")
    if isinstance(value.get("additionalProperties"), dict):
        yield from references(value["additionalProperties"], f"{path}.NAME")


def paths(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Return where each section stands in a config, in the order of the config, the outer one first."""
    found: dict[str, list[str]] = {}

    def walk(section: dict[str, Any], path: str) -> None:
        for key, value in section["properties"].items():
            for name, inner in references(value, f"{path}.{key}".strip(".")):
                found.setdefault(name, []).append(inner)
                walk(schema["$defs"][name], inner)

    walk(schema, "")
    return found


def bounds(value: dict[str, Any]) -> str:
    low, above = value.get("minimum"), value.get("exclusiveMinimum")
    if value["type"] == "integer" and above is not None:
        low, above = above + 1, None
    start = f"above {above}" if above is not None else f"from {low}" if low is not None else ""
    end = f"up to {value['maximum']}" if "maximum" in value else ""
    return ", ".join(filter(None, (start, end))).replace("from 0, up", "from 0").replace("from 1, up", "from 1")


def several(value: str) -> str:
    """Return the words for more than one of a value."""
    return re.sub(r"^(whole )?number\b", r"\1numbers", value)


class Page:
    """The page's parts, by the schema."""

    def __init__(self) -> None:
        self.schema = RunConfig.model_json_schema()
        self.paths = paths(self.schema)
        self.kinds = sections()

    def heading(self, name: str) -> str:
        return ", ".join(f"`{part}`" for path in self.paths[name] for part in path.split(", "))

    def link(self, name: str) -> str:
        anchor = re.sub(r"[^\w\s-]", "", self.heading(name)).strip().lower().replace(" ", "-")
        return f"[`{self.paths[name][0].rpartition(', ')[2]}`](#{anchor})"

    def value(self, value: dict[str, Any]) -> str:
        """Return what a key may be given, in words."""
        if "$ref" in value:
            return self.link(value["$ref"].removeprefix(REFERENCE))
        if choices := value.get("enum", [value["const"]] if "const" in value else []):
            return ", ".join(f"`{choice}`" for choice in choices)
        if among := variants(value):
            return " or ".join(map(self.link, among.values()))
        if either := value.get("anyOf"):
            return " or ".join(self.value(each) for each in either if each.get("type") != "null")
        return self.plain(value)

    def plain(self, value: dict[str, Any]) -> str:
        match value["type"]:
            case "array" if "prefixItems" in value:
                return f"list of {value['minItems']} {several(self.value(value['prefixItems'][0]))}"
            case "array":
                return f"list of {several(self.value(value['items']))}" + (
                    ", at least one" if value.get("minItems") else ""
                )
            case "object":
                return f"names with {self.value(value['additionalProperties'])}"
            case "boolean":
                return "`true`, `false`"
            case "integer" | "number" as kind:
                return f"{'whole number' if kind == 'integer' else 'number'} {bounds(value)}".strip()
        return "path" if value.get("format") == "path" else "text"

    def default(self, key: str, section: dict[str, Any], said: str) -> str:
        """Return the default of a key; the docstring says what a null comes to, where that is something."""
        if key in section.get("required", ()):
            return "required"
        default = section["properties"][key].get("default")
        if said:
            return said.removesuffix(".")
        if default is None or default in ({}, []):
            return "none"
        if isinstance(default, dict):
            kind = default.get("kind")
            return f"`kind: {kind}`" if kind else "its defaults"
        return f"`{default if isinstance(default, str) else json.dumps(default)}`"

    def table(self, name: str, section: dict[str, Any]) -> str:
        meanings = field_docstrings(self.kinds[name])
        lines = [HEAD]
        for key, value in section["properties"].items():
            meaning, _, said = meanings[key].replace("|", "\\|").partition(" Default: ")
            lines.append(f"| `{key}` | {self.value(value)} | {self.default(key, section, said)} | {meaning} |")
        return "\n".join(lines)

    def text(self) -> str:
        parts = [INTRO, self.table("RunConfig", self.schema), ""]
        for name, where in self.paths.items():
            section = self.schema["$defs"][name]
            level = "##" if re.fullmatch(r"\w+", where[0]) else "###"
            about = " ".join(section["description"].split())
            parts += [f"{level} {self.heading(name)}", "", about, "", self.table(name, section), ""]
        return "\n".join(parts)


def main() -> None:
    PAGE.write_text(Page().text(), encoding="utf-8")


if __name__ == "__main__":
    main()
