"""Every picture draws what it is given, odd data included, says what to conclude, and has labels with units."""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import measurements as made
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measurements import INF, NAN
from PIL import Image

from bptt import plots
from bptt.plots._html import DRAWN

pytestmark = pytest.mark.slow

PICTURES: dict[str, Callable[[], Figure]] = {
    "lag_map": lambda: plots.lag_map(made.lag_map()),
    "lag_map second layer": lambda: plots.lag_map(made.lag_map(layers=2), layer=1),
    "lag_map exploding": lambda: plots.lag_map(made.lag_map(rate=6.0)),
    "lag_map zero": lambda: plots.lag_map(made.lag_map(rate=0.0)),
    "lag_map all zero": lambda: plots.lag_map(_scaled(made.lag_map(), 0.0)),
    "lag_map tiny": lambda: plots.lag_map(_scaled(made.lag_map(), 1e-300)),
    "lag_map infinite": lambda: plots.lag_map(_scaled(made.lag_map(), INF)),
    "lag_map nan": lambda: plots.lag_map(_scaled(made.lag_map(), NAN)),
    "lag_map one step": lambda: plots.lag_map(made.lag_map(T=1)),
    "lag_map one lag": lambda: plots.lag_map(made.lag_map(K=1)),
    "lag_map long": lambda: plots.lag_map(made.lag_map(rate=0.97, T=10_000, K=64)),
    "lag_map long, strided": lambda: plots.lag_map(made.lag_map(rate=0.999, T=10_000, K=2500, stride=50)),
    "decay": lambda: plots.decay(made.lags(0.8), bound=0.95),
    "decay bounded by products": lambda: plots.decay(made.lags(0.8), bound=made.products(bound=1.4)),
    "decay without the products' bound": lambda: plots.decay(made.lags(0.8), bound=made.products(bound=None)),
    "decay of six layers": lambda: plots.decay(made.lags(0.8, 0.9, 0.95, 1.0, 1.01, 0.7)),
    "decay exploding": lambda: plots.decay(made.lags(5.6), bound=50.0),
    "decay vanishing at once": lambda: plots.decay(made.lags(1e-6)),
    "decay zero": lambda: plots.decay(made.lags_of([0.0, 0.0, 0.0])),
    "decay one lag": lambda: plots.decay(made.lags_of([1.0])),
    "decay ending": lambda: plots.decay(made.lags_of([1.0, 0.0, 0.0])),
    "decay infinite": lambda: plots.decay(made.lags_of([1.0, 1e30, INF], 1e30)),
    "decay nan": lambda: plots.decay(made.lags_of([NAN, NAN], NAN)),
    "decay long": lambda: plots.decay(made.lags(0.95, K=10_000)),
    "shares": lambda: plots.shares(made.shares()),
    "shares in one bin": lambda: plots.shares(made.shares(bin_edges=(0, 1))),
    "shares of nothing": lambda: plots.shares(replace(made.shares(), total=np.zeros(1), bias=np.full((1, 8), NAN))),
    "shares nan": lambda: plots.shares(replace(made.shares(), total=np.full(1, NAN), share=np.full((1, 8), NAN))),
    "shares in many bins": lambda: plots.shares(made.shares(bin_edges=tuple(range(0, 3000, 10)))),
    "products": lambda: plots.products(made.products()),
    "products exploding": lambda: plots.products(made.products(rate=30.0, K=400, bound=40.0)),
    "products vanishing": lambda: plots.products(made.products(rate=1e-3, K=400)),
    "products zero": lambda: plots.products(_products_of(-INF)),
    "products nan": lambda: plots.products(_products_of(NAN)),
    "products none": lambda: plots.products(made.products(K=0)),
    "products scalar": lambda: plots.products(made.products(S=1, bound=None)),
    "jacobians": lambda: plots.jacobians(made.jacobians()),
    "jacobians one step": lambda: plots.jacobians(made.jacobians(T=1, B=1, bound=None)),
    "jacobians exploding": lambda: plots.jacobians(_one_norm(1e30)),
    "jacobians infinite": lambda: plots.jacobians(_one_norm(INF)),
    "jacobians nan": lambda: plots.jacobians(replace(made.jacobians(), norm=np.full((60, 4), NAN))),
    "eigenvalues": lambda: plots.eigenvalues(made.spectrum(0.95)),
    "eigenvalues gru": lambda: plots.eigenvalues(made.spectrum(0.5, 1.1, 1.0)),
    "eigenvalues lstm": lambda: plots.eigenvalues(made.spectrum(0.5, 1.1, 1.0, 30.0)),
    "eigenvalues nan": lambda: plots.eigenvalues(made.spectrum(NAN)),
    "reach": lambda: plots.reach(),
    "reach of one": lambda: plots.reach(["truncated:3/2"], T=8),
    "reach of six, one step": lambda: plots.reach(["full", "chunked:2", "truncated:2"] * 2, T=1),
    "comparison": lambda: plots.comparison(made.comparison()),
    "comparison of nothing": lambda: plots.comparison(made.comparison(rows=())),
    "comparison of one": lambda: plots.comparison(made.comparison(rows=(made.row("full", 0.0, 0.0, 0.0),))),
    "comparison nan": lambda: plots.comparison(
        made.comparison(rows=(made.row("full", NAN, INF, 1.0), made.row("chunked:2", 1e30, 1e30, 1.0)))
    ),
    "cell_path": lambda: plots.cell_path(made.cell_path()),
    "cell_path of no step": lambda: plots.cell_path(made.cell_path(K=0)),
    "cell_path shut": lambda: plots.cell_path(made.cell_path(forget=0.0)),
    "cell_path nan": lambda: plots.cell_path(made.cell_path(forget=NAN)),
    "gates": lambda: plots.gates(made.gates()),
    "gates of an RNN": lambda: plots.gates(made.gates(names=("h",))),
    "gates empty": lambda: plots.gates(replace(made.gates(), counts=np.zeros((4, 40), dtype=np.int64))),
    "lyapunov": lambda: plots.lyapunov(made.lyapunov()),
    "lyapunov of one": lambda: plots.lyapunov(made.lyapunov(n=1, steps=1)),
    "lyapunov dead": lambda: plots.lyapunov(replace(made.lyapunov(n=2), exponents=np.full(2, -INF))),
    "training": lambda: plots.training(made.records()),
    "training without horizon": lambda: plots.training(made.records(horizon=False)),
    "training once": lambda: plots.training(made.records(1)),
    "training diverged": lambda: plots.training([r | {"perplexity": INF, "grad_norm": NAN} for r in made.records(3)]),
    "confusion": lambda: plots.confusion([[9, 1], [0, 5]], ["low", "high"]),
    "confusion of many, one unseen": lambda: plots.confusion(np.diag([0, *[3] * 39]), [f"word {i}" for i in range(40)]),
    "rate_test": lambda: plots.rate_test(
        *[np.geomspace(1e-4, 1, 30)] * 3, 0.01, "What the test says of rates", "conditions " * 30
    ),
    "rate_test of two": lambda: plots.rate_test([0.1, 1], [1, 1], [1, 1]),
    "graph": lambda: plots.graph(),
    "graph lstm": lambda: plots.graph(2, "lstm"),
    "graph of one step": lambda: plots.graph(1, "gru"),
}


