"""A net on packed sequences as a program with a whole tape: their rows as they lie, neither padded nor turned round.

Legend: as in `net`; S rows: the steps of all sequences (see `kernels.packed_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels import Frames, PackedKernel, PackedRows, Sweep, SweepResult, Tape, product
from ..memory import Tapes, keeps_gates
from .boundary import PULLBACKS, own_precision
from .net import Net, States
from .parameters import parameter_gradients
from .rebuilt import rebuilt_gates
from .records import Asked, Grads, Saved, Tensors, given
from .rules import RULES
from .stack import OfNet, Stack
from .sweep import LayerGradients, LayerSweep

__all__ = ["PackedStack"]


@dataclass(eq=False)
class PackedStack(OfNet):
    """A net as a program on packed sequences: the first input is x `[S, I]`, the first output y `[S, D*P]`.

    States of lanes are in the order of the rows, the longest lane first. net: with the lengths of these lanes, where
    they differ; its dropout masks are `[S, D*P]`; without resets and random factors, and its blocks do not overlap
    where it has several layers. memory: what the tape keeps beside the states.
    """

    reads: ClassVar[int] = 0

    rows: PackedRows
    memory: Tapes

    @staticmethod
    def takes(net: Net, T: int, B: int) -> bool:
        """Whether a net can be one, on so many steps and lanes."""
        plain = not (net.xi or net.resets) and B > 0
        return plain and isinstance(net.kernel, PackedKernel) and not net.by_block(net.blocks(T, B))

    def forward(self, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped, layer by layer and direction by direction: states, gates."""
        net, rows, weights, initial = self.net, self.rows, self.net.weights(inputs), self.net.initial(inputs)
        y, kernel = given(inputs[0]), cast("PackedKernel", net.kernel)
        tape_gates = keep and self._tapes_gates(inputs)
        tape: list[Tensor] = []
        finals: list[States] = []
        with own_precision(y.device):
            for layer in range(net.layers):
                below, ys = net.masked(y, layer), []
                for d in range(net.directions):
                    k = layer * net.directions + d
                    states, gates = kernel.packed(net.cell, below, initial[k], weights[k], tape_gates, rows, d)
                    ys.append(states[0][rows.B :])
                    finals.append(tuple([s.index_select(0, rows.last(d)) for s in states]))
                    tape += states if gates is None else (*states, gates)
                y = ys[0] if net.directions == 1 else torch.cat(ys, -1)
        return (y, *map(torch.stack, zip(*finals, strict=True))), tuple(tape) if keep else ()

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        """See `Program.backward`."""
        if saved.tape is None:
            return _ByPadding(self, self.stack).backward(saved, asked)
        return _PackedPass(self, saved, asked).run()

    def _tapes_gates(self, inputs: Tensors) -> bool:
        """Whether a call that keeps a tape keeps gates in it."""
        weights = self.net.weights(inputs)
        taped = self.net.cell.taped(weights[0])
        values = self.rows.S * taped * len(weights)
        return taped > 0 and keeps_gates(self.memory, values * given(inputs[0]).element_size())

    # The same with padding, which everything else knows --------------------------------------------------------------

    @cached_property
    def stack(self) -> Stack:
        """The same program on padded sequences."""
        net = self.net
        return Stack(replace(net, masks=tuple([given(self.pad(mask)) for mask in net.masks])), self.memory)

    def pad(self, x: Tensor | None) -> Tensor | None:
        """`[S, F]` -> `[T, B, F]`, zero in padding; None for None."""
        if x is None:
            return None
        T, B, at = self.rows.T, self.rows.B, self.rows.padded
        return x.new_zeros(T * B, x.shape[1]).index_copy(0, at, x).unflatten(0, (T, B))

    def pack(self, x: Tensor | None) -> Tensor | None:
        """`[T, B, F]` -> `[S, F]`; None for None."""
        return None if x is None else x.flatten(0, 1).index_select(0, self.rows.padded)

    def padded(self, tensors: Tensors) -> Tensors:
        """Inputs, outputs or cotangents with the first of them padded."""
        return self.pad(tensors[0]), *tensors[1:]


