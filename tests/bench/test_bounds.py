"""What bounds a layer: its parts are the products that the case's operations count, and are kept and shown."""

from dataclasses import replace

import pytest

from bptt.bench import Case, Results, Selection, bounds_markdown, measure
from bptt.bench.bounds import PARTS, layer_parts
from bptt.cells import of_name
from bptt.nn import LAYERS

from .made_up import LARGE, MACHINE, row, timing


@pytest.mark.parametrize("cell", LAYERS)
def test_parts_have_the_sizes_of_the_layer(cell: str):
    parts = layer_parts(Case(cell, 7, 2, 3, 5))
    assert list(parts) == list(PARTS)
    GH = of_name(cell).gates_per_unit * 5
    at_once = [tuple(t.shape) for t in parts["products at once"]()]
    assert at_once == [(14, GH), (14, 3), (GH, 3), (GH, 5)]
    assert [tuple(t.shape) for t in parts["products in time"]()] == [(2, GH), (2, 5)]
    y, *grads = parts["empty call"]()
    assert y.shape == (7, 2, 5)
    assert [tuple(t.shape) for t in grads] == [(7, 2, 3), (GH, 3), (GH, 5), (GH,), (GH,)]


def test_measured_rows_keep_them_and_their_text_form_too():
    selection = Selection(("layers",), ("gru",), ((5, 2, 3, 4),), ("torch.nn",), seconds=0.0, least=2)
    [found] = measure(selection, threads=1)
    assert set(found.parts) == set(PARTS)
    assert set(found.times) == {"bptt", "torch.nn"}
    results = Results(MACHINE, "auto", (found,))
    assert Results.from_json(results.to_json()) == results


def test_they_are_shown_as_shares_of_the_layers_time():
    parts = dict(zip(PARTS, (timing(3e-3), timing(4e-3), timing(1e-4)), strict=True))
    small, large = row("gru", bptt=2e-3), replace(row("lstm", LARGE, bptt=10e-3), parts=parts)
    text = bounds_markdown(Results(MACHINE, "auto", (small, large)))
    assert text.endswith("| 1 thread: T, B, I, H | LSTM |\n|---|---|\n| 100, 64, 256, 256 | 10 ms · 30% · 40% · 1% |")