def test_every_measurement_is_drawn_here():
    drawn = {draw.__name__ for draw in DRAWN.values()}
    assert drawn <= {name.split()[0] for name in PICTURES}
    assert drawn <= set(vars(plots))


def _scaled(measure: made.LagMap, factor: float) -> made.LagMap:
    return replace(measure, norm=np.where(np.isnan(measure.norm), NAN, factor))


def _products_of(log: float) -> made.Products:
    measure = made.products(K=5, S=2)
    logs = np.concatenate([np.zeros((1, 2)), np.full((5, 2), log)])
    return replace(measure, log_singular=logs, singular=np.exp(logs))


def _one_norm(value: float) -> made.Jacobians:
    measure = made.jacobians()
    norm = measure.norm.copy()
    norm[5] = value
    return replace(measure, norm=norm)


def _drawn(axes: Axes) -> bool:
    return axes.get_visible() and axes.axison


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name, tmp_path):
    before = dict(mpl.rcParams)
    figure = PICTURES[name]()
    path = tmp_path / "picture.png"
    figure.savefig(path, dpi=55)
    assert dict(mpl.rcParams) == before

    said = figure.get_suptitle()
    assert len(said.split()) > 3
    for ax in filter(_drawn, figure.axes):
        grid = ax.get_subplotspec()
        if grid is not None and grid.is_last_row() and figure.get_supxlabel() == "":
            assert ax.get_xlabel() or ax.get_ylabel(), "an axis without a label"
    with Image.open(path) as image:
        assert 430 <= image.width <= 450
        grey = np.asarray(image.convert("L"))
    assert grey.min() < 100
    assert grey.std() > 5
    frame = np.concatenate([grey[0], grey[-1], grey[:, -1]])
    assert np.all(frame > 200), "something is cut off at an edge"


