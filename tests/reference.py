"""Recurrent networks as plain loops over steps, differentiated by autograd: what the engine is judged by.

Written from the definition of the policies, not from the engine, and for clarity only. One backward pass per block of
losses: the passes differ in nothing but the factor that multiplies the gradient where a state enters a step.

Legend: T steps, B lanes, I inputs, H hidden units, L layers, D directions. Time first. A direction's *own* step s is
its t-th step for the forward direction and step T-1-s for the reverse one. Layers and directions are numbered as in
torch.nn: row l*D + d of an initial or final state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import network
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import bptt
from bptt.policies import Policy, Reach

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
"""A name for each recurrence: torch.nn's class and the arguments that select it. A new cell is a new row."""

NETS: dict[str, dict[str, Any]] = {
    "one": {"num_layers": 1},
    "two": {"num_layers": 2},
    "three": {"num_layers": 3},
    "bi": {"num_layers": 1, "bidirectional": True},
    "bi_two": {"num_layers": 2, "bidirectional": True},
}


class Fixed(Policy):
    """A policy whose factors are given: each call of `draw` returns the next of `xi`, round and round."""

    def __init__(self, *xi: Tensor) -> None:
        self.xi = xi
        self.calls: list[tuple[int, int]] = []

    def reach(self, T: int) -> Reach:
        return Reach(None, None, stops_at_start=False)

    def draw(self, T: int, B: int) -> Tensor:
        self.calls.append((T, B))
        return self.xi[(len(self.calls) - 1) % len(self.xi)]

    def __str__(self) -> str:
        return "fixed"


# Gradients


@dataclass
class Gradients:
    """Outputs and gradients of one call. final, initial: h, or h and c. adjoints: dL/dh_t of the top layer."""

    y: Tensor
    final: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    x: Tensor
    initial: tuple[Tensor, ...]
    adjoints: Tensor | None = None
    reset_state: tuple[Tensor, ...] = ()

    def values(self) -> dict[str, Any]:
        return {
            "y": self.y,
            "final": self.final,
            "parameters": self.parameters,
            "x": self.x,
            "initial": self.initial,
            "reset_state": self.reset_state,
        }


@dataclass
class Pass:
    """One backward pass: own steps first..last of the losses it takes from each direction, and its factors."""

    losses: dict[int, tuple[int, int]]
    factors: list[Tensor]


def passes(policy: Policy, T: int, B: int, L: int, D: int) -> Iterator[Pass]:
    """The backward passes whose sum is the gradient a policy defines."""
    ones = [torch.ones(T, B, dtype=torch.float64) for _ in range(L * D)]
    everything = dict.fromkeys(range(D), (0, T - 1))
    if isinstance(policy, bptt.Truncated):
        for direction in range(D):
            for first in range(0, T, policy.every):
                last = min(first + policy.every, T) - 1
                low, high = max(0, last - policy.window + 1), min(T - 1, first + policy.window - 1)
                factors = [f.clone() for f in ones]
                for row, f in enumerate(factors):
                    same = row % D == direction  # the other direction sees the span from its own end
                    entry = low if same else T - 1 - high
                    if entry > 0:
                        f[entry] = 0
                yield Pass({direction: (first, last)}, factors)
    elif isinstance(policy, bptt.Chunked):
        for f in ones:
            f[policy.k :: policy.k] = 0
        yield Pass(everything, ones)
    elif isinstance(policy, Fixed):
        draws = itertools.cycle(policy.xi)
        if D == 1:
            yield Pass(everything, [next(draws)] * L)
        else:
            yield Pass(everything, [next(draws) for _ in range(L * D)])
    else:
        assert isinstance(policy, bptt.Full), policy
        yield Pass(everything, ones)


