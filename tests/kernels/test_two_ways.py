"""Both directions of a layer over values as they lie, one after the other and at the same time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from reference import CELLS, build, case, measure, ours

from bptt.kernels import cpu

SIZES = {"few rows": (40, 2, 33), "rows for all threads": (11, 19, 33), "panels": (5, 1, 251), "a little": (3, 1, 5)}
"""T, B, H: how `division` in csrc/module.cpp shares each walk; of the last the two walk one after the other."""


def made(cell: str, size: str, dtype: torch.dtype, **kw: Any) -> tuple[Any, Any]:
    T, B, H = SIZES[size]
    theirs = build(cell, 3, H, dtype=dtype, bidirectional=True)
    return ours(theirs, kernel="cpu", **kw), case(theirs, T, B)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES)
def test_threads_agree(
    cell: str,
    size: str,
    agree: Callable[..., None],
    walkers: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One to four threads against the eager kernel; twice the same number gives the same bits."""
    with_the_walk = size != "panels"
    monkeypatch.setattr(cpu, "SMALL", 10**12 if with_the_walk else 0)
    layer, data = made(cell, size, torch.float64 if with_the_walk else torch.float32, gradient="chunked:20")
    plain = measure(ours(layer, kernel="eager", gradient="chunked:20"), data).values()
    for count in (1, 2, 3, 4):
        walkers(count)
        together = measure(layer, data).values()
        agree(together, plain, f"{count} threads")
        agree(measure(layer, data).values(), together, f"{count} threads again", tolerance=0)


def test_callers_do_not_share(walkers: Callable[[int], None], agree: Callable[..., None]) -> None:
    """Calls from several threads of Python at once, each with both directions on threads of its own."""
    walkers(2)
    layer, data = made("gru", "few rows", torch.float32)
    alone = measure(layer, data).values()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: measure(ours(layer, kernel="cpu"), data).values(), range(12)):
            agree(found, alone, "beside others", tolerance=0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", ["gates", "states", "checkpoints:steps=4"])
@pytest.mark.parametrize("policy", ["full", "chunked:4", "truncated:5/2", "randomized:0.8"])
def test_time_is_not_turned(
    policy: str, memory: str, layers: int, walkers: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of values turns time round: of one number a step and lane at most, as edge factors are.

    Where blocks overlap in a stack with checkpoints, errors between layers lie by position in a direction's own time.
    """
    if (policy, memory, layers) == ("truncated:5/2", "checkpoints:steps=4", 2):
        pytest.skip("errors between layers are turned there")
    walkers(1)
    both_ways = build("lstm", 3, 5, num_layers=layers, bidirectional=True)
    layer = ours(both_ways, gradient=policy, memory=memory, kernel="cpu")
    x = torch.randn(11, 2, 3, dtype=torch.float64, requires_grad=True)
    turned = []
    for name in ("flip", "gather"):  # of all steps, and of positions in columns
        original = getattr(torch.Tensor, name)

        def counted(t: torch.Tensor, *given: Any, original: Any = original) -> torch.Tensor:
            turned.append(t.shape)
            return original(t, *given)

        monkeypatch.setattr(torch.Tensor, name, counted)
    y, _ = layer(x)
    y.sum().backward()
    assert [shape for shape in turned if shape[-1] > 1] == []
