"""Operations outside of the canonical set in simpler ones, by torch's own table of decompositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decomposition_table

__all__ = ["taken_apart"]

aten = torch.ops.aten

_AS_THEY_ARE = {aten.lift_fresh.default, aten.detach.default, aten.alias.default, aten.clone.default, aten.all.default,
                aten.any.default, aten._is_all_true.default, aten._is_any_true.default}  # fmt: skip
"""Operations that a recorder and what simplifies its graph know."""


def taken_apart(func: Any) -> Callable[..., Any] | None:
    """A function that does what an operation does by simpler ones; None where torch has none."""
    if func in _AS_THEY_ARE:
        return None
    if func.namespace == "prims":  # which some decompositions are made of
        return getattr(func, "impl_aten", None)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose
    return decomposition_table.get(func)
