"""The stack as operators of torch, so that a compiler can put it into its graph, and a mode can see it.

`boundary.run` comes here where a call is looked at (torch.compile, torch.export, jit.trace, make_fx, FlopCounterMode)
and nowhere else: a call of the stack without operators takes less time. `bptt::stack_forward` is stage 1,
`bptt::stack_backward` stages 3 and 4. Their fake forms give shapes alone, of any symbolic T and B. All that is no
tensor in a `Stack` arrives as text.

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
from ..memory import Checkpoints, Memory
from ..memory import parse as parse_memory
from ..policies import Policy, Randomized, Reach, parse
from .bothways import BothWays, taped
from .boundary import OPERATORS, PULLBACKS, Tensors, given
from .flops import announce, backward_flops, forward_flops
from .segments import Checkpointed
from .stack import Stack
from .tracing import recorder, refusal, refuse_onnx, refuse_recording

__all__ = ["draw", "through_operators"]

torch.library.define("bptt::stack_forward", "(Tensor[] tensors, str plan, bool keep) -> Tensor[]")
torch.library.define(
    "bptt::stack_backward",
    "(Tensor[] tensors, str plan, Tensor[] results, Tensor?[] cotangents, bool[] needs) -> Tensor[]",
)
torch.library.define("bptt::draw", "(Tensor uniform, str policy) -> Tensor")


def through_operators(stack: Stack, memory: Memory, tensors: Tensors) -> tuple[Tensor, ...]:
    """`run` of a stack with this tape policy through the operators: the outputs, differentiable.

    Under torch.compile a second derivative raises RuntimeError, as torch's own compiled backward does.
    """
    if not torch.compiler.is_compiling():
        announce(FORMULAS)
    recorded = recorder() is not None  # for calls with and without a gradient, of any size
    keep = not recorded and torch.is_grad_enabled() and any(given(t).requires_grad for t in tensors)
    if not recorded and not isinstance(memory, Checkpoints):
        memory = "gates" if keep and stack.tapes_gates(given(tensors[0]), stack.weights(tensors)) else "states"
    plan = text(stack, memory)
    results = torch.ops.bptt.stack_forward([*tensors, *held(stack)], plan, keep)
    outputs = (results[0][1:] if _has_series(stack, memory) else results[0], *results[1 : stack.outputs])
    # The results are saved, the outputs may be written to; a compiler leaves out a copy that nobody writes to.
    return tuple([output.clone() for output in outputs]) if keep else outputs


def _run(program: Stack | Checkpointed | BothWays, tensors: Tensors) -> tuple[Tensor, ...]:
    stack = program if isinstance(program, Stack) else program.stack
    return through_operators(stack, program.memory, tensors)


def _pulled(
    program: Stack | Checkpointed | BothWays,
    tensors: Tensors,
    outputs: tuple[Tensor, ...],
    tape: tuple[Tensor, ...],
    cotangents: Tensors,
    needs: tuple[bool, ...],
) -> Tensors:
    """`Program.backward` through the operator, of a call that did not go through one."""
    announce(FORMULAS)
    stack = program if isinstance(program, Stack) else program.stack
    memory = program.memory
    if not isinstance(memory, Checkpoints):
        memory = "gates" if stack.tapes_gates(given(tensors[0]), stack.weights(tensors)) else "states"
    dy, *rest = cotangents
    if dy is not None and _has_series(stack, memory):
        dy = torch.cat([torch.zeros_like(dy[:1]), dy])
    own = [given(t) for t in tensors]
    plan, more = text(stack, memory), held(stack)
    x, P = own[0], stack.weights(tensors)[0].hh.shape[1]
    # In the place of the outputs that are not kept, since nobody reads them: tensors of their shape.
    shapes = (x.new_empty(*x.shape[:2], stack.directions * P), *own[1 : stack.outputs])
    outputs = (*outputs, *shapes[len(outputs) :])
    results = _joined(_has_series(stack, memory), stack, outputs, tape, keep=True)
    wanted = [*needs, *[False] * len(more)]
    grads = iter(torch.ops.bptt.stack_backward([*own, *more], plan, results, [dy, *rest], wanted))
    return tuple(next(grads) if need else None for need in needs)


for kind in (Stack, Checkpointed, BothWays):
    OPERATORS[kind], PULLBACKS[kind] = _run, _pulled


def draw(policy: Policy, T: int, B: int) -> Tensor | None:
    """`policy.draw` while a graph is traced: the random numbers by torch in the graph, what becomes of them at once.

    A generator of the user's own is out of reach of a graph: a compiler breaks it there, torch.jit.trace cannot.
    """
    if type(policy) is not Randomized or policy.generator is not None or policy.p == 1:
        xi = policy.draw(T, B)
        if xi is not None:
            refuse_recording(f"the factors of gradient={str(policy)!r}, which a generator or code of its own draws")
        return xi
    if T == 1 and recorder() is None:  # which would hold it for every T
        return None
    return torch.ops.bptt.draw(torch.rand(T - 1, B, dtype=torch.float64, device="cpu"), str(policy))


# What a stack is: tensors, and text -----------------------------------------------------------------------------------


def held(stack: Stack) -> list[Tensor]:
    """The tensors of a stack itself, which follow its inputs."""
    return [t for t in stack.held if t is not None]


def text(stack: Stack, memory: Memory) -> str:
    """All of a stack but its tensors, with a tape policy, and how many tensors it has of each kind."""
    reach = stack.reach
    return " ".join(
        [
            stack.cell.mode,
            stack.kernel.name,
            str(stack.layers),
            str(stack.directions),
            str(stack.per_layer),
            str(stack.biased),
            str(reach.window),
            str(reach.every),
            str(reach.fenced),
            str(memory),
            ",".join(map(str, (len(stack.masks), len(stack.xi), len(stack.resets), int(stack.lengths is not None)))),
        ]
    )


def plain(plan: str) -> tuple[Stack, Memory]:
    """The stack of a text, without tensors, and the tape policy.

    >>> stack, memory = plain("GRU eager 2 1 4 True 20 5 False states 1,0,0,0")
    >>> stack.layers, stack.reach, memory
    (2, Reach(window=20, every=5, fenced=False), 'states')
    """
    return (_plain.__wrapped__ if torch.compiler.is_compiling() else _plain)(plan)  # a compiler warns of a cache


@lru_cache(maxsize=256)
def _plain(plan: str) -> tuple[Stack, Memory]:
    cell, kernel, layers, directions, per_layer, biased, window, every, fenced, tape, _ = plan.split()
    reach = Reach(_steps(window), _steps(every), fenced == "True")
    sizes = (int(layers), int(directions), int(per_layer))
    memory = parse_memory(tape)
    tapes = "gates" if isinstance(memory, Checkpoints) else memory
    return Stack(CELLS[cell], KERNELS[kernel], *sizes, biased == "True", reach, tapes), memory


def _steps(count: str) -> int | None:
    return None if count == "None" else int(count)


def received(tensors: Sequence[Tensor], plan: str) -> tuple[Stack, Memory, tuple[Tensor, ...]]:
    """(the stack, its tape policy, its inputs) of what an operator was given.

    One list has both: where a list is empty, an ahead-of-time compiled program calls an operator with None.
    """
    stack, memory = plain(plan)
    counts = list(map(int, plan.rsplit(" ", 1)[1].split(",")))
    own = len(tensors) - sum(counts)
    if own < len(tensors):
        rest = iter(tensors[own:])
        masks, xi, resets, lengths = (tuple(next(rest) for _ in range(count)) for count in counts)
        stack = replace(stack, masks=masks, xi=xi, resets=resets, lengths=lengths[0] if lengths else None)
    return stack, memory, tuple(tensors[:own])


def called(stack: Stack, memory: Memory, inputs: tuple[Tensor, ...]) -> Stack | Checkpointed | BothWays:
    """The program of a call on so many steps, which a graph of any number of steps does not hold."""
    stack = replace(stack, reach=stack.reach.within(inputs[0].shape[0]))
    return taped(stack, memory, inputs) if isinstance(memory, Checkpoints) else stack


# Results: the series y is a part of or y, the final states, and if kept the rest of the tape --------------------------


def _has_series(stack: Stack, memory: Memory) -> bool:
    """Whether y is a part of the top layer's states, in the tape of a one-directional stack."""
    return stack.directions == 1 and not isinstance(memory, Checkpoints)


