"""The interpreter of checkpoint schedules: which state is available when a segment is run again and swept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from ..schedules import Action

__all__ = ["reversals"]

State = TypeVar("State")


def reversals(
    starts: Sequence[int],
    actions: Iterable[Action],
    initial: State,
    stored: Mapping[int, Callable[[], State]],
    advance: Callable[[int, int, State], State],
    keep: Callable[[State], State] = lambda state: state,
) -> Iterator[tuple[int, int, State]]:
    """Every segment to reverse, as the steps a to b-1, with the state before it, in the order of a schedule.

    starts: the first step of each segment, and T. actions: those of `schedules`, without those of the forward pass.
    initial: state 0. stored: gives a state that the forward pass stored, by segment. advance: the state after the steps
    a to b-1, from the state before them. keep: what the backward pass stores of a state. A whole tape is the schedule
    of one segment, "R0".

    >>> from bptt.schedules import binomial
    >>> actions = binomial(4, slots=1).backward
    >>> list(reversals([0, 2, 4, 6, 7], actions, 0, {1: lambda: 2}, lambda a, b, state: state + b - a))
    [(6, 7, 6), (4, 6, 4), (2, 4, 2), (0, 2, 0)]
    """
    kept = {0: initial}
    at, state = -1, initial  # the current state, and the segment before which it stands: none yet
    for action in actions:
        i = action.first
        if action.kind == "S":
            kept[i] = state = keep(state)
        elif action.kind == "D":
            kept.pop(i, None)
        else:
            if at != i:
                at, state = i, kept[i] if i in kept else stored[i]()
            if action.kind == "R":
                yield starts[i], starts[i + 1], state
            else:
                for a, b in pairwise(starts[i : action.last + 1]):
                    state = advance(a, b, state)
                at = action.last
