"""`stream_gradients` of a layer of any cell.

Legend: T steps, B lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from .. import policies
from ..memory import Checkpoints
from ..scan.pytrees import differentiable
from ._layered import split_restarts
from ._pieces import Sliceable, is_sliceable, rechunked
from ._scan_stream import ScanStream, zeros_for_none
from ._sequences import Sequences
from ._stream_loss import StreamLoss
from .recurrent import Recurrent

__all__ = ["CellStream"]


class CellStream(ScanStream):
    """A layer of cells over a sequence that is read in segments.

    loss: its wrt ends with the layer's parameters that require a gradient. hx, reset_state: as `Recurrent` takes them.
    """

    def __init__(
        self,
        layer: Recurrent,
        loss: StreamLoss,
        hx: Any,
        memory: Checkpoints,
        resets: Sliceable | Tensor | None,
        reset_state: Any,
    ) -> None:
        super().__init__(StreamLoss(lambda steps, ys: loss.loss(steps, ys[0]), loss.wrt), memory, layer.kernel, resets)
        self.layer = layer
        self.like = next((p for p in layer.parameters() if p.is_floating_point()), None)
        with torch.enable_grad():
            self.hx, self.reset_state = (tree_map_only(Tensor, _leaf, state) for state in (hx, reset_state))
        self.one: Tensor | None = None  # the first step, in the layer's layout
        self.attached: Any = None  # the first carry, with its history
        self.states: list[Tensor] = []  # the states of resets, with theirs
        self.masks: Sequence[Tensor] = ()

    def read(self, x: Any, policy: policies.Policy) -> None:
        """Find all gradients of x, which has slices or comes in pieces."""
        if not isinstance(x, list | tuple) and is_sliceable(x):
            if len(x) < 1:
                raise ValueError("x must have at least 1 step: got 0")
            self.in_segments([x], len(x), policy)
        else:
            self.in_pieces(partial(self._rechunked, x), policy)

    def begin(self, first: list[Tensor], T: int) -> None:
        (x,) = first
        least = 3 if differentiable(x) else 2
        if x.dim() < least:
            raise ValueError(
                f"x must be [T, B, ...], time first, of at least {least} dimensions: got slices with {x.dim()}"
            )
        with torch.enable_grad():
            self.step, carry, (_, *self.masks), _ = self.layer.as_scan(
                self._in_layout(x.expand(T, *x.shape[1:])), self.hx
            )
            if self.one is None:
                self.one, self.attached = self._in_layout(x), carry
                self.carry = tree_map_only(Tensor, Tensor.detach, carry)
                if self.reset_state is not None:
                    states = self._restarts(x)
                    self.states = [t for t in tree_leaves(states) if isinstance(t, Tensor)]
                    self.restart_from(states, carry)

    def joined(self, leaves: list[Tensor], a: int, b: int) -> Any:
        return leaves[0], *(mask[a:b] for mask in self.masks)

    def as_computed(self, piece: Any) -> Tensor:
        found = super().as_computed(piece)
        if self.like is None:
            return found
        return found.to(self.like.device, self.like.dtype if found.is_floating_point() else found.dtype)

    def hidden(self, carry: Any) -> Any:
        """A carry in the form of the layer's states."""
        assert self.one is not None
        y = self.one.new_zeros(1, self.one.shape[0 if self.layer.batch_first else 1], 1)
        return self.layer.from_scan((carry, (y, ())), self.one, self.hx)[1]

    def pulled(self) -> tuple[Any, Any]:
        """(the gradient of hx, that of reset_state); those of parameters that the first state is made of are added."""
        parts, form = tree_flatten(self.attached)
        carried = [t for t in parts if isinstance(t, Tensor)]
        sent = zeros_for_none(carried, self.sent)
        given = iter(sent)
        grads = form.unflatten([next(given) if isinstance(t, Tensor) else t for t in parts])
        pairs = [(t, g) for t, g in zip(carried, sent, strict=True) if t.requires_grad and g is not None]
        pairs += [(t, g) for t, g in zip(self.states, self.of_restarts, strict=True) if t.requires_grad]
        given_states = [
            t for t in tree_leaves((self.hx, self.reset_state)) if isinstance(t, Tensor) and t.requires_grad
        ]
        wanted, found = [*given_states, *self.loss.wrt], dict[int, Tensor | None]()
        if pairs and wanted:
            outputs, cotangents = zip(*pairs, strict=True)
            of_all = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True)
            found = {id(t): g for t, g in zip(wanted, of_all, strict=True)}
        self.loss.add(found.get(id(w)) for w in self.loss.wrt)

        def gradient(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.requires_grad:
                return None
            grad = found.get(id(t))
            return torch.zeros_like(t, requires_grad=False) if grad is None else grad

        of_hx = self.hidden(grads) if self.hx is None else tree_map(gradient, self.hx)
        return of_hx, None if self.reset_state is None else tree_map(gradient, self.reset_state)

    def _rechunked(self, pieces: Iterable[Any], k: int) -> Any:
        """The only leaf of the same steps, in chunks of k."""
        sizes: list[int] = []

        def leaves_of(piece: Any) -> list[Any]:
            shape = list(getattr(piece, "shape", ()))
            if len(shape) < 2:
                raise ValueError(f"x must have pieces [n, B, ...], time first: got a {type(piece).__name__} {shape}")
            sizes[:] = sizes or shape[1:]
            if shape[1:] != sizes:
                raise ValueError(f"x must have pieces [n, {', '.join(map(str, sizes))}] like the first: got {shape}")
            return [piece]

        return rechunked(pieces, k, leaves_of, self.as_computed)

    def _in_layout(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.layer.batch_first else x

    def _restarts(self, x: Tensor) -> Any:
        """The states of resets in the structure of the carry, one for all resets or `[T, ...]`. x: the first step."""
        layer = self.layer

        def of(T: int) -> tuple[Any, ...]:
            resets = torch.zeros(T, x.shape[1], dtype=torch.bool, device=x.device)
            steps, resets = self._in_layout(x.expand(T, *x.shape[1:])), self._in_layout(resets)
            sequences = Sequences.of(steps, None, resets, layer.batch_first)
            return tuple(split_restarts(self.reset_state, sequences, *layer._entered(sequences, self.hx)))

        try:
            return tree_map_only(Tensor, lambda t: t[0], of(1))
        except ValueError:
            lengths = [len(t) for t in tree_leaves(self.reset_state) if isinstance(t, Tensor) and t.dim()]
            if not lengths:
                raise
            return of(lengths[0])


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(differentiable(t))
