"""The charts of the report, as plotly is given them: what each must show."""

import measurements as made
import numpy as np
import pytest

from bptt.report import _net, _travel


def test_the_fit_that_the_sentence_tells_is_drawn_and_no_other() -> None:
    def fits(measure) -> list:
        return [trace for trace in _travel.decay(measure).data if (trace.name or "").startswith("fit")]

    (fit,) = fits(made.lags(0.8))
    assert fit.name == "fit: 0.8 a step"
    np.testing.assert_allclose(fit.y, 0.3 * 0.8 ** np.arange(40), rtol=1e-9)
    bent = made.lags_of((0.5 ** np.arange(40.0) * 100 + 0.99 ** np.arange(40)).tolist(), 0.97)
    assert fits(bent) == []


def test_the_lanes_range_lies_around_the_mean() -> None:
    from dataclasses import replace

    lags = made.lags(0.8)
    spread = replace(lags, lane_norm=lags.norm[:, None] * np.array([0.5, 1.0, 2.0])[:, None])
    traces = {trace.fill: trace for trace in _travel.decay(spread).data if trace.name == "its lanes"}
    np.testing.assert_allclose(traces[None].y, 0.5 * lags.norm[0])
    np.testing.assert_allclose(traces["tonexty"].y, 2 * lags.norm[0])


@pytest.mark.parametrize(("rate", "K"), [(0.9, 60), (1e-3, 400), (30.0, 200)])
def test_the_products_axis_ends_where_float64_does(rate: float, K: int) -> None:
    measure = made.products(rate, K)
    low, high = _net.products(measure).layout.yaxis.range
    largest = np.log10(measure.singular[measure.singular[:, 0] > 0, 0])
    assert low >= max(largest[np.isfinite(largest)].min(), -308) - 16 - 0.07 * (high - low)
    assert high >= min(largest.max(), 307)


def test_the_unit_circle_is_drawn_over_the_points() -> None:
    for _, figure in _net.eigenvalues(made.spectrum(0.5, 1.1, 1.0)):
        points, circle = figure.data
        assert (points.mode, circle.name) == ("markers", "unit circle")
        assert points.marker.opacity < 1
        assert figure.layout.xaxis.range == figure.layout.yaxis.range


def test_every_logarithmic_axis_says_so_and_lets_the_browser_choose_its_ticks() -> None:
    charts = [
        _travel.decay(made.lags(0.8)),
        _net.products(made.products()),
        _net.cell_path(made.cell_path()),
        _net.training(made.records()),
        *(figure for _, figure in _travel.comparison(made.comparison())),
    ]
    found = 0
    for figure in charts:
        for key in figure.layout:
            if key[:5] in ("xaxis", "yaxis") and figure.layout[key].type == "log":
                found += 1
                assert "(log scale)" in figure.layout[key].title.text
                assert figure.layout[key].dtick is None
                assert np.ptp(figure.layout[key].range) >= 0.5
    assert found == 6


def test_a_map_of_few_losses_has_ticks_at_whole_steps() -> None:
    import torch

    import bptt

    layer, x = bptt.nn.RNN(2, 4), torch.randn(30, 2, 2)
    figure = _travel.lag_map(bptt.flow.lag_map(layer, x, lambda y: y[-1].sum(), at=[29]))
    assert (figure.layout.xaxis.dtick, figure.layout.yaxis.dtick) == (1, None)
