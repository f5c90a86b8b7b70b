"""A part of a split step as text: an operation a line, with sizes and the line of the step's code that it came from."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from .parts import Part, SplitStep, Value

__all__ = ["labels", "listing", "sizes"]

aten = torch.ops.aten

PARTS = ("constants", "hoisted", "forward", "outputs", "errors", "adjoint", "deferred")
"""The parts of a split step, in the order in which they run."""

_SIGNS = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/", aten.mm.default: "@",
    aten.bmm.default: "@", aten.eq.Tensor: "==", aten.ne.Tensor: "!=", aten.lt.Tensor: "<", aten.le.Tensor: "<=",
    aten.gt.Tensor: ">", aten.ge.Tensor: ">=", aten.eq.Scalar: "==", aten.ne.Scalar: "!=", aten.lt.Scalar: "<",
    aten.le.Scalar: "<=", aten.gt.Scalar: ">", aten.ge.Scalar: ">=", aten.add.Scalar: "+", aten.sub.Scalar: "-",
    aten.mul.Scalar: "*", aten.div.Scalar: "/",
}  # fmt: skip

_LEFT_OUT = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
"""Keywords of operations that say nothing of what is computed."""

_MOST = 84
"""The column in which lines of code stand at most; that of a longer operation stands after it."""


def labels(step: SplitStep, given: Mapping[str, str]) -> dict[str, str]:
    """A name to show for every value of the parts: the one given, or its operation's, numbered from the second on.

    given: names of values for which there is a better one.
    """
    found, counts = dict(given), dict[str, int]()
    for part in PARTS:
        for node in getattr(step, part).graph.nodes:
            if node.op == "call_function" and node.name not in found:
                name = _operation(node)
                counts[name] = counts.get(name, 0) + 1
                found[node.name] = name if counts[name] == 1 else f"{name}_{counts[name]}"
    return found


def listing(part: Part, named: Mapping[str, str]) -> list[str]:
    """The operations of a part, `name [sizes] = operation`, each with its line of code where that is known.

    >>> from torch.fx import Graph
    >>> graph = Graph()
    >>> rows, h = graph.placeholder("R"), graph.placeholder("h")
    >>> made = graph.call_function(aten.tanh.default, (h,), name="tanh_default")
    >>> made.meta |= {"dims": ((1, True), (3, False)), "dtype": torch.float32, "line": "cell.py:12"}
    >>> listing(Part(graph, ("h",), ()), {"h": "carry", "tanh_default": "tanh"})
    ['tanh [R, 3] = tanh(carry)   cell.py:12']
    """
    made = [n for n in part.graph.nodes if n.op == "call_function" and not _counts_rows(n)]
    texts = [f"{_shown(n, named)}{_described(n)} = {_expression(n, named)}" for n in made]
    width = max((len(text) for text in texts if len(text) <= _MOST), default=0)
    lines = [n.meta.get("line") for n in made]
    return [text if line is None else f"{text:<{width}}   {line}" for text, line in zip(texts, lines, strict=True)]


def sizes(value: Value) -> str:
    """The sizes of a value: R is the number of rows.

    >>> sizes(Value(1, (4, 5), torch.float32)), sizes(Value(2, (3,), torch.float32)), sizes(Value(0, (3,), torch.bool))
    ('[R, 4, 5]', '[2R, 3]', '[3]')
    """
    return _sizes([(value.rows, True)] * bool(value.rows > 0) + [(size, False) for size in value.shape])


def _sizes(dims: Sequence[tuple[int, bool]]) -> str:
    return f"[{', '.join(('R' if n == 1 else f'{n}R') if rows else str(n) for n, rows in dims)}]"


def _described(node: Node) -> str:
    """The sizes of a value, and its dtype where it is not a floating one."""
    if "dims" not in node.meta:  # several results, which are taken apart
        return ""
    dtype = node.meta["dtype"]
    kind = "" if dtype.is_floating_point else f" {_name(dtype)}"
    return f" {_sizes(node.meta['dims'])}{kind}"


def _counts_rows(node: Node) -> bool:
    return node.target is operator.mul


def _operation(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(node.target if packet is None else packet, "__name__", str(node.target)).strip("_")


def _expression(node: Node, named: Mapping[str, str]) -> str:
    args = [_shown(a, named) for a in node.args]
    sign = _SIGNS.get(node.target)  # type: ignore[call-overload]  # a target is any object
    if sign is not None and len(args) == 2 and not node.kwargs:
        return f"{args[0]} {sign} {args[1]}"
    if node.target is aten.slice.Tensor and len(args) == 5:
        step = "" if args[4] == "1" else f":{args[4]}"
        return f"{args[0]}[{':, ' * int(args[1])}{args[2]}:{args[3]}{step}]"
    if node.target is aten.select.int:
        return f"{args[0]}[{':, ' * int(args[1])}{args[2]}]"
    if node.target is aten.permute.default and args[1] == "[1, 0]":
        return f"{args[0]}.T"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    said = {key: value for key, value in node.kwargs.items() if key not in _LEFT_OUT and value is not None}
    if node.target is aten.full.default:
        said.pop("dtype", None)
    kwargs = [f"{key}={_shown(value, named)}" for key, value in said.items()]
    return f"{_operation(node)}({', '.join([*args, *kwargs])})"


def _shown(value: Any, named: Mapping[str, str]) -> str:
    if isinstance(value, Node):
        if _counts_rows(value):
            return f"{value.args[1]}R"
        return named.get(value.name, "R" if value.name == "r" else value.name)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shown(item, named) for item in value)}]"
    return _name(value) if isinstance(value, torch.dtype) else repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
