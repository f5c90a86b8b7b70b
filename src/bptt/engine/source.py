"""The source of a call's input, segment by segment, and the destination of its output and dL/dx.

Legend: as in `net`; a, b: a segment's first step, and the one after its last.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .net import Net
from .records import given

__all__ = ["OneDirection", "Source", "Whole"]


class Source(Protocol):
    """The source of a call's x, segment by segment, and the destination of its y and dx."""

    def x(self, a: int, b: int) -> Tensor:
        """The input of steps a to b-1 `[b-a, B, I]`."""
        ...

    def see(self, a: int, b: int, y: Tensor) -> None:
        """Receive the output of these steps, in the forward pass."""
        ...

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        """dL/dy of these steps, from y as it was run again."""
        ...

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        """Receive dL/dx of these steps, None where it is not asked for."""
        ...


class Whole:
    """A `Source` of x, y, dy and dx as tensors of all steps."""

    def __init__(self, x: Tensor, dy: Tensor | None, wants_dx: bool) -> None:
        self.given, self.dy = x, dy
        self.y: Tensor | None = None
        self.dx = torch.empty_like(x) if wants_dx else None

    def x(self, a: int, b: int) -> Tensor:
        return self.given[a:b]

    def see(self, a: int, b: int, y: Tensor) -> None:
        if self.y is None:
            self.y = y.new_empty(len(self.given), *y.shape[1:])
        self.y[a:b] = y

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        return None if self.dy is None else self.dy[a:b]

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        if self.dx is not None:
            self.dx[a:b] = given(dx)


class OneDirection:
    """A `Source` of one direction of a layer, of tensors of all steps in forward time.

    Segments are numbered in the direction's own time. Their steps are in that time where lanes have lengths, and in
    forward time where all lanes are equally long.

    below: the layer's input before dropout. y: `[T, B, 2P]`, added to. dy: `[T, B, 2P]`. dx: like below, added to.
    """

    def __init__(
        self,
        net: Net,
        layer: int,
        d: int,
        below: Tensor,
        *,
        y: Tensor | None = None,
        dy: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> None:
        self.net, self.d, self.below = net, d, below
        self.mask = net.masks[layer - 1] if net.masks and layer > 0 else None
        self.y = None if y is None else net.half(y, d)
        self.dy = None if dy is None else net.half(dy, d)
        self.dx = dx

    def _part(self, x: Tensor, a: int, b: int) -> Tensor:
        if self.d == 0:
            return x[a:b]
        return x[len(x) - b : len(x) - a] if self.net.lengths is None else self.net.turned(x, a, b)

    def _add(self, x: Tensor, a: int, b: int, value: Tensor) -> None:
        if self.d == 0 or self.net.lengths is None:
            self._part(x, a, b).add_(value)
        else:
            self.net.add_turned(x, a, b, value)

    def x(self, a: int, b: int) -> Tensor:
        x = self._part(self.below, a, b)
        return x if self.mask is None else x * self._part(self.mask, a, b)

    def see(self, a: int, b: int, y: Tensor) -> None:
        self._add(given(self.y), a, b, y)

    def error(self, a: int, b: int, y: Tensor) -> Tensor | None:
        return None if self.dy is None else self._part(self.dy, a, b)

    def put(self, a: int, b: int, dx: Tensor | None) -> None:
        if self.dx is not None:
            dx = given(dx)
            self._add(self.dx, a, b, dx if self.mask is None else dx * self._part(self.mask, a, b))
