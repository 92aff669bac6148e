"""The report in a headless Chromium: it draws, reads out, filters, fits a phone, is legible in light and dark, asks the
network for nothing, and whatever a model wrote stays text.

Without a Chromium these tests are skipped; `make test` installs one where it can. Pictures are left in the folder that
`GRPO_REPORT_PICTURES` names, where it is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.report.page import write_report
from tests.helpers.browser import Browser, installed, started
from tests.helpers.report_run import HOSTILE, run_config, write_episodes, write_run

PROGRAM = installed()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on this machine: apt-get install chromium-headless-shell"
)
PHONE = {"width": 390, "height": 844, "touch": True}
LOOKS = {"light": {}, "dark": {"dark": True}, "phone": PHONE, "phone dark": {**PHONE, "dark": True}}

# Contrast of every visible text with what is behind it, as WCAG 2.2 defines it: [ratio, text] of those below 4.5.
CONTRAST = """(() => {
  const numbers = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !node.getClientRects().length || node.closest("script, style, noscript, option")) continue;
    const style = getComputedStyle(node);
    const ink = numbers(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([Math.round(ratio * 100) / 100, text.slice(0, 40)]);
  }
  return bad;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with started(PROGRAM, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "mine")


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.open(run / "report.html")
    return browser


def shown(browser: Browser, selector: str) -> list[str]:
    """Texts of the visible elements that fit."""
    return browser.run(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length).map(e => e.textContent)"
    )


def fill(browser: Browser, name: str, value: str) -> None:
    """Set a field of the filter as a person would, by an input event."""
    field = f"document.getElementById('filter').elements[{name!r}]"
    browser.run(f"({field}.value = {value!r}, document.getElementById('filter').dispatchEvent(new Event('input')), 1)")


def choose(browser: Browser, view: str) -> None:
    browser.run(f"(document.querySelector('input[value={view}]').click(), 1)")


# Looks


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_is_legible_fits_its_width_and_is_quiet(browser: Browser, run: Path, look: str) -> None:
    options: dict[str, Any] = LOOKS[look]
    browser.open(run / "report.html", **options)
    # What is folded away is looked at too.
    browser.run("(document.querySelectorAll('details').forEach(d => { d.open = true; }), 1)")
    browser.settle()
    width = browser.run("document.documentElement.scrollWidth")
    assert width <= options.get("width", 1280), "the page scrolls sideways"
    assert browser.run(CONTRAST) == []
    assert browser.complaints() == []
    assert browser.requests() == [(run / "report.html").as_uri()]
    if folder := os.environ.get("GRPO_REPORT_PICTURES"):
        browser.picture(Path(folder) / f"report-{look.replace(' ', '-')}.png")


@pytest.mark.parametrize("look", LOOKS)
def test_alarms_are_legible_and_the_navigation_needs_no_scroll_bar(browser: Browser, tmp_path: Path, look: str) -> None:
    """With every section that a report can have; on a phone the navigation is a line that is drawn aside."""
    options: dict[str, Any] = LOOKS[look]
    more = {"frac_reward_zero_std": 1.0, "clipped_ratio": 0.9, "mismatch_kl": 0.05, "other_figure": 1.0}
    folder = write_run(tmp_path / "mine", **more, adapter_survival=0.1)
    browser.open(folder / "report.html", **options)
    titles = ["Cut completions", "Groups without variance", "Adapter lost to rounding", "Mismatch high"]
    assert shown(browser, "#alarms b") == sorted(titles, key=titles.index)
    assert browser.run(CONTRAST) == []
    assert browser.run("document.documentElement.scrollWidth") <= options.get("width", 1280)
    links = shown(browser, "nav a")
    assert links[0] == "Alarms" and {"Held out", "Agreement", "More", "Samples", "Settings"} <= set(links)
    if "width" not in options:
        fits = "(n => n.scrollWidth <= n.clientWidth && n.clientHeight < 50)(document.querySelector('nav'))"
        assert browser.run(fits)


