"""The cells that are tested, with their options, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bptt.nn import cells

from . import formulas
from .formulas import Formula

I, H, B, T = 3, 5, 4, 6

MASK = torch.rand(H, H, generator=torch.Generator().manual_seed(5)) < 0.6


@dataclass
class Kind:
    """A cell class with options, its formula, and which of the three ways of calling it has."""

    make: type[cells.LIF] | Any
    formula: Formula
    states: int
    returns: str  # "h", "states" or "y, state"
    options: dict[str, Any] = field(default_factory=dict)
    drive: float = 1.0  # times the weights of the input: for spikes

    def cell(self, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        cell = self.make(I, H, **{**self.options, **options}, dtype=dtype)
        with torch.no_grad():
            cell.weight_ih *= self.drive
            for name, parameter in cell.named_parameters():
                if name.startswith(("gain", "bias")):
                    parameter += 0.3 * torch.randn_like(parameter)
        return cell

    def state(self, *rows: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Any:
        """One that may come about: sLSTM's n is above 0, ALIF's adaptation is not below it."""
        states = [(0.7 * torch.randn(*rows, H, dtype=dtype)).requires_grad_(grad) for _ in range(self.states)]
        with torch.no_grad():
            if self.make is cells.SLSTM:
                states[2].abs_().add_(0.5)
            if self.make is cells.ALIF:
                states[1].abs_().mul_(0.1)
        return states[0] if self.states == 1 else tuple(states)

    def step(self, cell: Any) -> Callable[[Any, Any], tuple[Any, Tensor]]:
        """The cell as a step of a scan."""

        def step(state: Any, x: Any) -> tuple[Any, Tensor]:
            got = cell(x, state)
            if self.returns == "h":
                return got, got
            return (got, got[0]) if self.returns == "states" else (got[1], got[0])

        return step


KINDS = {
    "layer_norm_lstm": Kind(cells.LayerNormLSTM, formulas.layer_norm_lstm, 2, "states"),
    "layer_norm_lstm_eps": Kind(cells.LayerNormLSTM, formulas.layer_norm_lstm, 2, "states", {"eps": 0.1}),
    "leaky_rnn": Kind(cells.LeakyRNN, formulas.leaky_rnn, 1, "y, state"),
    "leaky_rnn_tanh": Kind(cells.LeakyRNN, formulas.leaky_rnn, 1, "y, state", {"nonlinearity": "tanh", "tau": 30.0}),
    "leaky_rnn_dale": Kind(cells.LeakyRNN, formulas.leaky_rnn, 1, "y, state", {"excitatory": 0.6}),
    "leaky_rnn_dale_mask": Kind(
        cells.LeakyRNN, formulas.leaky_rnn, 1, "y, state", {"excitatory": 0.8, "mask": MASK, "nonlinearity": "softplus"}
    ),
    "leaky_rnn_mask": Kind(cells.LeakyRNN, formulas.leaky_rnn, 1, "y, state", {"mask": MASK}),
    "lif": Kind(cells.LIF, formulas.lif, 2, "y, state", drive=4.0),
    "lif_feedforward": Kind(cells.LIF, formulas.lif, 2, "y, state", {"recurrent": False, "threshold": 0.5}, drive=3.0),
    "lif_detached": Kind(cells.LIF, formulas.lif, 2, "y, state", {"detach_reset": True, "slope": 5.0}, drive=4.0),
    "alif": Kind(cells.ALIF, formulas.alif, 2, "y, state", {"threshold": 0.1}, drive=8.0),
    "alif_feedforward": Kind(
        cells.ALIF, formulas.alif, 2, "y, state", {"recurrent": False, "detach_reset": True, "tau_a": 5.0}, drive=8.0
    ),
    "slstm": Kind(cells.SLSTM, formulas.slstm, 4, "states"),
    "slstm_exp": Kind(cells.SLSTM, formulas.slstm, 4, "states", {"forget": "exp"}),
    "mgu": Kind(cells.MGU, formulas.mgu, 1, "h"),
    "cornn": Kind(cells.CoRNN, formulas.cornn, 2, "states"),
    "indrnn": Kind(cells.IndRNN, formulas.indrnn, 1, "h"),
    "indrnn_tanh": Kind(cells.IndRNN, formulas.indrnn, 1, "h", {"nonlinearity": "tanh"}),
    "cfc": Kind(cells.CfC, formulas.cfc, 1, "h"),
    "cfc_backbone": Kind(cells.CfC, formulas.cfc, 1, "h", {"backbone": 7}),
}

SPIKING = [name for name, kind in KINDS.items() if kind.make in (cells.LIF, cells.ALIF)]
