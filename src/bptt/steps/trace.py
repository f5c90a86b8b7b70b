"""A trace of a step: the step and its vector-Jacobian product as one graph of aten operations on rows.

The step runs on a number of rows that no other size in it shares, and once more on another number: sizes that differ
count rows, and anything else that differs says that the step is not the same for every number of rows.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.fx import Node
from torch.utils import _python_dispatch

from .checks import nan_where_failed
from .lines import raised_at
from .one_row import OneRow, as_rows
from .recorder import NotTraceable, Recorder
from .substitutes import Seen, Substitutes, repeated
from .traced import Recorded, TracedStep, check_same_again, merged

__all__ = ["Tensors", "trace"]

Tensors = Sequence[Tensor]

StepCall = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""A step as a function of the tensors of carry and x to those of the new carry and y."""

MOST_DOUBTFUL = 6
"""Captured tensors of one row of which it is tried, one after the other, whether they do without lanes."""

_ROWS = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
"""Numbers of rows to trace with: primes, so that a size that is a multiple of one is one of rows."""


def trace(
    step: StepCall, carry: Tensors, x: Tensors, one_row: bool = False, restore: Callable[[], None] = lambda: None
) -> TracedStep:
    """The trace of a step of rows: of carry and x, every tensor `[B, ...]`.

    one_row: a row is all that the step is given, whatever the shapes: the trace is one of carry and x `[1, ...]`.
    restore: what puts back what the step has left where nobody reads it.

    Raises NotTraceable with the reason where it is no graph that is the same for any number of rows.
    """
    if not carry:
        raise NotTraceable("the carry holds no tensor")
    if one_row:
        step, carry, x = OneRow(step), as_rows(carry), as_rows(x)
    sizes = {t.shape[0] if t.dim() else None for t in (*carry, *x)}
    if len(sizes) != 1 or sizes <= {None, 0}:
        raise NotTraceable(f"carry and x do not share one first dimension: {[list(t.shape) for t in (*carry, *x)]}")
    B = sizes.pop()
    assert B is not None
    counts, distinct = _row_counts((*carry, *x)), None

    def attempt(lanes: frozenset[int], seen: Seen) -> TracedStep:
        first, second = counts
        try:
            with _AS_WRITTEN:
                a, left = _record(step, carry, x, first, lanes, seen)
            restore()
            _check_left(left)
            with _AS_WRITTEN:
                b, left = _record(step, carry, x, second, lanes, seen)
            restore()
            _check_left(left)
            before = a.operations()
            try:
                return merged(a, b, lanes)
            except NotTraceable as error:
                if not error.whatever_rows:
                    again, left = _record(step, carry, x, first, lanes, seen)
                    _check_left(left)
                    check_same_again(before, again.operations())
                raise
        except NotTraceable:
            restore()
            raise

    lanes, blamed, reason = frozenset[int](), True, NotTraceable("")
    while True:
        seen = Seen(B)
        try:
            found = attempt(lanes, seen)
            return found if blamed or B > 1 else _fewest_lanes(found, lanes, lambda some: attempt(some, Seen(B)))
        except NotTraceable as error:
            if error.left:
                raise
            distinct = distinct or _row_counts((*carry, *x, *seen.captured))
            if counts != distinct:  # a number of rows may have been taken for a captured tensor's size
                counts = distinct
                continue
            reason = error if blamed else reason  # else it may be one of the lanes that are tried
        # Captured tensors of as many rows as there are lanes may have one for each: those that did not fit as they are,
        # then all that are no parameters, then all. One that is not met again is another each time: the step makes it
        # where no mode sees it.
        if not lanes <= {id(t) for t in seen.captured}:
            raise reason
        more = lanes | seen.at_fault
        blamed = more != lanes
        if not blamed:
            every = [t for t in seen.captured if seen.may_have_lanes(t)]
            more = lanes | {id(t) for t in every if not isinstance(t, torch.nn.Parameter)}
            if more == lanes:
                more = lanes | {id(t) for t in every}
        if more == lanes:
            raise reason
        lanes = more


def _fewest_lanes(
    found: TracedStep, lanes: frozenset[int], attempt: Callable[[frozenset[int]], TracedStep]
) -> TracedStep:
    """A trace in which no captured tensor has lanes that can do without: one row may also be the same for all lanes.

    found: one in which all of `lanes` have. attempt: a trace with some of them.
    """
    for t in sorted(lanes) if 1 < len(lanes) <= MOST_DOUBTFUL else ():
        try:
            found = attempt(lanes - {t})
            lanes -= {t}
        except NotTraceable as error:
            if error.left:
                raise
    return found


