"""Chapter 7: layers on top of each other, and layers that also read backwards.

layers[l][d] is the cell of layer l in direction d: 0 forward, 1 reverse. A layer's output is the concatenation over
directions; it is the next layer's input. A direction's *own* step s is its s-th: step s forward, step T-1-s in reverse.
Legend: T steps, B lanes, D directions, P numbers in an output, S numbers in a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .chain import Array
from .policies import block_adjoint, edge_factors, parameter_gradients
from .recurrence import Cell, run, weights

Span = tuple[int, int, int, int]
"""(earliest own step its paths use, first loss, last loss, latest own step its paths use)."""


def spans(T: int, window: int, every: int, directions: int = 1) -> list[Span]:
    """Blocks of a whole stack: losses first..last reach the steps last-window+1 .. first+window-1: (7.4).

    In one direction nothing later than the last loss is ever reached.

    >>> spans(5, window=3, every=2, directions=2)
    [(0, 0, 1, 2), (1, 2, 3, 4), (2, 4, 4, 4)]
    """
    out = []
    for first in range(0, T, every):
        last = min(first + every, T) - 1
        latest = min(T - 1, first + window - 1) if directions == 2 else last
        out.append((max(0, last - window + 1), first, last, latest))
    return out


def chunk_edge_factors(T: int, B: int, k: int) -> Array:
    """Factors `[T, B]` that cut every edge into a multiple of k, in own steps: `detach()` every k steps."""
    return np.array([[0.0 if t > 0 and t % k == 0 else 1.0] * B for t in range(T)])


def own(values: Array, direction: int) -> Array:
    """A sequence in a direction's own order of steps; its own inverse: (7.5)."""
    return values if direction == 0 else values[::-1]


def own_resets(resets: Array | None, direction: int) -> Array | None:
    """A reset at t cuts the edge between t-1 and t, which a reverse direction crosses before its step t-1: (7.6)."""
    if resets is None or direction == 0:
        return resets
    out = np.zeros_like(resets)
    for t in range(1, len(resets)):
        out[t - 1] = resets[t]
    return out[::-1]


def forward(
    layers: list[list[Cell]],
    x: Array,
    s_0: list[list[Array]],
    resets: Array | None = None,
    masks: list[Array] | None = None,
) -> tuple[Array, list[list[Array]], list[Array], list[list[list[list[Any]]]]]:
    """(7.1), (7.2), (7.7). x `[T, B, I]`, s_0[l][d] `[B, S]`, masks[l-1] `[T, B, D*P]` for every layer but the first.

    Returns (y `[T, B, D*P]`, final states [l][d] `[B, S]`, each layer's input, tapes [l][d] in own steps).
    """
    finals: list[list[Array]] = []
    inputs: list[Array] = []
    tapes: list[list[list[list[Any]]]] = []
    for number, (layer, initial) in enumerate(zip(layers, s_0, strict=True)):
        x = x if masks is None or number == 0 else masks[number - 1] * x  # (7.7)
        inputs.append(x)
        finals.append([])
        tapes.append([])
        halves = []
        for d, cell in enumerate(layer):
            states, tape = run(cell, own(x, d), initial[d], own_resets(resets, d))
            finals[-1].append(states[-1])
            tapes[-1].append(tape)
            halves.append(own(states[:, :, : cell.output_size], d))
        x = np.concatenate(halves, axis=2)
    return x, finals, inputs, tapes


def sweep(
    layers: list[list[Cell]],
    x: Array,
    s_0: list[list[Array]],
    dy: Array,
    ds_T: list[list[Array]],
    spans: list[Span],
    xi: list[list[Array]] | None = None,
    resets: Array | None = None,
    masks: list[Array] | None = None,
) -> dict[str, Any]:
    """The gradient a policy defines on a stack: a loss reaches `window` steps of the whole network, (7.3) to (7.7).

    A block takes its losses from one direction's half of y, counted in that direction's own steps, and the final states
    of that direction where it holds the last own step; its adjoints stay apart from other blocks' all the way down.

    dy: `[T, B, D*P]`. ds_T[l][d]: `[B, S]`. xi[l][d]: `[T, B]` in own steps.
    Returns "y", "final" [l][d], "x" `[T, B, I]`, "s_0" [l][d], "weights" [l][d] by name, and "lambda" [d] `[T, B, S]`
    of the top layer in time order.
    """
    T, B, _ = x.shape
    y, finals, inputs, tapes = forward(layers, x, s_0, resets, masks)
    dx = np.zeros_like(x)
    ds_0 = [[np.zeros_like(s) for s in layer] for layer in s_0]
    dw = [[{name: np.zeros_like(w) for name, w in weights(cell).items()} for cell in layer] for layer in layers]
    top = [np.zeros((T, B, cell.state_size)) for cell in layers[-1]]
    for source in range(len(layers[0])):
        for span in spans:
            _, first, last, _ = span
            P = layers[-1][source].output_size
            dy_block = np.zeros_like(dy)
            for s in range(first, last + 1):
                t = s if source == 0 else T - 1 - s
                dy_block[t, :, source * P : (source + 1) * P] = dy[t, :, source * P : (source + 1) * P]
            for number in range(len(layers) - 1, -1, -1):
                dx_block = np.zeros_like(inputs[number])
                for d, cell in enumerate(layers[number]):
                    P = cell.output_size
                    e = np.zeros((T, B, cell.state_size))
                    e[:, :, :P] = own(dy_block[:, :, d * P : (d + 1) * P], d)  # (7.3)
                    if d == source and last == T - 1:
                        e[T - 1] += ds_T[number][d]
                    walk = _walk(span, T, same=d == source)
                    factors = edge_factors(T, B, None if xi is None else xi[number][d], own_resets(resets, d))
                    lam, initial = block_adjoint(cell, tapes[number][d], e, walk, factors)
                    part_x, part_w = parameter_gradients(cell, tapes[number][d], lam, own(inputs[number], d))
                    dx_block += own(part_x, d)
                    ds_0[number][d] += initial
                    for name in part_w:
                        dw[number][d][name] += part_w[name]
                    if number == len(layers) - 1:
                        top[d] += own(lam, d)
                dy_block = dx_block if masks is None or number == 0 else masks[number - 1] * dx_block  # (7.7)
            dx += dy_block
    return {"y": y, "final": finals, "x": dx, "s_0": ds_0, "weights": dw, "lambda": top}


def _walk(span: Span, T: int, same: bool) -> tuple[int, int, int]:
    """A span as a walk in the own steps of the losses' direction; or of the other one, which enters at its far end."""
    earliest, _, _, latest = span
    return (earliest, earliest, latest) if same else (T - 1 - latest, T - 1 - latest, T - 1 - earliest)
