"""A step as one of rows, of which each is all that it is given: for steps without lanes, or whose lanes meet.

The step itself is given no rows: `torch.func.vmap` runs it on all of them at once, and a recorder sees the operations
on rows that this makes. Its gradient is taken outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CELLS", "OneRow", "as_rows", "leaf"]

Tensors = list[Tensor]


def as_rows(tensors: Iterable[Tensor]) -> Tensors:
    """Tensors as one row of each: `[...]` -> `[1, ...]`."""
    return [t.detach()[None].requires_grad_(t.requires_grad) for t in tensors]


@dataclass(frozen=True)
class OneRow:
    """A step on the tensors of carry and x, as one on rows of them."""

    step: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]

    def __call__(self, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        return self.mapped(carry, x, lambda _: None)

    def mapped(self, carry: Tensors, x: Tensors, note: Callable[[Sequence[Tensor]], None]) -> tuple[Tensors, Tensors]:
        """The step on each row. note: is called with the tensors that it is given."""

        def inner(carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
            note((*carry, *x))
            return self.step(carry, x)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # of a trace
            return torch.func.vmap(inner, randomness="different")(carry, x)


def _gates(x: Tensor, h: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    w, u, b, c = (*weights, None, None)[:4]
    assert w is not None
    assert u is not None
    return torch.nn.functional.linear(x, w, b), torch.nn.functional.linear(h, u, c)


def _rnn_tanh(x: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
    a, b = _gates(x, h, weights)
    return torch.tanh(a + b)


def _rnn_relu(x: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
    a, b = _gates(x, h, weights)
    return torch.relu(a + b)


def _gru(x: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
    (r, z, n), (s, u, m) = (g.chunk(3, -1) for g in _gates(x, h, weights))
    n, z = torch.tanh(n + torch.sigmoid(r + s) * m), torch.sigmoid(z + u)
    return (h - n) * z + n


def _lstm(x: Tensor, state: Sequence[Tensor], *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    a, b = _gates(x, state[0], weights)
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


CELLS: dict[str, Callable[..., Any]] = {
    "rnn_tanh_cell": _rnn_tanh, "rnn_relu_cell": _rnn_relu, "gru_cell": _gru, "lstm_cell": _lstm,
}  # fmt: skip
"""The cells of torch, by the names of their functions, as operations that vmap has rules for."""


def leaf(t: Tensor, wanted: bool) -> Tensor:
    """A leaf with the memory of a tensor: `requires_grad_` refuses to make one inside of a transform."""
    return Tensor._make_subclass(Tensor, t.detach(), wanted) if wanted else t
