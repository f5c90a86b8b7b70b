"""The interface of a kernel.

A kernel computes the walks: stage 1 forward through time and stage 3 back through it. The products over all steps
(input projection, parameter gradients) are the engine's, where a kernel does not compute them itself.

Legend: T steps, B lanes, I input features, H hidden units, P size of h, G gates, F taped gate values; R positions and N
columns of a sweep (see `frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..policies import Reach
from .frames import Frames
from .packed_rows import PackedRows

__all__ = [
    "Edges",
    "Kernel",
    "PackedKernel",
    "Request",
    "SummingKernel",
    "Sweep",
    "SweepResult",
    "Tape",
    "TwoWayKernel",
    "Way",
    "WholeKernel",
    "WholePasses",
    "WholeRequest",
]


Tensors = tuple[Tensor | None, ...]


class Request(NamedTuple):
    """A request that a kernel takes or refuses."""

    cell: Cell
    device: torch.device
    dtype: torch.dtype
    edge_factors: bool = False  # whether factors other than 0 and 1 multiply adjoints on time edges
    resets: bool = False  # whether the state is replaced inside a sequence; padding after one is closed by resets and
    # factors of 0 in any case
    adjoints: bool = False  # whether lambda of every step is asked for: for itself, or for the gradient of a state that
    # resets restart from
    projection: bool = False  # whether h is projected; its weight's gradient takes lambda of h, where it is made of da
    gains: str | None = None  # of a plain call on the CPU that the fused kernel is measured to finish sooner: the words


@dataclass(eq=False)
class Tape:
    """The tape of stage 1, of one layer and direction, in that direction's own time. States are (h,) or (h, c).

    reverse: of a walk from the last step to the first whose values lie in forward time instead, as a `TwoWayKernel` has
    them. The states of all steps then end with the initial one.
    """

    states: tuple[Tensor, ...]  # h [T+1, B, P], c [T+1, B, H]: the initial state, then the state after each step; of a
    # kernel with gradients of its own c may be [2, B, H], the initial state and the final one
    resets: Tensor | None  # bool [T, B, 1], where the state was replaced before the step; None is nowhere
    gates: Tensor | None  # [T, B, F]; None for a cell whose state is its tape
    reset_state: tuple[Tensor, ...] = ()  # by what: h [B, P] or [T, B, P], c [B, H] or [T, B, H]; () is by zero
    record: tuple[Tensor, ...] = ()  # what a kernel with gradients of its own kept of the walk
    reverse: bool = False

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The states after each step: h `[T, B, P]`, c `[T, B, H]`."""
        return tuple(s[:-1] if self.reverse else s[1:] for s in self.states)

    @cached_property
    def prev(self) -> tuple[Tensor, ...]:
        """The states before each step, resets applied: h `[T, B, P]`, c `[T, B, H]`."""
        resets, before = self.resets, [s[1:] if self.reverse else s[:-1] for s in self.states]
        if resets is not None and self.reset_state:
            return tuple(torch.where(resets, r, s) for r, s in zip(self.reset_state, before, strict=True))
        return tuple(s if resets is None else s.masked_fill(resets, 0) for s in before)


class Sweep(NamedTuple):
    """A request for stage 3 of one layer and direction."""

    cell: Cell
    w: Weights
    tape: Tape
    frames: Frames
    errors: Tensor | None  # dL/dy [T, B, P], of which each column uses its own losses; by position [R, N, P]
    # h [n, P], c [n, H]: lambda with which columns begin, at least the rows that `Frames.arrives` names; () is none
    arriving: tuple[Tensor | None, ...] = ()
    # [T, B, 1] on the adjoint from step t to step t-1; None is 1. Where it is 0 nothing passes, not even a NaN.
    edge_factors: Tensor | None = None
    # Whether results go by position and column; else they are summed by step and lane. Errors come as results go, but
    # where totals are given.
    by_position: bool = False
    adjoints: int = 0  # of how many states lambda is asked for: 1 is h, 2 is h and c
    leaving: bool = False  # whether what leaves each column at its first step is asked for
    x: Tensor | None = None  # [T, B, I] the layer's input, where the kernel may do the products over all steps, if by
    # step and lane: sums over all columns. A kernel with gradients of its own is given it always
    weights: bool = False  # whether those of the weights' gradients are wanted
    bias: bool = False  # those of the biases
    dx: bool = False  # that of x
    # Of a `SummingKernel`: the sums by step and lane of the columns swept so far, to which this sweep's are added: da,
    # and the adjoints in place of those of the result, which has da if by position alone.
    totals: SweepResult | None = None
    errors_by_position: bool = False  # where totals are given: see by_position
    turned: bool = (
        False  # of a `TwoWayKernel`: whether values by position lie from the last step of a walk to its first
    )
    # Of a `PackedKernel`: where steps lie. Then values of steps are [1, S, .] in place of [T, B, .], in the order of
    # time, states [B + S, .]; there are no resets and edge factors, and results go by step and lane.
    packed: PackedRows | None = None
    direction: int = 0  # in which the walk went: 1 is the reverse one


