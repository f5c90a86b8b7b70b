"""The steps of a scan as chains in autograd's graph, recorded while they run: one chain for each block of losses.

Blocks that do not overlap are one chain, which is cut where a block starts. Where they do, each chain begins with a
window of steps that an earlier chain ran, run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..policies import Policy
from .forward import ForwardRun
from .graph import Block, EdgeFactors, TimeEdge, all_rows
from .monitor import StepMonitor
from .pytrees import Form, differentiable, reset
from .replay import Visit
from .segments import close
from .surroundings import GeneratorStates, Surroundings, generator_states, random_kept

__all__ = ["StepChain"]


class StepChain:
    """The steps of a call as one chain in autograd's graph.

    blocks: those that overlap; others are one, with cuts: the steps whose carry enters detached. monitored: the steps
    that the monitor sees. opaque: steps hand tensors to calls that torch function modes do not see. carry: what the
    latest step gave. ys: what each step gave, by leaf of y; versions: those tensors' versions then. visit: the latest
    step that was looked at, as a graph of its own; nodes: of that graph, where it is opaque. began: autograd's number
    of the first node that this call makes. last: carry and x that the last step received; form: that carry's.

    Of blocks that overlap, starts: the carries that enter their earliest steps; forms, states: what else running a step
    again needs; written: the buffers that it does not write to then; differs: a step that gave something else then.
    """

    def __init__(
        self,
        run: ForwardRun,
        monitor: StepMonitor,
        policy: Policy,
        blocks: Sequence[Block],
        surroundings: Surroundings,
    ) -> None:
        given = run.given
        self.run, self.monitor, self.surroundings = run, monitor, surroundings
        overlapping = any(earliest < first for earliest, first, _ in blocks)
        self.blocks = list(blocks) if overlapping else [(0, 0, given.T - 1)]
        self.cuts = frozenset(block[0] for block in blocks if not overlapping) - {0}
        self.monitored = {given.T - 2, given.T - 1}
        if overlapping and blocks[-1][1] == given.T - 1:  # a window runs between these two
            self.monitored.add(given.T - 3)
        if given.resets is not None:
            self.cuts |= all_rows(given.resets)
        self.edge_factors = EdgeFactors() if policy.draws_factors else None
        self.steady = not overlapping and not self.cuts and self.edge_factors is None and given.resets is None
        self.began = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # not in torch's stubs
        self.opaque = False
        # Copies: a step may write to what it is given.
        self.carry = [c.clone() for c in given.carry]
        self.starts = {earliest: list[Tensor]() for earliest, _, _ in self.blocks} if overlapping else {}
        self.forms, self.states = list[Form](), list[GeneratorStates | None]()
        self.form = run.forms[-1]
        self.written = set(monitor.written)
        self.differs: int | None = None
        self.rows = [x.clone().unbind(0) if x.layout is torch.strided else [*x.clone()] for x in given.xs]
        self.ys: list[list[Tensor]] = []
        self.versions: list[list[int]] = []
        self.last: list[Tensor] = []
        self.visit = Visit([], [], ())
        self.nodes: set[Any] = set()

    def repeat(self) -> bool:
        """Run the steps that `run` has run again, recorded. Returns whether they give the same."""
        run, given, monitor = self.run, self.run.given, self.monitor
        replay = monitor.replay(run.forms, given.x_form, run.results.y_form, self.surroundings)
        replay = replace(replay, captured=())
        with random_kept(replay.states):
            for t in range(run.t):
                self.note(t, run.forms[t], replay.states[t])
                self.last = received = [*self.entering(t), *(x[t] for x in self.rows)]
                carry, y = replay.run(t, received)
                self.append(carry, y)
        got, expected = [*carry, *y], [*run.carry, *(rows[run.t - 1] for rows in run.ys)]
        if len(got) != len(expected) or any(t.is_meta for t in got):  # meta has no values to compare
            return False
        self.visit = Visit(received, got, ())
        marked = self.carry
        seen = {id(marked), *monitor.captured}
        self.nodes = self.visit.nodes()
        self.opaque = any(
            isinstance(node, BackwardCFunction) or id(getattr(node, "variable", marked)) not in seen
            for node in self.nodes
        )
        return all(map(close, got, expected))

    def extend(self) -> None:
        """Run the other steps: the chains of all blocks."""
        for earliest, first, last in self.blocks:
            if earliest < first:
                before, self.carry = self.carry, self.starts[earliest]
                self.rewind(earliest, first)
                if self.differs is None and not all(
                    close(c, b) for c, b in zip(self.carry, before, strict=True) if differentiable(b)
                ):
                    self.differs = first - 1
            elif first > 0:
                self.carry = [c.detach() for c in self.carry]
            t = max(first, self.run.t)
            while t <= last:
                if t == self.run.t or t in self.monitored:
                    self.observe(t)
                    t += 1
                else:
                    stop = min([last + 1, *(w for w in self.monitored if w > t)])
                    self.hurry(t, stop)
                    t = stop

    def rewind(self, start: int, stop: int) -> None:
        """Run the steps start to stop-1 again."""
        run, monitor = self.run, self.monitor
        replay = monitor.replay(self.forms, run.given.x_form, run.results.y_form, self.surroundings)
        replay = replace(replay, captured=(), states=self.states)
        with random_kept(self.states[start:stop]):
            for t in range(start, stop):
                self.carry, _ = replay.run(t, [*self.entering(t), *(x[t] for x in self.rows)])

    def note(self, t: int, form: Form, states: GeneratorStates | None = None) -> None:
        """Note what a block that reaches back beyond its first loss needs, where there is one, before step t is run."""
        if self.starts:
            self.forms.append(form)
            self.states.append(states or generator_states(self.run.given.devices))
            if t in self.starts:
                # At step 0 this is the caller's carry, not detached.
                self.starts[t] = [c.detach() for c in self.carry] if t > 0 else self.carry

    def observe(self, t: int) -> None:
        """Run step t with copies of what it is to receive, and look at what it does."""
        run, monitor = self.run, self.monitor
        T, n, form = run.given.T, len(self.carry), run.results.form
        self.note(t, form)
        # Other tensors than the step before gave: if it keeps one of those, the monitor tells them apart.
        received = [r.clone() for r in (*self.entering(t), *(x[t] for x in self.rows))]
        if t == T - 1:
            self.last, self.form = [r.detach().clone() for r in received], form
        carry, x = form.join(received[:n]), run.given.x_form.join(received[n:])
        if t in self.monitored:
            result = monitor.call(t, carry, x)
        else:
            result = run.given.step(carry, x)
            monitor.overwrites |= any(r._version > 0 for r in received)
        entries = list(received)
        after, y = run.results.read(t, result, received[:n])
        self.visit = Visit(entries, [*after, *y], ())
        if self.opaque:
            nodes = self.visit.nodes()
            if monitor.fault is None and any(_number(node) >= self.began for node in nodes & self.nodes):
                monitor.fault = (
                    "a step uses, inside a call that cannot be looked into, a tensor that the step before made"
                )
            self.nodes = nodes
        self.append(after, y)

    def hurry(self, start: int, stop: int) -> None:
        """Run the steps start to stop-1, as a plain loop does."""
        run, steady, copied = self.run, self.steady, self.monitor.overwrites
        step, results = run.given.step, run.results
        join, rows = run.given.x_form.join, self.rows
        carry = self.carry
        for t in range(start, stop):
            if not steady:
                self.carry = carry
                self.note(t, results.form)
                carry = self.entering(t)
            x = [x[t] for x in rows]
            if copied:
                carry, x = [c.clone() for c in carry], [r.clone() for r in x]
            result = step(results.form.join(carry), join(x))
            carry, y = results.read(t, result, carry)
            for leaf, steps, ages in zip(y, self.ys, self.versions, strict=True):
                steps.append(leaf)
                ages.append(leaf._version)
        self.carry = carry

    def entering(self, t: int) -> list[Tensor]:
        """The carry that enters step t."""
        carry, resets = self.carry, self.run.given.resets
        if t > 0 and t in self.cuts:
            carry = [c.detach() for c in carry]
        elif self.edge_factors is not None:
            carry = [TimeEdge.apply(c, self.edge_factors, t) if differentiable(c) else c for c in carry]
        return carry if resets is None else reset(carry, resets, t)

    def append(self, carry: list[Tensor], y: list[Tensor]) -> None:
        """Note what a step gave."""
        self.carry = carry
        if not self.ys:
            self.ys, self.versions = [[] for _ in y], [[] for _ in y]
        for leaf, steps, versions in zip(y, self.ys, self.versions, strict=True):
            steps.append(leaf)
            versions.append(leaf._version)


def _number(node: Any) -> int:
    """The number of a node in the order in which autograd made them; -1 for a leaf, which no step made."""
    return -1 if hasattr(node, "variable") else node._sequence_nr()