@dataclass(frozen=True, eq=False)
class _ByPadding:
    """A program on packed sequences by one on padded ones."""

    program: PackedStack
    stack: Stack

    def forward(self, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        (y, *final), tape = self.stack.forward(self.program.padded(inputs), keep)
        return (given(self.program.pack(y)), *final), tape

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        padded = self.program.padded
        outputs = tuple(map(given, padded(saved.outputs)))[: self.stack.reads] if saved.outputs else ()
        asked = asked._replace(cotangents=padded(asked.cotangents))
        return self.packed(self.stack.backward(Saved(padded(saved.inputs), outputs, saved.tape), asked).inputs)

    def packed(self, grads: Tensors) -> Grads:
        return Grads((self.program.pack(grads[0]), *grads[1:]))


def _observed(program: PackedStack, saved: Saved, asked: Asked) -> Grads:
    """See `boundary.PULLBACKS`: a call of the program on padded sequences, which has an operator."""
    by, padded = _ByPadding(program, program.stack), program.padded
    inputs = padded(saved.inputs)
    outputs, tape = by.stack.forward(inputs, keep=True)
    again = Saved(inputs, outputs[: by.stack.reads], tape)
    return by.packed(PULLBACKS[Stack](by.stack, again, asked._replace(cotangents=padded(asked.cotangents))).inputs)


PULLBACKS[PackedStack] = _observed


class _PackedSteps(NamedTuple):
    """What the forward pass kept of all steps: see `cells.AllSteps`."""

    prev: States
    state: States
    gates: Tensor | None


class _PackedPass(LayerSweep[Frames]):
    """One backward call over packed sequences."""

    def __init__(self, program: PackedStack, saved: Saved, asked: Asked) -> None:
        super().__init__(program.net, saved.inputs, asked)
        self.program, self.rows, self.tape = program, program.rows, saved.tape or ()
        self.weights = self.net.weights(saved.inputs)
        self.needs_initial = any(asked.needs[1 : 1 + self.net.cell.states])
        self.per_k = len(self.tape) // len(self.weights)

    def run(self) -> Grads:
        """The gradient of every input that needs one."""
        T, B = self.rows.T, self.rows.B
        with own_precision(self.x.device):
            for _ in self.down([Frames.of(self.net.blocks(T, B), self.net.lengths, T, B)]):
                pass
        return self.grads()

    def back(self, layer: int, d: int, group: Frames, errors: Tensor | None, below: Tensor | None) -> Tensor | None:
        net, k = self.net, layer * self.net.directions + d
        cell, w, x = net.cell, self.weights[k], self._input(layer)
        errors = self.dy if layer == net.layers - 1 else errors
        if errors is not None:
            errors = net.half(errors, d)[None]
        kept = self.tape[k * self.per_k : (k + 1) * self.per_k]
        states, gates = kept[: cell.states], kept[cell.states] if len(kept) > cell.states else None
        prev_h = states[0].index_select(0, self.rows.before(d)) if gates is None and cell.taped_per_unit else None
        if prev_h is not None:
            gates = rebuilt_gates(cell, w, x, prev_h, None)
        needs = self.needs_of(k)
        wanted = any(needs)
        has_finals = any(f is not None for f in self.d_finals)
        request = Sweep(
            cell=cell,
            w=w,
            tape=Tape(states, None, gates),
            frames=group,
            errors=errors,
            arriving=tuple([None if f is None else f[k] for f in self.d_finals]) if has_finals else (),
            adjoints=int(cell.needs_adjoint(w)),
            leaving=self.needs_initial,
            x=x[None],
            weights=wanted,
            bias=net.biased and wanted,
            dx=layer > 0 or self.asked.needs[0],
            packed=self.rows,
            direction=d,
        )
        result = net.kernel.sweep(request)
        weights = self._weights(request, result, needs, prev_h)
        initial = group.collect_initial(result.leaving) if self.needs_initial else (None,) * cell.states
        self.gradients[k] = LayerGradients(initial, tuple(weights), (), None)
        if not request.dx:
            return None
        part = product(given(result.da)[0], cell.input_weight(w).t()) if result.dx is None else result.dx[0]
        if layer > 0:
            return part if below is None else below.add_(part)
        self.dx = part if self.dx is None else self.dx.add_(part)
        return None

    def _weights(self, request: Sweep, result: SweepResult, needs: Any, prev_h: Tensor | None) -> list[Tensor | None]:
        """Stage 4 of one layer and direction."""
        states, gates, before = request.tape.states, request.tape.gates, self.rows.before(request.direction)
        if needs[1] and not result.weights:  # which the gradient of w.hh is made of
            prev_h = states[0].index_select(0, before) if prev_h is None else prev_h
        steps = _PackedSteps(
            () if prev_h is None else (prev_h[None],),
            tuple([s[self.rows.B :][None] for s in states]),
            None if gates is None else gates[None],
        )
        w, kernel = request.w, self.net.kernel
        return parameter_gradients(self.net.cell, w, given(request.x), steps, result, needs, None, kernel)

    def dropped(self, below: Tensor, layer: int, group: Frames) -> Tensor:
        return below * self.net.masks[layer - 1] if self.net.masks else below

    def _input(self, layer: int) -> Tensor:
        """The input of a layer `[S, .]`."""
        if layer == 0:
            return self.x
        D = self.net.directions
        hs = [self.tape[((layer - 1) * D + d) * self.per_k][self.rows.B :] for d in range(D)]
        return self.net.masked(hs[0] if D == 1 else torch.cat(hs, -1), layer)


class _PackedRules:
    """See `rules.Rules`: lanes are no dimension, so that nothing is mapped but one by one."""

    def weights(self, program: PackedStack) -> range:
        return range(program.net.inputs + len(program.held))  # what is held too

    def of_lanes(self, program: PackedStack, times: int) -> PackedStack:
        raise AssertionError("nothing is mapped but one by one")

    def tapes(self, program: PackedStack) -> bool:
        return True

    def visible(self, program: PackedStack) -> Any:
        return _ByPadding(program, RULES[Stack].visible(program.stack))

    def sums_by_group(self, program: PackedStack) -> bool:
        return False

    def is_uncut(self, program: PackedStack, x: Tensor) -> bool:
        return RULES[Stack].is_uncut(program.stack, given(program.pad(x)))

    def by_tangents(self, program: PackedStack, x: Tensor) -> bool:
        return False

    def push(self, program: PackedStack, inputs: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
        y, *final = RULES[Stack].push(program.stack, program.padded(inputs), program.padded(tangents))
        return given(program.pack(y)), *final


RULES[PackedStack] = _PackedRules()
