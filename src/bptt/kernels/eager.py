"""The eager kernel: plain torch operations, one step at a time. Every cell, device and dtype; autograd can record it.

Legend: T steps, B lanes, F taped gate values, R positions and N columns of a sweep (see `frames`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights
from .frames import Frames
from .kernel import Request, Swept, Tape, Walked, Wanted
from .sums import Sums, columns_at_once, with_final

__all__ = ["Eager"]


class Eager:
    """Stage 1 and stage 3 in plain torch. The reference the other kernels are held to, and the recordable one."""

    name = "eager"
    variant: str | None = None

    def refuses(self, request: Request) -> str | None:
        return None if request.dtype.is_floating_point else f"it computes real numbers, not {request.dtype}"

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

    def walk(
        self,
        cell: Cell,
        x: Tensor,
        w: Weights,
        tape: Tape,
        frames: Frames,
        error: Tensor | None,
        final: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
    ) -> Walked:
        sums = Sums(wanted)
        for group in frames.groups(columns_at_once(frames, w)):
            errors = with_final(cell, group, None if error is None else group.errors(error), final, *group.finals())
            sums.add(group, self.sweep(cell, w, tape, group, errors, edges, wanted))
        return sums.walked()

    def sweep(
        self,
        cell: Cell,
        w: Weights,
        tape: Tape,
        frames: Frames,
        errors: tuple[Tensor | None, ...],
        edges: Tensor | None,
        wanted: Wanted,
    ) -> Swept:
        gates = None if tape.gates is None else frames.spread(tape.gates)
        prev, state = tuple(map(frames.spread, tape.prev)), tuple(map(frames.spread, tape.state))
        edge = None if edges is None else frames.spread(edges)
        N = prev[0].shape[1]
        lam = tuple(s.new_zeros(N, s.shape[-1]) for s in state)
        das, adjoints, adjoints_c = _Series(frames.R), _Series(frames.R), _Series(frames.R)
        wants_c = wanted.adjoint_c and cell.states == 2
        walked = (frames.top - frames.start)[:, None]
        short = None if frames.whole or bool((walked == frames.R - 1).all()) else walked.to(lam[0].device)
        for r in reversed(range(frames.R)):
            if short is not None:  # a column that has not begun: zero, also where a weight is infinite
                lam = tuple(a.masked_fill(short <= r, 0) for a in lam)
            lam = tuple(a if e is None else a + e[r] for a, e in zip(lam, errors, strict=True))  # (6.1), (6.2)
            if wanted.adjoint:
                adjoints.put(r, lam[0])
            if wants_c:
                adjoints_c.put(r, lam[1])
            gate = lam[0] if gates is None else gates[r]  # a cell that tapes no gates does not look at them
            back = cell.pull(lam, gate, tuple(s[r] for s in prev), tuple(s[r] for s in state), w)
            through = cell.recurrent(back.da, gate) @ w.hh
            lam = (through if back.direct is None else through + back.direct, *back.carried)
            if edge is not None:
                lam = tuple((a * edge[r]).masked_fill(edge[r] == 0, 0) for a in lam)
            das.put(r, back.da)
        return Swept(
            das.whole(),
            adjoints.whole() if wanted.adjoint else None,
            lam if wanted.initial else (),
            adjoints_c.whole() if wants_c else None,
        )


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
