"""The forward pass of a scan: every step runs once, not recorded by autograd, and some carries are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments, check_no_tensor_hidden, check_same, described
from .monitor import StepMonitor, hidden
from .pytrees import Form, fresh, reset, split, split_y
from .replay import Replay, Visit
from .surroundings import Surroundings, random_kept

__all__ = ["ForwardPass", "ForwardRun", "ScanResults", "StepResults", "StepVisits"]


@dataclass(frozen=True)
class ScanResults:
    """The results of all steps: the tensors of the final carry, and of ys `[T, ...]`, with their forms."""

    final: Sequence[Tensor]
    final_form: Form
    ys: Sequence[Tensor]
    y_form: Form

    def joined(self, outputs: Sequence[Tensor] | None = None) -> tuple[Any, Any]:
        """(the final carry, ys). outputs: tensors in the place of its own, where there are others."""
        tensors, n = outputs or (*self.final, *self.ys), len(self.final)
        return self.final_form.join(tensors[:n]), self.y_form.join(tensors[n:])


@dataclass(frozen=True)
class ForwardPass(ScanResults):
    """The results of a forward pass that autograd has not recorded.

    kept: the carries that were kept, after resets `[n, ...]`. last: the carry that entered the last step. forms: the
    form of the carry that entered each step.
    """

    kept: list[Tensor]
    last: list[Tensor]
    forms: list[Form]


class StepResults:
    """The results of steps as tensors, checked: each carry is like the one before, each y like the first.

    form: that of the latest carry. y, y_form: the first y, and its form.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.y: list[Tensor] | None = None
        self.y_form = form
        self._kinds: list[tuple[Any, ...]] = []

    def read(self, t: int, result: Any, before: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the carry and of the y that step t returned. before: those of the carry it was given.

        Raises TypeError and ValueError as `scan` does.
        """
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step must return a pair (carry, y): got {described(result)}")
        if self.y is not None:
            carry, y = self.form.tensors(result[0]), self.y_form.tensors(result[1])
            if carry is not None and y is not None:
                for r, (shape, dtype, device) in zip((*carry, *y), self._kinds, strict=True):
                    if r.shape != shape or r.dtype != dtype or not (r.is_cpu if device is None else r.device == device):
                        break
                else:
                    return carry, y
        expected, plain = (before, self.form), self.form.tensors(result[0])
        carry, self.form = split(result[0], self.form) if plain is None else (plain, self.form)
        if plain is None:
            check_no_tensor_hidden(self.form)
        check_same("carry", f"after step {t} as before it", (carry, self.form), expected)
        y, y_form = split_y(result[1], None if self.y is None else self.y_form)
        if self.y is None:
            if y_form.values:
                raise ValueError(f"y must hold tensors, numbers or None: got {described(y_form.values[0])}")
            self.y, self.y_form = y, y_form
            self._kinds = [(r.shape, r.dtype, None if r.is_cpu else r.device) for r in (*carry, *y)]
        check_same("y", f"at step {t} as at the first", (y, y_form), (self.y, self.y_form))
        return carry, y


class ForwardRun:
    """A forward pass that can be stopped between two steps.

    keep: the steps before which the carry is kept, where steps are monitored. t: the next step. carry: what it
    receives, before resets. results: reads what steps return. kept: the carries that were kept, after resets
    `[n, ...]`; ys: `[T, ...]`; forms: the form of the carry that entered each step; so far.
    """

    def __init__(self, given: Arguments, monitor: StepMonitor | None, keep: Sequence[int]) -> None:
        self.given, self.monitor = given, monitor
        self.t = 0
        # Copies: a step may write to what it is given.
        self.carry = [c.clone() for c in given.carry]
        self.results = StepResults(given.carry_form)
        self._xs = [x.detach() for x in given.xs]
        self.kept = [] if monitor is None else [c.new_empty((len(keep), *c.shape)) for c in given.carry]
        self._number = {} if monitor is None else {t: n for n, t in enumerate(keep)}
        self.ys: list[Tensor] = []
        self._last: list[Tensor] = []
        self.forms: list[Form] = []

    def advance(self, stop: int) -> None:
        """Run the steps before `stop`, without recording them."""
        given, monitor, results = self.given, self.monitor, self.results
        step, resets, carry = given.step, given.resets, self.carry
        many = stop - self.t > 2
        rows_of = partial(_rows, many)
        xs, kept, ys = list(map(rows_of, self._xs)), list(map(rows_of, self.kept)), list(map(rows_of, self.ys))
        for t in range(self.t, stop):
            if resets is not None:
                carry = reset(carry, resets, t)
            form = results.form
            self.forms.append(form)
            if t in self._number:
                for rows, c in zip(kept, carry, strict=True):
                    rows[self._number[t]].copy_(c)
            x = given.x_form.join([x[t].clone() for x in xs])
            if monitor is not None and t == given.T - 1:
                self._last = [c.clone() for c in carry]
            result = step(form.join(carry), x) if monitor is None else monitor.call(t, form.join(carry), x)
            carry, y = results.read(t, result, carry)
            if t == 0:
                self.ys = [leaf.new_empty((given.T, *leaf.shape)) for leaf in y]
                ys = list(map(rows_of, self.ys))
                # Not the y itself: whatever of it is still alive at the next step, the step keeps.
                results.y = [leaf.detach() for leaf in y]
            for rows, leaf in zip(ys, y, strict=True):
                rows[t].copy_(leaf)
            if monitor is not None:
                carry = [c.detach() for c in carry]
            del result, y
            self.t = t + 1
        self.carry = carry

    def finish(self) -> ForwardPass:
        """The results, after all steps."""
        self.advance(self.given.T)
        results = self.results
        # Clones, so that no output is an input that a step passed through.
        final = [c.clone() for c in self.carry]
        return ForwardPass(final, results.form, self.ys, results.y_form, self.kept, self._last, self.forms)


def _rows(many: bool, whole: Tensor) -> tuple[Tensor, ...] | Tensor:
    """The rows of a tensor, as views that are made at once; where few are needed, or of a sparse one, the tensor."""
    return whole.unbind(0) if many and whole.layout is torch.strided else whole


@dataclass(frozen=True)
class StepVisits:
    """A scan whose steps were run once, and can each be visited as a graph of its own: for measurements.

    given: the arguments. computed: the results of the forward pass, with all carries. replay: runs a step again.
    """

    given: Arguments
    computed: ForwardPass
    replay: Replay

    @classmethod
    def of(cls, given: Arguments) -> StepVisits:
        """Run the steps; torch's random generators are left alone.

        Raises RuntimeError where steps pass something to one another outside of the carry, and as `scan` does.
        """
        devices = given.devices
        monitor, surroundings = StepMonitor(given.step, devices, given.xs), Surroundings.current(devices)
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]), torch.no_grad(), surroundings.entered():
            computed = ForwardRun(given, monitor, range(given.T)).finish()
        if monitor.fault is not None:
            raise hidden(monitor.fault)
        return cls(given, computed, monitor.replay(computed.forms, given.x_form, computed.y_form, surroundings))

    def visit(self, t: int) -> Visit:
        """Step t, run again and recorded by autograd from the carry that it received, its first entries."""
        carry = (fresh(c[t], True) for c in self.computed.kept)
        with random_kept(self.replay.states):
            return self.replay.visit(t, [*carry, *(x[t].detach() for x in self.given.xs), *self.replay.captured])
