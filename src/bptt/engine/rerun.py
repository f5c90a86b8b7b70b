"""The interpreter of checkpoint schedules: which state is available when a segment is run again and swept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from ..schedules import Action

__all__ = ["reversals"]

State = TypeVar("State")


def reversals(
    actions: Iterable[Action],
    initial: State,
    stored: Mapping[int, Callable[[], State]],
    advance: Callable[[int, State], State],
    keep: Callable[[State], State] = lambda state: state,
) -> Iterator[tuple[int, State]]:
    """Every segment to reverse, with the state before it, in the order of a schedule.

    actions: those of `schedules`, without those of the forward pass. initial: state 0. stored: gives a state that the
    forward pass stored. advance: the state after a segment, from the state before it. keep: what the backward pass
    stores of a state. A whole tape is the schedule of one segment, "R0".

    >>> from bptt.schedules import binomial
    >>> actions = binomial(4, slots=1).backward
    >>> list(reversals(actions, 0, {1: lambda: 1}, lambda segment, state: state + 1))
    [(3, 3), (2, 2), (1, 1), (0, 0)]
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
                yield i, state
            else:
                for segment in range(i, action.last):
                    state = advance(segment, state)
                at = action.last
