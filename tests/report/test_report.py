"""The report is one inert, self-contained page that copes with whatever a run lacks."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from safer_ray.report import plots
from safer_ray.report import run_report as report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
SECTIONS = (
    "pipeline",
    "refused",
    "reward",
    "autoencoder",
    "features",
    "scores",
    "pairs",
    "sections",
    "reading",
    "licences",
)
REFUSAL = "I can't help with that."
SURE = "Sure, here is how."
SPLICED = {"pairs": 97, "reward_nmse": 0.0312, "accuracy": 0.91, "accuracy_change": -0.021, "sign_flips": 0.041}


class Page(HTMLParser):
    """Tags with their attributes, and which of them are open around each text."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, tuple[str, ...]]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((data, tuple(name for _, classes in self._open for name in classes.split())))

    def around(self, text: str) -> list[tuple[str, ...]]:
        """The classes around each place where a text stands."""
        return [classes for found, classes in self.texts if text in found]


def feature(number: int, sign: int, salience: float) -> report.FeatureCard:
    contexts = (report.Context("Before it. ", f"Context of {number}.", " After it.", 3.5, "chosen", "p1"),)
    return report.FeatureCard(number, salience, sign, 5 if sign else None, f"Reason {number}", 12, 7, contexts)


def place(text: str, start: int = 0, part: str = "response", message: int = 0) -> report.SentencePlace:
    return report.SentencePlace(part, message, start, start + len(text), text)


def pair(pair_id: str, planted: bool | None = None, prompt: str = "How do I get in?") -> report.PairView:
    reasons = (
        report.ReasonView(17, -1, -0.42, "chosen", place(SURE)),
        report.ReasonView(3, 1, -0.11, "rejected", place(REFUSAL)),
    )
    texts = (prompt, f"{SURE} Then\nrepeat.", f"{REFUSAL} It may hurt someone.")
    turns = [((role, text),) for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)]
    return report.PairView(pair_id, "safety", -1.5, 0.998, -0.7, *turns, reasons, planted)


@pytest.fixture
def data() -> report.ReportData:
    rng = np.random.default_rng(0)
    planted = rng.random(400) < 0.1
    return report.ReportData(
        title="What the reward model learned",
        run="demo",
        mode="response",
        rating=5,
        detector="safer",
        facts=(("Judge", "concept probe"),),
        conclusions=("SAFER finds planted swaps.",),
        stages=(report.StageView("pairs", 400, 1.25), report.StageView("reward", 400, 3700.0)),
        quarantine={"chosen equals rejected": 3, "no prompt": 1},
        reward={"validation_accuracy": 0.8125, "train_pairs": 360, "parameters": 4_385_921},
        reward_history=tuple(
            {"step": s, "loss": 1 / s, "validation_accuracy": 1 - 1 / s, "validation_loss": 1.1 / s}
            for s in range(2, 9)
        ),
        sae={"nmse": 0.14, "explained_variance": 0.83, "l0": 15.7, "dead_share": 0.11, "train_vectors": 900},
        sae_history=tuple({"step": s, "nmse": 1 / s, "held_out_nmse": 2 / s, "dead": 0.1} for s in range(1, 9)),
        salience=rng.normal(0, 0.2, 64).clip(-1, 1),
        features=(feature(3, 1, 0.61), feature(17, -1, -0.72), feature(20, 0, 0.3)),
        scores=np.where(planted, -1.0, 1.0) + rng.normal(0, 0.5, 400),
        planted=planted,
        pairs=(pair("p1", True), pair("p2", False)),
        detection=(report.DetectionView("safer", 0.951, 0.7), report.DetectionView("random", 0.5, 0.1)),
        sections=(
            report.SectionView("base", "safety", 600, 0.78, 0.745, 0.811),
            report.SectionView("denoise", "safety", 600, 0.825, 0.792, 0.853),
            report.SectionView("poison", "safety", 600, 0.6, 0.56, 0.64),
        ),
        tests=(
            report.TestView("denoise", "base", "safety", 40, 13, 0.045, 0.02, 0.07, 31, 300, 0.0001, 0.0003),
            report.TestView("poison", "base", "safety", 10, 118, -0.18, -0.24, -0.12, 90, 300, 0.01, 0.02),
        ),
        red_team=("poison",),
        licences=("synthetic corpus: CC0-1.0",),
        sae_density=((3, 40, 12), (-3.0, -2.0, -1.0, 0.0)),
        sae_spliced={"all tokens": SPLICED},
    )


