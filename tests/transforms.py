"""Recurrent layers as functions of x, the initial state and the weights, by a plain loop too, for transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference import CELLS, NETS, as_tuple, build, ours
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear

Function = Callable[[Tensor, list[Tensor], dict[str, Tensor]], tuple[Tensor, ...]]
T, B, I, H = 5, 2, 5, 4

CASES = [(cell, net) for cell in CELLS for net in ("one", "bi_two")]


def loop(layer: Any, x: Tensor, hx: list[Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(y, the final states) of a layer of torch.nn by a plain loop over steps: nothing of ours takes part."""
    D, y = 2 if layer.bidirectional else 1, x
    finals: list[tuple[Tensor, ...]] = []
    for k in range(layer.num_layers * D):
        layer_, d = divmod(k, D)
        name = f"_l{layer_}" + "_reverse" * d
        w = {key: weights.get(key + name) for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}
        if d == 0:
            below, halves = y, []
        state, steps = tuple(h[k] for h in hx), []
        for t in reversed(range(len(below))) if d else range(len(below)):
            state = _step(layer.mode, below[t], state, w)
            steps.append(state[0])
        halves.append(torch.stack(steps[::-1] if d else steps))
        finals.append(state)
        if d == D - 1:
            y = torch.cat(halves, -1)
    return (y, *map(torch.stack, zip(*finals, strict=True)))


def _step(mode: str, x: Tensor, state: tuple[Tensor, ...], w: dict[str, Any]) -> tuple[Tensor, ...]:
    u, v = linear(x, w["weight_ih"], w["bias_ih"]), linear(state[0], w["weight_hh"], w["bias_hh"])
    if mode == "GRU":
        (u_r, u_z, u_n), (v_r, v_z, v_n) = u.chunk(3, -1), v.chunk(3, -1)
        z, n = torch.sigmoid(u_z + v_z), torch.tanh(u_n + torch.sigmoid(u_r + v_r) * v_n)
        return ((1 - z) * n + z * state[0],)
    if mode == "LSTM":
        i, f, g, o = (u + v).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w["weight_hr"] is None else linear(h, w["weight_hr"]), c)
    return ((torch.tanh if mode == "RNN_TANH" else torch.relu)(u + v),)


def made(cell: str, net: str, kernel: str, **settings: Any) -> tuple[Function, Function, tuple[Any, Any, Any]]:
    """(our layer and a plain loop as functions, x, the initial states and the weights)."""
    theirs = build(cell, **NETS[net])
    layer = ours(theirs, kernel=kernel, **settings)
    generator = torch.Generator().manual_seed(4)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or H, H][: 2 if layer.mode == "LSTM" else 1]
    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64)
    hx = [torch.randn(K, B, size, generator=generator, dtype=torch.float64) for size in sizes]
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def own(x: Tensor, hx: list[Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, final = functional_call(layer, weights, (x, hx[0] if len(hx) == 1 else tuple(hx)))
        return (y, *as_tuple(final))

    return own, lambda x, hx, weights: loop(theirs, x, hx, weights), (x, hx, weights)


def like(given: Any, seed: int = 9) -> Any:
    """Random tensors in the form of others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.utils._pytree.tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), given)


def loss(f: Function) -> Callable[..., Tensor]:
    """A number made of all outputs of a function, none of whose derivatives is constant."""
    return lambda *given: sum((i + 1) * out.sin().sum() for i, out in enumerate(f(*given)))  # type: ignore[return-value]
