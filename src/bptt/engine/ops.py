"""The stack as operators of torch, so that a compiler can put it into its graph.

`boundary.run` comes here where a graph is being traced (torch.compile, torch.export, make_fx) and nowhere else: a call
of the stack without operators takes less time. `bptt::stack_forward` is stage 1, `bptt::stack_backward` stages 3 and 4.
Their fake forms give shapes alone, of any symbolic T and B. All that is no tensor in a `Stack` arrives as text.

Legend: T steps, B lanes, P size of h, H hidden units, F gate values, L layers, D directions, S states of the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..kernels import KERNELS
from ..memory import Tapes
from ..policies import Policy, Randomized, Reach, parse
from .boundary import OPERATORS, Tensors, given
from .stack import Stack

__all__ = ["draw", "traceable"]

MODES = {cell: mode for mode, cell in CELLS.items()}

HELD = "Tensor[] masks, Tensor[] xi, Tensor[] resets, Tensor? lengths, str plan"
"""What a `Stack` holds: its tensors, and the rest as text."""

torch.library.define("bptt::stack_forward", f"(Tensor[] tensors, {HELD}, bool keep) -> Tensor[]")
torch.library.define(
    "bptt::stack_backward",
    f"(Tensor[] tensors, {HELD}, Tensor[] results, Tensor?[] cotangents, bool[] needs) -> Tensor[]",
)
torch.library.define("bptt::draw", "(Tensor uniform, str policy) -> Tensor")


def traceable(stack: Stack, tensors: Tensors) -> tuple[Tensor, ...]:
    """`run` through the operators: the outputs, differentiable once.

    Under torch.compile a second derivative raises RuntimeError, as torch's own compiled backward does.
    """
    keep = torch.is_grad_enabled() and any(given(t).requires_grad for t in tensors)
    plan = text(stack, keep and stack.tapes_gates(given(tensors[0]), stack.weights(tensors)))
    results = torch.ops.bptt.stack_forward(
        list(tensors), list(stack.masks), list(stack.xi), list(stack.resets), stack.lengths, plan, keep
    )
    series, *finals = results[: stack.outputs]
    outputs = (series[1:] if stack.directions == 1 else series, *finals)
    # The results are saved, the outputs may be written to; a compiler leaves out a copy that nobody writes to.
    return tuple([output.clone() for output in outputs]) if keep else outputs


OPERATORS[Stack] = traceable


def draw(policy: Policy, T: int, B: int) -> Tensor | None:
    """`policy.draw` while a graph is traced: the random numbers by torch in the graph, what becomes of them at once.

    A generator of the user's own is out of reach of a graph.
    """
    if type(policy) is not Randomized or policy.generator is not None or policy.p == 1 or T == 1:
        return policy.draw(T, B)
    return torch.ops.bptt.draw(torch.rand(T - 1, B, dtype=torch.float64, device="cpu"), str(policy))


# What is no tensor ----------------------------------------------------------------------------------------------------


def text(stack: Stack, with_gates: bool) -> str:
    """All of a stack but its tensors, which `plain` reads back."""
    reach = stack.reach
    return " ".join(
        [
            MODES[stack.cell],
            stack.kernel.name,
            str(stack.layers),
            str(stack.directions),
            str(stack.per_layer),
            str(stack.biased),
            str(reach.window),
            str(reach.every),
            str(reach.fenced),
            "gates" if with_gates else "states",
        ]
    )


def plain(plan: str) -> Stack:
    """The stack of a text, without tensors.

    >>> stack = plain("GRU eager 2 1 4 True 20 5 False states")
    >>> stack.layers, stack.reach
    (2, Reach(window=20, every=5, fenced=False))
    """
    return (_plain.__wrapped__ if torch.compiler.is_compiling() else _plain)(plan)  # a compiler warns of a cache


@lru_cache(maxsize=256)
def _plain(plan: str) -> Stack:
    cell, kernel, layers, directions, per_layer, biased, window, every, fenced, memory = plan.split()
    reach = Reach(_steps(window), _steps(every), fenced == "True")
    sizes = (int(layers), int(directions), int(per_layer))
    tapes: Tapes = "gates" if memory == "gates" else "states"
    return Stack(CELLS[cell], KERNELS[kernel], *sizes, biased == "True", reach, tapes)


def _steps(count: str) -> int | None:
    return None if count == "None" else int(count)


def _stack(held: Sequence[Any]) -> Stack:
    """The stack an operator was given, in the order of `HELD`."""
    masks, xi, resets, lengths, plan = held
    stack = plain(plan)
    if masks or xi or resets or lengths is not None:
        stack = replace(stack, masks=tuple(masks), xi=tuple(xi), resets=tuple(resets), lengths=lengths)
    return stack


# Results: the series y is a part of, the final states, and if kept the rest of the tape -------------------------------


def _joined(stack: Stack, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...], keep: bool) -> list[Tensor]:
    """(outputs, tape) without a tensor twice: a one-directional y is a part of the top layer's states."""
    if stack.directions == 2:
        return [*outputs, *tape] if keep else list(outputs)
    at = _top(stack, len(tape))
    return [tape[at], *outputs[1:], *((*tape[:at], *tape[at + 1 :]) if keep else ())]


