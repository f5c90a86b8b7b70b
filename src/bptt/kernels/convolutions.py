"""Convolutions in programs: plane by plane, or as sums over the rows of a kernel of products with what it covers,
channels last.

Legend: an image `[C, H, W]` for each row of the program, a kernel of h x w, O channels in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from .graph_values import GraphValues
from .program import LINE, Program, Refused
from .views import View

__all__ = ["Convolution"]

MOST_GROUPS = 8
"""Groups of channels that have instructions of their own, unless each is a channel by itself."""

MOST_PLANES = LINE
"""Pairs of channels, before and after, up to which planes are faster than channels last: of 64 they take longer."""

LONGEST = 2**15
"""Beyond which the sizes of a kernel do not fit an instruction."""

MOST_COVERED = 2 * LINE
"""Numbers of a kernel for one channel of its result up to which its gradient is made plane by plane."""


@dataclass(frozen=True)
class Convolution:
    """A convolution; transposed, it is one by 1 step at a time with the kernel turned round, of an image whose places
    lie `stride` apart.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    groups: int

    @classmethod
    def of(cls, node: Node, values: GraphValues, first: int = 3) -> Convolution:
        """The one that a node is. Raises Refused for others. first: the position of its stride among the arguments."""
        stride, padding, dilation, transposed, _, groups = values_of(node, first)
        if len(stride) > 2:
            raise Refused(f"{values.told(node)}: over {len(stride)} dimensions")
        return cls((1, *stride)[-2:], (0, *padding)[-2:], (1, *dilation)[-2:], bool(transposed), groups)

    def lower(self, program: Program, to: View, x: View | None, w: View | None, bias: View | None,
              told: str) -> None:  # fmt: skip
        """Append the instructions for to = x * w + bias."""
        assert x is not None
        assert w is not None
        x, w, to = (_with_two_dimensions(v, first) for v, first in ((x, 2), (w, 2), (to, 2)))
        if w.by_row or w.slot.by_row or not x.by_row or x.dims[0] != 1:
            raise Refused(f"{told}: its kernel is one for each row, or a row has several images")
        C, (_, O, OH, OW), groups = x.dims[1], to.dims, self.groups
        h, v = w.dims[2:]
        (down, right), far = self.dilation, ((h - 1) * self.dilation[0], (v - 1) * self.dilation[1])
        above, before = (far[0] - self.padding[0], far[1] - self.padding[1]) if self.transposed else self.padding
        if above < 0 or before < 0:
            raise Refused(f"{told}: it has more padding than its kernel")
        if groups > MOST_GROUPS and not (C == O == groups):
            raise Refused(f"{told}: it has {groups} groups")
        apart, step = (self.stride, (1, 1)) if self.transposed else ((1, 1), self.stride)
        size = ((OH - 1) * step[0] + far[0] + 1, (OW - 1) * step[1] + far[1] + 1)
        few = MOST_PLANES * groups**2 >= C * O and max(h, v, down, right) < LONGEST
        if few and step == (1, 1) and not C == O == groups:
            planes = _padded_planes(program, x, (above, before), size, apart)
            return self._by_planes(program, to, planes, w, bias)
        padded = _padded(program, x, (above, before), size, apart)
        made = program.new((1, OH, OW, O), True)
        across = padded.dims[2] * C
        if C == O == groups:
            self._by_channel(program, made, padded, w, bias, step)
            return program.copy(to, made.pick((0, 3, 1, 2)))
        inputs, outputs = C // groups, O // groups
        whole = v if right == 1 and groups == 1 else 1  # places of a line that are multiplied together
        for g in range(groups):
            own = w.slice(0, g * inputs, inputs) if self.transposed else w.slice(0, g * outputs, outputs)
            kernel = program.dense(_turned(own) if self.transposed else own.pick((2, 3, 1, 0)))  # [h, w, C, O]
            result = replace(made, offset=made.offset + g * outputs)
            start = None if bias is None else replace(bias, offset=bias.offset + g * outputs * bias.strides[0])
            first = start
            strides = [[0, OW * O, O, 1], [0, across * step[0], C * step[1], 1], []]
            for i in range(h):
                for j in range(0, v, whole):
                    K = whole * inputs
                    packed = program.slot("packed", outputs, at=K)
                    weights = View(packed, False, (K, outputs), (outputs, 1))
                    lines = replace(kernel, dims=(K, outputs), strides=(outputs, 1),
                                    offset=kernel.offset + (i * v + j) * inputs * outputs)  # fmt: skip
                    program.add("pack", [weights, lines], [0, K, outputs, 0], [[], [outputs, 1, 0, 0]])
                    place = i * down * across + j * right * C + g * inputs
                    left = replace(padded, offset=padded.offset + place)
                    starts = [] if start is None else [0, 0, 0, 1] if start is first else strides[0]
                    program.add("product", [result, left, weights, start], [OH * OW, K, outputs, OW],
                                [*strides, starts], work=OH * OW * K * outputs)  # fmt: skip
                    start = result
        program.copy(to, made.pick((0, 3, 1, 2)))
        return None

    def _by_planes(self, program: Program, to: View, padded: View, w: View, bias: View | None) -> None:
        """Each channel of the result as a sum of shifted planes."""
        (_, O, OH, OW), (h, v) = to.dims, w.dims[2:]
        inputs, outputs = padded.dims[1] // self.groups, O // self.groups
        if self.transposed:  # from its last row and column to the first
            (s, t), end = w.strides[2:], (h - 1) * w.strides[2] + (v - 1) * w.strides[3]
            w = replace(w, strides=(*w.strides[:2], -s, -t), offset=w.offset + end)
        made = to if to.strides[3] == 1 or OW == 1 else program.new(to.dims, True)
        modes = h | v << 16 | self.dilation[0] << 32 | self.dilation[1] << 48
        for g in range(self.groups):
            first, count = (g * inputs, inputs) if self.transposed else (g * outputs, outputs)
            own = w.slice(0, first, count)
            own = own.pick((1, 0, 2, 3)) if self.transposed else own
            start = None if bias is None else bias.slice(0, g * outputs, outputs)
            result, image = made.slice(1, g * outputs, outputs), padded.slice(1, g * inputs, inputs)
            strides = [result.strides, image.strides, own.strides, [] if start is None else [0, *start.strides, 0, 0]]
            program.add("convolve", [result, image, own, start], [outputs, inputs, OH, OW], strides, modes,
                        work=OH * OW * outputs * inputs * h * v)  # fmt: skip
        if made is not to:
            program.copy(to, made)

    def _by_channel(self, program: Program, made: View, padded: View, w: View, bias: View | None,
                    step: tuple[int, int]) -> None:  # fmt: skip
        """Each channel by itself: sums of all that a place of the kernel covers, times its numbers."""
        _, OH, OW, C = made.dims
        h, v = w.dims[2:]
        kernel = program.dense(_turned(w) if self.transposed else w.pick((2, 3, 1, 0)))  # [h, w, 1, C] or [h, w, C, 1]
        before = (
            None if bias is None else replace(bias, by_row=True, dims=made.dims, strides=(0, 0, 0, bias.strides[0]))
        )
        for i in range(h):
            for j in range(v):
                part = padded.slice(1, i * self.dilation[0], OH, step[0]).slice(2, j * self.dilation[1], OW, step[1])
                factor = View(kernel.slot, True, made.dims, (0, 0, 0, 1), kernel.offset + (i * v + j) * C)
                if before is None:
                    program.element_wise("mul", made, [part, factor])
                else:
                    program.element_wise("mul_add", made, [part, factor, before])
                before = made

    def lower_weights(self, program: Program, to: View, errors: View, x: View, told: str) -> None:
        """Append the instructions for to `[O, C, h, w]`, the sum over all rows of the kernel's gradient.

        errors: the gradient of x * w. Each of its places is multiplied by all that the kernel covers there.
        """
        if self.groups != 1 or {*self.stride, *self.dilation} != {1}:
            raise Refused(f"{told}: the gradient of a kernel with a stride, a dilation or groups")
        x, errors, to = (_with_two_dimensions(v, 2) for v in (x, errors, to))
        if self.transposed or to.by_row or not (x.by_row and errors.by_row) or x.dims[0] != 1:
            raise Refused(f"{told}: the gradient of a kernel that is transposed, or one for each row")
        (O, C, h, v), (OH, OW) = to.dims, errors.dims[2:]
        k, covered, size = OH * OW, C * h * v, (OH + h - 1, OW + v - 1)
        if covered <= MOST_COVERED and max(h, v) < LONGEST:
            planes = _padded_planes(program, x, self.padding, size)
            if errors.strides[3] != 1 and OW > 1:
                errors = program.dense(errors)
            strides: list[Sequence[int]] = [to.strides, errors.strides, planes.strides]
            modes = h | v << 16 | 1 << 32 | 1 << 48
            return program.add("correlate", [to, errors, planes], [O, C, OH, OW], strides, modes, work=k * O * covered)
        padded = _padded(program, x, self.padding, size)
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
        return program.add("add_outer", [to, by_place, columns], [1, k, O, covered], strides, work=k * O * covered)


