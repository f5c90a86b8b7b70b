"""The autograd functions of a program inside transforms: those of torch.func, dual levels, and batched cotangents.

`Transformed` is the program, `Pulled` its backward call as a function of its own, so that both have derivatives of
every order, forward and reverse, and a rule for vmap, and the fast walks run at the bottom of any nesting. What is true
of a kind of program, where its lanes lie and what its tangents are, is in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from .levels import apply
from .mapped import at_once, folded, in_pieces, lane, no_calls, one_by_one, unfolded
from .pull_request import PullRequest
from .records import Asked, Saved, Tensors, given
from .rules import AS_ROWS, RULES, AsRows
from .tangents import forward_mode
from .tracing import named, seen

__all__ = [
    "is_batched",
    "pulled",
    "pulled_batched",
    "refuse_mapped",
    "run_transformed",
    "tangent_of_a_gradient",
    "transformed",
    "whole_numbers",
    "without_reverse",
]


def transformed() -> bool:
    """Whether a call may be inside a transform: of torch.func, or a dual level of torch.autograd.forward_ad."""
    return torch._C._are_functorch_transforms_active() or forward_mode()


def refuse_mapped(what: str, tensor: Tensor) -> None:
    """Raise ValueError where vmap maps over whole numbers that are read as such."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            raise ValueError(f"{what} must be the same in all calls of a vmap: got a tensor that it maps over")
        tensor = functorch.get_unwrapped(tensor)


def whole_numbers(tensor: Tensor) -> list[int]:
    """`tolist` of whole numbers `[n]`, which torch 2.8 has not inside its transforms."""
    return [int(n) for n in tensor] if transformed() else tensor.tolist()


def run_transformed(program: Any, tensors: Tensors) -> tuple[Tensor, ...]:
    """`boundary.run` inside a transform."""
    return apply(Transformed, program, torch.is_grad_enabled(), *tensors, *program.held)[: program.outputs]


def pulled(program: Any, saved: Saved, asked: Asked) -> Tensors:
    """`Program.backward` as a function that can be differentiated and mapped again, in every mode."""
    tape = saved.tape or ()
    if type(program) in RULES and not RULES[type(program)].tapes(program):
        tape = ()
    flat = (*saved.inputs, *program.held, *saved.outputs, *tape)
    arrived = tuple([c for c in asked.cotangents if c is not None])
    request = PullRequest(
        program.holding((None,) * len(program.held)),
        len(saved.inputs),
        len(program.held),
        len(saved.outputs),
        len(tape),
        tuple([c is not None for c in asked.cotangents]),
        asked.needs,
    )
    if not any(asked.needs):
        return (None,) * len(asked.needs)
    grads = iter(apply(Pulled, request, *map(_alive, (*flat, *arrived))))
    return tuple(next(grads) if need else None for need in asked.needs)


def pulled_batched(program: Any, saved: Saved, asked: Asked) -> Tensors:
    """`pulled` for the cotangents of is_grads_batched=True, whose vmap is not that of torch.func."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = [c is not None and functorch.is_legacy_batchedtensor(c) for c in asked.cotangents]
    apart = [
        torch._remove_batch_dim(c, level, 0, 0) if b else c  # type: ignore[arg-type]  # a tensor where it is wanted
        for c, b in zip(asked.cotangents, batched, strict=True)
    ]
    if any(t is not None and functorch.is_legacy_batchedtensor(t) for t in (*apart, *saved.inputs)):
        raise NotImplementedError(
            "is_grads_batched=True inside another such call is not supported by bptt's layers and "
            "scans: use torch.func.vmap"
        )
    at = [i for i, c in enumerate(apart) if c is not None]
    as_rows = AS_ROWS.get(type(program))
    of = AsRows(program, saved, _as_it_is, _as_it_is) if as_rows is None else as_rows(program, saved)

    def one(*some: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(at, some, strict=True))
        cotangents = of.arriving(tuple(changed.get(i) for i in range(len(apart))))
        grads = of.leaving(pulled(of.program, of.saved, asked._replace(cotangents=cotangents)))
        return tuple(g for g in grads if g is not None)

    dims = tuple(0 if batched[i] else None for i in at)
    grads = iter(torch.func.vmap(one, in_dims=dims)(*[apart[i] for i in at]))  # type: ignore[arg-type]  # any tree, says torch
    return tuple(torch._add_batch_dim(next(grads), 0, level) if need else None for need in asked.needs)


def _as_it_is(tensors: Tensors) -> Tensors:
    return tensors


def is_batched(cotangents: Tensors) -> bool:
    """Whether they are those of a call with is_grads_batched=True."""
    return any(c is not None and functorch.is_legacy_batchedtensor(c) for c in cotangents)


def _alive(tensor: Tensor | None) -> Tensor | None:
    """A tensor out of the wrappers of transforms that are over, as torch's own operations see it."""
    return tensor if tensor is None else functorch.unwrap_if_dead(tensor)


