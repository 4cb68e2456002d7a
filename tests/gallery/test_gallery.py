"""The gallery escapes what it shows, asks for nothing over a network, and works in a real browser."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lathe import gallery, studies
from lathe.gallery import number
from lathe.gallery.theme import CONFIGS, export
from lathe.studies.engine import Run, ledger
from lathe.studies.engine.measuring import measure_study

PAPERS = [slug for slug in studies.slugs() if slug != "toy-paper"]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The gallery of all recorded papers and of the toy study, which has markup in its claims and was measured here."""
    folder = tmp_path_factory.mktemp("gallery")
    studies.__path__.append(str(Path(__file__).parents[1] / "studies" / "own"))
    try:
        toy = studies.load("toy-paper")
        result = ledger.new_result(Run(toy, "smoke"))
        measure_study(
            "toy-paper", "smoke", "cpu", result["seeds"], (), lambda e: e.finding and result["claims"].append(e.finding)
        )
        ledger.write(ledger.result_path(folder / "runs", "toy-paper", "smoke"), result)
        everything = [studies.load(slug) for slug in [*PAPERS, "toy-paper"]]
    finally:
        studies.__path__.pop()
    gallery.build(folder / "site", everything, folder / "runs")
    return folder / "site"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (0.12345, "0.123"),
        (-2.5, "−2.5"),
        (12345.6, "12\u202f346"),
        (1.5e-7, "1.5×10⁻⁷"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, told):
    assert number(value) == told


class Links(HTMLParser):
    """Everything that a page loads."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "srcset") or (key == "href" and tag == "link")]


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        links = Links()
        links.feed(page.read_text())
        assert links.loads
        for target in links.loads:
            assert not re.match(r"(?:[a-z]+:)?//", target), (page, target)
            assert (page.parent / target).exists(), (page, target)
    assert "@import" not in (site / "assets" / "gallery.css").read_text()
    assert "url(" not in (site / "assets" / "gallery.css").read_text()


def test_markup_in_a_claim_shows_as_text(site):
    for name in ("index.html", "papers/toy-paper.html"):
        page = (site / name).read_text()
        assert "<script>alert" not in page and "<b>toy" not in page
        assert "&lt;script&gt;alert" in page


def test_a_page_says_what_was_measured_here_and_what_was_recorded(site):
    assert "measured on your machine" in (site / "papers" / "toy-paper.html").read_text()
    assert "On your machine" in (site / "index.html").read_text()
    for slug in PAPERS:
        assert "as the project recorded it" in (site / "papers" / f"{slug}.html").read_text(), slug


def test_a_figure_exports_as_png_and_svg(tmp_path):
    chart = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": [{"x": 1}]},
        "width": "container",
    }
    chart |= {"mark": "point", "encoding": {"x": {"field": "x", "type": "quantitative"}}}
    export(chart, tmp_path / "C1.png")
    export(chart, tmp_path / "C1.svg")
    assert (tmp_path / "C1.png").read_bytes().startswith(b"\x89PNG")
    assert CONFIGS["light"]["range"]["category"][0] in (tmp_path / "C1.svg").read_text()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    for flag in flags.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def errors(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(f"return {condition}"))


def colour_scheme(browser, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def width(browser, pixels):
    size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


DRAWN = "[...document.querySelectorAll('.chart')].every((chart) => chart.dataset.drawn && chart.querySelector('svg'))"


@pytest.mark.browser
@pytest.mark.parametrize("slug", [*PAPERS, "toy-paper"])
def test_every_figure_of_a_paper_is_drawn_without_a_console_error(site, browser, slug):
    colour_scheme(browser, "light")
    width(browser, 1440)
    browser.get((site / "papers" / f"{slug}.html").as_uri())
    figures = sum(claim.get("figure") is not None for claim in _findings(slug))
    assert browser.execute_script("return document.querySelectorAll('.chart').length") >= figures
    wait(browser, DRAWN)
    assert errors(browser) == []
    colour_scheme(browser, "dark")
    wait(browser, "[...document.querySelectorAll('.chart')].every((chart) => chart.dataset.drawn === 'dark')")
    assert errors(browser) == []
    width(browser, 375)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375


def _findings(slug):
    for scale in ("full", "desk", "smoke"):
        result = ledger.best(slug, scale, None)
        if result:
            return result["claims"]
    return []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_and_nothing_overflows(site, browser, scheme):
    colour_scheme(browser, scheme)
    for pixels in (375, 1440):
        width(browser, pixels)
        browser.get((site / "index.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= pixels
        for selector in ("body", ".card .summary", ".meta", ".totals dt", ".verdicts .told", "a.brand"):
            assert _contrast(browser, selector) >= 4.5, (scheme, selector)


def _contrast(browser, selector):
    """WCAG contrast of an element's text to the nearest opaque background."""
    ink, paper = browser.execute_script(
        """const at = document.querySelector(arguments[0]); let back = at, colour;
        do { colour = getComputedStyle(back).backgroundColor; back = back.parentElement; }
        while (back && /, 0\\)$/.test(colour));
        return [getComputedStyle(at).color, colour];""",
        selector,
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


SHOWN = "[...document.querySelectorAll('.card:not([hidden]) h3')].map((title) => title.textContent)"


@pytest.mark.browser
def test_search_filter_and_keys_find_papers(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    width(browser, 1440)
    browser.get((site / "index.html").as_uri())
    everything = browser.execute_script(f"return {SHOWN}")
    assert len(everything) == len(PAPERS) + 1
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("/")
    box = browser.switch_to.active_element
    assert box.get_attribute("id") == "search"
    box.send_keys("positive mean")  # words of a claim, not of a title
    assert browser.execute_script(f"return {SHOWN}") == ["A <b>toy</b> & its claims"]
    box.send_keys(Keys.ARROW_DOWN)
    assert "toy-paper" in browser.switch_to.active_element.get_attribute("href")
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys("zzzz")
    assert browser.find_element(By.CSS_SELECTOR, ".nothing").is_displayed()
    browser.find_element(By.ID, "clear").click()
    assert browser.execute_script(f"return {SHOWN}") == everything
    browser.find_element(By.CSS_SELECTOR, '.chips [data-area="nn"]').click()
    layers = browser.execute_script(f"return {SHOWN}")
    assert 0 < len(layers) < len(everything)
    browser.refresh()  # the filter is kept in the address
    assert browser.execute_script(f"return {SHOWN}") == layers
    browser.find_element(By.CSS_SELECTOR, ".card:not([hidden]) a").send_keys(Keys.ENTER)
    wait(browser, "location.pathname.includes('/papers/')")
    browser.find_element(By.TAG_NAME, "body").send_keys("j")
    assert browser.switch_to.active_element.text == "C1"
    assert errors(browser) == []


@pytest.mark.browser
def test_the_theme_button_switches_and_is_remembered(site, browser):
    from selenium.webdriver.common.by import By

    colour_scheme(browser, "light")
    browser.get((site / "index.html").as_uri())
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element(By.ID, "theme").click()
    after = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert after != before
    browser.refresh()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == after
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == before


@pytest.mark.browser
def test_the_browser_asks_only_for_files_of_the_site(site, browser):
    import json

    browser.get_log("performance")
    browser.get((site / "papers" / "toy-paper.html").as_uri())
    wait(browser, DRAWN)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
