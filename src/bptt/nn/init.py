"""Initial weights and biases that let gradients travel far, for the layers of `bptt.nn` and `torch.nn`.

Each function changes every layer and direction of a stack in place, under `torch.no_grad`, and returns the stack.
torch.nn has two biases per gate, b_ih and b_hh, of which only the sum counts: where a bias is set, b_ih takes the value
and b_hh becomes zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Generator, Tensor

from ..cells import CELLS, Cell

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_", "radius_"]

L = TypeVar("L", bound=torch.nn.RNNBase)


@torch.no_grad()
def forget_bias_(layer: L, value: float = 1.0) -> L:
    """Set the bias of an LSTM's forget gate: at 1 it starts at f = sigmoid(1) = 0.73, rather than at 0.5.

    layer: an LSTM. value: b_f, the sum of its two biases; a cell then remembers about 1 / (1 - sigmoid(value)) steps.

    Raises TypeError where layer is no LSTM, ValueError where it has no bias or value is not finite.

    >>> import torch, bptt
    >>> bptt.nn.init.forget_bias_(bptt.nn.LSTM(1, 2)).bias_ih_l0[2:4].tolist()
    [1.0, 1.0]

    Source: Gers, Schmidhuber and Cummins 2000, "Learning to forget", section 3; Jozefowicz, Zaremba and Sutskever 2015,
    "An empirical exploration of recurrent network architectures".
    """
    cell = _cell(layer, "forget_bias_", "an LSTM", lambda cell: cell.keeps is not None and cell.states == 2)
    value = _number("value", value)
    for b_ih, b_hh in _biases(layer):
        _set_bias(layer, b_ih, b_hh, cell.keeps, value)
    return layer


@torch.no_grad()
def chrono_(layer: L, longest: float, *, generator: Generator | None = None) -> L:
    """Draw the biases so that units remember 1 to longest - 1 steps: b_f = log u, u ~ U(1, longest - 1), b_i = -b_f.

    In a GRU of torch, h_t = (1 - z) n + z h_{t-1}: z keeps the state, so b_z = log u, and 1 - z is the input gate.

    layer: an LSTM or a GRU. longest: T_max, the longest dependency expected, in steps, above 2. generator: the
    random generator to draw from.

    Raises TypeError where layer is no LSTM or GRU, ValueError where it has no bias or longest is not a finite number
    above 2.

    >>> import torch, bptt
    >>> gru = bptt.nn.init.chrono_(bptt.nn.GRU(1, 2), longest=100)
    >>> bool((gru.bias_ih_l0[2:4] >= 0).all()), gru.bias_hh_l0[2:4].tolist()
    (True, [0.0, 0.0])

    Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?" (arXiv 1804.11188), section
    "Time warpings and gate initialization".
    """
    cell = _cell(layer, "chrono_", "an LSTM or a GRU", lambda cell: cell.keeps is not None)
    longest = _number("longest", longest)
    if longest <= 2:
        raise ValueError(f"longest must be above 2: got {longest:g}")
    for b_ih, b_hh in _biases(layer):
        b = torch.empty_like(b_ih[: layer.hidden_size]).uniform_(1, longest - 1, generator=generator).log_()
        _set_bias(layer, b_ih, b_hh, cell.keeps, b)
        if cell.admits is not None:
            _set_bias(layer, b_ih, b_hh, cell.admits, -b)
    return layer


@torch.no_grad()
def orthogonal_(layer: L, gain: float = 1.0, *, generator: Generator | None = None) -> L:
    """Make the recurrent weights of every gate a random orthogonal matrix times `gain`.

    All its singular values are `gain`: at 1 a product of any number of them neither shrinks nor grows.

    layer: an RNN, GRU or LSTM. generator: the random generator to draw from.

    Raises TypeError where layer is none of these, ValueError where gain is not finite or a projection makes the
    recurrent weights other than square.

    >>> import torch, bptt
    >>> w = bptt.nn.init.orthogonal_(bptt.nn.GRU(1, 4)).weight_hh_l0[:4]
    >>> torch.allclose(w @ w.T, torch.eye(4), atol=1e-6)
    True

    Source: Saxe, McClelland and Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks" (arXiv 1312.6120), section 3.
    """
    gain = _number("gain", gain)
    for block in _blocks(layer, "orthogonal_"):
        torch.nn.init.orthogonal_(block, gain, generator=generator)
    return layer


@torch.no_grad()
def identity_(layer: L, scale: float = 1.0) -> L:
    """Make the recurrent weights of a simple RNN `scale` times the identity, and its biases zero.

    With nonlinearity="relu" and scale 1 this is the IRNN: without input the state stays as it is, and so does the
    adjoint. A scale below 1 forgets.

    layer: an RNN. Raises TypeError where layer is none, ValueError where scale is not finite.

    >>> import torch, bptt
    >>> bptt.nn.init.identity_(bptt.nn.RNN(1, 2, nonlinearity="relu"), scale=0.5).weight_hh_l0.tolist()
    [[0.5, 0.0], [0.0, 0.5]]

    Source: Le, Jaitly and Hinton 2015, "A simple way to initialize recurrent networks of rectified linear units"
    (arXiv 1504.00941), section 3.
    """
    _cell(layer, "identity_", "a simple RNN, which has no gates", lambda cell: not cell.gated)
    scale = _number("scale", scale)
    for block in _blocks(layer, "identity_"):
        block.zero_().fill_diagonal_(scale)  # torch.nn.init.eye_ fails where another default device is set
    if layer.bias:
        for b_ih, b_hh in _biases(layer):
            b_ih.zero_()
            b_hh.zero_()
    return layer


@torch.no_grad()
def radius_(layer: L, radius: float) -> L:
    """Scale the recurrent weights of every gate to a spectral radius: the largest magnitude of their eigenvalues.

    layer: an RNN, GRU or LSTM. radius: at least 0.

    Raises TypeError where layer is none of these; ValueError where radius is negative or not finite, where the weights
    have radius 0 or are not finite, so that no factor helps, and where a projection makes them other than square.

    >>> import torch, bptt
    >>> w = bptt.nn.init.radius_(bptt.nn.RNN(1, 8), 0.9).weight_hh_l0.detach()
    >>> round(float(torch.linalg.eigvals(w).abs().max()), 5)
    0.9

    Source: Jaeger 2001, "The 'echo state' approach to analysing and training recurrent neural networks", GMD report
    148; Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063), section 2.1, for what the radius decides.
    """
    radius = _number("radius", radius)
    if radius < 0:
        raise ValueError(f"radius must be at least 0: got {radius:g}")
    blocks = list(_blocks(layer, "radius_"))
    now = [float(torch.linalg.eigvals(b.double()).abs().max()) if b.isfinite().all() else math.nan for b in blocks]
    if wrong := [r for r in now if not r > 0]:
        raise ValueError(f"the recurrent weights must have a finite spectral radius above 0: got {wrong[0]:g}")
    for block, r in zip(blocks, now, strict=True):
        block.mul_(radius / r)
    return layer


def _cell(layer: object, name: str, whom: str, suits: Callable[[Cell], bool]) -> Cell:
    """The cell of a layer, if it suits the function `name`. whom: the layers that do, in words."""
    cell = CELLS.get(layer.mode) if isinstance(layer, torch.nn.RNNBase) else None
    if cell is None or not suits(cell):
        raise TypeError(f"{name} is for {whom}: got {type(layer).__name__}")
    return cell


def _suffixes(layer: torch.nn.RNNBase) -> Iterator[str]:
    """The suffix of the parameters' names, for each layer and direction."""
    for k in range(layer.num_layers):
        yield from (f"_l{k}", f"_l{k}_reverse")[: 2 if layer.bidirectional else 1]


