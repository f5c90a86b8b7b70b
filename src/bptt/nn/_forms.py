"""The forms of a cell's call, and the states that it takes and returns.

Legend: B lanes; a state is a pytree of tensors `[B, ...]`, in which Python values are let through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_leaves, tree_map, tree_structure

__all__ = [
    "FORMS",
    "CallForm",
    "CellCall",
    "Form",
    "Start",
    "broadcast",
    "described",
    "equal",
    "first_lane",
    "is_tensor",
    "shown",
    "zeros_like",
]

Form = Literal["auto", "state", "pair", "spread"]
FORMS: tuple[Form, ...] = ("auto", "state", "pair", "spread")
"""The forms of a cell's call, as `Recurrent` takes them."""

Start = Callable[[int], Any]
"""A first state, made for a number of lanes."""


@dataclass(frozen=True)
class CallForm:
    """The form of a cell's call.

    pair: it returns (output, new state), else its new state, whose first tensor is the output. spread: the state is a
    tuple whose parts are arguments of their own, and parts of the result: cell(x, *state) returns (output, *state) or
    state.
    """

    pair: bool
    spread: bool = False

    def call(self, cell: nn.Module, x: Tensor, state: Any) -> Any:
        """The cell's result; state: None for one that the cell makes."""
        return cell(x, *(() if state is None else state)) if self.spread else cell(x, state)

    def has_parts(self, result: Any) -> bool:
        """Whether a result is of the kind that `parts` takes."""
        if self.pair and not self.spread:
            return _is_pair(result)
        return isinstance(result, (tuple, list)) or (isinstance(result, Tensor) and not self.spread)

    def parts(self, result: Any) -> tuple[Any, Any]:
        """(output, new state)."""
        if self.spread:
            return result[0], tuple(result[1:] if self.pair else result)
        if self.pair:
            output, state = result
            return output, state
        return (result if isinstance(result, Tensor) else result[0]), result

    def fits(self, result: Any, state: Any) -> bool:
        """Whether a result may have this form, of a cell that was given this state."""
        if self.pair or self.spread:
            return self.has_parts(result) and _alike(self.parts(result)[1], state)
        return _alike(result, state)

    def __str__(self) -> str:
        if self.spread:
            return f"{'output, ' if self.pair else ''}*state = cell(x, *state)"
        return f"{'output, ' if self.pair else ''}state = cell(x, state)"


@dataclass(frozen=True)
class CellCall:
    """How a cell is called.

    output, state: what it returned for `rows` lanes, which tells shapes and types. start: the state that a sequence
    starts from; None where the cell makes its own when it is given none, and it is not zero.
    """

    form: CallForm
    rows: int
    output: Tensor
    state: Any
    start: Start | None

    @property
    def has_lanes(self) -> bool:
        """Whether the state holds tensors `[B, ...]` and nothing else."""
        return all(isinstance(t, Tensor) and t.dim() and len(t) == self.rows for t in tree_leaves(self.state))

    def zeros(self, B: int) -> Any:
        """A state of B lanes in which all tensors are zero."""
        return zeros_like(self.state, self.rows, B)

    def whole(self, state: Any, B: int) -> Any:
        """A state of B lanes in the form of those that the cell returns: broadcast to their shapes, and in their types
        of floating-point numbers, which autocast may change.
        """
        if _flat(state) and _flat(self.state) and len(state) == len(self.state):  # told without torch's pytrees
            return tuple([_whole(t, like, self.rows, B) for t, like in zip(state, self.state, strict=True)])
        if isinstance(state, Tensor) and isinstance(self.state, Tensor):
            return _whole(state, self.state, self.rows, B)
        leaves, spec = _in_order(state, self.state), tree_structure(self.state)
        if leaves is None:
            return state  # which the scan refuses
        pairs = zip(leaves, tree_leaves(self.state), strict=True)
        return spec.unflatten([_whole(t, like, self.rows, B) if is_tensor(like) else t for t, like in pairs])


def _one(t: Tensor) -> bool:
    """Whether a tensor is known to have one lane: in a graph their number may be a symbol."""
    return isinstance(t.shape[0], int) and t.shape[0] == 1


def broadcast(state: Any, B: int) -> Any:
    """A state whose tensors `[1, ...]` have B equal lanes."""
    return tree_map(lambda t: t.expand(B, *t.shape[1:]) if isinstance(t, Tensor) and t.dim() and _one(t) else t, state)


def first_lane(state: Any, B: int) -> Any:
    """A state of B lanes, each like the first one of another state; zero where that one has none."""

    def rows(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.dim():
            return t
        return t.detach()[:1].expand(B, *t.shape[1:]) if len(t) else t.new_zeros(B, *t.shape[1:])

    return tree_map(rows, state)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _flat(state: Any) -> bool:
    """Whether a state is a tuple of tensors."""
    return type(state) is tuple and all(map(is_tensor, state))


def _is_pair(result: Any) -> bool:
    return isinstance(result, (tuple, list)) and len(result) == 2


def _in_order(state: Any, like: Any) -> list[Any] | None:
    """The leaves of a state, in the order of another one, where dicts may have theirs; None for another structure."""
    spec = tree_structure(like)
    try:
        leaves: list[Any] = spec.flatten_up_to(state)
    except ValueError:
        return None
    return leaves if all(map(tree_is_leaf, leaves)) else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two states have the same structure, with tensors of the same shapes."""
    these, those = _in_order(a, b), tree_leaves(b)
    return bool(these) and all(
        s.shape == t.shape if isinstance(s, Tensor) and isinstance(t, Tensor) else type(s) is type(t)
        for s, t in zip(these or (), those, strict=True)
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two results have the same values, as tensors of the same shapes."""
    if a is None or not _alike(a, b):
        return False
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(bool(((s == t) | ((s != s) & (t != t))).all()) if isinstance(s, Tensor) else s == t for s, t in pairs)


def _whole(t: Any, like: Tensor, rows: int, B: int) -> Any:
    """A tensor broadcast to the shape of another one, of B lanes instead of `rows`, and in its type."""
    if not isinstance(t, Tensor):
        return t
    shape = (B, *like.shape[1:]) if like.dim() and len(like) == rows else tuple(like.shape)
    if t.shape == shape and t.dtype == like.dtype:
        return t
    fits = t.dim() <= len(shape) and all(n in (1, m) for n, m in zip(t.shape[::-1], shape[::-1], strict=False))
    t = t.expand(shape) if fits else t
    return t.to(like.dtype) if t.is_floating_point() and like.is_floating_point() else t


def zeros_like(state: Any, rows: int, B: int) -> Any:
    """The zero state of B lanes like one of `rows` lanes."""

    def zeros(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.new_zeros(B, *t.shape[1:]) if t.dim() and len(t) == rows else torch.zeros_like(t)

    return tree_map(zeros, state)


def shown(state: Any) -> str:
    """A state in an error: its structure, with shapes for tensors."""
    if isinstance(state, Tensor):
        return f"{str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
    if isinstance(state, (tuple, list)):
        opening = type(state).__name__ if hasattr(state, "_fields") else ""
        return f"{opening}({', '.join(map(shown, state))})"
    if isinstance(state, dict):
        return "{" + ", ".join(f"{key!r}: {shown(value)}" for key, value in state.items()) + "}"
    return "None" if state is None else type(state).__name__


def described(states: Sequence[Any] | None) -> Any:
    """What of given states a cell's call may depend on."""
    if states is None:
        return None
    leaves, spec = tree_flatten(list(states))
    return spec, [(t.shape[1:], t.dtype) if isinstance(t, Tensor) else type(t) for t in leaves]