def _row_counts(tensors: Tensors) -> tuple[int, int]:
    sizes = {s for t in tensors for s in t.shape}
    free = [p for p in _ROWS if not any(s and s % p == 0 for s in sizes)]
    return (free[0], free[1]) if len(free) > 1 else (53, 59)


class _AsWritten:
    """A context in which what torch.compile has wrapped runs as it was written, in all threads.

    The compiler's stance belongs to the process. The first of the traces that overlap sets it, the last one puts back
    what was there: if each put back what it had found, one that began later would leave the compiler switched off. The
    same holds of the flags by which torch knows that a dispatch mode is active, and of torch 2.8 the compiler stops at.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.stance: Any = None
        self.flags: dict[str, bool] = {}

    def __enter__(self) -> None:
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:  # else nothing has been compiled
                self.stance = torch.compiler.set_stance("force_eager")
            if self.inside == 0:
                self.flags = {
                    name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")
                }
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None
            if self.inside == 0:
                vars(_python_dispatch).update(self.flags)


_AS_WRITTEN = _AsWritten()


# One trace ------------------------------------------------------------------------------------------------------------


def _check_left(made: list[weakref.ref[Tensor]]) -> None:
    """Raise NotTraceable where tensors of a trace that is over are still there: the step has kept them."""
    if any(ref() is not None for ref in made):
        gc.collect()  # some may be held by circles alone
    left = tuple(t for ref in made if (t := ref()) is not None)
    if left:
        error = NotTraceable(f"it keeps a tensor that it makes ({_kind(left[0])})")
        error.left = left
        raise error


def _record(
    step: StepCall, carry: Tensors, x: Tensors, R: int, lanes: frozenset[int], seen: Seen
) -> tuple[Recorded, list[weakref.ref[Tensor]]]:
    recorder = Recorder()

    def entered(kind: str, tensors: Tensors, wanted: Callable[[Tensor], bool]) -> list[Tensor]:
        made = [repeated(t, R).requires_grad_(wanted(t) and _differentiable(t)) for t in tensors]
        for i, t in enumerate(made):
            recorder.enter(t, f"{kind}_{i}")
        return made

    cs, xs = entered("carry", carry, lambda t: True), entered("x", x, lambda t: t.requires_grad)
    substitutes = Substitutes(recorder, lanes, R, seen)
    substitutes.one_row = isinstance(step, OneRow)
    substitutes.inside |= {id(t): t for t in (*cs, *xs)}
    try:
        with torch.random.fork_rng(_generators((*carry, *x))), torch.enable_grad(), recorder, substitutes:
            received = [c.clone() for c in cs], [t.clone() for t in xs]
            substitutes.given = [t for tensors in received for t in tensors]
            new, y = step(*received) if not isinstance(step, OneRow) else step.mapped(*received, substitutes.note)
    except NotTraceable:
        raise
    except Exception as error:
        if recorder.reason is not None:
            raise NotTraceable(recorder.reason, whatever_rows=True) from error
        if "vmap: It looks like you're" in str(error):
            raise NotTraceable("its Python code reads a value of a tensor", whatever_rows=True) from error
        raise NotTraceable(f"on {R} rows it raises {type(error).__name__}: {error}{raised_at(error)}") from error
    if recorder.reason is not None:
        raise NotTraceable(recorder.reason, whatever_rows=True)
    for kind, got, given in (("carry", new, carry), ("y", y, y)):
        for g, c in zip(got, given, strict=True):
            if kind == "carry" and (g.shape[1:] != c.shape[1:] or g.dtype != c.dtype or not g.dim() or len(g) != R):
                substitutes.blame([g])
                change = [_kind(t, n, substitutes.one_row) for t, n in ((c, len(c)), (g, R))]
                raise NotTraceable(f"the carry changes from {change[0]} to {change[1]}")
            if kind == "y" and (not g.dim() or len(g) != R):
                substitutes.blame([g])
                raise NotTraceable(f"y has no row for each lane: {_kind(g)} on {R} rows")
    if substitutes.asks and not all(c.requires_grad for c in new if _differentiable(c)):
        raise NotTraceable(
            "its Python code asks by `requires_grad` whether gradients are recorded, and a part of its carry has none"
        )
    recorded = _with_gradients(recorder, substitutes, R, (cs, xs), (new, y))
    substitutes.inside.clear()
    return recorded, recorder.release()


def _with_gradients(
    recorder: Recorder, substitutes: Substitutes, R: int, given: tuple[Tensors, Tensors], made: tuple[Tensors, Tensors]
) -> Recorded:
    """The recorded step with its vector-Jacobian product."""
    (cs, xs), (new, y) = given, made
    forward = recorder.asked - len(cs) - len(xs)  # of which the first are copies
    with recorder:
        values = [list[Node | None](recorder.node(t) for t in tensors) for tensors in made]
    drawn, checks = len(recorder.draws), list(recorder.checks)
    opaque = [t for t, _ in recorder.captured if t.requires_grad and substitutes.made_for(t) is None]
    for t in opaque:
        if not t.is_leaf or t._backward_hooks:
            raise NotTraceable("a call that cannot be looked into takes a captured tensor with a history or with hooks")
    names: dict[str, list[str | None]] = {"adjoint": [], "dy": []}
    outs, cotangents = list[Tensor](), list[Tensor]()
    for kind, tensors in (("adjoint", new), ("dy", y)):
        for i, t in enumerate(tensors):
            wanted = t.requires_grad and _differentiable(t)
            names[kind].append(f"{kind}_{i}" if wanted else None)
            if wanted:
                cotangent = t.detach().clone()
                recorder.enter(cotangent, f"{kind}_{i}")
                outs.append(t)
                cotangents.append(cotangent)
    inputs = [t for t in (*cs, *xs, *(t for t, _ in recorder.captured)) if t.requires_grad]
    found: dict[int, Tensor] = {}
    if outs and inputs:
        try:
            with recorder, substitutes:  # which what runs again in the gradient meets too
                # torch.autograd.grad loads sympy for the shapes of cotangents, which takes a second.
                grads = _engine_run_backward(
                    tuple(outs), tuple(cotangents), False, False, tuple(inputs), True, accumulate_grad=False
                )
        except RuntimeError as error:
            raise NotTraceable(recorder.reason or f"its gradient cannot be recorded: {error}") from error
        found = {id(t): g for t, g in zip(inputs, grads, strict=True) if g is not None}
        if any(t.requires_grad and not any(t is i for i in inputs) for t, _ in recorder.captured):
            raise NotTraceable("its gradient reads a captured tensor that the step itself does not")
    # What a loop adds up, step by step, a trace leaves to the end.
    back = recorder.asked - len(cs) - len(xs) - forward + sum(id(t) in found for t, _ in recorder.captured)
    if recorder.reason is not None:
        raise NotTraceable(recorder.reason, whatever_rows=True)
    if recorder.branches and drawn:
        raise NotTraceable("its Python code reads a value of a tensor, and draws random numbers", whatever_rows=True)
    if len(recorder.draws) > drawn:
        raise NotTraceable("its gradient draws random numbers", whatever_rows=True)

    def gradients(tensors: Tensors) -> list[Node | None]:
        return [recorder.node(found[id(t)]) if id(t) in found else None for t in tensors]

    captured = [
        (t if (original := substitutes.made_for(t)) is None else original, node.name) for t, node in recorder.captured
    ]
    on, dx = gradients(cs), [*gradients(xs), *[None] * drawn]
    for i, (node, t) in enumerate(zip(on, new, strict=True)):
        if node is not None and names["adjoint"][i] is None:
            # Ys alone send something to this leaf, whose next one has no gradient: what goes on to the step before is
            # lost there, but for the first step's.
            names["adjoint"][i] = f"adjoint_{i}"
            recorder.graph.placeholder(f"adjoint_{i}").meta["tensor"] = t.shape, t.dtype
    dcaptured = gradients([t for t, _ in recorder.captured])
    nan_where_failed(recorder.graph, checks, R, values[1])
    branches: list[Node | None] = [node for node, _, _ in recorder.branches]
    outputs = [*values, on, dx, dcaptured, list(recorder.probabilities), branches]
    constants = [bool(node.meta.get("constant")) for _, node in recorder.captured]
    recorder.graph.output([list(part) for part in outputs])
    decided = tuple((kind, value) for _, kind, value in recorder.branches)
    return Recorded(
        R, recorder.graph, names["adjoint"], names["dy"], captured, constants, bool(opaque), decided,
        bool(checks), substitutes.asks, (forward, back), substitutes.written_to,
    )  # fmt: skip


def _generators(tensors: Tensors) -> list[int]:
    """The devices whose random generators a step may use."""
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def _differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _kind(t: Tensor, R: int | None = None, one_row: bool = False) -> str:
    """A tensor's dtype and shape, as whoever wrote the step knows it: `[B, ...]`, or without the row of a trace."""
    sizes = list(t.shape[1:]) if one_row else ["B" if size == R else size for size in t.shape]
    return f"{str(t.dtype).removeprefix('torch.')} [{', '.join(map(str, sizes))}]"