def _biases(layer: torch.nn.RNNBase) -> list[tuple[Tensor, Tensor]]:
    """(b_ih, b_hh) of each layer and direction."""
    if not layer.bias:
        raise ValueError(f"layer must have biases: got {layer!r}")
    return [(_parameter(layer, f"bias_ih{s}"), _parameter(layer, f"bias_hh{s}")) for s in _suffixes(layer)]


def _blocks(layer: torch.nn.RNNBase, name: str) -> Iterator[Tensor]:
    """The square recurrent matrix `[H, H]` of each gate, layer and direction, as views."""
    if not isinstance(layer, torch.nn.RNNBase):
        raise TypeError(f"{name} is for an RNN, GRU or LSTM: got {type(layer).__name__}")
    if layer.proj_size:
        raise ValueError(f"{name} needs square recurrent weights: got proj_size={layer.proj_size}")
    for suffix in _suffixes(layer):
        yield from _parameter(layer, f"weight_hh{suffix}").split(layer.hidden_size)


def _parameter(layer: torch.nn.RNNBase, name: str) -> Tensor:
    if name not in layer._parameters:
        raise ValueError(f"{name} is computed from others (weight norm?): initialise the layer before parametrizing it")
    return getattr(layer, name)


def _set_bias(layer: torch.nn.RNNBase, b_ih: Tensor, b_hh: Tensor, gate: str | None, value: Tensor | float) -> None:
    assert gate is not None  # of a cell that suits
    H, i = layer.hidden_size, CELLS[layer.mode].gate_names.index(gate)
    b_ih[i * H : (i + 1) * H] = value
    b_hh[i * H : (i + 1) * H] = 0


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number: got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite: got {value}")
    return float(value)
