"""Layers with constant step Jacobians, drawn from a seed: linear nets, a copy task, gates set by hand.

Legend: T steps, B lanes, H hidden size, S numbers in a layer's state, N losses (a step and lane that the loss reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptt

from .truth import Truth, forward_lstm, gates_gru

__all__ = ["FAMILIES", "Net", "Planted", "planted"]

Floats = npt.NDArray[np.float64]

FAMILIES = (
    "linear, vanishing",
    "linear, holding",
    "linear, exploding",
    "linear, several rates",
    "linear, growing first",
    "linear, two layers",
    "no recurrence",
    "copy task",
    "GRU, update gate by hand",
    "LSTM, forget gate by hand",
)
"""What `planted` draws from."""

UNLIKE = FAMILIES[3:6] + FAMILIES[8:]
"""Those in which losses may decay each at a rate of its own."""

LENGTHS = ("whole", "whole", "spread", "ones")
"""Of lanes: all as long as the window; anything from 1 step on; several of one step among whole ones."""

LOSSES = ("every step", "every step", "weighted", "mean of each lane", "last step", "final state", "few steps")
"""Where losses stand, and how large they are."""

INPUTS = 3


class Net(torch.nn.Module):
    """A layer called as its users call it: packed or not, batch first or not, with resets or without."""

    def __init__(self, layer: torch.nn.Module, resets: Tensor | None, final: bool) -> None:
        super().__init__()
        self.rnn, self.resets, self.final = layer, resets, final

    def forward(self, x: Any, hx: Any = None) -> Tensor:
        """The final state of the top layer `[B, H]`, or the outputs `[T, B, H]`."""
        options = {} if self.resets is None else {"resets": self.resets}
        y, final = self.rnn(x, hx, **options)
        if self.final:
            return (final if isinstance(final, Tensor) else final[0])[-1]
        if isinstance(y, PackedSequence):
            return pad_packed_sequence(y)[0]
        return y.transpose(0, 1) if self.rnn.batch_first else y


@dataclass(frozen=True, eq=False)
class Planted:
    """A net with its batch and its loss, ready for `bptt.flow.survey`, and the truth about it.

    what: the configuration in words, name by name.
    """

    family: str
    what: dict[str, Any]
    model: Net
    batch: tuple[Any, ...]
    errors: Tensor
    truth: Truth

    def loss(self, y: Tensor) -> Tensor:
        """What makes the local errors those that were planted."""
        return (y * self.errors).sum()

    def gradient(self, policy: str) -> Tensor:
        """Of all parameters, under a policy, as one vector of float64."""
        with bptt.using(self.model, gradient=policy):
            value = self.loss(self.model(*self.batch))
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(value, list(self.model.parameters()))])

    @property
    def finite(self) -> bool:
        """Whether the full gradient is."""
        return bool(self.gradient("full").isfinite().all())

    def off(self, policy: str) -> float:
        """The relative error of the gradient under a policy."""
        full = self.gradient("full")
        off = float((self.gradient(policy) - full).norm())
        return off / float(full.norm()) if off else 0.0


def orthogonal(rng: np.random.Generator, H: int) -> Floats:
    return np.linalg.qr(rng.standard_normal((H, H)))[0]


def planted(seed: int) -> Planted:
    """The configuration of this number: the family in turn, everything else drawn from the number."""
    rng = np.random.default_rng(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    dtype = torch.float32 if rng.random() < 0.5 else torch.float64
    H = int(rng.choice([1, 2, 5, 8, 16, 24]))
    T = int(rng.choice([12, 30, 64, 100, 150, 250, 400]))
    B = int(rng.choice([1, 2, 3, 5, 12]))
    if family in UNLIKE:
        B = min(B, 8)  # more are sampled, and lanes differ there
    lengths = _lengths(rng, T, B)
    placement = str(rng.choice(LOSSES))
    errors = _errors(rng, lengths, T, H, placement)
    packed = bool((lengths < T).any())
    resets = _resets(rng, T, B) if rng.random() < 0.2 and not packed and B <= 8 else None
    batch_first = not packed and resets is None and rng.random() < 0.3
    make = {
        "copy task": _copy,
        "GRU, update gate by hand": _gru,
        "LSTM, forget gate by hand": _lstm,
    }.get(family, _linear)
    quiet = bool(rng.random() < 0.4)
    x = np.zeros((T, B, INPUTS)) if quiet else rng.standard_normal((T, B, INPUTS))
    x = x.astype(np.float32).astype(np.float64)
    layer, hx, about, truth = make(rng, family, H, x, dtype, errors, batch_first)
    if family == "copy task" and resets is not None and about["nonlinearity"] == "relu":
        resets = None  # a state of zeros would turn its units off
    if truth.errors is not errors:  # the copy task has a size and a loss of its own
        errors, H = truth.errors, truth.errors.shape[-1]
    truth.lengths, truth.resets = lengths, resets
    final = placement == "final state"
    given: Any = torch.tensor(x, dtype=dtype)
    if packed:
        given = pack_padded_sequence(given, torch.tensor(lengths), enforce_sorted=False)
    elif batch_first:
        given = given.transpose(0, 1)
    flags = None if resets is None else torch.tensor(resets)
    weights = torch.tensor(errors, dtype=dtype)
    weights = weights[lengths - 1, torch.arange(B)] if final else weights
    what = {
        "seed": seed, "T": T, "B": B, "H": H, "dtype": str(dtype)[6:], "loss": placement, "input": not quiet,
        "lengths": "whole" if not packed else sorted(set(lengths.tolist())), "resets": resets is not None,
        "batch_first": batch_first, **about,
    }  # fmt: skip
    batch = (given,) if hx is None else (given, hx)
    return Planted(family, what, Net(layer, flags, final), batch, weights, truth)


def _lengths(rng: np.random.Generator, T: int, B: int) -> npt.NDArray[np.int64]:
    kind = str(rng.choice(LENGTHS))
    lengths = np.full(B, T)
    if kind == "spread":
        lengths = rng.integers(1, T + 1, B)
        lengths[rng.integers(B)] = T
    elif kind == "ones" and B > 1:
        lengths[rng.permutation(B)[: B // 2]] = 1
    return lengths


def _resets(rng: np.random.Generator, T: int, B: int) -> npt.NDArray[np.bool_]:
    return np.asarray(rng.random((T, B)) < rng.choice([1 / 20, 1 / 100]))


def _errors(rng: np.random.Generator, lengths: npt.NDArray[np.int64], T: int, H: int, placement: str) -> Floats:
    """The local errors `[T, B, H]`: of norm 1 in random directions, but for their weights."""
    B = len(lengths)
    errors = rng.standard_normal((T, B, H))
    errors /= np.linalg.norm(errors, axis=-1, keepdims=True)
    alive = np.arange(T)[:, None] < lengths
    if placement in ("last step", "final state"):
        alive &= np.arange(T)[:, None] == lengths - 1
    elif placement == "few steps":
        alive[np.setdiff1d(np.arange(T), rng.choice(T, min(T, 5), replace=False))] = False
        alive[lengths - 1, np.arange(B)] = True
    elif placement == "mean of each lane":
        errors /= lengths[:, None] * B
    elif placement == "weighted":
        errors *= np.exp(rng.standard_normal((T, B, 1)) * 1.5)
    return np.where(alive[..., None], errors, 0.0).astype(np.float32).astype(np.float64)


def _rate(rng: np.random.Generator, family: str) -> float:
    if family == "linear, holding":
        return float(rng.choice([1.0, 1.0, 0.9999, 0.999]))
    if family == "linear, exploding":
        return float(rng.choice([1.02, 1.05, 1.2, 1.5, 2.5]))
    if family == "no recurrence":
        return 0.0
    return float(rng.choice([0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99]))


def _linear(
    rng: np.random.Generator, family: str, H: int, x: Floats, dtype: torch.dtype, errors: Floats, batch_first: bool
) -> tuple[torch.nn.Module, Any, dict[str, Any], Truth]:
    """h_t = W h_{t-1} + U x_t, by nonlinearity="identity"; without input by tanh as well, whose slope at 0 is 1."""
    layers = 2 if family == "linear, two layers" else 1
    rate = _rate(rng, family)
    matrices, about = [], {"rate": rate}
    for i in range(layers):
        rate = _rate(rng, family) if i else rate
        Q = orthogonal(rng, H)
        if family == "linear, several rates":
            rates = np.sort(rng.choice([0.3, 0.5, 0.8, 0.9, 0.95, 0.98], H))
            about = {"rates": rates.tolist()}
            W = Q @ np.diag(rates) @ Q.T
        elif family == "linear, growing first":
            rate = min(rate, 0.95)
            about = {"rate": rate, "above the diagonal": "1 / sqrt(H)"}
            W = np.diag(np.linspace(rate / 2, rate, H)) + np.triu(rng.standard_normal((H, H)), 1) / H**0.5
        else:
            W = rate * Q
        matrices.append(W)
        about = {**about, "rate of the upper layer": rate} if i else about
    quiet = not x.any()
    nonlinearity = "tanh" if quiet and rng.random() < 0.3 else "identity"
    layer = bptt.nn.RNN(
        x.shape[-1], H, layers, nonlinearity=nonlinearity, bias=False, batch_first=batch_first, dtype=dtype
    )
    between = orthogonal(rng, H)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor(rng.standard_normal((H, x.shape[-1])) / H**0.5))
        for i, W in enumerate(matrices):
            getattr(layer, f"weight_hh_l{i}").copy_(torch.tensor(W))
        if layers > 1:
            layer.weight_ih_l1.copy_(torch.tensor(between))
    about["nonlinearity"] = nonlinearity
    stored = [getattr(layer, f"weight_hh_l{i}").detach().double().numpy() for i in range(layers)]
    downwards = [layer.weight_ih_l1.detach().double().numpy()] if layers > 1 else []
    truth = Truth(errors=errors, dtype=dtype, jacobians=stored, downwards=downwards, bounded=nonlinearity == "tanh")
    plain = family in ("linear, vanishing", "linear, holding", "linear, exploding", "no recurrence")
    if plain:
        truth.rate = rate if dtype == torch.float64 else float(np.float32(rate))
    truth.radius = max(np.abs(np.linalg.eigvals(stored[-1]))) if rate else 0.0
    return layer, None, about, truth


def _copy(
    rng: np.random.Generator, family: str, H: int, x: Floats, dtype: torch.dtype, errors: Floats, batch_first: bool
) -> tuple[torch.nn.Module, Any, dict[str, Any], Truth]:
    """A shift register: the loss at t reads the input of t - distance + 1 in the last unit, and nothing else."""
    distance = int(rng.choice([2, 3, 5, 10, 20, 33]))
    nonlinearity = str(rng.choice(["identity", "relu"]))
    T, B, _ = x.shape
    layer = bptt.nn.RNN(
        x.shape[-1], distance, nonlinearity=nonlinearity, bias=False, batch_first=batch_first, dtype=dtype
    )
    x[:] = rng.uniform(0.5, 1, x.shape).astype(np.float32)  # relu passes it on
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[0] = 1.0
        layer.weight_hh_l0[range(1, distance), range(distance - 1)] = 1.0
    own = np.zeros((T, B, distance))
    own[..., -1] = np.linalg.norm(errors, axis=-1)
    W = layer.weight_hh_l0.detach().double().numpy()
    truth = Truth(errors=own, dtype=dtype, jacobians=[W], rectified=nonlinearity == "relu")
    truth.radius = 0.0
    hx = torch.ones(1, B, distance, dtype=dtype)
    return layer, hx, {"distance": distance, "nonlinearity": nonlinearity}, truth


def _logit(values: Floats) -> Tensor:
    return torch.tensor(np.log(values / (1 - values)))


def _by_hand(rng: np.random.Generator, H: int) -> Floats:
    """A gate's constant value in every unit: one for all, or several."""
    choices = [0.5, 0.8, 0.9, 0.94, 0.98, 0.99]
    return rng.choice(choices, H) if rng.random() < 0.4 else np.full(H, rng.choice(choices))


