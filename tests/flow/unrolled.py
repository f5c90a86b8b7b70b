"""A layer of torch's, step by step on torch's cells, every state and every step's weights within autograd's reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = {"RNN_TANH": torch.nn.RNNCell, "RNN_RELU": torch.nn.RNNCell, "GRU": torch.nn.GRUCell, "LSTM": torch.nn.LSTMCell}


@dataclass
class Unrolled:
    """states[layer][t]: (h,) or (h, c) after step t. weights[layer][t]: the recurrent weights that step t used."""

    states: list[list[tuple[Tensor, ...]]]
    weights: list[list[Tensor]]

    @property
    def y(self) -> list[Tensor]:
        return [state[0] for state in self.states[-1]]


def unroll(layer: torch.nn.RNNBase, x: Tensor) -> Unrolled:
    T, B, _ = x.shape
    states: list[list[tuple[Tensor, ...]]] = []
    weights: list[list[Tensor]] = []
    below = list(x)
    for k in range(layer.num_layers):
        p = {n: getattr(layer, f"{n}_l{k}").detach() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        more = {"nonlinearity": layer.mode[4:].lower()} if layer.mode.startswith("RNN") else {}
        cell = CELLS[layer.mode](p["weight_ih"].shape[1], layer.hidden_size, dtype=x.dtype, **more)
        state = (x.new_zeros(B, layer.hidden_size),) * (2 if layer.mode == "LSTM" else 1)
        states.append([])
        weights.append([])
        for t in range(T):
            w = p["weight_hh"].clone().requires_grad_()
            hx = state if len(state) == 2 else state[0]
            out = torch.func.functional_call(cell, {**p, "weight_hh": w}, (below[t], hx))
            # Views, so that a state's gradient is what arrives from later: an LSTM's h_t is made from the same c_t.
            state = tuple(s.view_as(s) for s in (out if isinstance(out, tuple) else (out,)))
            states[-1].append(state)
            weights[-1].append(w)
        below = [s[0] for s in states[-1]]
    return Unrolled(states, weights)
