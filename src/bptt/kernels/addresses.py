"""Where the values of tensors lie, for compiled code that reads and writes them, and whether they fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Cell, Weights

__all__ = ["at", "check", "computed_in", "dense", "restart", "spaced_rows", "widened"]


def at(tensor: Tensor | None) -> int:
    """Where the values lie; 0 for none, which a tensor without memory must not be taken for."""
    if tensor is None:
        return 0
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # of what torch.func.vmap has wrapped
        address = 0
    if address == 0 and tensor.numel() > 0:
        raise RuntimeError(
            "tensors of a call must have memory that the compiled kernel can read, which those inside torch.func.vmap "
            "do not (kernel='eager' calls torch's operations instead; a dimension that is mapped can be lanes): got a "
            f"{type(tensor).__name__} of shape {list(tensor.shape)} without"
        )
    return address


def dense(tensor: Tensor | None) -> Tensor | None:
    """The same values, contiguous; the result must live as long as its address is in use."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise RuntimeError(f"all tensors of a call must be on the CPU: got one on {tensor.device}")
    try:
        if tensor._is_zerotensor():  # zeros that autograd has not written anywhere
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()
    except RuntimeError:
        if tensor.layout is torch.strided:
            raise
        raise RuntimeError(f"weights and states must be dense tensors: got layout {tensor.layout}") from None


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What compiled code computes in from tensors of a dtype, and keeps sums and states in while it walks."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def widened(tensor: Tensor | None) -> Tensor | None:
    """The same values `dense`, in the dtype that they are computed with."""
    return dense(tensor if tensor is None else tensor.to(computed_in(tensor.dtype)))


def restart(reset_state: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """h and c `[.., B, F]` with dense steps, None for none, and the distance from each one's step to the next."""
    if not reset_state:
        return (None, None), (0, 0)
    own = [
        r if r.dim() == 3 and r[0].is_contiguous() and not (r.is_neg() or r._is_zerotensor()) else dense(r)
        for r in reset_state
    ]
    distances = [0 if r is None or r.dim() == 2 else r.stride(0) for r in own]
    return (*own, None)[:2], (*distances, 0)[:2]


def spaced_rows(x: Tensor) -> tuple[Tensor | None, int]:
    """A tensor `[.., .., F]` with dense rows at equal distances, and that distance; copied only if it must be."""
    if x._is_zerotensor():
        return dense(x), x.shape[2]
    if x.is_contiguous() and not x.is_neg() and x.is_cpu:
        return x, x.shape[2]
    step, row, one = x.stride()
    if one == 1 and step == x.shape[1] * row and row >= x.shape[2] and not x.is_neg() and x.is_cpu:
        return x, row
    return dense(x), x.shape[2]


def check(
    cell: Cell,
    x: Tensor,
    initial: tuple[Tensor, ...],
    w: Weights,
    reset_state: tuple[Tensor, ...] = (),
    lanes: int | None = None,
    layers: tuple[int, ...] = (),
) -> None:
    """Raise RuntimeError for what does not fit together: no pointer may lead beyond its tensor.

    lanes: B, where x has another second dimension. layers: the first dimension of the initial states, if they have one
    beside their own.
    """
    GH, P = w.hh.shape
    H = GH // cell.gates_per_unit
    B, wide, dtype = x.shape[1] if lanes is None else lanes, (P, H), x.dtype
    sizes, kinds = (cell.gates_per_unit * H, H if w.hr is None else P) == (GH, P), True
    shapes = ((GH, x.shape[2]), (GH, P), (GH,), (GH,), (P, H))
    for t, shape in zip(w, shapes, strict=True):
        if t is not None:
            sizes, kinds = sizes and t.shape == shape, kinds and t.dtype == dtype and t.is_cpu
    for t, size in zip(initial, wide, strict=False):
        sizes, kinds = sizes and t.shape == (*layers, B, size), kinds and t.dtype == dtype and t.is_cpu
    for t, s in zip(reset_state, initial, strict=False):
        sizes, kinds = sizes and t.shape in (s.shape, (len(x), *s.shape)), kinds and t.dtype == dtype and t.is_cpu
    if not sizes:
        got = ", ".join(f"{name} {list(t.shape)}" for name, t in _named(x, initial, w, reset_state))
        raise RuntimeError(f"sizes must fit together, {cell.gates_per_unit} gates a hidden unit: got {got}")
    if not kinds:
        got = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in _named(x, initial, w, reset_state))
        raise RuntimeError(f"weights and states must be {dtype} on the CPU, as x is: got {got}")


def _named(
    x: Tensor, initial: tuple[Tensor, ...], w: Weights, reset_state: tuple[Tensor, ...]
) -> list[tuple[str, Tensor]]:
    named = {"x": x, **dict(zip(("h_0", "c_0"), initial, strict=False)), **w._asdict()}
    named |= zip(("reset_state of h", "reset_state of c"), reset_state, strict=False)
    return [(name, t) for name, t in named.items() if t is not None]