class SweepResult(NamedTuple):
    """The result of a sweep, by position and column or by step and lane, as was asked for."""

    da: Tensor | None  # [T, B, G*H], by position [R, N, G*H]: dL/d(pre-activation); None of a kernel with gradients of
    # its own, which gives dx and every weight's gradient that is asked for
    adjoints: tuple[Tensor, ...] = ()  # lambda of h [.., P], of c [.., H], as many as asked for
    leaving: tuple[Tensor, ...] = ()  # h [N, P], c [N, H] by column, of those that walk to step 0, where asked for
    # da as the recurrent product sees it, (4.10), in parts along the rows of W_hh: where it differs and is at hand.
    recurrent: tuple[Tensor, ...] = ()
    weights: tuple[Tensor | None, ...] = ()  # gradients of w.ih, w.hh, w.b_ih, w.b_hh, w.hr, those that the kernel has,
    # summed over all columns; () is none
    dx: Tensor | None = None  # [T, B, I], by position [R, N, I], where the kernel has it

    def to(self, dtype: torch.dtype) -> SweepResult:
        """The same in a precision: of totals, which may have been summed in a finer one."""
        if self.da is None or self.da.dtype == dtype:
            return self
        adjoints, recurrent = (tuple([a.to(dtype) for a in part]) for part in (self.adjoints, self.recurrent))
        return self._replace(da=self.da.to(dtype), adjoints=adjoints, recurrent=recurrent)


class Edges(NamedTuple):
    """What is special about the time edges of one call of one layer and direction, as its walk goes: see `Sweep`."""

    resets: Tensor | None  # bool [T, B, 1], where the state is zeroed before the step; None is nowhere
    factors: Tensor | None  # [T, B, 1], 0 at resets too; None is 1


class WholeRequest(NamedTuple):
    """A request for the passes over one layer in one direction, of which no sequence ends before T, and P is H."""

    cell: Cell
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    biased: bool
    frames: Frames  # of the sweep
    gates: bool  # whether a pass with a tape keeps the gates
    reverse: bool = False  # of a `TwoWayKernel`: whether it goes from the last step to the first, over values that lie
    # in forward time


class Kernel(Protocol):
    """A kernel, which computes the walks for the cells, devices and dtypes it supports. Outputs are fresh tensors."""

    name: str
    variant: str | None  # the instruction set it was compiled for, if it was
    # Whether its sweeps differentiate walks as a whole, from x and the states: they give the gradients of x and of the
    # weights instead of da, ask for no gates, and reach no step after the end of a sequence.
    own_gradients: bool

    def __hash__(self) -> int: ...

    def refuses(self, request: Request) -> str | None:
        """Why this kernel cannot take the request, or None."""
        ...

    def hesitates(self, request: Request) -> str | None:
        """Why kernel="auto" should pass this kernel over for the request, though it could take it, or None."""
        ...

    def taped_per_unit(self, cell: Cell, reach: Reach) -> int:
        """The values that are kept beside the states of each hidden unit and step, where `tape_gates` asks for it."""
        ...

    def forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Tensor, ...], Tensor | tuple[Tensor, ...] | None]:
        """The states of `Tape`, h `[T+1, B, P]` (and c `[T+1, B, H]`), and the gates `[T, B, F]` if tape_gates; of a
        kernel with gradients of its own its record, if it can be kept here.

        x: `[T, B, I]`. initial: h `[B, P]`, c `[B, H]`. resets: bool `[T, B, 1]`, where the state is replaced
        before the step, by reset_state as in `Tape`; None is nowhere. lengths: `[B]` on the CPU, where lanes end
        before T; what is returned for steps after the end is any finite number.
        """
        ...

    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        """y `[T, B, P]` and the final state, h `[1, B, P]` (and c `[1, B, H]`), of one layer without resets or lengths.

        x: `[T, B, I]`. hx: the initial state, shaped like the final one. Nothing is kept: for a call that is not
        differentiated, in which a step may take less time than its bookkeeping. None: `forward` is the only way.
        """
        ...

    def sweep(self, request: Sweep) -> SweepResult:
        """The block sweep of one layer and direction over all columns of the request's frames. Zero past the end."""
        ...


