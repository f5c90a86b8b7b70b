"""Chapter 6, first half: how far gradients reach. The block sweep, and independent ways to the same numbers.

A block is (earliest step its walk visits, its first loss, its last loss), counted from 0, all inclusive.
Legend: T steps, B lanes, S numbers in a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .chain import Array
from .recurrence import Cell, partials, run, weights
from .rnn import ACTIVATIONS, SoftmaxNetwork

Block = tuple[int, int, int]


def blocks(T: int, window: int, every: int) -> list[Block]:
    """Blocks of `every` losses that walk back `window` steps from their own last step: (6.7).

    window = every = T is the full gradient; every = 1 the regular truncation.

    >>> blocks(5, window=3, every=2)
    [(0, 0, 1), (1, 2, 3), (2, 4, 4)]
    """
    out = []
    for first in range(0, T, every):
        last = min(first + every, T) - 1
        out.append((max(0, last - window + 1), first, last))
    return out


def chunks(T: int, k: int) -> list[Block]:
    """Blocks of k losses that walk their own steps only, as `detach()` every k steps does: (6.7).

    A dependency at lag d is seen by the share max(0, 1 - d/k) of the losses: (6.8).

    >>> chunks(5, 2)
    [(0, 0, 1), (2, 2, 3), (4, 4, 4)]
    """
    return [(first, first, min(first + k, T) - 1) for first in range(0, T, k)]


def edge_factors(T: int, B: int, xi: Array | None = None, resets: Array | None = None) -> Array:
    """What multiplies the adjoint on its way from step t to step t-1, xi_t, or 0 at a reset: (6.1), (6.6). `[T, B]`.

    Raises ValueError if xi[0] is not 1: the edge from the initial state is never cut at random.
    """
    factors = np.ones((T, B)) if xi is None else np.array(xi, dtype=float)
    if not np.all(factors[0] == 1):
        raise ValueError(f"xi[0] must be 1, since the edge from the initial state is never cut at random: got {xi}")
    if resets is not None:
        factors[np.asarray(resets, dtype=bool)] = 0
    return factors


def block_adjoint(cell: Cell, tapes: list[list[Any]], e: Array, block: Block, factors: Array) -> tuple[Array, Array]:
    """Stage 3 for one block: (6.1) over its own steps, (6.2) over the earlier ones, (6.5) for the initial state.

    e: `[T, B, S]`. factors: `[T, B]`. Returns (lambda `[T, B, S]`, 0 where the block does not walk; dL/ds_0 `[B, S]`,
    0 unless the walk includes step 0).
    """
    earliest, first, last = block
    _, B, S = e.shape
    lam, ds_0 = np.zeros_like(e), np.zeros((B, S))
    for b in range(B):
        carried = np.zeros(S)
        for t in range(last, earliest - 1, -1):
            lam[t, b] = e[t, b] + carried if t >= first else carried  # (6.1), (6.2)
            _, transported, _ = cell.step_adjoint(tapes[t][b], lam[t, b])
            carried = factors[t, b] * transported
        if earliest == 0:
            ds_0[b] = carried  # (6.5)
    return lam, ds_0


def parameter_gradients(cell: Cell, tapes: list[list[Any]], lam: Array, x: Array) -> tuple[Array, dict[str, Array]]:
    """Stage 4, all steps alike: (6.4). Returns (dL/dx `[T, B, I]`, gradient of each weight by name)."""
    dx, dw = np.zeros_like(x), {name: np.zeros_like(w) for name, w in weights(cell).items()}
    for t in range(len(x)):
        for b in range(x.shape[1]):
            dx[t, b], _, part = cell.step_adjoint(tapes[t][b], lam[t, b])
            for name in dw:
                dw[name] += part[name]
    return dx, dw


def sweep(
    cell: Cell,
    x: Array,
    s_0: Array,
    e: Array,
    blocks: list[Block],
    xi: Array | None = None,
    resets: Array | None = None,
) -> dict[str, Array]:
    """The gradient a policy defines: stages 1, 3 and 4 with the blocks summed, (6.1) to (6.6).

    x: `[T, B, I]`. s_0: `[B, S]`. e: `[T, B, S]`, see `recurrence.local_error`. xi: `[T, B]`, xi[0] = 1.
    resets: bool `[T, B]`; at step 0 it also takes the gradient from s_0.
    Returns "states" `[T, B, S]`, "lambda" `[T, B, S]`, "x" `[T, B, I]`, "s_0" `[B, S]`, and each weight's gradient.
    """
    T, B, _ = x.shape
    states, tapes = run(cell, x, s_0, resets)
    factors = edge_factors(T, B, xi, resets)
    lam, ds_0 = np.zeros_like(e), np.zeros_like(s_0)
    for block in blocks:
        part, initial = block_adjoint(cell, tapes, e, block, factors)
        lam += part  # (6.3)
        ds_0 += initial
    dx, dw = parameter_gradients(cell, tapes, lam, x)
    return {"states": states, "lambda": lam, "x": dx, "s_0": ds_0, **dw}


def two_loops(net: SoftmaxNetwork, x: Array, targets: Array, s_0: Array, bptt_truncate: int) -> dict[str, Array]:
    """Truncated gradients of the softmax network by a loop over losses around a loop back through time: (6.9).

    Each loss visits the bptt_truncate + 1 steps t - bptt_truncate, ..., t: a window of bptt_truncate + 1.
    Source: Britz 2015, "Recurrent Neural Networks Tutorial, Part 3".

    x, targets: indices `[T]`. s_0: `[H]`. Returns "U", "V", "W", "s_0".
    """
    s, y = net.forward(x, s_0)
    phi = ACTIVATIONS[net.activation]
    dU, dV, dW, ds_0 = np.zeros_like(net.U), np.zeros_like(net.V), np.zeros_like(net.W), np.zeros_like(s_0)
    for t in range(len(x)):
        do = y[t].copy()
        do[targets[t]] -= 1
        dV += np.outer(do, s[t])
        lam = net.V.T @ do
        for lag in range(min(bptt_truncate, t) + 1):
            k = t - lag
            da = phi.derivative(s[k]) * lam
            dU[:, x[k]] += da
            dW += np.outer(da, s[k - 1] if k > 0 else s_0)
            lam = net.W.T @ da
            if k == 0:
                ds_0 += lam
    return {"U": dU, "V": dV, "W": dW, "s_0": ds_0}


def forward_mode(
    cell: Any, x: Array, s_0: Array, e: Array, xi: Array | None = None, resets: Array | None = None
) -> dict[str, Array]:
    """The gradient without walking back, z_t = b_t + xi_t J_t z_{t-1} carried along with the state: (6.10), (6.19).

    Real-time recurrent learning (Williams and Zipser 1989); with xi, randomized truncation in its forward form. b_t and
    J_t come from complex steps through `cell.step`, so that nothing is shared with the hand-written adjoints.

    Shapes as in `sweep`. Returns each weight's gradient, and "s_0" `[B, S]`.
    """
    T, B, S = e.shape
    factors = edge_factors(T, B, xi, resets)
    out = {name: np.zeros_like(w) for name, w in weights(cell).items()} | {"s_0": np.zeros_like(s_0)}
    for b in range(B):
        s = s_0[b]
        z: dict[str, Array] = {}
        from_start = np.eye(S)
        for t in range(T):
            if resets is not None and resets[t, b]:
                s = np.zeros_like(s)
            _, J, immediate = partials(cell, x[t, b], s)
            s, _ = cell.step(x[t, b], s)
            from_start = factors[t, b] * J @ from_start
            out["s_0"][b] += e[t, b] @ from_start
            for name, b_t in immediate.items():
                z[name] = b_t if t == 0 else b_t + factors[t, b] * np.tensordot(J, z[name], 1)  # (6.10)
                out[name] += np.tensordot(e[t, b], z[name], 1)
    return out


def graph_derivatives(
    w: float, x: Array, h_0: float, blocks: list[Block], xi: Array | None = None
) -> tuple[float, float]:
    """The first and the second derivative in w of the graph that a policy is, carried along with the state: (6.20).

    One unit, h_t = tanh(w h_{t-1} + x_t) with x `[T]`, and L = sum_t h_t^3 / 3: neither l' nor l'' is constant.
    xi: `[T]`, xi[0] = 1. Each block is a graph of its own: (6.22).
    """
    factors = np.ones(len(x)) if xi is None else xi
    h = np.empty(len(x) + 1)
    h[0] = h_0
    for t in range(len(x)):
        h[t + 1] = np.tanh(w * h[t] + x[t])
    first = second = 0.0
    for earliest, own, last in blocks:
        z = u = 0.0
        for t in range(earliest, last + 1):
            slope = 1 - h[t + 1] ** 2
            bend = -2 * h[t + 1] * slope
            f_w, f_h = slope * h[t], slope * w
            f_ww, f_wh, f_hh = bend * h[t] ** 2, bend * w * h[t] + slope, bend * w**2
            before = factors[t] * z
            u = f_ww + 2 * f_wh * before + f_hh * before**2 + f_h * factors[t] * u  # (6.21)
            z = f_w + f_h * before
            if t >= own:
                first += h[t + 1] ** 2 * z
                second += 2 * h[t + 1] * z**2 + h[t + 1] ** 2 * u  # (6.22)
    return first, second
