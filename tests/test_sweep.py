"""The engine computes exactly the gradient a policy defines."""

import itertools
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, Fixed, Gradients, as_hx, as_tuple, build, case, gradients, measure, ours
from sweeps import LENGTHS, RESETS, STEPS, Agree, T, each_cell, each_net, judge, pairs, some_policies
from torch import Tensor, nn

from bptt import Chunked, Full, Randomized, Truncated
from bptt.kernels import sums

# The reference itself, against torch.nn run on slices of the sequence


def split_states(layer: nn.RNNBase, x: Tensor, initial: tuple[Tensor, ...], low: int, high: int) -> tuple[Tensor, ...]:
    """The states in which every layer and direction enters the steps low..high, by torch.nn layer by layer."""
    D = 2 if layer.bidirectional else 1
    out = [z.clone() for z in initial]
    for index in range(layer.num_layers):
        select = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
        if layer.proj_size:
            select["proj_size"] = layer.proj_size
        alone = type(layer)(x.shape[-1], layer.hidden_size, bidirectional=layer.bidirectional, dtype=x.dtype, **select)
        alone.load_state_dict(
            {n.replace(f"_l{index}", "_l0"): p for n, p in layer.state_dict().items() if f"_l{index}" in n}
        )
        rows = slice(index * D, (index + 1) * D)
        enter = as_hx(z[rows].contiguous() for z in initial)
        if low > 0:
            for mine, z in zip(out, as_tuple(alone(x[:low], enter)[1]), strict=True):
                mine[index * D] = z[0]
        if high < len(x) - 1 and D == 2:
            for mine, z in zip(out, as_tuple(alone(x[high + 1 :], enter)[1]), strict=True):
                mine[index * D + 1] = z[1]
        x = alone(x, enter)[0]
    return tuple(out)


def by_slices(layer: nn.RNNBase, data: Case, policy: Truncated) -> list[Any]:
    """Truncated gradients from torch.nn alone: each block is a run over the span its losses may reach."""
    T, D = len(data.x), 2 if layer.bidirectional else 1
    out = data.dy.shape[-1] // D
    x = data.x.clone().requires_grad_()
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    leaves = [*layer.parameters(), x, *initial]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for direction, first in itertools.product(range(D), range(0, T, policy.every)):
        last = min(first + policy.every, T) - 1
        if direction == 1:
            first, last = T - 1 - last, T - 1 - first
        low, high = max(0, last - policy.window + 1), min(T - 1, first + policy.window - 1)
        with torch.no_grad():
            entering = split_states(layer, data.x, data.initial, low, high)
        enter = []
        for given, leaf in zip(entering, initial, strict=True):
            live = torch.full((len(leaf), 1, 1), low == 0)
            if D == 2:
                live[1::D] = high == T - 1
            enter.append(torch.where(live, leaf, given))
        y, final = layer(x[low : high + 1], as_hx(enter))
        half = slice(direction * out, (direction + 1) * out)
        loss = (y[first - low : last - low + 1, :, half] * data.dy[first : last + 1, :, half]).sum()
        if (last == T - 1 and direction == 0) or (first == 0 and direction == 1):
            for z, dz in zip(as_tuple(final), data.dfinal, strict=True):
                loss = loss + (z[direction::D] * dz[direction::D]).sum()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        total = [a + b for a, b in zip(total, grads, strict=True)]
    return total


def flat(result: Gradients) -> list[Tensor]:
    return [*result.parameters.values(), result.x, *result.initial]


@each_cell
@each_net
@pytest.mark.parametrize(("window", "every"), [(3, 1), (4, 3)])
def test_reference_is_torch_on_slices(cell: str, net: str, window: int, every: int, agree: Agree) -> None:
    layer = build(cell, **NETS[net])
    data = case(layer, T=T, B=2)
    policy = Truncated(window, every=every)
    actual = gradients(layer, data.x, data.initial, data.dy, data.dfinal, policy)
    agree(flat(actual), by_slices(layer, data, policy))