def bare(data: report.ReportData) -> report.ReportData:
    """A run that left nothing but its name."""
    none = np.zeros(0)
    return report.ReportData(
        data.title,
        data.run,
        data.mode,
        data.rating,
        data.detector,
        (),
        (),
        (),
        {},
        {},
        (),
        {},
        (),
        none,
        (),
        none,
        None,
        (),
    )


def test_every_section_is_present_and_linked_from_the_contents(data: report.ReportData) -> None:
    page = Page(report.render_report(data))
    ids = {attributes.get("id") for _, attributes in page.tags}
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert ids >= {*SECTIONS, "overview"}
    assert links >= {f"#{name}" for name in SECTIONS}
    assert {link.removeprefix("#") for link in links if link} <= ids


def test_ids_are_unique(data: report.ReportData) -> None:
    ids = [attributes["id"] for _, attributes in Page(report.render_report(data)).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_run_are_told(data: report.ReportData) -> None:
    html = report.render_report(data)
    for told in ("SAFER finds planted swaps.", "81.2%", "4.39 M", "1 h 1 min", "chosen equals rejected", "0.951"):
        assert told in html
    for told in ("78.0%", "85.3%", "clearly better", "worse", "Red-team exercise", "2507.00665", "CC0-1.0"):
        assert told in html


def test_what_reconstructions_cost_the_reward_model_is_a_table(data: report.ReportData) -> None:
    html = report.render_report(data)
    for told in ("all tokens", "0.0312", "91.0%", "4.1%", plots.MINUS + "2.1", "40 latents fire on 0.01 to 0.1"):
        assert told in html
    assert "Changed sign" not in report.render_report(replace(data, sae_spliced={}))


def test_hostile_text_is_inert_wherever_it_comes_from(data: report.ReportData) -> None:
    h = HOSTILE
    card = replace(feature(3, 1, 0.6), reason=h, contexts=(report.Context(h, h, h, 1.0, "chosen", h),))
    reason = report.ReasonView(3, 1, -0.1, "chosen", place(h, 2))
    hostile = replace(
        data,
        title=h, run=h, facts=((h, h),), conclusions=(h,), stages=(report.StageView(h, 1, 1.0),),
        quarantine={h: 1}, reward={h: 1.5}, sae={h: 1.5}, features=(card,),
        pairs=(report.PairView(h, h, 0.0, 1.0, 0.0, ((h, h),), ((h, f"a {h} b"),), ((h, h),), (reason,), True),),
        detection=(report.DetectionView(h, 0.9, 0.5),), sections=(report.SectionView(h, h, 10, 0.5, 0.3, 0.7),),
        tests=(report.TestView(h, h, h, 1, 0, 0.1, -0.1, 0.3, 1, 10, 1.0, 1.0),), red_team=(h,), licences=(h,),
    )  # fmt: skip
    page = Page(report.render_report(hostile))
    clean = Page(report.render_report(data))
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in clean.tags].count("script") == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert len(page.around(HOSTILE)) > 20


def test_nothing_is_requested_from_outside(data: report.ReportData) -> None:
    html = report.render_report(data)
    page = Page(html)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "formaction", "xlink:href", "poster", "data"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not [tag for tag, _ in page.tags if tag in {"link", "iframe", "object", "embed", "base", "form", "img"}]
    assert not re.search(r"https?://|url\(|@import", html)


