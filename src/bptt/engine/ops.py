"""The programs of a net as operators of torch, so that a compiler can put them into its graph, and a mode can see them.

`boundary.run` comes here where a call is observed (torch.compile, torch.export, jit.trace, make_fx, FlopCounterMode)
and nowhere else: a call of the program without operators takes less time. `bptt::stack_forward` is stage 1,
`bptt::stack_backward` stages 3 and 4. Their fake forms give shapes alone, of any symbolic T and B. Everything in a
`Net` that is not a tensor arrives as text.

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
from .bidirectional import CheckpointedBidirectional
from .boundary import OPERATORS, PULLBACKS
from .flops import announce, backward_flops, forward_flops
from .net import Net
from .programs import NetPrograms, with_checkpoints
from .records import Asked, Grads, Saved, Tensors, given
from .segments import Checkpointed
from .stack import Stack
from .tracing import recorder, refusal, refuse_onnx, refuse_recording

__all__ = ["draw", "has_series", "received", "shaped_results", "through_operators"]

torch.library.define("bptt::stack_forward", "(Tensor[] tensors, str plan, bool keep) -> Tensor[]")
torch.library.define(
    "bptt::stack_backward",
    "(Tensor[] tensors, str plan, Tensor[] results, Tensor?[] cotangents, bool[] needs) -> Tensor[]",
)
torch.library.define("bptt::draw", "(Tensor uniform, str policy) -> Tensor")


def through_operators(net: Net, memory: Memory, inputs: Tensors) -> tuple[Tensor, ...]:
    """`run` of a net with this tape policy through the operators: the outputs, differentiable.

    Under torch.compile a second derivative raises RuntimeError, as torch's own compiled backward does.
    """
    if not torch.compiler.is_compiling():
        announce(FORMULAS)
    recorded = recorder() is not None  # for calls with and without a gradient, of any size
    keep = not recorded and torch.is_grad_enabled() and any(given(t).requires_grad for t in inputs)
    if not recorded and not isinstance(memory, Checkpoints):
        memory = _decided(Stack(net, memory), inputs) if keep else "states"
    layout = text(net, memory)
    results = torch.ops.bptt.stack_forward([*inputs, *held(net)], layout, keep)
    outputs = (results[0][1:] if has_series(net, memory) else results[0], *results[1 : net.outputs])
    # The results are saved, the outputs may be written to; a compiler leaves out a copy that nobody writes to.
    return tuple([output.clone() for output in outputs]) if keep else outputs


def _decided(program: NetPrograms, inputs: Tensors) -> Memory:
    """What a program keeps, said as a graph has to know it."""
    if not isinstance(program, Stack):
        return program.memory
    if program.net.kernel.own_gradients:  # whose record is no value
        return "states"
    if torch.compiler.is_exporting() and program.memory == "auto":  # a graph for calls of every size
        return "states"
    return "gates" if program.tapes_gates(given(inputs[0]), program.net.weights(inputs)) else "states"


def _run(program: NetPrograms, inputs: Tensors) -> tuple[Tensor, ...]:
    return through_operators(program.net, program.memory, inputs)


def _pulled(program: NetPrograms, saved: Saved, asked: Asked) -> Grads:
    """`Program.backward` through the operator, of a call that did not go through one."""
    announce(FORMULAS)
    if program.net.kernel.own_gradients and isinstance(program, Stack):  # which calls operators that everyone knows
        return program.backward(saved, asked)
    net, memory = program.net, _decided(program, saved.inputs)
    dy, *rest = asked.cotangents
    if dy is not None and has_series(net, memory):
        dy = torch.cat([torch.zeros_like(dy[:1]), dy])
    own = [given(t) for t in saved.inputs]
    layout, more = text(net, memory), held(net)
    x, P = own[0], own[1].shape[2]
    # In the place of the outputs that are not kept, since nobody reads them: tensors of their shape.
    shapes = (x.new_empty(*x.shape[:2], net.directions * P), *own[1 : net.outputs])
    outputs = (*saved.outputs, *shapes[len(saved.outputs) :])
    assert saved.tape is not None
    results = _joined(has_series(net, memory), net, outputs, saved.tape, keep=True)
    wanted = [*asked.needs, *[False] * len(more)]
    grads = iter(torch.ops.bptt.stack_backward([*own, *more], layout, results, [dy, *rest], wanted))
    return Grads(tuple(next(grads) if need else None for need in asked.needs))


for kind in (Stack, Checkpointed, CheckpointedBidirectional):
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


# What a net is: tensors, and text -------------------------------------------------------------------------------------


def held(net: Net) -> list[Tensor]:
    """The tensors of a net itself, which follow its inputs."""
    return [t for t in net.held if t is not None]


def text(net: Net, memory: Memory) -> str:
    """All of a net but its tensors, with a tape policy, and how many tensors it has of each kind."""
    reach = net.reach
    return " ".join(
        [
            net.cell.mode,
            net.kernel.name,
            str(net.layers),
            str(net.directions),
            str(net.per_layer),
            str(net.biased),
            str(reach.window),
            str(reach.every),
            str(reach.stops_at_start),
            str(memory),
            ",".join(map(str, (len(net.masks), len(net.xi), len(net.resets), int(net.lengths is not None)))),
        ]
    )


def plain(layout: str) -> tuple[Net, Memory]:
    """The net of a text, without tensors, and the tape policy.

    >>> net, memory = plain("GRU eager 2 1 4 True 20 5 False states 1,0,0,0")
    >>> net.layers, net.reach, memory
    (2, Reach(window=20, every=5, stops_at_start=False), 'states')
    """
    return (_plain.__wrapped__ if torch.compiler.is_compiling() else _plain)(layout)  # a compiler warns of a cache


@lru_cache(maxsize=256)
def _plain(layout: str) -> tuple[Net, Memory]:
    cell, kernel, layers, directions, per_layer, biased, window, every, stops_at_start, tape, _ = layout.split()
    reach = Reach(_steps(window), _steps(every), stops_at_start == "True")
    sizes = (int(layers), int(directions), int(per_layer))
    return Net(CELLS[cell], KERNELS[kernel], *sizes, biased == "True", reach), parse_memory(tape)


def _steps(count: str) -> int | None:
    return None if count == "None" else int(count)


def received(tensors: Sequence[Tensor], layout: str) -> tuple[Net, Memory, tuple[Tensor, ...]]:
    """(the net, its tape policy, its inputs) of what an operator was given.

    One list has both: where a list is empty, an ahead-of-time compiled program calls an operator with None.
    """
    net, memory = plain(layout)
    counts = list(map(int, layout.rsplit(" ", 1)[1].split(",")))
    own = len(tensors) - sum(counts)
    if own < len(tensors):
        rest = iter(tensors[own:])
        masks, xi, resets, lengths = (tuple(next(rest) for _ in range(count)) for count in counts)
        net = replace(net, masks=masks, xi=xi, resets=resets, lengths=lengths[0] if lengths else None)
    return net, memory, tuple(tensors[:own])


def program_of_call(net: Net, memory: Memory, inputs: tuple[Tensor, ...]) -> NetPrograms:
    """The program of a call on so many steps, which a graph of any number of steps does not hold."""
    net = replace(net, reach=net.reach.within(inputs[0].shape[0]))
    return with_checkpoints(net, memory, inputs) if isinstance(memory, Checkpoints) else Stack(net, memory)


# Results: the series y is a part of or y, the final states, and if kept the rest of the tape --------------------------


def has_series(net: Net, memory: Memory) -> bool:
    """Whether y is a part of the top layer's states, in the tape of a one-directional net."""
    return net.directions == 1 and not isinstance(memory, Checkpoints)


