"""Checkpoint schedules as pure data: which states are stored, and from which state each segment is run again.

A sequence is divided into N segments, numbered 0 to N-1. State i is the state before segment i; state 0 is given. A
schedule is a list of actions. In its text form each action is one word:

    A3-5   advance: run segments 3 and 4, from state 3 to state 5, and keep nothing
    S5     store state 5
    R6     reverse: run segment 6 from state 6 and keep its tape, go back through the segment, drop the tape
    D5     drop state 5

Source: Griewank and Walther 2000, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26(1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal

__all__ = ["Action", "Schedule", "advances", "binomial", "first_part"]


@dataclass(frozen=True)
class Action:
    """One action of a schedule.

    first: the segment or the state that it is about. last: the state at which an advance ends.
    """

    kind: Literal["A", "S", "R", "D"]
    first: int
    last: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.first}" + (f"-{self.last}" if self.kind == "A" else "")


@dataclass(frozen=True)
class Schedule:
    """A checkpoint schedule: actions in their order. `str(schedule)` is its text form.

    >>> schedule = binomial(4, slots=1)
    >>> str(schedule)
    'A0-1 S1 A1-3 R3 A1-2 R2 R1 D1 R0'
    >>> Schedule.parse(str(schedule)) == schedule
    True
    """

    actions: tuple[Action, ...]

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that a text form means: the inverse of `str`. Raises ValueError for a word that is no action."""
        actions = []
        for word in text.split():
            match = re.fullmatch(r"(A)(\d+)-(\d+)|([SRD])(\d+)", word)
            if match is None:
                raise ValueError(f"a schedule consists of words like A0-3, S3, R2, D3: got {word!r}")
            kind, first, last = match[1] or match[4], int(match[2] or match[5]), int(match[3] or 0)
            if kind == "A" and last <= first:
                raise ValueError(f"an advance goes forward, as in A0-3: got {word!r}")
            actions.append(Action(kind, first, last))  # type: ignore[arg-type]  # by the pattern
        return cls(tuple(actions))

    @property
    def stored_forward(self) -> tuple[int, ...]:
        """The numbers of the states that are stored before the first reversal: a forward pass keeps these."""
        stored = []
        for action in self.actions:
            if action.kind == "R":
                break
            if action.kind == "S":
                stored.append(action.first)
        return tuple(stored)

    @property
    def backward(self) -> tuple[Action, ...]:
        """The actions of the backward pass: those that follow the last state that the forward pass stores.

        >>> " ".join(map(str, binomial(4, slots=1).backward))
        'A1-3 R3 A1-2 R2 R1 D1 R0'
        """
        at = next((i for i, action in enumerate(self.actions) if action.kind == "R"), len(self.actions))
        return self.actions[at - 1 if at > 0 and self.actions[at - 1].kind == "A" else at :]

    @property
    def held(self) -> int:
        """The largest number of states that are in memory at the same time, without state 0.

        The states that the forward pass has stored stay in memory to the end.

        >>> binomial(4, slots=3).held, binomial(20, slots=3).held
        (3, 6)
        """
        live, most = set(), 0
        for action in self.backward:
            if action.kind == "S":
                live.add(action.first)
                most = max(most, len(live))
            elif action.kind == "D":
                live.discard(action.first)
        return len(self.stored_forward) + most

    def only(self, first: int, last: int) -> tuple[Action, ...]:
        """The actions that reverse the segments first to last alone, from the states that the forward pass has stored.

        >>> " ".join(map(str, Schedule.parse("A0-2 S2 A2-3 R3 R2 D2 A0-1 R1 R0").only(1, 2)))
        'R2 D2 A0-1 R1'
        """
        needed: set[int] = set()
        kept: list[Action] = []
        for action in reversed(self.backward):
            kind, i = action.kind, action.first
            if kind == "R" and first <= i <= last:
                needed.add(i)
            elif kind == "A" and action.last in needed:
                needed.remove(action.last)
                needed.add(i)
            elif kind == "R" or kind == "A" or (kind == "S" and i not in needed):
                continue
            kept.append(action)
        stored = {*self.stored_forward, *(action.first for action in kept if action.kind == "S")}
        return tuple(action for action in reversed(kept) if action.kind != "D" or action.first in stored)

    def __str__(self) -> str:
        return " ".join(map(str, self.actions))


def advances(segments: int, slots: int) -> int:
    """The smallest number of segment runs in advances with which N segments can be reversed: r N - C(c + r, r - 1).

    segments: N. slots: how many states may be stored at the same time, besides state 0. c is slots + 1, and r is the
    integer with C(c + r - 1, c) < N <= C(c + r, c).

    >>> advances(10, slots=9), advances(10, slots=2), advances(10, slots=0)
    (9, 15, 45)

    Source: Griewank and Walther 2000, proposition 1.
    """
    c, r = slots + 1, 0
    while comb(c + r, c) < segments:
        r += 1
    return r * segments - comb(c + r, r - 1) if r else 0


@lru_cache(maxsize=16)
def binomial(segments: int, slots: int) -> Schedule:
    """The binomial schedule, which has the fewest advances. With slots = segments - 1 it runs every segment twice.

    Raises ValueError for segments below 1 or slots below 0.

    >>> str(binomial(3, slots=2))
    'A0-1 S1 A1-2 S2 R2 D2 R1 D1 R0'
    """
    if segments < 1 or slots < 0:
        raise ValueError(f"segments must be at least 1 and slots at least 0: got {segments} and {slots}")
    actions: list[Action] = []
    todo: list[Action | tuple[int, int, int]] = [(0, segments, slots)]  # ranges to reverse, and actions, last first
    while todo:
        item = todo.pop()
        if isinstance(item, Action):
            actions.append(item)
            continue
        a, b, free = item
        if b - a == 1:
            actions.append(Action("R", a))
        elif free == 0:
            for i in range(b - 1, a, -1):
                actions += [Action("A", a, i), Action("R", i)]
            actions.append(Action("R", a))
        else:
            m = a + first_part(b - a, free)
            actions += [Action("A", a, m), Action("S", m)]
            todo += [(a, m, free), Action("D", m), (m, b, free - 1)]
    return Schedule(tuple(actions))


@lru_cache(maxsize=65536)
def first_part(segments: int, slots: int) -> int:
    """How many of some segments an advance passes before a state is stored; at least one slot must be free."""
    if slots >= segments - 1:
        return 1
    return min(range(1, segments), key=lambda m: m + advances(segments - m, slots - 1) + advances(m, slots))
