"""Steps of users' own, and the gradient of every policy by its definition: autograd of a loop for each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["STEPS", "Stepped", "by_loop"]

Leaves = list[Tensor]
Step = Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]
H, I = 6, 4
"""Sizes of the state and of x."""


@dataclass(frozen=True)
class Stepped:
    """A step, on lists of tensors, with its arguments. captured: the tensors with a gradient that it captures."""

    step: Step
    carry: Leaves
    xs: Leaves
    captured: Leaves


def _rows(*sizes: int, grad: bool = True) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=grad)


def _made(T: int, B: int, states: int, make: Callable[[], tuple[Step, Sequence[Tensor]]]) -> Stepped:
    step, captured = make()
    return Stepped(step, [_rows(B, H) for _ in range(states)], [_rows(T, B, I)], list(captured))


def _lstm(T: int, B: int) -> Stepped:
    cell = torch.nn.LSTMCell(I, H, dtype=torch.float64)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h, state = cell(x[0], (c[0], c[1]))
        return [h, state], [h]

    return _made(T, B, 2, lambda: (step, list(cell.parameters())))


def _gru(T: int, B: int) -> Stepped:
    cell = torch.nn.GRUCell(I, H, dtype=torch.float64)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = cell(x[0], c[0])
        return [h], [h]

    return _made(T, B, 1, lambda: (step, list(cell.parameters())))


def _layer_norm_with_readout(T: int, B: int) -> Stepped:
    norm, inner, out = (m.double() for m in (torch.nn.LayerNorm(H), torch.nn.Linear(I + H, H), torch.nn.Linear(H, 3)))

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = torch.tanh(norm(inner(torch.cat([x[0], c[0]], 1))))
        return [h], [out(h).log_softmax(-1), h]

    return _made(T, B, 1, lambda: (step, [*norm.parameters(), *inner.parameters(), *out.parameters()]))


def _in_place(T: int, B: int) -> Stepped:
    inner = torch.nn.Linear(I + H, H).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = c[0]
        out = torch.zeros_like(h)
        out[:, :3] = h[:, 3:]
        out[:, 3:] = torch.relu(h[:, :3])
        out += inner.weight[:, :1].t()
        out[:, 2].mul_(0.5)
        return [out], [out.softmax(-1)]

    return _made(T, B, 1, lambda: (step, [inner.weight]))


def _attention(T: int, B: int) -> Stepped:
    states, inner = _rows(B, 7, H), torch.nn.Linear(I + H, H).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = c[0]
        a = torch.softmax((states @ h.unsqueeze(2)).squeeze(2), 1)
        read = (a.unsqueeze(1) @ states).squeeze(1)
        return [torch.tanh(inner(torch.cat([x[0], read], 1)) + h)], [a]

    return _made(T, B, 1, lambda: (step, [states, *inner.parameters()]))


def _leaky_with_counter(T: int, B: int) -> Stepped:
    tau, inner = _rows(H), torch.nn.Linear(I + H, H).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h, n = c
        decay = torch.sigmoid(tau)
        h = decay * h + (1 - decay) * torch.relu(inner(torch.cat([x[0], h], 1)))
        return [h, n + 1], [torch.where(h > 0.3, h, 0.1 * h)]

    made = _made(T, B, 1, lambda: (step, [tau, *inner.parameters()]))
    return Stepped(made.step, [*made.carry, torch.zeros(B, dtype=torch.int64)], made.xs, made.captured)


def _heads(T: int, B: int) -> Stepped:
    inner = torch.nn.Linear(I + H, H).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        q = c[0].view(-1, 2, 3)
        read = torch.softmax(q @ q.transpose(1, 2), -1) @ q
        return [torch.tanh(inner(torch.cat([x[0], read.reshape(-1, H)], 1)))], []

    return _made(T, B, 1, lambda: (step, list(inner.parameters())))


class _Spike(torch.autograd.Function):
    """A step function with the derivative of a fast sigmoid."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad / (1 + 5 * u.abs()) ** 2


def _spikes(T: int, B: int) -> Stepped:
    inner, back = torch.nn.Linear(I, H).double(), _rows(H, H)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        v, s = c
        v = 0.9 * v + inner(x[0]) + s @ back - s.detach()
        s = _Spike.apply(v - 0.2)
        return [v, s], [s]

    return _made(T, B, 2, lambda: (step, [*inner.parameters(), back]))