def _gru(
    rng: np.random.Generator, family: str, H: int, x: Floats, dtype: torch.dtype, errors: Floats, batch_first: bool
) -> tuple[torch.nn.Module, Any, dict[str, Any], Truth]:
    """h_t = z h_{t-1} + (1 - z) tanh(U x_t), z constant: the input and the state reach the candidate alone."""
    z = _by_hand(rng, H)
    layer = bptt.nn.GRU(x.shape[-1], H, batch_first=batch_first, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[2 * H :] = torch.tensor(rng.standard_normal((H, x.shape[-1])))
        layer.bias_ih_l0[H : 2 * H] = _logit(z)
        stored = torch.sigmoid(layer.bias_ih_l0[H : 2 * H].double()).numpy()
    truth = Truth(errors=errors, dtype=dtype, jacobians=[np.diag(stored)])
    truth.rate = float(stored[0]) if np.all(stored == stored[0]) else None
    truth.radius = 0.0
    truth.gates = gates_gru(layer, x)
    return layer, None, {"z": sorted(set(z.tolist()))}, truth


def _lstm(
    rng: np.random.Generator, family: str, H: int, x: Floats, dtype: torch.dtype, errors: Floats, batch_first: bool
) -> tuple[torch.nn.Module, Any, dict[str, Any], Truth]:
    """c_t = f c_{t-1} + i tanh(U x_t), h_t = o tanh(c_t); f, i and o constant, no recurrent weights."""
    f = _by_hand(rng, H)
    layer = bptt.nn.LSTM(x.shape[-1], H, batch_first=batch_first, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[2 * H : 3 * H] = torch.tensor(0.5 * rng.standard_normal((H, x.shape[-1])))
        layer.bias_ih_l0[:H] = -2.0
        layer.bias_ih_l0[H : 2 * H] = _logit(f)
        stored = torch.sigmoid(layer.bias_ih_l0[H : 2 * H].double()).numpy()
    truth = Truth(errors=errors, dtype=dtype, jacobians=[np.diag(stored)], cell=True)
    truth.rate = float(stored[0]) if np.all(stored == stored[0]) else None
    truth.radius = 0.0
    truth.gates, truth.opened = forward_lstm(layer, x)
    return layer, None, {"f": sorted(set(f.tolist()))}, truth
