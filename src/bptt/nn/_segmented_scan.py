"""A scan whose xs are read a segment at a time: forward, and from the last segment to the first back again.

Legend: T steps; a, b: a segment's first step, and the one after its last. A run is a call of `bptt.scan` on the steps
that the losses of a segment reach within a window, at most, and on the segment: s is its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from .. import policies
from ..engine import reversals
from ..memory import Checkpoints
from ..policies import Reach
from ..scan import scan
from ..scan.pytrees import Step, differentiable
from ..scan.surroundings import GeneratorStates, generator_states, set_generators
from ..schedules import binomial
from ._stream_loss import StreamLoss

__all__ = ["SegmentedScan", "StepsOfRun", "cut"]

SEGMENT_BYTES = 2**20
"""Tape that a run may have in any case, where no length is asked for: each costs about a millisecond of its own."""


@dataclass(frozen=True)
class StepsOfRun:
    """What the steps of a run are given: their xs, as a pytree, and their resets and the states of these, or None."""

    xs: Any
    resets: Tensor | None
    restarts: Any


@dataclass(frozen=True)
class _Run:
    """A run from step s, for the losses of the steps a to b-1."""

    s: int
    a: int
    b: int


@dataclass(frozen=True)
class _OfRun(policies.Policy):
    """A policy on the steps of a run. factors: those of its edges, the one into its first step included."""

    whole: Reach
    factors: Tensor | None

    def reach(self, T: int) -> Reach:
        return self.whole.within(T)

    @property
    def draws_factors(self) -> bool:
        return self.factors is not None

    def draw(self, T: int, B: int) -> Tensor | None:
        return self.factors

    def __str__(self) -> str:
        return "a part of a sequence"


def cut(T: int, reach: Reach, steps: int) -> list[tuple[int, int, int]]:
    """(the first step of a run, its first loss, the step after its last) for segments of about so many steps.

    >>> cut(10, Reach(4, 2, stops_at_start=False), 5)
    [(0, 0, 4), (0, 4, 8), (4, 8, 10)]
    >>> cut(10, Reach(4, 4, stops_at_start=True), 3)
    [(0, 0, 3), (3, 3, 4), (4, 4, 7), (7, 7, 8), (8, 8, 10)]
    """
    every, window = reach.every or T, reach.window or T
    if reach.overlaps:  # a block's losses are those of one run
        steps = max(steps // every, 1) * every
    spans = pairwise(reach.segment_starts(T, steps))
    return [(max(0, a - window + 1) // every * every if reach.overlaps else a, a, b) for a, b in spans]


class _KeptStates:
    """States before runs: carries, and the states of the random generators.

    Room for the carries is taken at once: one small tensor after another would break up the memory that runs use.
    """

    def __init__(self, states: int) -> None:
        self.size = states
        self.tensors: list[Tensor] = []
        self.rest: list[tuple[Any, list[Any], GeneratorStates]] = []

    def store(self, state: tuple[Any, GeneratorStates]) -> None:
        """Store the next state."""
        leaves, form = tree_flatten(state[0])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.tensors = self.tensors or [t.new_empty(self.size, *t.shape) for t in tensors]
        for whole, t in zip(self.tensors, tensors, strict=True):
            whole[len(self.rest)] = t
        self.rest.append((form, [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves], state[1]))

    def state(self, n: int) -> tuple[Any, GeneratorStates]:
        """The state with this number."""
        form, leaves, random = self.rest[n]
        tensors = (whole[n] for whole in self.tensors)
        return form.unflatten([next(tensors) if leaf is _HOLE else leaf for leaf in leaves]), random


_HOLE = object()


@dataclass
class SegmentedScan:
    """A scan in segments, with a loss for each.

    given: what the steps a to b-1 are given, as `StepsOfRun`. loss: its `wrt` has the tensors whose gradients are
    found, those that the step uses among them. restarting: called with a run's first step, the states of its
    resets, and their gradients. first: the step of the whole sequence with which this one begins.
    """

    step: Step
    given: Callable[[int, int], StepsOfRun]
    loss: StreamLoss
    devices: frozenset[torch.device]
    kernel: str
    restarting: Callable[[int, Sequence[Tensor | None]], None]
    first: int = 0

    def gradients(
        self, carry: Any, T: int, reach: Reach, factors: Tensor | None, memory: Checkpoints, sizes: tuple[int, int]
    ) -> tuple[Any, list[Tensor | None]]:
        """(the final carry, the gradients of the tensors of the first).

        sizes: the bytes of a carry, and those that one step of a run adds to its tape.
        """
        state, of_step = sizes
        besides = 0  # the steps of a run before its segment
        if reach.overlaps:
            assert reach.window is not None
            besides = min(T, reach.window - 1) * of_step
        if memory.bytes is not None and memory.bytes < of_step + besides:
            window = " and of the steps before it in the window" if besides else ""
            raise ValueError(
                f"bytes must hold the tape of a step{window}, {of_step + besides:,} bytes: got {memory.bytes:,}"
            )
        steps = memory.cut(T, state, of_step, besides).steps
        if memory == Checkpoints():
            steps = max(steps, min(T, SEGMENT_BYTES // of_step))
        self.runs = [_Run(*run) for run in cut(T, reach, steps)]
        self.reach, self.factors = reach, factors
        longest = max(run.b - run.a for run in self.runs)
        schedule = binomial(len(self.runs), memory.slots(len(self.runs), longest, state, of_step, besides))
        self.final: Any = None
        self.adjoint: list[Tensor | None] = []  # of the carry that enters the run after the present one
        self.sent: list[Tensor | None] = [None for _ in _tensors(carry)]
        now = first = carry, generator_states(self.devices)
        kept = _KeptStates(len(schedule.stored_forward))
        for i in range(max(schedule.stored_forward, default=0)):
            now = self._advance(i, now)
            if i + 1 in schedule.stored_forward:
                kept.store(now)
        stored = {i: partial(kept.state, n) for n, i in enumerate(schedule.stored_forward)}
        del now
        runs = range(len(self.runs) + 1)
        for i, _, entering in reversals(
            runs, schedule.backward, first, stored, lambda i, _, state: self._advance(i, state)
        ):
            self._reverse(i, entering)
        return self.final, self.sent

    def _advance(self, i: int, state: tuple[Any, GeneratorStates]) -> tuple[Any, GeneratorStates]:
        """The carry, and the states of the random generators, before run i+1, from those before run i."""
        (carry, random), s, stop = state, self.runs[i].s, self.runs[i + 1].s
        if s == stop:
            return state
        before = generator_states(self.devices)
        set_generators(random)
        with torch.no_grad():
            carry = self._scan(self.given(s, stop), carry, stop - s, policies.Full())[0]
        after = generator_states(self.devices)
        if self.final is not None:
            set_generators(before)
        drawn = any(not torch.equal(after[device], random[device]) for device in after)
        return _detached(carry), after if drawn else random

    def _reverse(self, i: int, state: tuple[Any, GeneratorStates]) -> None:
        """Run i with its gradients: those of its losses, and of what comes back from the run after it."""
        run, last = self.runs[i], i == len(self.runs) - 1
        steps = self.given(run.s, run.b)
        before = generator_states(self.devices)
        set_generators(state[1])
        with torch.enable_grad():
            carry = tree_map_only(Tensor, partial(_leaf, wanted=run.s == 0 or not self.reach.overlaps), state[0])
            restarts = tree_map_only(Tensor, partial(_leaf, wanted=True), steps.restarts)
            final, ys = self._scan(replace(steps, restarts=restarts), carry, run.b - run.s, self._policy(run))
            leaves, form = tree_flatten(ys)
            own = [y[run.a - run.s :] for y in leaves]
        if last:
            self.final = _detached(final)
        else:
            set_generators(before)
        errors = self.loss.errors(slice(self.first + run.a, self.first + run.b), own, form.unflatten)
        pairs = [*zip(own, errors, strict=True), *zip(_tensors(final), self.adjoint, strict=False)]
        self._pull(run, [(t, g) for t, g in pairs if g is not None and t.requires_grad], carry, restarts)

    def _pull(self, run: _Run, pairs: list[tuple[Tensor, Tensor]], carry: Any, restarts: Any) -> None:
        """Pull cotangents back through a run."""
        carried, restarted = _tensors(carry), _tensors(restarts)
        wanted = [t for t in (*carried, *restarted, *self.loss.wrt) if t.requires_grad]
        found: dict[int, Tensor | None] = {}
        if pairs and wanted:
            outputs, cotangents = zip(*pairs, strict=True)
            # What the step uses may have a history that other runs go through too.
            grads = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True)
            found = {id(t): grad for t, grad in zip(wanted, grads, strict=True)}
        self.loss.add(found.get(id(w)) for w in self.loss.wrt)
        self.restarting(run.s, [found.get(id(t)) for t in restarted])
        grads_of_carry = [found.get(id(t)) for t in carried]
        if run.s == 0:
            pairs_of_first = zip(self.sent, grads_of_carry, strict=True)
            self.sent = [g if before is None else before if g is None else before + g for before, g in pairs_of_first]
        crosses = not self.reach.overlaps and self.reach.crosses(run.a)
        self.adjoint = grads_of_carry if crosses else []

    def _policy(self, run: _Run) -> _OfRun:
        factors, reach = self.factors, None if self.reach.overlaps else self.reach.on(run.a, run.b)
        return _OfRun(reach or self.reach, None if factors is None else factors[run.s : run.b])

    def _scan(self, steps: StepsOfRun, carry: Any, n: int, policy: policies.Policy) -> tuple[Any, Any]:
        return scan(
            self.step, carry, steps.xs, length=n, gradient=policy, resets=steps.resets, reset_state=steps.restarts,
            kernel=self.kernel,
        )  # fmt: skip


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _leaf(t: Tensor, wanted: bool) -> Tensor:
    return t.detach().requires_grad_(wanted and differentiable(t))


def _detached(tree: Any) -> Any:
    """Copies: a carry may lie in the memory of all carries of a run."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), tree)