def gradients(
    layer: nn.RNNBase,
    x: Tensor,
    initial: tuple[Tensor, ...],
    dy: Tensor,
    dfinal: tuple[Tensor, ...],
    policy: Policy,
    *,
    resets: Tensor | None = None,
    masks: Sequence[Tensor] = (),
    lengths: Sequence[int] | None = None,
    reset_state: tuple[Tensor, ...] = (),
) -> Gradients:
    """The gradient of sum(y*dy) + sum(final*dfinal) under a policy, block by block.

    lengths: lane b is the sequence x[:lengths[b], b], run alone; y and dL/dx are 0 beyond it.
    """
    if lengths is not None:
        return _by_lane(layer, x, initial, dy, dfinal, policy, resets, lengths, reset_state)
    T, B, L, D = len(x), x.shape[1], layer.num_layers, 2 if layer.bidirectional else 1
    H = dy.shape[-1] // D
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x = x.detach().clone().requires_grad_()
    initial = tuple(z.detach().clone().requires_grad_() for z in initial)
    reset_state = tuple(z.detach().clone().requires_grad_() for z in reset_state)
    leaves = [*parameters.values(), x, *initial, *reset_state]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    adjoints = torch.zeros_like(dy)
    for one in passes(policy, T, B, L, D):
        y, final, top = network(layer, parameters, x, initial, one.factors, resets, masks, reset_state)
        loss = y.new_zeros(())
        for direction, (first, last) in one.losses.items():
            own = slice(first, last + 1) if direction == 0 else slice(T - 1 - last, T - first)
            half = slice(direction * H, (direction + 1) * H)
            loss = loss + (y[own, :, half] * dy[own, :, half]).sum()
            if last == T - 1:
                for z, dz in zip(final, dfinal, strict=True):
                    loss = loss + (z[direction::D] * dz[direction::D]).sum()
        grads = torch.autograd.grad(loss, [*leaves, *top], materialize_grads=True)
        total = [a + b for a, b in zip(total, grads, strict=False)]
        for i, g in enumerate(grads[len(leaves) :]):
            direction, s = divmod(i, T)
            adjoints[s if direction == 0 else T - 1 - s, :, direction * H : (direction + 1) * H] += g
    n = len(parameters)
    return Gradients(
        y.detach(),
        tuple(z.detach() for z in final),
        dict(zip(parameters, total, strict=False)),
        total[n],
        tuple(total[n + 1 : n + 1 + len(initial)]),
        adjoints,
        tuple(total[n + 1 + len(initial) :]),
    )


