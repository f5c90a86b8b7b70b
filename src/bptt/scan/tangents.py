"""The tangent of a compiled step through time: another compiled step, of carry and x with their tangents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from ..engine import MappedSteps, run
from ..memory import parse as parse_memory
from ..policies import Full
from ..steps import NotTraceable, TangentStep, split, tangent_step
from .compiled import Compiled
from .looped import bare, looped
from .pytrees import split as split_tree

__all__ = ["CompiledTangent", "pushed"]


@dataclass(frozen=True, eq=False)
class CompiledTangent:
    """The traced and split tangent of a compiled step, for what moves. made: see `TangentStep`."""

    made: TangentStep
    compiled: Compiled

    @property
    def lanes(self) -> dict[int, bool]:
        """Whether a captured tensor has a row for each lane, by its place."""
        return {at: own for at, own in zip(self.made.captured, self.made.traced.lanes, strict=True) if type(at) is int}


def pushed(
    entry: Compiled, program: MappedSteps, inputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """The tangents of a program's outputs by a compiled step; None where there is none.

    inputs, tangents: as the program has them; None is zero.
    """
    step = program.plan.step
    n, m = len(step.carry), len(step.x)
    moving = tuple([t is not None for t in tangents[n:]])
    found = _tangent(entry, program, moving, tuple([t.device for t in inputs]))
    if found is None:
        return None
    of_carry = [i for i, name in enumerate(step.carry) if step.values[name].dtype.is_floating_point]
    carry = [*inputs[:n], *[torch.zeros_like(inputs[i]) if (t := tangents[i]) is None else t for i in of_carry]]
    xs = [*inputs[n : n + m], *[t for t in tangents[n : n + m] if t is not None]]
    known = [*inputs[n + m :], *[t for t in tangents[n + m :] if t is not None]]
    captured = [known[at] if isinstance(at, int) else at for at in found.made.captured]
    outputs = run(_program(found, program, (len(carry), len(xs)), inputs[0].device), *carry, *xs, *captured)
    finals, ys = outputs[: len(carry)], outputs[len(carry) :]
    made: list[Tensor] = []
    for primal, of, names in ((finals, finals[n:], step.next), (ys, ys[len(step.y) :], step.y)):
        left = iter(of)
        made += [
            next(left) if step.values[name].dtype.is_floating_point else torch.zeros_like(p)
            for p, name in zip(primal, names, strict=False)
        ]
    return tuple(made)


def _tangent(
    entry: Compiled, program: MappedSteps, moving: tuple[bool, ...], devices: tuple[torch.device, ...]
) -> CompiledTangent | None:
    """The tangent of a step for what moves, known from an earlier call; None where it cannot be traced."""
    key: Hashable = moving
    if key in entry.tangents:
        found: CompiledTangent | None = entry.tangents[key]
        return found
    assert entry.parts is not None
    assert entry.traced is not None
    made = None
    with (
        temporarily_clear_interpreter_stack(),
        forward_ad._set_fwd_grad_enabled(False),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            tangent = tangent_step(entry.parts, entry.traced.lanes, moving, devices)
            compiled = Compiled(None, None, tangent.traced, split(tangent.traced))
            made = CompiledTangent(tangent, compiled)
        except NotTraceable:
            pass
    own = [*entry.traced.lanes, *[lane for lane, moves in zip(entry.traced.lanes, moving[len(program.plan.step.x) :],
                                                              strict=True) if moves]]  # fmt: skip
    if made is not None and any(own[at] != lane for at, lane in made.lanes.items()):
        made = None
    if len(entry.tangents) >= MOST:
        entry.tangents.clear()
    entry.tangents[key] = made
    return made


MOST = 16
"""Tangents that one trace keeps, of other leaves that move."""


def _program(
    found: CompiledTangent, program: MappedSteps, counts: tuple[int, int], device: torch.device
) -> MappedSteps:
    """The tangent's program for a call of the step's."""
    compiled, T = found.compiled, program.plan.T
    reach, like = Full().reach(T).within(T), torch.empty(0, device=device)

    def plan_for(B: int) -> Any:
        return compiled.plan("auto", [like], reach, T, B, parse_memory("states"))

    carry, x = (split_tree((like,) * count)[1] for count in counts)
    loop = partial(looped, bare(carry, x, T), Full(), plan_for(program.B).step, counts)
    return MappedSteps(plan_for, program.B, loop, [], tangent=partial(pushed, compiled), resets=program.resets)
