"""A cell as a loop over steps under autograd, and whom bptt's layer is compared with: torch.nn's, or this."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..cells import Cell, Weights

__all__ = ["Loop", "rival", "rival_of"]


class Loop(torch.nn.Module):
    """A cell's formulas in a loop over steps under autograd: what everybody can write. One layer, one direction.

    Arguments and parameters are those of `nn.LAYERS[name]`.
    """

    def __init__(self, name: str, inputs: int, hidden: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kind: Any = nn.LAYERS[name]
        layer = kind(inputs, hidden, dtype=dtype)
        self.cell: Cell = layer.cell()
        for key, parameter in layer.named_parameters():
            self.register_parameter(key, parameter)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """(y `[T, B, H]`, the final state) from x `[T, B, I]` and h `[1, B, H]`, or a pair; None is zero."""
        w = Weights(*self.parameters())
        H = w.hh.shape[1]
        initial = (hx,) if isinstance(hx, Tensor) else hx or [x.new_zeros(1, x.shape[1], H)] * self.cell.states
        state, y = tuple(s[0] for s in initial), []
        for step in self.cell.project(x, w):
            state = self.cell.advance(self.cell.gates(step, state[0], w), state, w)
            y.append(state[0])
        final = tuple(s[None] for s in state)
        return torch.stack(y), final if len(final) > 1 else final[0]


def rival_of(cell: str) -> str:
    """Whose layer holds the weights and, in float64, is the truth: "torch.nn", or "loop" for a cell that it lacks."""
    return "loop" if nn.LAYERS[cell].torchs is None else "torch.nn"


def rival(cell: str) -> Callable[..., torch.nn.Module]:
    """The constructor of that layer: (I, H, dtype=None)."""
    return nn.LAYERS[cell].torchs or partial(Loop, cell)
