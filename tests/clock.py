"""A clock that goes by the steps the compiled kernel walks: what is timed with it takes as long on every machine."""

from __future__ import annotations

from typing import Any

import pytest

from bptt.clock import Product
from bptt.kernels import cpu
from bptt.kernels.whole import WholeWalks


class Clock:
    """The clock of `bptt.clock`: a step of a lane takes `ahead` seconds forward and `back` backward, the rest none.

    cores: what a product gets, of the one that it could have.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ahead: float = 1e-5, back: float = 2e-5, cores: float = 1.0
    ) -> None:
        self.now = 0.0
        monkeypatch.setattr("bptt.clock.perf_counter", self)
        monkeypatch.setattr("bptt.clock.sleep", lambda seconds: None)
        monkeypatch.setattr("bptt.clock.product", lambda order: Product(1e9, cores))
        forward, sweep = cpu.Cpu.forward, cpu.Cpu.sweep

        def forward_timed(kernel: Any, cell: Any, x: Any, *others: Any) -> Any:
            self.now += ahead * x.shape[0] * x.shape[1]
            return forward(kernel, cell, x, *others)

        def sweep_timed(kernel: Any, request: Any) -> Any:
            self.now += back * int((request.frames.top - request.frames.start + 1).sum())
            return sweep(kernel, request)

        monkeypatch.setattr(cpu.Cpu, "forward", forward_timed)
        monkeypatch.setattr(cpu.Cpu, "sweep", sweep_timed)
        taped, pulled = WholeWalks.taped, WholeWalks.pulled

        def taped_timed(passes: Any, x: Any, *others: Any) -> Any:
            self.now += ahead * x.shape[0] * x.shape[1]
            return taped(passes, x, *others)

        def pulled_timed(passes: Any, *others: Any) -> Any:
            result, frames = pulled(passes, *others), passes.frames
            self.now += 0 if result is None else back * int((frames.top - frames.start + 1).sum())
            return result

        monkeypatch.setattr(WholeWalks, "taped", taped_timed)
        monkeypatch.setattr(WholeWalks, "pulled", pulled_timed)

    def __call__(self) -> float:
        return self.now
