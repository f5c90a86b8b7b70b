"""`gradients`: every gradient of a layer, computed without autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from .. import policies
from ..engine import Asked, Saved, refuse_tangents
from .call import Call, Hidden, bare, net_of, program
from .flat import Flat, is_flat
from .layers import DropInLayer

__all__ = ["Gradients", "gradients"]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one call of a layer, as `gradients` returns them."""

    parameters: dict[str, Tensor]
    """dL/dw by the layer's parameter names, each of the parameter's shape; with per_sample `[B, ...]`, of each lane."""
    x: Tensor | PackedSequence
    """dL/dx, in the form and layout of the input."""
    hx: Hidden
    """dL/dh_0, for an LSTM of (h_0, c_0), in torch.nn's layout."""
    layer_adjoints: tuple[Tensor, ...]
    """lambda_t = dL/dh_t of every layer `[T, B, D*P]`, in forward time, whatever the layout of the input."""
    reset_state: Hidden | None = None
    """The gradient of the state that resets restart from, in the form of that state; None where none was given."""

    @property
    def adjoints(self) -> Tensor:
        """lambda_t = dL/dh_t of the last layer `[T, B, D*P]`: its own loss and everything later."""
        return self.layer_adjoints[-1]


@torch.no_grad()
def gradients(
    layer: DropInLayer,
    x: Tensor | PackedSequence,
    dy: Tensor | PackedSequence | None,
    hx: Hidden | None = None,
    dh_n: Hidden | None = None,
    gradient: str | policies.Policy | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Hidden | None = None,
    per_sample: bool = False,
) -> Gradients:
    """Compute every gradient of L = <dy, y> + <dh_n, h_n>, and the adjoints lambda_t, without autograd.

    layer: a `bptt.nn` layer. x, hx, cu_seqlens, resets, reset_state: as for its forward. dy: dL/dy, of y's shape, or
    None for none. dh_n: dL/dh_n of h_n's shape; for an LSTM a pair (dL/dh_n, dL/dc_n), or None for none.
    gradient: a policy or its text form; None is the layer's own. The layer's dropout is drawn, as in forward.
    per_sample: whether each parameter's gradient is wanted apart for each lane, `[B, ...]` in the order of the input's
        lanes, whose sum over B is the gradient: (6.4) with a product for each lane. All else has lanes anyway.

    Of sequences one after the other, flat with cu_seqlens or a jagged nested tensor, dy and the gradient of x have the
    form of y and x; the adjoints are padded, `[T, N, D*P]`, T the steps of the longest. The gradient of hx is dh_n for
    a sequence without a step, whose final state is its first.

    Raises TypeError where layer is not one of ours or a cotangent is not a tensor, ValueError where dy or dh_n has
    another shape or dtype than y or h_n; otherwise what forward raises.

    >>> import torch, bptt
    >>> layer, x = bptt.nn.RNN(2, 3), torch.ones(4, 1, 2)
    >>> grads = bptt.gradients(layer, x, dy=torch.ones(4, 1, 3))
    >>> grads.adjoints.shape, grads.parameters["weight_hh_l0"].shape
    (torch.Size([4, 1, 3]), torch.Size([3, 3]))
    >>> grads = bptt.gradients(layer, torch.ones(4, 5, 2), dy=torch.ones(4, 5, 3), per_sample=True)
    >>> grads.parameters["weight_hh_l0"].shape
    torch.Size([5, 3, 3])

    Source: equations/README.md, (1.16) to (1.18), and chapter 6 for the policies.
    """
    if not isinstance(layer, DropInLayer):
        raise TypeError(
            f"layer must be a bptt.nn.RNN, GRU or LSTM: got {type(layer).__module__}.{type(layer).__name__}"
        )
    if is_flat(x, cu_seqlens):
        return _flat_gradients(layer, x, dy, hx, dh_n, gradient, cu_seqlens, resets, reset_state, per_sample)
    call = Call.of(layer, x, hx, resets, reset_state)
    policy = layer.gradient if gradient is None else policies.parse(gradient)
    net = net_of(layer, call, policy, differentiated=True, adjoints=True)
    keeper = program(layer, call, net)
    outputs, tape = keeper.forward(call.tensors, keep=True)
    results, finals = call.as_results(outputs[0], outputs[1:])
    states = len(outputs) - 1
    given = _of_each_state(dh_n, states)
    given = given if call.batched else tuple(None if g is None else g.unsqueeze(1) for g in given)
    _check_tensors("dy", (dy,))
    cotangents = (None if dy is None else call.engine_layout(dy), *given)
    refuse_tangents("gradients", cotangents)
    for name, cotangent, output in zip(("dy", "dh_n", "dc_n"), cotangents, (results, *finals), strict=False):
        if cotangent is None:
            continue
        cast = call.results and cotangent.is_floating_point()  # under autocast
        if cotangent.shape != output.shape or not (cast or cotangent.dtype == output.dtype):
            raise ValueError(
                f"{name} must have the shape and dtype of its output, time first {list(output.shape)} {output.dtype}: "
                f"got {list(cotangent.shape)} {cotangent.dtype}"
            )
    cotangents = tuple([None if c is None else c.to(call.x.dtype) for c in cotangents])
    needs = (True,) * len(call.tensors)
    groups = call.x.shape[1] if per_sample else None
    asked = Asked(cotangents, needs, adjoints=True, lane_groups=groups)
    found = keeper.backward(Saved(call.tensors, outputs, tape), asked)
    dx, *rest = call.as_given([g for g in found.inputs if g is not None])
    end = states + len(call.weights)
    return Gradients(
        parameters=dict(zip(layer._flat_weights_names, rest[states:end], strict=True)),
        x=call.restore(dx),
        hx=call.restore_hidden(tuple(rest[:states])),
        layer_adjoints=net.join(found.adjoints),
        reset_state=call.restore_hidden(tuple(rest[end:])) if call.reset_state else None,
    )


