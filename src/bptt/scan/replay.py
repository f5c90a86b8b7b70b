"""One step of a scan, run again in backward as a graph of its own, and what that graph reaches.

A replay has to be the same computation: the same tensors captured by the step's closure, the same random numbers,
the same autocast. And it has to be cut off from the graph around it: the gradient of a captured tensor is an
output of the replay, not something that flows on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .pytrees import Form, Step, added, alias, differentiable, split, split_y
from .surroundings import GeneratorStates, Surroundings, set_generators

__all__ = ["READS_GRADIENT", "Replay", "Visit", "differs", "graph_edge"]

_GraphEdge = tuple[Any, int]
"""An edge of autograd's graph: a node, and the number of one of its inputs."""


@dataclass
class _DivertedGradients:
    """The gradients of captured tensors, by number, diverted from the graph; None while they may pass."""

    diverted: dict[int, Tensor] | None = None

    def hook(self, places: list[tuple[int, int]]) -> Callable[[Any, Any], tuple[Tensor | None, ...] | None]:
        """A hook for a node whose i-th input is captured tensor k, for (i, k) in places: zeros go on instead."""

        def divert(grad_inputs: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
            if self.diverted is None:
                return None
            grads = list(grad_inputs)
            for i, k in places:
                grad = grads[i]
                if grad is not None:
                    self.diverted[k] = self.diverted[k] + grad if k in self.diverted else grad
                    grads[i] = torch.zeros_like(grad)
            return tuple(grads)

        return divert


class Visit:
    """One replayed step as a graph of its own.

    entries: carry, x, captured tensors, in this order. outputs: carry, y. wanted: the entries that get a gradient.
    unswapped: captured tensors that may be in the graph themselves, not only by their entry. Their gradient is diverted
    at the nodes that use them: at the tensors it would pass the hooks that users put on them, once a step, and count
    a tensor twice that is captured together with another one made from it.
    """

    def __init__(self, entries: list[Tensor], outputs: list[Tensor], unswapped: Sequence[Tensor]) -> None:
        self.entries, self.outputs, self.unswapped = entries, outputs, unswapped
        self.wanted = [i for i, entry in enumerate(entries) if entry.requires_grad]
        self._captured_grads = _DivertedGradients()
        if unswapped:
            number = {graph_edge(t): k for k, t in enumerate(unswapped)}
            uses: dict[Any, list[tuple[int, int]]] = {}
            for node, i, edge in self._graph_edges(number):
                if edge in number:
                    uses.setdefault(node, []).append((i, number[edge]))
            for node, places in uses.items():
                node.register_hook(self._captured_grads.hook(places))

    def vjp(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient of every entry from the cotangents of the outputs; None where nothing arrives."""
        arrived = [(o, c) for o, c in zip(self.outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        grads: list[Tensor | None] = [None] * len(self.entries)
        if not arrived or not (self.wanted or self.unswapped):
            return grads
        self._captured_grads.diverted = diverted = dict[int, Tensor]()
        found = torch.autograd.grad(
            [o for o, _ in arrived],
            [*(self.entries[i] for i in self.wanted), *self.unswapped],
            [c for _, c in arrived],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        self._captured_grads.diverted = None
        for i, grad in zip(self.wanted, found, strict=False):
            grads[i] = grad
        first = len(self.entries) - len(self.unswapped)
        while diverted:
            k, grad = diverted.popitem()
            grads[first + k] = added(grads[first + k], grad)
        return grads

    def unseen(self, captured: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The leaves that it reaches beyond its entries and `captured`; whether it reaches any leaf or captured one."""
        made = {graph_edge(t) for t in captured if t.grad_fn is not None}
        known = {id(t) for t in captured}
        entries = set(map(id, self.entries)) - known
        leaves: dict[int, Tensor] = {}
        reached = False
        for _, _, edge in self._graph_edges(made):
            variable = getattr(edge[0], "variable", None)
            if variable is not None and id(variable) not in entries:
                leaves[id(variable)] = variable
            reached |= edge in made
        return [leaf for i, leaf in leaves.items() if i not in known], reached or bool(leaves)

    def nodes(self) -> set[Any]:
        """The nodes of its graph, not beyond its entries."""
        stop = self._entered()
        first = {edge[0] for t in self.outputs if t.requires_grad and (edge := graph_edge(t)) not in stop}
        return first | {edge[0] for _, _, edge in self._graph_edges() if edge[0] is not None and edge not in stop}

    def calls_functions(self) -> bool:
        """Whether it calls autograd.Functions or compiled code: torch function modes do not see such a call."""
        return any(isinstance(node, BackwardCFunction) for node, _, _ in self._graph_edges())

    def reaches(self, other: Visit) -> bool:
        """Whether it depends on the entries of another visit."""
        theirs = other._entered()
        return any(edge in theirs for _, _, edge in self._graph_edges())

    def _entered(self) -> set[_GraphEdge]:
        return {graph_edge(t) for t in self.entries if t.requires_grad}

    def _graph_edges(self, given: Iterable[_GraphEdge] = ()) -> Iterator[tuple[Any, int, _GraphEdge]]:
        """Edges of the graph as (node, number of an input, edge), not followed beyond the entries and given edges."""
        stop = {*given, *self._entered()}
        todo = [t.grad_fn for t in self.outputs if t.grad_fn is not None and graph_edge(t) not in stop]
        seen = set(todo)
        while todo:
            node = todo.pop()
            for i, edge in enumerate(node.next_functions):
                yield node, i, edge
                if edge[0] is not None and edge not in stop and edge[0] not in seen:
                    seen.add(edge[0])
                    todo.append(edge[0])


def graph_edge(t: Tensor) -> _GraphEdge:
    """The edge of the graph that leads to a tensor."""
    if t.is_leaf and t.layout is not torch.strided:  # torch would ask for a view of it
        with torch.enable_grad():
            copied: Any = t.clone().grad_fn
        return copied.next_functions[0]
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


READS_GRADIENT: Any = Tensor.grad.__get__  # type: ignore[union-attr]  # a property of the class; to mypy, a tensor


class _Substitution(TorchFunctionMode):
    """A function mode that replaces captured tensors by others, and those in `written` by copies.

    What a call returns in place of a written one, as `buffer += 1` does, is that one again: Python assigns it to where
    it was read from. made: where given, receives the tensors made inside.
    """

    def __init__(
        self, table: dict[int, Tensor], written: Sequence[Tensor], made: list[weakref.ref[Tensor]] | None
    ) -> None:
        super().__init__()
        copies = [(old, old.clone()) for old in written]
        self.table = table | {id(old): copy for old, copy in copies}
        self.originals = {id(copy): old for old, copy in copies}
        self.made = made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == READS_GRADIENT:  # which the original has
            return func(*args, **kwargs or {})
        result = func(*self._swap(args), **self._swap(kwargs or {}))
        if id(result) in self.originals:
            return self.originals[id(result)]
        if self.made is not None:
            self.made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.table.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._swap(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._swap(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


@dataclass(frozen=True)
class Replay:
    """Everything that is needed to run a step again.

    carry: the form of the carry that enters each step. x, y: the form of each x and y.
    overwrites: the step writes to its carry or x in place, and must get copies.
    opaque: the step hands captured tensors to calls that torch function modes do not see, such as the `apply` of an
        autograd.Function or a scripted module.
    """

    step: Step
    carry: Sequence[Form]
    x: Form
    y: Form
    captured: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    states: Sequence[GeneratorStates | None]
    surroundings: Surroundings
    overwrites: bool
    opaque: bool = False

    @cached_property
    def rounding(self) -> float:
        """The relative rounding error of the least precise type that the step is known to compute in."""
        types = {t.dtype for t in self.captured if differentiable(t)}
        types |= {dtype for enabled, dtype in self.surroundings.autocast.values() if enabled}
        return max((torch.finfo(dtype).eps for dtype in types), default=0.0)

    def visit(self, t: int, entries: Sequence[Tensor], made: list[weakref.ref[Tensor]] | None = None) -> Visit:
        """Step t again, recorded by autograd from these carry, x, and tensors in the place of the captured ones.

        made: a list that is to hold all tensors that are made.
        """
        with torch.enable_grad():
            carry, y = self.run(t, entries, made)
            # A view, so that even a captured tensor that is returned as it is has a node of this replay before it.
            outputs = [alias(r) if r.requires_grad else r for r in (*carry, *y)]
        return Visit(list(entries), outputs, self.captured if self.opaque else ())

    def again(self, t: int, entries: Sequence[Tensor]) -> list[Tensor]:
        """The carry after step t, which is run again as in forward, without recording."""
        with torch.no_grad():
            return [c.detach() for c in self.run(t, entries)[0]]

    def run(
        self, t: int, entries: Sequence[Tensor], made: list[weakref.ref[Tensor]] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The carry after step t, which is run again as in forward, and y."""
        given = len(entries) - len(self.captured)
        table = {id(old): new for old, new in zip(self.captured, entries[given:], strict=True)}
        state = self.states[t]
        if state is not None:
            set_generators(state)
        received = [r.clone() for r in entries[:given]] if self.overwrites else list(entries[:given])
        n = given - self.x.count
        swaps = bool(table) or bool(self.written) or made is not None
        substitution = _Substitution(table, self.written, made) if swaps else nullcontext()
        with self.surroundings.entered(), substitution:
            carry, y = self.step(self.carry[t].join(received[:n]), self.x.join(received[n:]))
        plain, plain_y = self.carry[t].tensors(carry), self.y.tensors(y)
        return (
            split(carry, self.carry[t])[0] if plain is None else plain,
            split_y(y, self.y)[0] if plain_y is None else plain_y,
        )

    def check(self, visit: Visit, known: Sequence[Tensor] = (), recorded: Visit | None = None) -> None:
        """Raise RuntimeError where a visit in backward uses a parameter that the forward did not.

        known: tensors that the forward used, besides the captured ones. recorded: the same step as the forward recorded
        it, where it did.
        """
        unseen = [t for t in visit.unseen((*self.captured, *known))[0] if isinstance(t, torch.nn.Parameter)]
        if unseen and recorded is not None:
            used = set(map(id, recorded.unseen(())[0]))
            unseen = [t for t in unseen if id(t) not in used]
        if unseen:
            raise RuntimeError(
                f"step, run again for the gradient, uses a parameter {list(unseen[0].shape)} that it did not use in "
                "forward: what its closure captures must still be there in backward (torch.func.functional_call "
                "puts its tensors there only until it returns)"
            )


def differs(t: int) -> RuntimeError:
    """The error for a step that gives another result in backward."""
    return RuntimeError(
        f"step, run again in backward, gave another result at step {t}: it must depend on carry, x and captured "
        "tensors alone (captured state it changes, random numbers from another generator than torch's default, or "
        "a module switched between train and eval?)"
    )