def test_a_picture_of_the_page_shows_its_curves_in_colour(page: Browser, tmp_path: Path) -> None:
    from PIL import Image

    page.picture(tmp_path / "page.png", whole=False)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1280, 900)
        blue = sum(
            1 for red, _, blue in picture.convert("RGB").resize((320, 225)).get_flattened_data() if blue > red + 80
        )
    assert blue > 50, "no curve in the picture"


def test_dark_and_light_differ(browser: Browser, run: Path) -> None:
    def background() -> str:
        return browser.run("getComputedStyle(document.body).backgroundColor")

    browser.open(run / "report.html")
    light = background()
    browser.open(run / "report.html", dark=True)
    assert background() != light


# Charts


def test_charts_have_points_axes_and_units(page: Browser) -> None:
    drawn = page.run(
        """[...document.querySelectorAll('.chart')].filter(c => c.getClientRects().length).map(c => ({
             title: c.querySelector('h3').textContent,
             shapes: c.querySelectorAll('.curve, .area, .dot').length,
             points: Math.max(...[...c.querySelectorAll('.curve, .area')]
               .map(p => p.getAttribute('d').split('L').length), 0),
             texts: [...c.querySelectorAll('svg text')].map(t => t.textContent),
           }))"""
    )
    assert len(drawn) > 15
    for chart in drawn:
        assert chart["shapes"] and chart["points"] >= (3 if chart["title"] == "Accuracy" else 40), chart
        assert "step" in chart["texts"] and sum(text[0].isdigit() for text in chart["texts"]) >= 4, chart
    units = {chart["title"]: chart["texts"] for chart in drawn}
    assert "tokens" in units["Completion length"] and "GiB" in units["Peak memory"]
    assert "seconds" in units["Time of a step"] and "% of questions" in units["Accuracy"]


def test_a_curve_is_where_its_values_are(page: Browser) -> None:
    """The learning rate falls in a straight line from the top left to zero at the bottom right."""
    path = page.run(
        "[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent === 'Learning rate')"
        ".querySelector('.curve').getAttribute('d')"
    )
    points = [tuple(map(float, pair.split())) for pair in path.lstrip("M").split("L")]
    assert len(points) == 40
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert x1 > x0 and y1 > y0 and y1 == pytest.approx(190 - 34)
    for place, (x, y) in enumerate(points):
        assert x == pytest.approx(x0 + place * (x1 - x0) / 39, abs=0.2)
        assert y == pytest.approx(y0 + place * (y1 - y0) / 39, abs=0.2)


def test_hovering_reads_the_nearest_step(page: Browser) -> None:
    box = page.run("(r => [r.x, r.y, r.width, r.height])(document.querySelector('.chart svg').getBoundingClientRect())")
    page.move(box[0] + box[2] - 14, box[1] + box[3] / 2)
    (readout,) = shown(page, ".readout")
    assert readout.startswith("step 40") and "mean 2.0" in readout and "standard deviation" in readout
    page.move(5, 5)
    assert shown(page, ".readout") == []


def test_the_keyboard_reaches_and_reads_a_chart(page: Browser) -> None:
    page.run("(document.querySelector('.chart svg').focus(), 1)")
    page.press("Home")
    assert shown(page, ".readout")[0].startswith("step 1mean")
    page.press("ArrowRight")
    assert shown(page, ".readout")[0].startswith("step 2mean")
    page.press("Escape")
    assert shown(page, ".readout") == []
    assert page.run("document.querySelector('.readout').getAttribute('role')") == "status"
    stops = page.run(
        "[...document.querySelectorAll('a, button, input, select, summary, svg[tabindex]')]"
        ".filter(e => e.getClientRects().length && e.tabIndex < 0).length"
    )
    assert stops == 0, "everything that reacts can be reached with Tab"


def test_tab_begins_with_a_way_past_the_navigation(page: Browser) -> None:
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the figures"


def test_a_legend_hides_a_curve(page: Browser) -> None:
    count = (
        "[...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent === 'Completion length')"
    )
    assert page.run(f"{count}.querySelectorAll('.curve').length") == 2
    page.run(f"({count}.querySelector('.legend button').click(), 1)")
    assert page.run(f"{count}.querySelectorAll('.curve').length") == 1
    assert page.run(f"{count}.querySelector('.legend button').getAttribute('aria-pressed')") == "false"


