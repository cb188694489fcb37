"""The page in a real browser, on a real auditor: what people do with it, and what they see."""

import json
import re
from pathlib import Path

import httpx
import pytest

from browser.driving import ROWS, Browser, Keyboard, listening, shown, texts_of
from safer_ray.service.auth import Keys
from safer_ray.service.http import create_api
from safer_ray.service.keys import new_key, parse_keys
from safer_ray.service.problems import Problem
from safer_ray.service.render import examples
from safer_ray.service.service import LocalService

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("browser")]  # a fresh machine installs the browser

SWAPPED = examples()[1]
VOID = "a\u202eb \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"  # reordering, and writing from the right
HOSTILE = {
    "prompt": "</textarea><script>alert('p')</script> <img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %}",
    "chosen": f'"\'><svg onload=alert(2)><a href="javascript:alert(3)">x</a> <style>*{{display:none}}</style> {VOID}.',
    "rejected": "</script><script src=//outside.example/x.js></script> " + "w" * 3000 + ". &lt;b&gt; <b>bold</b> \x07.",
}


# A pair


def test_a_pair_is_scored_as_the_api_scores_it(browser: Browser, site: str):
    browser.open("/")
    browser.all(".examples a")[1].click()
    assert browser.one("#chosen").get_property("value") == SWAPPED.chosen
    browser.score()
    answer = httpx.post(f"{site}/v1/score", json={"pairs": [texts_of(SWAPPED)], "explain": True}).json()
    [scored] = answer["results"]
    tiles = dict(
        zip(
            [e.text for e in browser.all(".tile dt")],
            [e.text.replace("\N{MINUS SIGN}", "-") for e in browser.all(".tile .figure")],
            strict=True,
        )
    )
    assert float(tiles["Score"]) == pytest.approx(scored["score"], abs=6e-4)
    assert float(tiles["Suspicion"]) == pytest.approx(scored["suspicion"], abs=6e-4)
    assert float(tiles["Reward margin"]) == pytest.approx(scored["reward_margin"], abs=6e-3)
    assert tiles["Proposal"] == scored["decision"]
    assert browser.driver.title.startswith("Flagged" if scored["flag"] else "Not flagged")


def test_sentences_are_coloured_and_say_what_they_add(browser: Browser):
    browser.open("/?example=swapped")
    browser.score()
    browser.reveal()
    for side, text in zip(
        (".prompt", ".side:nth-child(1)", ".side:nth-child(2)"), texts_of(SWAPPED).values(), strict=True
    ):
        assert shown(browser, f"{side} .text") == text
    marks = browser.all(".sides mark, .prompt .text mark")
    assert marks
    for mark in marks:
        sign = "+" if mark.get_attribute("class").startswith("p") else "\N{MINUS SIGN}"
        assert mark.get_attribute("title").startswith(sign)
    grounds = {mark.value_of_css_property("background-color") for mark in browser.all(".legend mark")}
    assert len(grounds) == 8
    assert browser.one("svg.plot desc").get_property("textContent")
    browser.screenshot("result")
    browser.look("dark")
    browser.screenshot("result-dark")


def test_a_result_comes_without_a_reload_and_is_told_and_focused(browser: Browser):
    browser.open("/?example=refusal")
    browser.driver.execute_script("window.mine = true")
    browser.score()
    assert browser.driver.execute_script("return window.mine === true")
    assert browser.driver.execute_script("return document.activeElement.id") == "verdict"
    assert browser.text("#said") == browser.text("#verdict")
    browser.one("#swap").click()
    assert browser.one("#chosen").get_property("value") == examples()[0].rejected


def test_a_conversation_shows_turn_by_turn(browser: Browser):
    browser.open("/?example=turns")
    browser.score()
    browser.reveal()
    assert [e.text for e in browser.all(".prompt .role")] == ["user", "assistant", "user"]
    rows = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    browser.one("details.more summary:not(.veil *)")
    browser.fill(row=json.dumps({"prompt": rows, "chosen": "Hi.\n\nYou?", "rejected": "Go."}))
    browser.driver.execute_script("document.querySelector('#row').closest('details').open = true")
    browser.one("#row").find_element("xpath", "ancestor::form//button").click()
    browser.until(lambda: [e.get_property("textContent") for e in browser.all(".prompt .role")] == ["system", "user"])
    assert shown(browser, ".side .text") == "Hi.\n\nYou?"


