"""The branches of a step's Python code on whole numbers of its carry: which way each went when the step was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .known import known_before
from .parts import Part

__all__ = ["Branches"]


@dataclass(frozen=True, eq=False)
class Branches:
    """The branches of a step. part: from the carry to the truths of each branch, by row; "all" of them, or "any", in
    `kinds`; values: whether that held.
    """

    part: Part
    kinds: tuple[str, ...]
    values: tuple[bool, ...]

    @classmethod
    def of(cls, graph: Graph, truths: Sequence[Node], decided: Sequence[tuple[str, bool]]) -> Branches | None:
        """The branches on some values of a graph; None for none."""
        part = known_before(graph, truths, of_carry=True)
        return None if part is None else cls(part, tuple(kind for kind, _ in decided), tuple(v for _, v in decided))

    @torch.no_grad()
    def other_way(self, carry: Mapping[str, Tensor]) -> int | None:
        """The first step at which a branch goes another way; None where there is none. carry: `[T, B, ...]` by name."""
        given = [carry[name] for name in self.part.inputs]
        T, B = given[0].shape[:2]
        made = self.part.function(T * B, *(c.flatten(0, 1) for c in given))
        off = torch.zeros(T, dtype=torch.bool, device=given[0].device)
        for truths, kind, value in zip(made, self.kinds, self.values, strict=True):
            rows = truths.view(T, -1)
            off |= (rows.all(1) if kind == "all" else rows.any(1)) != value
        return int(off.nonzero()[0]) if bool(off.any()) else None
