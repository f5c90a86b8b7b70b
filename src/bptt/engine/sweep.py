"""The driver of the block sweep: groups of blocks, one after the other, from the top layer to the bottom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .net import Net
from .records import Asked, Grads, Tensors, given

__all__ = ["LayerGradients", "LayerSweep"]

Group = TypeVar("Group")

_NO_MORE: Any = object()


class LayerGradients(NamedTuple):
    """The gradients of the inputs of one layer and direction, in its own time, and its lambda of h where asked for."""

    initial: Tensors  # h `[B, P]`, c `[B, H]`
    weights: Tensors
    restart: Tensors  # of the state that resets restart from, like `initial` or `[T, B, .]`; () where none needs one
    adjoint: Tensor | None

    def plus(self, other: LayerGradients) -> LayerGradients:
        """The sums of both: of two groups of blocks."""
        initial, weights, restart = (tuple(map(_sum, a, b)) for a, b in zip(self[:3], other[:3], strict=True))
        return LayerGradients(initial, weights, restart, _sum(self.adjoint, other.adjoint))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class LayerSweep(ABC, Generic[Group]):
    """A pass of stage 3 through the layers of a net, in whatever way a layer itself is swept back in time.

    A group of blocks is swept through all layers before the next one starts. Where blocks do not overlap, or there is
    one layer, all of them are one group.
    """

    def __init__(self, net: Net, inputs: Tensors, asked: Asked) -> None:
        self.net, self.inputs, self.asked, self.x = net, inputs, asked, given(inputs[0])
        self.dy, *self.d_finals = asked.cotangents
        self.dx: Tensor | None = None
        self.gradients: dict[int, LayerGradients] = {}

    def down(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Every group, when it is swept through all layers and directions."""
        waiting = iter(groups)
        group = next(waiting, _NO_MORE)
        while group is not _NO_MORE:
            following = next(waiting, _NO_MORE)
            self.is_last = following is _NO_MORE
            errors: Tensor | None = None
            for layer in reversed(range(self.net.layers)):
                below = self.back_both(layer, group, errors)
                errors = None if below is None else self.dropped(below, layer, group)
            yield group
            group = following

    def back_both(self, layer: int, group: Group, errors: Tensor | None) -> Tensor | None:
        """Walk all directions of a layer back: what they send to the layer below, in forward time. See `back`."""
        below: Tensor | None = None
        for d in range(self.net.directions):
            below = self.back(layer, d, group, errors, below)
        return below

    @abstractmethod
    def back(self, layer: int, d: int, group: Group, errors: Tensor | None, below: Tensor | None) -> Tensor | None:
        """Walk direction d of a layer back; `below`, plus what it sends to the layer below, in forward time.

        errors: what the layer above sends; None for the top layer, whose errors are the call's own. Of the lowest
        layer nothing is returned.
        """

    @abstractmethod
    def dropped(self, below: Tensor, layer: int, group: Group) -> Tensor:
        """What a layer sends to the one below, through the dropout between them."""

    def needs_of(self, k: int) -> Sequence[bool]:
        """Whether each weight of layer and direction k needs a gradient."""
        first = 1 + self.net.cell.states + k * self.net.per_layer
        return self.asked.needs[first : first + self.net.per_layer]

    def grads(self) -> Grads:
        """The gradient of every input that needs one, in the order of the inputs; the adjoints."""
        if not self.gradients:  # only looked at
            return Grads((None,) * len(self.inputs))
        net, own = self.net, [self.gradients[k] for k in range(len(self.gradients))]
        initial, adjoints = own[0].initial, [o.adjoint for o in own if o.adjoint is not None]
        if any(grad is not None for grad in initial):
            found = zip(*[o.initial for o in own], strict=True)
            initial = tuple([None if grads[0] is None else torch.stack(list(map(given, grads))) for grads in found])
        weights = own[0].weights if len(own) == 1 else [grad for o in own for grad in o.weights]
        restart: list[Tensor | None] = [None] * (len(self.inputs) - net.inputs)
        for i in range(len(own[0].restart)):
            grads = [given(o.restart[i]) for o in own]
            if grads[0].dim() == 3:
                grads = [net.from_resets(grad, k % net.directions) for k, grad in enumerate(grads)]
            restart[i] = torch.stack(grads, grads[0].dim() - 2)
        return Grads((self.dx, *initial, *weights, *restart), adjoints)
