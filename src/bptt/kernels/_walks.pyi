"""The compiled walks: fields as in csrc/walks.hpp and csrc/module.cpp, pointers as addresses, 0 for none."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

class Forward:
    cell: int
    T: int
    B: int
    I: int
    H: int
    P: int
    reset_h_step: int
    reset_c_step: int
    stride: int
    keeps: bool
    lane: int
    active: int
    first: int
    before: int
    reverse: bool
    gates: int
    x: int
    w_ih: int
    h_0: int
    c_0: int
    resets: int
    reset_h: int
    reset_c: int
    w_hh: int
    b_ih: int
    b_hh: int
    w_hr: int
    h: int
    c: int
    y: int
    h_n: int
    c_n: int
    def copy(self) -> Self: ...
    def run(self, *, variant: int, threads: int) -> None: ...
    def run_beside(self, other: Self, *, variant: int, threads: int) -> None: ...

class ForwardFloat32(Forward): ...
class ForwardFloat64(Forward): ...
class ForwardBfloat16(Forward): ...
class ForwardBfloat16Whole(Forward): ...

class Infer:
    cell: int
    T: int
    B: int
    I: int
    H: int
    P: int
    x: int
    w_ih: int
    h_0: int
    c_0: int
    w_hh: int
    b_ih: int
    b_hh: int
    w_hr: int
    resets: int
    reverse: bool
    y: int
    h_n: int
    c_n: int
    def copy(self) -> Self: ...
    def run(self, *, variant: int, threads: int) -> None: ...

class InferFloat32(Infer): ...
class InferFloat64(Infer): ...

class Sweep:
    cell: int
    T: int
    B: int
    I: int
    H: int
    P: int
    N: int
    R: int
    reset_h_step: int
    reset_c_step: int
    error_stride: int
    errors_by_position: bool
    by_position: bool
    sums: int
    columns: int
    counts: int
    tops: int
    before: int
    S: int
    positions_turned: bool
    reverse: bool
    gates: int
    h: int
    c: int
    resets: int
    reset_h: int
    reset_c: int
    errors: int
    arriving_h: int
    arriving_c: int
    edge_factors: int
    w_hh: int
    w_hr: int
    da: int
    adjoint_h: int
    adjoint_c: int
    db_ih: int
    db_hh: int
    leaving_h: int
    leaving_c: int
    x: int
    w_ih: int
    dx: int
    dw_ih: int
    dw_hh: int
    def copy(self) -> Self: ...
    def run(self, *, variant: int, threads: int) -> None: ...
    def run_beside(self, other: Self, *, variant: int, threads: int) -> None: ...

class SweepFloat32(Sweep): ...
class SweepFloat64(Sweep): ...
class SweepBfloat16(Sweep): ...
class SweepBfloat16Whole(Sweep): ...

class RowSums:
    N: int
    M: int
    K: int
    K2: int
    inner: int
    a_stride: int
    b_stride: int
    b2_stride: int
    rows: int
    a: int
    b: int
    b2: int
    out: int
    out2: int
    sums: int
    def copy(self) -> Self: ...
    def run(self, *, variant: int, threads: int) -> None: ...

class RowSumsFloat32(RowSums): ...
class RowSumsFloat64(RowSums): ...
class RowSumsBfloat16(RowSums): ...

class Program:
    T: int
    B: int
    N: int
    R: int
    back: bool
    overlaps: bool
    places: int
    count: int
    once: int
    row_values: int
    work: float
    place: int
    code: int
    outside: int
    arriving: int
    leaving: int
    resets: int
    edge_factors: int
    columns: int
    moves: int
    before: int
    after: int
    def copy(self) -> Self: ...
    def run(self, *, variant: int, threads: int) -> None: ...

class ProgramFloat32(Program): ...
class ProgramFloat64(Program): ...

class Bound:
    def __init__(
        self, program: Program, addresses: Sequence[int], parts: Sequence[int], moves: Sequence[int], before: int
    ) -> None: ...
    def run(self, memories: Sequence[int], variant: int, threads: int) -> None: ...

class BoundFloat32(Bound): ...
class BoundFloat64(Bound): ...

def places(
    tensors: tuple[Tensor | None, ...], shapes: tuple[Sequence[int] | None, ...], dtype: torch.dtype
) -> tuple[int, ...] | None: ...
def apply_float32(variant: int, cell: int, n: int, x: int, y: int) -> None: ...
def apply_float64(variant: int, cell: int, n: int, x: int, y: int) -> None: ...
def apply_operation_float32(variant: int, op: int, modes: int, n: int, out: int, a: int, b: int, c: int) -> None: ...
def apply_operation_float64(variant: int, op: int, modes: int, n: int, out: int, a: int, b: int, c: int) -> None: ...
def operations() -> list[str]: ...
def intel() -> bool: ...
def variants() -> list[tuple[str, bool]]: ...
