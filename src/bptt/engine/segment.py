"""The backward pass of a call with checkpoints: one segment after the other, from the last to the first.

Legend: as in `net`; a, b: a segment's first step, and the one after its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import Blocks, Columns
from ..policies import EVERYTHING
from ..schedules import Action
from .crossing import Crossing
from .net import Net, States
from .records import Asked, Grads, Saved, Tensors, given
from .rerun import reversals
from .source import Source
from .stack import Stack

__all__ = ["SegmentedPass", "advance", "states_of"]


class SegmentedPass:
    """One backward call of a one-directional net: segments from the last to the first, gradients summed over them.

    starts: the first step of each segment, and T. asked: its cotangents are those of the final state.
    """

    def __init__(
        self,
        net: Net,
        starts: Sequence[int],
        inputs: Tensors,
        source: Source,
        asked: Asked,
        crossing: Crossing[Columns] | None = None,
    ) -> None:
        self.net, self.starts, self.inputs, self.asked, self.source = net, starts, inputs, asked, source
        self.initial = states_of(net, inputs)
        self.T, self.B = starts[-1], self.initial[0].shape[1]
        self.states = net.cell.states
        if crossing is None and net.reach.overlaps:
            crossing = Crossing(Blocks(net.reach, net.lengths, self.T, self.B))
        self.crossing = crossing
        self.carry: tuple[Tensor | None, ...] = (None,) * self.states
        self.sums: list[Tensor | None] = [None] * (len(inputs) - 1 - self.states)
        self.final: States = ()  # the state after the segment that was run last
        self.adjoints: list[Tensor] = []

    def run(self, stored: Mapping[int, Callable[[], States]], actions: Iterable[Action]) -> Grads:
        """All gradients, that of x left out, which the source has; the adjoints `[T, B, P]`.

        stored: what gives a state of the tape, by segment. actions: of `schedules`, none on the way forward.
        """
        for i, state in reversals(actions, self.initial, stored, self._advance):
            self._reverse(i, state)
            del state  # before the next one is run again
        initial = [g if need else None for g, need in zip(self.carry, self.asked.needs[1:], strict=False)]
        return Grads((None, *initial, *self.sums), self.adjoints)

    def _advance(self, i: int, state: States) -> States:
        """The state after segment i."""
        a, b = self.starts[i : i + 2]
        return advance(self.net, self.inputs, self.source, state, a, b)[1]

    def _reverse(self, i: int, state: States) -> None:
        """Run segment i again with its tape, then backward."""
        a, b = self.starts[i : i + 2]
        columns = None if self.crossing is None else self.crossing.within(a, b)
        if columns is not None and not len(columns.span):
            return  # between the columns of two directions
        part = Stack(_part(self.net, a, b), "gates")
        inputs = _inputs(self.net, self.inputs, self.source.x(a, b), state, a, b)
        outputs, tape = part.forward(inputs, keep=True)
        self.final = outputs[1:]
        cotangents = (self.source.error(a, b, outputs[0]), *self._final(a, b))
        needs = (self.asked.needs[0], *(True,) * self.states, *self.asked.needs[1 + self.states :])
        saved, asked = Saved(inputs, outputs, tape), Asked(cotangents, needs, self.asked.adjoints)
        found = part.backward(saved, asked, columns=columns, crossing=self.crossing)
        dx, *rest = found.inputs
        cut = i > 0 and (self.crossing is not None or self._cut_at(a))  # a column's adjoint crosses by itself
        self.carry = (None,) * self.states if cut else tuple(rest[: self.states])
        self.source.put(a, b, dx)
        self._add(a, b, rest[self.states :], found.adjoints)

    def _add(self, a: int, b: int, grads: Sequence[Tensor | None], adjoints: Sequence[Tensor]) -> None:
        """What a segment gives to the weights, and to the state that resets restart from; its adjoints."""
        for n, grad in enumerate(grads):
            before, of = self.sums[n], given(self.inputs[1 + self.states + n])
            if grad is not None and grad.dim() == 4:  # of the state that resets at each step restart from
                self.sums[n] = before = torch.zeros_like(of) if before is None else before
                before[a:b] = grad
            else:
                self.sums[n] = grad if before is None or grad is None else before.add_(grad)
        if self.asked.adjoints:
            self.adjoints = self.adjoints or [piece.new_zeros(self.T, *piece.shape[1:]) for piece in adjoints]
            for whole, piece in zip(self.adjoints, adjoints, strict=True):
                whole[a:b] = piece

    def _final(self, a: int, b: int) -> tuple[Tensor | None, ...]:
        """The cotangents of the state after a segment: its own where a sequence ends there, else what comes back."""
        lengths, carry, device = self.net.lengths, self.carry, self.initial[0].device
        if lengths is None:
            return tuple(self.asked.cotangents) if b == self.T else carry
        ends = ((lengths > a) & (lengths <= b)).to(device)[:, None]
        goes_on = (lengths > b).to(device)[:, None]
        found: list[Tensor | None] = []
        for own, later in zip(self.asked.cotangents, carry, strict=True):
            parts = [t.masked_fill(~m, 0) for t, m in ((own, ends), (later, goes_on)) if t is not None]
            found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return tuple(found)

    def _cut_at(self, a: int) -> bool:
        """Whether the edge into step a is cut by the policy."""
        every = self.net.reach.every
        return every is not None and a % every == 0


def states_of(net: Net, inputs: Tensors) -> States:
    """The initial states among the inputs."""
    return tuple(given(s) for s in inputs[1 : 1 + net.cell.states])


def advance(net: Net, inputs: Tensors, source: Source, state: States, a: int, b: int) -> tuple[Tensor, States]:
    """(the output of the steps a to b-1, the state after them), from the state before them."""
    part = Stack(_part(net, a, b), "states")
    (y, *after), _ = part.forward(_inputs(net, inputs, source.x(a, b), state, a, b), keep=False)
    return y, tuple(after)


def _inputs(net: Net, inputs: Tensors, x: Tensor, state: States, a: int, b: int) -> Tensors:
    """The inputs of the steps a to b-1: x and the initial states as given."""
    restart = [r if r is None or r.dim() == 3 else r[a:b] for r in inputs[net.inputs :]]
    return (x, *state, *inputs[1 + len(state) : net.inputs], *restart)


def _part(net: Net, a: int, b: int) -> Net:
    """The net on the steps a to b-1. A lane that ended before has one step, which nobody reads."""
    reach, lengths = net.reach, net.lengths
    if reach.every is not None and reach.stops_at_start and b - a <= reach.every:
        reach = EVERYTHING
    if lengths is not None:
        lengths = (lengths - a).clamp(min=1, max=b - a)
        lengths = None if bool((lengths == b - a).all()) else lengths
    return replace(
        net,
        reach=reach,
        lengths=lengths,
        masks=tuple(m[a:b] for m in net.masks),
        xi=tuple(xi[a:b] for xi in net.xi),
        resets=tuple(r[a:b] for r in net.resets),
    )
