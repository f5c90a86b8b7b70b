"""One step of a scan, replayed in backward.

A replay has to be the same computation: the same tensors captured by the step's closure, the same random numbers,
the same autocast. And it has to be cut off from the graph around it: the gradient of a captured tensor is an
output of the replay, not something that flows on from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_leaves, tree_map, tree_unflatten

from ..engine import default_device

__all__ = ["Form", "Replay", "States", "Step", "Surroundings", "Visit"]
__all__ += ["added", "alias", "alive", "calls_functions", "differentiable", "fresh", "generator_states"]
__all__ += ["random_kept", "reaches", "split", "split_y", "unseen"]

Step = Callable[[Any, Any], tuple[Any, Any]]
Edge = tuple[Any, int]
States = dict[torch.device, Tensor]
_Mode = TypeVar("_Mode", bound="_Substitute")


class _Hole:
    """Stands for a tensor in a `Form`."""


_HOLE = _Hole()


@dataclass(frozen=True)
class Form:
    """A pytree without its tensors: what is needed to put others in their place."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @property
    def tensors_only(self) -> bool:
        """Whether no leaf is a Python value (None, which holds nothing, aside)."""
        return all(leaf is _HOLE or leaf is None for leaf in self.leaves)

    def join(self, tensors: Iterable[Tensor]) -> Any:
        tensors = iter(tensors)
        return tree_unflatten([next(tensors) if leaf is _HOLE else leaf for leaf in self.leaves], self.spec)


