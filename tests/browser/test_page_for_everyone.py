"""The page for everyone: by keyboard, blurred, dark, narrow, read aloud, printed, without JavaScript."""

import json
from pathlib import Path

import httpx
import pytest

from browser.driving import NARROW, ROWS, WIDE, Browser, Keyboard, blurred, texts_of
from safer_ray.service.render import examples

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("browser")]  # a fresh machine installs the browser

SERIOUS = ("serious", "critical")


def test_a_pair_is_scored_and_read_by_keyboard_alone(browser: Browser):
    browser.open("/")
    browser.press(Keyboard.TAB)
    assert browser.driver.execute_script("return document.activeElement.className") == "skip"
    browser.press(Keyboard.ENTER)
    for name, text in texts_of(examples()[3]).items():
        browser.tab_to(f"#{name}")
        browser.press(text)
    browser.tab_to("#pair button.primary")
    browser.press(Keyboard.ENTER)
    browser.one("#verdict")
    browser.tab_to("button.reveal")
    assert blurred(browser) == {True}
    ring = browser.driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    browser.press(Keyboard.ENTER)
    assert browser.driver.switch_to.active_element.text.startswith("Blur text")
    assert blurred(browser) == {True, False}
    browser.tab_to("table.features a")
    browser.press(Keyboard.ENTER)
    browser.until(lambda: "/features/" in browser.driver.current_url)


def test_texts_are_blurred_and_silent_until_they_are_asked_for(browser: Browser):
    browser.open("/?example=swapped")
    browser.score()
    assert blurred(browser) == {True}
    assert {e.get_attribute("aria-hidden") for e in browser.all(".secret")} == {"true"}
    button = browser.one("button.reveal")
    button.send_keys(Keyboard.ENTER)
    shows = [e.get_attribute("aria-hidden") for e in browser.all("[aria-labelledby=texts-title] .secret")]
    assert set(shows) == {"false"}
    button.send_keys(Keyboard.SPACE)
    assert blurred(browser) == {True}
    browser.screenshot("blurred")
    first = browser.one(".side .text").rect
    browser.driver.execute_script("window.scrollTo(0, arguments[0])", first["y"] - 100)
    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mousePressed", "x": first["x"] + 30, "y": 112, "button": "left", "clickCount": 1},
    )
    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mouseReleased", "x": first["x"] + 30, "y": 112, "button": "left", "clickCount": 1},
    )
    assert blurred(browser) == {True, False}


PAGES = ("home", "result", "features", "feature", "upload", "error")


def arrive(browser: Browser, page: str, upload: Path) -> None:
    """Opens a page of this name."""
    browser.open({"home": "/", "features": "/features", "error": "/nowhere"}.get(page, "/?example=swapped"))
    if page in ("result", "feature"):
        browser.score()
    if page == "feature":
        browser.one("table.features a").click()
        browser.one(".contexts")
    if page == "upload":
        browser.one("#file").send_keys(str(upload))
        browser.one("#upload button.primary").click()
        browser.one("table.pairs")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_fits_and_shuts_nobody_out(browser: Browser, axe: str, upload: Path, page: str):
    arrive(browser, page, upload)
    for size, scheme in ((WIDE, "light"), (NARROW, "dark"), (NARROW, "light")):
        browser.size(*size)
        browser.look(scheme)
        assert browser.overflow() <= 0, (size, scheme)
        found = browser.driver.execute_async_script(axe + "; axe.run().then(arguments[arguments.length - 1]);")
        bad = [
            (v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"])
            for v in found["violations"]
            if v["impact"] in SERIOUS
        ]
        assert bad == [], (size, scheme)
        browser.reveal()
    browser.screenshot(f"{page}-narrow")
    browser.look("light", "print")
    assert browser.overflow() <= 0


# Without JavaScript


def test_everything_works_without_javascript(browser: Browser, site: str, upload: Path):
    browser.scripts(False)
    browser.open("/?example=swapped")
    browser.one("#pair button.primary").click()
    browser.one("#verdict")
    box = browser.one(".reveal input")
    assert "blur" in browser.one(".side .secret").value_of_css_property("filter")
    box.send_keys(Keyboard.SPACE)
    assert browser.one(".side .secret").value_of_css_property("filter") == "none"
    browser.screenshot("result-without-javascript")
    with upload.open("rb") as file:
        answer = httpx.post(f"{site}/upload", files={"file": file}, data={"answer": "file"}, timeout=60)
    assert answer.headers["content-disposition"] == 'attachment; filename="my-pairs.scored.jsonl"'
    assert len([json.loads(line) for line in answer.text.splitlines()]) == ROWS
