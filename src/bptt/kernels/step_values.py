"""The values of some steps by name, several of which may lie in one memory.

Legend: T steps, B lanes; k rows of a value for each lane (`Value.rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..steps import Part, Value

__all__ = ["Layout", "Place", "StepValues"]

LINE = 16
"""Values whose multiples begin on a cache line, in float32 and in float64."""


class Place(NamedTuple):
    """The place of a value: the number of its memory, the distance in it, and its dimensions `[T * B * k, ...]`."""

    memory: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, kind: Value, T: int, B: int, memory: int, offset: int) -> Place:
        """The place of a value whose numbers follow one another."""
        size = sizes(kind, T, B)
        return cls(memory, offset, size, tuple(prod(size[d + 1 :]) for d in range(len(size))))


class Layout:
    """The places of the values of some steps in one memory."""

    def __init__(self, kinds: Mapping[str, Value], names: Sequence[str], T: int, B: int) -> None:
        self.places: dict[str, Place] = {}
        self.size = 0
        for name in names:
            self.places[name] = place = Place.of(kinds[name], T, B, 0, self.size)
            self.size += -(-prod(place.size) // LINE) * LINE


def sizes(kind: Value, T: int, B: int) -> tuple[int, ...]:
    """The dimensions of a value at T steps: `[T * B * k, ...]`, or without rows `[...]`."""
    return (T * B * kind.rows, *kind.shape) if kind.rows else kind.shape


class StepValues(Mapping[str, Tensor]):
    """The values of T steps by name: by row as `[T, B * k, ...]`, or as `[T * B * k, ...]` from `rows`.

    flat: those that are tensors already, by row as `[T * B * k, ...]`. places, memories: where others lie; they become
    tensors when they are asked for. lanes: those that are the same at every step, `[B * k, ...]`; they are repeated for
    all steps when they are asked for.
    """

    __slots__ = ("B", "T", "flat", "kinds", "lanes", "memories", "places")

    def __init__(
        self,
        kinds: Mapping[str, Value],
        T: int,
        B: int,
        flat: dict[str, Tensor],
        places: Mapping[str, Place] | None = None,
        memories: Sequence[Tensor] = (),
        lanes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kinds, self.T, self.B, self.flat, self.lanes = kinds, T, B, flat, lanes or {}
        self.lay(places or {}, memories)

    def lay(self, places: Mapping[str, Place], memories: Sequence[Tensor]) -> None:
        """Set where values lie that are no tensors of their own."""
        self.places, self.memories = places, memories

    def compute(self, part: Part) -> None:
        """Add the values of a part of the step, at all steps at once."""
        if part.outputs:
            made = part.function(self.T * self.B, *[self.rows(name) for name in part.inputs])
            self.flat.update(zip(part.outputs, made, strict=True))

    def zeros(self, name: str, device: torch.device) -> Tensor:
        """A value that is zero everywhere, as `rows` gives it."""
        kind = self.kinds[name]
        return torch.zeros(sizes(kind, self.T, self.B), dtype=kind.dtype, device=device)

    def rows(self, name: str) -> Tensor:
        """A value, by row `[T * B * k, ...]`."""
        found = self.flat.get(name)
        if found is None and name in self.lanes:
            found = self.lanes[name]
            self.flat[name] = found = found.expand(self.T, *found.shape).flatten(0, 1)
        if found is None:
            number, offset, size, stride = self.places[name]
            memory = self.memories[number]
            found = self.flat[name] = memory.as_strided(size, stride, memory.storage_offset() + offset)
        return found

    def __getitem__(self, name: str) -> Tensor:
        x, kind = self.rows(name), self.kinds[name]
        return x.view(self.T, self.B * kind.rows, *kind.shape) if kind.rows else x

    def __iter__(self) -> Iterator[str]:
        yield from self.flat
        yield from (name for name in (*self.places, *self.lanes) if name not in self.flat)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.flat or name in self.places or name in self.lanes
