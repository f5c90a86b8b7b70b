"""Arithmetic, selection and powers in the canonical set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rules import cast, rule, times

__all__ = ["clamp"]

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(a: Tensor, b: Any, alpha: Any = 1) -> Any:
    return (
        NotImplemented
        if alpha == 1
        else aten.add.Tensor(a, aten.mul.Tensor(b, alpha) if isinstance(b, Tensor) else b * alpha)
    )


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(a: Tensor, b: Any, alpha: Any = 1) -> Any:
    return (
        NotImplemented
        if alpha == 1
        else aten.sub.Tensor(a, aten.mul.Tensor(b, alpha) if isinstance(b, Tensor) else b * alpha)
    )


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(a: Tensor, b: Any, alpha: Any = 1) -> Any:
    if isinstance(b, Tensor):
        return aten.sub.Tensor(b, times(a, alpha))
    return NotImplemented if alpha == 1 else aten.rsub.Scalar(times(a, alpha), b)


@rule(aten.pow.Tensor_Scalar)
def _pow(a: Tensor, exponent: Any) -> Any:
    if not a.is_floating_point():
        return NotImplemented
    if exponent == 2:
        return aten.mul.Tensor(a, a)
    if exponent == 1:
        return aten.clone.default(a)
    if exponent == 3:
        return aten.mul.Tensor(aten.mul.Tensor(a, a), a)
    if exponent == 0.5:
        return aten.sqrt.default(a)
    if exponent == -1:
        return aten.reciprocal.default(a)
    return NotImplemented


@rule(aten.frac.default)
def _frac(a: Tensor) -> Tensor:
    return aten.sub.Tensor(a, aten.trunc.default(a))


@rule(aten.square.default)
def _square(a: Tensor) -> Tensor:
    return aten.mul.Tensor(a, a)


@rule(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(a: Tensor, end: Tensor, weight: Any) -> Tensor:
    difference = aten.sub.Tensor(end, a)
    return aten.add.Tensor(a, aten.mul.Tensor(difference, weight))


@rule(aten.addcmul.default)
def _addcmul(a: Tensor, b: Tensor, c: Tensor, *, value: Any = 1) -> Tensor:
    return aten.add.Tensor(a, times(aten.mul.Tensor(b, c), value))


@rule(aten.addcdiv.default)
def _addcdiv(a: Tensor, b: Tensor, c: Tensor, *, value: Any = 1) -> Tensor:
    return aten.add.Tensor(a, times(aten.div.Tensor(b, c), value))


@rule(aten.clamp.default)
def clamp(a: Tensor, least: Any = None, most: Any = None) -> Any:
    """A tensor between two bounds, of which either may be missing."""
    if least is not None and most is not None:
        return aten.clamp_max.default(aten.clamp_min.default(a, least), most)
    return aten.clamp_max.default(a, most) if least is None else aten.clamp_min.default(a, least)


@rule(aten.nan_to_num.default)
def _nan_to_num(a: Tensor, nan: Any = None, positive: Any = None, negative: Any = None) -> Any:
    if not a.is_floating_point():
        return NotImplemented
    ends, infinite = torch.finfo(a.dtype), float("inf")
    made = a
    for mask, value in (
        (aten.ne.Tensor(a, a), 0.0 if nan is None else nan),
        (aten.eq.Scalar(a, infinite), ends.max if positive is None else positive),
        (aten.eq.Scalar(a, -infinite), ends.min if negative is None else negative),
    ):
        made = aten.where.self(mask, aten.full.default([], value, dtype=a.dtype, device=a.device), made)
    return made


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(a: Tensor, mask: Tensor, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = aten.full.default([], value, dtype=a.dtype, device=a.device)
    return aten.where.self(mask, cast(value, a.dtype), a)


@rule(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(mask: Tensor, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return NotImplemented
    like = a if isinstance(a, Tensor) else b
    a, b = (v if isinstance(v, Tensor) else aten.full.default([], v, dtype=like.dtype, device=like.device)
            for v in (a, b))  # fmt: skip
    return aten.where.self(mask, a, b)
