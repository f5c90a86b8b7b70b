"""An autograd function at every level of torch.func, one transform after the other, from the innermost outwards.

torch does the same for any function (`torch._functorch.autograd_function`), with trees of whatever arguments it has and
a class made for each call: for a small layer that takes longer than the walks themselves. A function here has flat
arguments, returns a flat tuple of tensors, none of which is an argument, and has a `vmap` of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from .tangents import forward_mode

__all__ = ["Batch", "apply"]


GRAD, JVP, VMAP = functorch.TransformType.Grad, functorch.TransformType.Jvp, functorch.TransformType.Vmap
RANDOMNESS = {
    functorch.RandomnessType.Error: "error",
    functorch.RandomnessType.Same: "same",
    functorch.RandomnessType.Different: "different",
}


class Batch(NamedTuple):
    """The level of vmap that is left, as `Function.vmap` is told."""

    batch_size: int
    randomness: str


def apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """`function.apply` of these arguments, in whatever transforms there are."""
    if not torch._C._are_functorch_transforms_active():
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        of = function.apply if recorded or forward_mode() else function.forward
        return of(*arguments)
    own = [functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments]
    interpreter: Any = functorch.peek_interpreter_stack()
    kind = interpreter.key()
    if kind == VMAP:
        return _mapped(functorch.CVmapInterpreterPtr(interpreter), function, own)
    if kind not in (GRAD, JVP):
        return function.apply(*own)
    pointer: Any = functorch.CGradInterpreterPtr if kind == GRAD else functorch.CJvpInterpreterPtr
    lift, allowed = pointer(interpreter).lift, functorch.get_single_level_autograd_function_allowed()
    lifted = [lift(a) if isinstance(a, Tensor) else a for a in own]
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        return _at_one_level(function).apply(*lifted)
    finally:
        functorch.set_single_level_autograd_function_allowed(allowed)


def _mapped(interpreter: Any, function: Any, arguments: list[Any]) -> tuple[Tensor, ...]:
    """The call below a level of vmap, by the function's own rule."""
    level = interpreter.level()
    dims = [_dim(a, level) for a in arguments]
    with temporarily_pop_interpreter_stack():
        if all(d is None for d in dims):
            return apply(function, *arguments)
        below = [a if d is None else functorch.get_unwrapped(a) for a, d in zip(arguments, dims, strict=True)]
        info = Batch(interpreter.batchSize(), RANDOMNESS[interpreter.randomness()])
        results, out_dims = function.vmap(info, tuple(dims), *below)
    return tuple(
        r if d is None else functorch._add_batch_dim(r, d, level) for r, d in zip(results, out_dims, strict=True)
    )


def _dim(argument: Any, level: int) -> int | None:
    """The dimension of a tensor that this level of vmap maps over."""
    if not isinstance(argument, Tensor) or not functorch.is_batchedtensor(argument):
        return None
    return functorch.maybe_get_bdim(argument) if functorch.maybe_get_level(argument) == level else None


@cache
def _at_one_level(function: Any) -> Any:
    """An autograd function of one level of grad or jvp, whose forward call is the function's at the levels below."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        interpreter: Any = functorch.peek_interpreter_stack()
        level = interpreter.level()
        # This level has turned both off, for itself alone; the levels below have them as they were outside of it.
        if interpreter.key() == GRAD:
            modes = functorch.CGradInterpreterPtr(interpreter).prevGradMode(), True
        else:
            modes = True, functorch.CJvpInterpreterPtr(interpreter).prevFwdGradMode()
        below = [functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments]
        with torch.set_grad_enabled(modes[0]), _set_fwd_grad_enabled(modes[1]), temporarily_pop_interpreter_stack():
            results = apply(function, *below)
        return tuple(functorch._wrap_for_grad(r, level) for r in results)

    methods = {"forward": forward, "setup_context": function.setup_context, "backward": function.backward,
               "jvp": function.jvp}  # fmt: skip
    return type(
        f"{function.__name__}AtOneLevel",
        (torch.autograd.function._SingleLevelFunction,),
        {name: staticmethod(method) for name, method in methods.items()},
    )