def test_what_cannot_be_scored_is_told_at_its_field(browser: Browser):
    browser.open("/?example=bread")
    same = browser.one("#chosen").get_property("value")
    browser.fill(rejected=same)
    browser.one("#pair button.primary").click()
    assert browser.text("#rejected-error").startswith("Both responses are the same")
    assert browser.one("#rejected").get_attribute("aria-invalid") == "true"
    assert browser.driver.execute_script("return document.activeElement.id") == "rejected"
    assert browser.one("#chosen").get_property("value") == same
    browser.fill(rejected="x" * 20_001)
    browser.one("#pair button.primary").click()
    browser.until(lambda: "20,001 characters" in browser.text("#rejected-error"))


# Features


def test_a_feature_opens_from_a_result(browser: Browser):
    browser.open("/?example=swapped")
    browser.score()
    link = browser.one(".features a")
    feature = link.text
    link.click()
    browser.until(lambda: browser.driver.current_url.endswith(f"/features/{feature}"))
    assert browser.text("h1").startswith(f"Feature {feature}")
    assert browser.all("svg.plot .bar.chosen, svg.plot .bar.rejected")
    assert browser.all(".contexts mark")
    browser.reveal()
    browser.screenshot("feature")
    browser.one(".crumbs a").click()
    browser.one("table.features")
    browser.reveal()
    browser.screenshot("features")


def test_a_feature_that_is_none_is_told_on_a_page(browser: Browser):
    browser.open("/features/63000")
    assert "no selected feature 63000" in browser.text(".lede")
    browser.open("/nowhere")
    assert browser.text("h1") == "Not Found"


# Files


def column(browser: Browser, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('table.pairs tbody tr')].map((r) => r.cells[arguments[0]].dataset.value)"
    )
    return browser.driver.execute_script(script, number)


def test_a_file_is_scored_sorted_explained_and_downloaded(browser: Browser, upload: Path):
    browser.open("/")
    browser.one("#file").send_keys(str(upload))
    browser.one("#upload button.primary").click()
    browser.one("table.pairs")
    assert re.fullmatch(r"\d+ of 37 pairs flagged", browser.text("h1"))
    suspicion = [float(value) for value in column(browser, 2)]
    assert suspicion == sorted(suspicion, reverse=True)
    reasons = [row.text for row in browser.all("table:not(.pairs) tbody tr")]
    assert [reason.split(" ", 1)[0] for reason in reasons] == ["5", "10", "13"]
    assert [reason.split(" ", 1)[1].split(":")[0] for reason in reasons] == [
        "not JSON",
        "missing column",
        "equal responses",
    ]
    browser.screenshot("upload")

    browser.one("thead th:nth-child(1) button").click()
    browser.one("thead th:nth-child(1) button").click()
    assert column(browser, 0) == sorted(column(browser, 0), key=int)
    assert browser.one("thead th:nth-child(1)").get_attribute("aria-sort") == "ascending"

    browser.one("#download").click()
    path = browser.downloads / "my-pairs.scored.jsonl"
    browser.until(path.exists, "the download")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["safer_ray"]["line"] for row in rows] == list(range(1, ROWS + 1))
    assert (rows[0]["id"], "note" in rows[0], rows[4].keys()) == ("row-0", False, {"safer_ray"})
    assert "leaves out what else the rows have: note." in browser.text("main")
    assert sorted(row["safer_ray"].get("suspicion", -1.0) for row in rows)[3:] == sorted(suspicion)

    line = browser.one(".why button").get_attribute("data-line")
    browser.one(".why button").click()
    browser.until(lambda: len(browser.driver.window_handles) == 2)
    browser.driver.switch_to.window(browser.driver.window_handles[1])
    browser.one("#verdict")
    assert shown(browser, ".prompt .text") == f"Number {int(line) - 1}?"


def test_a_file_that_holds_too_much_or_nothing_is_refused(browser: Browser, tmp_path: Path):
    for content, message in (("{}\n" * 1001, "more than 1,000 rows"), ("\n\n", "is empty")):
        path = tmp_path / "pairs.jsonl"
        path.write_text(content, encoding="utf-8")
        browser.open("/")
        browser.one("#file").send_keys(str(path))
        browser.one("#upload button.primary").click()
        browser.until(lambda said=message: said in browser.text("#file-error"), message)
    path.write_bytes(b" " * (16 * 2**20 + 1))
    browser.open("/")
    browser.one("#file").send_keys(str(path))
    browser.one("#upload button.primary").click()
    browser.until(lambda: "16,777,216 bytes" in browser.text(".lede"))


