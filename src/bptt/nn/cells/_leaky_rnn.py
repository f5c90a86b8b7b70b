"""The leaky, continuous-time rate network of computational neuroscience."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._cell import NONLINEARITIES, CellModule, one_of, positive

__all__ = ["LeakyRNN"]


class LeakyRNN(CellModule):
    """The leaky rate network, with noise and Dale's law where wanted: `r, u = cell(x, u)`.

        tau du/dt = -u + W_rec r + W_in x + b + sqrt(2 tau noise^2) xi,    r = f(u)     (1, 2)

    in steps of dt by Euler's method, with alpha = dt / tau:

        u_t = (1 - alpha) u_{t-1} + alpha (W_rec r_{t-1} + W_in x_t + b) + sqrt(2 alpha noise^2) N(0, 1)
        r_t = f(u_t)

    W_rec = weight_hh * mask, or |weight_hh| * sign * mask under Dale's law, where the sign belongs to the unit that a
    connection comes from: column j of W_rec is above 0 where unit j excites, below 0 where it inhibits.

    input_size, hidden_size: I and H. bias: whether there is b.
    tau, dt: the time constant of a unit and the length of a step, in one unit (here milliseconds); dt at most tau.
    nonlinearity: f, "relu", "tanh", "sigmoid" or "softplus".
    noise: the standard deviation of a unit's noise, drawn from torch's generator at every step while the module is in
        train mode, as dropout is. `bptt.scan` draws the same numbers again in its backward pass, and so has to re-run
        the step there. Where that is too slow, leave noise at 0 and draw it beforehand, as a second part of xs that a
        step of your own adds to u.
    excitatory: the share of the units that excite, for Dale's law; the first round(excitatory * H) of them. Inhibitory
        weights then start larger, so that both kinds balance. None: weights of any sign.
    mask: bool `[H, H]`, which connections there are, to unit i (row) from unit j (column); None: all.

    Parameters: weight_ih [H, I], weight_hh [H, H], bias [H]. Buffer: mask [H, H] with the signs in it, or None.

    Called with x `[B, I]` or `[I]` and u `[B, H]` or `[H]` (zeros where left out), it returns the rates r_t, and u_t.

    Raises ValueError for numbers and masks that do not fit, and for an input or a state of another shape.

    >>> import torch, bptt
    >>> cell = bptt.nn.cells.LeakyRNN(3, 10, excitatory=0.8)
    >>> r, u = cell(torch.ones(2, 3), cell.initial_state(2))
    >>> r.shape, cell.recurrent_weight().mean(0).sign().tolist()
    (torch.Size([2, 10]), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0])

    Source: Song, Yang and Wang 2016, "Training excitatory-inhibitory recurrent neural networks for cognitive tasks: a
    simple and flexible framework" (doi 10.1371/journal.pcbi.1004792): the rate network with recurrent noise, by Euler's
    method, and its separate excitatory and inhibitory populations.
    """

    states = ("u",)
    options = ("tau", "dt", "nonlinearity", "noise", "excitatory")

    mask: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        tau: float = 100.0,
        dt: float = 20.0,
        nonlinearity: str = "relu",
        noise: float = 0.0,
        excitatory: float | None = None,
        mask: Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.tau, self.dt = positive("tau", tau), positive("dt", dt)
        if dt > tau:
            raise ValueError(f"dt must be at most tau={tau}, or the leak overshoots: got {dt}")
        if not noise >= 0:
            raise ValueError(f"noise must be a standard deviation of 0 or more: got {noise}")
        self.nonlinearity = one_of("nonlinearity", nonlinearity, *NONLINEARITIES)
        self.noise, self.excitatory = noise, excitatory
        self.register_buffer("mask", self._signed(mask))
        self.reset_parameters()

    def _signed(self, mask: Tensor | None) -> Tensor | None:
        """The mask, with a column's sign under Dale's law."""
        H, share = self.hidden_size, self.excitatory
        if mask is not None and mask.shape != (H, H):
            raise ValueError(f"mask must be [hidden_size, hidden_size] = {(H, H)}: got shape {tuple(mask.shape)}")
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"excitatory must be a share from 0 to 1: got {share}")
        there = None if mask is None else mask.bool().to(self.weight_hh)
        if share is None:
            return there
        signs = torch.ones_like(self.weight_hh, requires_grad=False)
        signs[:, round(share * H) :] = -1
        return signs if there is None else signs * there

    def reset_parameters(self) -> None:
        super().reset_parameters()
        exciting = 0 if self.excitatory is None else round(self.excitatory * self.hidden_size)
        if 0 < exciting < self.hidden_size:
            with torch.no_grad():
                self.weight_hh[:, exciting:] *= exciting / (self.hidden_size - exciting)

    def recurrent_weight(self) -> Tensor:
        """W_rec, `[H, H]`."""
        weight = self.weight_hh if self.excitatory is None else self.weight_hh.abs()
        return weight if self.mask is None else weight * self.mask

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (u,) = self._entering(input, hx)
        f, alpha = NONLINEARITIES[self.nonlinearity], self.dt / self.tau
        drive = linear(input, self.weight_ih, self.bias) + linear(f(u), self.recurrent_weight())
        u = (1 - alpha) * u + alpha * drive
        if self.training and self.noise > 0:
            u = u + (2 * alpha) ** 0.5 * self.noise * torch.randn_like(u)
        return f(u), u
