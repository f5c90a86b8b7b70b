"""The monitor of steps as they run: what their replay in backward will need, and what would make it differ."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from ..engine import refuse_tangents
from .leaked import refuse_gradients
from .located import located
from .pytrees import Form, Step, differentiable, fresh, tensors_in
from .replay import READS_GRADIENT, Replay, Visit
from .surroundings import GeneratorStates, Surroundings, generator_states, random_kept

__all__ = ["StepMonitor", "complete", "hidden"]

# What a tensor made inside a step depends on, from least to most; one without a note depends on the most.
_STEADY = 0
"""On nothing that differs between steps: a table, a mask whose shape alone comes from the carry."""
_VARYING = 1
"""On values that differ between steps, but that get no gradient."""
_DIFFERENTIABLE = 2
"""On the carry, on an x that requires grad, or on a captured tensor that does."""


class _Statistics(NamedTuple):
    """The places of a normalisation's arguments: its running statistics, and whether to use the batch's instead."""

    mean: int
    training: int
    name: str
    default: bool

    def updated(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The running statistics that a call writes to, without raising their version, and does not read."""
        training = args[self.training] if len(args) > self.training else kwargs.get(self.name, self.default)
        given = [*args[self.mean : self.mean + 2], kwargs.get("running_mean"), kwargs.get("running_var")]
        return [t for t in given if isinstance(t, Tensor)] if training else []


_SPECIAL: dict[Any, _Statistics | int] = {
    functional.batch_norm: _Statistics(1, 5, "training", False),
    functional.instance_norm: _Statistics(1, 5, "use_input_stats", True),
    torch.batch_norm: _Statistics(3, 5, "training", False),
    torch.instance_norm: _Statistics(3, 5, "use_input_stats", False),
    **dict.fromkeys((torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like), 0),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), 0),
    **dict.fromkeys((Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_empty_strided), 0),
    **dict.fromkeys((Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to), 1),
}
"""Normalisations; and functions of shapes, types and devices, with the number of tensors whose values count too."""

_SETS_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]  # a property of the class; to mypy, a tensor
_NOTHING: frozenset[int] = frozenset()


class _Made(NamedTuple):
    """A tensor that outlived the step it was made in. call: what made it; None for part of that step's carry or x."""

    ref: weakref.ref[Tensor]
    call: Any
    step: int
    level: int


