"""A browser without a window, and the page on a real server of this process with the auditor of the tiny run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_run import finished

from browser.driving import ROOT, ROWS, WIDE, Browser, listening, started, texts_of
from safer_ray.service.http import create_api
from safer_ray.service.render import examples
from safer_ray.service.service import LocalService

INSTALLED = ROOT / "build/browser"


@pytest.fixture(scope="session")
def axe() -> str:
    """The script that finds what shuts people out."""
    _install()
    return (INSTALLED / "axe_playwright_python/axe.min.js").read_text(encoding="utf-8")


def _install() -> None:
    """The browser and what comes with it; tests skip where they cannot be installed."""
    if (INSTALLED / "ready").exists():
        return
    made = subprocess.run(
        ["scripts/chromium.sh", INSTALLED],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"the browser of the tests cannot be installed: {made.stderr[-300:]}")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser, started once."""
    _install()
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> LocalService:
    """The auditor of the tiny run, in this process."""
    return LocalService(finished(tmp_path_factory.getbasetemp()).artifacts["auditor"].path)


@pytest.fixture(scope="session")
def site(service: LocalService) -> Iterator[str]:
    with listening(create_api(service)) as base:
        yield base


@pytest.fixture
def browser(chromium: Browser, site: str) -> Iterator[Browser]:
    """A fresh page; at the end nothing outside was asked for, and nothing was complained of."""
    chromium.base = site
    chromium.scripts(True)
    chromium.size(*WIDE)
    chromium.look()
    chromium.driver.get("about:blank")
    chromium.requests(), chromium.complaints()
    yield chromium
    windows = chromium.driver.window_handles
    for extra in windows[1:]:
        chromium.driver.switch_to.window(extra)
        chromium.driver.close()
    chromium.driver.switch_to.window(windows[0])
    outside = [u for u in chromium.requests() if not u.startswith((chromium.base, "about:", "data:", "blob:" + site))]
    assert outside == []
    assert chromium.complaints() == []


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """Good rows, and three that cannot be scored."""
    rows = [
        json.dumps({"id": f"row-{i}", "note": i} | texts_of(examples()[i % 4]) | {"prompt": f"Number {i}?"})
        for i in range(ROWS)
    ]
    rows[4], rows[9], rows[12] = (
        "{broken",
        '{"prompt": "a", "chosen": "b"}',
        '{"prompt":"a","chosen":"b","rejected":"b"}',
    )
    path = tmp_path / "my pairs.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
