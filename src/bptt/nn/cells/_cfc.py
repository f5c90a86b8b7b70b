"""The closed-form continuous-time network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._cell import CellModule

__all__ = ["CfC"]


class CfC(CellModule):
    """The closed-form continuous-time network (CfC), for samples at any times: `h = cell(x, h, elapsed)`.

        h_t = s g(x_t, h_{t-1}) + (1 - s) k(x_t, h_{t-1}),    s = sigmoid(-f(x_t, h_{t-1}) elapsed)

    The gate s, and so the way from g to k, depends on the time that has passed: an approximate solution of a liquid
    time-constant network's differential equation, without a solver. f is affine, g and k are the tanh of affine
    functions, of [x_t, h_{t-1}] or of a backbone that they share, b = tanh(W_ih x_t + W_hh h_{t-1} + bias).

    input_size, hidden_size: I and H. bias: whether there are biases. backbone: the number of its units N; 0: none.

    Parameters without a backbone: weight_ih [3 H, I], weight_hh [3 H, H], bias [3 H], in the order f, g, k. With one:
    weight_ih [N, I], weight_hh [N, H], bias [N], and weight_heads [3 H, N], bias_heads [3 H].

    Called with x `[B, I]` or `[I]`, h `[B, H]` or `[H]` (zeros where left out) and the time elapsed since the step
    before, a number or one for each row, `[B]` or `[]`, it returns h_t. In a scan over samples at irregular times the
    step is `lambda h, x: (cell(x[0], h, x[1]),) * 2`, with xs = (samples `[T, B, I]`, elapsed `[T, B]`).

    Raises ValueError for a backbone below 0, and for an input, a state or an elapsed time of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.CfC(3, 4, backbone=8)
    >>> cell(torch.zeros(2, 3), cell.initial_state(2), torch.tensor([0.1, 2.0])).shape
    torch.Size([2, 4])

    Source: Hasani, Lechner, Amini, Liebenwein, Ray, Tschaikowski, Teschl and Rus 2022, "Closed-form continuous-time
    neural networks" (doi 10.1038/s42256-022-00556-7; arXiv 2106.13898), the gated form with a backbone, where k is
    called h.
    """

    options = ("backbone",)

    weight_heads: Tensor
    bias_heads: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        backbone: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)
        if backbone < 0:
            raise ValueError(f"backbone must be a number of units, or 0 for none: got {backbone}")
        self.backbone = backbone
        if backbone:
            self._add("weight_ih", backbone, input_size)
            self._add("weight_hh", backbone, hidden_size)
            self._add("bias", backbone, wanted=bias)
            self._add("weight_heads", 3 * hidden_size, backbone)
            self._add("bias_heads", 3 * hidden_size, wanted=bias)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None, elapsed: Tensor | float = 1.0) -> Tensor:
        (h,) = self._entering(input, hx)
        if isinstance(elapsed, Tensor):
            if elapsed.dim() and elapsed.shape != input.shape[:-1]:
                shape, rows = tuple(elapsed.shape), tuple(input.shape[:-1])
                raise ValueError(f"CfC: elapsed must be a number or {rows}, as the rows of input: got shape {shape}")
            elapsed = elapsed.unsqueeze(-1)
        heads = linear(input, self.weight_ih, self.bias) + linear(h, self.weight_hh)
        if self.backbone:
            heads = linear(torch.tanh(heads), self.weight_heads, self.bias_heads)
        f, g, k = heads.chunk(3, -1)
        s = torch.sigmoid(-f * elapsed)
        return s * torch.tanh(g) + (1 - s) * torch.tanh(k)
