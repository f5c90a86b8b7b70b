"""A sweep, lambda of h and of c included, in every variant against the eager kernel's."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bptt.cells import CELLS, Weights
from bptt.kernels import KERNELS, Frames, Kernel, Sweep, SweepResult, Tape
from bptt.policies import Reach


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("projection", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True), (False, False)])
def test_lstm(
    variant: str,
    dtype: torch.dtype,
    projection: int | None,
    count: int,
    by_position: bool,
    which: tuple[bool, bool],
    walkers: Callable[[int], None],
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
    tape, factors = Tape(states, resets, gates), (~resets).to(dtype) * 1.25
    frames = Frames.of(Reach(4, 1, stops_at_start=False), None, T, B)
    # Rows of what arrives in any order, and columns that begin without.
    rows = torch.randperm(len(frames.start)).where(torch.rand(len(frames.start)) < 0.5, -1)
    frames = replace(frames, arrives=rows)
    errors = torch.randn(T, B, P, dtype=dtype)
    sizes = zip((P, H), which, strict=True)
    arriving = tuple(torch.randn(len(rows), size, dtype=dtype) if given else None for size, given in sizes)
    errors = frames.errors(errors) if by_position else errors
    request = Sweep(cell, w, tape, frames, errors, arriving, factors, by_position, adjoints=2, leaving=True)
    got, expected = (KERNELS[name].sweep(request) for name in ("cpu", "eager"))
    got, expected = (result._replace(leaving=frames.collect_initial(result.leaving)) for result in (got, expected))
    for name in ("da", "adjoints", "leaving"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=lambda m, name=name: f"{name}: {m}")
    for adjoints in (0, 1):
        asked = request._replace(adjoints=adjoints, leaving=False)
        for name in ("cpu", "eager"):
            result = KERNELS[name].sweep(asked)
            assert (len(result.adjoints), result.leaving) == (adjoints, ())
            torch.testing.assert_close(result.da, expected.da)


def test_what_arrives_is_the_walks_own_adjoint(variant: str) -> None:
    """A walk cut in two, the second half of which begins with what left the first: the same as the whole one."""
    torch.manual_seed(0)
    T, B, I, H, a = 9, 3, 4, 21, 5
    cell = CELLS["LSTM"]
    w = Weights(*(torch.randn(4 * H, n, dtype=torch.float64) / 3 for n in (I, H)), None, None, None)
    initial = (torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64))
    states, gates = KERNELS["eager"].forward(cell, torch.randn(T, B, I).double(), initial, None, w, True, None)
    assert gates is not None
    errors, final = torch.randn(T, B, H).double(), (torch.randn(B, H).double(), torch.randn(B, H).double())

    def part(kernel: Kernel, a: int, b: int, arriving: tuple[Tensor, ...], frames: Frames) -> SweepResult:
        tape = Tape(tuple(s[a : b + 1] for s in states), None, gates[a:b])
        return kernel.sweep(Sweep(cell, w, tape, frames, errors[a:b], arriving, adjoints=2, leaving=True))

    def frames(T: int) -> Frames:
        return Frames.of(Reach(None, None, stops_at_start=False), None, T, B)

    for kernel in (kernel for kernel in KERNELS.values() if not kernel.own_gradients):  # those that give adjoints
        whole = part(kernel, 0, T, final, frames(T))
        behind = part(kernel, a, T, final, frames(T - a))
        turned = replace(frames(a), arrives=torch.arange(B).flip(0))
        before = part(kernel, 0, a, tuple(s.flip(0) for s in behind.leaving), turned)
        torch.testing.assert_close(torch.cat([before.da, behind.da]), whole.da)
        for i in (0, 1):
            torch.testing.assert_close(before.leaving[i], whole.leaving[i])
            torch.testing.assert_close(torch.cat([before.adjoints[i], behind.adjoints[i]]), whole.adjoints[i])


def test_no_row_is_read_that_has_not_arrived() -> None:
    T, B, I, H = 5, 3, 4, 2
    cell, w = CELLS["RNN_TANH"], Weights(torch.randn(H, I), torch.randn(H, H), None, None, None)
    states, _ = KERNELS["cpu"].forward(cell, torch.randn(T, B, I), (torch.zeros(B, H),), None, w, False, None)
    frames = Frames.of(Reach(None, None, stops_at_start=False), None, T, B)
    request = Sweep(cell, w, Tape(states, None, None), frames, None, (torch.randn(B - 1, H),))
    with pytest.raises(RuntimeError, match=r"what arrives must have the 3 rows .*: got shapes \[2, 2\]"):
        KERNELS["cpu"].sweep(request)
    for name in ("cpu", "eager"):
        KERNELS[name].sweep(request._replace(frames=replace(frames, arrives=torch.tensor([1, -1, 0]))))
