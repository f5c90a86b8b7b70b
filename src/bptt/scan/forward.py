"""The forward pass of a scan: every step runs once, not recorded by autograd, and some carries are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import Arguments, check_no_tensor_hidden, check_same, described
from .monitor import StepMonitor, hidden
from .pytrees import Form, fresh, put, reset, split, split_y
from .replay import Replay, Visit
from .surroundings import Surroundings, random_kept

__all__ = ["ForwardPass", "StepVisits", "run_forward"]


@dataclass(frozen=True)
class ForwardPass:
    """The results of a forward pass.

    final: the last carry. ys: `[T, ...]`. kept: the carries that were kept, after resets `[n, ...]`. last: the carry
    that entered the last step. forms: the form of the carry that entered each step.
    """

    final: list[Tensor]
    final_form: Form
    ys: list[Tensor]
    y_form: Form
    kept: list[Tensor]
    last: list[Tensor]
    forms: list[Form]


def run_forward(given: Arguments, monitor: StepMonitor | None, keep: Sequence[int]) -> ForwardPass:
    """Run every step once. keep: the steps before which the carry is kept, where steps are monitored."""
    step, T, form = given.step, given.T, given.carry_form
    xs = [x.detach() for x in given.xs]
    kept = [] if monitor is None else [c.new_empty((len(keep), *c.shape)) for c in given.carry]
    number = {t: n for n, t in enumerate(keep)}
    ys: list[Tensor] = []
    first: tuple[list[Tensor], Form] | None = None
    forms = []
    # Copies: a step may write to what it is given.
    carry = [c.clone() for c in given.carry]
    for t in range(T):
        carry = reset([c.detach() for c in carry], given.resets, t)
        forms.append(form)
        if t in number:
            put(kept, number[t], carry)
        x = given.x_form.join(x[t].clone() for x in xs)
        last = [c.clone() for c in carry] if monitor is not None and t == T - 1 else []
        result = step(form.join(carry), x) if monitor is None else monitor.call(form.join(carry), x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step must return a pair (carry, y): got {described(result)}")
        before = carry, form
        carry, form = split(result[0], form)
        check_no_tensor_hidden(form)
        check_same("carry", f"after step {t} as before it", (carry, form), before)
        y, y_form = split_y(result[1], first[1] if first else None)
        if first is None:
            if y_form.values:
                raise ValueError(f"y must hold tensors, numbers or None: got {described(y_form.values[0])}")
            first = y, y_form
            ys = [leaf.new_empty((T, *leaf.shape)) for leaf in y]
        check_same("y", f"at step {t} as at the first", (y, y_form), first)
        put(ys, t, y)
        del result, before, y  # whatever of them is still alive at the next step, the step keeps
    # Clones, so that no output is an input that a step passed through.
    return ForwardPass([c.clone() for c in carry], form, ys, y_form, kept, last, forms)


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
            computed = run_forward(given, monitor, range(given.T))
        if monitor.fault is not None:
            raise hidden(monitor.fault)
        return cls(given, computed, monitor.replay(computed.forms, given.x_form, computed.y_form, surroundings))

    def visit(self, t: int) -> Visit:
        """Step t, run again and recorded by autograd from the carry that it received, its first entries."""
        carry = (fresh(c[t], True) for c in self.computed.kept)
        with random_kept(self.replay.states):
            return self.replay.visit(t, [*carry, *(x[t].detach() for x in self.given.xs), *self.replay.captured])