class StepMonitor(TorchFunctionMode):
    """A function mode that runs steps without recording them, and notes what a replay will need.

    captured: tensors that require grad, and come neither from carry and x nor from inside the step.
    written: other tensors from outside that a step wrote to in place (the running statistics of a batch norm).
    states: for each monitored step, the random generators' states before it, or None if it drew no numbers.
    overwrites: a step wrote to its carry or x in place.
    bytes: the size of what the first step made, views aside.
    fault: in words, how the steps pass something to later steps outside of the carry; None where they do not. A replay
        would find there what the last step left, and autograd no path through it.

    A step passes on what it made by keeping the tensor or by writing to one from outside. A tensor that an earlier step
    made is a fault when a step uses it, unless its values are the same for every step: what a step makes once from
    nothing but shapes and constants (a table of positions, a mask for all steps) is a cache. A tensor from outside that
    steps write to is a fault when carry or y is computed from it: statistics that are only updated are not a fault.
    """

    def __init__(self, step: Step, devices: Iterable[torch.device], xs: Sequence[Tensor]) -> None:
        super().__init__()
        self.step = step
        self.captured: dict[int, Tensor] = {}
        self.written: dict[int, Tensor] = {}
        self.states: list[GeneratorStates | None] = []
        self.overwrites = False
        self.bytes = 0
        self.fault: str | None = None
        self._steady_xs = [not x.requires_grad for x in xs]
        self._latest = generator_states(devices)
        # Notes of the present step. They hold the tensors, not only their ids, which another tensor could take over.
        self._inside: dict[int, tuple[Tensor, Any]] = {}
        self._levels: dict[int, int] = {}
        self._reads: dict[int, frozenset[int]] = {}  # outside tensors without gradient that a value comes from
        self._outside: dict[int, Tensor] = {}  # those that the closure holds
        self._met: dict[int, tuple[Tensor, int]] = {}  # those without gradient, and their versions before
        # Notes of the latest step.
        self._t = -1
        self._latest_made: list[tuple[weakref.ref[Tensor], Any, int]] = []
        # Notes of all steps.
        self._earlier: dict[int, _Made] = {}
        self._tables: dict[Any, int] = {}
        self._first_read: dict[int, Tensor] = {}

    def call(self, t: int, carry: Any, x: Any) -> Any:
        """Run step t and return its result."""
        self._keep()
        if t != self._t + 1:  # the steps between were not monitored
            self._latest = generator_states(self._latest)
        self._t = t
        carried, given = tensors_in(carry), tensors_in(x)
        received = [*carried, *given]
        versions = list(map(_version, received))
        self._inside = {id(t): (t, None) for t in received}
        steady = [*([False] * len(carried)), *self._steady_xs]
        self._levels = {id(t): _VARYING for t, s in zip(received, steady, strict=True) if s or not differentiable(t)}
        self._reads, self._met, self._outside = {}, {}, {}
        with self:
            result = self.step(carry, x)
        self.overwrites |= versions != list(map(_version, received))
        self._leave(tensors_in(result))
        before, self._latest = self._latest, generator_states(self._latest)
        drew = any(not torch.equal(state, before[device]) for device, state in self._latest.items())
        self.states.append(before if drew else None)
        return result

    def replay(self, carry: Sequence[Form], x: Form, y: Form, surroundings: Surroundings) -> Replay:
        """The replay of the steps so far. carry, x: the forms of what entered each step. y: the form of each y."""
        # The wrappers of torch.func's transforms came and went inside a step.
        captured = tuple(t for t in self.captured.values() if not torch._C._functorch.is_functorch_wrapped_tensor(t))
        written = tuple(self.written.values())
        return Replay(self.step, carry, x, y, captured, written, self.states, surroundings, self.overwrites)

    def holds(self, level: int = _STEADY) -> bool:
        """Whether anything that the steps made, and that depends on as much as `level`, is still held by someone.

        The results of the latest step must have been released.
        """
        self._keep()
        return any(made.level >= level and made.ref() is not None for made in self._earlier.values())

    def leaks(self) -> bool:
        """Whether anything is still held by someone that would have had a gradient, had the steps been recorded."""
        return self.holds(_DIFFERENTIABLE)

    def leaked(self) -> list[Tensor]:
        """Tensors that steps made, that are still held by someone, and that would have had a gradient."""
        self._keep()
        made = [(entry.level, _alive(entry.ref)) for entry in list(self._earlier.values())]
        self._earlier.clear()
        return [
            t
            for level, t in made
            if t is not None
            and level == _DIFFERENTIABLE
            and differentiable(t)
            and not t.requires_grad
            and not t.is_inference()
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside, outside = self._inside, self._outside
        tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        for t in tensors:
            if id(t) not in inside and id(t) not in outside:
                self._meet((t,))
        if func == READS_GRADIENT and id(args[0]) in outside:
            return func(*args)  # as much from outside as what has it
        special = _SPECIAL.get(func)
        updated: Sequence[Tensor] = ()
        counted = tensors
        if special is not None:
            if isinstance(special, int):
                counted = tensors[:special]
            else:
                updated = special.updated(args, kwargs)
        level = self._level(counted)
        reads = self._read(counted, list(map(id, updated))) if self.written or not self.states else _NOTHING
        result = func(*args, **kwargs)
        if updated:
            self._write(updated)
        if isinstance(result, Tensor):
            i = id(result)
            if i not in inside and i not in outside:
                inside[i] = result, func
                if level != _DIFFERENTIABLE:
                    self._levels[i] = level
                if reads:
                    self._reads[i] = reads
                return result
        if result is None:  # as of an assignment to a part, to the first argument
            self._write(args[:1] if func == _SETS_DATA else ())
            self._overwrite(args[:1], level, reads)
        else:
            for t in _tensors((result,)):
                i = id(t)
                if i in inside:
                    self._overwrite((t,), level, reads)
                elif i not in outside:
                    inside[i] = t, func
                    if level != _DIFFERENTIABLE:
                        self._levels[i] = level
                    if reads:
                        self._reads[i] = reads
        return result

    def _level(self, tensors: Sequence[Tensor]) -> int:
        """The level of a value computed from these tensors: what it depends on."""
        level, inside, levels = _STEADY, self._inside, self._levels
        for t in tensors:
            i = id(t)
            if i in inside:
                own = levels.get(i, _DIFFERENTIABLE)
            elif t.requires_grad:
                return _DIFFERENTIABLE
            else:
                own = _VARYING if i in self._earlier else _STEADY
            if own == _DIFFERENTIABLE:
                return own
            if own > level:
                level = own
        return level

    def _overwrite(self, tensors: Sequence[Any], level: int, reads: frozenset[int]) -> None:
        """Note the level and the reads of tensors that a call wrote to, or returned as they were."""
        for t in _tensors(tensors):
            i = id(t)
            if i in self._levels:
                self._levels[i] = max(level, self._levels[i])
            if reads:
                for written in (t, t._base):
                    if written is not None and id(written) in self._inside:
                        self._reads[id(written)] = self._reads.get(id(written), _NOTHING) | reads

    def _write(self, tensors: Sequence[Tensor]) -> None:
        """Note tensors from outside that a call wrote to without raising their version."""
        self.written |= {id(t): t for t in tensors if id(t) in self._met}

    def _meet(self, outside: Sequence[Tensor]) -> None:
        """Note tensors that a step received through its closure."""
        refuse_tangents("a tensor that the step of bptt.scan captures", outside)
        for t in outside:
            i = id(t)
            self._outside[i] = t
            if t.requires_grad:
                self.captured.setdefault(i, t)
            elif i not in self._met:
                self._met[i] = t, _version(t)
            made = self._earlier.get(i)
            if made is not None and made.ref() is t and self.fault is None:
                self._receive(t, made)

    def _receive(self, t: Tensor, made: _Made) -> None:
        """Decide whether a tensor that an earlier step made is a cache or a fault."""
        if made.level == _STEADY:
            # Made once and used from then on: a cache. Another one in its place: what a step hands to the next.
            table = made.call, t.shape, t.dtype
            if self._tables.setdefault(table, made.step) == made.step:
                return
        by = "received" if made.call is None else f"made by {resolve_name(made.call) or made.call}"
        self.fault = f"step {self._t} uses {self._named(t)}, which step {made.step} {by}"

    def _read(self, counted: Sequence[Tensor], unread: Sequence[int]) -> frozenset[int]:
        """The tensors from outside without gradient that the values of a call's results come from."""
        reads = _NOTHING
        for i in map(id, counted):
            if i in self._reads:
                reads |= self._reads[i]
            elif i in self._met and i not in unread:
                reads |= {i}
        return reads

    def _leave(self, result: Sequence[Tensor]) -> None:
        """Finish a step. result: the tensors of its carry and y."""
        self._meet([t for t in result if id(t) not in self._inside])
        for i, (t, version) in self._met.items():
            if _version(t) != version:
                self.written[i] = t
        read = {i for t in result for i in self._reads.get(id(t), (id(t),)) if i in self._met}
        if not self.states:
            self._first_read = {i: self._met[i][0] for i in read}
            self.bytes = sum(
                t.nbytes for t, _ in self._inside.values() if t.layout is torch.strided and t._base is None
            )
        if self.written and self.fault is None:
            for i, t in self.written.items():
                if i in read or i in self._first_read:
                    self.fault = f"carry and y come from {self._named(t)}, which the step writes to"
        levels = self._levels
        self._latest_made = [
            (weakref.ref(t), call, levels.get(i, _DIFFERENTIABLE)) for i, (t, call) in self._inside.items()
        ]
        self._inside, self._met, self._outside = {}, {}, {}

    def _keep(self) -> None:
        """Note which tensors of the latest step are still alive after its result was released."""
        made, self._latest_made = self._latest_made, []
        for ref, call, level in made:
            t = _alive(ref)
            if t is not None:
                i = id(t)
                forgotten = partial(self._earlier.pop, i)  # before its id is another tensor's
                self._earlier[i] = _Made(weakref.ref(t, forgotten), call, self._t, level)

    def _named(self, t: Tensor) -> str:
        place = located(self.step, t)
        kind = f"a {str(t.dtype).removeprefix('torch.')} tensor {list(t.shape)}"
        return kind if place is None else f"{place}, {kind}"


def complete(
    replay: Replay, carry: list[Tensor], xs: list[Tensor], inputs: Sequence[Tensor]
) -> tuple[Replay, str | None]:
    """The replay with the captured tensors that the monitor could not see; and a fault in words, or None.

    The tensors are found in the graph of the last step, run again: the last, so that what a module keeps for itself
    stays as the forward left it. The fault is that a second run of it depends on what the first one left, in calls that
    the monitor could not see. carry: what enters the last step. inputs: those of the call, besides captured tensors.
    """
    T = len(replay.carry)
    values = [*carry, *(x[-1] for x in xs), *replay.captured]
    wanted = [*[True] * len(carry), *(x.requires_grad for x in xs), *[True] * len(replay.captured)]

    made: list[weakref.ref[Tensor]] = []

    def visited() -> Visit:
        return replay.visit(T - 1, list(map(fresh, values, wanted)), made)

    fault = None
    with random_kept(replay.states):
        visit = visited()
        found, opaque = visit.unseen(replay.captured)
        if T > 1 and (opaque or visit.calls_functions()) and visited().reaches(visit):
            fault = "a step uses, inside a call that cannot be looked into, a tensor that the step before made"
        # A leaf that the step itself made, to differentiate something inside, is none that it captured.
        inside = {id(_alive(ref)) for ref in made}
        found = [t for t in found if id(t) not in inside]
    del visit
    leaked = {id(t): t for t in map(_alive, made) if t is not None and t.requires_grad}
    made.clear()  # a tensor that is referred to weakly cannot be exchanged
    replay = replace(replay, captured=(*replay.captured, *found), opaque=opaque)
    refuse_gradients(list(leaked.values()), (*inputs, *replay.captured))
    return replay, fault


def hidden(fault: str) -> RuntimeError:
    """The error for a step with state outside of the carry."""
    return RuntimeError(
        f"{fault}: what a step hands to the next must be in the carry. Backward runs each step again, and would find "
        "the last state in its place, with no gradient through it. Take it from carry and return it there; or, where "
        "it is the same at every step, make it before the scan"
    )


def _alive(ref: weakref.ref[Tensor]) -> Tensor | None:
    """The tensor that ref refers to, or None. Not ref() alone: up to torch 2.8, what only C++ holds would be lost."""
    t = ref()
    if t is not None:
        t._fix_weakref()  # type: ignore[attr-defined]  # not in torch's stubs
    return t


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values, followed by those in nested tuples, lists and dicts."""
    found, todo = [], []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (tuple, list, dict)):
            todo.append(v)
    while todo:
        item = todo.pop()
        for v in item.values() if isinstance(item, dict) else item:
            if isinstance(v, Tensor):
                found.append(v)
            elif isinstance(v, (tuple, list, dict)):
                todo.append(v)
    return found
