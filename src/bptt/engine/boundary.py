"""The only autograd boundary.

A `Program` is a computation whose gradient we define ourselves: stage 1 is its `forward`, stages 3 and 4 its
`backward` (stage 2, the local error, is whatever autograd does above). `run` puts it into autograd's graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode as dispatch_mode
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["OPERATORS", "Program", "Tensors", "given", "own_precision", "run"]

Tensors = tuple[Tensor | None, ...]


class Program(Protocol):
    """A computation with a hand-written gradient. Immutable once `run` has been called with it."""

    @property
    def outputs(self) -> int:
        """How many tensors `forward` returns before its tape."""
        ...

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, tape) from the inputs. keep: a backward call will follow; else the tape may be empty.

        No tape tensor may be an input or an output; these are saved anyway.
        """
        ...

    def backward(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """The gradient of every input (None where `needs` is False), from the cotangents of the outputs.

        tape: what `forward` kept; or None when the gradient itself must be differentiable (double backward): then
        grad mode is on, and the tape is to be rebuilt from `tensors` by operations autograd can record.
        A cotangent is None where nothing arrived.
        """
        ...


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that is never None by the program's contract."""
    assert tensor is not None
    return tensor


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: the walks run in their tensors' own precision."""
    return torch.autocast(device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


PROXY = torch._C._TorchDispatchModeKey.PROXY
"""What make_fx traces by."""

OPERATORS: dict[type, Callable[[Any, Tensors], tuple[Tensor, ...]]] = {}
"""How a program of a type runs where a graph is being traced: through operators of torch, which the graph can hold."""


def run(program: Program, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The program's outputs, differentiable by the program's own backward."""
    if has_torch_function(tensors):
        # A torch function mode, as `scan` uses, must see and may replace what enters; autograd.Function hides it.
        return handle_torch_function(run, tensors, program, *tensors)
    if _traced(tensors[0]) and type(program) in OPERATORS and not torch._C._are_functorch_transforms_active():
        return OPERATORS[type(program)](program, tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        transformed = torch._C._are_functorch_transforms_active()
        return (_Transformable if transformed else _Boundary).apply(program, *tensors)[: program.outputs]
    return program.forward(tensors, keep=False)[0]


def _traced(x: Tensor | None) -> bool:
    """Whether a graph is being traced: by torch.compile or torch.export, on tensors without data, or by make_fx."""
    if is_compiling() or dispatch_mode(PROXY) is not None:
        return True
    return type(x) is not Tensor and x is not None and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs, tape = program.forward(tensors, keep=True)
        results = (*outputs, *tape)
        _save(ctx, program, tensors, results)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program, saved = ctx.program, ctx.saved_tensors
        tensors, results = saved[: ctx.inputs], saved[ctx.inputs :]
        outputs, tape = results[: program.outputs], results[program.outputs :]
        grads = program.backward(
            tensors,
            outputs,
            None if torch.is_grad_enabled() else tape,
            cotangents[: program.outputs],
            ctx.needs_input_grad[1:],
        )
        return (None, *grads)


class _Transformable(_Boundary):
    """The same in the form that torch.func asks for, which takes torch longer to call."""

    @staticmethod
    def forward(program: Program, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]  # no ctx
        outputs, tape = program.forward(tensors, keep=True)
        return (*outputs, *tape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, *tensors = inputs
        _save(ctx, program, tuple(tensors), output)


def _save(ctx: Any, program: Program, tensors: Tensors, results: tuple[Tensor, ...]) -> None:
    ctx.program, ctx.inputs = program, len(tensors)
    ctx.mark_non_differentiable(*results[program.outputs :])
    ctx.save_for_backward(*tensors, *results)
    ctx.set_materialize_grads(False)
