"""`stream_gradients`: gradients of sequences that are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..engine import Checkpointed, given, refuse_tangents
from ..memory import Checkpoints, parse
from ._pieces import STEPS, Sliceable, as_tensor, check_lanes, is_sliceable, on_disk, one_length, rechunked, steps_of
from ._stream_loss import StreamLoss, checked_tensors
from ._stream_recurrent import CellStream
from .call import Call, Hidden, net_of
from .layers import DropInLayer
from .recurrent import Recurrent

__all__ = ["StreamGradients", "stream_gradients"]

Loss = Callable[[slice, Tensor], Tensor | None]


@dataclass(frozen=True)
class StreamGradients:
    """The loss and every gradient of a sequence, as `stream_gradients` returns them."""

    loss: float
    """The loss, summed over all steps."""
    parameters: dict[str, Tensor]
    """The gradients of the layer's parameters, by their names."""
    wrt: tuple[Tensor, ...]
    """The gradients of the tensors given as `wrt`, zero where the loss does not use one."""
    hx: Any
    """dL/dh_0, for an LSTM of (h_0, c_0), in torch.nn's layout; of a `Recurrent`, in the form of its states."""
    final: Any
    """The final state."""
    reset_state: Any = None
    """The gradient of the state that resets restart from, in the form of that state; None where none was given."""


