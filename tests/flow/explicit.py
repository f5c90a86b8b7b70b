"""Recurrent layers as plain functions of their state, and their Jacobians by torch.func.

Written from torch.nn's formulas, with no tape and no adjoint of the package.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.functional import linear

import bptt

DOUBLE = torch.float64

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "identity": ("RNN", {"nonlinearity": "identity"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}


def layer_of(name: str, inputs: int = 3, hidden: int = 4, **kw: Any) -> Any:
    kind, options = LAYERS[name]
    return getattr(bptt.nn, kind)(inputs, hidden, dtype=DOUBLE, **options, **kw)


def advance(layer: Any, x: Tensor, s: Tensor, suffix: str = "_l0") -> Tensor:
    """The next state of one lane, h and c in one vector `[S]`, from its input `[I]`."""
    w = {name.removesuffix(suffix): p.detach() for name, p in layer.named_parameters() if name.endswith(suffix)}
    P = w["weight_hh"].shape[1]
    h = s[:P]
    a, b = linear(x, w["weight_ih"], w["bias_ih"]), linear(h, w["weight_hh"], w["bias_hh"])
    if layer.mode == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        return (1 - z) * torch.tanh(an + r * bn) + z * h
    if layer.mode == "LSTM":
        i, f, g, o = (a + b).chunk(4)
        c = torch.sigmoid(f) * s[P:] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return torch.cat([linear(h, w["weight_hr"]) if "weight_hr" in w else h, c])
    return _ACTIVATIONS[layer.nonlinearity](a + b)


def jacobians(layer: Any, x: Tensor, s_0: Tensor, suffix: str = "_l0", resets: Tensor | None = None) -> Tensor:
    """J_t `[T, B, S, S]` of one layer and direction, x `[T, B, I]` in its own time, from the states s_0 `[B, S]`."""
    found = []
    for b in range(x.shape[1]):
        s, lane = s_0[b], []
        for t, x_t in enumerate(x[:, b]):
            keep = 0.0 if resets is not None and bool(resets[t, b]) else 1.0

            def step(s: Tensor, x_t: Tensor = x_t, keep: float = keep) -> Tensor:
                return advance(layer, x_t, keep * s, suffix)

            lane.append(jacrev(step)(s))
            s = step(s)
        found.append(torch.stack(lane))
    return torch.stack(found, 1)