# Completions


def test_the_views_show_the_best_the_worst_and_the_most_improved(page: Browser) -> None:
    first = "document.querySelector('.card')"
    assert shown(page, ".card h3")[0].startswith("held out") or "→" in shown(page, ".card h3")[0]
    assert "+1.46" in shown(page, ".card h3")[0] and page.run(f"{first}.querySelectorAll('.sample').length") == 2
    choose(page, "best")
    assert page.run(f"{first}.querySelector('.scores b').textContent") == "3"
    choose(page, "worst")
    assert page.run(f"{first}.querySelector('.scores b').textContent") == "0"
    choose(page, "groups")
    assert page.run(f"{first}.querySelectorAll('.sample').length") == 4
    names = page.run(
        f"[...{first}.querySelectorAll('.sample')[0].querySelectorAll('.scores li')].map(e => e.innerText)"
    )
    assert [name.split("\n")[0] for name in names] == ["reward", "numeric_answer", "brevity"]


def test_completions_are_filtered_by_step_origin_and_text(page: Browser) -> None:
    choose(page, "groups")
    everything = page.run("document.getElementById('count').textContent")
    fill(page, "step", "20")
    headings = shown(page, ".card > h3")
    assert headings and all("step 20" in heading for heading in headings)
    fill(page, "kind", "held out")
    assert all(heading.startswith("held out") for heading in shown(page, ".card > h3"))
    fill(page, "step", "")
    fill(page, "kind", "")
    fill(page, "text", "WHAT IS 30 + 2")
    (card,) = shown(page, ".card")
    assert "What is 30 + 2?" in card and shown(page, "mark") == ["What is 30 + 2"]
    fill(page, "text", "nowhere to be found")
    assert shown(page, ".card") == [] and shown(page, "#count") == ["Nothing fits the filter."]
    fill(page, "text", "")
    assert page.run("document.getElementById('count').textContent") == everything


def test_more_is_shown_on_demand(page: Browser) -> None:
    choose(page, "groups")
    assert len(shown(page, ".card")) == 10
    page.run("(document.getElementById('show-more').click(), 1)")
    assert len(shown(page, ".card")) == 18 and shown(page, "#show-more") == []