class Transformed(torch.autograd.Function):
    """The autograd function of a program in the form that torch.func asks for: all that is saved is an input or an
    output.
    """

    @staticmethod
    def forward(program: Any, keep: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        first = len(tensors) - len(program.held)
        own, observed = program.holding(tensors[first:]), seen(tensors[0])
        with named(program.name, "forward"), torch.no_grad():
            walk = RULES[type(own)].visible(own) if observed else own
            keep = keep and not observed and RULES[type(own)].tapes(own)
            outputs, tape = walk.forward(tensors[:first], keep)
        handed = [out.clone() if i < program.reads or out._is_view() else out for i, out in enumerate(outputs)]
        return (*handed, *[out.clone() for out in outputs[: program.reads]], *tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, _, *given = inputs
        kept, held = output[program.outputs :], program.held
        ctx.program = program.holding((None,) * len(held))
        ctx.inputs, ctx.held = len(given) - len(held), len(held)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*given, *kept)
        ctx.save_for_forward(*given, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        program, inputs, held = _holding(ctx, tensors)
        outputs, tape = tensors[len(inputs) + held :][: program.reads], tensors[len(inputs) + held + program.reads :]
        needs = ctx.needs_input_grad[2 : 2 + len(inputs)]
        asked = Asked(cotangents[: program.outputs], needs)
        return (None, None, *pulled(program, Saved(inputs, outputs, tape), asked), *[None] * held)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rules, count = RULES[type(ctx.program)], ctx.inputs + ctx.held

        def push(primals: Tensors, moving: Tensors) -> tuple[Tensor, ...]:
            program, inputs, _ = _holding(ctx, primals)
            moved = rules.push(program, inputs, moving)
            return moved if rules.is_uncut(program, given(inputs[0])) else without_reverse(*moved)

        moved = _below(push, saved[:count], tangents[2 : 2 + ctx.inputs])
        # None of whole numbers.
        return (*(t if t.is_floating_point() else None for t in moved), *[None] * (len(saved) - count))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], program: Any, keep: bool, *tensors: Tensor | None) -> Any:
        dims, first, V = in_dims[2:], len(tensors) - len(program.held), info.batch_size
        if V == 0:
            return no_calls(Transformed, (program, keep), dims, tensors)
        weights = RULES[type(program)].weights(program)
        if any(dims[i] is not None for i in weights):
            return one_by_one(Transformed, (program, keep), dims, tensors, V)
        whole = [t if i in weights else folded(t, dims[i], V) for i, t in enumerate(tensors)]
        held, program = tuple(whole[first:]), RULES[type(program)].of_lanes(program, V)
        results = apply(Transformed, program.holding(held), keep, *whole)
        return tuple(unfolded(r, V) for r in results), tuple(map(lane, results))


def _holding(ctx: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, Tensors, int]:
    """(the program with what it holds, its inputs, how many tensors it holds) of what was saved."""
    inputs, held = tuple(tensors[: ctx.inputs]), tuple(tensors[ctx.inputs : ctx.inputs + ctx.held])
    return ctx.program.holding(held), inputs, len(held)


