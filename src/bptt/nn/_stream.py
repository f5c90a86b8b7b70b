"""Gradients of sequences that are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import policies
from ..engine import Checkpointed, Walk, given
from ..memory import Checkpoints, parse
from ._call import Call, Hidden, program
from ._layers import GRU, LSTM, RNN, Recurrent

__all__ = ["StreamGradients", "stream_gradients"]

Loss = Callable[[slice, Tensor], Tensor | None]


class Sliced(Protocol):
    """What has T steps and gives some of them: a tensor, an array, a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, steps: slice, /) -> Any: ...


@dataclass(frozen=True)
class StreamGradients:
    """What `stream_gradients` returns."""

    loss: float
    """The sum over all steps."""
    parameters: dict[str, Tensor]
    """The layer's gradients, by its parameter names."""
    wrt: tuple[Tensor, ...]
    """Those of the tensors given as `wrt`, zero where the loss does not use one."""
    hx: Hidden
    """dL/dh_0, for an LSTM of (h_0, c_0), in torch.nn's layout."""
    final: Hidden
    """The final state."""


@torch.no_grad()
def stream_gradients(
    layer: RNN | GRU | LSTM,
    x: Sliced | Tensor | Iterable[Any],
    loss: Loss,
    hx: Hidden | None = None,
    *,
    wrt: Iterable[Tensor] = (),
    gradient: str | policies.Policy | None = None,
    memory: Checkpoints | str = "checkpoints",
    resets: Sliced | Tensor | None = None,
) -> StreamGradients:
    """Every gradient of L = sum over segments of loss(steps, y), with neither x nor y nor dL/dy in memory as a whole.

    Forward keeps checkpoints only. On the way back each segment is read and run again, its loss is taken, and its
    adjoint walked on into the segment before: the gradient is that of one backward pass over all T steps, under any
    policy. Peak memory: the checkpoints and one segment's tape, about sqrt(T) steps of each.

    layer: one-directional. x: `[T, B, I]`, anything with a length whose slices become tensors: a tensor, a NumPy memory
    map. It is read twice, in segments (three times or more where `memory` asks for a binomial schedule). Under a
    `Chunked` policy also an iterable of pieces `[n, B, I]` of any lengths, read once: no adjoint crosses a chunk's end,
    so that each chunk is finished before the next is read. loss: called once for each segment (the last one first) or
    chunk (the first one first), with the slice of its steps and y `[n, B, P]`; returns the sum (not the mean) of its
    losses as a scalar, or None for none. hx: the initial state. wrt: other tensors that the loss uses, such as the
    parameters of an output layer. gradient: default the layer's own. memory: `Checkpoints(...)` or its text form.
    resets: bool `[T, B]`, anything with slices: the state is zeroed before these steps, as where a document starts.

    Dropout between the layers is drawn for all steps, so that it is in memory as a whole: train such stacks otherwise,
    or in eval mode. `.grad` is not touched.

    Raises TypeError where layer is none of ours, x can be read once only and the policy is not chunked, or loss gives
    no scalar, or resets are not bool; ValueError for a bidirectional layer, an x without steps or of another size,
    resets of another shape, and a memory that is not checkpoints.

    >>> import torch, bptt
    >>> layer, x = bptt.nn.GRU(2, 3), torch.randn(50, 4, 2)
    >>> found = bptt.stream_gradients(layer, x, lambda steps, y: y.square().sum())
    >>> layer(x)[0].square().sum().backward()
    >>> torch.allclose(found.parameters["weight_hh_l0"], layer.weight_hh_l0.grad, atol=1e-5)
    True

    Source: checkpoints as in `bptt.Checkpoints`; stages 1 to 4, equations/README.md, chapter 1.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            f"layer must be a bptt.nn.RNN, GRU or LSTM: got {type(layer).__module__}.{type(layer).__name__}"
        )
    if layer.bidirectional:
        raise ValueError("layer must be one-directional: the reverse direction begins at the end of x")
    policy = layer.gradient if gradient is None else policies.parse(gradient)
    kept = parse(memory)
    if not isinstance(kept, Checkpoints):
        raise ValueError(f"memory must be Checkpoints(...) or its text form: got {memory!r}")
    if not hasattr(x, "__len__") or not hasattr(x, "__getitem__"):
        if not isinstance(policy, policies.Chunked) or not hasattr(x, "__iter__"):
            raise TypeError(
                "x must have a length and slices, since it is read twice, or be an iterable under a chunked policy: "
                f"got {type(x).__name__} under {policy}"
            )
        return _in_chunks(layer, x, loss, hx, tuple(wrt), policy.k, resets)
    T = len(x)  # type: ignore[arg-type]  # it has one
    if T < 1:
        raise ValueError("x must have at least 1 step: got 0")
    source = _Segments(x, loss, next(layer.parameters()), tuple(wrt))
    first = source.x(0, 1)
    if first.dim() != 3:
        raise ValueError(f"x must be [T, B, I], time first: got slices with {first.dim()} dimensions")
    call = Call.of(layer, first.transpose(0, 1) if layer.batch_first else first, hx, None)
    call.x = first.expand(T, *first.shape[1:])  # the sizes of the whole, in the memory of a step
    if resets is not None and len(resets) != T:
        raise ValueError(f"resets must be [T, B] with x's {T} steps: got {len(resets)}")
    call.resets = _resets(resets, 0, call.x)
    stack = program(layer, call, policy, differentiated=True)
    keeper = Checkpointed.of(stack, kept, call.tensors, reads_y=False)
    inputs = (None, *call.tensors[1:])
    states = stack.cell.states
    finals, grads = keeper.stream(inputs, source, (None,) * states, (False, *(True,) * (len(inputs) - 1)))
    found = [g for g in grads if g is not None]
    return StreamGradients(
        loss=source.total,
        parameters=dict(zip(layer._flat_weights_names, found[states:], strict=True)),
        wrt=tuple(source.grads),
        hx=call.restore_hidden(tuple(found[:states])),
        final=call.restore_hidden(finals),
    )


def _in_chunks(
    layer: Recurrent,
    pieces: Iterable[Any],
    loss: Loss,
    hx: Hidden | None,
    wrt: tuple[Tensor, ...],
    k: int,
    resets: Sliced | Tensor | None,
) -> StreamGradients:
    """One pass: each chunk forward and back before the next one is read."""
    sums: list[Tensor | None] = []
    d_first: tuple[Tensor, ...] = ()
    states: tuple[Tensor, ...] = ()
    call = None
    source, at = _Segments(None, loss, next(layer.parameters()), wrt), 0
    for x in _rechunked(pieces, k, source.as_tensor):
        if call is None:
            call = Call.of(layer, x.transpose(0, 1) if layer.batch_first else x, hx, None)
            states = call.hx
        if x.shape[1:] != call.x.shape[1:]:
            raise ValueError(f"x must have pieces [n, {', '.join(map(str, call.x.shape[1:]))}]: got {list(x.shape)}")
        call.x, call.resets = x, _resets(resets, at, x)
        stack = replace(program(layer, call, policies.Full(), differentiated=True), memory="gates")
        inputs = (x, *states, *call.weights)
        outputs, tape = stack.forward(inputs, keep=True)
        dy = source.error(at, at + len(x), outputs[0])
        needs = (False, *(True,) * (len(inputs) - 1))
        walk = Walk(stack, inputs, outputs, tape, (dy, *(None for _ in states)))
        (_, *grads), _ = walk.run(needs, want_adjoints=False)
        n = len(states)
        d_first = d_first or tuple(given(g) for g in grads[:n])
        sums = [
            g if s is None else s.add_(given(g))
            for s, g in zip(sums or [None] * len(grads[n:]), grads[n:], strict=True)
        ]
        states, at = tuple(outputs[1:]), at + len(x)
    if call is None:
        raise ValueError("x must have at least 1 step: got 0")
    return StreamGradients(
        loss=source.total,
        parameters=dict(zip(layer._flat_weights_names, map(given, sums), strict=True)),
        wrt=tuple(source.grads),
        hx=call.restore_hidden(d_first),
        final=call.restore_hidden(states),
    )


def _resets(resets: Sliced | Tensor | None, first: int, x: Tensor) -> Tensor | None:
    """Those of the steps of x `[n, B, I]`, the first of which is step `first` of the whole."""
    if resets is None:
        return None
    found = torch.as_tensor(resets[first : first + len(x)])
    if found.dtype != torch.bool:
        raise TypeError(f"resets must be bool [T, B]: got {found.dtype}")
    if found.shape != x.shape[:2]:
        raise ValueError(
            f"resets must be [T, B], here {list(x.shape[:2])} from step {first} on: got {list(found.shape)}"
        )
    return found.to(x.device)


def _rechunked(pieces: Iterable[Any], k: int, as_tensor: Callable[[Any], Tensor]) -> Iterator[Tensor]:
    """The same steps in chunks of k; the last may be shorter."""
    held: list[Tensor] = []
    count = 0
    for piece in pieces:
        x = as_tensor(piece)
        if x.dim() != 3:
            raise ValueError(f"x must have pieces [n, B, I], time first: got one with {x.dim()} dimensions")
        held.append(x)
        count += len(x)
        while count >= k:
            joined = torch.cat(held)
            yield joined[:k]
            held, count = [joined[k:]], count - k
    if count:
        yield torch.cat(held)


class _Segments:
    """x read in segments; each one's loss and local errors when it is run again."""

    def __init__(self, x: Any, loss: Loss, like: Tensor, wrt: Sequence[Tensor]) -> None:
        self.given, self.loss, self.like, self.wrt = x, loss, like, wrt
        self.grads = [torch.zeros_like(w) for w in wrt]
        self.total = 0.0

    def x(self, a: int, b: int) -> Tensor:
        return self.as_tensor(self.given[a:b])

    def as_tensor(self, piece: Any) -> Tensor:
        """As the layer computes."""
        return torch.as_tensor(piece).to(device=self.like.device, dtype=self.like.dtype)

    def see(self, a: int, b: int, y: Tensor) -> None:
        """Nothing: y is looked at on the way back."""

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            value = self.loss(slice(a, b), leaf)
            if value is None:
                return None
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"loss must give a scalar tensor or None: got {got}")
            if not value.requires_grad:
                self.total += float(value)
                return None
            dy, *others = torch.autograd.grad(value.reshape(()), (leaf, *self.wrt), allow_unused=True)
        self.total += float(value.detach())
        for grad, other in zip(self.grads, others, strict=True):
            if other is not None:
                grad += other
        return dy

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        """Nothing: dL/dx is not asked for."""
