"""Derivatives of every order under a policy: those of the graph that the policy is, for losses not linear in y."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import Agree, each_cell, policies
from reference import CELLS, NETS, Fixed, as_hx, build, case, explicit, ours
from torch import Tensor

import bptt
from bptt.policies import Policy

Outputs = tuple[Tensor, tuple[Tensor, ...]]


def orders(run: Callable[..., Outputs], inputs: list[Tensor], count: int = 3) -> list[list[Tensor]]:
    """The derivatives in every input, each of a number made from the one before: a chain that leaves no term out."""
    y, final = run(*inputs)
    out = (y.pow(3) + y.square()).sum() + sum(z.pow(3).sum() for z in final)
    found = []
    for order in range(count):
        grads = torch.autograd.grad(out, inputs, create_graph=order < count - 1, materialize_grads=True)
        out = sum(g.square().sum() + (g * torch.linspace(0.5, 1, g.numel()).to(g).view_as(g)).sum() for g in grads)
        found.append(list(grads))
    return found


def inputs_of(layer: Any, T: int, B: int) -> list[Tensor]:
    data = case(layer, T, B)
    return [z.detach().clone().requires_grad_() for z in (data.x, *data.initial, *layer.parameters())]


def as_layer(layer: Any, **kw: Any) -> Callable[..., Outputs]:
    names, states = [name for name, _ in layer.named_parameters()], 2 if layer.mode == "LSTM" else 1

    def run(x: Tensor, *rest: Tensor) -> Outputs:
        hx = rest[:states] if states == 2 else rest[0]
        y, final = torch.func.functional_call(layer, dict(zip(names, rest[states:], strict=True)), (x, hx), kw)
        return y, final if states == 2 else (final,)

    return run


def as_graph(layer: Any, policy: Policy, **kw: Any) -> Callable[..., Outputs]:
    names, states = [name for name, _ in layer.named_parameters()], 2 if layer.mode == "LSTM" else 1

    def run(x: Tensor, *rest: Tensor) -> Outputs:
        return explicit(layer, dict(zip(names, rest[states:], strict=True)), x, rest[:states], policy, **kw)

    return run


THREE = [
    (cell, net, policy)
    for i, cell in enumerate(CELLS)
    for j, net in enumerate(["one", "two", "bi", "bi_two"])
    for k, policy in enumerate(["full", "chunked", "truncated", "truncated_every", "fixed"])
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("cell", "net", "policy"), THREE)
def test_three_orders(cell: str, net: str, policy: str, agree: Agree) -> None:
    """Half of all cells, nets and policies: every two of the three meet."""
    T, B = 4, 2
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    theirs = build(cell, I=2, H=3, **NETS[net])
    inputs = inputs_of(theirs, T, B)
    expected = orders(as_graph(theirs, policies(T, B, rows)[policy]), inputs)
    layer = ours(theirs, gradient=policies(T, B, rows)[policy])
    agree(orders(as_layer(layer), inputs), expected, tolerance=1e-9)


RESETS = torch.tensor([[1, 0], [0, 0], [0, 1], [1, 0], [0, 0]]).bool()


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("policy", ["chunked", "truncated_every", "fixed"])
def test_resets(cell: str, net: str, policy: str, agree: Agree) -> None:
    T, B = 5, 2
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    theirs = build(cell, I=2, H=3, **NETS[net])
    inputs = inputs_of(theirs, T, B)
    expected = orders(as_graph(theirs, policies(T, B, rows)[policy], resets=RESETS), inputs, 2)
    layer = ours(theirs, gradient=policies(T, B, rows)[policy])
    agree(orders(as_layer(layer, resets=RESETS), inputs, 2), expected, tolerance=1e-9)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
@pytest.mark.parametrize("policy", ["full", "chunked", "truncated_every", "fixed"])
@pytest.mark.parametrize(("form", "memory"), [((), "checkpoints:steps=2"), ((5,), "gates")])
def test_resets_to_a_state(cell: str, net: str, policy: str, form: tuple[int, ...], memory: str, agree: Agree) -> None:
    """Derivatives in the state that resets restart from too, one for all or one for each step."""
    T, B = 5, 2
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    theirs = build(cell, I=2, H=3, **NETS[net])
    inputs = inputs_of(theirs, T, B)
    states = len(case(theirs, T, B).initial)
    restart = [torch.randn(*form, *z.shape).to(z).requires_grad_() for z in inputs[1 : 1 + states]]
    layer = ours(theirs, gradient=policies(T, B, rows)[policy], memory=memory)

    def run(*tensors: Tensor) -> Outputs:
        kw = {"resets": RESETS, "reset_state": as_hx(tensors[-states:])}
        return as_layer(layer, **kw)(*tensors[:-states])

    def graph(*tensors: Tensor) -> Outputs:
        kw = {"resets": RESETS, "reset_state": tensors[-states:]}
        return as_graph(theirs, policies(T, B, rows)[policy], **kw)(*tensors[:-states])

    agree(orders(run, [*inputs, *restart], 2), orders(graph, [*inputs, *restart], 2), tolerance=1e-9)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm_proj"])
@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
@pytest.mark.parametrize("policy", ["chunked:2", "truncated:3", "truncated:3/2", "adaptive:0.5,max=3"])
def test_packed_lanes(cell: str, net: str, policy: str, agree: Agree) -> None:
    """Each lane as a sequence of its own length, whatever the memory and the kernel."""
    lengths = (3, 5, 1)
    theirs = build(cell, I=2, H=3, **NETS[net])
    inputs = inputs_of(theirs, 5, 3)
    chosen = bptt.policies.parse(policy)
    chosen = bptt.Truncated(3) if isinstance(chosen, bptt.Adaptive) else chosen

    def packed(x: Tensor, *rest: Tensor) -> Outputs:
        sequences = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, final = as_layer(layer)(sequences, *rest)
        return torch.nn.utils.rnn.pad_packed_sequence(y)[0], final

    def by_lane(x: Tensor, *rest: Tensor) -> Outputs:
        states = 2 if theirs.mode == "LSTM" else 1
        ys, finals = [], []
        for b, n in enumerate(lengths):
            initial = [z[:, b : b + 1] for z in rest[:states]]
            y, final = as_graph(theirs, chosen)(x[:n, b : b + 1], *initial, *rest[states:])
            ys.append(torch.cat([y, y.new_zeros(5 - n, 1, y.shape[2])]))
            finals.append(final)
        return torch.cat(ys, 1), tuple(torch.cat(z, 1) for z in zip(*finals, strict=True))

    expected = orders(by_lane, inputs, 2)
    for memory, kernel in (("states", "auto"), ("checkpoints:steps=2", "eager")):
        layer = ours(theirs, gradient=policy, memory=memory, kernel=kernel)
        agree(orders(packed, inputs, 2), expected, f"{memory} {kernel}", tolerance=1e-9)


def test_chunks_of_a_linear_net_by_hand() -> None:
    """y_2 = w y_1, y_1 = w h_0 with the edge between them cut: L = y_2^2 / 2 has L' = y_2 y_1 and L'' = y_1^2."""
    layer = bptt.nn.RNN(1, 1, nonlinearity="identity", bias=False, gradient="chunked:1", dtype=torch.float64)
    w = layer.weight_hh_l0
    torch.nn.init.constant_(w, 1.3)
    y, _ = layer(torch.zeros(2, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64))
    (first,) = torch.autograd.grad(y[1].square().sum() / 2, w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)
    assert first.item() == pytest.approx(1.3**3)
    assert second.item() == pytest.approx(1.69)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_chunks_are_a_loop_with_detach(k: int, agree: Agree) -> None:
    """torch.nn.LSTM, called chunk by chunk with a detached state."""
    theirs = build("lstm", I=2, H=3, num_layers=2)
    inputs = inputs_of(theirs, 7, 2)
    names = [name for name, _ in theirs.named_parameters()]

    def loop(x: Tensor, *rest: Tensor) -> Outputs:
        state, parameters, ys = rest[:2], dict(zip(names, rest[2:], strict=True)), []
        for i in range(0, len(x), k):
            y, state = torch.func.functional_call(theirs, parameters, (x[i : i + k], state))
            ys.append(y)
            last, state = state, tuple(s.detach() for s in state)
        return torch.cat(ys), last

    agree(orders(as_layer(ours(theirs, gradient=bptt.Chunked(k))), inputs), orders(loop, inputs), tolerance=1e-9)


@pytest.mark.parametrize("policy", ["full", "chunked:2", "truncated:3/2", "randomized:0.5"])
def test_transforms(policy: str, agree: Agree) -> None:
    """torch.func's gradient of a gradient is autograd's."""
    layer = ours(build("gru", I=2, H=3, num_layers=2), gradient=policy)
    x = case(layer, 5, 2).x

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x)[0].pow(3).sum()

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x).square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    agree(torch.func.grad(norm)(x), second)


def test_nothing_passes_a_factor_of_zero() -> None:
    """Not even a NaN: the adjoint behind a cut edge is 0."""
    xi = torch.ones(3, 1, dtype=torch.float64)
    xi[1] = 0
    layer = bptt.nn.RNN(1, 1, nonlinearity="identity", gradient=Fixed(xi), dtype=torch.float64)
    x = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, torch.nan).index_fill(0, torch.tensor([0]), 0), True)
    assert grad[0].item() == 0
