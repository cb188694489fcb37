"""The README and the pages of docs/ name only what is there."""

import re
from pathlib import Path

import pytest
import yaml

from safer_ray.cli.app import app
from safer_ray.config.read import load_config

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, *sorted(path for path in DOCS.glob("*.md") if ".template." not in path.name)]


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request):
    return request.param


@pytest.fixture
def text(page):
    return page.read_text(encoding="utf-8")


def test_the_readme_is_short():
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1800


def test_every_page_is_in_the_sites_contents():
    told = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(page for entry in told["nav"] for page in entry.values()) == [path.name for path in PAGES[1:]]


@pytest.fixture(scope="module")
def commands():
    """Names of all commands with their options."""
    import typer

    known = typer.main.get_command(app).commands
    return {name: {o for p in c.params for o in p.opts} | {"--help"} for name, c in known.items()}


def code_blocks(text):
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text):
    """What follows `safer-ray` in backticks and in code blocks, continued lines joined."""
    inline = re.findall(r"`safer-ray ([^`\n]+)`", text)
    blocks = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return inline + [found.group(1) for line in blocks if (found := re.match(r"(?:\$ |\S*/)?safer-ray (.+)", line))]


def test_the_tree_lists_all_packages_and_only_files_that_exist():
    paths = [
        found.group(1)
        for block in code_blocks((DOCS / "architecture.md").read_text(encoding="utf-8"))
        for line in block.splitlines()
        if (found := re.match(r"((?:[\w.-]+/)+[\w.-]*)(?:\s|$)", line))
    ]
    packages = {
        f"safer_ray/{path.name}/" for path in (REPOSITORY / "safer_ray").iterdir() if (path / "__init__.py").exists()
    }
    assert packages <= set(paths)
    assert [path for path in paths if not (REPOSITORY / path).exists() and not path.startswith("runs/")] == []


def test_paths_in_backticks_exist(text):
    named = re.findall(r"`((?:safer_ray|configs|tests|bench|jobs|scripts)/[\w./-]+)`", text)
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_links_lead_to_files_that_exist(page, text):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_and_their_options_exist(text, commands):
    for line in command_lines(text):
        words = [word for word in line.split("#")[0].split() if word not in ("-v", "--verbose")]
        if not words or words[0] in ("--help", "--version") or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
            continue
        assert words[0] in commands, line
        if "--" in words:  # what follows is a command of its own
            follows = words[words.index("--") + 1 :]
            words = words[: words.index("--")]
            assert {word for word in follows if word.startswith("--")} <= commands[follows[0]], line
        options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert options <= commands[words[0]], line


def test_makefile_targets_named_exist(text):
    made = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= made


def test_configs_named_are_shipped_and_load(text):
    for name in set(re.findall(r"configs/[\w.-]+\.yaml", text)):
        assert load_config(REPOSITORY / name).name


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_named_as_its_file(path):
    assert load_config(path).name == path.stem
