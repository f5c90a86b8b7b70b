"""Eigenvalues and singular values of the recurrent weights."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cells import CELLS
from ..equations.bounds import power_directions
from ._recording import Recording, _layer_of
from .shown import Shown

__all__ = ["Directions", "Spectrum", "directions", "spectrum"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Shown):
    """The eigenvalues and singular values of the recurrent weights W_hh, gate by gate.

    With a projection (`proj_size`), W_hh W_hr stands in the place of W_hh: it is what a gate sees of the unprojected o
    tanh(c).

    layer: the name of the layer. gates: the names of the G gates ("h" for a simple RNN; "r", "z", "n"; "i", "f", "g",
    "o"). eigenvalues: `[G, H]` complex, by descending magnitude. singular: `[G, H]` singular values, descending.
    radius: `[G]` the largest |eigenvalue|. norm: `[G]` the largest singular value. cell: the cell, by its name in
    `bptt.cells.CELLS`; "" for an unknown one.
    """

    layer: str
    gates: tuple[str, ...]
    eigenvalues: npt.NDArray[np.complex128]
    singular: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]
    norm: npt.NDArray[np.float64]
    cell: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Shown):
    """The directions v, W v, ..., W^n v, each scaled to length 1, and the eigenvector that they turn to.

    n: `[n+1]` the powers. vectors: `[n+1, H]`. eigenvalue: the one that is largest in magnitude. eigenvector: its
    eigenvector `[H]`, of length 1. angle: `[n+1]` between the line of the eigenvector and the vectors, in radians, 0 to
    pi/2. Both are None where the vectors approach no line: for a complex pair, which rotates for ever, and where
    another eigenvalue has the same magnitude.
    """

    n: npt.NDArray[np.int64]
    vectors: Floats
    eigenvalue: complex
    eigenvector: Floats | None
    angle: Floats | None


def spectrum(subject: torch.nn.Module | Recording, *, layer: int = 0, name: str | None = None) -> Spectrum:
    """Compute the eigenvalues and singular values of W_hh, gate by gate, in float64.

    subject: a recurrent layer of `bptt.nn` or `torch.nn`, a model with one inside, or a Recording. layer: which layer
    and direction, numbered as torch.nn orders their parameters. name: which recurrent layer of a model with several.

    The radius decides whether powers of W_hh grow (equations/README.md, 8.5), and the norm bounds what one step can do
    (8.3). For a GRU and an LSTM neither of them is that of the Jacobian, which `jacobians` measures.

    Raises TypeError where subject holds no recurrent layer, ValueError for a layer or name that does not exist.

    >>> import torch, bptt
    >>> rnn = bptt.nn.RNN(2, 2)
    >>> rnn.weight_hh_l0.data = torch.tensor([[0.0, -0.5], [0.5, 0.0]])  # a quarter turn, halved
    >>> s = bptt.flow.spectrum(rnn)
    >>> s.eigenvalues[0].round(9).tolist(), s.radius.round(9).tolist()
    ([0.5j, -0.5j], [0.5])
    """
    rnn: Any
    if isinstance(subject, Recording):
        rnn = subject.layer
    elif isinstance(subject, torch.nn.Module):
        rnn = _layer_of(subject, name)[1]
    else:
        raise TypeError(f"subject must be a layer, a model or a Recording: got {type(subject).__name__}")
    D = 2 if rnn.bidirectional else 1
    if not 0 <= index(layer) < rnn.num_layers * D:
        raise ValueError(f"layer must be one of 0..{rnn.num_layers * D - 1}: got {layer}")
    i, d = divmod(index(layer), D)
    suffix = f"_l{i}{'_reverse' if d else ''}"
    W = _array(getattr(rnn, f"weight_hh{suffix}"))
    if rnn.proj_size:
        W = W @ _array(getattr(rnn, f"weight_hr{suffix}"))
    gates = CELLS[rnn.mode].gate_names
    blocks = W.reshape(len(gates), rnn.hidden_size, rnn.hidden_size)
    finite = np.array([[bool(np.isfinite(block).all())] for block in blocks])
    blocks = np.where(finite[..., None], blocks, 0)
    values = np.linalg.eigvals(blocks).astype(np.complex128)
    order = np.argsort(-np.abs(values), axis=1, kind="stable")
    values = np.where(finite, np.take_along_axis(values, order, 1), np.nan)
    singular = np.where(finite, np.linalg.svd(blocks, compute_uv=False), np.nan)
    name = f"layer {i}{' reversed' if d else ''}"
    return Spectrum(name, gates, values, singular, np.abs(values[:, 0]), singular[:, 0], rnn.mode)


def directions(W: torch.Tensor | npt.ArrayLike, v: torch.Tensor | npt.ArrayLike, steps: int) -> Directions:
    """Follow the directions in which powers of a matrix turn a vector: v, W v, ..., W^steps v, each of length 1.

    W: `[H, H]`. v: `[H]`. Magnitude decides, not sign: a negative dominant eigenvalue flips the vector at each step.

    Raises ValueError where W is not square, v does not fit, or a power of W takes v to 0.

    >>> d = directions([[2.0, 0.0], [0.0, -1.0]], [1.0, 1.0], steps=20)
    >>> d.eigenvalue, d.vectors[20].round(5).tolist(), round(float(d.angle[0]), 4)
    ((2+0j), [1.0, 0.0], 0.7854)

    Source: equations/README.md, (8.6).
    """
    A, x = _array(W), _array(v)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or x.shape != A.shape[:1] or not A.size:
        raise ValueError(f"W must be a square matrix and v a vector of its size: got {A.shape} and {x.shape}")
    if index(steps) < 0:
        raise ValueError(f"steps must not be negative: got {steps}")
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors = power_directions(A, x, index(steps))
    if not np.isfinite(vectors).all():
        raise ValueError(f"W^n v must not be 0 or overflow: it does at n = {np.argmin(np.isfinite(vectors).all(1))}")
    values, eigenvectors = np.linalg.eig(A)
    size = np.abs(values)
    top = int(np.argmax(size))
    n, largest = np.arange(len(vectors)), complex(values[top])
    if np.count_nonzero(size > size[top] * (1 - 1e-12)) > 1:
        return Directions(n, vectors, largest, None, None)
    line = np.real(eigenvectors[:, top])
    line = line / np.linalg.norm(line)
    along = vectors @ line
    across = np.linalg.norm(vectors - along[:, None] * line, axis=1)
    return Directions(n, vectors, largest, line, np.arctan2(across, np.abs(along)))


def _array(value: Any) -> Floats:
    return np.asarray(value.detach().double().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