class Pulled(torch.autograd.Function):
    """The backward call of a program as an autograd function: the gradients that are needed."""

    @staticmethod
    def forward(request: PullRequest, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inputs, held, outputs, tape, cotangents = request.parts(flat)
        program = request.program.holding(held)
        with torch.no_grad(), named(program.name, "backward"):
            if seen(inputs[0]) and type(program) in RULES:
                program, tape = RULES[type(program)].visible(program), ()
            if not tape:
                outputs, tape = program.forward(inputs, keep=True)
            asked = Asked(cotangents, request.needs, lane_groups=request.lane_groups)
            found = program.backward(Saved(inputs, outputs, tape), asked)
        weights, groups = request.weights() or (), request.lane_groups
        grads = [
            g if g is not None else t.new_zeros(groups, *t.shape) if groups and i in weights else torch.zeros_like(t)
            for i, (g, t, need) in enumerate(zip(found.inputs, inputs, request.needs, strict=True))
            if need and t is not None
        ]
        # None may be one of the arguments, which torch.func would take it for, and in a dual level none may be a view.
        dual, arguments = forward_mode(), set(map(id, flat))
        return tuple([g.clone() if id(g) in arguments or (dual and g._is_view()) else g for g in grads])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.request, *flat = inputs
        ctx.save_for_backward(*flat)
        ctx.save_for_forward(*flat)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        request, flat = ctx.request, list(map(_alive, ctx.saved_tensors))
        rules = request.rules("second derivative inside a transform")
        if request.lane_groups is None and rules.by_tangents(request.program, given(flat[0])):
            return (None, *_gradients_of_gradients(request, tuple(flat), adjoints))
        at = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]

        def recorded(*some: Tensor) -> tuple[Tensor, ...]:
            changed = dict(zip(at, some, strict=True))
            return request.recorded([changed.get(i, t) for i, t in enumerate(flat)])

        grads, back = torch.func.vjp(recorded, *[flat[i] for i in at])  # type: ignore[misc]  # two without has_aux
        filled = [torch.zeros_like(g) if a is None else a for a, g in zip(adjoints, grads, strict=True)]
        found = dict(zip(at, back(tuple(filled)), strict=True))
        return (None, *[found.get(i) for i in range(len(flat))])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        def push(flat: Tensors, moving: Tensors) -> tuple[Tensor, ...]:
            if ctx.request.lane_groups is not None:
                return ctx.request.by_group(_tangents_of_gradients, flat, moving)
            return _tangents_of_gradients(ctx.request, flat, moving)

        return _below(push, tuple(map(_alive, ctx.saved_tensors)), tangents[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], request: PullRequest, *flat: Tensor | None) -> Any:
        dims, V = in_dims[1:], info.batch_size
        if V == 0:
            return no_calls(Pulled, (request,), dims, flat)
        weights = request.weights()
        if weights is None or any(dims[i] is not None for i in weights):
            return one_by_one(Pulled, (request,), dims, flat, V)
        size = at_once(flat, dims, V, weights)
        if size < V:
            return in_pieces(lambda info, some: Pulled.vmap(info, in_dims, request, *some), info, dims, flat, size)
        wanted, groups = [i for i, need in enumerate(request.needs) if need], request.lane_groups
        if any(i in weights for i in wanted):
            if not RULES[type(request.program)].sums_by_group(request.program):
                return one_by_one(Pulled, (request,), dims, flat, V)
            request = replace(request, lane_groups=V * (1 if groups is None else groups))
        request = replace(request, program=RULES[type(request.program)].of_lanes(request.program, V))
        results = apply(Pulled, request, *[t if i in weights else folded(t, dims[i], V) for i, t in enumerate(flat)])
        of_weights = [i in weights for i in wanted]
        apart = [
            unfolded(r, V) if not of else r if groups is None else r.unflatten(0, (V, groups))
            for of, r in zip(of_weights, results, strict=True)
        ]
        return tuple(apart), tuple(0 if of else lane(r) for of, r in zip(of_weights, results, strict=True))


def _tangents_of_gradients(request: PullRequest, flat: Tensors, moving: Tensors) -> tuple[Tensor, ...]:
    """The tangents of the gradients that are needed, from those of everything that a backward call is given.

    The full gradient is the transpose of the tangent: its own tangent is the gradient of <cotangents, tangent>, and the
    gradient for the tangents of the cotangents.
    """
    rules = request.rules("forward-mode derivative")
    inputs, held, outputs, tape, cotangents = request.parts(flat)
    program, of = request.program.holding(held), request.parts(moving)
    wanted = [i for i, need in enumerate(request.needs) if need]
    total: list[Tensor | None] = [None] * len(wanted)
    if any(t is not None for t in of.inputs):
        if not rules.is_uncut(program, inputs[0]):  # type: ignore[arg-type]  # a tensor where it is wanted
            raise tangent_of_a_gradient()

        def tangent(*some: Tensor) -> tuple[Tensor, ...]:
            changed = dict(zip(wanted, some, strict=True))
            at = tuple(changed.get(i, t) for i, t in enumerate(inputs))
            moved = rules.push(program, at, of.inputs)
            return tuple(m for m, c in zip(moved, cotangents, strict=True) if c is not None)

        _, back = torch.func.vjp(tangent, *[inputs[i] for i in wanted])  # type: ignore[misc]  # two without has_aux
        total = list(back(tuple(c for c in cotangents if c is not None)))
    if any(t is not None for t in of.cotangents):
        asked = Asked(of.cotangents, request.needs)
        more = pulled(program, Saved(inputs, outputs, tape), asked)
        total = [m if t is None else t + m for t, m in zip(total, [more[i] for i in wanted], strict=True)]  # type: ignore[operator]  # a tensor where it is wanted
    return tuple(torch.zeros_like(inputs[i]) if t is None else t for t, i in zip(total, wanted, strict=True))  # type: ignore[arg-type]  # a tensor where it is wanted