def _joined(
    series: bool, stack: Stack, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...], keep: bool
) -> list[Tensor]:
    """(outputs, tape) without a tensor twice. series: see `_has_series`; the tape has the states then in any case."""
    if not series:
        return [*outputs, *tape] if keep else list(outputs)
    at = _top(stack, len(tape))
    return [tape[at], *outputs[1:], *((*tape[:at], *tape[at + 1 :]) if keep else ())]


def _parted(series: bool, stack: Stack, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inverse of `_joined`."""
    first, finals, tape = results[0], results[1 : stack.outputs], tuple(results[stack.outputs :])
    if not series:
        return (first, *finals), tape
    at = _top(stack, len(tape) + 1)
    return (first[1:], *finals), (*tape[:at], first, *tape[at:])


def _top(stack: Stack, count: int) -> int:
    """Where the top layer's states of h stand in the tape of a one-directional stack."""
    return count - count // stack.layers


def _cotangents(series: bool, stack: Stack, cotangents: Sequence[Tensor | None]) -> Tensors:
    """The cotangents of the outputs, from those of the results."""
    first, *finals = cotangents[: stack.outputs]
    return (first if first is None or not series else first[1:], *finals)


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


def _forward(tensors: list[Tensor], plan: str, keep: bool) -> list[Tensor]:
    refuse_onnx()
    stack, memory, inputs = received(tensors, plan)
    series = _has_series(stack, memory)
    program = called(stack if keep else replace(stack, memory="states"), memory, inputs)
    with torch.no_grad():
        outputs, tape = program.forward(inputs, keep=keep or series)
        return _own(_joined(series, stack, outputs, tape, keep))


def _forward_fake(tensors: list[Tensor], plan: str, keep: bool) -> list[Tensor]:
    refuse_onnx()
    stack, memory, inputs = received(tensors, plan)
    x, weights = inputs[0], stack.weights(inputs)
    T, B, _ = x.shape
    K = stack.layers * stack.directions
    units = [weights[0].hh.shape[1], weights[0].hh.shape[0] // stack.cell.gates_per_unit][: stack.cell.states]
    states = [x.new_empty(T + 1, B, size) for size in units]
    outputs = (x.new_empty(T, B, stack.directions * units[0]), *(x.new_empty(K, B, size) for size in units))
    if isinstance(memory, Checkpoints):
        if keep:
            raise refusal(f"memory={str(memory)!r} has no tape of a size that is known before the call")
        return list(outputs)
    tape: list[Tensor] = []
    for k in range(K):
        tape += states[1:] if stack.directions == 2 and k >= K - 2 else states
        if keep and stack.tapes_gates(x, weights):
            tape.append(x.new_empty(T, B, stack.cell.taped(weights[k])))
    joined = _joined(_has_series(stack, memory), stack, outputs, tuple(tape), keep)
    return [torch.empty_like(result) for result in joined]


def _backward(
    tensors: list[Tensor], plan: str, results: list[Tensor], cotangents: list[Tensor | None], needs: list[bool]
) -> list[Tensor]:
    stack, memory, inputs = received(tensors, plan)
    series, wanted = _has_series(stack, memory), tuple(needs[: len(inputs)])
    with torch.no_grad():
        outputs, tape = _parted(series, stack, results)
        arrived = _cotangents(series, stack, cotangents)
        grads = called(stack, memory, inputs).backward(inputs, outputs, tape, arrived, wanted)
        return _own([given(grad) for grad, need in zip(grads, wanted, strict=True) if need])


def _backward_fake(tensors: list[Tensor], plan: str, results: Any, cotangents: Any, needs: list[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors, needs, strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, plan, keep = inputs
    ctx.plan, ctx.given, ctx.kept = plan, len(tensors), keep
    ctx.mark_non_differentiable(*output[plain(plan)[0].outputs :])
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    tensors, results = list(ctx.saved_tensors[: ctx.given]), list(ctx.saved_tensors[ctx.given :])
    stack, memory, inputs = received(tensors, ctx.plan)
    needs = list(ctx.needs_input_grad[0])
    if torch.is_grad_enabled():  # to be differentiated again, which the operator cannot be
        series = _has_series(stack, memory)
        outputs = (results[0][1:] if series else results[0], *results[1 : stack.outputs])
        arrived, own = _cotangents(series, stack, cotangents), tuple(needs[: len(inputs)])
        found = called(stack, memory, inputs).backward(inputs, outputs, None, arrived, own)
        grads = [*found, *[None] * (len(tensors) - len(inputs))]
    else:
        if not ctx.kept:  # recorded for calls with and without a gradient
            results = torch.ops.bptt.stack_forward(tensors, ctx.plan, True)
        of_outputs = cotangents[: stack.outputs]
        some = iter(torch.ops.bptt.stack_backward(tensors, ctx.plan, results, of_outputs, needs))
        grads = [next(some) if need else None for need in needs]
    return list(grads), None, None


def _forward_flops(tensors: list[Tensor], plan: str, keep: bool, out_val: Any = None) -> int:
    stack, _, inputs = received(tensors, plan)
    return forward_flops(stack, inputs)


def _backward_flops(
    tensors: list[Tensor], plan: str, results: Any, cotangents: Any, needs: list[bool], out_val: Any = None
) -> int:
    stack, memory, inputs = received(tensors, plan)
    return backward_flops(called(stack, memory, inputs), inputs, needs)


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
FORMULAS: dict[Any, Any] = {
    torch.ops.bptt.stack_forward: _forward_flops,
    torch.ops.bptt.stack_backward: _backward_flops,
}
"""How torch.utils.flop_counter counts them."""

torch.library.register_autograd("bptt::stack_forward", _pull, setup_context=_setup)
