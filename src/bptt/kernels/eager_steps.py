"""The eager kernel for steps: the core of a traced step by torch operations, one step at a time. Any device and dtype.

Legend: T steps, B lanes, N columns of a sweep, longest first (see `frames.WalkOrder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..steps import Part, SplitStep
from .edges import scaled
from .frames import Frames
from .step_values import Layout, StepValues

__all__ = ["EagerSteps"]


class EagerSteps:
    """The eager kernel for steps."""

    name = "eager"
    variant: str | None = None
    by_operations = True

    def refuses(self, step: SplitStep, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def inputs(self, step: SplitStep) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(step.forward.inputs), frozenset(step.adjoint.inputs)

    def layout(self, step: SplitStep, keep: Sequence[str], T: int, B: int) -> Layout:
        return Layout(step.values, (), T, B)

    def advance(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        carry: Sequence[Tensor],
        resets: Tensor | None,
        T: int,
        keep: Sequence[str],
        last: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], StepValues]:
        part, B = step.forward, len(carry[0])
        found = {name: list[Tensor]() for name in keep}
        states = [[c] for c in carry]
        inputs = _by_step(step, part, values, T)
        place = {name: i for i, name in enumerate(part.outputs)}
        nexts, kept = [place[n] for n in step.next], [(place[name], rows) for name, rows in found.items()]
        of_carry = [step.carry.index(n) if n in step.carry else None for n in part.inputs]
        current: Sequence[Tensor] = carry
        of_rows, function = part.in_turn
        free = of_rows(B)
        for t in range(T):
            if resets is not None:
                current = [_reset(c, resets[t]) for c in current]
            given = [i[t] if w is None else current[w] for i, w in zip(inputs, of_carry, strict=True)]
            made = function(B, *free, *given)
            current = [made[i] for i in nexts]
            for rows, c in zip(states, current, strict=True):
                rows.append(c)
            for i, rows in kept:
                rows.append(made[i])
        for end, c in zip(last, current, strict=False):
            end.copy_(c)
        flat = {name: torch.stack(rows).flatten(0, 1) if step.values[name].rows else rows[-1]
                for name, rows in found.items()}  # fmt: skip
        lanes = B // step.values[step.carry[0]].rows
        return [torch.stack(rows) for rows in states], StepValues(step.values, T, lanes, flat)

    def sweep(
        self,
        step: SplitStep,
        values: Mapping[str, Tensor],
        frames: Frames,
        arriving: Sequence[Tensor | None],
        edge_factors: Tensor | None,
        leaving: bool,
    ) -> tuple[StepValues, list[Tensor | None]]:
        part, walks, T, B = step.adjoint, frames.walks, frames.T, frames.B
        device = values[step.carry[0]].device
        top, lane, _, slot, own, arrives = walks.columns.to(device).unbind()
        counts = walks.counts[0].tolist()
        N, kinds = len(top), [step.values[c] for c in step.carry]
        lam = [None if a is None else torch.zeros(N, *k.shape, dtype=k.dtype, device=device)
               for a, k in zip(step.adjoints, kinds, strict=True)]  # fmt: skip
        begin = arrives >= 0
        for adjoint, rows in zip(lam, arriving, strict=True):
            if adjoint is not None and rows is not None and N:
                adjoint[begin] = rows[arrives[begin]]
        left: list[Tensor | None] = [None if a is None or not leaving else torch.zeros_like(a) for a in lam]
        by_step = {n: list[Tensor]() for n in step.sent if frames.whole and T and N}
        sums = {n: _zeros(step, n, T, B, device) for n in (*step.sent, *step.summed) if n not in by_step}
        given_rows = _Rows(step, values, frames, edge_factors)
        place = {name: i for i, name in enumerate(part.outputs)}
        back = [None if b is None else place[b] for b in step.back]
        (of_rows, function), free, before = part.in_turn, tuple[Tensor, ...](), -1
        for j in range(frames.R):
            active = counts[j]
            if not active:
                break
            if active < N:
                lam = [None if a is None else a[:active] for a in lam]
            at = given_rows.at(j, top, lane, active)
            dead = None if frames.whole else own[:active] <= j
            given = dict(zip(step.adjoints, lam, strict=True))
            if active != before:
                free, before = of_rows(active), active
            made = function(
                active, *free, *[given[n] if n in given else given_rows.rows(n, at, dead if n in step.owned else None)
                                 for n in part.inputs]
            )  # fmt: skip
            lam = [None if a is None else torch.zeros_like(a) if b is None else made[b]
                   for a, b in zip(lam, back, strict=True)]  # fmt: skip
            if given_rows.factors is not None:
                factor = given_rows.factors[at]
                lam = [None if a is None else scaled(a, _beside(factor, a).to(a.dtype)) for a in lam]
            for name, found in by_step.items():
                found.append(made[place[name]])
            for name in step.sent if not by_step else ():
                kind, whole = step.values[name], sums[name]
                rows = made[place[name]].reshape(active, kind.rows, *kind.shape)
                if isinstance(at, slice) or not walks.overlaps:
                    whole[at] = rows
                else:
                    whole.index_add_(0, at, rows)
            for name in step.summed:
                sums[name] += made[place[name]].reshape(sums[name].shape)
            ended = slice(counts[j + 1] if j + 1 < len(counts) else 0, active)
            if leaving and ended.start < ended.stop:
                for out, a in zip(left, lam, strict=True):
                    if out is not None and a is not None:
                        out[slot[ended]] = a[ended]
        flat = {n: torch.cat(by_step[n][::-1]) if n in by_step else sums[n].flatten(0, 1) for n in step.sent}
        return StepValues(step.values, T, B, flat | {n: sums[n] for n in step.summed}), left


class _Rows:
    """The values of a sweep by row, `[T * B, k, ...]`, and those without rows."""

    def __init__(self, step: SplitStep, values: Mapping[str, Tensor], frames: Frames, factors: Tensor | None) -> None:
        self.frames, self.B = frames, frames.B
        self.values = {
            n: values[n].reshape(-1, step.values[n].rows, *step.values[n].shape) if step.values[n].rows else values[n]
            for n in step.adjoint.inputs if n not in step.adjoints
        }  # fmt: skip
        self.shared = {n for n in self.values if not step.values[n].rows}
        self.by_step = {
            n: rows.view(frames.T, frames.B * step.values[n].rows, *step.values[n].shape).unbind(0)
            for n, rows in self.values.items()
            if frames.whole and n not in self.shared
        }
        self.factors = None if factors is None else factors.expand(frames.T, frames.B).reshape(-1)

    def at(self, j: int, top: Tensor, lane: Tensor, active: int) -> Tensor | slice:
        """The rows of so many columns at the j-th step of their walk."""
        if self.frames.whole:
            t = self.frames.T - 1 - j
            return slice(t * self.B, (t + 1) * self.B)
        return (top[:active] - j) * self.B + lane[:active]

    def rows(self, name: str, at: Tensor | slice, dead: Tensor | None) -> Tensor:
        """The values of some rows `[n * k, ...]`; zero where they are not a column's own."""
        values = self.values[name]
        if name in self.shared:
            return values
        if name in self.by_step and dead is None and isinstance(at, slice):
            return self.by_step[name][at.start // self.B]
        rows = values[at]
        if dead is not None:
            rows = rows.masked_fill(_beside(dead, rows), 0)
        return rows.flatten(0, 1)


def _zeros(step: SplitStep, name: str, T: int, B: int, device: torch.device) -> Tensor:
    kind = step.values[name]
    size = (T * B, kind.rows, *kind.shape) if kind.rows else kind.shape
    return torch.zeros(size, dtype=kind.dtype, device=device)


def _by_step(step: SplitStep, part: Part, values: Mapping[str, Tensor], T: int) -> list[Sequence[Tensor]]:
    """Of each input its value at each step; nothing for those of the carry."""
    return [() if n in step.carry else values[n].unbind() if step.values[n].rows else [values[n]] * T
            for n in part.inputs]  # fmt: skip


def _reset(c: Tensor, resets: Tensor) -> Tensor:
    return c.masked_fill(_beside(resets, c), 0)


def _beside(rows: Tensor, values: Tensor) -> Tensor:
    """A number for each row `[n]`, shaped to be broadcast with values `[n, ...]`."""
    return rows.view(-1, *(1,) * (values.dim() - 1))
