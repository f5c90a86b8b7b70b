"""The file that a survey becomes: what is in it, and that nothing outside is needed."""

import importlib
import re
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import measurements as made
import numpy as np
import pytest
import torch
from measurements import INF, NAN

import bptt
from bptt import report
from bptt.flow import Survey, conclusion
from bptt.flow._survey import _CONDITIONS
from bptt.report._write import SECTIONS

WHOLE = Survey(
    name='RNN("<b>", 4)',
    lag_map=made.lag_map(layers=2),
    lags=made.lags(0.8, 0.9),
    shares=made.shares(),
    jacobians=made.jacobians(),
    products=made.products(),
    spectrum=made.spectrum(0.95),
    lyapunov=made.lyapunov(),
    cell_path=made.cell_path(),
    gates=made.gates(),
    comparison=made.comparison(),
    records=tuple(made.records()),
)


class Page(HTMLParser):
    """Sections, their words, and everything that points elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self._inside: str | None = None
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "section":
            self._inside = values["id"]
            self.sections[self._inside] = ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._tag = ""
        if tag == "section":
            self._inside = None

    def handle_data(self, data):
        if self._tag == "script":
            self.scripts[-1] += data
        elif self._tag != "style":
            self.words += data
            if self._inside is not None:
                self.sections[self._inside] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = report.write(tmp_path_factory.mktemp("report") / "report.html", WHOLE)
    return Page(path.read_text(encoding="utf-8"))


def test_all_that_a_survey_measures_has_its_section():
    assert set(SECTIONS) == {entry.name for entry in fields(Survey)} - set(_CONDITIONS)
    assert len(WHOLE.measures) == len(SECTIONS)


def test_every_measurement_has_its_section_with_its_conclusion(page):
    assert list(page.sections) == [
        *("lag_map", "lags", "shares", "comparison", "jacobians", "products"),
        *("spectrum", "lyapunov", "cell_path", "gates", "records"),
    ]
    for key, words in page.sections.items():
        measure = getattr(WHOLE, key)
        assert conclusion(measure, 0) in words


def test_the_verdict_stands_on_top(page):
    before = page.words[: page.words.index("By loss")]
    assert WHOLE.verdict.plain in before
    assert before.index(WHOLE.verdict.plain) < before.index("What to change")
    assert WHOLE.name in before, "and the name, escaped"
    for advice in WHOLE.verdict.advice:
        assert advice in before


def test_nothing_is_loaded_from_elsewhere(page):
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert len([script for script in page.scripts if len(script) > 1_000_000]) == 1, "plotly's script, once"
    charts = [script for script in page.scripts if "newPlot(" in script and len(script) < 1_000_000]
    panels = len(WHOLE.gates.names) + len(WHOLE.spectrum.gates) + 2 + 2  # beside the exponents, and the policies
    assert len(charts) == len(page.sections) - 4 + panels
    assert all('"showSendToCloud": false' in script for script in charts)


def test_the_table_holds_the_numbers(page):
    words = page.sections["comparison"]
    for row in WHOLE.comparison.rows:
        assert row.policy in words
    assert "45 %" in words


def test_what_was_not_measured_has_no_section(tmp_path):
    path = report.write(tmp_path / "small.html", Survey("fresh", lags=made.lags(0.8)))
    assert list(Page(path.read_text(encoding="utf-8")).sections) == ["lags"]


ODD = {
    "zero": replace(
        WHOLE, lag_map=made.lag_map(rate=0.0), lags=made.lags_of([0.0, 0.0]), shares=made.shares(bin_edges=(0, 1))
    ),
    "exploding": replace(WHOLE, lag_map=made.lag_map(rate=7.0), lags=made.lags(7.0), products=made.products(30.0, 400)),
    "not finite": replace(
        WHOLE,
        lag_map=replace(made.lag_map(), norm=np.full((1, 40, 40), NAN)),
        lags=made.lags_of([1.0, INF], INF),
        spectrum=made.spectrum(NAN),
        jacobians=replace(made.jacobians(), norm=np.full((60, 4), INF)),
        comparison=made.comparison(rows=(made.row("full", NAN, INF, 1.0),)),
    ),
    "one step": replace(WHOLE, lag_map=made.lag_map(T=1), lags=made.lags_of([1.0]), jacobians=made.jacobians(T=1, B=1)),
    "long": replace(WHOLE, lag_map=made.lag_map(rate=0.999, T=10_000, K=2000, stride=10)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_measurements(name, tmp_path):
    path = report.write(tmp_path / "odd.html", ODD[name])
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.sections) == 11
    assert path.stat().st_size < 12e6


def test_a_survey_of_a_real_layer(tmp_path):
    found = bptt.flow.survey(bptt.nn.GRU(2, 4), torch.randn(12, 2, 2), policies=["full", "chunked:4"])
    page = Page(report.write(str(tmp_path / "gru.html"), found).read_text(encoding="utf-8"))
    assert "gate" in page.sections["spectrum"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.write(path, Survey("fresh", lags=made.lags(0.8)))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^survey must"):
        report.write(tmp_path / "no.html", made.lags(0.8))
    with pytest.raises(ValueError, match=r"^measures must"):
        report.write(tmp_path / "no.html", Survey("nothing"))
    assert not list(tmp_path.iterdir())


def test_plotly_is_an_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("bptt.report", "plotly"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"^bptt.report needs plotly: pip install 'bptt\[report\]'$"):
        importlib.import_module("bptt.report")


def test_the_report_needs_no_matplotlib():
    for file in Path(report.__file__).parent.glob("*.py"):
        assert not re.search(r"(import|from) .*\bplots\b", file.read_text(encoding="utf-8")), file


def test_memory_that_all_policies_take_is_told_once(tmp_path: Path) -> None:
    rows = (made.row("full", 0.0, 0.0, 5e-3, bytes=3 << 20), made.row("chunked:5", 0.4, 0.0, 2e-3, bytes=3 << 20))
    alike = replace(made.comparison(), rows=rows, own="full")
    pages = []
    for number, comparison in enumerate((alike, made.comparison())):
        path = tmp_path / f"{number}.html"
        report.write(path, replace(WHOLE, comparison=comparison))
        pages.append(path.read_text(encoding="utf-8"))
    assert pages[0].count("3 MiB under each") == 1
    assert "memory, MiB" not in pages[0]
    assert "<td>full *</td>" in pages[0]
    assert "<td>5 (4.9 to 5.1)</td>" in pages[0]
    assert "memory, MiB" in pages[1]
    assert "MiB under each" not in pages[1]
