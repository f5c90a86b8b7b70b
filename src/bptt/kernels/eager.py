"""The eager kernel: plain torch operations, one step at a time. Every cell, device and dtype; autograd can record it.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..policies import Reach
from .edges import scaled
from .frames import Frames
from .kernel import Request, Sweep, SweepResult
from .sums import Sums, columns_at_once

__all__ = ["Eager"]


class Eager:
    """The eager kernel: stage 1 and stage 3 in plain torch, recordable, and the reference of the other kernels."""

    name = "eager"
    variant: str | None = None
    own_gradients = False

    def refuses(self, request: Request) -> str | None:
        return None if request.dtype.is_floating_point else f"it computes real numbers, not {request.dtype}"

    def hesitates(self, request: Request) -> str | None:
        return None

    def taped_per_unit(self, cell: Cell, reach: Reach) -> int:
        return cell.taped_per_unit

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        gx = cell.project(x, w)
        T = gx.shape[0]
        state, states, taped = initial, [_Series(T + 1) for _ in initial], _Series(T)
        for series, s in zip(states, initial, strict=True):
            series.put(0, s)
        for t in range(T):
            if resets is not None and reset_state:
                restart = [r if r.dim() == 2 else r[t] for r in reset_state]
                state = tuple(torch.where(resets[t], r, s) for r, s in zip(restart, state, strict=True))
            elif resets is not None:
                state = tuple(s.masked_fill(resets[t], 0) for s in state)
            gates = cell.gates(gx[t], state[0], w)
            state = cell.advance(gates, state, w)
            for series, s in zip(states, state, strict=True):
                series.put(t + 1, s)
            if tape_gates:
                taped.put(t, gates)
        return tuple(series.whole() for series in states), taped.whole() if tape_gates else None

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        return None

    def sweep(self, request: Sweep) -> SweepResult:
        if request.by_position:
            return self._by_position(request)
        sums, errors = Sums(request), request.errors
        for group in request.frames.groups(columns_at_once(request.frames, request.w)):
            own = None if errors is None else group.errors(errors)
            sums.add(group, self._by_position(request._replace(frames=group, errors=own)))
        return sums.result()

    @staticmethod
    def _by_position(request: Sweep) -> SweepResult:
        """The sweep of all columns at once, whose errors come by position."""
        cell, w, tape, frames, errors = request.cell, request.w, request.tape, request.frames, request.errors
        gates = None if tape.gates is None else frames.spread(tape.gates)
        prev, state = tuple(map(frames.spread, tape.prev)), tuple(map(frames.spread, tape.state))
        factors = None if request.edge_factors is None else frames.spread(request.edge_factors)
        N = prev[0].shape[1]
        lam = tuple(s.new_zeros(N, s.shape[-1]) for s in state)
        das, adjoints = _Series(frames.R), [_Series(frames.R) for _ in state[: request.adjoints]]
        distance = (frames.top - frames.start)[:, None]
        short = None if frames.whole or bool((distance == frames.R - 1).all()) else distance.to(lam[0].device)
        begin = _begin(frames) if any(a is not None for a in request.arriving) else {}
        for r in reversed(range(frames.R)):
            if short is not None:  # a column that has not begun: zero, also where a weight is infinite
                lam = tuple(a.masked_fill(short <= r, 0) for a in lam)
            if r in begin:
                columns, rows = (index.to(lam[0].device) for index in begin[r])
                lam = tuple(
                    a if arriving is None else a.index_add(0, columns, arriving.index_select(0, rows))
                    for a, arriving in zip(lam, request.arriving, strict=True)
                )
            if errors is not None:
                lam = (lam[0] + errors[r], *lam[1:])  # (6.1), (6.2)
            for series, a in zip(adjoints, lam, strict=False):
                series.put(r, a)
            gate = lam[0] if gates is None else gates[r]  # a cell that tapes no gates does not look at them
            back = cell.pull(lam, gate, tuple(s[r] for s in prev), tuple(s[r] for s in state), w)
            through = cell.recurrent(back.da, gate) @ w.hh
            lam = (through if back.direct is None else through + back.direct, *back.carried)
            if factors is not None:
                lam = tuple(scaled(a, factors[r]) for a in lam)
            das.put(r, back.da)
        leaving = lam if request.leaving else ()
        return SweepResult(das.whole(), tuple(series.whole() for series in adjoints), leaving)


def _begin(frames: Frames) -> dict[int, tuple[Tensor, Tensor]]:
    """The columns that begin with what arrives and their rows of it, by the position in which they begin."""
    columns = (frames.arrives >= 0).nonzero()[:, 0]
    position = (frames.top - frames.start)[columns]
    there = {r: columns[position == r] for r in position.unique().tolist()}
    return {r: (columns, frames.arrives[columns]) for r, columns in there.items()}


class _Series:
    """One value per step, as one tensor: written in place, or stacked at the end where autograd records."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.values: dict[int, Tensor] = {}
        self.buffer: Tensor | None = None

    def put(self, t: int, value: Tensor) -> None:
        if torch.is_grad_enabled():
            self.values[t] = value
            return
        if self.buffer is None:
            self.buffer = value.new_empty(self.length, *value.shape)
        self.buffer[t] = value

    def whole(self) -> Tensor:
        return torch.stack([self.values[t] for t in range(self.length)]) if self.buffer is None else self.buffer
