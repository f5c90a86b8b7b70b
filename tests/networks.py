"""Recurrent networks as plain loops over steps, for autograd to differentiate.

Legend: T steps, B lanes, I inputs, H hidden units, L layers, D directions. Time first. A direction's *own* step s is
its t-th step for the forward direction and step T-1-s for the reverse one. Layers and directions are numbered as in
torch.nn: row l*D + d of an initial or final state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def step(mode: str, w: dict[str, Tensor | None], x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The next state `(h,)` or `(h, c)` from an input `[B, I]`, by torch.nn's formulas."""
    h = state[0]
    a, b = linear(x, w["weight_ih"], w["bias_ih"]), linear(h, w["weight_hh"], w["bias_hh"])
    if mode == "RNN_TANH":
        return (torch.tanh(a + b),)
    if mode == "RNN_RELU":
        return (torch.relu(a + b),)
    if mode == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
        r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
        n = torch.tanh(an + r * bn)
        return ((1 - z) * n + z * h,)
    i, f, g, o = (a + b).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w["weight_hr"] is None else linear(h, w["weight_hr"]), c)


def scaled(value: Tensor, factor: Tensor) -> Tensor:
    """`value [B, H]`, its gradient multiplied by `factor [B]`."""
    return value.detach() + factor[:, None] * (value - value.detach())


def weights(layer: nn.RNNBase, parameters: dict[str, Tensor], index: int, direction: int) -> dict[str, Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    suffix = f"_l{index}" + ("_reverse" if direction else "")
    return {name: parameters.get(name + suffix) for name in names}


def network(
    layer: nn.RNNBase,
    parameters: dict[str, Tensor],
    x: Tensor,
    initial: tuple[Tensor, ...],
    factors: Sequence[Tensor],
    resets: Tensor | None = None,
    masks: Sequence[Tensor] = (),
    reset_state: tuple[Tensor, ...] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(y `[T, B, D*H]`, final h and c as `[L*D, B, H]` each, top layer's h `[B, H]` by direction and own step).

    factors: for each layer and direction the factor `[T, B]` of the gradient where the state enters own step s.
    resets: `[T, B]` cuts time edge t-1 -> t in both directions; at t = 0 the forward initial state.
    masks: what multiplies the output of each layer but the last (dropout).
    reset_state: what enters where an edge is cut, like initial, or with T before it: row t at edge t-1 -> t.
    """
    T, L, D = len(x), layer.num_layers, 2 if layer.bidirectional else 1
    finals: list[tuple[Tensor, ...]] = []
    for index in range(L):
        outputs: list[Tensor] = []
        top: list[Tensor] = []
        for direction in range(D):
            row = index * D + direction
            w = weights(layer, parameters, index, direction)
            state = tuple(z[row] for z in initial)
            by_time: dict[int, Tensor] = {}
            for s in range(T):
                t, edge = (s, s) if direction == 0 else (T - 1 - s, T - s)
                state = tuple(scaled(z, factors[row][s]) for z in state)
                if resets is not None and edge < T:
                    restart = tuple((r if r.dim() == 3 else r[edge])[row] for r in reset_state)
                    restart = restart or tuple(torch.zeros_like(z) for z in state)
                    state = tuple(torch.where(resets[edge][:, None], r, z) for r, z in zip(restart, state, strict=True))
                state = step(layer.mode, w, x[t], state)
                by_time[t] = state[0]
                top.append(state[0])
            finals.append(state)
            outputs.append(torch.stack([by_time[t] for t in range(T)]))
        x = torch.cat(outputs, -1)
        if masks and index < L - 1:
            x = x * masks[index]
    return x, [torch.stack(z) for z in zip(*finals, strict=True)], top