def _flat_gradients(
    layer: DropInLayer,
    x: Any,
    dy: Any,
    hx: Any,
    dh_n: Any,
    gradient: Any,
    cu_seqlens: Any,
    resets: Any,
    reset_state: Any,
    per_sample: bool,
) -> Gradients:
    """The gradients of a call on sequences one after the other: those of the PackedSequence that they run as."""
    flat = Flat.of(type(layer).__name__, x, cu_seqlens)
    states, errors, restarts = (
        flat.states(name, s) for name, s in (("hx", hx), ("dh_n", dh_n), ("reset_state", reset_state))
    )
    own_dy, own_resets, own = flat.like_packed("dy", dy), flat.resets(resets, layer.batch_first), slice(None)
    if flat.packed is None:  # the gradients of a step of zeros, none of which is kept
        own = slice(0)
        step = flat.values.new_zeros(1, 1, layer.input_size)
        found = gradients(layer, step, None, gradient=gradient, per_sample=per_sample)
        dx = flat.as_given(torch.zeros_like(flat.values))
    else:
        restarting: dict[str, Any] = {"resets": own_resets, "reset_state": restarts}
        found = gradients(layer, flat.packed, own_dy, states, errors, gradient, **restarting, per_sample=per_sample)
        packed_dx: Any = found.x
        dx = flat.restored(packed_dx)

    def among_all(gradient: Tensor, others: Tensor | None = None) -> Tensor:
        gradient = gradient[:, own]
        none = gradient.new_zeros(gradient.shape[0], flat.count, *gradient.shape[2:])
        return flat.among_all(gradient, none if others is None else others)

    parameters = found.parameters
    if per_sample:
        parameters = {
            name: flat.among_all(each[own], each.new_zeros(flat.count, *each.shape[1:]), dim=0)
            for name, each in parameters.items()
        }
    dhx = found.hx if isinstance(found.hx, tuple) else (found.hx,)
    given = _of_each_state(dh_n, len(dhx))
    restart = None
    if found.reset_state is not None:
        ours = found.reset_state if isinstance(found.reset_state, tuple) else (found.reset_state,)
        restart = bare(tuple(among_all(g) for g in ours))
    elif reset_state is not None:
        restart = tree_map(torch.zeros_like, reset_state)
    return Gradients(
        parameters=parameters,
        x=dx,
        hx=bare(tuple(among_all(g, others) for g, others in zip(dhx, given, strict=True))),
        layer_adjoints=tuple(among_all(adjoint[own]) for adjoint in found.layer_adjoints),
        reset_state=restart,
    )


def _of_each_state(dh_n: Hidden | None, states: int) -> tuple[Tensor | None, ...]:
    """The cotangents of the final states, h or h and c; None for none."""
    if dh_n is None:
        return (None,) * states
    given = (dh_n,) if isinstance(dh_n, Tensor) else tuple(dh_n)
    _check_tensors("dh_n", given)
    if len(given) != states:
        raise ValueError(f"dh_n must have {states} tensor(s), one per final state: got {len(given)}")
    return given


def _check_tensors(name: str, given: tuple[object, ...]) -> None:
    for value in given:
        if value is not None and not isinstance(value, Tensor | PackedSequence):
            raise TypeError(f"{name} must be a tensor (a PackedSequence for packed input): got {type(value).__name__}")