@torch.no_grad()
def stream_gradients(
    layer: DropInLayer | Recurrent,
    x: Sliceable | Tensor | Iterable[Any],
    loss: Loss,
    hx: Any = None,
    *,
    wrt: Iterable[Tensor] = (),
    gradient: str | policies.Policy | None = None,
    memory: Checkpoints | str = "checkpoints",
    resets: Sliceable | Tensor | None = None,
    reset_state: Any = None,
    lengths: None = None,
    cu_seqlens: None = None,
) -> StreamGradients:
    """Compute every gradient of L = sum over segments of loss(steps, y), with no x, y or dL/dy in memory as a whole.

    Forward keeps checkpoints only. Backward reads and runs each segment again, computes its loss, and carries its
    adjoint over to the segment before: the gradient is that of one backward pass over all T steps, under any policy.
    Peak memory: the checkpoints and one segment's x, y and tape, about sqrt(T) steps of each; where blocks overlap,
    also the adjoints of those that cross the segment. Stored for all steps at once are only `resets`, 1 byte a
    step and lane, and the factors that `Randomized` draws beforehand, 4 bytes in float32 and about 32 during the draw.

    layer: one-directional; of a `Recurrent`, see below. x: `[T, B, I]`, anything with a length whose slices become
    tensors: a tensor, a NumPy memory map. It is read twice, in segments (three times or more where `memory` asks for a
    binomial schedule). Or an iterable of pieces `[n, B, I]` of any lengths, such as a generator or a list, which is
    read once. Under a `Chunked` policy no adjoint crosses a chunk's end, and each chunk is finished before the next is
    read: memory holds at most two pieces, a chunk's x and its tape. Under other policies the pieces are written to a
    temporary file (placed by `tempfile`, as large as x, deleted at the end). loss: called once for each segment (the
    last one first; in chunks, the last one of each chunk first), with the slice of its steps and y `[n, B, P]`; returns
    the sum (not the mean) of its losses as a scalar, or None for no loss. hx: the initial state. wrt: other tensors
    that the loss uses, such as the parameters of an output layer. gradient: default is the layer's own. memory:
    `Checkpoints(...)` or its text form, applied to each chunk where there are chunks; a chunk is one segment unless a
    number of steps or bytes is given. resets: bool `[T, B]`, anything with slices: the state is zeroed before these
    steps, as where a document starts. reset_state: the state that they restart from instead, as for the layer's
    forward; one state per step is in memory as a whole.

    Dropout between the layers is drawn for all steps at once (for each chunk, where there are chunks), so that its mask
    is in memory as a whole: train such stacks otherwise, or in eval mode. `.grad` is not touched.

    lengths, cu_seqlens: refused, as are packed and nested x: lanes here are of one length. Sequences one after the
    other may be one lane `[S, 1, I]`, with resets where each begins, whose blocks of losses count on from the first.

    A `Recurrent` has x `[T, B, ...]`, hx and reset_state in the forms of its call, and in `parameters` those that
    require a gradient. Where blocks overlap, a segment is run together with the steps before it that its losses reach,
    up to `window - 1`, which memory then holds too; and what is said in `bptt.stream_scan` about numbers and buffers
    holds. Use that function for any other step.

    Raises TypeError where layer is not one of ours, x is packed or has neither slices nor pieces, loss is no function
    or gives no scalar, wrt holds anything but tensors, or resets have no slices or are not bool; ValueError for a
    bidirectional layer, an x without steps or with slices or pieces of other sizes, a tensor of wrt that needs no
    gradient, resets or a reset_state of another shape, a reset_state without resets, and a memory that is not
    checkpoints or too small.

    >>> import torch, bptt
    >>> layer, x = bptt.nn.GRU(2, 3), torch.randn(50, 4, 2)
    >>> found = bptt.stream_gradients(layer, x, lambda steps, y: y.square().sum())
    >>> layer(x)[0].square().sum().backward()
    >>> torch.allclose(found.parameters["weight_hh_l0"], layer.weight_hh_l0.grad, atol=1e-5)
    True

    Source: checkpoints as in `bptt.Checkpoints`; stages 1 to 4, equations/README.md, chapter 1.
    """
    if not isinstance(layer, DropInLayer | Recurrent):
        raise TypeError(
            f"layer must be a bptt.nn.RNN, GRU, LSTM or Recurrent: got {type(layer).__module__}.{type(layer).__name__}"
        )
    if layer.bidirectional or (isinstance(layer, Recurrent) and layer.reverse):
        raise ValueError("layer must be one-directional: the reverse direction begins at the end of x")
    policy = layer.gradient if gradient is None else policies.parse(gradient)
    kept = parse(memory)
    if not isinstance(kept, Checkpoints):
        raise ValueError(f"memory must be Checkpoints(...) or its text form: got {memory!r}")
    if not callable(loss):
        raise TypeError(f"loss must be a function of (steps, y): got {type(loss).__name__}")
    check_lanes("x", x, "[T, B, I]")
    for name, ends in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if ends is not None:
            raise one_length(f"{name} must be None for stream_gradients, whose lanes are of one length: got {ends!r}")
    if reset_state is not None and resets is None:
        raise ValueError("reset_state is what resets restart from: got it without resets")
    tensors = checked_tensors(wrt)
    if not (hasattr(x, "__iter__") or is_sliceable(x)):
        raise TypeError(
            f"x must have a length and slices of steps, or be an iterable of pieces: got {type(x).__name__}"
        )
    if isinstance(layer, Recurrent):
        return _of_cells(layer, x, StreamLoss(loss, tensors), hx, policy, kept, resets, reset_state)
    stream = _Stream(layer, StreamLoss(loss, tensors), hx, kept, resets, reset_state)
    if not isinstance(x, list | tuple) and is_sliceable(x):
        return stream.in_segments(x, policy)
    pieces: Any = x
    if isinstance(policy, policies.Chunked):
        return stream.in_chunks(pieces, policy.k)
    with ExitStack() as stack:
        leaves = on_disk(stack, stream.rechunked(pieces, STEPS))
        return stream.in_segments(leaves[0] if leaves else (), policy)


