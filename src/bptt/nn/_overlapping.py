"""Bidirectional layers of any cells under a policy whose blocks overlap.

A block with losses first..last is a call of the whole stack on the steps of its span, from last - window + 1 to
first + window - 1, in which nothing is cut: every cell enters with the state that it has there, detached, and the other
losses are left out (equations/README.md, chapter 7). So y is put together of the blocks' outputs at their own losses.

Legend: T steps, B lanes; N blocks; K cells, numbered as torch.nn orders layers and directions; d: a direction, with its
own time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from ..policies import Policy
from ..scan.independence import rows_are_independent
from ..scan.pytrees import Step
from ..scan.surroundings import generator_states
from ._by_length import by_length
from ._forms import CellCall
from ._sequences import Sequences

__all__ = ["Layers", "StackCall", "overlapping"]


@dataclass(frozen=True)
class Layers:
    """How a bidirectional stack is run.

    calls: of the cells. whole: (y, final states) of sequences, with nothing cut, from their dropout masks, first
    states, and the states of resets. arguments, scan: the scan of one cell, as of a `Recurrent`. kernel: for steps.
    """

    calls: Sequence[CellCall]
    whole: Callable[[Sequences, Sequence[Tensor], Sequence[Any], Sequence[Any] | None], tuple[Tensor, list[Any]]]
    arguments: Callable[..., tuple[Step, Any, tuple[Tensor, ...], Tensor | None]]
    scan: Callable[[Step, Any, tuple[Tensor, ...], Tensor | None, Any], tuple[Any, Any]]
    kernel: str

    def recorded(self, sequences: Sequences, k: int, x: Tensor, states: Sequence[Any], restarts: Any) -> Any:
        """Of cell k, in its own time: (output, its states after each step, whether it treats each row by itself)."""
        d = k % 2
        arguments = self.arguments(sequences, range(k, k + 1), (x,), self.calls, states, d, keeps=True)
        of_cell = None if restarts is None else (restarts[k],)
        own = tree_map_only(Tensor, lambda t: sequences.own_restarts(t, d), of_cell)
        _, (y, (after,)) = self.scan(*arguments, own)
        return y, after, rows_are_independent(*arguments, self.kernel)


@dataclass(frozen=True)
class StackCall:
    """A call of a stack.

    masks: of dropout, for each layer but the first. states: the first ones; None for one that a cell makes. restarts:
    of each cell, the states `[T, B, ...]` that resets restart from.
    """

    layers: Layers
    sequences: Sequences
    masks: Sequence[Tensor]
    states: Sequence[Any]
    restarts: Sequence[Any] | None


@dataclass(frozen=True)
class _Blocks:
    """Blocks of losses in forward time.

    low, high: the first and the last step of each span. sources: the directions of the outputs whose losses they are.
    """

    first: list[int]
    last: list[int]
    low: list[int]
    high: list[int]
    sources: tuple[int, ...]

    def pick(self, which: Sequence[int]) -> _Blocks:
        first, last, low, high = ([part[n] for n in which] for part in (self.first, self.last, self.low, self.high))
        return _Blocks(first, last, low, high, self.sources)


def _blocks(T: int, window: int, every: int) -> list[_Blocks]:
    """The blocks of both directions: one set for both where, counted from either end, they are the same."""
    first = list(range(0, T, every))
    last = [min(a + every, T) - 1 for a in first]

    def of(first: list[int], last: list[int], sources: tuple[int, ...]) -> _Blocks:
        low = [max(0, b - window + 1) for b in last]
        return _Blocks(first, last, low, [min(T - 1, a + window - 1) for a in first], sources)

    if T % every == 0:
        return [of(first, last, (0, 1))]
    # In the reverse direction's own time; in forward time the first of these is the last.
    back = [T - 1 - b for b in last[::-1]], [T - 1 - a for a in first[::-1]]
    return [of(first, last, (0,)), of(*back, (1,))]


def overlapping(call: StackCall, gradient: Policy) -> tuple[Tensor, list[Any]]:
    """(y in forward time, final states) of a stack under a policy whose blocks overlap.

    Raises NotImplementedError for cells that draw random numbers, or have no row for each lane, and for a policy with
    edge factors.
    """
    layers, sequences = call.layers, call.sequences
    if sequences.lengths is not None:
        return _by_length(call, gradient)
    if gradient.draws_factors:
        raise NotImplementedError(f"gradient={str(gradient)!r} has overlapping blocks and edge factors, of which no "
                                  "bidirectional stack has both")  # fmt: skip
    if not all(of_cell.has_lanes for of_cell in layers.calls):
        raise NotImplementedError(
            f"gradient={str(gradient)!r} has blocks that overlap, for which the cells of a bidirectional stack need "
            "states of tensors [B, ...]"
        )
    T = sequences.T
    reach = gradient.reach(T).within(T)
    if reach.every is None or reach.window is None:
        return layers.whole(sequences, call.masks, call.states, call.restarts)
    entering, side_by_side = _entering(call, gradient)
    halves: list[Any] = [None, None]
    finals: list[Any] = [None] * len(layers.calls)
    for blocks in _blocks(T, reach.window, reach.every):
        parts: list[list[tuple[int, Tensor]]] = [[], []]
        for which in _groups(blocks, T, side_by_side, any(state is None for state in call.states)):
            some = blocks.pick(which)
            y, ends, N = _run(call, entering, some)
            for n in range(N):
                rows = slice(some.first[n] - some.low[n], some.last[n] - some.low[n] + 1)
                for d in some.sources:
                    parts[d].append((some.first[n], y[rows, n].chunk(2, 2)[d]))
            for d in some.sources:  # the block that holds the last step of a direction's own time
                at = [n for n in range(N) if (some.last[n] == T - 1 if d == 0 else some.first[n] == 0)]
                for k in range(d, len(ends), 2) if at else ():
                    finals[k] = tree_map_only(Tensor, partial(_row, n=at[0]), ends[k])
        for d in blocks.sources:
            halves[d] = torch.cat([part for _, part in sorted(parts[d], key=lambda found: found[0])])
    return torch.cat(halves, 2), finals


def _groups(blocks: _Blocks, T: int, side_by_side: bool, makes_first: bool) -> list[list[int]]:
    """The blocks that are run together, as lanes.

    makes_first: whether a cell makes its first state itself, which the others are given.
    """
    N = len(blocks.first)
    if not side_by_side:
        return [[n] for n in range(N)]
    if not makes_first:
        return [list(range(N))]
    kinds = [(low == 0, high == T - 1) for low, high in zip(blocks.low, blocks.high, strict=True)]
    return [[n for n in range(N) if kinds[n] == kind] for kind in sorted(set(kinds))]


def _entering(call: StackCall, gradient: Policy) -> tuple[list[Any], bool]:
    """(the states of each cell `[T-1, B, ...]` before steps 1 to T-1 of its own time; whether blocks may be lanes)."""
    layers, sequences, masks = call.layers, call.sequences, call.masks
    before, y = generator_states({torch.device("cpu"), sequences.x.device}), sequences.x
    found: list[Any] = []
    independent = True
    with torch.no_grad():
        for k in range(0, len(layers.calls), 2):
            y = y * masks[k // 2 - 1] if k and masks else y
            halves = []
            for d in (0, 1):
                half, after, alone = layers.recorded(sequences, k + d, y, call.states, call.restarts)
                independent &= alone
                halves.append(sequences.forward_time(half, d))
                found.append(tree_map_only(Tensor, lambda t: t[:-1], after))
            y = torch.cat(halves, 2)
    if any(not torch.equal(state, before[device]) for device, state in generator_states(before).items()):
        raise NotImplementedError(
            f"gradient={str(gradient)!r} has blocks that overlap, each a call of its own, so that the cells of a "
            "bidirectional stack must not draw random numbers (dropout= between the layers is drawn once)"
        )
    return found, independent


def _run(call: StackCall, entering: Sequence[Any], blocks: _Blocks) -> tuple[Tensor, list[Any], int]:
    """(y `[span, N, B, ...]`, final states `[N, B, ...]`, N) of some blocks, run as lanes."""
    layers, sequences, restarts = call.layers, call.sequences, call.restarts
    T, B, N, device = sequences.T, sequences.B, len(blocks.first), sequences.x.device
    low, high = (torch.tensor(part, device=device) for part in (blocks.low, blocks.high))
    spans = high - low + 1
    rows = torch.minimum(low + torch.arange(int(spans.max()), device=device)[:, None], high)

    def of_spans(t: Tensor) -> Tensor:
        return t[rows].flatten(1, 2)  # [T, B, ...] -> [span, N * B, ...]

    lengths = spans.cpu().repeat_interleave(B)
    part = Sequences(
        x=of_spans(sequences.x),
        lengths=lengths if bool((lengths != len(rows)).any()) else None,
        resets=None if sequences.resets is None else of_spans(sequences.resets),
        packed=None,
        batched=True,
        batch_first=False,
        padded=len(rows),
    )
    firsts: list[Any] = []
    for k, (of_cell, state) in enumerate(zip(layers.calls, call.states, strict=True)):
        d = k % 2
        step = T - 1 - high if d else low  # in own time, the first step of each span
        if state is None and bool((step == 0).all()):
            firsts.append(None)
            continue
        of_first = of_cell.zeros(B) if state is None else of_cell.whole(state, B)
        at = partial(_at, step=step)
        first = tree_map(lambda s, e, at=at: at(torch.cat([s[None], e])), of_first, entering[k])
        resets = sequences.own_resets(1) if d else None  # those of the forward direction lie in the span
        if resets is not None:
            own = tree_map_only(
                Tensor, lambda t, at=at: at(sequences.own_restarts(t, 1)), None if restarts is None else restarts[k]
            )
            first = _restarted(first, at(resets), own)
        firsts.append(first)
    own_restarts = None if restarts is None else [tree_map_only(Tensor, of_spans, state) for state in restarts]
    y, finals = layers.whole(part, [of_spans(mask) for mask in call.masks], firsts, own_restarts)
    finals = [tree_map_only(Tensor, lambda t: t.unflatten(0, (N, B)), state) for state in finals]
    return y.unflatten(1, (N, B)), finals, N


def _row(t: Tensor, n: int | Tensor) -> Tensor:
    return t[n]


def _at(t: Tensor, step: Tensor) -> Tensor:
    """Some steps `[N]` of a tensor `[T, B, ...]`, as lanes `[N * B, ...]`."""
    return t[step].flatten(0, 1)


def _restarted(first: Any, reset: Tensor, restart: Any) -> Any:
    """States `[rows, ...]` that are zero, or those of the resets, in the rows that are reset."""

    def of(t: Tensor, other: Tensor) -> Tensor:
        return torch.where(reset.reshape(-1, *(1,) * (t.dim() - 1)), other, t)

    return tree_map(of, first, tree_map(torch.zeros_like, first) if restart is None else restart)


def _by_length(call: StackCall, gradient: Policy) -> tuple[Tensor, list[Any]]:
    """The same of sequences of unequal lengths: the policy of each is that of the same sequence alone."""
    sequences, restarts = call.sequences, call.restarts

    def run(n: int, lane: Tensor) -> tuple[Tensor, list[Any]]:
        def of_lanes(t: Tensor) -> Tensor:
            return t[:n, lane]

        resets = None if sequences.resets is None else of_lanes(sequences.resets)
        part = replace(sequences, x=of_lanes(sequences.x), lengths=None, resets=resets, packed=None, padded=n)
        first = [tree_map_only(Tensor, partial(_row, n=lane), state) for state in call.states]
        again = None if restarts is None else [tree_map_only(Tensor, of_lanes, state) for state in restarts]
        masks = [of_lanes(mask) for mask in call.masks]
        return overlapping(StackCall(call.layers, part, masks, first, again), gradient)

    return by_length(sequences, run)
