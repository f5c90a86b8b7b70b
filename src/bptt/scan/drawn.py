"""The random numbers of a compiled step, drawn before it runs: the numbers of a loop, and its generator states."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from ..engine import Asked, Grads, Saved, Tensors, own_precision
from ..steps import Draw, TracedStep, draw_all
from .arguments import Arguments
from .pullback import ScanPullback
from .surroundings import GeneratorStates, generator_states, random_kept, set_generators

__all__ = ["DrawnStates", "DrawsLeftOut", "drawn"]


class DrawnStates(Sequence[GeneratorStates]):
    """The generator states before each step: found by drawing once more, when they are asked for."""

    def __init__(
        self, draws: Sequence[Draw], T: int, B: int, probabilities: Mapping[str, Tensor], before: GeneratorStates
    ) -> None:
        self.draws, self.T, self.B, self.probabilities, self.before = draws, T, B, probabilities, before

    def at(self, times: Collection[int]) -> dict[int, GeneratorStates]:
        """The states before some steps."""
        found: dict[int, GeneratorStates] = {}

        def note(t: int) -> None:
            if t in times:
                found[t] = generator_states(self.before)

        with random_kept([self.before]), torch.no_grad():
            set_generators(self.before)
            draw_all(self.draws, self.T, self.B, self.probabilities, note)
        return found

    @cached_property
    def _states(self) -> list[GeneratorStates]:
        return list(self.at(range(self.T)).values())

    def __len__(self) -> int:
        return self.T

    @overload
    def __getitem__(self, t: int) -> GeneratorStates: ...
    @overload
    def __getitem__(self, t: slice) -> list[GeneratorStates]: ...
    def __getitem__(self, t: Any) -> Any:
        return self._states[t]

    def __iter__(self) -> Iterator[GeneratorStates]:
        return iter(self._states)


def drawn(
    traced: TracedStep, given: Arguments, captured: Sequence[Tensor], B: int
) -> tuple[list[Tensor], Sequence[GeneratorStates] | Sequence[None]]:
    """(the numbers `[T, ...]` that the steps of a call draw, the states of torch's generators before each step).

    The generators are left as a loop leaves them. The states are None where nothing is drawn.
    """
    if not traced.draws:
        return [], [None] * given.T
    with torch.no_grad():
        probabilities = _probabilities(traced, given, captured, B)
        states = DrawnStates(traced.draws, given.T, B, probabilities, generator_states(given.devices))
        return draw_all(traced.draws, given.T, B, probabilities), states


def _probabilities(traced: TracedStep, given: Arguments, captured: Sequence[Tensor], B: int) -> dict[str, Tensor]:
    """The values by which the steps draw `[T, B * rows, ...]`, by name."""
    part, T = traced.probabilities, given.T
    if part is None:
        return {}
    values = {name: x.detach().flatten(0, 1) for name, x in zip(traced.x, given.xs, strict=False)}
    for name, t, lanes in zip(traced.captured, captured, traced.lanes, strict=True):
        values[name] = t.expand(T, *t.shape).flatten(0, 1) if lanes else t
    rows = {draw.by: draw.rows for draw in traced.draws}
    with own_precision(given.carry[0].device):
        found = part(T * B, {name: values[name] for name in part.inputs})
    return {name: v.unflatten(0, (T, B * rows[name])).contiguous() for name, v in found.items()}


@dataclass(frozen=True, eq=False)
class DrawsLeftOut:
    """A backward pass by steps that draw themselves, of a program that is given the numbers: its inputs at `where`."""

    name: ClassVar[str] = "scan"

    pullback: ScanPullback
    where: slice

    @property
    def reads(self) -> int:
        return self.pullback.reads

    @property
    def held(self) -> Tensors:
        return self.pullback.held

    def holding(self, tensors: Tensors) -> DrawsLeftOut:
        return DrawsLeftOut(self.pullback.holding(tensors), self.where)

    def backward(self, saved: Saved, asked: Asked) -> Grads:
        def without(values: Sequence[Any]) -> tuple[Any, ...]:
            kept = list(values)
            del kept[self.where]
            return tuple(kept)

        inner = saved._replace(inputs=without(saved.inputs)), asked._replace(needs=without(asked.needs))
        grads = list(self.pullback.backward(*inner).inputs)
        grads[self.where.start : self.where.start] = [None] * (self.where.stop - self.where.start)
        return Grads(tuple(grads))
