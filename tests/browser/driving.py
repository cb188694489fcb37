"""Driving a browser without a window, and serving an application in a thread."""

import base64
import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Keyboard
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build/screenshots"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WIDE, NARROW = (1180, 860), (360, 740)
ROWS = 40  # of the file that is uploaded


def texts_of(example) -> dict[str, str]:
    return {name: getattr(example, name) for name in ("prompt", "chosen", "rejected")}


def shown(browser: "Browser", selector: str) -> str:
    """A text as the page shows it, without the amounts beside its sentences."""
    script = """const copy = document.querySelector(arguments[0]).cloneNode(true);
        copy.querySelectorAll(".amount").forEach((amount) => amount.remove()); return copy.textContent;"""
    return browser.driver.execute_script(script, selector).strip()


def blurred(browser: "Browser") -> set[bool]:
    script = """return [...document.querySelectorAll(".secret")].map((e) => getComputedStyle(e).filter !== "none");"""
    return set(browser.driver.execute_script(script))


@contextlib.contextmanager
def listening(application: Any) -> Iterator[str]:
    """An application on loopback, in a thread of its own."""
    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


class Browser:
    """One tab, driven as a person would drive it, with all that it asks for and complains of."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads
        self.base = ""
        self.told: list[dict[str, Any]] = []

    def open(self, path: str) -> None:
        self.driver.get(self.base + path)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first one that shows up; waits for it."""
        return self.until(lambda: self.all(selector), selector)[0]

    def until(self, found: Callable[[], Any], what: str = "") -> Any:
        waiting = WebDriverWait(self.driver, 20, 0.05, [StaleElementReferenceException])  # a page that comes meanwhile
        return waiting.until(lambda _: found(), what)

    def text(self, selector: str) -> str:
        """What the first one says, read at once, so that a page that comes or goes meanwhile does no harm."""
        script = "const found = document.querySelector(arguments[0]); return found && [found.textContent.trim()];"
        [text] = self.until(lambda: self.driver.execute_script(script, selector), selector)
        return text

    def fill(self, **texts: str) -> None:
        """Sets fields at once; characters that no keyboard has among them."""
        for name, text in texts.items():
            self.driver.execute_script("arguments[0].value = arguments[1]", self.one(f"#{name}"), text)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str, most: int = 60) -> None:
        """Presses Tab until this has the focus."""
        for _ in range(most):
            if self.driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keyboard.TAB)
        raise AssertionError(f"{selector} is not reached by {most} times Tab")

    def score(self) -> None:
        """Sends the form of a pair and waits for its result."""
        self.one("#pair button.primary").click()
        self.one("#verdict")

    def reveal(self) -> None:
        for button in self.all("button.reveal"):
            button.click()

    # What it looks like

    def size(self, width: int, height: int) -> None:
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)

    def look(self, scheme: str = "light", media: str = "screen") -> None:
        scheme_of = {"name": "prefers-color-scheme", "value": scheme}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme_of, still]})

    def overflow(self) -> int:
        """By how much the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def screenshot(self, name: str) -> None:
        """The whole page as a file of `build/screenshots`."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        width = self.driver.execute_script("return window.innerWidth")  # the picture has no scroll bar
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def scripts(self, on: bool) -> None:
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not on})

    # What it asked for and complained of

    def requests(self) -> list[str]:
        """All addresses that were asked for since this was asked last."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and violations of the page's policy; that a form was answered by 4xx or 503 is none."""
        entries = [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        return [e["message"] for e in entries if not re.search(r"responded with a status of (4|503)", e["message"])]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with a profile and downloads in `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    driver = webdriver.Chrome(options=options, service=Driver("/usr/bin/chromedriver"))
    try:
        yield Browser(driver, folder / "downloads")
    finally:
        driver.quit()