def explicit(
    layer: nn.RNNBase,
    parameters: dict[str, Tensor],
    x: Tensor,
    initial: tuple[Tensor, ...],
    policy: Policy,
    *,
    resets: Tensor | None = None,
    masks: Sequence[Tensor] = (),
    reset_state: tuple[Tensor, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, final states) as the graph a policy is: a network of its own for every backward pass, which owns its losses.

    Autograd of it defines the policy's derivatives of every order.
    """
    T, B, L, D = len(x), x.shape[1], layer.num_layers, 2 if layer.bidirectional else 1
    H = layer.proj_size or layer.hidden_size
    whole: Tensor | None = None
    finals: dict[int, list[Tensor]] = {}
    for one in passes(policy, T, B, L, D):
        y, final, _ = network(layer, parameters, x, initial, one.factors, resets, masks, reset_state)
        mask = torch.zeros_like(y)
        for direction, (first, last) in one.losses.items():
            own = slice(first, last + 1) if direction == 0 else slice(T - 1 - last, T - first)
            mask[own, :, direction * H : (direction + 1) * H] = 1
            if last == T - 1:
                finals.update({row: [z[row] for z in final] for row in range(direction, L * D, D)})
        whole = y * mask if whole is None else whole + y * mask
    assert whole is not None
    return whole, tuple(torch.stack(z) for z in zip(*(finals[row] for row in range(L * D)), strict=True))


def _by_lane(
    layer: nn.RNNBase,
    x: Tensor,
    initial: tuple[Tensor, ...],
    dy: Tensor,
    dfinal: tuple[Tensor, ...],
    policy: Policy,
    resets: Tensor | None,
    lengths: Sequence[int],
    reset_state: tuple[Tensor, ...],
) -> Gradients:
    out = Gradients(
        torch.zeros_like(dy),
        tuple(torch.zeros_like(z) for z in dfinal),
        {name: torch.zeros_like(p) for name, p in layer.named_parameters()},
        torch.zeros_like(x),
        tuple(torch.zeros_like(z) for z in initial),
        reset_state=tuple(torch.zeros_like(z) for z in reset_state),
    )
    for b, n in enumerate(lengths):
        lane = slice(b, b + 1)
        alone = gradients(
            layer,
            x[:n, lane],
            tuple(z[:, lane] for z in initial),
            dy[:n, lane],
            tuple(z[:, lane] for z in dfinal),
            Fixed(*(xi[:n, lane] for xi in policy.xi)) if isinstance(policy, Fixed) else policy,
            resets=None if resets is None else resets[:n, lane],
            reset_state=tuple(z[:, lane] if z.dim() == 3 else z[:n, :, lane] for z in reset_state),
        )
        out.y[:n, lane], out.x[:n, lane] = alone.y, alone.x
        for mine, theirs in zip((*out.final, *out.initial), (*alone.final, *alone.initial), strict=True):
            mine[:, lane] = theirs
        for mine, theirs in zip(out.reset_state, alone.reset_state, strict=True):
            if mine.dim() == 3:
                mine[:, lane] = theirs
            else:
                mine[:n, :, lane] = theirs
        for name, g in alone.parameters.items():
            out.parameters[name] += g
    return out


# Layers under test


def build(cell: str, I: int = 5, H: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64, **kw: Any) -> Any:
    """torch.nn's layer for a row of CELLS."""
    kind, select = CELLS[cell]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return getattr(nn, kind)(I, H, dtype=dtype, **select, **kw)


def ours(theirs: nn.RNNBase, **kw: Any) -> Any:
    """The `bptt.nn` layer with the arguments and the values of a torch.nn layer; kw: gradient, memory, kernel."""
    kind = theirs.mode.split("_")[0]
    select = {"nonlinearity": theirs.nonlinearity} if kind == "RNN" else {}
    if theirs.proj_size:
        select["proj_size"] = theirs.proj_size
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    with torch.random.fork_rng():
        mine = getattr(bptt.nn, kind)(
            **{name: getattr(theirs, name) for name in names}, dtype=next(theirs.parameters()).dtype, **select, **kw
        )
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine.train(theirs.training)


@dataclass
class Case:
    """Random data for a layer: time first."""

    x: Tensor
    initial: tuple[Tensor, ...]
    dy: Tensor
    dfinal: tuple[Tensor, ...]


def case(layer: nn.RNNBase, T: int = 7, B: int = 3, seed: int = 1) -> Case:
    generator = torch.Generator().manual_seed(seed)
    D = 2 if layer.bidirectional else 1
    out = layer.proj_size or layer.hidden_size
    sizes = (out, layer.hidden_size)[: bptt.cells.CELLS[layer.mode].states]
    dtype = next(layer.parameters()).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Case(
        normal(T, B, layer.input_size),
        tuple(normal(layer.num_layers * D, B, size) for size in sizes),
        normal(T, B, D * out),
        tuple(normal(layer.num_layers * D, B, size) for size in sizes),
    )


def as_hx(state: Iterable[Tensor]) -> Any:
    """torch.nn's form of a state: the tensor h, or the pair (h, c)."""
    state = tuple(state)
    return state if len(state) == 2 else state[0]


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def measure(
    layer: Any,
    data: Case,
    *,
    packed: Sequence[int] | None = None,
    enforce_sorted: bool = False,
    hx: bool = True,
    reset_state: tuple[Tensor, ...] = (),
    **kw: Any,
) -> Gradients:
    """Run a layer forward and backward on a case (in the layer's own layout) and collect every gradient.

    packed: lengths; the input then goes in as a PackedSequence, and the output comes back padded by zeros.
    hx: whether the initial state is passed. reset_state: (h,) or (h, c). kw: further arguments of forward.
    """
    x = data.x.detach().clone().requires_grad_()
    initial = tuple(z.detach().clone().requires_grad_() for z in data.initial)
    restart = tuple(z.detach().requires_grad_() for z in reset_state)
    if restart:
        kw["reset_state"] = as_hx(restart)
    parameters = dict(layer.named_parameters())
    seen = x.transpose(0, 1) if layer.batch_first else x
    if packed is not None:
        seen = nn.utils.rnn.pack_padded_sequence(seen, packed, layer.batch_first, enforce_sorted)
    y, final = layer(seen, as_hx(initial) if hx else None, **kw)
    if packed is not None:
        assert isinstance(y, PackedSequence)
        torch.testing.assert_close(tuple(y)[1:], tuple(seen)[1:])
        y, _ = nn.utils.rnn.pad_packed_sequence(y, layer.batch_first, total_length=len(x))
    if layer.batch_first:
        y = y.transpose(0, 1)
    final = as_tuple(final)
    loss = (y * data.dy).sum()
    for z, dz in zip(final, data.dfinal, strict=True):
        loss = loss + (z * dz).sum()
    leaves = [*parameters.values(), x, *(initial if hx else ()), *restart]
    grads = torch.autograd.grad(loss, leaves)
    n, end = len(parameters), len(leaves) - len(restart)
    return Gradients(
        y.detach(),
        tuple(z.detach() for z in final),
        dict(zip(parameters, grads, strict=False)),
        grads[n],
        grads[n + 1 : end],
        reset_state=grads[end:],
    )