def split(tree: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """The tensors of a pytree, and its form. like: keys of dicts that only come in another order are put in its."""
    leaves, spec = tree_flatten(tree)
    if like is not None and spec != like.spec:
        leaves, spec = _by_key(tree, like.spec) or (leaves, spec)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, Form(spec, tuple(_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def split_y(y: Any, like: Form | None = None) -> tuple[list[Tensor], Form]:
    """The same for a y, whose numbers become tensors."""
    return split(tree_map(lambda v: _number(v) if isinstance(v, (bool, int, float, complex)) else v, y), like)


def _number(value: complex) -> Tensor:
    return torch.as_tensor(value, device="cpu")  # whatever the default device is, here and in backward


def _by_key(tree: Any, spec: TreeSpec) -> tuple[list[Any], TreeSpec] | None:
    """The leaves in the order of spec, or None where the tree has another structure."""
    try:
        leaves = spec.flatten_up_to(tree)
    except ValueError:
        return None
    return (leaves, spec) if all(map(tree_is_leaf, leaves)) else None


class _Substitute(TorchFunctionMode):
    """Puts other tensors in the place of the captured ones."""

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swap(args), **self._swap(kwargs or {}))

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.table.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._swap(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._swap(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


class _Noted(_Substitute):
    """The same, and notes the tensors that were made."""

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__(table)
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        self.made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


@dataclass(frozen=True)
class Surroundings:
    """What a step computes under beside its arguments.

    autocast: its state by kind of device. Its cache stays off: entries made without grad would hide weights from it.
    device: the default device.
    """

    autocast: dict[str, tuple[bool, torch.dtype]]
    device: torch.device

    @classmethod
    def current(cls, devices: Iterable[torch.device]) -> Surroundings:
        types = {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types}
        return cls(autocast, default_device())

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            if getattr(parametrize, "_cache_enabled", 0):
                stack.enter_context(_parametrized_anew())
            yield

    def on_default_device(self) -> AbstractContextManager[Any]:
        """The default device of the forward, which factory calls of a step use."""
        return nullcontext() if default_device() == self.device else self.device


@contextmanager
def _parametrized_anew() -> Iterator[None]:
    """`torch.nn.utils.parametrize.cached` off: it would hand a weight made without grad in one step to the next."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


@dataclass(frozen=True)
class Replay:
    """All that a step needs to be run again.

    carry: the form of the carry that enters each step. x, y: the form of each x and y.
    overwrites: the step writes to its carry or x in place, and is to get copies.
    opaque: the step hands captured tensors to calls that torch function modes do not see, such as the `apply` of an
        autograd.Function or a scripted module.
    """

    step: Step
    carry: Sequence[Form]
    x: Form
    y: Form
    captured: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    states: Sequence[States | None]
    surroundings: Surroundings
    overwrites: bool
    opaque: bool = False

    @property
    def rounding(self) -> float:
        """The relative rounding error of the least precise type that the step is known to compute in."""
        types = {t.dtype for t in self.captured if differentiable(t)}
        types |= {dtype for enabled, dtype in self.surroundings.autocast.values() if enabled}
        return max((torch.finfo(dtype).eps for dtype in types), default=0.0)

    def visit(self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]) -> Visit:
        """Step t again, recorded by autograd from these carry and x, with these in place of the captured tensors."""
        return self._visit(_Substitute, t, carry, x, captured)[0]

    def noted(
        self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[Visit, list[weakref.ref[Tensor]]]:
        """The same, and the tensors that were made."""
        visit, mode = self._visit(_Noted, t, carry, x, captured)
        return visit, mode.made

    def _visit(
        self, kind: type[_Mode], t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[Visit, _Mode]:
        with torch.enable_grad():
            results, mode = self._run(kind, t, carry, x, captured)
            # A view, so that even a captured tensor that is returned as it is has a node of this replay before it.
            outputs = [alias(r) if r.requires_grad else r for r in results]
        return Visit([*carry, *x, *captured], outputs, self.captured if self.opaque else ()), mode

    def again(self, t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]) -> list[Tensor]:
        """The carry after step t, run again as in forward: not recorded."""
        with torch.no_grad():
            return [c.detach() for c in self._run(_Substitute, t, carry, x, captured)[0][: len(carry)]]

    def _run(
        self, kind: type[_Mode], t: int, carry: Sequence[Tensor], x: Sequence[Tensor], captured: Sequence[Tensor]
    ) -> tuple[list[Tensor], _Mode]:
        """The carry after step t, and y; the mode that it ran under."""
        table = {id(old): new for old, new in zip(self.captured, captured, strict=True)}
        table |= {id(old): old.clone() for old in self.written}
        state = self.states[t]
        if state is not None:
            _set_states(state)
        received = [r.clone() for r in (*carry, *x)] if self.overwrites else [*carry, *x]
        mode = kind(table)
        with self.surroundings.entered(), mode:
            new_carry, y = self.step(self.carry[t].join(received[: len(carry)]), self.x.join(received[len(carry) :]))
        return [*split(new_carry, self.carry[t])[0], *split_y(y, self.y)[0]], mode

    def check(self, visit: Visit) -> None:
        """Raise RuntimeError where a visit in backward uses a parameter that the forward did not."""
        for leaf in unseen(visit, self.captured)[0]:
            if isinstance(leaf, torch.nn.Parameter):
                raise RuntimeError(
                    f"step, run again for the gradient, uses a parameter {list(leaf.shape)} that it did not use in "
                    "forward: what its closure captures must still be there in backward (torch.func.functional_call "
                    "puts its tensors there only until it returns)"
                )


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
            for node, i, edge in _edges(outputs, {*number, *(_edge(t) for t in entries if t.requires_grad)}):
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
    for _, _, edge in _edges(visit.outputs, known | {_edge(t) for t in visit.entries if t.requires_grad}):
        variable = getattr(edge[0], "variable", None)
        if variable is not None and edge not in known and not any(variable is entry for entry in visit.entries):
            leaves[id(variable)] = variable
        reached |= edge in known
    return list(leaves.values()), reached or bool(leaves)


def calls_functions(visit: Visit) -> bool:
    """Whether a visit calls autograd.Functions, or what a compiler made: torch function modes do not see the call."""
    return any(isinstance(node, BackwardCFunction) for node, _, _ in _edges(visit.outputs, _entered(visit)))


def reaches(visit: Visit, other: Visit) -> bool:
    """Whether a visit depends on what another one was given."""
    theirs = _entered(other)
    return any(edge in theirs for _, _, edge in _edges(visit.outputs, _entered(visit)))


def _entered(visit: Visit) -> set[Edge]:
    return {_edge(t) for t in visit.entries if t.requires_grad}


@contextmanager
def random_kept(states: Sequence[States | None]) -> Iterator[None]:
    """Leaves the random generators as they were, whatever is replayed inside."""
    devices = {device for state in states if state is not None for device in state}
    before = generator_states(devices)
    try:
        yield
    finally:
        _set_states(before)


def differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def fresh(t: Tensor, wanted: bool) -> Tensor:
    """The same values without a past, to receive a gradient if that is wanted and they can have one."""
    return t.detach().requires_grad_(wanted and differentiable(t))


def alias(t: Tensor) -> Tensor:
    """The same values as a tensor of its own, behind a node of its own. Sparse tensors have no views."""
    return t.view_as(t) if t.layout is torch.strided else t.clone()


def alive(ref: weakref.ref[Tensor]) -> Tensor | None:
    """The tensor that ref refers to, or None. Not ref() alone: up to torch 2.8, what only C++ holds would be lost."""
    t = ref()
    if t is not None:
        t._fix_weakref()  # type: ignore[attr-defined]  # not in torch's stubs
    return t


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, None counting as zero."""
    if a is None or b is None:
        return b if a is None else a
    return b + a if b.layout is torch.strided else a + b  # a sparse tensor can be added to a dense one only


def generator_states(devices: Iterable[torch.device]) -> States:
    """The states of torch's default random generators."""
    return {d: torch.cuda.get_rng_state(d) if d.type == "cuda" else torch.get_rng_state() for d in devices}


def _set_states(states: States) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _edge(t: Tensor) -> Edge:
    if t.is_leaf and t.layout is not torch.strided:  # torch would ask for a view of it
        with torch.enable_grad():
            copied: Any = t.clone().grad_fn
        return copied.next_functions[0]
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _edges(outputs: Iterable[Tensor], stop: set[Edge]) -> Iterator[tuple[Any, int, Edge]]:
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