class WholePasses(Protocol):
    """The passes over one layer in one direction for calls of the same sizes, each in one crossing into compiled code:
    with the bits of `Kernel.forward` and `sweep`, in less time than their bookkeeping would take.

    tensors: x, the initial state `[1, B, .]`, the weights. outputs: y `[T, B, H]`, the final state `[1, B, .]`.
    own_tape: whether the tape is for `pulled` alone; else it is the states of `Tape`, then the gates if kept. pulls:
    whether `pulled` gives gradients, where more is asked for than the initial state alone. edges: of the layer, dense;
    () where nothing is special.
    """

    own_tape: bool
    pulls: bool

    def places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        """Where the values of tensors lie; None where one is not as it should be, and `Kernel.forward` says why."""
        ...

    def infer(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[Tensor, ...]:
        """The outputs."""
        ...

    def taped(
        self, tensors: tuple[Tensor, ...], places: tuple[int, ...], edges: Sequence[Edges] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, tape). A caller may write to the outputs; the tape is as `own_tape` says."""
        ...

    def pulled(
        self,
        tensors: tuple[Tensor, ...],
        tape: tuple[Tensor, ...],
        cotangents: Tensors,
        needs: tuple[bool, ...],
        edges: Sequence[Edges] = (),
    ) -> Tensors | None:
        """The gradient of each of the tensors that needs one, stages 3 and 4; None: `Kernel.sweep` is the only way.

        cotangents: of the outputs; None where nothing arrived.
        """
        ...


@runtime_checkable
class SummingKernel(Protocol):
    """A kernel that sums over columns while it walks, and over the rows of all steps."""

    def totals(self, request: Sweep) -> SweepResult:
        """The totals of a sweep of no column yet: see `Sweep.totals`."""
        ...

    def row_sums(
        self, a: Tensor, factors: Sequence[Tensor], rows: Tensor | None, alone: bool
    ) -> tuple[list[Tensor], Tensor | None] | None:
        """a' b `[M, K]` of each factor b `[.., K]`, and the sum of a `[.., M]` over its rows if `alone` is.

        rows: those that count, int64 on the CPU; None is all. None: torch's products take less time.
        """
        ...


@runtime_checkable
class PackedKernel(Protocol):
    """A kernel that walks over packed sequences as they lie, either way, and sweeps them (`Sweep.packed`)."""

    def packed(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        w: Weights,
        tape_gates: bool,
        rows: PackedRows,
        d: int,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The states h `[B + S, P]` (and c `[B + S, H]`), in which the first B are the initial ones, and the gates
        `[S, F]` if tape_gates.

        x: `[S, I]`. initial: h `[B, P]`, c `[B, H]`. d: 1 is the direction that walks from each sequence's end.
        """
        ...


class Way(NamedTuple):
    """A walk over dense sequences as they lie in forward time: what one direction of a layer has of its own."""

    initial: tuple[Tensor, ...]  # h [B, P], c [B, H]
    resets: Tensor | None  # bool [T, B, 1], where the state is replaced before the step, by reset_state as in `Tape`
    w: Weights
    reset_state: tuple[Tensor, ...]
    reverse: bool  # whether it goes from the last step to the first


@runtime_checkable
class TwoWayKernel(Protocol):
    """A kernel that walks over dense sequences either way as they lie, and both ways at the same time.

    All values of steps lie in forward time; its tapes say so to `sweep` by `Tape.reverse`. Columns count their steps
    along the walk all the same, and values by position go by them where they are not `Sweep.turned`.
    """

    def forward_ways(
        self, cell: Cell, x: Tensor, ways: Sequence[Way], tape_gates: bool
    ) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
        """The states and gates of one or two ways, as `forward` has them, from the same x `[T, B, I]`."""
        ...

    def sweep_ways(self, requests: Sequence[Sweep]) -> list[SweepResult]:
        """The results of two sweeps, neither of which waits for the other."""
        ...


@runtime_checkable
class WholeKernel(Protocol):
    """A kernel that may do whole passes."""

    def whole(self, request: WholeRequest) -> WholePasses | None:
        """The passes for calls of these sizes; None where they take so long that nothing would be gained."""
        ...