def by_detaching(layer: nn.RNNBase, data: Case, k: int) -> list[Tensor]:
    """The training loop everyone writes: `detach()` every k steps."""
    x = data.x.clone().requires_grad_()
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    state, loss = initial, torch.zeros((), dtype=torch.float64)
    for first in range(0, len(x), k):
        y, hx = layer(x[first : first + k], as_hx(state))
        loss = loss + (y * data.dy[first : first + k]).sum()
        final = as_tuple(hx)
        state = tuple(z.detach() for z in final)
    for z, dz in zip(final, data.dfinal, strict=True):
        loss = loss + (z * dz).sum()
    return list(torch.autograd.grad(loss, [*layer.parameters(), x, *initial], materialize_grads=True))


@each_cell
@pytest.mark.parametrize("net", ["one", "two", "three"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_chunked_is_detaching(cell: str, net: str, k: int, agree: Agree) -> None:
    """Both the reference and the engine."""
    layer = build(cell, **NETS[net])
    data = case(layer, T=T)
    expected = by_detaching(layer, data, k)
    agree(flat(gradients(layer, data.x, data.initial, data.dy, data.dfinal, Chunked(k))), expected)
    agree(flat(measure(ours(layer, gradient=Chunked(k)), data)), expected)


# The engine against the reference


BLOCKS = [
    (cell, net, *pair)
    for i, cell in enumerate(CELLS)
    for j, net in enumerate(NETS)
    for k, pair in enumerate(pairs(STEPS[net]))
    if net == "one" or (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("cell", "net", "window", "every"), BLOCKS)
def test_truncated(cell: str, net: str, window: int, every: int, agree: Agree) -> None:
    """All of one layer; of the other nets half, so that every two of cell, net and (window, every) meet."""
    theirs = build(cell, **NETS[net])
    memory = ("gates", "states")[(window + every) % 2]
    judge(theirs, case(theirs, STEPS[net]), Truncated(window, every=every), agree, memory)


@each_cell
@each_net
def test_chunked(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T)
    for k in (1, 2, 3, 4, 6, 7, 8):
        judge(theirs, data, Chunked(k), agree, "gates", "states")


@each_cell
@each_net
def test_given_factors(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    policy = some_policies(net, B=3)[-1]
    judge(theirs, case(theirs, T=T), policy, agree, "gates", "states")
    assert isinstance(policy, Fixed)
    assert policy.calls == [(T, 3)] * 2 * len(policy.xi)


@each_cell
@each_net
def test_resets(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    for policy in some_policies(net, B=4):
        judge(theirs, data, policy, agree, "gates", "states", resets=RESETS)


@each_cell
@each_net
def test_reset_at_every_step(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=2)
    for policy in (Full(), Truncated(4, every=3)):
        judge(theirs, data, policy, agree, resets=torch.ones(T, 2, dtype=torch.bool))


@each_cell
@each_net
def test_packed(cell: str, net: str, agree: Agree) -> None:
    """Every sequence as if run alone: its blocks are counted in its own steps, from its own first or last one.

    The lanes of the factors are the sequences in the order they were packed.
    """
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    fixed = some_policies(net, B=4)[-1]
    for policy in (Full(), Chunked(2), Truncated(4, every=3), fixed):
        judge(theirs, data, policy, agree, "gates", "states", lengths=LENGTHS)


@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize("net", ["two", "bi_two"])
@pytest.mark.parametrize(("window", "every"), pairs(4))
def test_packed_truncated(cell: str, net: str, window: int, every: int, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    judge(theirs, case(theirs, T=4), Truncated(window, every=every), agree, lengths=(2, 4, 3))


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_packed_with_resets(cell: str, net: str, agree: Agree) -> None:
    """The lanes of `resets` are the sequences in the order they were packed."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    for policy in (Full(), Truncated(3, every=2)):
        judge(theirs, data, policy, agree, lengths=LENGTHS, resets=RESETS)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_batch_first_and_no_bias(cell: str, net: str, agree: Agree) -> None:
    for constructor in ({"batch_first": True}, {"bias": False}):
        theirs = build(cell, **constructor, **NETS[net])
        for policy in (Chunked(3), Truncated(3, every=2)):
            judge(theirs, case(theirs, T=5), policy, agree)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_one_step(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    for policy in (Full(), Chunked(1), Chunked(3), Truncated(1), Truncated(4, every=3)):
        judge(theirs, case(theirs, T=1), policy, agree)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_many_blocks_of_one_lane(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    for policy in (Chunked(5), Truncated(3), Truncated(5, every=3)):
        judge(theirs, case(theirs, T=11, B=1), policy, agree)


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_float32(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    for p in theirs.parameters():  # values that float32 holds exactly
        p.data = p.data.float().double()
    wide = case(theirs, T=T)
    narrow = Case(*(z.float() if isinstance(z, Tensor) else tuple(s.float() for s in z) for z in vars(wide).values()))
    wide = Case(*(z.double() if isinstance(z, Tensor) else tuple(s.double() for s in z) for z in vars(narrow).values()))
    for policy in some_policies(net, B=3):
        expected = gradients(theirs, wide.x, wide.initial, wide.dy, wide.dfinal, policy)
        actual = measure(ours(theirs, gradient=policy).float(), narrow)
        assert actual.x.dtype == torch.float32
        agree(actual.values(), expected.values(), str(policy))


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_dropout(cell: str, net: str, agree: Agree) -> None:
    """The mask of the forward pass is the one the backward pass uses, under every policy."""
    theirs = build(cell, dropout=0.5, **NETS[net])
    data = case(theirs, T=T)
    torch.manual_seed(10)
    masks = [nn.functional.dropout(torch.ones_like(data.dy), 0.5)]
    for policy in some_policies(net, B=3):
        expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy, masks=masks)
        torch.manual_seed(10)
        agree(measure(ours(theirs, gradient=policy), data).values(), expected.values(), str(policy))


@each_cell
@pytest.mark.parametrize(("net", "columns"), [("one", 1), ("two", 4), ("bi_two", 1), ("bi_two", 4)])
def test_sweep_in_groups(cell: str, net: str, columns: int, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks walked a few at a time, as they are where all at once would take too much memory."""
    theirs = build(cell, **NETS[net])
    monkeypatch.setattr(sums, "SWEEP_SEQUENCES", 0)
    for policy in (Truncated(3), Truncated(4, every=3), Chunked(2)):
        window = policy.k if isinstance(policy, Chunked) else policy.window
        monkeypatch.setattr(sums, "SWEEP_VALUES", columns * window * 4 * len(theirs.weight_hh_l0))
        judge(theirs, case(theirs, T=5, B=2), policy, agree, lengths=(3, 5))


# Policies against one another


@each_cell
@each_net
def test_policies_that_cut_nothing_equal_full(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T)
    full = measure(ours(theirs, gradient=Full()), data).values()
    others = [Truncated(T), Truncated(T, every=T), Truncated(T + 5, every=2), Chunked(T), Chunked(T + 1)]
    for policy in [*others, Randomized(1.0), Randomized((1.0, 1.0))]:
        agree(measure(ours(theirs, gradient=policy), data).values(), full, str(policy))


@each_cell
@each_net
def test_window_of_every_is_chunked_where_it_divides(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=6)
    for k in (1, 2, 3, 6):
        chunked = measure(ours(theirs, gradient=Chunked(k)), data).values()
        agree(measure(ours(theirs, gradient=Truncated(k, every=k)), data).values(), chunked)


@each_cell
def test_policies_differ(cell: str) -> None:
    """The cases above can tell the policies apart."""
    theirs = build(cell, num_layers=2)
    data = case(theirs, T=T)
    policies = [Full(), Chunked(3), Truncated(3), Truncated(3, every=2), Truncated(3, every=3), Truncated(2)]
    xs = [gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy).x for policy in policies]
    for a, b in itertools.combinations(xs, 2):
        assert (a - b).abs().max() > 1e-4 * a.abs().max()
