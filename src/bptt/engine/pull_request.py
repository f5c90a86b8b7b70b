"""A backward call as data, which a transform can map, differentiate and divide by lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mapped import lane, unfolded
from .records import Asked, Saved, Tensors
from .rules import RULES, Rules

__all__ = ["PullRequest"]


class Parts(NamedTuple):
    """The tensors of a backward call, apart."""

    inputs: Tensors
    held: Tensors
    outputs: tuple[Tensor, ...]
    tape: tuple[Tensor, ...]
    cotangents: Tensors


@dataclass(frozen=True, eq=False)
class PullRequest:
    """All of a backward call but its tensors. arrived: whether each cotangent is there. lane_groups: see `Asked`."""

    program: Any
    inputs: int
    held: int
    outputs: int
    tape: int
    arrived: tuple[bool, ...]
    needs: tuple[bool, ...]
    lane_groups: int | None = None

    def parts(self, flat: Sequence[Any]) -> Parts:
        ends = [0, self.inputs, self.held, self.outputs, self.tape]
        at = [sum(ends[: i + 1]) for i in range(5)]
        inputs, held, outputs, tape = (tuple(flat[a:b]) for a, b in pairwise(at))
        some = iter(flat[at[-1] :])
        return Parts(inputs, held, outputs, tape, tuple(next(some) if there else None for there in self.arrived))

    def weights(self) -> Sequence[int] | None:
        """The inputs that are weights; None of a program without rules."""
        found = RULES.get(type(self.program))
        return None if found is None else found.weights(self.program)

    def recorded(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        """The gradients that are needed, by operations that torch can record."""
        if self.lane_groups is not None:
            return self.by_group(PullRequest.recorded, flat)
        inputs, held, outputs, _, cotangents = self.parts(flat)
        asked = Asked(cotangents, self.needs)
        found = self.program.holding(held).backward(Saved(inputs, outputs, None), asked)
        return tuple(g for g, need in zip(found.inputs, self.needs, strict=True) if need)

    def by_group(self, found: Callable[..., tuple[Tensor, ...]], *flats: Sequence[Any]) -> tuple[Tensor, ...]:
        """What a function of a request and of all its tensors (and of others like them) gives, group by group of lanes.

        That of a weight has the groups in front; of all else they are side by side again.
        """
        assert self.lane_groups is not None
        weights = self.rules("gradient for each group of lanes").weights(self.program)
        alone = replace(self, lane_groups=None)
        apart = [[_in_groups(t, i in weights, self.lane_groups) for i, t in enumerate(flat)] for flat in flats]
        of_each = [found(alone, *[[t[g] for t in flat] for flat in apart]) for g in range(self.lane_groups)]
        wanted = [i for i, need in enumerate(self.needs) if need]
        return tuple(
            torch.stack(parts) if i in weights else torch.cat(parts, lane(parts[0]))
            for i, parts in zip(wanted, zip(*of_each, strict=True), strict=True)
        )

    def rules(self, what: str) -> Rules:
        found = RULES.get(type(self.program))
        if found is None:
            raise NotImplementedError(
                f"bptt has no {what} of the backward call of a {self.program.name} (bptt.scan, bptt.nn.Recurrent): use "
                "torch.autograd.grad(..., create_graph=True) outside of transforms, or a plain loop over steps"
            )
        return found


def _in_groups(tensor: Tensor | None, is_weight: bool, groups: int) -> Sequence[Tensor | None]:
    """A tensor's part for each group of lanes: of a weight, the whole."""
    if tensor is None or is_weight:
        return [tensor] * groups
    return unfolded(tensor, groups).unbind(lane(tensor))
