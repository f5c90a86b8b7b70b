"""Whole numbers in a program of real ones: between which bounds each value lies, so that it is exact.

Bounds of what is given are assumed, and looked at in every call: `check` raises OutOfBounds, and another kernel takes
the step. From these follow those of all that is computed, step by step: what of the carry lies within its bounds before
a step is exact after it, and is looked at in turn.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Node

from ..steps import Value
from .views import dims_of

__all__ = ["COUNTS", "HELD", "Bounds", "OutOfBounds", "bounds_of", "check"]

aten = torch.ops.aten

COUNTS = (torch.int64, torch.int32)

EXACT = {torch.float32: 2**24, torch.float64: 2**53}
"""Up to which number each dtype has all whole ones."""

HELD = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
"""The largest number of each dtype, beyond which it begins anew at the least one."""

LEAST = 2**10
"""The least bound of what is given that is worth a program."""


class Bounds(NamedTuple):
    """The least and the largest number that a value may be."""

    low: float
    high: float

    def __or__(self, other: Any) -> Bounds:
        return Bounds(min(self.low, other.low), max(self.high, other.high))

    @property
    def most(self) -> float:
        return max(abs(self.low), abs(self.high))


ANY = Bounds(-math.inf, math.inf)


class OutOfBounds(Exception):  # noqa: N818  another kernel takes the step
    """A whole number is larger than a program of real ones can hold, or an index may lie beyond its tensor."""


def check(name: str, values: Tensor, bounds: Bounds) -> None:
    """Raise OutOfBounds where whole numbers are not within what was assumed of them."""
    if values.numel():
        low, high = values.aminmax()
        if low.item() < bounds.low or high.item() > bounds.high:
            raise OutOfBounds(f"{name} holds whole numbers beyond {bounds.low:.0f} to {bounds.high:.0f}")


def bounds_of(
    nodes: Iterable[Node], kind: Callable[[Node], Value | None], inputs: Mapping[Node, str], dtype: torch.dtype
) -> tuple[dict[Node, Bounds], dict[str, Bounds]]:
    """(the bounds of the whole numbers of a graph, those that are assumed of its inputs by name); empty where a value
    may have no exact place.

    kind: of a node, as far as it is known.
    """
    nodes, whole = list(nodes), dict[Node, Value]()
    for n in nodes:
        known = kind(n)
        if known is not None and known.dtype in COUNTS:
            whole[n] = known
    given = [n for n in whole if n in inputs]
    indexed = _indexed(nodes, given, kind)
    room = {n: min(EXACT[dtype], HELD[known.dtype]) for n, known in whole.items()}
    most = EXACT[dtype]
    while most >= LEAST:
        found = {n: indexed.get(n, Bounds(-min(most, room[n]), min(most, room[n]))) for n in given}
        assumed = {inputs[n]: found[n] for n in given}
        for n in nodes:
            if n in whole and n not in found and n.op == "call_function":
                found[n] = _of(n, found, kind)
        if all(b.most <= room[n] for n, b in found.items() if not _truncates(n, kind)):
            return found, assumed
        most //= 4
    return {}, {}


def _indexed(nodes: Iterable[Node], given: list[Node], kind: Callable[[Node], Value | None]) -> dict[Node, Bounds]:
    """The bounds of inputs that are indices as they are: within the dimensions that they index."""
    found: dict[Node, Bounds] = {}
    for n in nodes:
        if _packet(n) not in _TAKES or not isinstance(n.args[0], Node) or not isinstance(n.args[2], Node):
            continue
        table, dim, index = cast("Any", n.args[:3])
        known = kind(table)
        if known is None or known.rows < 0 or (known.rows and dim == 0):
            continue
        size, low = dims_of(known)[dim], 0
        while index not in given and _packet(index) in _VIEWS:
            index = index.args[0]
        turned = _from_last(index)
        if turned is not None:
            index, low = turned[0], -size
        while index not in given and _packet(index) in _VIEWS:
            index = index.args[0]
        if index in given:
            before = found.get(index, ANY)
            found[index] = Bounds(max(low, before.low), min(size - 1, before.high))
    return found


def _from_last(n: Any) -> tuple[Node, float] | None:
    """(an index that may count from the last element, how many there are) of what counts from the first one."""
    if _packet(n) is not aten.where or len(n.args) != 3:
        return None
    below, turned, index = n.args
    tests = _packet(below) is aten.lt and below.args == (index, 0)
    adds = _packet(turned) is aten.add and turned.args[0] is index and isinstance(turned.args[1], int)
    return (index, turned.args[1]) if tests and adds else None


def _of(n: Node, found: Mapping[Node, Bounds], kind: Callable[[Node], Value | None]) -> Bounds:
    op, args = _packet(n), n.args

    def bounds(x: Any) -> Bounds:
        if isinstance(x, Node):
            known = kind(x)
            return Bounds(0, 1) if known is not None and known.dtype == torch.bool else found.get(x, ANY)
        return Bounds(x, x) if isinstance(x, (bool, int)) else ANY

    def size(x: Any, dim: Any) -> int:
        known = kind(x)
        dims = dims_of(known) if known is not None else ()
        return dims[dim] if dims else 1

    turned = _from_last(n)
    if turned is not None:
        index, count = bounds(turned[0]), turned[1]
        parts = [Bounds(max(index.low, 0), index.high)] if index.high >= 0 else []
        parts += [Bounds(index.low + count, min(index.high, -1) + count)] if index.low < 0 else []
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]
    if op in (aten.full, aten.scalar_tensor):
        return bounds(args[1] if op is aten.full else args[0])
    if op is aten.arange and all(isinstance(x, int) for x in args):
        numbers: Any = args
        ends = (0, numbers[0]) if len(numbers) == 1 else numbers[:2]
        return Bounds(min(ends), max(ends))
    if op in (aten.argmax, aten.argmin):
        return Bounds(0, size(args[0], args[1]) - 1)
    if n.target is operator.getitem:
        whole: Any = args[0]
        if whole.target not in _WITH_INDICES:
            return ANY
        at = _WITH_INDICES[whole.target]
        dim = whole.args[at] if len(whole.args) > at else whole.kwargs.get("dim", -1)
        return Bounds(0, size(whole.args[0], dim) - 1) if args[1] == 1 else bounds(whole.args[0])
    if op is aten._to_copy:
        known = bounds(args[0])
        return known if isinstance(args[0], Node) and args[0] in found else known | known
    if op in _VIEWS or op in (aten.gather, aten.index_select):
        return bounds(args[0])
    if op is aten.cat:
        together: Any = args[0]
        parts = [bounds(x) for x in together]
        return Bounds(min(p.low for p in parts), max(p.high for p in parts))
    if op in (aten.scatter, aten.slice_scatter):
        other: Any = args[1] if op is aten.slice_scatter else args[3]
        return bounds(args[0]) | bounds(other)
    if op is aten.where and len(args) == 3:
        return bounds(args[1]) | bounds(args[2])
    if op is aten.neg:
        b = bounds(args[0])
        return Bounds(-b.high, -b.low)
    if op is aten.abs:
        return Bounds(0, bounds(args[0]).most)
    if op in (aten.add, aten.sub) and len(args) == 2 and not n.kwargs:
        a, b = bounds(args[0]), bounds(args[1])
        return Bounds(a.low + b.low, a.high + b.high) if op is aten.add else Bounds(a.low - b.high, a.high - b.low)
    if op is aten.rsub and len(args) == 2 and not n.kwargs:
        a, b = bounds(args[1]), bounds(args[0])
        return Bounds(a.low - b.high, a.high - b.low)
    if op is aten.mul:
        a, b = bounds(args[0]), bounds(args[1])
        if math.isinf(a.most) or math.isinf(b.most):
            return ANY
        ends = [x * y for x in a for y in b]
        return Bounds(min(ends), max(ends))
    if op is aten.relu:
        b = bounds(args[0])
        return Bounds(max(b.low, 0), max(b.high, 0))
    if op in (aten.maximum, aten.clamp_min):
        a, b = bounds(args[0]), bounds(args[1])
        return Bounds(max(a.low, b.low), max(a.high, b.high))
    if op in (aten.minimum, aten.clamp_max):
        a, b = bounds(args[0]), bounds(args[1])
        return Bounds(min(a.low, b.low), min(a.high, b.high))
    if op is aten.remainder and isinstance(args[1], int) and args[1] > 0:
        b = bounds(args[0])
        return ANY if math.isinf(b.most) else Bounds(0, args[1] - 1)
    if op is aten.div and n.kwargs.get("rounding_mode") == "floor" and isinstance(args[1], int) and args[1] > 0:
        b = bounds(args[0])
        return b if math.isinf(b.most) else Bounds(b.low // args[1], b.high // args[1])
    if op in (aten.sum, aten.cumsum) and isinstance(args[0], Node):
        dims: Any = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        first = kind(args[0])
        dims = dims or range(len(dims_of(first)) if first is not None else 0)
        count = math.prod(size(args[0], d) for d in dims)
        b = bounds(args[0])
        return Bounds(count * min(b.low, 0), count * max(b.high, 0))
    return ANY


def _truncates(n: Node, kind: Callable[[Node], Value | None]) -> bool:
    """Whether it makes whole numbers of real ones, which what follows has to bound."""
    if _packet(n) is not aten._to_copy or not isinstance(n.args[0], Node):
        return False
    known = kind(n.args[0])
    return known is not None and known.dtype.is_floating_point


def _packet(n: Any) -> Any:
    return getattr(n.target, "overloadpacket", None) if isinstance(n, Node) and n.op == "call_function" else None


_VIEWS = {aten.view, aten.permute, aten.expand, aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.clone,
          aten.detach, aten.alias, aten.lift_fresh_copy, aten.flip, aten.roll}  # fmt: skip

_WITH_INDICES = {aten.max.dim: 1, aten.min.dim: 1, aten.sort.default: 1, aten.sort.stable: 2, aten.topk.default: 2,
                 aten.cummax.default: 1, aten.cummin.default: 1}  # fmt: skip
"""Operations that give values and where they were, and which argument names the dimension."""

_TAKES = {aten.gather, aten.index_select, aten.scatter, aten.scatter_add, aten.index_add}
"""Operations on (a tensor, a dimension, an index)."""
