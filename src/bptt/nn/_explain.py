"""`explain`: what a layer or a step would do with x, and why."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..engine import Stack
from ..kernels import Layer
from ..kernels import explain as explain_layer
from ..memory import Checkpoints
from ..scan.explanation import StepExplanation, explain_scan, explain_step
from ..scan.pytrees import Step
from ._autocast_cells import in_float32, result_dtype
from .call import Call, net_of, program
from .flat import Flat, is_flat
from .layers import DropInLayer
from .recurrent import Recurrent

__all__ = ["explain"]


@overload
def explain(
    subject: Recurrent, carry: Tensor | PackedSequence, *, cu_seqlens: Tensor | None = None
) -> StepExplanation: ...
@overload
def explain(subject: Layer, carry: Tensor | PackedSequence, *, cu_seqlens: Tensor | None = None) -> str: ...
@overload
def explain(subject: Recurrent, *, x: Tensor | PackedSequence, cu_seqlens: Tensor | None = None) -> StepExplanation: ...
@overload
def explain(subject: Layer, *, x: Tensor | PackedSequence, cu_seqlens: Tensor | None = None) -> str: ...
@overload
def explain(subject: Step, carry: Any, x: Any) -> StepExplanation: ...
def explain(subject: Any, carry: Any = ..., x: Any = ..., *, cu_seqlens: Tensor | None = None) -> str | StepExplanation:
    """Tell what a call would do, and why: `explain(layer, x)` of a layer, `explain(step, carry, x)` of a scan's step.

    Of a layer of bptt.nn, with x as it takes it, and cu_seqlens beside a flat one: the kernel that it runs, what it
    keeps, how far gradients reach. Under `torch.no_grad()` it tells of a call without a gradient, else of one with.

    Of a step `(carry, x) -> (carry, y)`, with the carry and one step's x, `[B, ...]`, as the step gets them; and of a
    `bptt.nn.Recurrent` of one direction, with x as it takes it: how `scan` compiles the step. A step is traced once for
    each kind of call, and split into what is computed for all steps at once before the walk through time (hoisted),
    step by step (the core, forward and adjoint), and for all steps at once after it (deferred). Printed, the
    `StepExplanation` that is returned shows the kernel that runs the core, and why that one; each part, an operation a
    line, with the line of the step's code that it came from, where that is known; what the forward pass keeps for the
    adjoint; and which tensors the step captures, by how its code reaches them. `[R, ...]` are sizes with R rows: those
    of one step in the core forward, of all steps in hoisted and deferred parts, of all blocks of a policy in the
    adjoint. Of a step that cannot be traced it says that the step itself is run, for which operation, in which line.

    The step is traced here, where it is not yet, by being called a few times, and the trace is kept for `scan`. Of a
    step alone it tells what kernel="auto" does in calls of 8 steps or more; of a Recurrent, what this call does. What a
    first call finds by comparing the step with its trace cannot be told before it.

    Raises TypeError for arguments that are none of these and for an x of Python values, ValueError for x of another
    feature size and for a bidirectional Recurrent, TypeError and ValueError for a carry as `scan` does, and
    RuntimeError where a named kernel would.

    >>> import torch, bptt
    >>> print(bptt.explain(bptt.nn.GRU(3, 5, kernel="eager", gradient="chunked:4"), torch.zeros(7, 2, 3)))
    kernel 'eager' for gru, torch.float32 on cpu: named by kernel=
    keeps states and gates: memory='auto', the gates take 1,120 bytes
    gradient chunked:4

    >>> W = torch.ones(3, 4, requires_grad=True)
    >>> def step(h, x):
    ...     h = h + 0.1 * (torch.tanh(x @ W) - h)
    ...     return h, h
    >>> print(bptt.explain(step, torch.zeros(2, 4), torch.zeros(2, 3)))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    kernel 'interpreter' (...) for a traced step on 2 rows, torch.float32 on cpu: the most preferred of the kernels ...
    hoisted: for all steps at once, before the walk
        mm [R, 4] = x @ W       ...
    core forward: step by step
        tanh [R, 4] = tanh(mm)  ...
        sub [R, 4] = tanh - carry ...
        mul [R, 4] = sub * 0.1  ...
        add [R, 4] = carry + mul ...
        next carry = add
        y = add
    ...
    captured: W [3, 4]

    >>> print(bptt.explain(lambda h, x: (h * x.mean().item(), h), torch.zeros(2, 4), torch.zeros(2, 4)))
    ... # doctest: +ELLIPSIS
    kernel 'replay', the step itself, on 2 rows, torch.float32 on cpu
    replayed: its Python code reads a value of a tensor ...
    """
    arguments = [argument for argument in (carry, x) if argument is not ...]
    a_layer = isinstance(subject, nn.Module) or not callable(subject)
    if isinstance(subject, Recurrent) or (a_layer and len(arguments) == 1):
        if len(arguments) != 1:
            raise TypeError(f"explain takes (layer, x) of a layer: got {len(arguments)} arguments after it")
        if not isinstance(subject, Recurrent):
            given = arguments[0]
            if is_flat(given, cu_seqlens):  # which run as a PackedSequence
                flat = Flat.of(type(subject).__name__, given, cu_seqlens)
                given = flat.values if flat.packed is None else flat.packed
            return explain_layer(subject, given, _segments(subject, given))
        if subject.bidirectional:
            raise ValueError(
                "explain is for a Recurrent of one direction: got a bidirectional one, which scans its cells one by one"
            )
        setting = f"gradient {subject.gradient}, memory={str(subject.memory)!r}"
        results = result_dtype(subject, arguments[0])
        if results is None:
            scan = subject.as_scan(arguments[0], cu_seqlens=cu_seqlens)
            return explain_scan(*scan, kernel=subject.kernel, setting=setting)
        setting += f", autocast makes results {results}"
        with torch.autocast("cpu", enabled=False):
            scan = subject.as_scan(in_float32(arguments[0]), cu_seqlens=cu_seqlens)
            return explain_scan(*scan, kernel=subject.kernel, setting=setting)
    if len(arguments) != 2:
        kind = type(subject)
        raise TypeError(
            "explain takes (layer, x) of a layer of bptt.nn, or (step, carry, x) of a step: got a "
            f"{kind.__module__}.{kind.__name__} and {len(arguments)} argument{'' if len(arguments) == 1 else 's'}"
        )
    if isinstance(subject, DropInLayer):
        raise TypeError(f"explain takes (layer, x) of a layer: got a {type(subject).__name__} and two arguments")
    if cu_seqlens is not None:
        raise TypeError("cu_seqlens is for explain(layer, x, cu_seqlens=...): got it with a step, whose x has one step")
    return explain_step(subject, carry, x)


def _segments(layer: Any, x: Tensor | PackedSequence) -> int:
    """How many segments of a call run again in its backward pass; 0 for a whole tape."""
    if not isinstance(layer, DropInLayer) or not isinstance(layer.memory, Checkpoints):
        return 0
    if not (x.data if isinstance(x, PackedSequence) else x).numel():
        return 0
    with torch.no_grad():
        call = Call.of(layer, x, None, None)
        net = net_of(layer, call, layer.gradient, differentiated=True, drops=False, xi=())
        keeper = program(layer, call, net)
        return 0 if isinstance(keeper, Stack) else len(keeper.segment_starts(call.x.shape[0])) - 1
