"""One replayed step as a graph of its own, and what that graph reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from .leaves import added

__all__ = ["Visit", "calls_functions", "reaches", "unseen"]

_GraphEdge = tuple[Any, int]
"""Of autograd's graph: a node, and which of its inputs."""


@dataclass
class _Detour:
    """Gradients on their way to captured tensors, by number, taken out of the graph while it is open."""

    open: bool = False
    taken: dict[int, Tensor] = field(default_factory=dict)

    def hook(self, places: list[tuple[int, int]]) -> Callable[[Any, Any], tuple[Tensor | None, ...] | None]:
        """For a node whose i-th input is captured tensor k, for (i, k) in places: zeros go on instead."""

        def take(grad_inputs: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
            if not self.open:
                return None
            grads = list(grad_inputs)
            for i, k in places:
                grad = grads[i]
                if grad is not None:
                    self.taken[k] = self.taken[k] + grad if k in self.taken else grad
                    grads[i] = torch.zeros_like(grad)
            return tuple(grads)

        return take


class Visit:
    """One replayed step as a graph of its own.

    entries: carry, x, captured tensors, in this order. outputs: carry, y. wanted: the entries whose gradient is taken.
    unswapped: captured tensors that may be in the graph themselves, not only by their entry. Their gradient is taken
    at the nodes that use them: at the tensors it would pass the hooks that users put on them, once a step, and count
    a tensor twice that is captured together with another one made from it.
    """

    def __init__(self, entries: list[Tensor], outputs: list[Tensor], unswapped: Sequence[Tensor]) -> None:
        self.entries, self.outputs, self.unswapped = entries, outputs, unswapped
        self.wanted = [i for i, entry in enumerate(entries) if entry.requires_grad]
        self._detour = _Detour()
        if unswapped:
            number = {_edge(t): k for k, t in enumerate(unswapped)}
            uses: dict[Any, list[tuple[int, int]]] = {}
            for node, i, edge in _edges_behind(outputs, {*number, *(_edge(t) for t in entries if t.requires_grad)}):
                if edge in number:
                    uses.setdefault(node, []).append((i, number[edge]))
            for node, places in uses.items():
                node.register_hook(self._detour.hook(places))

    def vjp(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient of every entry from the cotangents of the outputs; None where nothing arrives."""
        arrived = [(o, c) for o, c in zip(self.outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        grads: list[Tensor | None] = [None] * len(self.entries)
        if not arrived or not (self.wanted or self.unswapped):
            return grads
        self._detour.open = True
        found = torch.autograd.grad(
            [o for o, _ in arrived],
            [*(self.entries[i] for i in self.wanted), *self.unswapped],
            [c for _, c in arrived],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        self._detour.open = False
        for i, grad in zip(self.wanted, found, strict=False):
            grads[i] = grad
        first = len(self.entries) - len(self.unswapped)
        while self._detour.taken:
            k, taken = self._detour.taken.popitem()
            grads[first + k] = added(grads[first + k], taken)
        return grads


def unseen(visit: Visit, captured: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """What a visit reaches beside its entries: leaves that are not captured yet; whether it reaches any tensor."""
    known = {_edge(t) for t in captured}
    leaves: dict[int, Tensor] = {}
    reached = False
    for _, _, edge in _edges_behind(visit.outputs, known | {_edge(t) for t in visit.entries if t.requires_grad}):
        variable = getattr(edge[0], "variable", None)
        if variable is not None and edge not in known and not any(variable is entry for entry in visit.entries):
            leaves[id(variable)] = variable
        reached |= edge in known
    return list(leaves.values()), reached or bool(leaves)


def calls_functions(visit: Visit) -> bool:
    """Whether a visit calls autograd.Functions, or what a compiler made: torch function modes do not see the call."""
    return any(isinstance(node, BackwardCFunction) for node, _, _ in _edges_behind(visit.outputs, _entered(visit)))


def reaches(visit: Visit, other: Visit) -> bool:
    """Whether a visit depends on what another one was given."""
    theirs = _entered(other)
    return any(edge in theirs for _, _, edge in _edges_behind(visit.outputs, _entered(visit)))


def _entered(visit: Visit) -> set[_GraphEdge]:
    return {_edge(t) for t in visit.entries if t.requires_grad}


def _edge(t: Tensor) -> _GraphEdge:
    if t.is_leaf and t.layout is not torch.strided:  # torch would ask for a view of it
        with torch.enable_grad():
            copied: Any = t.clone().grad_fn
        return copied.next_functions[0]
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _edges_behind(outputs: Iterable[Tensor], stop: set[_GraphEdge]) -> Iterator[tuple[Any, int, _GraphEdge]]:
    """Edges of the graph behind the outputs as (node, which of its inputs, edge), not followed beyond `stop`."""
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for i, edge in enumerate(node.next_functions):
            yield node, i, edge
            if edge[0] is not None and edge not in stop and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
