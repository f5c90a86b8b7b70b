"""A recording of a `bptt.nn.Recurrent` as the scan that it is, with the errors that came back to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from .. import nn
from ..nn import Recurrent
from ..nn.flat import is_flat
from ..policies import Full, Policy
from ..scan.arguments import Arguments
from ..scan.leaves import leaves_of
from ._recording import Loss
from ._scan_loss import ScanWithLoss
from ._scanned import Scanned, checked_scalar

__all__ = ["RecurrentCall", "holds_recurrent", "of_call", "record_scan", "tensors_of"]

_SEED = 0  # of the errors that stand in for a loss


def holds_recurrent(model: torch.nn.Module) -> bool:
    """Whether a model's recurrent layers are of `bptt.nn.Recurrent` alone."""
    kinds = {type(module) for module in model.modules() if isinstance(module, (Recurrent, torch.nn.RNNBase))}
    return bool(kinds) and all(issubclass(kind, Recurrent) for kind in kinds)


@dataclass(frozen=True, eq=False)
class RecurrentCall:
    """A call of a one-directional `Recurrent`, without history, that can be made again with all that it drew.

    args, kwargs: as it was called. generators: the state of torch's random generators before it, the CPU's first.
    """

    layer: Recurrent
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generators: tuple[Tensor, ...]

    @classmethod
    def about_to(cls, layer: Recurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecurrentCall:
        """A call that is about to be made. Its tensors are shared."""
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _cuda(layer))]
        return cls(layer, _detached(args), _detached(kwargs), tuple(states))

    @staticmethod
    def is_one_scan(layer: Recurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is a single scan of whole sequences: in one direction, and none one after the other."""
        return not layer.bidirectional and not is_flat(args[0] if args else kwargs["input"], kwargs.get("cu_seqlens"))

    @property
    def input(self) -> Tensor | PackedSequence:
        return self.args[0] if self.args else self.kwargs["input"]

    @property
    def hx(self) -> Any:
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("hx")

    @property
    def lengths(self) -> Tensor | None:
        """The steps of every lane `[B]`, on the CPU; None where all are alike."""
        given = self.input
        if isinstance(given, PackedSequence):
            return pad_packed_sequence(given)[1]
        found = self.kwargs.get("lengths")
        return None if found is None else torch.as_tensor(found, device="cpu").long()

    @property
    def steps(self) -> int:
        """The steps of the longest sequence."""
        lengths, given = self.lengths, self.input
        if lengths is not None:
            return int(lengths.max())
        assert isinstance(given, Tensor)
        tokens = not (given.is_floating_point() or given.is_complex())
        return given.shape[1 if self.layer.batch_first and given.dim() > (1 if tokens else 2) else 0]

    @contextmanager
    def drawing_again(self) -> Iterator[None]:
        """Inside `with`, torch's generators stand where they stood before the call; after it, where they stood."""
        devices = _cuda(self.layer)
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.generators[0])
            for device, state in zip(devices, self.generators[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    def as_scan(self) -> tuple[Any, Any, Any, Tensor | None]:
        """(step, carry, xs, resets) of the call, dropout drawn as it was."""
        with self.drawing_again():
            return self.layer.as_scan(*self.args, **self.kwargs)

    def outputs(self, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        """(y, final state) of the call, from what `bptt.scan` returned."""
        return self.layer.from_scan(scanned, self.input, self.hx, lengths=self.kwargs.get("lengths"))

    def run(self, policy: Policy) -> tuple[Any, Any]:
        """(y, final state) of the call under a policy."""
        with nn.using(self.layer, gradient=policy), self.drawing_again():
            return self.layer(*self.args, **self.kwargs)

    def with_errors(self, errors: list[Tensor | None]) -> ScanWithLoss:
        """The scan, with a loss that has these gradients in y and the tensors of the final state."""
        step, carry, xs, resets = self.as_scan()
        lengths = self.lengths

        def loss(carry: Any, ys: Any) -> Tensor:
            return weighted(self.outputs((carry, ys)), errors)

        return ScanWithLoss(step, carry, xs, loss, None, resets, lengths)


def weighted(outputs: tuple[Any, Any], errors: list[Tensor | None]) -> Tensor:
    """A scalar whose gradients in y and the tensors of the final state are given."""
    tensors = tensors_of(outputs)
    parts = [(d * t).sum() for d, t in zip(errors, tensors, strict=True) if d is not None and t.is_floating_point()]
    return torch.stack([part.double() for part in parts]).sum() if parts else tensors[0].new_zeros(()).double()


def tensors_of(outputs: tuple[Any, Any]) -> list[Tensor]:
    """y, then the tensors of the final state."""
    y, final = outputs
    found = [t for t in tree_leaves(final) if isinstance(t, Tensor)]
    return [y.data if isinstance(y, PackedSequence) else y, *found]


def record_scan(subject: torch.nn.Module, batch: Any, loss: Loss | None = None, *, name: str | None = None) -> Scanned:
    """Run a `bptt.nn.Recurrent`, or a model with one inside, once, forward, and back to the layer's outputs, and record
    the call as a scan with the errors that came back to it.

    subject, batch, loss, name: as in `record`. The measurements that take a scan take the layer or model itself too.
    What the loss is to the measurements is the sum of these errors times the layer's outputs: its gradient is that of
    the loss in the layer's parameters, and the same errors reach every policy. Dropout between the layers is drawn as
    in the call. Everything is measured in the layer's own precision.

    All cells of the layer are one scan, whose state is the carry of all of them, for each lane. Steps count in the
    scan's own time: a reverse layer's from the last step on.

    Raises TypeError where subject holds no such layer or loss gives no scalar; ValueError for several layers and no
    name, for a bidirectional layer, which is two scans in opposite times, for sequences one after the other
    (`cu_seqlens`, nested tensors), for a layer that the call does not run exactly once, and for a loss that does not
    depend on its output.

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
    if not RecurrentCall.is_one_scan(layer, calls[0].args, calls[0].kwargs):
        raise ValueError(
            f"the layer {found_name!r} must be called on padded or packed sequences to be recorded: got nested ones "
            "or cu_seqlens (torch.nn.utils.rnn.pack_sequence makes a PackedSequence of them)"
        )
    errors = _noise(outputs[0]) if value is None else _errors(value, outputs[0], found_name)
    return of_call(calls[0], errors, None if value is None else float(value.detach()), found_name)


def of_call(call: RecurrentCall, errors: list[Tensor | None], loss: float | None, name: str) -> Scanned:
    """The scan of a call, with the errors that came back to y and the tensors of the final state."""
    scan = call.with_errors(errors)
    given = Arguments.of(scan.step, scan.carry, scan.xs, scan.length, scan.resets)

    def run(policy: Policy) -> Tensor:
        return weighted(call.run(policy), errors)

    cuda = tuple(_cuda(call.layer))
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
    if layers[found].bidirectional:
        raise ValueError(
            f"the layer {found!r} must be one-directional: got a bidirectional one, which is a scan for each layer and "
            "direction, in opposite times. Measure a Recurrent of one of its cells at a time (reverse=True for the "
            "other direction)"
        )
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


def _detached(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach())
    if isinstance(value, (tuple, list, dict)):
        return tree_map(lambda v: _detached(v) if isinstance(v, (Tensor, PackedSequence)) else v, value)
    return value.detach() if isinstance(value, Tensor) else value


def _cuda(layer: Recurrent) -> list[torch.device]:
    """The CUDA devices whose generators a layer may draw from."""
    return sorted({p.device for p in layer.parameters() if p.is_cuda}, key=str)