def test_a_hostile_completion_stays_text(browser: Browser, tmp_path: Path) -> None:
    config = run_config(tmp_path / "hostile", task={"name": f"x.py:{HOSTILE}".replace("\ud800", "")})
    folder = write_run(tmp_path / "hostile", 12, text=HOSTILE, config=config, **{f"m{HOSTILE}": 1.0})
    browser.open(folder / "report.html")
    browser.run("(document.querySelectorAll('details').forEach(d => { d.open = true; }), 1)")
    choose(browser, "groups")
    fill(browser, "text", "window.pwned")
    browser.settle()
    assert browser.run("typeof window.pwned") == "undefined"
    assert browser.complaints() == [] and browser.requests() == [(folder / "report.html").as_uri()]
    text = shown(browser, ".completion")[0]
    assert text.startswith("</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>")
    assert "\\x1b[2J" in text and "\\u202e" in text and "{{ 7 * 7 }} & &amp; needle" in text
    assert browser.run("document.querySelectorAll('#cards img, #cards script, main img').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= 1280


def test_the_policy_stops_what_slips_through(page: Browser) -> None:
    """Were a completion ever inserted as markup, it would neither run nor load anything."""
    page.run(
        "(document.getElementById('cards').innerHTML = '<img src=\"http://127.0.0.1:9/x\" onerror=\"window.pwned=1\">'"
        " + '<iframe src=\"http://127.0.0.1:9/y\"></iframe>', 1)"
    )
    page.run("(() => { const s = document.createElement('script'); s.textContent = 'window.pwned=2'; "
             "document.body.append(s); return 1; })()")  # fmt: skip
    page.settle()
    assert page.run("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


# Running and several runs


def test_a_running_run_offers_to_reload_and_leaves_room_for_its_steps(
    browser: Browser, run: Path, tmp_path: Path
) -> None:
    folder = write_run(
        tmp_path / "live", 10, finished=False, config=run_config(tmp_path / "live", train={"max_steps": 40})
    )
    write_report([folder], folder / "report.html")
    browser.open(folder / "report.html")
    assert "step 10 of 40" in shown(browser, ".state")[0]
    end = browser.run("Math.max(...[...document.querySelector('.chart').querySelectorAll('svg text')]"
                      ".map(t => Number(t.textContent)).filter(Number.isInteger))")  # fmt: skip
    assert end == 40
    browser.run("(document.getElementById('reload').click(), 1)")
    assert browser.run("location.hash") == "#reload" and browser.complaints() == []
    browser.open(run / "report.html")
    assert browser.run("document.getElementById('reload')") is None


@pytest.mark.parametrize("look", ["light", "phone dark"])
def test_a_comparison_draws_every_run(browser: Browser, run: Path, tmp_path: Path, look: str) -> None:
    config = run_config(tmp_path / "other", train={"learning_rate": 3e-4})
    other = write_run(tmp_path / "other", 20, config=config)
    out = tmp_path / "comparison.html"
    write_report([run, other], out)
    browser.open(out, **LOOKS[look])
    assert browser.run("document.querySelector('.chart').querySelectorAll('.curve.trend').length") == 2
    assert browser.run("document.documentElement.scrollWidth") <= LOOKS[look].get("width", 1280)
    assert browser.run(CONTRAST) == [] and browser.complaints() == []
    choose(browser, "best")
    fill(browser, "run", "other")
    assert all("other ·" in heading for heading in shown(browser, ".card > h3")) and shown(browser, ".card > h3")
    if folder := os.environ.get("GRPO_REPORT_PICTURES"):
        browser.picture(Path(folder) / f"comparison-{look.replace(' ', '-')}.png")


# Conversations


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(tmp_path_factory.mktemp("talks") / "mine", turns=20, text="<b>bold</b> needle")


@pytest.mark.parametrize("look", ["light", "phone dark"])
def test_conversations_are_legible_and_fit(browser: Browser, talks: Path, look: str) -> None:
    options: dict[str, Any] = LOOKS[look]
    browser.open(talks / "report.html", **options)
    choose(browser, "groups")
    assert browser.run("document.documentElement.scrollWidth") <= options.get("width", 1280)
    assert browser.run(CONTRAST) == [] and browser.complaints() == []


def test_turns_calls_and_rewards_are_shown_and_what_was_sampled_stands_out(browser: Browser, talks: Path) -> None:
    browser.open(talks / "report.html")
    assert "what the model said is shaded" in shown(browser, "#count")[0]
    assert any(text.startswith("A held-out game") for text in shown(browser, ".question")), "held out: turns as well"
    sides = shown(browser, ".pair .episode")
    assert len(sides) == 2 and all("Turn 0 of step" in side and "… 15 turns left out …" in side for side in sides)
    colour = "(selector) => getComputedStyle(document.querySelector(selector)).background"
    colours = browser.run(f"['.turn.sampled', '.episode .turn:not(.sampled)'].map({colour})")
    assert colours[0] != colours[1]
    assert shown(browser, ".turn.sampled i")[1] == "assistant · reward 0.25" and "look" in shown(browser, ".call")[0]


def test_turns_and_calls_are_searched_and_stay_text(browser: Browser, talks: Path) -> None:
    browser.open(talks / "report.html")
    choose(browser, "groups")
    fill(browser, "text", "bold</b> needle 1")
    assert shown(browser, ".episode mark")[0] == "bold</b> needle 1" and not shown(browser, ".episode b")
    fill(browser, "text", '"why": "<b>bold')
    assert shown(browser, ".call mark")[0] == '"why": "<b>bold'
    fill(browser, "text", "nowhere in it")
    assert shown(browser, "#count") == ["Nothing fits the filter."]
