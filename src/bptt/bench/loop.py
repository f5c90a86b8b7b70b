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
    """A cell's formulas in a loop over steps under autograd: what everybody can write. One direction.

    Arguments and parameters are those of `nn.LAYERS[name]`, every layer with its biases.
    """

    def __init__(
        self, name: str, inputs: int, hidden: int, num_layers: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        kind: Any = nn.LAYERS[name]
        layer = kind(inputs, hidden, num_layers, dtype=dtype)
        self.cell: Cell = layer.cell()
        self.num_layers = num_layers
        for key, parameter in layer.named_parameters():
            self.register_parameter(key, parameter)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """(y `[T, B, H]`, the final state) from x `[T, B, I]` and h `[L, B, H]`, or a pair; None is zero."""
        layers = [Weights(*given) for given in zip(*[iter(self.parameters())] * 4, strict=True)]
        zero = x.new_zeros(self.num_layers, x.shape[1], layers[0].hh.shape[1])
        initial = (hx,) if isinstance(hx, Tensor) else hx or [zero] * self.cell.states
        finals = []
        for w, *given in zip(layers, *initial, strict=True):
            state, y = tuple(given), []
            for step in self.cell.project(x, w):
                state = self.cell.advance(self.cell.gates(step, state[0], w), state, w)
                y.append(state[0])
            x = torch.stack(y)
            finals.append(state)
        final = tuple(map(torch.stack, zip(*finals, strict=True)))
        return x, final if len(final) > 1 else final[0]


def rival_of(cell: str) -> str:
    """Whose layer holds the weights and, in float64, is the truth: "torch.nn", or "loop" for a cell that it lacks."""
    return "loop" if nn.LAYERS[cell].torchs is None else "torch.nn"


def rival(cell: str) -> Callable[..., torch.nn.Module]:
    """The constructor of that layer: (I, H, dtype=None)."""
    return nn.LAYERS[cell].torchs or partial(Loop, cell)
