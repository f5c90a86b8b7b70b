"""Compiled steps: a step traced once, the cache of traces, and the checks that the step still does what was traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..engine import StepPlan
from ..kernels import StepChoice, choose_step
from ..memory import Memory
from ..policies import Reach
from ..steps import Guard, NotTraceable, SplitStep, TracedStep, counts_rows, origin, split, trace, without_history
from .arguments import Arguments, check_no_tensor_hidden
from .kept import Kept
from .leaked import refuse_gradients
from .pytrees import Form, differentiable, split_y
from .pytrees import split as split_tree
from .surroundings import Surroundings

__all__ = ["FEWEST_STEPS", "Compiled", "compiled_step"]

FEWEST_STEPS = 8
"""Steps from which on kernel="auto" traces a step: a trace takes as long as some hundred steps of a loop."""

MOST = 128
"""Kinds of calls whose traces are kept, for each module and for steps without one: the least recently used go first."""

MOST_PLANS = 64
"""Plans that one trace keeps, of calls of other lengths, policies or numbers of lanes."""

MOST_OF_A_KIND = 8
"""Traces of one step for calls of one kind: one that needs more, and uses each but once, is run itself."""

PATIENCE = 256
"""Calls in which such a step is run itself, before it is traced once more: what it reads may have come to rest."""


MOST_BYTES = 2**30
"""The largest graph that autograd keeps of a traced step: 1 GiB, by the size of all that it makes."""

OF_A_SPLIT = 4 / 3
"""What an operation of a split step takes, of one of the step as it is: Python runs it, on the way back too."""


@dataclass(eq=False)
class Compiled:
    """A traced step with what tells whether it is still the same step; or the reason why it has none.

    one_lane: it is traced for calls as `as_one_lane` makes them. whatever_rows: the reason has nothing to do with what
    counts as a row. calls: how often it was used; a real step is compared with it at the first call, and at every one
    whose number is a power of two. direct: what `direct` keeps of calls, by their kind. itself: see `as_it_is`, by
    whether calls are differentiated. tangents: what `tangents` keeps, by what moves. smooth: see `smoothness`; None
    where nobody has asked. missed: the calls since it was made, as the last of the most traces of a kind, that could
    use none of them.
    """

    guard: Guard | None
    reason: str | None
    traced: TracedStep | None = None
    parts: SplitStep | None = None
    y_form: Form | None = None
    one_lane: bool = False
    whatever_rows: bool = False
    calls: int = 0
    plans: dict[Hashable, StepPlan] = field(default_factory=dict)
    direct: dict[Hashable, Any] = field(default_factory=dict)
    itself: dict[bool, str | None] = field(default_factory=dict)
    tangents: dict[Hashable, Any] = field(default_factory=dict)
    smooth: bool | None = None
    missed: int = 0

    def plan(self, kernel: str, carry: Sequence[Tensor], reach: Reach, T: int, B: int, memory: Memory) -> StepPlan:
        """The plan of a call, known from an earlier one of its kind. Raises as `choice` and `StepPlan.of` do."""
        key = kernel, reach, T, B, memory
        found = self.plans.get(key)
        if found is None:
            assert self.parts is not None
            assert self.traced is not None
            core = self.choice(kernel, carry).kernel
            found = StepPlan.of(self.parts, core, reach, T, B, memory, self.traced.lanes)
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[key] = found
        return found

    def choice(self, name: str, carry: Sequence[Tensor]) -> StepChoice:
        """The kernel for its core, and why. Raises RuntimeError where a named one cannot compute it."""
        assert self.parts is not None
        return choose_step(name, self.parts, carry[0].device, self.parts.dtype)

    def as_it_is(self, kernel: str, carry: Sequence[Tensor], others: Sequence[Tensor]) -> str | None:
        """Why kernel="auto" leaves a call to the step itself and, differentiated, to autograd, where the graph of all
        steps may be kept; None where a kernel takes less time.

        others: xs, and the tensors that the step captures.
        """
        if kernel != "auto" or self.traced is None or self.parts is None:
            return None
        differentiated = torch.is_grad_enabled() and True in [t.requires_grad for t in (*carry, *others)]
        if differentiated not in self.itself:
            self.itself[differentiated] = self._as_it_is(carry, differentiated)
        return self.itself[differentiated]

    def _as_it_is(self, carry: Sequence[Tensor], differentiated: bool) -> str | None:
        assert self.traced is not None
        assert self.parts is not None
        choice = self.choice("auto", carry)
        if not choice.kernel.by_operations:
            return None
        parts, asked = self.parts.for_operations, self.traced.asked[0]
        split_asked = parts.forward.operations
        if differentiated:
            asked, split_asked = sum(self.traced.asked), split_asked + parts.adjoint.operations
        if split_asked * OF_A_SPLIT < asked:
            return None
        return (
            f"{choice.reason}; and as it is, its steps ask torch for {asked:g} operations each, split for "
            f"{split_asked:g}, which take a third longer"
        )

    @property
    def counts(self) -> bool:
        """Whether whole numbers are a part of its carry or of x."""
        return self.parts is not None and any(
            not self.parts.values[name].dtype.is_floating_point for name in (*self.parts.carry, *self.parts.x)
        )

    def graph_fits(self, T: int, B: int) -> bool:
        """Whether autograd may keep all that T steps of B lanes make."""
        assert self.parts is not None
        values = [v for v in self.parts.values.values() if v.rows]
        return T * B * sum(abs(v.rows) * prod(v.shape) * v.dtype.itemsize for v in values) <= MOST_BYTES

    def begins(self, carry: Sequence[Tensor]) -> bool:
        """Whether its code branches, on a first carry, as it did when it was traced."""
        return self.traced is None or self.traced.branches is None or self.other_way([c[None] for c in carry]) is None

    def other_way(self, states: Sequence[Tensor]) -> int | None:
        """The first step at which its code branches another way than in its trace; None where it does not.

        states: the carries that enter the steps `[T, B, ...]`.
        """
        if self.traced is None or self.traced.branches is None:
            return None
        return self.traced.branches.other_way(dict(zip(self.traced.carry, states, strict=True)))

    def obstacle(self, captured: Sequence[Tensor], B: int) -> str | None:
        """Why it is not run for a carry of B rows, though it may be for another; None where nothing speaks against it.

        captured: the tensors that the step captures now.
        """
        if self.reason is not None or self.traced is None or self.parts is None or self.y_form is None:
            return self.reason or "it cannot be traced"
        for t, lane, counted in zip(captured, self.traced.lanes, self.traced.counted, strict=True):
            if lane and len(t) != B:
                return f"a captured tensor has {len(t)} rows, and the carry {B}"
            if counted and not counts_rows(t, B):
                return "a captured tensor held the numbers of the rows when the step was traced, and does not now"
        return None

    def due(self) -> bool:
        """Whether a real step is to be compared in this call."""
        self.calls += 1
        return self.calls & (self.calls - 1) == 0


_KEPT: Kept[Compiled] = Kept(MOST)
"""Traces by the code of the step and the kind of the call."""


def compiled_step(
    given: Arguments, surroundings: Surroundings, one_lane: bool = True, whatever_it_takes: bool = False
) -> tuple[Compiled, tuple[Tensor, ...]]:
    """The traced step of a call, and the tensors that it captures now; the reason where it cannot be traced.

    one_lane: where rows are not independent, or there are none, the whole batch may be one lane. whatever_it_takes: it
    is traced anew as often as something that it reads is another.
    """
    found, captured = _entry(given, surroundings, False, whatever_it_takes)
    if found.reason is None or found.whatever_rows or not one_lane:
        return found, captured
    whole, others = _entry(given, surroundings, True, whatever_it_takes)
    return (whole, others) if whole.reason is None or not _shares_rows(given) else (found, captured)


def _shares_rows(given: Arguments) -> bool:
    """Whether carry and x look as if they had a row for each lane."""
    shapes = [*(c.shape for c in given.carry), *(x.shape[1:] for x in given.xs)]
    return all(shapes) and len({shape[0] for shape in shapes}) == 1


def _entry(
    given: Arguments, surroundings: Surroundings, one_lane: bool, whatever_it_takes: bool
) -> tuple[Compiled, tuple[Tensor, ...]]:
    """The traced step, or the reason, of rows or of one lane."""
    key = _key(given, surroundings, one_lane)
    if key is None:
        return Compiled(None, "its code cannot be told apart from that of other steps"), ()
    entries = _KEPT.at(given.step, key)
    for entry in entries:
        if entry.guard is not None and entry.guard.changed() is None and entry.begins(given.carry):
            captured = entry.guard.captured_by(given.step)
            if not isinstance(captured, str):
                return entry, captured
    if len(entries) >= MOST_OF_A_KIND:
        # One that was used before may be of another model, which is done perhaps.
        oldest = next((entry for entry in entries if entry.calls > 1), None)
        entries[-1].missed += 1
        if oldest is None and not whatever_it_takes and entries[-1].missed < PATIENCE:
            last = entries[-1]
            return Compiled(None, _given_up(entries), whatever_rows=last.reason is None or last.whatever_rows), ()
        entries.remove(oldest or entries[0])
    made, captured = _compile(given, surroundings, one_lane)
    if made.guard is not None:
        entries.append(made)
    return made, captured


def _given_up(entries: Sequence[Compiled]) -> str:
    """Why a step of which there are as many traces as may be is run itself."""
    each_time = f"it was traced {len(entries)} times, and something that it reads is another each time"
    found = entries[-1].reason
    return each_time if found is None else f"{found} ({each_time})"


def _key(given: Arguments, surroundings: Surroundings, one_lane: bool) -> Hashable | None:
    code = origin(given.step)
    first = 0 if one_lane else 1
    kinds = (
        tuple(_kind(t, t.shape[first:]) for t in given.carry),
        tuple((_kind(x, x.shape[first + 1 :]), x.requires_grad) for x in given.xs),
        one_lane,
    )
    forms = (given.carry_form, given.x_form) if not given.carry_form.values else None
    modes = (*surroundings.autocast.items(), surroundings.device, torch.get_default_dtype())
    key = code, kinds, forms, modes, torch.is_inference_mode_enabled()
    try:
        hash(code)
    except TypeError:
        return None
    return key


def _kind(t: Tensor, shape: torch.Size) -> Hashable:
    return shape, t.dim(), t.dtype, t.is_cpu or t.device


def _compile(given: Arguments, surroundings: Surroundings, one_lane: bool) -> tuple[Compiled, tuple[Tensor, ...]]:
    """A traced and split step, or the reason why there is none; the tensors that it captures now."""
    if any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in (*given.carry, *given.xs)):
        return _refused(given, "carry and xs hold tensors of another class than torch.Tensor"), ()
    if given.carry_form.values:
        return _refused(given, "the carry holds Python values"), ()
    if any(t.layout is not torch.strided for t in (*given.carry, *given.xs)):
        return _refused(given, "carry and xs hold sparse tensors"), ()
    if not any(map(differentiable, given.carry)):
        return _refused(given, "no tensor of the carry has a gradient"), ()
    try:
        read = Guard.of(given.step, ())
        obstacle = read.obstacle
        if read.wrapped:  # by a transform, and by another one in the next call
            return Compiled(None, "it captures a tensor that a transform of torch.func has wrapped"), ()
    except ValueError as error:  # of a lazy module, whose parameters have no shape yet
        return Compiled(None, str(error)), ()
    if obstacle is not None:
        return _refused(given, obstacle), ()
    forms: dict[str, Form] = {}
    try:
        with torch.inference_mode(False), surroundings.entered():
            x = [x[0].requires_grad_(x.requires_grad) for x in _first(given)]
            traced = trace(_call(given, forms), given.carry, x, one_lane, read.restoring())
        step, stand_ins = without_history(given.step)
        remembered = tuple(stand_ins.get(id(t), t) for t in traced.tensors)
        guard = Guard.of(step, remembered, traced.lanes)
        if guard.obstacle is not None:
            return _refused(given, guard.obstacle), ()
        kept = replace(traced, tensors=remembered)
        return Compiled(guard, None, kept, split(traced), forms["y"], one_lane), traced.tensors
    except NotTraceable as error:
        # What the step has kept of the trace has a history that ends in substitutes: no gradient goes through it.
        needed = any(t.requires_grad for t in error.left)
        refuse_gradients(list(error.left), [torch.zeros((), requires_grad=True, device="cpu")] if needed else ())
        if error.changing:
            warnings.warn(
                f"the step of bptt.scan cannot be told from one that keeps a state: {error}. It was called to be "
                "traced, and so that state has moved on before the first of its steps: keep it in the carry, or pass "
                "kernel='replay'",
                RuntimeWarning,
                stacklevel=2,
            )
        refused = _refused(given, str(error))
        refused.whatever_rows = error.whatever_rows
        return refused, ()


def _first(given: Arguments) -> list[Tensor]:
    return [x.detach()[:1].requires_grad_(x.requires_grad) for x in given.xs]


def _refused(given: Arguments, reason: str) -> Compiled:
    """The reason stays as long as the step does what it did when it was found."""
    return Compiled(Guard.of(without_history(given.step)[0], ()), reason)


def _call(
    given: Arguments, forms: dict[str, Form]
) -> Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """The step on the tensors of carry and x."""

    def call(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        result = given.step(given.carry_form.join(carry), given.x_form.join(x))
        if not isinstance(result, tuple) or len(result) != 2:
            raise NotTraceable("it does not return a pair (carry, y)")
        new, form = split_tree(result[0], given.carry_form)
        if form.spec != given.carry_form.spec or form.values or len(new) != len(carry):
            raise NotTraceable("the carry changes its structure")
        check_no_tensor_hidden(form)
        y, y_form = split_y(result[1], forms.get("y"))
        if y_form.values:
            raise NotTraceable("y holds Python values")
        forms["y"] = y_form
        return new, y

    return call