@pytest.mark.parametrize("name", ["lag_map", "decay", "products", "jacobians", "cell_path"])
def test_picture_in_given_axes(name):
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert (
        getattr(plots, name)(getattr(made, name if name != "decay" else "lags")(*[0.8] * (name == "decay")), ax=left)
        is figure
    )
    assert left.get_title(loc="left")
    assert not right.get_title(loc="left")
    assert not figure.get_suptitle()
    figure.savefig("/dev/null", format="png")


def test_letters_are_large_enough():
    for name in ("comparison", "gates", "reach"):
        figure = PICTURES[name]()
        figure.draw_without_rendering()
        sizes = [
            text.get_fontsize() for text in figure.findobj(mpl.text.Text) if text.get_text() and text.get_visible()
        ]
        assert min(sizes) >= 9


def test_lines_differ_in_grey_or_in_dashes_and_marker():
    from bptt.plots.style import BLUE, COLOURS, LINES, ORANGE

    assert len({line["linestyle"] for line in LINES}) == len({line["marker"] for line in LINES}) == len(LINES)
    luminance = {c: np.dot(mpl.colors.to_rgb(c), (0.299, 0.587, 0.114)) for c in COLOURS}
    assert luminance[ORANGE] - luminance[BLUE] > 0.2
    assert max(luminance.values()) < 0.75, "a line too pale on white"
    steps = np.diff([np.dot(mpl.colormaps["cividis"](x)[:3], (0.299, 0.587, 0.114)) for x in np.linspace(0, 1, 16)])
    assert np.all(steps > 0)


def test_the_heat_map_holds_the_norms():
    measure = made.lag_map(T=12)
    mesh = plots.lag_map(measure).axes[0].collections[0]
    shown = np.ma.filled(mesh.get_array(), NAN).T
    np.testing.assert_allclose(shown, measure.norm[0])


def test_a_map_of_one_loss_has_ticks_at_whole_steps():
    measure = made.lag_map(T=30)
    axes = plots.lag_map(replace(measure, t=measure.t[-1:], norm=measure.norm[:, -1:])).axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low < tick < high] == [29]


def test_long_maps_are_averaged():
    measure = made.lag_map(rate=1.0, T=2000, K=3)
    shown = plots.lag_map(measure).axes[0].collections[0].get_array().T
    np.testing.assert_allclose(shown[5], np.nanmean(measure.norm[0, 10:12], axis=0))


def test_the_fit_lies_on_an_exact_decay():
    measure = made.lags(0.7)
    lines = {line.get_label(): line for line in plots.decay(measure).axes[0].get_lines()}
    np.testing.assert_allclose(lines["fit: 0.7 a step"].get_ydata(), measure.norm[0], rtol=1e-9)


def test_the_lanes_range_is_drawn():
    lags = made.lags(0.7)
    spread = replace(lags, lane_norm=lags.norm[:, None] * np.array([0.5, 2.0])[:, None])
    (band,) = plots.decay(spread).axes[0].collections
    assert band.get_label() == "its lanes"
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    np.testing.assert_allclose((low, high), (0.5 * lags.norm[0, -1], 2 * lags.norm[0, 0]))


