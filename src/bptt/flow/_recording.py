"""A recording, from which every measurement starts: a recurrent layer, its inputs, and the errors that came back to it.

It holds stages 1 and 2 of a call (forward, local errors), so that stage 3 can be looked at. Nothing here changes a
gradient or a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import nn
from ..cells import Cell, Weights
from ..engine import Asked, Net, Saved, Stack
from ..kernels import Tape
from ..nn.call import Call, net_of, whole_tape
from ..nn.layers import DropInLayer
from ..policies import Full, Policy
from ._layer_call import LayerCall, detached

__all__ = ["Loss", "Recording", "record", "recorded"]

Loss = Callable[[Any], Tensor]
"""From a model's output (a layer's y) to a scalar."""

_SEED = 0  # of the errors that stand in for a loss

_ANY_STEP = (
    "a step of one's own tells no gates, no W_hh and no share of it. lag_map, jacobians, products, lyapunov, "
    "compare, survey and diagnose take a bptt.nn.Recurrent and any scan"
)
"""What a measurement of a layer says to whoever hands it a scan."""


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """A recorded call of one recurrent layer, in the terms of the engine.

    name: the name of the layer in its model. layer: a layer of `bptt.nn`; for one of torch.nn, a twin that shares its
    parameters. call: its input x `[T, B, I]`, initial state, weights, lengths and resets. dy: dL/dy `[T, B, D*P]`, the
    local errors. dfinal: the cotangents of the final state h_n `[L*D, B, P]` (and c_n `[L*D, B, H]`), each None where
    the loss does not use it. loss: the value of the loss, None where the errors were drawn instead.
    """

    name: str
    layer: DropInLayer
    call: Call
    dy: Tensor
    dfinal: tuple[Tensor | None, ...]
    loss: float | None

    def __repr__(self) -> str:
        whose = f" in {self.name!r}" if self.name else ""
        loss = "random errors" if self.loss is None else f"loss {self.loss:.4g}"
        return f"Recording of {self.layer}{whose}: {self.T} steps, {self.B} lanes, {loss}"

    @property
    def T(self) -> int:
        """Steps."""
        return self.call.x.shape[0]

    @property
    def B(self) -> int:
        """Lanes."""
        return self.call.x.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Steps of every lane `[B]`, int64, on the CPU."""
        if self.call.lengths is None:
            return torch.full((self.B,), self.T, device="cpu")
        return self.call.lengths

    @property
    def cell(self) -> Cell:
        """What recurs."""
        return self.layer.cell()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers and directions, as torch.nn orders their parameters: "layer 0", "layer 0 reversed", ..."""
        turned = ("", " reversed") if self.layer.bidirectional else ("",)
        return tuple(f"layer {i}{suffix}" for i in range(self.layer.num_layers) for suffix in turned)

    @property
    def dropout(self) -> float:
        """The probability of the dropout between layers that the layer's mode asks for, and no measurement draws."""
        return float(self.layer.dropout) if self.layer.training and self.layer.num_layers > 1 else 0.0

    @property
    def weights(self) -> list[Weights]:
        """The parameters of every layer and direction."""
        return self.net(Full()).weights(self.call.tensors)

    def sends(self, k: int) -> Tensor:
        """Where a loss reaches layer and direction k, bool `[T, B]` on the CPU, in forward time.

        There the local error is not 0 at the output, or the cotangent of a final state, this layer's or one above it,
        which belongs to the last step that its direction takes in the lane.
        """
        D = 2 if self.layer.bidirectional else 1
        d, width = k % D, self.dy.shape[-1] // D
        sent = (self.dy[..., d * width : (d + 1) * width] != 0).any(-1).cpu()
        sent &= torch.arange(self.T, device="cpu")[:, None] < self.lengths
        finals = [(final[k::D] != 0).any(-1).any(0).cpu() for final in self.dfinal if final is not None]
        if finals:
            lanes = torch.arange(self.B, device="cpu")
            last = self.lengths - 1 if d == 0 else torch.zeros_like(lanes)
            sent[last, lanes] |= torch.stack(finals).any(0)
        return sent

    def losses(self, most: int) -> list[int]:
        """Steps at which a loss reaches the top layer, the last one among them and evenly from there, so that over all
        lanes there are at most about `most`; all steps where there is none.
        """
        first = len(self.names) - (2 if self.layer.bidirectional else 1)
        sent = torch.stack([self.sends(k) for k in range(first, len(self.names))]).any(0)
        steps = sent.any(1).nonzero()[:, 0] if sent.any() else torch.arange(self.T, device="cpu")
        every = max(1, -(-int(sent.sum()) // most))
        return steps.flip(0)[::every].flip(0).tolist()

    def to(self, dtype: torch.dtype) -> Recording:
        """The same numbers in another precision."""
        call = replace(
            self.call,
            x=self.call.x.to(dtype),
            hx=tuple(s.to(dtype) for s in self.call.hx),
            weights=tuple(w.to(dtype) for w in self.call.weights),
            reset_state=tuple(s.to(dtype) for s in self.call.reset_state),
        )
        dfinal = tuple(None if d is None else d.to(dtype) for d in self.dfinal)
        return replace(self, call=call, dy=self.dy.to(dtype), dfinal=dfinal)

    def sample(self, count: int, first: Tensor | None = None) -> Recording:
        """At most `count` lanes, without the padding that only longer ones have: the longest one that a loss reaches,
        and others that one reaches, spread evenly over their lengths; of equal lanes the first. first: `[B]`, bool,
        lanes that come before all others.
        """
        chosen = self.sampled(count, first)
        part = self if len(chosen) == self.B else self.lanes(chosen)
        return part._until(int(part.lengths.max()))

    def sampled(self, count: int, first: Tensor | None = None) -> Tensor:
        """The numbers of the lanes that `sample` takes, ascending."""
        last = len(self.names) - (2 if self.layer.bidirectional else 1)
        reached = torch.stack([self.sends(k) for k in range(last, len(self.names))]).any(0).any(0)
        least = torch.zeros_like(reached) if first is None else first.cpu()
        kept = least.nonzero()[:count, 0]
        rest = (reached & ~least if reached.any() else ~least).nonzero()[:, 0]
        rest = rest[self.lengths[rest].argsort(descending=True, stable=True)]
        few = min(count - len(kept), len(rest))
        spread = torch.arange(few, device="cpu")
        if few and bool((self.lengths[rest] != self.lengths[rest[0]]).any()):
            spread = spread * (len(rest) - 1) // max(few - 1, 1)
        return torch.cat([kept, rest[spread]]).sort().values

    def _until(self, T: int) -> Recording:
        """The first T steps, after which there is only padding."""
        if T == self.T:
            return self
        call, lengths = self.call, None if bool((self.lengths == T).all()) else self.lengths
        resets = None if call.resets is None else call.resets[:T]
        states = tuple(s[:T] if s.dim() == 4 else s for s in call.reset_state)
        call = replace(call, x=call.x[:T], lengths=lengths, resets=resets, reset_state=states, packed=None)
        return replace(self, call=call, dy=self.dy[:T])

    def lanes(self, at: slice | Tensor) -> Recording:
        """Some of the lanes alone. at: a slice, or their numbers, on the CPU."""
        on = at if isinstance(at, slice) else at.to(self.dy.device)
        call = replace(
            self.call,
            x=self.call.x[:, on],
            hx=tuple(s[:, on] for s in self.call.hx),
            lengths=None if self.call.lengths is None else self.call.lengths[at],
            resets=None if self.call.resets is None else self.call.resets[:, on],
            reset_state=tuple(s[..., on, :] for s in self.call.reset_state),
            packed=None,
        )
        dfinal = tuple(None if d is None else d[:, on] for d in self.dfinal)
        return replace(self, call=call, dy=self.dy[:, on], dfinal=dfinal)

    def net(self, gradient: Policy, xi: Sequence[Tensor] | None = None, *, adjoints: bool = True) -> Net:
        """The engine's net of this call under a policy, without the dropout between layers.

        xi: `[T, B, 1]` of each draw, in the place of what the policy draws. adjoints: whether they will be asked for.
        """
        return net_of(self.layer, self.call, gradient, differentiated=True, drops=False, adjoints=adjoints, xi=xi)

    @torch.no_grad()
    def tapes(self) -> list[Tape]:
        """States and gates of every layer and direction, in the direction's own time."""
        program, saved = self.forward()
        return program.tapes(saved)

    @torch.no_grad()
    def forward(self) -> tuple[Stack, Saved]:
        """The call under the full gradient, run forward: its program, with a whole tape, and what that has saved."""
        program = whole_tape(self.layer, self.net(Full()))
        return program, Saved(self.call.tensors, *program.forward(self.call.tensors, keep=True))

    def asked(self, *, gradients: bool = False, adjoints: bool = False) -> Asked:
        """What the backward call is asked for, from the cotangents of this call."""
        return Asked((self.dy, *self.dfinal), (gradients,) * len(self.call.tensors), adjoints)


def record(
    subject: torch.nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    name: str | None = None,
) -> Recording:
    """Run a layer or a model once, forward, and back to the outputs of one recurrent layer in it, and record the call.

    subject: a recurrent layer of `bptt.nn` or `torch.nn`, or a model with one inside, in the mode (train or eval) that
    it is in. batch: what it is called with, a tensor or a tuple of positional arguments. loss: a function from what it
    returns (for a layer, from its y) to a scalar. For a layer it may be left out: errors that are drawn from a fixed
    seed, of norm 1 at every step and lane, then take the place of the local errors. name: which recurrent layer, of a
    model with several.

    Parameters, their `.grad`, modes and torch's generators stay as they are, except that a dropout of the model draws.
    Dropout between the layers of the recurrent layer itself is left out of measurements (`Recording.dropout`), though
    the call that gives the local errors draws it: `model.eval()` beforehand leaves it out of both.

    Raises TypeError where subject holds no such layer or loss gives no scalar; ValueError for several layers and no
    name, for a layer that the call does not run exactly once, and for a loss that does not depend on its output.

    >>> import torch, bptt
    >>> r = bptt.flow.record(bptt.nn.GRU(2, 3), torch.randn(5, 4, 2), lambda y: y.square().mean())
    >>> r.T, r.B, r.names, r.dy.shape
    (5, 4, ('layer 0',), torch.Size([5, 4, 3]))
    """
    if not isinstance(subject, torch.nn.Module):
        hint = f": {_ANY_STEP}" if hasattr(subject, "scan") else ""
        raise TypeError(f"subject must be a layer or a model (torch.nn.Module): got {type(subject).__name__}{hint}")
    arguments = batch if isinstance(batch, tuple) and not isinstance(batch, PackedSequence) else (batch,)
    found_name, layer = _layer_of(subject, name)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function from the output to a scalar: got {loss!r}")
    if loss is None:
        if layer is not subject:
            raise ValueError("loss must be given for a model: a function from its output to a scalar")
        return _with_noise(found_name, _twin(layer), arguments)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, list[int]]] = []
    hook = layer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output, _versions(output))), with_kwargs=True
    )
    try:
        with torch.enable_grad():
            output = subject(*arguments)
            value = loss(output[0] if layer is subject else output)
    finally:
        hook.remove()
    if len(calls) != 1:
        raise ValueError(f"the recurrent layer {found_name!r} must run once in a call: it ran {len(calls)} times")
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must give a scalar tensor: got {got}")
    args, kwargs, output, versions = calls[0]
    if _versions(output) != versions:
        raise ValueError(
            f"the model changes the output of {found_name!r} in place, so that its errors cannot be told: "
            "change a copy (relu instead of relu_, y = y * 2 instead of y *= 2)"
        )
    y, final = output
    finals = (final,) if isinstance(final, Tensor) else tuple(final)
    rows = y.data if isinstance(y, PackedSequence) else y
    wanted = [rows, *finals]
    if not value.requires_grad or not any(t.requires_grad for t in wanted):
        raise ValueError(f"loss must depend on the output of {found_name!r}, whose parameters or input need a gradient")
    drows, *dfinal = torch.autograd.grad(value.reshape(()), wanted, allow_unused=True)
    if drows is None and all(d is None for d in dfinal):
        raise ValueError(f"loss must depend on the output of {found_name!r}: it does not")
    with torch.no_grad():
        twin = _twin(layer)
        of_layer = LayerCall.of(twin, detached(args), detached(kwargs))
        dy, states = of_layer.errors(y, drows), of_layer.final_errors(dfinal)
    return Recording(found_name, twin, of_layer.call, dy.detach(), states, float(value.detach()))


