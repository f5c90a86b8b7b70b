"""Captured tensors in calls that a monitor does not see: compiled or scripted code, `apply` of an autograd.Function."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .leaked import refuse_gradients
from .leaves import alive, fresh
from .replay import Replay
from .surroundings import random_kept
from .visit import Visit, calls_functions, reaches, unseen

__all__ = ["complete"]


def complete(
    replay: Replay, carry: list[Tensor], xs: list[Tensor], inputs: Sequence[Tensor]
) -> tuple[Replay, str | None]:
    """With the captured tensors that the monitor could not see, found in the graph of the last step.

    carry: what enters it. inputs: what the call depends on, beside the captured tensors. The last step, so that what a
    module keeps for itself stays as the forward left it.

    And, in words, whether a second run of it depends on what the first one left, in calls that the monitor could not
    see.
    """
    T = len(replay.carry)
    values = [*carry, *(x[-1] for x in xs), *replay.captured]
    wanted = [*[True] * len(carry), *(x.requires_grad for x in xs), *[True] * len(replay.captured)]

    made: list[weakref.ref[Tensor]] = []

    def visited() -> Visit:
        return replay.visit(T - 1, list(map(fresh, values, wanted)), made)

    fault = None
    with random_kept(replay.states):
        visit = visited()
        found, opaque = unseen(visit, replay.captured)
        if T > 1 and (opaque or calls_functions(visit)) and reaches(visited(), visit):
            fault = "a step uses, inside a call that cannot be looked into, a tensor that the step before made"
        # A leaf that the step itself made, to differentiate something inside, is none that it captured.
        inside = {id(alive(ref)) for ref in made}
        found = [t for t in found if id(t) not in inside]
    del visit
    leaked = {id(t): t for t in map(alive, made) if t is not None and t.requires_grad}
    made.clear()  # a tensor that is referred to weakly cannot be exchanged
    replay = replace(replay, captured=(*replay.captured, *found), opaque=opaque)
    refuse_gradients(list(leaked.values()), (*inputs, *replay.captured))
    return replay, fault