def _outer_products(T: int, B: int) -> Stepped:
    key, value = torch.nn.Linear(I, 3).double(), torch.nn.Linear(I, 2).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        k, v = torch.nn.functional.normalize(key(x[0]), dim=-1), value(x[0])
        memory = c[0] + (v - torch.einsum("bvk,bk->bv", c[0], k)).unsqueeze(2) * k.unsqueeze(1)
        return [memory], [torch.einsum("bvk,bk->bv", memory, k)]

    return Stepped(step, [_rows(B, 2, 3)], [_rows(T, B, I)], [*key.parameters(), *value.parameters()])


def _convolution(T: int, B: int) -> Stepped:
    inner = torch.nn.Conv1d(3, 2, 3, padding=1).double()

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = torch.tanh(inner(torch.cat([x[0][:, :, None].expand(-1, -1, 5)[:, :1], c[0]], 1)))
        return [h], [h.mean(-1)]

    return Stepped(step, [_rows(B, 2, 5)], [_rows(T, B, I)], list(inner.parameters()))


def _reservoir(T: int, B: int) -> Stepped:
    w, u, out = _rows(H, H, grad=False), _rows(I, H, grad=False), _rows(H, 3)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = torch.tanh(c[0] @ w + x[0] @ u)
        return [h], [h @ out]

    return Stepped(step, [_rows(B, H, grad=False)], [_rows(T, B, I, grad=False)], [out])


STEPS: dict[str, Callable[[int, int], Stepped]] = {
    "lstm": _lstm,
    "gru": _gru,
    "layer norm with a readout": _layer_norm_with_readout,
    "writes in place": _in_place,
    "attention": _attention,
    "leaky with a counter": _leaky_with_counter,
    "heads": _heads,
    "spikes": _spikes,
    "outer products": _outer_products,
    "convolution": _convolution,
    "reservoir": _reservoir,
}
"""Steps of users' own, by name: from (T, B) to a step with its arguments."""


def by_loop(
    made: Stepped,
    blocks: Sequence[tuple[int, int, int]],
    resets: Tensor | None,
    dcarry: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    factors: Tensor | None = None,
) -> tuple[Leaves, Leaves, list[Tensor]]:
    """(the final carry, ys, the gradient of every input) by autograd of one loop for each block.

    blocks: (earliest step reached, first loss, last loss). factors: `[T, B]` on the adjoint from step t to step t-1.
    """
    T = len(made.xs[0])

    def reset(c: Leaves, t: int) -> Leaves:
        return c if resets is None else [s.masked_fill(resets[t].view(-1, *[1] * (s.dim() - 1)), 0) for s in c]

    states, ys = [made.carry], []
    with torch.no_grad():
        for t in range(T):
            c, y = made.step([s.clone() for s in reset(states[-1], t)], [x[t] for x in made.xs])
            states.append(c)
            ys.append(y)
    inputs = [*made.carry, *made.xs, *made.captured]
    wanted = [p for p in inputs if p.requires_grad]
    total = {id(p): torch.zeros_like(p) for p in inputs}
    for earliest, first, last in blocks:
        c, loss = made.carry if earliest == 0 else [s.detach() for s in states[earliest]], torch.zeros(())
        for t in range(earliest, last + 1):
            if factors is not None and (t > earliest or t == 0):
                c = [_edge(s, factors[t]) if s.is_floating_point() else s for s in c]
            c, y = made.step(reset(c, t), [x[t] for x in made.xs])
            if t >= first:
                loss = loss + sum((a * g[t]).sum() for a, g in zip(y, dys, strict=True))
        if last == T - 1:
            loss = loss + sum((a * g).sum() for a, g in zip(c, dcarry, strict=True) if g is not None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            for p, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                if g is not None:
                    total[id(p)] += g
    return states[-1], [torch.stack(y) for y in zip(*ys, strict=True)], [total[id(p)] for p in inputs]


def _edge(s: Tensor, factor: Tensor) -> Tensor:
    f = factor.view(-1, *[1] * (s.dim() - 1))
    return s * f + (s * (1 - f)).detach()
