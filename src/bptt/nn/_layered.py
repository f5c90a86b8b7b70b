"""Cells on top of one another as one step of `scan`, and their states as one hidden state in torch.nn's form.

Legend: B lanes; K cells, numbered as torch.nn orders layers and directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from ..scan.pytrees import Step
from ._forms import CellCall

__all__ = ["layered_step", "split_hidden", "stack_hidden"]


def layered_step(cells: Sequence[nn.Module], calls: Sequence[CellCall], own: Sequence[bool], keeps: bool) -> Step:
    """The step of a whole net: (states, (input, dropout masks)) -> (states, (output, states)).

    own: whether a cell makes its own first state; its part of the carry is then (whether it is yet to be made, state).
    keeps: whether the states are among what the step puts out.
    """
    cells, forms = tuple(cells), tuple(call.form for call in calls)
    own = tuple(own)

    def step(carry: tuple[Any, ...], x: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, tuple[Any, ...]]]:
        y, *masks = x
        states, entering = [], []
        for i, cell in enumerate(cells):
            if i and masks:
                y = y * masks[i - 1]
            state = carry[i]
            if own[i]:
                first, state = state
                state = None if first else state
            y, state = forms[i].parts(forms[i].call(cell, y, state))
            states.append(state)
            entering.append((False, state) if own[i] else state)
        return tuple(entering), (y, tuple(states) if keeps else ())

    return step


def stack_hidden(states: Sequence[Any], B: int, batched: bool) -> Any:
    """The states of K cells as one pytree of tensors `[K, B, ...]` (`[K, ...]` unbatched); a list of them, each
    `[B, ...]` (`[...]`), where their tensors cannot be stacked.
    """
    flat = [tree_flatten(state) for state in states]
    (first, spec), *others = flat
    shapes = [t.shape if isinstance(t, Tensor) and t.dim() and len(t) == B else None for t in first]
    alike = all(other == spec and [getattr(t, "shape", None) for t in leaves] == shapes for leaves, other in others)
    if isinstance(states[0], list) or None in shapes or not alike:
        return list(states) if batched else [tree_map(lambda t: _alone(t, 0), state) for state in states]
    stacked = [torch.stack(tensors) for tensors in zip(*(leaves for leaves, _ in flat), strict=True)]
    return spec.unflatten(stacked if batched else [_alone(t, 1) for t in stacked])


def _alone(t: Any, dim: int) -> Any:
    """The tensor of the only lane."""
    return t.squeeze(dim) if isinstance(t, Tensor) and t.dim() > dim else t


def split_hidden(hx: Any, K: int, B: int, batched: bool) -> list[Any]:
    """The states of K cells, each `[B, ...]`, from the form that `stack_hidden` gives them.

    Raises TypeError and ValueError for what has another form.
    """
    if isinstance(hx, list):
        if len(hx) != K:
            raise ValueError(f"hx, a list, must hold one state for each of {K} cells: got {len(hx)}")
        return hx if batched else [tree_map_only(Tensor, lambda t: t.unsqueeze(0), state) for state in hx]
    leaves, spec = tree_flatten(hx)
    if not leaves:
        raise TypeError(f"hx must hold tensors, or be None: got {hx!r}")
    for t in leaves:
        expected = f"[{K}, {B}, ...]" if batched else f"[{K}, ...]"
        if not isinstance(t, Tensor):
            raise TypeError(
                f"hx must hold tensors {expected}, or be a list of one state for each of {K} cells: got a "
                f"{type(t).__name__} in it"
            )
        if t.dim() < (2 if batched else 1) or len(t) != K or (batched and t.shape[1] != B):
            raise ValueError(
                f"hx must hold tensors {expected}, or be a list of one state for each of {K} cells: got shape "
                f"{list(t.shape)}"
            )
    tensors = leaves if batched else [t.unsqueeze(1) for t in leaves]
    return [spec.unflatten([t[k] for t in tensors]) for k in range(K)]