def _padded(
    program: Program, x: View, before: tuple[int, int], size: tuple[int, int], apart: tuple[int, int] = (1, 1)
) -> View:
    """An image in the middle of zeros, channels last. before: so many lines and places; size: of all; apart: how far
    its own lines and places lie apart.
    """
    (_, C, H, W), (line, place) = x.dims, before
    padded = program.new((1, *size, C), True)
    if size != (H, W):
        program.copy(padded, View(program.slots[0], True, padded.dims, (0,) * 4, program.constant(0.0)))
    # A stride may leave some of the image out at its end.
    lines, places = (min(n, -(-(whole - first) // s)) for n, whole, first, s
                     in zip((H, W), size, before, apart, strict=True))  # fmt: skip
    within = padded.slice(1, line, lines, apart[0]).slice(2, place, places, apart[1])
    program.copy(within, x.pick((0, 2, 3, 1)).slice(1, 0, lines).slice(2, 0, places))
    return padded


def _padded_planes(program: Program, x: View, before: tuple[int, int], size: tuple[int, int],
                   apart: tuple[int, int] = (1, 1)) -> View:  # fmt: skip
    """`_padded` with channels first, and a register more than it has values: so far one may be read beyond them."""
    (_, C, H, W), (line, place), values = x.dims, before, x.dims[1] * size[0] * size[1]
    slot = program.slot("tile", -(-values // LINE) * LINE + LINE)
    padded = View(slot, True, (1, C, *size), (values, size[0] * size[1], size[1], 1))
    if size != (H, W):
        program.copy(padded, View(program.slots[0], True, padded.dims, (0,) * 4, program.constant(0.0)))
    lines, places = (min(n, -(-(whole - first) // s)) for n, whole, first, s
                     in zip((H, W), size, before, apart, strict=True))  # fmt: skip
    within = padded.slice(2, line, lines, apart[0]).slice(3, place, places, apart[1])
    program.copy(within, x.slice(2, 0, lines).slice(3, 0, places))
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