def recorded(subject: torch.nn.Module | Recording, batch: Any = None, loss: Loss | None = None) -> Recording:
    """The recording that a measurement looks at: one that is given, or `record(subject, batch, loss)`.

    Raises TypeError for a recording with a batch or loss beside it, and for a layer or model without a batch.
    """
    if isinstance(subject, Recording):
        if batch is not None or loss is not None:
            raise TypeError("batch and loss belong to a layer or a model: a Recording has its own")
        return subject
    if isinstance(subject, torch.nn.Module) and batch is None:
        raise TypeError("batch must be given with a layer or a model: what it is called with")
    return record(subject, batch, loss)


def _with_noise(name: str, layer: DropInLayer, arguments: tuple[Any, ...]) -> Recording:
    """Errors of norm 1 in random directions, the same ones every time."""
    with torch.no_grad():
        call = LayerCall.of(layer, arguments, {}).call
        T, B, _ = call.x.shape
        width = (2 if layer.bidirectional else 1) * (layer.proj_size or layer.hidden_size)
        dy = torch.randn(T, B, width, generator=torch.Generator("cpu").manual_seed(_SEED), device="cpu").to(call.x)
        dy /= dy.norm(dim=-1, keepdim=True)
        if call.lengths is not None:
            dy[torch.arange(T, device="cpu")[:, None] >= call.lengths] = 0
    return Recording(name, layer, call, dy, (None,) * len(call.hx), None)


