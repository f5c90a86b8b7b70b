"""The operations that a trace may hold, by how they treat rows."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["ALONG", "BATCHED", "COMPLEX", "ELEMENTWISE", "FACTORIES", "KNOWN", "SUMS", "VIEWS"]

aten = torch.ops.aten

ELEMENTWISE = {
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        "add sub mul div eq ne lt le gt ge": "Tensor Scalar",
        "neg exp expm1 log log1p log2 tanh sigmoid sqrt rsqrt abs reciprocal relu sign sgn sin cos erf erfc floor ceil "
        "round trunc logical_not bitwise_not tanh_backward sigmoid_backward logical_and logical_or logical_xor maximum "
        "minimum fmax fmin clamp_min clamp_max _to_copy isnan isinf atan asin acos sinh cosh tan asinh acosh atanh "
        "atan2 exp2 lgamma digamma angle hypot logaddexp erfinv complex polar _conj _conj_physical "
        "conj_physical": "default",
        "rsub": "Scalar",
        "where": "self",
        "pow": "Tensor_Scalar Tensor_Tensor Scalar",
        "bitwise_and bitwise_or bitwise_xor fmod remainder": "Tensor Scalar",
        "bucketize": "Tensor",
        "clamp_min clamp_max": "Tensor",
        "div": "Tensor_mode Scalar_mode",
    }.items()
    for name in name.split()
    for overload in overloads.split()
}
"""Operations on each element by itself."""

SUMS = {aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.prod.dim_int, aten.any.dim, aten.any.dims,
        aten.all.dim, aten.all.dims}  # fmt: skip
"""Operations that reduce dimensions, whose second argument names."""

VIEWS = {aten.view.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
         aten.unsqueeze.default, aten.squeeze.dims, aten.cat.default}  # fmt: skip
"""Operations that do not compute."""

ALONG = {
    aten.slice.Tensor: 1, aten.select.int: 1, aten.cumsum.default: 1, aten.cumprod.default: 1, aten.gather.default: 1,
    aten.scatter_add.default: 1, aten.scatter.src: 1, aten.scatter.value: 1, aten.argmax.default: 1,
    aten.argmin.default: 1, aten.max.dim: 1, aten.min.dim: 1, aten.flip.default: 1, aten.topk.default: 2,
    aten.sort.default: 1, aten.sort.stable: 2, aten.logcumsumexp.default: 1,
    aten.roll.default: 2, aten.cummax.default: 1, aten.cummin.default: 1, aten.slice_scatter.default: 2,
    aten._fft_r2c.default: 1, aten._fft_c2r.default: 1, aten._fft_c2c.default: 1, aten.median.dim: 1,
    aten.kthvalue.default: 2,
}  # fmt: skip
"""Operations along dimensions, and which argument names these."""

BATCHED = {aten.bmm.default, aten.linalg_solve_triangular.default, aten.triu.default, aten.tril.default,
            aten.linalg_inv_ex.default, aten.linalg_cholesky_ex.default, aten.cholesky_solve.default,
            aten._linalg_solve_ex.default, aten.linalg_lu_solve.default, aten.linalg_lu_factor_ex.default,
            aten.linalg_matrix_exp.default, aten.linalg_qr.default, aten._linalg_eigh.default, aten._linalg_svd.default,
            aten._linalg_slogdet.default, aten._linalg_det.default, aten.linalg_lu.default}  # fmt: skip
"""Operations on matrices in the last two dimensions."""

FACTORIES = {aten.full.default, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default,
              aten.eye.m}  # fmt: skip

COMPLEX = {aten.view_as_real.default, aten.view_as_complex.default}
"""Pairs of real numbers as complex ones, and back: the last dimension comes or goes."""

_OTHERS = {aten.mm.default, aten.index_select.default, aten.index_add.default, aten.convolution.default,
           aten.convolution_backward.default, aten._linalg_check_errors.default, operator.getitem}  # fmt: skip

KNOWN: set[Any] = ELEMENTWISE | SUMS | VIEWS | set(ALONG) | BATCHED | FACTORIES | COMPLEX | _OTHERS
"""All of them."""