def _gradients_of_gradients(request: PullRequest, flat: Tensors, adjoints: Tensors) -> Tensors:
    """The gradients of everything that a backward call is given, from the adjoints of the full gradients that it gives.

    The full gradient is the transpose of the tangent, <a, J' c> = <c, J a>: its own gradient is that of the tangent in
    the direction of the adjoints a, by the inputs, and by the cotangents c the tangent itself.
    """
    rules = request.rules("second derivative inside a transform")
    inputs, held, outputs, tape, cotangents = request.parts(flat)
    program, left = request.program.holding(held), iter(adjoints)
    moving = tuple(next(left) if need else None for need in request.needs)
    at = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]

    def tangent(*some: Tensor) -> tuple[Tensor, ...]:
        changed = dict(zip(at, some, strict=True))
        moved = rules.push(program, tuple(changed.get(i, t) for i, t in enumerate(inputs)), moving)
        return tuple(m for m, c in zip(moved, cotangents, strict=True) if c is not None)

    moved, back = torch.func.vjp(tangent, *[inputs[i] for i in at])  # type: ignore[misc]  # two without has_aux
    found = dict(zip(at, back(tuple(c for c in cotangents if c is not None)), strict=True))
    rest = (None,) * (len(held) + len(outputs) + len(tape))
    return (*(found.get(i) for i in range(len(inputs))), *rest, *moved)


def tangent_of_a_gradient() -> NotImplementedError:
    """The error for a tangent of a gradient under a policy that cuts time edges."""
    return NotImplementedError(
        "forward over reverse (a tangent of a gradient, as in jvp of grad, or torch.func.hessian) is for the full "
        "gradient: a policy that cuts time edges changes adjoints alone, so its gradient is not the transpose of a "
        "tangent. Use gradient='full', as by bptt.using(model, gradient='full'), or reverse over reverse "
        "(torch.func.jacrev of grad)"
    )


def without_reverse(*tangents: Tensor) -> tuple[Tensor, ...]:
    """Tangents whose own gradient raises NotImplementedError: those that pass a time edge that a policy cuts."""
    made: tuple[Tensor, ...] = _WithoutReverse.apply(*tangents)
    return made


def _below(
    push: Callable[[Tensors, Tensors], tuple[Tensor, ...]], primals: Tensors, tangents: Tensors
) -> tuple[Tensor, ...]:
    """Tangents in the transforms around the one that asks for them, where other tangents are carried on with these."""
    stack = functorch.get_interpreter_stack()
    if not stack or stack[-1].key() != functorch.TransformType.Jvp:
        return push(primals, tangents)
    level = stack[-1].level()

    def out(tensors: Tensors) -> Tensors:
        return tuple(None if t is None else functorch._unwrap_for_grad(t, level) for t in tensors)

    with forward_ad._set_fwd_grad_enabled(True), retrieve_current_functorch_interpreter().lower():
        moved = push(out(primals), out(tangents))
    return tuple(functorch._wrap_for_grad(t, level) for t in moved)


class _WithoutReverse(torch.autograd.Function):
    """Tangents under a policy that cuts time edges, which are the full ones and have no adjoint under that policy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            "reverse over forward (a gradient of a tangent) is for the full gradient: a policy that cuts time edges "
            "changes adjoints alone, and the tangents that it was given are the full ones. Use gradient='full', as by "
            "bptt.using(model, gradient='full')"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tangents)