def _joined(series: bool, net: Net, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...], keep: bool) -> list[Tensor]:
    """(outputs, tape) without a tensor twice. series: see `has_series`; the tape has the states then in any case."""
    if not series:
        return [*outputs, *tape] if keep else list(outputs)
    at = _top(net, len(tape))
    return [tape[at], *outputs[1:], *((*tape[:at], *tape[at + 1 :]) if keep else ())]


def _parted(series: bool, net: Net, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inverse of `_joined`."""
    first, finals, tape = results[0], results[1 : net.outputs], tuple(results[net.outputs :])
    if not series:
        return (first, *finals), tape
    at = _top(net, len(tape) + 1)
    return (first[1:], *finals), (*tape[:at], first, *tape[at:])


def _top(net: Net, count: int) -> int:
    """Where the top layer's states of h stand in the tape of a one-directional net."""
    return count - count // net.layers


def _cotangents(series: bool, net: Net, cotangents: Sequence[Tensor | None]) -> Tensors:
    """The cotangents of the outputs, from those of the results."""
    first, *finals = cotangents[: net.outputs]
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


def _forward(tensors: list[Tensor], layout: str, keep: bool) -> list[Tensor]:
    refuse_onnx()
    net, memory, inputs = received(tensors, layout)
    series = has_series(net, memory)
    program = program_of_call(net, memory if keep or isinstance(memory, Checkpoints) else "states", inputs)
    with torch.no_grad():
        outputs, tape = program.forward(inputs, keep=keep or series)
        return _own(_joined(series, net, outputs, tape, keep))


def _forward_fake(tensors: list[Tensor], layout: str, keep: bool) -> list[Tensor]:
    refuse_onnx()
    return shaped_results(tensors, layout, keep)


def shaped_results(tensors: list[Tensor], layout: str, keep: bool) -> list[Tensor]:
    """Tensors of the shapes of what `bptt::stack_forward` returns."""
    net, memory, inputs = received(tensors, layout)
    x, weights = inputs[0], net.weights(inputs)
    T, B, _ = x.shape
    K = net.layers * net.directions
    units = net.cell.state_sizes(weights[0])
    ends = 2 if net.kernel.own_gradients else T + 1  # see `Tape`
    states = [x.new_empty(T + 1 if i == 0 else ends, B, size) for i, size in enumerate(units)]
    outputs = (x.new_empty(T, B, net.directions * units[0]), *(x.new_empty(K, B, size) for size in units))
    if isinstance(memory, Checkpoints):
        if keep:
            raise refusal(f"memory={str(memory)!r} has no tape of a size that is known before the call")
        return list(outputs)
    tape: list[Tensor] = []
    tapes_gates = keep and Stack(net, memory).tapes_gates(x, weights)
    for k in range(K):
        tape += states[1:] if net.directions == 2 and k >= K - 2 else states
        if tapes_gates:
            tape.append(x.new_empty(T, B, net.cell.taped(weights[k])))
    joined = _joined(has_series(net, memory), net, outputs, tuple(tape), keep)
    return [torch.empty_like(result) for result in joined]


def _backward(
    tensors: list[Tensor], layout: str, results: list[Tensor], cotangents: list[Tensor | None], needs: list[bool]
) -> list[Tensor]:
    net, memory, inputs = received(tensors, layout)
    series, wanted = has_series(net, memory), tuple(needs[: len(inputs)])
    with torch.no_grad():
        outputs, tape = _parted(series, net, results)
        arrived = _cotangents(series, net, cotangents)
        grads = program_of_call(net, memory, inputs).backward(Saved(inputs, outputs, tape), Asked(arrived, wanted))
        return _own([given(grad) for grad, need in zip(grads.inputs, wanted, strict=True) if need])


def _backward_fake(
    tensors: list[Tensor], layout: str, results: Any, cotangents: Any, needs: list[bool]
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors, needs, strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, layout, keep = inputs
    ctx.layout, ctx.given, ctx.kept = layout, len(tensors), keep
    ctx.mark_non_differentiable(*output[plain(layout)[0].outputs :])
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    tensors, results = list(ctx.saved_tensors[: ctx.given]), list(ctx.saved_tensors[ctx.given :])
    net, memory, inputs = received(tensors, ctx.layout)
    needs = list(ctx.needs_input_grad[0])
    if torch.is_grad_enabled():  # to be differentiated again, which the operator cannot be
        series = has_series(net, memory)
        outputs = (results[0][1:] if series else results[0], *results[1 : net.outputs])
        arrived, own = _cotangents(series, net, cotangents), tuple(needs[: len(inputs)])
        found = program_of_call(net, memory, inputs).backward(Saved(inputs, outputs, None), Asked(arrived, own))
        grads = [*found.inputs, *[None] * (len(tensors) - len(inputs))]
    else:
        if not ctx.kept:  # recorded for calls with and without a gradient
            results = torch.ops.bptt.stack_forward(tensors, ctx.layout, True)
        of_outputs = cotangents[: net.outputs]
        some = iter(torch.ops.bptt.stack_backward(tensors, ctx.layout, results, of_outputs, needs))
        grads = [next(some) if need else None for need in needs]
    return list(grads), None, None


def _forward_flops(tensors: list[Tensor], layout: str, keep: bool, out_val: Any = None) -> int:
    net, _, inputs = received(tensors, layout)
    return forward_flops(net, inputs)


def _backward_flops(
    tensors: list[Tensor], layout: str, results: Any, cotangents: Any, needs: list[bool], out_val: Any = None
) -> int:
    net, memory, inputs = received(tensors, layout)
    return backward_flops(program_of_call(net, memory, inputs), inputs, needs)


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
