"""The tensors whose values are in a graph while it is recorded: which node each has, what it is a view of, what was
written to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .canonical import scattered
from .lines import current_line

__all__ = ["Known", "KnownTensors", "is_captured", "place"]


@dataclass(eq=False)
class Memory:
    """Memory that tensors share. writes: how often it was written to. tensors: those that are known."""

    writes: int = 0
    tensors: list[Known] = field(default_factory=list)


@dataclass(eq=False)
class Known:
    """A tensor whose value is in the graph.

    view: the tensor that it is a view of, and the operation on a node that makes its value from that one's. read: the
    number of writes to the memory when `node` was its value.
    """

    tensor: Tensor
    node: Node
    memory: Memory
    view: tuple[Known, Callable[[Node], Node], tuple[Any, ...]] | None = None
    read: int = 0


@dataclass(eq=False)
class KnownTensors:
    """The tensors of a graph. captured: those from outside that were read, with their nodes."""

    graph: Graph = field(default_factory=Graph)
    captured: list[tuple[Tensor, Node]] = field(default_factory=list)
    known: dict[int, Known] = field(default_factory=dict)
    memory: dict[int, Memory] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def refused(self, reason: str) -> Exception:
        """The reason why what was recorded is no graph: to raise."""
        raise NotImplementedError

    def release(self) -> list[weakref.ref[Tensor]]:
        """Let go of all tensors. Returns references to those that were made inside."""
        given = {id(t) for t, _ in self.captured}
        made = [weakref.ref(k.tensor) for k in self.known.values() if k.node.op != "placeholder"]
        made = [r for r in made if id(r()) not in given]
        for memory in self.memory.values():
            memory.tensors.clear()  # a circle with what knows it
        self.known.clear()
        self.memory.clear()
        self.alive.clear()
        return made

    # What enters ------------------------------------------------------------------------------------------------------

    def enter(self, tensor: Tensor, name: str) -> None:
        """Give a tensor that is given from outside a name in the graph."""
        node = self.graph.placeholder(name)
        self.note(tensor, node)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor's value is in the graph."""
        known = self.known.get(id(tensor))
        return known is not None  # a tensor that is known stays alive, and so does its id

    def made(self, tensor: Tensor) -> Node | None:
        """The current value of a tensor that is in the graph; None of any other."""
        known = self.known.get(id(tensor)) or self._another_name(tensor)
        return None if known is None else self.read(known)

    def node(self, tensor: Tensor) -> Node:
        """The current value of a tensor; one from outside is captured."""
        known = self.known.get(id(tensor)) or self._another_name(tensor)
        if known is None:
            node = self.graph.placeholder(f"captured_{len(self.captured)}")
            node.meta["line"] = current_line()
            self.captured.append((tensor, node))
            known = self.note(tensor, node)
        return self.read(known)

    def _another_name(self, tensor: Tensor) -> Known | None:
        """The tensor made inside that one is another name for: autograd hands out what it saved as new ones."""
        memory = self.memory.get(place(tensor))
        for known in () if memory is None else memory.tensors:
            other = known.tensor
            same = other.shape == tensor.shape and other.stride() == tensor.stride() and other.dtype == tensor.dtype
            if same and other.storage_offset() == tensor.storage_offset() and not is_captured(known.node):
                self.known[id(tensor)] = known
                self.alive.append(tensor)
                return known
        return None

    def note(self, tensor: Tensor, node: Node) -> Known:
        """Note that a tensor has the value of a node; it has memory of its own."""
        if "tensor" not in node.meta:
            node.meta["tensor"] = tensor.shape, tensor.dtype
        memory = self.memory.setdefault(place(tensor), Memory())
        known = self.known[id(tensor)] = Known(tensor, node, memory, read=memory.writes)
        memory.tensors.append(known)
        self.alive.append(tensor)  # so that no other tensor gets its id, nor its memory
        return known

    def read(self, known: Known) -> Node:
        if known.read != known.memory.writes:
            if known.view is None:
                raise self.refused("a tensor is written to through another one that is no view of it")
            known.node = known.view[1](self.read(known.view[0]))
            known.read = known.memory.writes
        return known.node

    def write(self, known: Known, value: Node) -> None:
        """Give a tensor another value, and what it is a view of."""
        above, chain = known, list[tuple[Known, Node]]()
        while above.view is not None:
            above = above.view[0]
            chain.append((above, self.read(above)))
        known.memory.writes += 1
        known.node, known.read = value, known.memory.writes
        below = known
        for base, before in chain:
            assert below.view is not None
            made = scattered(self, before, below.node, *below.view[2])
            if made is None:
                raise self.refused(f"a view made by {below.view[2][0]} is written to")
            base.node, base.read = made, known.memory.writes
            below = base


def is_captured(node: Node) -> bool:
    """Whether a value comes from outside."""
    return node.op == "placeholder" and node.name.startswith("captured_")


def place(tensor: Tensor) -> int:
    """What tells memory from other memory."""
    with torch._C.DisableTorchFunction():  # which would be told that Python reads it
        return tensor.untyped_storage()._cdata