def _parted(stack: Stack, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inverse of `_joined`."""
    series, finals, tape = results[0], results[1 : stack.outputs], tuple(results[stack.outputs :])
    if stack.directions == 2:
        return (series, *finals), tape
    at = _top(stack, len(tape) + 1)
    return (series[1:], *finals), (*tape[:at], series, *tape[at:])


def _top(stack: Stack, taped: int) -> int:
    """Where the top layer's states of h stand in the tape of a one-directional stack."""
    return taped - taped // stack.layers


def _cotangents(stack: Stack, cotangents: Sequence[Tensor | None]) -> Tensors:
    """The cotangents of the outputs, from those of the results."""
    series, *finals = cotangents[: stack.outputs]
    return (series if series is None or stack.directions == 2 else series[1:], *finals)


def _own(results: list[Tensor]) -> list[Tensor]:
    """The results as an operator may return them: dense from the start of a storage, and each in one of its own."""
    seen: set[int] = set()
    own = []
    for result in results:
        address = result.untyped_storage().data_ptr()
        shared = address in seen or result.storage_offset() > 0 or not result.is_contiguous()
        own.append(result.clone(memory_format=torch.contiguous_format) if shared else result)
        seen.add(address)
    return own


# The operators --------------------------------------------------------------------------------------------------------


def _forward(tensors: list[Tensor], *held_and_keep: Any) -> list[Tensor]:
    *held, keep = held_and_keep
    stack = _stack(held)
    with torch.no_grad():
        outputs, tape = stack.forward(tuple(tensors), keep=True)
        return _own(_joined(stack, outputs, tape, keep))


def _forward_fake(tensors: list[Tensor], *held_and_keep: Any) -> list[Tensor]:
    *held, keep = held_and_keep
    stack = _stack(held)
    x, weights = tensors[0], stack.weights(tuple(tensors))
    T, B, _ = x.shape
    K = stack.layers * stack.directions
    units = [weights[0].hh.shape[1], weights[0].hh.shape[0] // stack.cell.gates_per_unit][: stack.cell.states]
    states = [x.new_empty(T + 1, B, size) for size in units]
    outputs = (x.new_empty(T, B, stack.directions * units[0]), *(x.new_empty(K, B, size) for size in units))
    tape: list[Tensor] = []
    for k in range(K):
        tape += states[1:] if stack.directions == 2 and k >= K - 2 else states
        if stack.tapes_gates(x, weights):
            tape.append(x.new_empty(T, B, stack.cell.taped(weights[k])))
    return [torch.empty_like(result) for result in _joined(stack, outputs, tuple(tape), keep)]


def _backward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *held, results, cotangents, needs = rest
    stack = _stack(held)
    with torch.no_grad():
        outputs, tape = _parted(stack, results)
        grads = stack.backward(tuple(tensors), outputs, tape, _cotangents(stack, cotangents), tuple(needs))
        return _own([given(grad) for grad, need in zip(grads, needs, strict=True) if need])


def _backward_fake(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors, rest[-1], strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, masks, xi, resets, lengths, plan, _ = inputs
    stack = plain(plan)
    ctx.plan, ctx.sizes = plan, (len(tensors), len(masks), len(xi), len(resets), 1)
    ctx.mark_non_differentiable(*output[stack.outputs :])
    ctx.save_for_backward(*tensors, *masks, *xi, *resets, lengths, *output)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    saved, parts = list(ctx.saved_tensors), []
    for size in ctx.sizes:
        parts.append(saved[:size])
        saved = saved[size:]
    tensors, masks, xi, resets, (lengths,) = parts
    held = (masks, xi, resets, lengths, ctx.plan)
    stack, needs = _stack(held), ctx.needs_input_grad[0]
    grads: Sequence[Tensor | None]
    if torch.is_grad_enabled():  # to be differentiated again, which the operator cannot be
        outputs, _ = _parted(stack, saved)
        grads = stack.backward(tuple(tensors), outputs, None, _cotangents(stack, cotangents), tuple(needs))
    else:
        some = iter(torch.ops.bptt.stack_backward(tensors, *held, saved, cotangents[: stack.outputs], list(needs)))
        grads = [next(some) if need else None for need in needs]
    return list(grads), [None] * len(masks), [None] * len(xi), [None] * len(resets), None, None, None


def _draw(uniform: Tensor, policy: str) -> Tensor:
    chosen = parse(policy)
    assert isinstance(chosen, Randomized)
    return chosen.weights(uniform)


def _draw_fake(uniform: Tensor, policy: str) -> Tensor:
    return uniform.new_empty(uniform.shape[0] + 1, uniform.shape[1])


for name, function, fake in (
    ("bptt::stack_forward", _forward, _forward_fake),
    ("bptt::stack_backward", _backward, _backward_fake),
    ("bptt::draw", _draw, _draw_fake),
):
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)
torch.library.register_autograd("bptt::stack_forward", _pull, setup_context=_setup)
