"""Plain calls under autocast: what autocast asks for is cast, and what is left is a plain call without it."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from .. import kernels
from ..engine import is_observed, needs_gradient
from .call import Hidden, Layer, bare
from .undrawn import plain

__all__ = ["plain_under_autocast"]


def plain_under_autocast(
    layer: Layer, input: Tensor | PackedSequence, hx: Hidden | None, resets: Tensor | None
) -> tuple[Tensor | PackedSequence, Hidden] | None:
    """What `plain` gives of a call on the CPU, in the precision that autocast asks for; None where that is None."""
    if is_observed(autocast=False):
        return None
    data = input.data if isinstance(input, PackedSequence) else input
    given: tuple[Any, ...] = () if hx is None else hx if type(hx) is tuple else (hx,)
    try:
        weights: Any = [layer._parameters[name] for name in layer._flat_weights_names]
    except KeyError:  # computed from others, as by weight_norm
        return None
    for t in (data, *given, *weights):
        if (type(t) is not Tensor and type(t) is not Parameter) or not t.is_cpu:
            return None
    own = tuple([state.dtype for state in given])
    precision = kernels.precision(
        layer, data.device, weights[0].dtype, data.dtype, own, data is not input, resets is not None
    )
    if precision is None:  # it is autocast of another device
        return None
    dtype = precision.walk
    cast = data.to(dtype)
    x = cast if data is input else input._replace(data=cast)  # type: ignore[union-attr]  # packed
    states = None if hx is None else bare(tuple([state.to(dtype) for state in given]))
    if any(weight.dtype != dtype for weight in weights):
        layer = _with_weights(layer, _cast(layer, weights, dtype))
    torch.set_autocast_enabled("cpu", False)
    try:
        found = plain(layer, x, states, resets)
    finally:
        torch.set_autocast_enabled("cpu", True)
    if found is None or precision.results == (dtype, dtype):
        return found
    (y, final), (of_y, of_c) = found, precision.results
    y = y.to(of_y) if isinstance(y, Tensor) else y._replace(data=y.data.to(of_y))
    return y, final.to(of_y) if isinstance(final, Tensor) else (final[0].to(of_y), final[1].to(of_c))


def _with_weights(layer: Any, weights: tuple[Tensor, ...]) -> Layer:
    """The layer with other weights, which shares all else with it."""
    twin: Layer = object.__new__(type(layer))
    vars(twin).update(vars(layer), _parameters=dict(zip(layer._flat_weights_names, weights, strict=True)))
    return twin


# The weights ----------------------------------------------------------------------------------------------------------

_KEY = "bptt"

with torch.inference_mode(False):  # whatever the mode in which this is imported
    _WITNESS = torch.zeros(0, 0, device="cpu", dtype=torch.float32, requires_grad=True)
    """A tensor that autocast casts once in an outermost context, as it does with parameters."""


def _known() -> dict[Any, Any]:
    """What is known in this context of autocast. It lasts as long as that keeps its own casts: else it is empty."""
    with torch.inference_mode(False), torch.enable_grad():
        cast: Any = torch.mm(_WITNESS, _WITNESS).grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # it has one
    known: dict[Any, Any] = cast.metadata.setdefault(_KEY, {})
    return known


def _cast(layer: Any, weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weights in a dtype, whose values are found once in a context of autocast where it does so itself, which is of
    leaves that require grad; unlike there, each call's gradient is made of the weights' dtype before it is added to
    those of others.
    """
    if any(w.is_inference() or not (w.requires_grad and w.is_leaf) for w in weights):  # changed by `.data`, say
        return tuple([w.to(dtype) for w in weights])
    of = [(w._version, w.data_ptr()) for w in weights]
    known = _known()
    then, of_then, values = known.get((layer, dtype), ((), None, ()))
    if of != of_then or not all(map(is_, then, weights)):
        with torch.inference_mode(False), torch.no_grad():
            values = tuple([w.detach().to(dtype) for w in weights])
        known[layer, dtype] = weights, of, values
    if torch.is_grad_enabled() and needs_gradient(tuple(weights)):
        found: tuple[Tensor, ...] = _Cast.apply(values, *weights)
        return found
    return values


class _Cast(torch.autograd.Function):
    """The autograd function of tensors whose values in another dtype are known."""

    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        found = tuple([value.detach() for value in values])
        needs = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*[t for t, needed in zip(found, needs, strict=True) if not needed])
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *[None if g is None else g.to(of) for g, of in zip(grads, ctx.dtypes, strict=True)])
