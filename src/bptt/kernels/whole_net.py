"""Whole passes over several layers and directions: those of each, one after the other.

Legend: T steps, B lanes, I input features, H hidden units, L layers, D directions; k = layer * D + direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _walks
from .kernel import Edges, Tensors, WholePasses, WholeRequest

__all__ = ["WholeNet"]


class WholeNet:
    """The passes over all layers and directions for calls of the same sizes: see `WholePasses`. Tensors are x, the
    initial states `[L*D, B, H]`, the weights by k; the outputs y `[T, B, D*H]`, the final states `[L*D, B, H]`. Holds
    no tensor of a call.

    lowest: the passes over each direction of the first layer, all on values in forward time; upper: of another one,
    whose input is `[T, B, D*H]`. The tape is that of all passes, and then of two directions the input of each layer
    above the first; of one that is h of the layer below.
    """

    own_tape = True

    def __init__(
        self, request: WholeRequest, layers: int, lowest: tuple[WholePasses, ...], upper: tuple[WholePasses, ...]
    ) -> None:
        cell, self.dtype, T, B, I, H, biased, _, gates, _ = request
        directions = len(lowest)
        self.layers, self.D, self.states, self.K = layers, directions, cell.states, layers * directions
        self.parts = lowest + upper * (layers - 1)
        self.pulls = all(part.pulls for part in self.parts)
        self.per = 2 + 2 * biased
        self.kept = cell.states + (gates and cell.taped_per_unit > 0)  # of each k
        self.one = B * H * self.dtype.itemsize  # bytes of a state of one k
        GH = cell.gates_per_unit * H
        shapes: list[tuple[int, ...]] = [(T, B, I), *((self.K, B, H),) * cell.states]
        for k in range(self.K):
            width = I if k < directions else directions * H
            shapes += [(GH, width), (GH, H), *((GH,),) * (2 * biased)]
        self.shapes = tuple(shapes)

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        return _walks.places(tensors, self.shapes, self.dtype)

    def infer(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[Tensor, ...]:
        return self._forward(tensors, places, edges, None, [])

    def taped(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        kept: list[Tensor] = []
        joined: list[Tensor] = []
        outputs = self._forward(tensors, places, edges, kept, joined)
        return outputs, (*kept, *joined)

    def _forward(
        self,
        tensors: tuple[Tensor, ...],
        places: tuple[int, ...],
        edges: Sequence[Edges],
        kept: list[Tensor] | None,
        joined: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """The outputs. kept: where the tape of all passes goes, if there is to be one; joined: the rest of it."""
        y = below = tensors[0]
        first = 1 + self.states
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.layers):
            ys: list[Tensor] = []
            for d in range(self.D):
                k = layer * self.D + d
                weights = places[first + k * self.per : first + (k + 1) * self.per]
                own = (below.data_ptr(), *[at + k * self.one for at in places[1:first]], *weights)
                if kept is None:
                    y, *final = self.parts[k].infer((below,), own, edges[k : k + 1])
                else:
                    (y, *final), tape = self.parts[k].taped((below,), own, edges[k : k + 1])
                    kept += tape
                ys.append(y)
                finals.append(tuple(final))
            if self.D == 2:
                y = torch.cat(ys, -1)
                if kept is not None and layer < self.layers - 1:
                    joined.append(y)
            below = y if kept is None or self.D == 2 else kept[-self.kept][1:]
        return (y, *[torch.cat(of) for of in zip(*finals, strict=True)])

    def pulled(
        self,
        tensors: tuple[Tensor, ...],
        tape: tuple[Tensor, ...],
        cotangents: Tensors,
        needs: tuple[bool, ...],
        edges: Sequence[Edges] = (),
    ) -> Tensors | None:
        D, per, first, n = self.D, self.per, 1 + self.states, self.kept
        errors, initial = cotangents[0], needs[1:first]
        grads: list[Tensor | None] = [None] * len(needs)
        states: list[Tensors] = [()] * self.K
        for layer in reversed(range(self.layers)):
            below: Tensor | None = None
            x = tensors[0] if layer == 0 else tape[self.K * n + layer - 1] if D == 2 else tape[(layer - 1) * n][1:]
            halves = (errors,) if D == 1 else (None, None) if errors is None else errors.chunk(2, -1)
            for d in range(D):
                k = layer * D + d
                at = first + k * per
                own_needs = (layer > 0 or needs[0], *initial, *needs[at : at + per])
                if True not in own_needs:
                    continue
                arrived = [None if c is None else c[k : k + 1] for c in cotangents[1:]]
                found = self.parts[k].pulled(
                    (x, *tensors[1:first], *tensors[at : at + per]),
                    tape[k * n : (k + 1) * n],
                    (halves[d], *arrived),
                    own_needs,
                    edges[k : k + 1],
                )
                if found is None:
                    return None
                dx, states[k], grads[at : at + per] = found[0], found[1:first], found[first:]
                if dx is not None:
                    below = dx if below is None else below + dx
            errors = below
        grads[0] = errors
        if True in initial:
            for i, of in enumerate(zip(*states, strict=True)):
                grads[1 + i] = torch.cat(of) if initial[i] else None
        return tuple(grads)