def test_the_unit_circle_is_drawn_over_the_points():
    ax = plots.eigenvalues(made.spectrum(2.5)).axes[0]
    circle = max(ax.get_lines(), key=lambda line: len(line.get_xdata()))
    (points,) = ax.collections
    assert circle.get_zorder() > points.get_zorder()
    assert points.get_alpha() < 1


@pytest.mark.parametrize(("rate", "K"), [(0.9, 60), (1e-3, 60), (30.0, 60)])
def test_the_products_axis_ends_where_float64_does(rate, K):
    measure = made.products(rate, K, bound=None)
    low, high = plots.products(measure).axes[0].get_ylim()
    ends = measure.singular[[0, -1], 0]
    assert np.log10(low) > np.log10(ends.min()) - 16 - 0.07 * np.log10(high / low)
    assert high >= ends.max()


def test_names_of_bins_do_not_meet():
    figure = plots.shares(made.shares(bin_edges=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)))
    figure.draw_without_rendering()
    labels = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
    assert len(labels) == 10
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))


def test_a_logarithmic_axis_of_a_training_says_so():
    labels = [ax.get_ylabel() for ax in plots.training(made.records()).axes]
    assert labels[:2] == ["perplexity (log)", "gradient norm (log)"]


def test_turning_writes_a_frame_per_power(tmp_path):
    path = plots.turning([[1.0, 0.5], [0.5, 1.0]], [[1.0, -0.9], [0.2, 1.0]], 4, tmp_path / "turning.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("L")).astype(int))
    assert all(np.abs(a - b).max() > 100 for a, b in pairwise(frames))


@pytest.mark.parametrize(
    ("W", "v", "steps", "named"),
    [
        (np.eye(3), [1, 0, 0], 3, "W"),
        (np.eye(2), [1, 0, 0], 3, "v"),
        (np.eye(2), [0, 0], 3, "v"),
        ([[0, 1], [0, 0]], [1, 0], 3, "v"),
        (np.eye(2), [1, 0], 0, "steps"),
    ],
)
def test_turning_refuses(W, v, steps, named, tmp_path):
    with pytest.raises(ValueError, match=f"^{named} must"):
        plots.turning(W, v, steps, tmp_path / "no.gif")
    assert not (tmp_path / "no.gif").exists()


@pytest.mark.parametrize(("W", "words"), [([[0, -1], [1, 0]], "for ever"), ([[1, 0], [0, -1]], "none dominates")])
def test_turning_says_when_nothing_dominates(W, words):
    from bptt.plots._turning import _conclusion, _dominant

    matrix = np.array(W, dtype=float)
    assert _dominant(matrix) is None
    assert words in _conclusion(matrix, np.eye(2), None, 3)


def test_turning_measures_the_angle():
    from bptt.plots._turning import _conclusion, _dominant

    matrix = np.diag([2.0, 1.0])
    at_30 = np.array([[np.cos(np.pi / 6), np.sin(np.pi / 6)]])
    assert "at most 30.0°" in _conclusion(matrix, at_30, _dominant(matrix), 0)


@pytest.mark.parametrize(("T", "cell", "named"), [(3, "elman", "cell"), (0, "rnn", "T"), (9, "rnn", "T")])
def test_graph_refuses(T, cell, named):
    with pytest.raises(ValueError, match=f"^{named} must"):
        plots.graph(T, cell)


def test_empty_choices_are_refused():
    with pytest.raises(ValueError, match=r"^policies must"):
        plots.reach([])
    with pytest.raises(ValueError, match=r"^records must"):
        plots.training([])


def test_matplotlib_is_an_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("bptt.plots", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^bptt.plots needs matplotlib: pip install 'bptt\[plots\]'$"):
        importlib.import_module("bptt.plots")


def test_pyplot_is_left_alone():
    for file in Path(plots.__file__).parent.glob("*.py"):
        assert not re.search(r"import.*pyplot", file.read_text(encoding="utf-8")), file
