"""The state carried in the lanes: None for zero, a tensor `[layers, B, H]`, a pair of them for an LSTM.

Of any cell it is what `bptt.nn.Recurrent` gives: a pytree of tensors `[layers, B, ...]`, or, where the layers' states
are not alike, a list with one of tensors `[B, ...]` for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

if TYPE_CHECKING:
    from .processes import Processes

__all__ = ["State", "detach", "finite", "gathered", "lanes_of", "packed", "to", "unpacked"]

State: TypeAlias = Any


def detach(state: State) -> State:
    """The same state with its history dropped: the next window's gradient stops here."""
    return tree_map_only(Tensor, Tensor.detach, state)


def to(state: State, device: str) -> State:
    """The same state on a device."""
    return tree_map_only(Tensor, lambda t: t.to(device), state)


def finite(state: State) -> bool:
    """Whether all of a state is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tree_leaves(state) if isinstance(t, Tensor))


def lanes_of(state: State, processes: Processes) -> State:
    """The lanes of this process, of the state of all."""
    if state is None or processes.world == 1:
        return state
    dim = _lanes(state)
    first = next(t for t in tree_leaves(state) if isinstance(t, Tensor))
    own = processes.lanes(first.shape[dim])
    return tree_map_only(Tensor, lambda t: t.narrow(dim, own.start, own.stop - own.start).clone(), state)


def gathered(state: State, processes: Processes) -> State:
    """The state of all processes' lanes, on the CPU if there are several processes. None is to be None on all."""
    if state is None or processes.world == 1:
        return state
    leaves, form = tree_flatten(to(state, "cpu"))
    parts = processes.gather(leaves)
    dim = _lanes(state)
    joined = [torch.cat(own, dim) if isinstance(own[0], Tensor) else own[0] for own in zip(*parts, strict=True)]
    return tree_unflatten(joined, form)


def packed(state: State) -> State:
    """A state as checkpoints hold it, from which no class is read: of plain tuples, lists and dicts it is as it is, of
    any other its leaves alone.
    """
    return state if _plain(state) else {"leaves": tree_leaves(state)}


def unpacked(state: State, like: Callable[[], State]) -> State:
    """The inverse of `packed`. like: any state of the same network."""
    if isinstance(state, dict) and list(state) == ["leaves"] and not _plain(any_state := like()):
        return tree_unflatten(state["leaves"], tree_flatten(any_state)[1])
    return state


def _lanes(state: State) -> int:
    """The dimension of the lanes."""
    return 0 if isinstance(state, list) else 1


def _plain(state: State) -> bool:
    if type(state) in (tuple, list, dict):
        return all(map(_plain, state.values() if isinstance(state, dict) else state))
    return state is None or isinstance(state, Tensor | int | float | str)
