"""Convolutions in programs: sums over the rows of a kernel of products with what it covers, channels last.

Legend: an image `[C, H, W]` for each row of the program, a kernel of h x w, O channels in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from .graph_values import GraphValues
from .program import Program, Refused
from .views import View

__all__ = ["Convolution"]


@dataclass(frozen=True)
class Convolution:
    """A convolution by 1 step at a time, in one group; transposed, it is that with the kernel turned round."""

    padding: tuple[int, int]
    transposed: bool

    @classmethod
    def of(cls, node: Node, values: GraphValues, first: int = 3) -> Convolution:
        """The one that a node is. Raises Refused for others. first: the position of its stride among the arguments."""
        stride, padding, dilation, transposed, output_padding, groups = values_of(node, first)
        if groups != 1 or {*stride, *dilation} != {1} or any(output_padding):
            raise Refused(f"{values.told(node)}: it has a stride, a dilation, groups or output padding")
        if len(stride) > 2:
            raise Refused(f"{values.told(node)}: over {len(stride)} dimensions")
        return cls((0, *padding)[-2:], bool(transposed))

    def lower(self, program: Program, to: View, x: View | None, w: View | None, bias: View | None,
              told: str) -> None:  # fmt: skip
        """Append the instructions for to = x * w + bias."""
        assert x is not None
        assert w is not None
        x, w, to = (_with_two_dimensions(v, first) for v, first in ((x, 2), (w, 2), (to, 2)))
        if w.by_row or w.slot.by_row or not x.by_row or x.dims[0] != 1:
            raise Refused(f"{told}: its kernel is one for each row, or a row has several images")
        C, (_, O, OH, OW) = x.dims[1], to.dims
        h, v = w.dims[2:]
        above, before = (h - 1 - self.padding[0], v - 1 - self.padding[1]) if self.transposed else self.padding
        if above < 0 or before < 0:
            raise Refused(f"{told}: it has more padding than its kernel")
        kernel = program.dense(_turned(w) if self.transposed else w.pick((2, 3, 1, 0)))  # [h, w, C, O]
        padded = _padded(program, x, (above, before), (OH + h - 1, OW + v - 1))
        made = program.new((1, OH, OW, O), True)
        across, start = padded.dims[2] * C, bias
        strides = [[0, OW * O, O, 1], [0, across, C, 1], []]
        for i in range(h):
            packed = program.slot("packed", O, at=v * C)
            weights = View(packed, False, (v * C, O), (O, 1))
            lines = replace(kernel, dims=(v * C, O), strides=(O, 1), offset=kernel.offset + i * v * C * O)
            program.add("pack", [weights, lines], [0, v * C, O, 0], [[], [O, 1, 0, 0]])
            left = replace(padded, offset=padded.offset + i * across)
            starts = [] if start is None else [0, 0, 0, 1] if start is bias else strides[0]
            program.add("product", [made, left, weights, start], [OH * OW, v * C, O, OW], [*strides, starts],
                        work=OH * OW * v * C * O)  # fmt: skip
            start = made
        program.copy(to, made.pick((0, 3, 1, 2)))

    def lower_weights(self, program: Program, to: View, errors: View, x: View, told: str) -> None:
        """Append the instructions for to `[O, C, h, w]`, the sum over all rows of the kernel's gradient.

        errors: the gradient of x * w. Each of its places is multiplied by all that the kernel covers there.
        """
        x, errors, to = (_with_two_dimensions(v, 2) for v in (x, errors, to))
        if self.transposed or to.by_row or not (x.by_row and errors.by_row) or x.dims[0] != 1:
            raise Refused(f"{told}: the gradient of a kernel that is transposed, or one for each row")
        (O, C, h, v), (OH, OW) = to.dims, errors.dims[2:]
        padded = _padded(program, x, self.padding, (OH + h - 1, OW + v - 1))
        k, covered = OH * OW, C * h * v
        columns = program.new((k, covered), True)
        across, (_, line, place, channel) = columns.strides[0], padded.strides
        for i in range(h):
            part = replace(columns, dims=(1, OH, OW, C, v), strides=(0, OW * across, across, h * v, 1),
                           offset=columns.offset + i * v)  # fmt: skip
            program.copy(part, replace(padded, dims=part.dims, strides=(0, line, place, channel, place),
                                       offset=padded.offset + i * line))  # fmt: skip
        by_place = errors.reshape((1, O, k), True)
        if by_place is None:
            by_place = program.dense(errors).reshape((1, O, k), True)
            assert by_place is not None
        along, apart = by_place.strides[1:]
        strides = [[0, 0, covered, 1], [0, apart, along, 0], [0, across, 0, 1]]
        program.add("add_outer", [to, by_place, columns], [1, k, O, covered], strides, work=k * O * covered)


def _padded(program: Program, x: View, before: tuple[int, int], size: tuple[int, int]) -> View:
    """An image in the middle of zeros, channels last. before: so many lines and places; size: of all."""
    (_, C, H, W), (line, place) = x.dims, before
    padded = program.new((1, *size, C), True)
    if size != (H, W):
        program.copy(padded, View(program.slots[0], True, padded.dims, (0,) * 4, program.constant(0.0)))
    program.copy(padded.slice(1, line, H).slice(2, place, W), x.pick((0, 2, 3, 1)))
    return padded


def values_of(node: Node, first: int = 3) -> tuple[Any, ...]:
    """The arguments of a convolution that are no tensors. first: the position of the first one."""
    return tuple(node.args[first : first + 6])


def _turned(w: View) -> View:
    """`[C, O, h, w]` as `[h, w, C, O]`, from its last row and column to the first."""
    (h, v), (s, t) = w.dims[2:], w.strides[2:]
    turned = replace(w, strides=(*w.strides[:2], -s, -t), offset=w.offset + (h - 1) * s + (v - 1) * t)
    return turned.pick((2, 3, 0, 1))


def _with_two_dimensions(view: View, at: int) -> View:
    """An image of one dimension as one of two, of which the first is 1."""
    if len(view.dims) == 4:
        return view
    dims, strides = list(view.dims), list(view.strides)
    dims.insert(at, 1)
    strides.insert(at, 0)
    return replace(view, dims=tuple(dims), strides=tuple(strides))