def test_the_policy_allows_only_the_script_of_the_page(data: report.ReportData) -> None:
    html = report.render_report(data)
    (policy,) = [a["content"] for t, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy


def test_pair_text_and_contexts_are_blurred_until_shown(data: report.ReportData) -> None:
    page = Page(report.render_report(data))
    for text in (SURE, REFUSAL, "How do I get in?", "It may hurt someone.", "Context of 17.", "Before it."):
        assert page.around(text)
        assert all("secret" in classes and "shown" not in classes for classes in page.around(text))
    secrets = [a for _, a in page.tags if "secret" in (a.get("class") or "").split()]
    assert all(attributes.get("aria-hidden") == "true" for attributes in secrets)


def test_every_veil_has_a_button_and_there_is_one_for_all(data: report.ReportData) -> None:
    page = Page(report.render_report(data))
    veils = [a for _, a in page.tags if "veil" in (a.get("class") or "").split()]
    buttons = [a for tag, a in page.tags if tag == "button"]
    assert len(veils) == len(data.pairs) + len(data.features)
    assert sum(a.get("class") == "reveal" for a in buttons) == len(veils)
    assert sum(a.get("id") == "reveal-all" for a in buttons) == 1


def test_sentences_named_in_reasons_are_marked_in_place(data: report.ReportData) -> None:
    html = report.render_report(data)
    assert f'<mark class="unsafe">{SURE}<sup>17</sup></mark> Then\nrepeat.' in html
    assert '<mark class="safe">I can&#39;t help with that.<sup>3</sup></mark> It may hurt' in html
    assert '<a href="#feature-17">feature 17</a> (unsafe) fires on the chosen side' in html
    assert "\N{MINUS SIGN}0.42" in html


def test_only_planted_pairs_carry_the_badge(data: report.ReportData) -> None:
    assert report.render_report(data).count(">planted swap</span>") == 1


def test_highlighting_joins_reasons_and_loses_no_text() -> None:
    first = report.ReasonView(1, -1, -0.5, "chosen", place("One\ntwo.", 4))
    second = report.ReasonView(2, 1, 0.1, "chosen", place("One\ntwo.", 4))
    third = report.ReasonView(3, 1, 0.1, "chosen", None)
    text = "So. One\ntwo. Three."
    segments = report.highlight(text, [first, second, third])
    assert "".join(segment.text for segment in segments) == text
    assert [(s.text, [r.feature for r in s.reasons]) for s in segments if s.reasons] == [("One\ntwo.", [1, 2])]
    assert report.highlight("", [third]) == []


def test_a_sentence_of_the_prompt_is_marked_there() -> None:
    reason = report.ReasonView(9, -1, -0.2, "chosen", place("How do I get in?", part="prompt"))
    marked = report.mark_pair(replace(pair("p1"), reasons=(reason,)))
    assert marked.prompt[0][1] == [report.Segment("How do I get in?", (reason,))]
    for _, segments in marked.chosen + marked.rejected:
        assert not any(segment.reasons for segment in segments)


def test_a_sentence_that_stands_twice_is_marked_where_it_was_read() -> None:
    twice = (("assistant", "No. Yes. No."),)
    reason = report.ReasonView(9, -1, -0.2, "chosen", place("No.", 9))
    marked = report.mark_pair(replace(pair("p1"), chosen=twice, reasons=(reason,)))
    assert marked.chosen[0][1] == [report.Segment("No. Yes. "), report.Segment("No.", (reason,))]


def test_a_clipped_text_without_spaces_keeps_its_characters(data: report.ReportData) -> None:
    long = "\u4f60" * 500
    card = replace(feature(3, 1, 0.6), contexts=(report.Context(long, "x.", long, 1.0, "chosen", "p"),))
    html = report.render_report(replace(data, features=(card,)))
    assert "\u2026" + 90 * "\u4f60" in html
    assert 70 * "\u4f60" + "\u2026" in html


def test_a_run_that_left_nothing_still_renders_every_section(data: report.ReportData) -> None:
    page = Page(report.render_report(bare(data)))
    assert {attributes.get("id") for _, attributes in page.tags} >= set(SECTIONS)
    assert not [a for _, a in page.tags if a.get("id") == "reveal-all"]


@pytest.mark.parametrize(
    "missing",
    [
        {"detection": (), "planted": None},
        {"sections": (), "tests": ()},
        {"tests": ()},
        {"features": ()},
        {"pairs": ()},
        {"reward_history": (), "sae_history": ()},
        {"red_team": ()},
        {"scores": np.array([0.5]), "planted": np.array([False])},
        {"scores": np.full(5, np.nan), "planted": None},
        {"salience": np.zeros(64)},
        {"reward": {"validation_accuracy": math.nan, "validation_loss": math.inf}},
    ],
    ids="-".join,
)
def test_it_renders_without(data: report.ReportData, missing: dict[str, object]) -> None:
    html = report.render_report(replace(data, **missing))  # type: ignore[arg-type]
    assert {attributes.get("id") for _, attributes in Page(html).tags} >= set(SECTIONS)
    assert not re.search(
        r"\b(nan|None|inf|undefined)\b", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    )


def test_the_same_data_gives_the_same_page(data: report.ReportData) -> None:
    assert report.render_report(data) == report.render_report(data)


@pytest.mark.parametrize(
    ("gained", "lost", "p_holm", "words"),
    [
        (10, 8, 0.8, "no clear difference"),
        (30, 10, 0.002, "better"),
        (10, 30, 0.002, "worse"),
        (5, 90, 1e-9, "clearly worse"),
    ],
)
def test_significance_is_said_in_words_by_the_p_of_all_tests_together(
    gained: int, lost: int, p_holm: float, words: str
) -> None:
    p = p_holm / 10
    test = report.TestView("new", "base", "safety", gained, lost, 0.1, 0.0, 0.2, gained + lost, 200, p, p_holm)
    assert report.verdict_in_words(test) == words


def test_a_test_is_told_by_prompts_with_its_interval_and_both_p(data: report.ReportData) -> None:
    html = report.render_report(data)
    row = html[html.index("<td>denoise</td><td>base</td>") :].split("</tr>")[0]
    for told in ("+4.5 [+2.0, +7.0]", "31 of 300", "&lt; 0.001", "clearly better"):
        assert told in row
    assert row.count("&lt; 0.001") == 2
    assert "adjusted for the 2 tests of this table" in html
    assert "exact, by all choices of signs, for any number of prompts" in html


def test_plots_are_well_formed_and_have_a_title_and_a_description() -> None:
    nan = math.nan
    histories: list[list[dict[str, float]]] = [
        [],
        [{"step": 1, "loss": 0.5}],
        [{"loss": nan}, {"step": 3, "loss": 2.0}],
    ]
    drawn = [svg for history in histories for svg in plots.reward_curves(history)]
    drawn += [*plots.sae_curves([{"step": 1, "nmse": 0.5, "dead": nan}]), *plots.sae_curves([])]
    drawn += [plots.density_histogram((), ()), plots.density_histogram((0, 3), (-2.0, -1.0, 0.0))]
    drawn += [plots.score_histogram(np.array(v), None) for v in ([], [nan], [1.0], [1.0, 1.0], [0.0, nan, 9.0])]
    drawn += [plots.salience_histogram(np.array(v), {0: 1, 7: -1}) for v in ([], [0.0], [nan, 0.4], [1.0, -1.0])]
    drawn += [plots.interval_plot("k", "a<b", [plots.Interval("m&m", 0.5, nan, 1.0), *rows]) for rows in ([], ROWS)]
    drawn += [plots.bar_plot("k", "t", bars) for bars in ([], [plots.Bar("<x>", 1.0), plots.Bar("y", nan)])]
    drawn += [plots.salience_bar(value) for value in (-1.0, 0.0, 2.0, nan)]
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.get("aria-hidden") == "true" or [child.tag for child in root][:2] == ["title", "desc"]
        assert "nan" not in svg


ROWS = [plots.Interval("base", 0.5, 0.4, 0.6, baseline=True), plots.Interval("new", 0.7, 0.6, 0.8, warning=True)]


def test_the_tail_holds_the_lowest_scores_and_counts_planted_ones() -> None:
    scores = np.arange(100.0)
    scores[50] = np.nan
    assert plots.tail_of(scores, scores < 3, share=0.1) == plots.Tail(8.0, 9, 3)
    assert plots.tail_of(scores, None) == plots.Tail(3.0, 4, None)
    assert plots.tail_of(np.array([]), None) is None


def test_ticks_are_round_and_within_bounds() -> None:
    assert plots.ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert plots.ticks(-0.45, 0.45, 5) == [-0.4, -0.2, 0.0, 0.2, 0.4]
    assert plots.ticks(3.0, 3.0) == [3.0]
