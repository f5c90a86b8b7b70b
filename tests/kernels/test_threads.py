"""Any number of threads gives the same numbers, and the same number of threads the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, Case, build, case, measure, ours

from bptt.kernels import cpu

Agree = Callable[..., None]
Threads = Callable[[int], None]

each_cell = pytest.mark.parametrize("cell", CELLS)

WAYS: dict[str, tuple[int, int, int, str]] = {  # T, B, H, policy
    "rows apart": (40, 17, 33, "full"),
    "rows apart in chunks": (40, 5, 65, "chunked:7"),
    "fewer rows than threads": (400, 3, 47, "full"),
    "panels": (14, 1, 256, "full"),
    "panels of few rows": (7, 3, 251, "full"),
    "overlapping rows": (40, 3, 33, "truncated:5"),
    "overlapping blocks": (41, 7, 33, "truncated:6/4"),
    "overlapping rows in panels": (7, 1, 253, "truncated:2"),
}
"""Sizes at which `plan` in csrc/module.cpp shares a walk among threads in one way or another."""


@pytest.fixture(params=["with the walk", "apart"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who does the products over all steps: the kernel's threads, or torch."""
    monkeypatch.setattr(cpu, "SMALL", 10**12 if request.param == "with the walk" else 0)
    return request.param


def run(cell: str, way: str, dtype: torch.dtype, **kw: Any) -> tuple[Any, Case, dict[str, Any]]:
    T, B, H, policy = WAYS[way]
    if cell == "lstm_proj" and H > 200:
        torch.manual_seed(0)
        theirs = torch.nn.LSTM(3, H, proj_size=129, dtype=dtype)
    else:
        theirs = build(cell, 3, H, dtype=dtype)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T, B)
    return layer, data, measure(layer, data, **kw).values()


@each_cell
@pytest.mark.parametrize("way", WAYS)
def test_threads_agree(cell: str, way: str, products: str, agree: Agree, walkers: Threads) -> None:
    """Two to four threads against one; twice the same number gives the same bits."""
    layer, data, alone = run(cell, way, torch.float64 if products == "apart" else torch.float32)
    for count in (2, 3, 4):
        walkers(count)
        together = measure(layer, data).values()
        agree(together, alone, f"{count} threads")
        agree(measure(layer, data).values(), together, f"{count} threads again", tolerance=0)


@each_cell
@pytest.mark.parametrize("policy", ["full", "chunked:7", "truncated:6/4"])
def test_threads_share_ragged_lanes(cell: str, policy: str, agree: Agree, walkers: Threads) -> None:
    """Lanes of very unequal lengths, more and fewer than threads."""
    theirs = build(cell, 3, 53)
    for lengths in ((60, 3, 1, 30, 30, 2, 17, 50, 1), (2, 120, 5), (100, 1)):
        layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, max(lengths), len(lengths))
        walkers(1)
        alone = measure(layer, data, packed=lengths).values()
        for count in (2, 3):
            walkers(count)
            together = measure(layer, data, packed=lengths).values()
            agree(together, alone, f"{lengths}, {count} threads")
            agree(measure(layer, data, packed=lengths).values(), together, f"{lengths} again", tolerance=0)


@each_cell
@pytest.mark.parametrize(("layers", "lanes"), [(1, 8), (1, 1), (2, 5)])
def test_threads_share_blocks_that_cross_segments(
    cell: str, layers: int, lanes: int, agree: Agree, walkers: Threads
) -> None:
    """There several blocks of one lane are at the same step at the same time, and their rows add up."""
    theirs = build(cell, 3, 33, num_layers=layers)
    layer = ours(theirs, gradient="truncated:20/1", memory="checkpoints:steps=15", kernel="cpu")
    data = case(theirs, 60, lanes)
    walkers(1)
    alone = measure(layer, data).values()
    for count in (2, 3):
        walkers(count)
        together = measure(layer, data).values()
        agree(together, alone, f"{count} threads")
        agree(measure(layer, data).values(), together, f"{count} threads again", tolerance=0)


@each_cell
@pytest.mark.parametrize("way", WAYS)
def test_threads_in_every_variant(
    cell: str, way: str, products: str, use: Callable[[str], None], agree: Agree, walkers: Threads
) -> None:
    """Each instruction set has panels of its own width, hence parts of its own."""
    alone = run(cell, way, torch.float32)[2]
    for variant in cpu.variants()[1:]:
        use(variant)
        walkers(2)
        agree(run(cell, way, torch.float32)[2], alone, variant)


@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_the_threads_are_those_of_torch(cell: str, products: str, agree: Agree, threads: Threads) -> None:
    """`torch.set_num_threads` is what decides, for the products over all steps as well."""
    layer, data, alone = run(cell, "panels of few rows", torch.float32)
    for count in (2, 3):
        threads(count)
        together = measure(layer, data).values()
        agree(together, alone, f"{count} threads")
        agree(measure(layer, data).values(), together, f"{count} threads again", tolerance=0)


def test_the_walks_are_asked_to_use_them(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
    asked: list[int] = []
    monkeypatch.setattr("bptt.nn.layers.plain", lambda *_: None)  # its walks are prepared before
    for walks in (cpu.FORWARD, cpu.SWEEP):

        class Spy(walks[torch.float32]):
            def run(self, *, threads: int, **how: int) -> None:
                asked.append(threads)
                super().run(threads=threads, **how)

        monkeypatch.setitem(walks, torch.float32, Spy)
    for count in (1, 2, 3):
        threads(count)
        run("lstm", "panels", torch.float32)
    assert asked == [1, 1, 2, 2, 3, 3]
