"""A net as a program whose tape is kept whole: stage 1 here, stages 3 and 4 in `backward`.

Legend: as in `net`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..cells import Weights
from ..kernels import KERNELS, Columns, Frames, Tape, Way, columns_at_once
from ..memory import Tapes, keeps_gates
from .backward import BackwardPass, KeptSteps, Observer
from .boundary import own_precision
from .graph import graph_gradients
from .net import Net, States
from .records import Asked, Grads, Saved, Tensors, given
from .tracing import refuse_recording

__all__ = ["NetProgram", "OfNet", "Rerun", "Stack"]


class Rerun(NamedTuple):
    """A run of steps a to b-1, which direction d repeats forward so many times."""

    d: int
    a: int
    b: int
    times: float = 1


@dataclass(eq=False)
class OfNet:
    """What a program of a net has from the net: see `boundary.Program`."""

    name: ClassVar[str] = "stack"

    net: Net

    @property
    def outputs(self) -> int:
        return self.net.outputs

    @property
    def held(self) -> Tensors:
        return self.net.held

    def holding(self, tensors: Tensors) -> Self:
        return replace(self, net=self.net.holding(tensors)) if tensors else self


@dataclass(eq=False)
class NetProgram(OfNet, ABC):
    """The base class of the programs of a net on padded sequences."""

    # What a call costs: `plan` and torch's counter of operations ask --------------------------------------------------

    def segment_starts(self, T: int) -> tuple[int, ...]:
        """The first step of each segment that has a backward pass of its own, and T."""
        return (0, T)

    @abstractmethod
    def tape_values(self, inputs: Tensors) -> int:
        """Values of the tape, by lane: what is kept, and what the backward call makes again at a time."""

    def rerun(self, inputs: Tensors, most: int | None = None) -> list[Rerun]:
        """The steps that the backward call runs forward again. most: groups of blocks that are counted; where there
        are more, so many stand for them.
        """
        return []

    def rerun_products(self, inputs: Tensors) -> int:
        """Multiplications of what the backward call runs forward again."""
        net, weights = self.net, self.net.weights(inputs)
        products = [sum(net.cell.products(w)) for w in weights]
        of_direction = [sum(products[d :: net.directions]) for d in range(net.directions)]
        return sum(net.rows(inputs, a, b) * of_direction[d] for d, a, b, _ in self.rerun(inputs))

    def decided(self, inputs: Tensors) -> Self:
        """The same, with everything said that it would decide by the size of a call, as of these inputs."""
        return self

    @abstractmethod
    def first_steps(self, n: int, net: Net) -> Self:
        """The same way to keep a tape on the first n steps. net: on these alone."""


@dataclass(eq=False)
class Stack(NetProgram):
    """A net as a program: the four stages for every cell, policy, kernel and direction.

    memory: what the tape keeps beside the states.
    """

    memory: Tapes

    @property
    def reads(self) -> int:
        """How many outputs `backward` reads: y, where two directions have it instead of the tape."""
        return self.net.directions - 1

    def forward(self, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Program.forward`. Taped, layer by layer and direction by direction: states, gates.

        States are kept with the initial one before them, so that the output is a part of what is kept. Where it is put
        together from two directions, those of the top layer are kept in the output alone.
        """
        x = given(inputs[0])
        refuse_recording("a walk through time that is not the call of a bptt layer, as in bptt.gradients")
        with own_precision(x.device):
            return self._forward(x, inputs, keep)

    def _forward(self, x: Tensor, inputs: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        net, weights = self.net, self.net.weights(inputs)
        if not keep and len(weights) == 1 and net.lengths is None and not (net.resets or net.reverse):
            outputs = net.kernel.infer(net.cell, x, tuple(map(given, inputs[1 : net.outputs])), weights[0])
            if outputs is not None:
                return outputs, ()
        initial = net.initial(inputs)
        tape_gates = keep and self.tapes_gates(x, weights)
        tape: list[Tensor] = []
        finals: list[tuple[Tensor, ...]] = []  # the states of every layer and direction
        y, as_given = x, net.as_given
        for layer in range(net.layers):
            below, ys = net.masked(y, layer), []
            for d, (states, more) in enumerate(self._walks(layer, below, inputs, initial, weights, tape_gates)):
                if as_given and net.is_reverse(d):
                    finals.append(tuple([s[:1] for s in states]))
                    ys.append(states[0][:-1])
                else:
                    finals.append(states)
                    ys.append(net.for_walk(states[0][1:], d))
                tape += states[1:] if layer == net.layers - 1 and net.directions == 2 else states
                if more is not None:
                    tape += [more] if isinstance(more, Tensor) else more
            y = ys[0] if net.directions == 1 else torch.cat(ys, -1)
        hc_n = tuple([net.last(states) for states in zip(*finals, strict=True)])
        return (y, *hc_n), tuple(tape) if keep else ()

    def _walks(
        self,
        layer: int,
        below: Tensor,
        inputs: Tensors,
        initial: list[States],
        weights: list[Weights],
        tape_gates: bool,
    ) -> Sequence[tuple[States, Tensor | tuple[Tensor, ...] | None]]:
        """The states, and what else is kept, of all directions of a layer. below: its input, in forward time."""
        net, ks = self.net, range(layer * self.net.directions, (layer + 1) * self.net.directions)
        if net.as_given:
            ways = [
                Way(initial[k], net.walk_resets(d), weights[k], net.walk_reset_state(inputs, k), net.is_reverse(d))
                for d, k in enumerate(ks)
            ]
            return net.two_way_kernel.forward_ways(net.cell, below, ways, tape_gates)
        return [
            net.kernel.forward(
                net.cell,
                net.turn(below, d),
                initial[k],
                net.resets_of(d),
                weights[k],
                tape_gates,
                net.lengths,
                net.reset_state(inputs, k),
            )
            for d, k in enumerate(ks)
        ]

    def backward(
        self,
        saved: Saved,
        asked: Asked,
        *,
        observer: Observer | None = None,
        columns: Columns | None = None,
    ) -> Grads:
        """See `Program.backward`; observer and columns: see `BackwardPass`."""
        if saved.tape is None:
            return Grads(graph_gradients(self.net, saved.inputs, asked, self._states))
        return BackwardPass(self.net, saved.inputs, self.kept(saved), asked, observer, columns).run()

    @torch.no_grad()
    def tapes(self, saved: Saved) -> list[Tape]:
        """The tapes of every layer and direction; gates that were not kept are rebuilt."""
        asked = Asked((None,) * self.outputs, (False,) * len(saved.inputs))
        return BackwardPass(self.net, saved.inputs, self.kept(saved), asked, Observer()).tapes()

    def _states(self, inputs: Tensors) -> list[States]:
        """The states of every layer and direction, run again by operations that any tensor knows."""
        alone = Stack(replace(self.net, kernel=KERNELS["eager"]), "states")
        outputs, tape = alone.forward(inputs, keep=True)
        return [states for states, _ in alone.kept(Saved(inputs, outputs, tape))]

    def kept(self, saved: Saved) -> list[KeptSteps]:
        """(states with the initial one before them, what else is kept) of every layer and direction, from a tape."""
        net, tape = self.net, saved.tape
        assert tape is not None
        D, S, K = net.directions, net.cell.states, net.layers * net.directions
        in_output = range(K - 2, K) if D == 2 else range(0)
        initial = net.initial(saved.inputs) if in_output else []
        more = (len(tape) + len(in_output)) // K - S
        found: list[KeptSteps] = []
        at = 0
        for k in range(K):
            end = at + S
            if k in in_output:
                h_0, h, end = initial[k][0][None], net.for_walk(net.half(saved.outputs[0], k % D), k % D), end - 1
                states = (torch.cat([h, h_0] if net.states_end_first(k % D) else [h_0, h]), *tape[at:end])
            else:
                states = tape[at:end]
            at = end + more
            found.append((states, tape[end:at]))
        return found

    def tapes_gates(self, x: Tensor, weights: list[Weights]) -> bool:
        """Whether a call that keeps a tape keeps gates in it."""
        taped = self._taped(weights[0])
        return taped > 0 and keeps_gates(self.memory, x.shape[0] * x.shape[1] * taped * len(weights) * x.element_size())

    def _taped(self, w: Weights) -> int:
        """Values of each lane and step that a layer and direction may have on the tape beside its states."""
        # By the reach before `blocks`, whose division of T a graph for any T would hold to.
        per_unit = self.net.kernel.taped_per_unit(self.net.cell, self.net.reach)
        return per_unit * w.hh.shape[0] // self.net.cell.gates_per_unit

    # What a call costs ------------------------------------------------------------------------------------------------

    def tape_values(self, inputs: Tensors) -> int:
        net, (T, B, _) = self.net, given(inputs[0]).shape
        weights = net.weights(inputs)
        sizes, K = net.cell.state_sizes(weights[0]), len(weights)
        at_once = 1  # one layer and direction after the other, where the gates are rebuilt
        if self.tapes_gates(given(inputs[0]), weights) or self._groups(T, B, weights[0]) > 1:
            at_once = K
        states = sum(sizes) * K - sizes[0] * net.directions  # y holds the top layer's h
        return states * (T + 1) + at_once * net.cell.taped(weights[0]) * T

    def _groups(self, T: int, B: int, w: Weights) -> int:
        """Groups of columns that are swept through all layers."""
        net, reach = self.net, self.net.blocks(T, B)
        if not net.by_block(reach):
            return 1
        columns = Columns.of(reach, net.lengths, T, B, net.directions)
        return -(-len(columns.span) // columns_at_once(columns.frames[0], w))

    def rerun_products(self, inputs: Tensors) -> int:
        net, x, weights = self.net, given(inputs[0]), self.net.weights(inputs)
        if self.tapes_gates(x, weights):
            return 0
        if net.kernel.own_gradients:  # every block is run again
            T, B, _ = x.shape
            blocks = Frames.of(net.blocks(T, B), net.lengths, T, B)
            return int((blocks.top - blocks.start + 1).sum()) * sum(sum(net.cell.products(w)) for w in weights)
        if net.cell.taped_per_unit == 0:
            return 0
        gates = sum(sum(net.cell.products(w)[:2]) for w in weights)  # the states known
        return net.rows(inputs, 0, x.shape[0]) * gates

    def decided(self, inputs: Tensors) -> Stack:
        x = given(inputs[0])
        gates = self.tapes_gates(x, self.net.weights(inputs))
        net = replace(self.net, reach=self.net.blocks(*x.shape[:2]))
        return Stack(net, "gates" if gates else "states")

    def first_steps(self, n: int, net: Net) -> Stack:
        return replace(self, net=net)
