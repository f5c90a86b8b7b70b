"""Scaled dot-product attention, and its gradient, in the canonical set: products and a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .reductions import sum_dims
from .rules import full, rule, times

__all__: list[str] = []

aten = torch.ops.aten


def _scores(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    """`[..., L, S]`: how well each query fits each key; -inf where a query may not see it."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    made = times(_product(query, _turned(key)), scale)
    if mask is not None:
        made = aten.add.Tensor(made, mask)
    if causal:
        of_query, of_key = (aten.arange.default(n, device=query.device) for n in made.shape[-2:])
        later = aten.gt.Tensor(of_key, aten.unsqueeze.default(of_query, 1))
        made = aten.where.self(later, full(query, [], -math.inf), made)
    return made


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The products of matrices in the last two of four dimensions."""
    rows, heads = a.shape[:2]
    dense = (aten.clone.default(t, memory_format=torch.contiguous_format) for t in (a, b))
    flat = (aten.view.default(t, [rows * heads, *t.shape[2:]]) for t in dense)
    return aten.view.default(aten.bmm.default(*flat), [rows, heads, a.shape[2], b.shape[3]])


def _turned(a: Tensor) -> Tensor:
    return aten.permute.default(a, [0, 1, 3, 2])


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    if dropout:
        return NotImplemented
    scores = _scores(query, key, causal, attn_mask, scale)
    total = aten.logsumexp.default(scores, [3], True)
    share = aten.exp.default(aten.sub.Tensor(scores, total))
    return _product(share, value), aten.squeeze.dims(total, [3])


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """Dao and others 2022 (FlashAttention), appendix B.2, with whole matrices in the place of blocks."""
    if dropout:
        return NotImplemented
    scores = _scores(query, key, causal, attn_mask, scale)
    share = aten.exp.default(aten.sub.Tensor(scores, aten.unsqueeze.default(total, 3)))
    along = sum_dims(aten.mul.Tensor(grad, out), [3], True)
    slope = aten.mul.Tensor(share, aten.sub.Tensor(_product(grad, _turned(value)), along))
    slope = times(slope, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return _product(slope, key), _product(_turned(slope), query), _product(_turned(share), grad)
