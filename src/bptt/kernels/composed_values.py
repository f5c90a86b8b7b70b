"""Values of a core that take several element-wise instructions: powers, roundings, triangles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .graph_values import packet
from .indexed_values import IndexedValues
from .program import Refused
from .views import View
from .whole_numbers import HELD

__all__ = ["ComposedValues"]

aten = torch.ops.aten

POWERS = {2: ["square"], 1: ["same"], 0.5: ["sqrt"], -1: ["reciprocal"], -0.5: ["rsqrt"], -2: ["square", "reciprocal"]}


class ComposedValues(IndexedValues):
    """The program of a part of a step, with what is composed of element-wise instructions."""

    def power(self, node: Node, to: View) -> None:
        """A tensor to the power of a number."""
        x, exponent = node.args[0], node.args[1]
        if not isinstance(exponent, (bool, int, float)):
            return self.power_of_tensor(node, to)
        if exponent == 0:
            self.emit(node, "same", to, [1.0])
        elif exponent in POWERS:
            for op in POWERS[exponent]:
                self.program.element_wise(op, to, [self.operand(x, to, node)])
                x = node
                self.views[node] = to
        elif exponent == int(exponent) and 0 < exponent <= 16:
            square = self.operand(x, to, node)
            factor = square
            for bit in bin(int(exponent))[3:]:  # square and multiply
                self.program.element_wise("square", to, [square])
                square = to
                if bit == "1":
                    self.program.element_wise("mul", to, [to, factor])
        else:
            if exponent == int(exponent):
                raise Refused(f"{self.told(node)}: its exponent {exponent}")
            given, least = self.operand(x, to, node), self.program.new(to.dims, to.by_row)
            self.program.element_wise("eq", least, [given, self.number(-math.inf, to)])
            self.emit(node, "pow", to, [x, exponent])
            self.program.element_wise("where", to, [least, self.number(math.inf if exponent > 0 else 0.0, to), to])
        return None

    def power_of_tensor(self, node: Node, to: View) -> None:
        """A tensor to the power of another: of the size of the base, with a sign where the exponent is a whole number,
        and NaN where the base is negative and it is not; to the power of 0 it is 1.
        """
        emit, new = self.program.element_wise, lambda: self.program.new(to.dims, to.by_row)
        base, exponent = (self.operand(x, to, node) for x in node.args[:2])
        zero, one, two, infinite, nan = (self.number(x, to) for x in (0.0, 1.0, 2.0, math.inf, math.nan))
        size, power, other, sign, ends = new(), new(), new(), new(), new()
        emit("abs", size, [base])
        emit("pow", power, [size, exponent])
        emit("eq", other, [size, one])
        emit("where", power, [other, one, power])
        emit("div", other, [exponent, two])
        emit("floor", sign, [other])
        emit("ne", sign, [sign, other])
        emit("mul_sub", sign, [sign, two, one])  # 1 where it is odd, else -1
        emit("mul", sign, [sign, power])
        emit("neg", sign, [sign])
        emit("eq", ends, [size, zero])
        emit("eq", other, [size, infinite])
        emit("or", ends, [ends, other])
        emit("where", ends, [ends, power, nan])  # of no whole power of a negative number
        emit("floor", other, [exponent])
        emit("eq", other, [other, exponent])
        emit("where", sign, [other, sign, ends])
        emit("reciprocal", ends, [base])
        emit("lt", ends, [ends, zero])
        emit("lt", other, [base, zero])
        emit("or", other, [other, ends])
        emit("where", power, [other, sign, power])
        emit("eq", other, [exponent, zero])
        emit("where", to, [other, one, power])

    def number(self, x: float, like: View) -> View:
        """A number in the dimensions of a result."""
        return View(self.constants, like.by_row, like.dims, (0,) * len(like.dims), self.program.constant(x))

    def clamp(self, node: Node, to: View) -> None:
        x: object = node.args[0]
        for position, name, op in ((1, "min", "maximum"), (2, "max", "minimum")):
            bound = self.argument(node, position, name)
            if bound is not None:
                self.emit(node, op, to, [x, bound])
                self.views[node], x = to, node

    def divided(self, node: Node, to: View) -> None:
        """Whole numbers divided by one, rounded down, or what is left."""
        by: Any = node.args[1]
        if not isinstance(by, int) or (packet(node) is aten.div and node.kwargs.get("rounding_mode") != "floor"):
            raise Refused(f"{self.told(node)}: rounded")
        given, divisor = (self.operand(x, to, node) for x in node.args[:2])
        whole = to if packet(node) is aten.div else self.program.new(to.dims, to.by_row)
        self.program.element_wise("div", whole, [given, divisor])
        self.program.element_wise("floor", whole, [whole])
        if whole is not to:
            self.program.element_wise("sub_mul", to, [whole, divisor, given])

    def triangle(self, node: Node, to: View) -> None:
        """Matrices with zeros above or below a diagonal."""
        (rows, columns), offset = to.dims[-2:], self.argument(node, 1, "diagonal", 0)
        lower, place = packet(node) is aten.tril, len(self.program.constants)
        if to.by_row and len(to.dims) < 3:
            raise Refused(f"{self.told(node)}: it mixes rows")
        self.program.constants += [
            float(j - i <= offset if lower else j - i >= offset) for i in range(rows) for j in range(columns)
        ]
        strides = (*[0] * (len(to.dims) - 2), columns, 1)
        mask = View(self.constants, to.by_row, to.dims, strides, place)
        given, zero = (self.operand(x, to, node) for x in (node.args[0], 0.0))
        self.program.element_wise("where", to, [mask, given, zero])

    def cut(self, to: View, given: View, dtype: torch.dtype) -> None:
        """Real numbers as whole ones: without what comes after the point, and the least one in the place of what has
        no whole number, as processors have it.
        """
        within, limit = self.program.new(to.dims, to.by_row), float(HELD[dtype] + 1)
        self.program.element_wise("abs", within, [given])
        self.program.element_wise("lt", within, [within, self.number(limit, to)])
        self.rounded(to, given, aten.trunc)
        self.program.element_wise("where", to, [within, to, self.number(-limit, to)])

    def rounded(self, to: View, given: View, op: Any) -> None:
        """By floors of |x|, times its sign: those are exact. Halves go to the even one of two numbers."""
        emit, new = self.program.element_wise, lambda: self.program.new(to.dims, to.by_row)
        if op is aten.ceil:
            emit("neg", to, [given])
            emit("floor", to, [to])
            return emit("neg", to, [to])
        size, whole = new(), new()
        emit("abs", size, [given])
        emit("floor", whole, [size])
        if op is aten.round:
            half, two = self.number(0.5, to), self.number(2.0, to)
            odd, over = new(), new()
            emit("sub", size, [size, whole])
            emit("mul", odd, [whole, half])
            emit("floor", odd, [odd])
            emit("sub_mul", odd, [odd, two, whole])
            emit("gt", over, [size, half])
            emit("eq", size, [size, half])
            emit("where", odd, [size, odd, over])
            emit("add", whole, [whole, odd])
        sign = new()
        emit("sign", sign, [given])
        return emit("mul", to, [sign, whole])
