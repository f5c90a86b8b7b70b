"""A sweep by position and column, lambda of h and of c included, in every variant against the eager kernel's."""

from collections.abc import Callable

import pytest
import torch

from bptt.cells import CELLS, Weights
from bptt.kernels import KERNELS, Frames, Tape, Wanted
from bptt.policies import Reach


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("projection", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_lstm(
    variant: str, dtype: torch.dtype, projection: int | None, count: int, walkers: Callable[[int], None]
) -> None:
    walkers(count)
    torch.manual_seed(0)
    T, B, I, H = 9, 3, 4, 21  # no multiple of a vector
    P = projection or H
    cell = CELLS["LSTM"]
    hr = None if projection is None else torch.randn(P, H, dtype=dtype) / 3
    w = Weights(torch.randn(4 * H, I, dtype=dtype), torch.randn(4 * H, P, dtype=dtype) / 3, None, None, hr)
    x, resets = torch.randn(T, B, I, dtype=dtype), torch.rand(T, B, 1) < 0.1
    initial = (torch.randn(B, P, dtype=dtype), torch.randn(B, H, dtype=dtype))
    states, gates = KERNELS["eager"].forward(cell, x, initial, resets, w, True, None)
    tape, edges = Tape(states, resets, gates), (~resets).to(dtype)
    frames = Frames.of(Reach(4, 1, fenced=False), None, T, B)
    errors = (frames.errors(torch.randn(T, B, P, dtype=dtype)), frames.errors(torch.randn(T, B, H, dtype=dtype)))
    wanted = Wanted(adjoint=True, initial=True, adjoint_c=True)
    got, expected = (KERNELS[name].sweep(cell, w, tape, frames, errors, edges, wanted) for name in ("cpu", "eager"))
    got, expected = (swept._replace(initial=frames.collect_initial(swept.initial)) for swept in (got, expected))
    for name in ("da", "adjoint", "adjoint_c", "initial"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=lambda m, name=name: f"{name}: {m}")
    without = KERNELS["cpu"].sweep(cell, w, tape, frames, errors, edges, wanted._replace(adjoint_c=False))
    assert without.adjoint_c is None