# Hostile texts


def test_a_hostile_pair_renders_inert(browser: Browser):
    browser.open("/")
    browser.fill(**HOSTILE)
    browser.score()
    browser.reveal()
    said = {"prompt": ".prompt", "chosen": ".side:nth-child(1)", "rejected": ".side:nth-child(2)"}
    for name, where in said.items():
        wanted = HOSTILE[name].replace("\u202e", "[U+202E]").replace("\x07", "\u2407")
        assert re.sub(r"\s+", " ", shown(browser, f"{where} .text")) == re.sub(r"\s+", " ", wanted.strip())
        assert browser.one(f"#{name}").get_property("value") == HOSTILE[name]
    assert not browser.all(
        "main script:not([type='application/json']), main img, main style, main b, main [onload], main [onerror]"
    )
    assert not browser.all("a[href^='javascript']")
    assert browser.overflow() <= 0
    browser.screenshot("hostile")


def test_a_hostile_file_renders_inert(browser: Browser, tmp_path: Path):
    row = {"id": "</script><script>alert(1)</script>" + VOID, "<img src=x onerror=alert(2)>": "</script>"} | HOSTILE
    lines = [
        json.dumps(row),
        json.dumps({"<b>": "</script><script>alert(3)</script>"}),
        '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
    ]
    path = tmp_path / "<img src=x onerror=alert(4)>.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    browser.open("/")
    browser.one("#file").send_keys(str(path))
    browser.one("#upload button.primary").click()
    browser.one("table.pairs")
    assert browser.text("h1").endswith("of 1 pair flagged")
    assert "<img src=x onerror=alert(4)>.jsonl" in browser.text(".lede")
    assert browser.one("table:not(.pairs) tbody td").text.endswith("got the keys <b>")
    assert not browser.all("main script:not([type='application/json']), main img, main b")
    browser.one(".why button").click()
    browser.until(lambda: len(browser.driver.window_handles) == 2)
    browser.driver.switch_to.window(browser.driver.window_handles[1])
    browser.one("#verdict")
    browser.reveal()
    assert "<script>alert('p')</script>" in shown(browser, ".prompt .text")


def test_the_policy_stops_what_would_be_injected(browser: Browser):
    browser.open("/")
    script = """const s = document.createElement('script'); s.textContent = 'window.ran = true';
        document.body.append(s);
        const i = document.createElement('img'); i.src = 'https://outside.example/x.png'; document.body.append(i);
        return window.ran === true;"""
    assert browser.driver.execute_script(script) is False
    broken = browser.until(browser.complaints)
    assert all("Content Security Policy" in complaint for complaint in broken)
    assert len(broken) == 2
    browser.requests()


# When the service is closed, or has no answer


def test_a_closed_service_lets_in_who_has_a_key(browser: Browser, service: LocalService):
    token, line = new_key("ann")
    with listening(create_api(service, keys=Keys(listed=parse_keys(line, "here")))) as browser.base:
        browser.open("/features")
        assert browser.text("h1") == "Sign in"
        browser.screenshot("sign-in")
        browser.one("#key").send_keys("wrong", Keyboard.ENTER)
        assert "not known" in browser.text("#key-error")
        browser.one("#key").send_keys(token, Keyboard.ENTER)
        browser.one("table.features")
        browser.open("/?example=swapped")
        browser.score()
        browser.one("button.link").click()
        browser.until(lambda: browser.text("h1") == "Sign in")
        browser.open("/")
        assert browser.text("h1") == "Sign in"


class Busy(LocalService):
    """Has no room."""

    def __init__(self, of: LocalService, status: int) -> None:
        self.__dict__ |= of.__dict__
        self.status = status

    async def score(self, pairs, explain):
        raise Problem(self.status, "too many requests wait already", {"Retry-After": "3"})


@pytest.mark.parametrize(("status", "title"), [(429, "The service is busy."), (503, "The scorer does not answer.")])
def test_a_service_without_an_answer_says_when_to_come_again(browser, service, status, title):
    with listening(create_api(Busy(service, status))) as browser.base:
        browser.open("/?example=bread")
        browser.one("#pair button.primary").click()
        browser.one(".notice")
        assert browser.text(".notice") == f"{title} Try again in 3 s; what you entered is still here."
        assert browser.one("#prompt").get_property("value") == examples()[3].prompt
        assert httpx.post(f"{browser.base}/", data=texts_of(examples()[3])).headers["retry-after"] == "3"
