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
from ..steps import restarting
from ._forms import CellCall
from ._sequences import Sequences

__all__ = ["restarted", "split_hidden", "split_restarts", "stack_hidden", "step_and_carry"]


def step_and_carry(
    known: dict[Any, Any],
    most: int,
    cells: Sequence[nn.Module],
    calls: Sequence[CellCall],
    states: Sequence[Any],
    sequences: Sequences,
    keeps: bool,
) -> tuple[Step, tuple[Any, ...]]:
    """The step of some cells of a layer, the same one for every call of a kind, and the carry that it starts from.

    known: the layer's steps, by kind, at most so many. states: of each cell, None where it makes its own first one.
    keeps: whether the states are among what is put out; of unequal lengths they are.
    """
    keeps = keeps or sequences.lengths is not None
    if sequences.lengths is not None and not all(call.has_lanes for call in calls):
        raise ValueError("lengths must be equal for a cell whose state holds more than tensors [B, ...]")
    own = [state is None for state in states]
    carry = tuple(
        (True, call.zeros(sequences.B)) if state is None else call.whole(state, sequences.B)
        for state, call in zip(states, calls, strict=True)
    )
    kind = (*cells, *(call.form for call in calls), *own, keeps)
    if kind not in known:
        if len(known) >= most:
            known.clear()  # of cells that have been replaced
        known[kind] = _layered_step(cells, calls, own, keeps=keeps)
    return known[kind], carry


def _layered_step(cells: Sequence[nn.Module], calls: Sequence[CellCall], own: Sequence[bool], keeps: bool) -> Step:
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
    if len(states) == 1 and batched:  # most have one cell, and a tensor or two as its state
        state = states[0]
        tensors = state if type(state) is tuple else (state,)
        if all(isinstance(t, Tensor) and t.dim() and t.shape[0] == B for t in tensors):
            stacked = [t.unsqueeze(0) for t in tensors]
            return tuple(stacked) if type(state) is tuple else stacked[0]
    flat = [tree_flatten(state) for state in states]
    (first, spec), *others = flat
    shapes = [t.shape if isinstance(t, Tensor) and t.dim() and t.shape[0] == B else None for t in first]
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


def split_restarts(
    reset_state: Any, sequences: Sequences, calls: Sequence[CellCall], states: Sequence[Any]
) -> list[Any]:
    """The states `[T, B, ...]` that K cells restart from at each step, from the form of `split_hidden`, in which every
    tensor may have T before its other dimensions.

    states: the first ones of the cells. Raises ValueError for what has another form.
    """
    if sequences.resets is None:
        raise ValueError("reset_state is what resets restart from: got it without resets")
    if any(state is None for state in states):
        raise ValueError("reset_state needs a first state: pass hx, or give the cell an initial_state(batch_size)")
    firsts = [call.whole(state, sequences.B) for call, state in zip(calls, states, strict=True)]
    T, batched, alone = sequences.padded, sequences.batched, isinstance(reset_state, list)
    if alone and len(reset_state) != len(firsts):
        expected = f"one state for each of {len(firsts)} cells"
        raise ValueError(f"reset_state, a list, must hold {expected}: got {len(reset_state)}")
    given = list(reset_state) if alone else [reset_state]
    found = []
    for state, first in zip(given, firsts, strict=False):
        leaves, spec = tree_flatten(state)
        likes, form = tree_flatten(first)
        if spec != form:
            raise ValueError(f"reset_state must have the form of hx: expected {form}, got {spec}")
        sizes = [() if alone else (len(firsts),)] * len(likes)
        found.append(spec.unflatten([_at_each_step(t, like, K, T, batched)
                                     for t, like, K in zip(leaves, likes, sizes, strict=True)]))  # fmt: skip
    if not alone:
        found = [tree_map(lambda t, k=k: t[:, k] if isinstance(t, Tensor) else t, found[0]) for k in range(len(firsts))]
    return [tree_map_only(Tensor, lambda t: t[: sequences.T], state) for state in found]


def restarted(
    arguments: tuple[Step, Any, tuple[Tensor, ...], Tensor | None],
    restarts: Sequence[Any],
    sequences: Sequences,
    d: int,
) -> tuple[Step, Any, tuple[Any, ...], Tensor | None]:
    """(step, carry, xs, resets) of a scan whose step itself restarts from the states of resets."""
    step, carry, xs, resets = arguments
    states = tree_map(lambda t: sequences.own_restarts(t, d) if isinstance(t, Tensor) else None, tuple(restarts))
    return restarting(step), carry, (xs, resets, states), resets


def _at_each_step(t: Any, like: Any, K: tuple[int, ...], T: int, batched: bool) -> Any:
    """A tensor `[T, K, B, ...]`, of one with or without T, and without B where there are no lanes."""
    if not isinstance(like, Tensor):
        return t
    shape = (*K, *like.shape)
    told = list(shape) if batched else [*K, *like.shape[1:]]
    if not isinstance(t, Tensor) or list(t.shape) not in (told, [T, *told]):
        got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"reset_state must hold tensors {told}, or {[T, *told]}, one for each step: got {got}")
    rows = t if t.dim() > len(told) else t.expand(T, *t.shape)
    return rows.reshape(T, *shape)
