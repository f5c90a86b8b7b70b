"""The report in headless Chromium: no error, a hover is answered, nothing is asked of any host."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measurements as made
import pytest

from bptt import report

from .test_page import WHOLE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs Chromium and ChromeDriver (Debian: chromium, chromium-driver)"
    ),
]

HARD = replace(
    WHOLE,
    gates=made.gates(names=("r", "z", "n")),
    spectrum=made.spectrum(0.5, 1.1, 3.0),
    comparison=made.comparison(
        rows=tuple(made.row(f"randomized:mean={20 + i},tail=4", 0.1, 0.01 * i, 1e-3) for i in range(8))
    ),
    records=tuple(r | {"perplexity": 4.3 + 1 / r["step"], "grad_norm": 0.3 + 5 / r["step"]} for r in made.records()),
)
"""What is hard to draw: policies alike in time and error, and curves that change by less than a tick of 1, 2 or 5."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,900",
)
"""Those after the third keep the browser's own background traffic out of the log."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    path: Path = report.write(tmp_path_factory.mktemp("report") / "report.html", HARD)
    browser.get_log("performance")  # what the browser did on its own is none of the page's
    browser.get(path.as_uri())
    drawn = "return [...document.querySelectorAll('.js-plotly-plot')].every(c => c.querySelector('.main-svg'))"
    WebDriverWait(browser, 300).until(lambda driver: driver.execute_script(drawn))
    return browser


def test_every_chart_is_drawn(opened):
    charts = opened.execute_script(
        "const drawn = '.cartesianlayer image, .cartesianlayer path';"
        "return [...document.querySelectorAll('.js-plotly-plot')].map("
        "c => [c.id, c.getBoundingClientRect().width, c.querySelectorAll(drawn).length])"
    )
    assert len({name.split("-")[1] for name, _, _ in charts}) == 11
    for name, width, marks in charts:
        assert width > 250, name
        assert marks > 0, name


WORDS = """
const shown = e => { const b = e.getBoundingClientRect(); return b.width && b.height && e.textContent.trim() };
const kinds = '.xtick text, .ytick text, .xtitle, .ytitle, .y2title, .x2title, .y3title, .y4title, .legendtext, '
  + '.annotation-text, .textpoint text, .cbaxis text, .cbtitle text, .modebar';
return [...document.querySelectorAll('.js-plotly-plot')].map(c => [c.id,
  [...c.querySelectorAll(kinds)].filter(shown).map(e => {
    const b = e.getBoundingClientRect();
    return [e.textContent, b.left, b.top, b.right, b.bottom, c.getBoundingClientRect().right];
  })]);
"""
"""Every text in every chart, with its box."""


@pytest.fixture(scope="module", params=[1280, 390])
def texts(request: pytest.FixtureRequest, opened: Any) -> Iterator[list[Any]]:
    """The texts of every chart on a screen of this width."""
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": request.param < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # Plotly draws again once the page has its new width; then the texts stay where they are.
    before: list[Any] = []

    def settled(driver: Any) -> list[Any] | None:
        now = driver.execute_script(WORDS)
        same, before[:] = now == before, now
        fits = driver.execute_script(
            "return [...document.querySelectorAll('.js-plotly-plot')].every(c => "
            "Math.abs(c.querySelector('.main-svg').getBoundingClientRect().width - c.clientWidth) < 2)"
        )
        return now if same and fits else None

    yield WebDriverWait(opened, 300, poll_frequency=1).until(settled)
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_text_hides_another_or_leaves_its_chart(texts):
    """Every chart of the whole survey, on a desk and on a phone."""
    wrong = []
    for chart, words in texts:
        for i, (text, left, top, right, bottom, edge) in enumerate(words):
            if right > edge + 1:
                wrong.append((chart, text, "leaves"))
            for other, left2, top2, right2, bottom2, _ in words[:i]:
                wide, high = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
                if wide > 1 and high > 2:
                    wrong.append((chart, text, other))
    assert wrong == []


def test_every_axis_has_its_numbers(opened):
    """Two ticks or more on each axis that is meant to have some: how else is a height to be read?"""
    counts = opened.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map(c => [c.id, Object.keys(c._fullLayout)"
        ".filter(k => /^[xy]axis[0-9]*$/.test(k) && c._fullLayout[k].showticklabels !== false)"
        ".map(k => [k, c.querySelectorAll('.' + k.replace('axis', '') + 'tick text').length, "
        "c._fullLayout[k].matches || c._fullLayout[k].anchor])])"
    )
    lonely = [(chart, axis) for chart, axes in counts for axis, ticks, _ in axes if ticks < 2 and axis[0] == "y"]
    assert lonely == []


def test_the_heat_map_answers_a_hover(opened):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    chart = opened.find_element(By.ID, "chart-lag_map")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    area = chart.find_element(By.CSS_SELECTOR, ".nsewdrag")
    right, down = int(area.size["width"] * 0.3), int(area.size["height"] * 0.35)  # from the middle: below the diagonal
    ActionChains(opened).move_to_element_with_offset(area, right, down).perform()
    label = WebDriverWait(opened, 300).until(
        lambda driver: driver.execute_script(
            "const l = arguments[0].querySelector('.hoverlayer .hovertext'); return l && l.textContent", chart
        )
    )
    found = re.search(r"loss at t = (\d+)\s*lag (\d+)\s*norm ([0-9.e+-]+)$", label.replace("−", "-"))
    assert found, label
    t, lag = int(found[1]), int(found[2])
    assert float(found[3]) == pytest.approx(HARD.lag_map.norm[0, t, lag], rel=5e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(opened, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    back, *texts = opened.execute_script(
        "const style = (q, p) => getComputedStyle(document.querySelector(q))[p];"
        "return [style('body', 'backgroundColor'), style('h1', 'color'), style('section p', 'color'),"
        " style('#chart-lags .xtick text', 'fill'), style('#chart-lags .infolayer text', 'fill')]"
    )
    for text in texts:
        assert contrast(text, back) > 4.5
    buttons = opened.execute_script(
        "return [...document.querySelectorAll('.updatemenu-button')].map(b => [b.querySelector('rect'), "
        "b.querySelector('text')].map(e => [getComputedStyle(e).fill, getComputedStyle(e).fillOpacity]))"
    )
    assert len(buttons) == 2
    for (ground, opacity), (text, _) in buttons:
        assert contrast(text, ground if float(opacity) == 1 else back) > 4.5


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_error_and_no_request(opened):
    """Last, so that the log has all of the above in it."""
    assert [entry["message"] for entry in opened.get_log("browser")] == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}, asked
