"""The only autograd boundary.

A `Program` is a computation whose gradient we define ourselves: stage 1 is its `forward`, stages 3 and 4 its
`backward` (stage 2, the local error, is whatever autograd does above). `run` puts it into autograd's graph; `attach`
does so with outputs that were computed before, and their `Pullback`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..kernels import keeps_graph
from .records import Asked, Grads, Saved, Tensors
from .tangents import forward_mode, has_tangent
from .tracing import named, seen
from .transforms import is_batched, pulled, pulled_batched, run_transformed, transformed

__all__ = [
    "OPERATORS",
    "PULLBACKS",
    "Boundary",
    "Program",
    "Pullback",
    "attach",
    "needs_gradient",
    "own_precision",
    "run",
]


class Pullback(Protocol):
    """A hand-written gradient: the backward pass of a computation. Immutable once it is in autograd's graph."""

    name: ClassVar[str]
    """What a profiler calls the computation."""

    @property
    def reads(self) -> int:
        """How many outputs, from the first on, `backward` reads; a caller may change the others as it likes."""
        ...

    @property
    def held(self) -> Tensors:
        """The tensors that are part of the program; none of them gets a gradient."""
        ...

    def holding(self, tensors: Tensors) -> Self:
        """The same program with others in the place of `held`; None stands for a tensor that is given later."""
        ...

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """The gradient of every input, from the cotangents of the outputs."""
        ...


class Program(Pullback, Protocol):
    """A computation with a hand-written gradient, which gives the same results when run again: an output that the
    caller changed in place is recomputed.
    """

    @property
    def outputs(self) -> int:
        """How many tensors `forward` returns before its tape."""
        ...

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, tape) from the inputs. keep: a backward call will follow; else the tape may be empty.

        No tape tensor may be an input or an output; these are saved anyway. An output may be a part of one.
        """
        ...


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, in which the walks run in the precision of their tensors."""
    return torch.autocast(device.type, enabled=False) if torch._C._is_any_autocast_enabled() else _AS_IT_IS


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


OPERATORS: dict[type, Callable[[Any, Tensors], tuple[Tensor, ...]]] = {}
"""How a program of a type runs where it is observed: through operators of torch, which a graph can hold."""

PULLBACKS: dict[type, Callable[[Any, Saved, Asked], Grads]] = {}
"""How its backward call runs where it is observed and the forward call was not."""


def needs_gradient(tensors: Tensors) -> bool:
    """Whether any of the tensors asks for a gradient."""
    for t in tensors:  # noqa: SIM110  # in half the time of any()
        if t is not None and t.requires_grad:
            return True
    return False


def run(program: Program, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The program's outputs, differentiable by the program's own backward."""
    if has_torch_function(tensors):
        # A torch function mode, as `scan` uses, must see and may replace what enters; autograd.Function hides it.
        return handle_torch_function(run, tensors, program, *tensors)
    if torch._C._are_functorch_transforms_active() or (forward_mode() and any(map(has_tangent, tensors))):
        return run_transformed(program, tensors)
    if seen(tensors[0]) and type(program) in OPERATORS:
        return OPERATORS[type(program)](program, tensors)
    if torch.is_grad_enabled() and needs_gradient(tensors):
        return Boundary.apply(program, *tensors)
    with named(program.name, "forward"):
        outputs = program.forward(tensors, keep=False)[0]
    if torch.is_grad_enabled():
        return outputs
    # A view made without grad mode may not be written to with it.
    return tuple([output.data if output._is_view() else output for output in outputs])


def attach(
    pullback: Pullback, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """Outputs that were computed from these tensors without autograd, differentiable by the pullback.

    tape: the tensors kept for the pullback, under the rules of `Program.forward`. Where the caller changes an output in
    place that the pullback reads, the backward call raises.
    """
    if has_torch_function(tensors):
        return handle_torch_function(attach, tensors, pullback, outputs, tape, *tensors)
    return _Attached.apply((pullback, outputs, tape), *tensors)


class Boundary(torch.autograd.Function):
    """The autograd function of a program. Every tensor is saved through autograd, which guards it and frees it in time.

    ctx.program: the program without its tensors. ctx.ends: where in what is saved the inputs end, the tensors that the
    program holds, and the outputs that it reads; the tape is the rest. ctx.witnesses: see `_own`.
    """

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with named(program.name, "forward"):
            outputs, tape = program.forward(tensors, keep=True)
        _save(ctx, program, tensors, outputs, tape)
        outputs, ctx.witnesses = _own(outputs, program.reads)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises where an earlier backward call has freed them
        program, (inputs, first, last) = ctx.program, ctx.ends
        if first > inputs:
            program = program.holding(saved[inputs:first])
        tensors, outputs, tape = saved[:inputs], saved[first:last], saved[last:]
        needs = ctx.needs_input_grad[1 : 1 + inputs]
        batched = is_batched(cotangents)
        inside = batched or transformed()
        if torch.is_grad_enabled() and not inside:
            tape = None
        elif any(map(_version, ctx.witnesses)):
            outputs, tape = program.forward(tensors, keep=True)
        if inside:
            pull = pulled_batched if batched else pulled
            return (None, *pull(program, Saved(tensors, outputs, tape), Asked(cotangents, needs)))
        left, asked = Saved(tensors, outputs, tape), Asked(cotangents, needs)
        if tape is not None and type(program) in PULLBACKS and seen(tensors[0]):
            grads = PULLBACKS[type(program)](program, left, asked)
        else:
            with named(program.name, "backward"):
                grads = program.backward(left, asked)
        if not keeps_graph():  # what has failed may be called again
            ctx.program = None
        return (None, *grads.inputs)


class _Attached(Boundary):
    """The autograd function of what was computed before: a pullback, outputs and tape."""

    @staticmethod
    def forward(ctx: Any, computed: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        pullback, outputs, tape = computed
        with named(pullback.name, "forward"):
            _save(ctx, pullback, tensors, outputs, tape)
        ctx.witnesses = ()
        return outputs


def _save(
    ctx: Any, pullback: Pullback, tensors: Tensors, outputs: tuple[Tensor, ...], tape: tuple[Tensor, ...]
) -> None:
    """Save all that the backward call needs."""
    reads, held = pullback.reads, pullback.held
    ctx.program = pullback.holding((None,) * len(held)) if held else pullback
    first = len(tensors) + len(held)
    ctx.ends = len(tensors), first, first + reads
    ctx.save_for_backward(*tensors, *held, *outputs[:reads], *tape)
    ctx.set_materialize_grads(False)


def _own(outputs: tuple[Tensor, ...], reads: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the outputs as tensors that the caller may write to, a witness for each that is needed for the backward call).

    An output that is read there, or lies in the tape, is handed out with its memory but without its version, which
    autograd guards. Its witness has the version without the memory, and so tells whether the caller has written to it.
    """
    own, witnesses = list(outputs), []
    for i, output in enumerate(outputs):
        if i < reads or output._is_view():
            own[i] = handed = output.data
            witness = handed.detach()
            witness.data = _NOTHING if output.is_cpu and type(output) is Tensor else output.new_empty(0)
            witnesses.append(witness)
    return tuple(own), tuple(witnesses)


_version = attrgetter("_version")

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _NOTHING = torch.empty(0, device="cpu")
