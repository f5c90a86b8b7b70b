"""Random cells and data, finite differences, and torch's layers as the other side of each comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bptt.equations import gru, lstm, recurrence, rnn

Array = NDArray[Any]

CELLS = ["tanh", "relu", "sigmoid", "identity", "gru", "lstm", "lstm_proj"]
"""Every recurrence of this folder. A new cell is a new name here and a branch in `build`."""


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def build(name: str, I: int = 2, H: int = 3, seed: int = 0) -> Any:
    rng = generator(seed)
    G = {"gru": 3, "lstm": 4, "lstm_proj": 4}.get(name, 1)
    P = 2 if name == "lstm_proj" else H
    w = [rng.normal(size=shape) * 0.7 for shape in ((G * H, I), (G * H, P), (G * H,), (G * H,))]
    if name == "gru":
        return gru.GRU(*w)
    if name == "lstm":
        return lstm.LSTM(*w)
    if name == "lstm_proj":
        return lstm.LSTM(*w, W_hr=rng.normal(size=(P, H)))
    return rnn.RNN(*w, activation=name)


def data(cell: Any, T: int = 5, B: int = 2, seed: int = 1) -> tuple[Array, Array, Array, Array]:
    """(x, s_0, dy, ds_T), all random."""
    rng = generator(seed)
    inputs = recurrence.weights(cell)["W_ih"].shape[1]
    return (
        rng.normal(size=(T, B, inputs)),
        rng.normal(size=(B, cell.state_size)),
        rng.normal(size=(T, B, cell.output_size)),
        rng.normal(size=(B, cell.state_size)),
    )


def close(actual: Array, expected: Array, relative: float = 1e-10) -> None:
    """Equal but for an error of `relative` times the largest expected entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=relative * max(np.abs(expected).max(), 1e-300))


def central(f: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """The gradient of f by central differences: (f(x + s) - f(x - s)) / 2s, entry by entry."""
    out = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        out[index] = (f(up) - f(down)) / (2 * step)
    return out


def complex_step(f: Callable[[Array], Any], at: Array) -> Array:
    """The gradient of an analytic f, exact to rounding: Im f(x + is) / s."""
    out = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        stepped = at.astype(complex)
        stepped[index] += 1e-100j
        out[index] = f(stepped).imag / 1e-100
    return out


def loss(cell: Any, x: Array, s_0: Array, e: Array, resets: Array | None = None) -> Any:
    """sum_t e_t . s_t: the loss whose local errors are e."""
    return (recurrence.run(cell, x, s_0, resets)[0] * e).sum()


def losses_of(cell: Any, x: Array, s_0: Array, e: Array, resets: Array | None = None) -> dict[str, tuple[Any, Array]]:
    """For x, s_0 and each weight: (the loss as a function of it, its value)."""
    out: dict[str, tuple[Any, Array]] = {
        "x": (lambda z: loss(cell, z, s_0, e, resets), x),
        "s_0": (lambda z: loss(cell, x, z, e, resets), s_0),
    }
    for name, value in recurrence.weights(cell).items():
        out[name] = (lambda z, name=name: loss(replace(cell, **{name: z}), x, s_0, e, resets), value)
    return out


def torch_layer(name: str, cell: Any) -> torch.nn.RNNBase:
    """torch.nn's layer with the cell's weights, float64."""
    w = recurrence.weights(cell)
    I, H = w["W_ih"].shape[1], len(w["W_hr"].T) if "W_hr" in w else cell.output_size
    if name == "gru":
        layer: torch.nn.RNNBase = torch.nn.GRU(I, H, dtype=torch.float64)
    elif name.startswith("lstm"):
        layer = torch.nn.LSTM(I, H, proj_size=cell.output_size if "W_hr" in w else 0, dtype=torch.float64)
    else:
        layer = torch.nn.RNN(I, H, nonlinearity=name, dtype=torch.float64)
    with torch.no_grad():
        for (_, parameter), value in zip(layer.named_parameters(), w_in_torch_order(w), strict=True):
            parameter.copy_(torch.from_numpy(value))
    return layer


def w_in_torch_order(w: dict[str, Array]) -> list[Array]:
    return [w[name] for name in ("W_ih", "W_hh", "b_ih", "b_hh", "W_hr") if name in w]


def torch_gradients(name: str, cell: Any, x: Array, s_0: Array, dy: Array, ds_T: Array) -> dict[str, Array]:
    """Outputs, final state and every gradient by torch.nn and autograd, in the keys of `recurrence.adjoint`."""
    layer = torch_layer(name, cell)
    P = cell.output_size
    parts = [slice(0, P), slice(P, None)] if name.startswith("lstm") else [slice(0, P)]
    x_t = torch.from_numpy(x).requires_grad_()
    initial = [torch.from_numpy(s_0[None, :, part].copy()).requires_grad_() for part in parts]
    y, final = layer(x_t, tuple(initial) if len(initial) == 2 else initial[0])
    final = final if isinstance(final, tuple) else (final,)
    total = (y * torch.from_numpy(dy)).sum()
    for z, part in zip(final, parts, strict=True):
        total = total + (z[0] * torch.from_numpy(ds_T[:, part])).sum()
    grads = torch.autograd.grad(total, [x_t, *initial, *layer.parameters()])
    names = [n for n in ("W_ih", "W_hh", "b_ih", "b_hh", "W_hr") if n in recurrence.weights(cell)]
    numbers = [g.numpy() for g in grads]
    return {
        "y": y.detach().numpy(),
        "final": np.concatenate([z[0].detach().numpy() for z in final], axis=1),
        "x": numbers[0],
        "s_0": np.concatenate([g[0] for g in numbers[1 : 1 + len(parts)]], axis=1),
        **dict(zip(names, numbers[1 + len(parts) :], strict=True)),
    }
