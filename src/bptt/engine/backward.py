"""Stages 3 and 4 of a backward call: the block sweep through a net whose tape is whole, then one product per weight.

Legend: as in `net` and `kernels.frames`. Everything indexed by k is in that direction's own time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import add

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import (
    Columns,
    Frames,
    Kernel,
    SummingKernel,
    Sums,
    Sweep,
    SweepResult,
    Tape,
    columns_at_once,
    product,
)
from .boundary import own_precision
from .crossing import SegmentColumns
from .net import Net, States
from .parameters import parameter_gradients, restart_gradients, steps_of
from .rebuilt import rebuilt_gates
from .records import Asked, Grads, Tensors, given
from .sweep import LayerGradients, LayerSweep

__all__ = ["BackwardPass", "KeptSteps", "Observer"]

KeptSteps = tuple[States, Tensors]
"""The states of a layer and direction, with the initial one before them, and what else of it is on the tape: its gates,
or the record of a kernel with gradients of its own."""


class Observer:
    """An observer of a backward pass, by layer and direction k; the base class observes nothing."""

    def swept(self, k: int, frames: Frames, result: SweepResult) -> None:
        """What one sweep has brought back."""

    def summed(self, k: int, result: SweepResult) -> None:
        """The sums over all sweeps, by step and lane."""


class _LayerWalk:
    """The state of one layer and direction during its sweep."""

    def __init__(self, x: Tensor, tape: Tape, edge_factors: Tensor | None, needs: Sequence[bool]) -> None:
        self.x: Tensor | None = x  # `[T, B, I]`, its input; None while it waits for more groups
        self.tape, self.edge_factors = tape, edge_factors
        self.needs = needs  # whether each of its weights needs a gradient
        self.sums: Sums | None = None  # where there may be several sweeps
        self.totals: SweepResult | None = None  # the same, of a kernel that sums by itself
        self.d_initial: States = ()


class BackwardPass(LayerSweep["Frames | Columns"]):
    """One backward call of a net with a whole tape.

    observer: sees every sweep result, in the direction's own time, including lambda of all states. columns: those of
    the blocks to sweep, where they are not those of the policy. segment: of a segment of a longer call; then the
    gradient of the initial state is left to `groups_swept`.
    """

    def __init__(
        self,
        net: Net,
        inputs: Tensors,
        kept: list[KeptSteps],
        asked: Asked,
        observer: Observer | None = None,
        columns: Columns | None = None,
        segment: SegmentColumns | None = None,
    ) -> None:
        if observer is not None and net.as_given:
            kept = [_turned(net, k % net.directions, own) for k, own in enumerate(kept)]
            net = replace(net, turns=True)
        super().__init__(net, inputs, asked)
        self.kept, self.observer, self.columns, self.segment = kept, observer, columns, segment
        self.between = None if segment is None else segment.between
        self.weights, self.present = net.weights(inputs), net.present(self.x)
        states = net.cell.states
        self.needs_initial, self.needs_restart = any(asked.needs[1 : 1 + states]), any(asked.needs[net.inputs :])
        by_adjoint = not net.kernel.own_gradients and net.cell.needs_adjoint(self.weights[0])
        self.adjoints_asked = int(asked.adjoints or by_adjoint)
        if self.needs_restart or observer is not None:
            self.adjoints_asked = states
        self.has_finals = any(f is not None for f in self.d_finals)
        self.leaving: list[Tensor] = []  # of the group that is swept, by layer and direction, then by leaf of the state
        self.walks: dict[int, _LayerWalk] = {}
        self.top_errors: dict[int, Tensor | None] = {}
        self.below: tuple[int, Tensor] = 0, self.x  # a layer and its input, in forward time

    def run(self) -> Grads:
        """The gradient of every input that needs one; the adjoints of h."""
        with own_precision(self.x.device):
            for _ in self.down(self._groups()):
                pass
        return self.grads()

    def groups_swept(self) -> Iterator[tuple[Frames, Tensors]]:
        """The groups of columns of a segment, each when it is swept, with what leaves each column at its first step.

        None where that is not asked for.
        """
        for group in self.down(self._groups()):
            if self.leaving:
                yield group if isinstance(group, Frames) else group.frames[0], tuple(self.leaving)
            self.leaving = []

    def _groups(self) -> Iterable[Frames | Columns]:
        net, (T, B, _) = self.net, self.x.shape
        columns: Frames | Columns | None = self.columns if self.segment is None else self.segment.columns
        if columns is None:
            reach = net.blocks(T, B)
            columns = Frames.of(reach, net.lengths, T, B)
            if net.by_block(reach):
                columns = Columns.of(reach, net.lengths, T, B, net.directions)
        self.by_position = isinstance(columns, Columns)
        if isinstance(columns, Frames):
            return [columns]
        return columns.groups(columns_at_once(columns.frames[0], self.weights[0]))

    # Stage 3 ---------------------------------------------------------------------------------------------------------

    def back_both(self, layer: int, group: Frames | Columns, errors: Tensor | None) -> Tensor | None:
        net = self.net
        if net.directions == 1:
            return self.back(layer, 0, group, errors, None)
        kept = net.cell.taped_per_unit == 0 or self.kept[2 * layer][1]  # gates are rebuilt one at a time
        if not (kept and net.as_given and torch.get_num_threads() > 1):
            return super().back_both(layer, group, errors)
        below: Tensor | None = None
        asked = [self._asked(layer, d, group, errors) for d in (0, 1)]
        for d, result in enumerate(net.two_way_kernel.sweep_ways([request for _, request in asked])):
            below = self._swept(layer, d, group, *asked[d], result, below)
        return below

    def back(
        self, layer: int, d: int, group: Frames | Columns, errors: Tensor | None, below: Tensor | None
    ) -> Tensor | None:
        walk, request = self._asked(layer, d, group, errors)
        return self._swept(layer, d, group, walk, request, self.net.kernel.sweep(request), below)

    def _asked(self, layer: int, d: int, group: Frames | Columns, errors: Tensor | None) -> tuple[_LayerWalk, Sweep]:
        """The walk of a layer and direction, and what its sweep is asked for."""
        net, k = self.net, layer * self.net.directions + d
        walk = self.walks.pop(k, None) or self._walk_of(k)
        kernel = self._summing(group)
        frames, own, by_position = self._own_errors(layer, d, group, errors, kernel is not None)
        arriving: Tensors = ()
        if self.segment is not None:
            arriving = self.segment.arriving[k]
        elif self.has_finals:
            arriving = tuple([None if f is None else f[k] for f in self.d_finals])
        if self.between is not None:
            own = self.between.errors(frames, own)
        wanted = any(walk.needs) and self.asked.lane_groups is None
        goes_down = layer > 0 or (self.between is not None and self.between.below is not None)
        request = Sweep(
            cell=net.cell,
            w=self.weights[k],
            tape=walk.tape,
            frames=frames,
            errors=own,
            arriving=arriving,
            edge_factors=walk.edge_factors,
            by_position=self.by_position,
            adjoints=self.adjoints_asked,
            leaving=self.needs_initial if self.segment is None else self.segment.leaving,
            x=self._input(k) if walk.x is None and net.kernel.own_gradients else walk.x,
            weights=wanted,
            bias=net.biased and wanted,
            dx=goes_down or self.asked.needs[0],
            turned=self._by_forward_position(d),
        )
        if kernel is not None:
            walk.totals = walk.totals or kernel.totals(request)
            request = request._replace(
                totals=walk.totals, by_position=goes_down, errors_by_position=by_position, bias=False
            )
        return walk, request

    def _swept(
        self,
        layer: int,
        d: int,
        group: Frames | Columns,
        walk: _LayerWalk,
        request: Sweep,
        result: SweepResult,
        below: Tensor | None,
    ) -> Tensor | None:
        """Take what a sweep has brought back; `below`, plus what goes to the layer below."""
        net, k, frames = self.net, layer * self.net.directions + d, request.frames
        if self.observer is not None:
            self.observer.swept(k, frames, result)
        if self.segment is not None:
            self.leaving = [*result.leaving, *self.leaving]  # from the top layer down
        elif self.needs_initial:
            found = frames.collect_initial(result.leaving)
            walk.d_initial = tuple(map(add, walk.d_initial, found)) if walk.d_initial else found
        if not self.by_position:
            return self._finish(layer, d, walk, result, below)
        goes_down = layer > 0 or (self.between is not None and self.between.below is not None)
        if isinstance(group, Columns) and goes_down:
            rows = result.dx
            if rows is None:
                da = given(result.da)
                rows = product(da.flatten(0, 1), net.cell.input_weight(self.weights[k]).t())
                rows = rows.unflatten(0, da.shape[:2])
            if layer > 0:
                rows = self._turned(group, rows, d)
                below = rows if below is None else below + rows
            elif self.between is not None:
                self.between.descend(frames, rows)
        if walk.totals is not None:
            if self.is_last:
                self._finish(layer, d, walk, walk.totals.to(self.x.dtype), None)
        elif any(self.asked.needs) or self.asked.adjoints:
            walk.sums = walk.sums or Sums(request)
            walk.sums.add(frames, result)
            if self.is_last:
                self._finish(layer, d, walk, walk.sums.result(), None)
        if not self.is_last:
            walk.x, self.walks[k] = None, walk
        return below

    def _summing(self, group: Frames | Columns) -> SummingKernel | None:
        """The kernel, where results are to be summed over columns of which nobody wants to see each."""
        kernel: Kernel = self.net.kernel
        wanted = any(self.asked.needs) or self.asked.adjoints
        if not wanted or isinstance(group, Frames) or self.observer is not None:
            return None
        return kernel if isinstance(kernel, SummingKernel) else None

    def _own_errors(
        self, layer: int, d: int, group: Frames | Columns, errors: Tensor | None, sums: bool
    ) -> tuple[Frames, Tensor | None, bool]:
        """(the columns of direction d, the errors of a layer there, whether these lie by position): the call's own for
        the top layer.

        sums: whether the sweep can take those that lie by step and lane, though what goes down lies by position.
        """
        net, is_top = self.net, layer == self.net.layers - 1
        if isinstance(group, Frames):
            if is_top:
                return group, self._top_errors(d), False
            return group, None if errors is None else net.for_walk(net.half(errors, d), d), False
        frames = group.frames[d]
        if is_top:
            errors = self._top_errors(d)
            if errors is None:
                return frames, None, True
            if sums and self.segment is None and net.directions == 1:  # each walk begins with its own losses
                return frames, errors, False
            if self._by_forward_position(d):
                return frames, group.frames[0].errors(errors, group.owns_losses[d]), True
            return frames, group.errors(errors, d, net.states_end_first(d)), True
        return frames, None if errors is None else self._turned(group, net.half(errors, d), d), True

    def _by_forward_position(self, d: int) -> bool:
        """Whether values by position of a reverse direction lie in forward time."""
        return d == 1 and self.net.as_given

    def _turned(self, group: Columns, x: Tensor, d: int) -> Tensor:
        """Values by position in forward time as the sweep of direction d has them, and back."""
        return x if self._by_forward_position(d) else group.turn(x, d)

    def _top_errors(self, d: int) -> Tensor | None:
        """dL/dy of direction d, in its own time; made once, whatever the number of groups."""
        if d not in self.top_errors:
            self.top_errors[d] = None if self.dy is None else self.net.for_walk(self.net.half(self.dy, d), d)
        return self.top_errors.pop(d) if self.is_last else self.top_errors[d]

    def dropped(self, below: Tensor, layer: int, group: Frames | Columns) -> Tensor:
        if not self.net.masks:
            return below
        mask = self.net.masks[layer - 1]
        return below * (mask if isinstance(group, Frames) else group.frames[0].spread(mask))

    # Stage 4 ---------------------------------------------------------------------------------------------------------

    def _finish(self, layer: int, d: int, walk: _LayerWalk, total: SweepResult, below: Tensor | None) -> Tensor | None:
        """(6.4): one product per weight over all steps and lanes; returns `below` plus what goes to the layer below."""
        net, k = self.net, layer * self.net.directions + d
        w, tape, x = self.weights[k], walk.tape, self._input(k) if walk.x is None else walk.x
        if self.observer is not None:
            self.observer.summed(k, total)
        groups = self.asked.lane_groups
        weights = parameter_gradients(net.cell, w, x, tape, total, walk.needs, self.present, net.kernel, groups)
        restart: States = ()
        if self.needs_restart:
            restart = restart_gradients(net.cell, w, tape, total.adjoints, self.present)
            restart = tuple([net.own(r, d) if r.dim() == 3 else r for r in restart])
        initial = walk.d_initial or (None,) * net.cell.states
        adjoint = net.own(total.adjoints[0], d) if self.asked.adjoints else None
        self.gradients[k] = LayerGradients(initial, tuple(weights), restart, adjoint)
        if self.by_position if layer > 0 else not self.asked.needs[0]:
            return below
        part = net.for_walk(self._input_gradient(w, x, total), d)
        if layer == 0:
            self.dx = part if self.dx is None else self.dx + part
            return None
        return part if below is None else below + part

    def _input_gradient(self, w: Weights, x: Tensor, total: SweepResult) -> Tensor:
        """dL/dx of a layer and direction `[T, B, I]`."""
        if total.dx is not None:
            return total.dx
        T, B, _ = x.shape
        rows = product(steps_of(given(total.da), self.present), self.net.cell.input_weight(w).t())
        if self.present is not None:
            rows = rows.new_zeros(T * B, rows.shape[1]).index_copy(0, self.present, rows)
        return rows.view(x.shape)

    # What the tape holds ---------------------------------------------------------------------------------------------

    def _walk_of(self, k: int) -> _LayerWalk:
        x = self._input(k)
        factors = self.net.walk_edge_factors(k, x.dtype) if self.net.resets or self.net.xi else None
        return _LayerWalk(x, self._tape(k, x), factors, self.needs_of(k))

    def _input(self, k: int) -> Tensor:
        """The input of layer and direction k `[T, B, I]`, as its walk has it."""
        layer, d = divmod(k, self.net.directions)
        if self.below[0] != layer:
            self.below = layer, self._below(layer)
        return self.net.for_walk(self.below[1], d)

    def _below(self, layer: int) -> Tensor:
        """The input of a layer `[T, B, I or D*P]`, in forward time."""
        if layer == 0:
            return self.x
        net, D = self.net, self.net.directions
        hs = [net.output(self.kept[(layer - 1) * D + d][0][0], d) for d in range(D)]
        return net.masked(hs[0] if D == 1 else torch.cat(hs, -1), layer)

    def tapes(self) -> list[Tape]:
        """The tapes of all layers and directions, gates that were not kept rebuilt."""
        return [self._walk_of(k).tape for k in range(len(self.weights))]

    def _tape(self, k: int, x: Tensor) -> Tape:
        """The tape of layer and direction k; gates that were not kept are rebuilt by one product over all steps."""
        (states, more), net = self.kept[k], self.net
        d = k % net.directions
        resets: Tensor | None = None
        restart: States = ()
        if net.resets:
            resets, restart = net.walk_resets(d), net.walk_reset_state(self.inputs, k)
        if net.kernel.own_gradients:
            return Tape(states, resets, None, restart, tuple(map(given, more)))
        tape = Tape(states, resets, more[0] if more else None, restart, reverse=net.states_end_first(d))
        if tape.gates is None and net.cell.taped_per_unit:
            tape.gates = self._rebuilt(x, tape.prev[0], self.weights[k])
        return tape

    def _rebuilt(self, x: Tensor, h: Tensor, w: Weights) -> Tensor:
        """The gates of all steps `[T, B, F]`, of which those past the end are zero."""
        gates = rebuilt_gates(self.net.cell, w, x.flatten(0, 1), h.flatten(0, 1), self.present)
        return gates.view(*x.shape[:2], gates.shape[1])


def _turned(net: Net, d: int, kept: KeptSteps) -> KeptSteps:
    """What a walk has kept, in the direction's own time."""
    states, more = kept
    return tuple([net.turn(s, d) for s in states]), tuple([None if m is None else net.turn(m, d) for m in more])
