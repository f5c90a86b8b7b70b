"""The program of a core: instructions over slots, and how the compiled interpreter reads them (csrc/program.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import _walks
from .views import Slot, View, collapse, dense_strides
from .whole_numbers import Bounds

__all__ = ["LINE", "Instruction", "Program", "Refused"]

KINDS = (
    "outside", "once", "packed", "tile", "input", "owned", "output", "carry", "next", "adjoint", "back", "sum", "lane",
)  # fmt: skip
"""The enum Kind of csrc/program.hpp."""

OPERATIONS = {name: number for number, name in enumerate(_walks.operations())}

DIMENSIONS, OPERANDS = 4, 4

LINE = 16
"""Values whose multiples begin on a cache line, in float32 and in float64."""


class Refused(Exception):  # noqa: N818 it is an answer
    """The reason why a step is no program."""


@dataclass(frozen=True)
class Instruction:
    """An operation on views. operands: the result, then what it is computed from; n, strides: see csrc/program.hpp."""

    op: str
    operands: tuple[View | None, ...]
    n: tuple[int, int, int, int]
    strides: tuple[tuple[int, ...], ...]
    modes: int = 0

    def __str__(self) -> str:
        shown = [
            "-" if v is None else f"{v.slot.name or v.slot.kind}+{v.offset}{list(s)}"
            for v, s in zip(self.operands, self.strides, strict=True)
        ]
        return f"{shown[0]} = {self.op}{list(self.n)} {', '.join(shown[1:])}"


@dataclass
class Program:
    """The core of a step for the interpreter: a list of instructions, those that are computed once a call first."""

    slots: list[Slot] = field(default_factory=list)
    once: list[Instruction] = field(default_factory=list)
    walk: list[Instruction] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    inputs: dict[str, Slot] = field(default_factory=dict)
    ends: list[Slot] = field(default_factory=list)  # of the outputs
    work: float = 0.0
    row_values: int = 0  # of a tile's memory, for each row
    assumed: dict[str, Bounds] = field(default_factory=dict)  # of whole numbers among the inputs
    _constants: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return "\n".join([*(f"once {i}" for i in self.once), *map(str, self.walk)])

    def slot(self, kind: str, width: int, name: str = "", at: int = -1) -> Slot:
        """New memory."""
        made = Slot(kind, width, name, at)
        self.slots.append(made)
        return made

    def add(self, op: str, operands: Sequence[View | None], n: Sequence[int], strides: Sequence[Sequence[int]],
            modes: int = 0, work: float = 0.0) -> None:  # fmt: skip
        """Append an instruction, to those computed once if it has nothing to do with rows."""
        padded = tuple(tuple([0] * (DIMENSIONS - len(s)) + list(s)) for s in strides)
        sizes = tuple([1] * (DIMENSIONS - len(n)) + list(n))
        made = Instruction(op, tuple(operands), sizes, padded, modes)  # type: ignore[arg-type]  # as many as there are places
        by_row = any(v is not None and v.slot.by_row for v in operands) or op in ("add_rows", "add_outer")
        (self.walk if by_row else self.once).append(made)
        self.work += work

    def constant(self, number: float) -> int:
        """The place of a number among the constants."""
        for i, known in enumerate(self.constants):
            if known == number and str(known) == str(number):
                return i
        self.constants.append(number)
        return len(self.constants) - 1

    def lay_out(self, buffered: frozenset[str]) -> None:
        """Give each slot its buffer. buffered: the kinds that have one throughout; a tile's are shared over time.

        Rows may be some instructions ahead of others (csrc/machine.hpp): each has its own part of a shared buffer.
        """
        first: dict[Slot, int] = {}
        last: dict[Slot, int] = {}
        for i, instruction in enumerate(self.walk):
            for view in instruction.operands:
                if view is not None and view.slot.kind == "tile":
                    first.setdefault(view.slot, i)
                    last[view.slot] = i
        size = 0
        for slot in self.slots:
            if slot.kind in buffered:
                slot.at, size = size, size + _rounded(slot.width)
        free: dict[int, list[int]] = {}  # by width: rows of another would lie elsewhere, and may be in use still
        living: list[Slot] = []
        for slot in sorted(first, key=lambda slot: first[slot]):
            for gone in [s for s in living if last[s] < first[slot]]:
                living.remove(gone)
                free.setdefault(gone.width, []).append(gone.at)
            if free.get(slot.width):
                slot.at = free[slot.width].pop()
            else:
                slot.at, size = size, size + _rounded(slot.width)
            living.append(slot)
        self.row_values = size

    room: Bounds = field(default=Bounds(-(2**24), 2**24))  # of whole numbers that it does not read

    @cached_property
    def counts(self) -> frozenset[str]:
        """The inputs that are whole numbers."""
        return frozenset(self.assumed)

    @cached_property
    def number(self) -> dict[Slot, int]:
        """The place of each slot among them; there are no more from here on."""
        return {slot: i for i, slot in enumerate(self.slots)}

    def constants_as(self, dtype: torch.dtype) -> Tensor:
        """The numbers of the constants."""
        found = self._constants.get(dtype)
        if found is None:
            found = self._constants[dtype] = torch.tensor(self.constants or [0.0], dtype=dtype, device="cpu")
        return found

    @cached_property
    def places(self) -> Tensor:
        """`[slots, 4]` int64, the structs Place."""
        number = self.number
        rows = [[KINDS.index(s.kind), s.width, s.at, -1 if s.partner is None else number[s.partner]]
                for s in self.slots]  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    @cached_property
    def code(self) -> Tensor:
        """`[instructions, 30]` int64, the structs Instruction."""
        number, rows = self.number, []
        for i in (*self.once, *self.walk):
            row = [OPERATIONS[i.op], i.modes, *i.n]
            for x in range(OPERANDS):
                view = i.operands[x] if x < len(i.operands) else None
                if view is None:
                    row += [-1, 0, 0, 0, 0, 0]
                else:
                    row += [number[view.slot], view.offset, *i.strides[x]]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 6 + 6 * OPERANDS)

    # Instructions of one form each

    def new(self, dims: Sequence[int], by_row: bool) -> View:
        """A new view of memory of its own."""
        dims = tuple(dims)
        width = 1
        for size in dims:
            width *= size
        return View(self.slot("tile" if by_row else "once", width), by_row, dims, dense_strides(dims))

    def copy(self, to: View, view: View) -> None:
        """to = view, in any strides."""
        if len(fewest := collapse(to.dims, [to.strides, view.strides])[0]) > DIMENSIONS:
            raise Refused(f"a copy over {len(fewest)} dimensions of their own")
        sizes, strides = collapse(to.dims, [to.strides, view.strides])
        if strides[0][-1] == 1 and strides[1][-1] in (0, 1):
            self.element_wise("same", to, [view])
        else:
            self.add("copy", [to, view], sizes, strides, work=_count(to))

    def dense(self, view: View) -> View:
        """The same values, one after the other."""
        to = self.new(view.dims, view.by_row and view.slot.by_row)
        if view.by_row and not to.by_row:  # seen by row, but the same for all
            to = View(to.slot, True, to.dims, to.strides)
        self.copy(to, view)
        return to

    def element_wise(self, op: str, to: View, views: Sequence[View]) -> None:
        """to = op(views), whose dimensions are those of `to`."""
        sizes, strides = collapse(to.dims, [to.strides, *(v.strides for v in views)])
        if (strides[0][-1] != 1 and sizes[-1] > 1) or len(sizes) > DIMENSIONS:
            made = self.new(to.dims, to.by_row)
            if strides[0][-1] == 1:
                raise Refused(f"{op} over {len(sizes)} dimensions of their own")
            self.element_wise(op, made, views)
            return self.copy(to, made)
        for i, view in enumerate(views):
            if sizes[-1] > 1 and strides[1 + i][-1] not in (0, 1):
                kept = [1 if s == 0 else n for n, s in zip(view.dims, view.strides, strict=True)]
                made = self.dense(View(view.slot, view.by_row, tuple(kept), view.strides, view.offset))
                spread = [0 if n == 1 else s for n, s in zip(kept, made.strides, strict=True)]
                again = View(made.slot, view.by_row, view.dims, tuple(spread))
                return self.element_wise(op, to, [*views[:i], again, *views[i + 1 :]])
        modes = 0
        for i, view in enumerate(views):
            if (sizes[-1] > 1 and strides[1 + i][-1] == 0) or (sizes[-1] == 1 and not view.slot.by_row):
                modes |= 1 << i
        self.add(op, [to, *views], sizes, strides, modes, work=4 * _count(to))
        return None


def _count(view: View) -> int:
    count = 1
    for size in view.dims:
        count *= size
    return count


def _rounded(width: int) -> int:
    return -(-width // LINE) * LINE
