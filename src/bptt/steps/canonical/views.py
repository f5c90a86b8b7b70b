"""Copies and views in the canonical set: by permutation, slice and size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .rules import dim_of, full, rule

__all__: list[str] = []

aten = torch.ops.aten


@rule(aten.detach.default, aten.alias.default)
def _same(a: Tensor) -> Any:
    return NotImplemented  # a view: `Recorder` keeps track of what shares memory


@rule(aten._to_copy.default)
def _to_copy(a: Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Any:
    layout, device = others.get("layout"), others.get("device")
    if not isinstance(a, Tensor):  # a number in the place of a tensor: torch.func.vmap hands them on so
        return aten.full.default([], a, dtype=dtype, device=device)
    if (layout is None or layout == a.layout) and (device is None or torch.device(device) == a.device):
        if dtype is None or dtype == a.dtype:
            return aten.clone.default(a)
        if len(others) > 0:
            return aten._to_copy.default(a, dtype=dtype)
    return NotImplemented


@rule(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(a: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    dim = dim_of(dim, a)
    whole = a.shape[dim]
    return [aten.slice.Tensor(a, dim, i, min(i + size, whole)) for i in range(0, max(whole, 1), size)]


@rule(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def _split_with_sizes(a: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    dim, start, parts = dim_of(dim, a), 0, []
    for size in sizes:
        parts.append(aten.slice.Tensor(a, dim, start, start + size))
        start += size
    return parts


@rule(aten.unbind.int)
def _unbind(a: Tensor, dim: int = 0) -> list[Tensor]:
    dim = dim_of(dim, a)
    return [aten.select.int(a, dim, i) for i in range(a.shape[dim])]


@rule(aten.slice.Tensor)
def _slice(a: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    whole, normal = a.shape[dim_of(dim, a)], (dim_of(dim, a), *slice(start, end, step).indices(a.shape[dim_of(dim, a)]))
    if normal[1:] == (0, whole, 1):
        return aten.alias.default(a)
    if (dim, start, end, step) == normal:
        return NotImplemented
    return aten.slice.Tensor(a, *normal)


@rule(aten.select.int)
def _select(a: Tensor, dim: int, index: int) -> Any:
    normal = dim_of(dim, a), index + a.shape[dim_of(dim, a)] if index < 0 else index
    return NotImplemented if (dim, index) == normal else aten.select.int(a, *normal)


@rule(aten.unsqueeze.default)
def _unsqueeze(a: Tensor, dim: int) -> Any:
    return NotImplemented if dim >= 0 else aten.unsqueeze.default(a, dim_of(dim, a, 1))


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(a: Tensor, dims: Any = None) -> Any:
    asked = range(a.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    own = sorted(dim_of(d, a) for d in asked if a.dim() and a.shape[d] == 1)
    if dims == own:
        return NotImplemented
    return aten.squeeze.dims(a, own) if own else aten.alias.default(a)


@rule(aten.permute.default)
def _permute(a: Tensor, dims: Sequence[int]) -> Any:
    normal = [dim_of(d, a) for d in dims]
    return NotImplemented if list(dims) == normal else aten.permute.default(a, normal)


@rule(aten.cat.default)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    own = [t for t in tensors if t.shape != (0,)]  # torch ignores empty vectors there
    if own and (dim < 0 or len(own) < len(tensors)):
        return aten.cat.default(own, dim_of(dim, own[0]))
    return NotImplemented


@rule(aten.stack.default)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim = dim_of(dim, tensors[0], 1)
    return aten.cat.default([aten.unsqueeze.default(t, dim) for t in tensors], dim)


@rule(aten.roll.default)
def _roll(a: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not dims:
        return NotImplemented
    made = a
    for shift, dim in zip(shifts, dims, strict=True):
        dim = dim_of(dim, a)
        first = -shift % a.shape[dim] if a.shape[dim] else 0
        if first:
            parts = aten.slice.Tensor(made, dim, first, a.shape[dim]), aten.slice.Tensor(made, dim, 0, first)
            made = aten.cat.default(parts, dim)
    return aten.clone.default(a) if made is a else made


@rule(aten.constant_pad_nd.default)
def _constant_pad(a: Tensor, pad: Sequence[int], value: Any = 0) -> Tensor:
    """Slices where it takes away, and constants beside what is left."""
    made = a
    for i in range(len(pad) // 2):
        dim, before, after = a.dim() - 1 - i, pad[2 * i], pad[2 * i + 1]
        start, end = max(0, -before), made.shape[dim] - max(0, -after)
        made = made if (start, end) == (0, made.shape[dim]) else aten.slice.Tensor(made, dim, start, end)
        shape = list(made.shape)
        sides = (full(a, [*shape[:dim], n, *shape[dim + 1 :]], value) if n > 0 else None for n in (before, after))
        first, last = sides
        parts = [t for t in (first, made, last) if t is not None]
        made = aten.cat.default(parts, dim) if len(parts) > 1 else made
    return aten.clone.default(a) if made is a else made


@rule(aten.repeat.default)
def _repeat(a: Tensor, repeats: Sequence[int]) -> Any:
    if len(repeats) != a.dim() or 0 in repeats:
        return NotImplemented
    made = a
    for dim, n in enumerate(repeats):
        made = aten.cat.default([made] * n, dim) if n > 1 else made
    return aten.clone.default(a) if made is a else made


@rule(aten._unsafe_view.default, aten._reshape_alias.default)
def _view(a: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return aten.view.default(a, size)


@rule(aten.as_strided.default)
def _as_strided(a: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    """A slice of a dense tensor, of every so many elements perhaps, or a row or column, as autograd asks for it after a
    write to one.
    """
    if a.dim() == 1 and list(stride) not in ([], [1]) and a.is_contiguous() and a.storage_offset() == 0:
        # All of the memory: as the dense tensor of these strides.
        dense = _dense(a.numel(), list(stride))
        return NotImplemented if dense is None else _as_strided(aten.view.default(a, dense), size, stride, offset)
    at = (a.storage_offset() if offset is None else offset) - a.storage_offset()
    own, strides = list(a.shape), list(a.stride())
    if not a.is_contiguous() or at < 0 or a.numel() == 0 or 0 in size:
        return NotImplemented
    starts = []
    for step in strides:
        starts.append(at // step)
        at %= step
    left, dims = list(zip(size, stride, strict=True)), list[tuple[int, int] | None]()
    for n, step in zip(own, strides, strict=True):
        every = left[0][1] // step if left and left[0][1] % step == 0 else 0
        length = (left[0][0] - 1) * every + 1 if every else 0
        fits = 0 < length <= n
        if fits:
            left.pop(0)
        dims.append((length, every) if fits else None)
    if left or at or any(i + (n[0] if n else 1) > s for i, n, s in zip(starts, dims, own, strict=True)):
        return NotImplemented
    made, dim = a, 0
    for start, taken in zip(starts, dims, strict=True):
        if taken is None:
            made = aten.select.int(made, dim, start)
        else:
            length, every = taken
            made, dim = aten.slice.Tensor(made, dim, start, start + length, every), dim + 1
    return made


def _dense(numel: int, strides: list[int]) -> list[int] | None:
    """The shape of a dense tensor of so many elements that has these strides, and perhaps that of 1."""
    every = [*strides, *([1] if strides[-1] != 1 else [])]
    if 0 in every or numel % every[0] or any(a % b for a, b in pairwise(every)):
        return None
    return [numel // every[0], *(a // b for a, b in pairwise(every))]


@rule(aten.slice_backward.default)
def _slice_backward(grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Any:
    start, end, _ = slice(start, end, step).indices(sizes[dim])
    if step != 1 and grad.shape[dim]:
        n, shape = grad.shape[dim], list(grad.shape)
        zeros = full(grad, [*shape[: dim + 1], step - 1, *shape[dim + 1 :]], 0)
        spread = aten.cat.default([aten.unsqueeze.default(grad, dim + 1), zeros], dim + 1)
        flat = aten.view.default(spread, [*shape[:dim], n * step, *shape[dim + 1 :]])
        end = min(start + n * step, sizes[dim])
        grad = aten.slice.Tensor(flat, dim, 0, end - start)
    return _padded(grad, sizes, dim, start, max(start, end))


@rule(aten.select_backward.default)
def _select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim = dim + len(sizes) if dim < 0 else dim
    index = index + sizes[dim] if index < 0 else index
    return _padded(aten.unsqueeze.default(grad, dim), sizes, dim, index, index + 1)


def _padded(grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int) -> Tensor:
    """A gradient of a slice as one of the whole: zeros around it."""
    dim = dim + len(sizes) if dim < 0 else dim
    ends = (start, sizes[dim] - end)
    before, after = (
        full(grad, [n if d == dim else s for d, s in enumerate(sizes)], 0, None) if n > 0 else None for n in ends
    )
    parts = [p for p in (before, grad, after) if p is not None]
    return aten.cat.default(parts, dim) if len(parts) > 1 else grad