def _of_cells(
    layer: Recurrent,
    x: Any,
    loss: StreamLoss,
    hx: Any,
    policy: policies.Policy,
    memory: Checkpoints,
    resets: Sliceable | Tensor | None,
    reset_state: Any,
) -> StreamGradients:
    """The gradients of a layer of any cell."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    n = len(loss.wrt)
    stream = CellStream(layer, StreamLoss(loss.loss, (*loss.wrt, *named.values())), hx, memory, resets, reset_state)
    stream.read(x, policy)
    of_hx, of_reset_state = stream.pulled()
    return StreamGradients(
        loss=stream.loss.total,
        parameters=dict(zip(named, stream.loss.grads[n:], strict=True)),
        wrt=tuple(stream.loss.grads[:n]),
        hx=of_hx,
        final=stream.hidden(stream.final),
        reset_state=of_reset_state,
    )


@dataclass
class _Stream:
    """A layer over a sequence that is read in segments, with the loss and local error of each when it is run again."""

    layer: DropInLayer
    loss: StreamLoss
    hx: Hidden | None
    memory: Checkpoints
    resets: Sliceable | Tensor | None
    reset_state: Hidden | None
    given: Sliceable = field(init=False)  # the input that is read at present: x, or a chunk of it

    def __post_init__(self) -> None:
        self.like = next(self.layer.parameters())
        self.dtype = self.like.dtype  # of x as it is computed with
        self.first = 0  # the step of x with which `given` begins
        self.sizes: torch.Size | None = None  # [B, I] of the first slice

    def in_segments(self, x: Any, policy: policies.Policy) -> StreamGradients:
        """The gradients from two passes or more over an x with slices: all segments forward, then all back."""
        self.given, T = x, len(x)
        if T < 1:
            raise ValueError("x must have at least 1 step: got 0")
        first = self.x(0, 1)
        call = self._call(first)
        call.x = call.x.expand(T, *first.shape[1:])  # the sizes of the whole, in the memory of a step
        call.resets = self._resets_of(call.x)
        self._check_resets_end(T)
        call.reset_state = call.restarts(self.layer, self.reset_state)
        return self._result(call, *self._gradients(call, policy))

    def in_chunks(self, pieces: Iterable[Any], k: int) -> StreamGradients:
        """The gradients from one pass: each chunk goes forward and back before the next one is read."""
        if self.memory == Checkpoints():
            self.memory = Checkpoints(steps=k)  # a chunk of x is there as a whole
        call: Call | None = None
        grads: tuple[Tensor, ...] = ()
        for (x,) in self.rechunked(pieces, k):
            call = call or self._call(x)
            x = x.to(self.dtype)
            call.x, call.resets = x, self._resets_of(x)
            self.given, steps = x, slice(self.first, self.first + len(x))
            call.reset_state = call.restarts(self.layer, _of_steps(self.reset_state, steps))
            call.hx, found = self._gradients(call, policies.Full())
            n, end = len(call.hx), len(found) - len(call.reset_state)
            if not grads:
                grads = (*found[:end], *(torch.zeros_like(r) for r in _states(self.reset_state)))
            else:  # of the initial state those of the first chunk count
                for g, f in zip(grads[n:end], found[n:end], strict=True):
                    g.add_(f)
            for g, f in zip(grads[end:], found[end:], strict=True):
                (g[steps] if f.dim() == 4 else g).add_(f)
            self.first += len(x)
        if call is None:
            raise ValueError("x must have at least 1 step: got 0")
        self._check_resets_end(self.first)
        for state in call.reset_state:
            if state.dim() == 4 and len(_states(self.reset_state)[0]) != self.first:
                got = f"got {len(_states(self.reset_state)[0])}"
                raise ValueError(f"reset_state must be [L, B, .], or [T, L, B, .] with x's {self.first} steps: {got}")
        return self._result(call, call.hx, grads)

    def rechunked(self, pieces: Iterable[Any], k: int) -> Iterator[list[Tensor]]:
        """The same steps in chunks of k, each the only leaf."""
        sizes: list[int] = []
        return rechunked(pieces, k, lambda piece: _leaves(piece, sizes), self.as_computed)

    def _call(self, x: Tensor) -> Call:
        """The call of the layer on x, time first."""
        call = Call.of(self.layer, x.transpose(0, 1) if self.layer.batch_first else x, self.hx, None)
        self.dtype, self.results = call.x.dtype, call.as_results
        return call

    def _gradients(self, call: Call, policy: policies.Policy) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the final state, the gradients of the initial state and the weights) of a call that reads x from here."""
        net = net_of(self.layer, call, policy, differentiated=True)
        keeper = Checkpointed.of(net, self.memory, call.tensors, reads_y=False)
        tensors, states = (None, *call.tensors[1:]), net.cell.states
        final, grads = keeper.stream(tensors, self, (None,) * states, (False, *(True,) * (len(tensors) - 1)))
        return final, tuple(map(given, grads))

    def _resets_of(self, x: Tensor) -> Tensor | None:
        """The resets of the steps of x `[n, B, I]`, which begins at step `first` of the whole."""
        if self.resets is None:
            return None
        found = steps_of("resets", self.resets, self.first, self.first + len(x))
        if found.dtype != torch.bool:
            raise TypeError(f"resets must be bool [T, B]: got {found.dtype}")
        if found.shape != x.shape[:2]:
            raise ValueError(
                f"resets must be [T, B], here {list(x.shape[:2])} from step {self.first} on: got {list(found.shape)}"
            )
        return found.to(x.device)

    def _check_resets_end(self, T: int) -> None:
        """Raise ValueError where resets do not end with x; resets without a length cannot be checked."""
        if self.resets is not None and hasattr(self.resets, "__len__") and len(self.resets) != T:
            raise ValueError(f"resets must be [T, B] with x's {T} steps: got {len(self.resets)}")

    def x(self, a: int, b: int) -> Tensor:
        found = self.as_computed(steps_of("x", self.given, a, b))
        if found.dim() != 3:
            raise ValueError(f"x must be [T, B, I], time first: got slices with {found.dim()} dimensions")
        self.sizes = self.sizes or found.shape[1:]
        if found.shape != (b - a, *self.sizes):
            raise ValueError(f"x[{a}:{b}] must be {[b - a, *self.sizes]}: got {list(found.shape)}")
        return found

    def as_computed(self, piece: Any) -> Tensor:
        """The piece as a tensor on the layer's device and of its dtype."""
        found = as_tensor(piece)
        refuse_tangents("stream_gradients", (found,))
        return found.to(device=self.like.device, dtype=self.dtype)

    def see(self, a: int, b: int, y: Tensor) -> None:
        """Ignore y of the forward pass: it is used in the backward pass."""

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        error = self.loss.errors(slice(self.first + a, self.first + b), [self.results(y)[0]], lambda ys: ys[0])[0]
        return None if error is None else error.to(self.dtype)

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        """Ignore dL/dx, which is not asked for."""

    def _result(self, call: Call, final: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> StreamGradients:
        """The loss, the gradients and the final state, in the caller's layout."""
        final = call.as_results(final[0], final)[1]
        grads = tuple(call.as_given((final[0], *grads))[1:])
        states, end = len(final), len(grads) - len(call.reset_state)
        return StreamGradients(
            loss=self.loss.total,
            parameters=dict(zip(self.layer._flat_weights_names, grads[states:end], strict=True)),
            wrt=tuple(self.loss.grads),
            hx=call.restore_hidden(grads[:states]),
            final=call.restore_hidden(final),
            reset_state=call.restore_hidden(grads[end:]) if call.reset_state else None,
        )


def _states(hidden: Hidden | None) -> tuple[Tensor, ...]:
    return () if hidden is None else (hidden,) if isinstance(hidden, Tensor) else hidden


def _of_steps(reset_state: Hidden | None, steps: slice) -> Hidden | None:
    """The reset states of some steps, where there is one state for every step; else reset_state as it is."""
    if isinstance(reset_state, tuple | list) and all(isinstance(r, Tensor) for r in reset_state):
        return tuple(r[steps] if r.dim() == 4 else r for r in reset_state)  # type: ignore[return-value]  # a pair too
    return reset_state[steps] if isinstance(reset_state, Tensor) and reset_state.dim() == 4 else reset_state


def _leaves(piece: Any, sizes: list[int]) -> list[Any]:
    """The piece as the only leaf. sizes: [B, I] of the pieces before it. Raises ValueError for other sizes."""
    shape = list(getattr(piece, "shape", ()))
    if len(shape) != 3:
        raise ValueError(f"x must have pieces [n, B, I], time first: got a {type(piece).__name__} {shape}")
    sizes[:] = sizes or shape[1:]
    if shape[1:] != sizes:
        raise ValueError(f"x must have pieces [n, {sizes[0]}, {sizes[1]}] like the first: got {shape}")
    return [piece]
