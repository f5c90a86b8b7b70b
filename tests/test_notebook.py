"""Measurements in a notebook: short reprs, a picture with its sentence; and the notebook of examples/, run."""

import asyncio
import base64
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import measurements as made
import numpy as np
import pytest
import torch

import bptt
from bptt.flow import Survey, conclusion, survey, verdict

plots = pytest.importorskip("bptt.plots", reason="pictures need the extra plots", exc_type=ImportError)

EXAMPLES = Path(__file__).parent.parent / "examples"
BIG = 400  # of a side: arrays of so many numbers must not be in a repr

MEASURES = {
    "LagMap": made.lag_map(T=BIG),
    "Lags": made.lags(0.9, K=BIG),
    "Shares": made.shares(),
    "Jacobians": made.jacobians(T=BIG),
    "Products": made.products(K=BIG),
    "Spectrum": made.spectrum(0.9),
    "Lyapunov": made.lyapunov(),
    "CellPath": made.cell_path(),
    "Gates": made.gates(),
    "Comparison": made.comparison(),
}
PNG = re.compile(r'<img [^>]*alt="([^"]*)" src="data:image/png;base64,([^"]+)"')


@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_has_a_short_repr_and_its_picture(name):
    measure = MEASURES[name]
    said = repr(measure)
    assert said.startswith(f"{name}(")
    assert len(said.splitlines()) <= 3
    assert len(said) < 400
    assert "array(" not in said
    found = PNG.search(measure._repr_html_())
    assert conclusion(measure).replace("<", "&lt;").replace(">", "&gt;") == found[1]
    assert base64.b64decode(found[2]).startswith(b"\x89PNG")


def test_no_measurement_prints_its_arrays_and_each_has_a_picture():
    from bptt.flow._verdict import TOPICS
    from bptt.flow.shown import Shown
    from bptt.plots._html import DRAWN

    kinds = [kind for kind in vars(bptt.flow).values() if isinstance(kind, type) and is_dataclass(kind)]
    arrays = [kind for kind in kinds if any(re.search("NDArray|Floats|Ints", f.type) for f in fields(kind))]
    assert len(arrays) > 9
    assert [kind for kind in arrays if not issubclass(kind, Shown)] == []
    assert set(TOPICS) - {list, tuple} == set(DRAWN) == {type(measure) for measure in MEASURES.values()}


def test_a_survey_and_its_verdict_say_what_matters():
    torch.manual_seed(0)
    found = survey(bptt.nn.GRU(2, 4), torch.randn(BIG // 10, 3, 2), policies=["full", "chunked:4"], data="noise")
    for said in (repr(found), repr(found.verdict)):
        assert 1 <= len(said.splitlines()) <= 3
        assert found.verdict.headline in said
        assert "array(" not in said
    for html in (found._repr_html_(), found.verdict._repr_html_()):
        assert PNG.search(html)
        assert found.verdict.plain in html
        assert found.verdict.advice[0].replace('"', "&quot;") in html
    assert "<td>noise, random errors" in found._repr_html_()
    assert repr(Survey("nothing")) == "Survey of nothing: nothing measured"
    nothing = verdict(made.lags(0.9999))
    assert "nothing to change" in repr(nothing)
    assert "Nothing to change" in nothing._repr_html_()
    assert len(repr(bptt.flow.record(bptt.nn.GRU(2, 4), torch.randn(BIG, 3, 2))).splitlines()) == 1


def test_a_diagnosis_tells_its_findings():
    layer = bptt.nn.RNN(2, 3)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("nan")
    with bptt.flow.watch(layer, tell=lambda finding: None) as doctor:
        loss = layer(torch.zeros(4, 2, 2))[0].sum()
        loss.backward()
        found = doctor.check(loss)
    assert found.findings
    assert repr(found).startswith(f"Diagnosis: {found.findings[0].message}")
    assert len(repr(found).splitlines()) <= 3
    assert all(finding.message.split(":")[0] in found._repr_html_() for finding in found.findings)


def test_a_figure_shows_itself():
    figure = plots.lag_map(made.lag_map())
    content = figure._repr_png_()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == round(figure.get_figwidth() * figure.dpi)


def test_every_picture_shows_itself():
    for picture in plots.figures(survey(bptt.nn.LSTM(2, 3), torch.randn(12, 2, 2), policies=["full", "chunked:4"])):
        assert picture[1]._repr_png_()
    assert plots.reach()._repr_png_()
    assert plots.graph()._repr_png_()
    assert plots.training(made.records())._repr_png_()


ALONE = """
import sys
sys.modules["matplotlib"] = None
import bptt, torch
found = bptt.flow.survey(bptt.nn.RNN(2, 3), torch.zeros(8, 2, 2), policies=[])
print(found._repr_html_(), found.lags._repr_html_(), repr(found)[:9])
"""


def test_without_matplotlib_the_repr_is_shown():
    run = subprocess.run([sys.executable, "-W", "error", "-c", ALONE], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("None None Survey of", "")


def executed(name, folder):
    """A notebook, run: what each cell showed, by its last line and kind; and all that was printed."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / name, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "it is stored without outputs"
    assert "%matplotlib" not in "".join(cell.source for cell in cells)
    where = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    asyncio.run(client.async_execute())
    shown: dict[str, dict[str, str]] = {}
    for cell in cells:
        kinds = [out.get("data", {}) for out in cell.outputs]
        shown[cell.source.splitlines()[-1]] = {kind: data for found in kinds for kind, data in found.items()}
    return shown, "".join(out.text for cell in cells for out in cell.outputs if out.output_type == "stream")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the notebook's own machinery
def test_the_notebook_makes_a_layer_of_a_cell_that_learns(tmp_path):
    shown, printed = executed("own_cell.ipynb", tmp_path)
    assert "kernel 'interpreter'" in printed
    assert PNG.search(shown["lags"]["text/html"])
    bias = {name: float(value) for name, value in re.findall(r"^(\S+) +off by ([\d.]+)%", printed, re.MULTILINE)}
    assert bias["full"] == 0 < bias["truncated:30"] < bias["truncated:5"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the notebook's own machinery
def test_the_notebook_walks_from_a_layer_to_its_verdict(tmp_path):
    shown, printed = executed("verdict.ipynb", tmp_path)
    for value in ("found", "found.lags", "again.verdict"):
        assert PNG.search(shown[value]["text/html"]), value
    assert base64.b64decode(shown["bptt.plots.cell_path(again.cell_path)"]["image/png"]).startswith(b"\x89PNG")
    assert "Not finite" in shown["diagnosis"]["text/html"]
    assert np.all([len(data["text/plain"].splitlines()) <= 4 for data in shown.values() if "text/plain" in data])
    accuracy = re.search(r"as drawn: (\d+)%   chrono: (\d+)%", printed)
    assert int(accuracy[2]) > 90 > 50 > int(accuracy[1]), "the advice is worth following"
