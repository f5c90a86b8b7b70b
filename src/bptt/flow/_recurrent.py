"""A recording of a `bptt.nn.Recurrent` as the scan that it is, with the errors that came back to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..nn import Recurrent
from ..policies import Full, Policy
from ..scan.arguments import Arguments
from ..scan.leaves import leaves_of
from ._one_direction import Direction, check_direction, one_direction
from ._recording import Loss
from ._recurrent_call import RecurrentCall, devices_of, tensors_of, weighted
from ._scanned import Scanned, checked_scalar

__all__ = ["holds_recurrent", "of_call", "record_scan"]

_SEED = 0  # of the errors that stand in for a loss


def holds_recurrent(model: torch.nn.Module) -> bool:
    """Whether a model's recurrent layers are of `bptt.nn.Recurrent` alone."""
    kinds = {type(module) for module in model.modules() if isinstance(module, (Recurrent, torch.nn.RNNBase))}
    return bool(kinds) and all(issubclass(kind, Recurrent) for kind in kinds)


def record_scan(
    subject: torch.nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    name: str | None = None,
    direction: Direction | None = None,
) -> Scanned:
    """Run a `bptt.nn.Recurrent`, or a model with one inside, once, forward, and back to the layer's outputs, and record
    the call as a scan with the errors that came back to it.

    subject, batch, loss, name: as in `record`. The measurements that take a scan take the layer or model itself too.
    What the loss is to the measurements is the sum of these errors times the layer's outputs: its gradient is that of
    the loss in the layer's parameters, and the same errors reach every policy. Dropout between the layers is drawn as
    in the call. Everything is measured in the layer's own precision. direction: "forward" or "reverse", of a
    bidirectional layer: the scan is that of the top layer's cell of this direction, with the errors of its half of y.

    All cells of the layer are one scan, whose state is the carry of all of them, for each lane. Steps count in the
    scan's own time: a reverse layer's from the last step on.

    Raises TypeError where subject holds no such layer or loss gives no scalar; ValueError for several layers and no
    name, for a bidirectional layer without a direction, which is scans in opposite times, for one with a learned
    initial state or `reset_state`, for sequences one after the other (`cu_seqlens`, nested tensors),
    for a layer that the call does not run exactly once, and for a loss that does not depend on its output.

    >>> import torch, bptt
    >>> layer = bptt.nn.Recurrent(torch.nn.GRUCell(2, 3))
    >>> r = bptt.flow.record_scan(layer, torch.randn(5, 4, 2), lambda y: y.square().mean())
    >>> r.T, r.B, r.chain.S
    (5, 4, 3)
    """
    if not isinstance(subject, torch.nn.Module):
        raise TypeError(f"subject must be a layer or a model (torch.nn.Module): got {type(subject).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function from the output to a scalar: got {loss!r}")
    found_name, layer = _layer_of(subject, name)
    check_direction(layer, found_name, direction)
    arguments = batch if isinstance(batch, tuple) and not isinstance(batch, PackedSequence) else (batch,)
    if loss is None and layer is not subject:
        raise ValueError("loss must be given for a model: a function from its output to a scalar")
    calls: list[RecurrentCall] = []
    outputs: list[tuple[Any, Any]] = []
    before = layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(RecurrentCall.about_to(layer, args, kwargs)), with_kwargs=True
    )
    after = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.enable_grad():
            output = subject(*arguments)
            value = None if loss is None else checked_scalar(loss(output[0] if layer is subject else output))
    finally:
        before.remove()
        after.remove()
    if len(calls) != 1:
        raise ValueError(f"the recurrent layer {found_name!r} must run once in a call: it ran {len(calls)} times")
    if calls[0].is_flat:
        raise ValueError(
            f"the layer {found_name!r} must be called on padded or packed sequences to be recorded: got nested ones "
            "or cu_seqlens (torch.nn.utils.rnn.pack_sequence makes a PackedSequence of them)"
        )
    errors = _noise(outputs[0]) if value is None else _errors(value, outputs[0], found_name)
    call = calls[0]
    if direction is not None:
        call, errors = one_direction(call, outputs[0], errors, direction)
    return of_call(call, errors, None if value is None else float(value.detach()), found_name)


def of_call(call: RecurrentCall, errors: list[Tensor | None], loss: float | None, name: str) -> Scanned:
    """The scan of a call, with the errors that came back to y and the tensors of the final state."""
    scan = call.with_errors(errors)
    given = Arguments.of(scan.step, scan.carry, scan.xs, scan.length, scan.resets)

    def run(policy: Policy) -> Tensor:
        return weighted(call.run(policy), errors)

    cuda = tuple(devices_of(call.layer))
    with torch.enable_grad():
        parameters = leaves_of(run(Full()))
    if not parameters:
        raise ValueError(f"the errors must reach a parameter of {name!r} that requires a gradient: they reach none")
    layer = call.layer
    label = " ".join(f"Recurrent({', '.join(map(repr, layer.cells))}, {layer.extra_repr()})".split())
    return Scanned(
        label, layer.gradient, given.T, given.lanes, loss, parameters, scan, name, layer, _run=run, _cuda=cuda
    )


def _layer_of(subject: torch.nn.Module, name: str | None) -> tuple[str, Recurrent]:
    """(name, layer) of the recurrent layer that is meant."""
    layers = {n: m for n, m in subject.named_modules() if isinstance(m, Recurrent)}
    if not layers:
        raise TypeError(f"subject must hold a bptt.nn.Recurrent: got {type(subject).__name__} without one")
    names = ", ".join(map(repr, layers))
    if name is not None and name not in layers:
        raise ValueError(f"name must be one of {names}: got {name!r}")
    if name is None and len(layers) > 1:
        raise ValueError(
            "subject holds several layers of any cell: record one, record_scan(model, batch, loss, name=...), where "
            f"name must be one of {names}"
        )
    found = next(iter(layers)) if name is None else name
    return found, layers[found]


def _errors(value: Tensor, output: tuple[Any, Any], name: str) -> list[Tensor | None]:
    """The gradients of a loss in a layer's outputs."""
    tensors = tensors_of(output)
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    if not value.requires_grad or not wanted:
        raise ValueError(f"loss must depend on the output of {name!r}, whose parameters or input need a gradient")
    found: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(
        wanted, torch.autograd.grad(value, [tensors[i] for i in wanted], allow_unused=True), strict=True
    ):
        found[i] = grad
    if all(d is None for d in found):
        raise ValueError(f"loss must depend on the output of {name!r}: it does not")
    return found


def _noise(output: tuple[Any, Any]) -> list[Tensor | None]:
    """Errors of norm 1 in random directions at every step and lane of y, the same ones every time."""
    y, *finals = tensors_of(output)
    whole = y.detach()
    noise = torch.randn(whole.shape, generator=torch.Generator("cpu").manual_seed(_SEED), device="cpu").to(whole)
    return [noise / noise.norm(dim=-1, keepdim=True), *(None for _ in finals)]