def _layer_of(subject: torch.nn.Module, name: str | None) -> tuple[str, torch.nn.RNNBase]:
    """(name, layer) of the recurrent layer that is meant."""
    layers = {n: m for n, m in subject.named_modules() if isinstance(m, torch.nn.RNNBase)}
    if not layers:
        hint = f": {_ANY_STEP}" if any(isinstance(m, nn.Recurrent) for m in subject.modules()) else ""
        raise TypeError(f"subject must hold an RNN, GRU or LSTM layer: got {type(subject).__name__} without one{hint}")
    if name is not None:
        if name not in layers:
            raise ValueError(f"name must be one of {', '.join(map(repr, layers))}: got {name!r}")
        return name, layers[name]
    if len(layers) > 1:
        raise ValueError(
            "subject holds several recurrent layers: record one, record(model, batch, loss, name=...), where name must "
            f"be one of {', '.join(map(repr, layers))}"
        )
    return next(iter(layers.items()))


def _twin(layer: torch.nn.RNNBase) -> DropInLayer:
    """The layer itself where it is ours; for torch's, one of ours with the same parameters."""
    converted = nn.convert(layer, strict=True)
    assert isinstance(converted, DropInLayer)
    return converted


def _versions(output: Any) -> list[int]:
    """How often each tensor of a layer's output has been written to."""
    y, final = output
    tensors = (y.data if isinstance(y, PackedSequence) else y, *((final,) if isinstance(final, Tensor) else final))
    return [0 if t.is_inference() else t._version for t in tensors]
