"""Gradient policies: what they say, and that the engine computes exactly the gradient they define."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from reference import CELLS, NETS, Case, Fixed, Gradients, as_hx, as_tuple, build, case, gradients, measure, ours
from torch import Tensor, nn

from bptt import Chunked, Full, Randomized, Truncated
from bptt.engine import walk
from bptt.policies import Policy, PolynomialTail, parse

Agree = Callable[..., None]

T = 7
STEPS = {"one": 7, "two": 7, "three": 5, "bi": 5, "bi_two": 5}
"""Steps at which each net is tried with every window and block length."""

LENGTHS = (2, 7, 5, 5)
RESETS = torch.tensor(  # lanes: none; at the start; in the middle, twice in a row; at the start and the end
    [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
).bool()

each_cell = pytest.mark.parametrize("cell", CELLS)
each_net = pytest.mark.parametrize("net", NETS)


def pairs(steps: int) -> list[tuple[int, int]]:
    """Every (window, every) up to one more than there are steps."""
    return [(window, every) for window in range(1, steps + 2) for every in range(1, window + 1)]


def some_policies(net: str, B: int) -> list[Policy]:
    """One policy of each kind; the factors are arbitrary numbers, so that each must land where it belongs."""
    generator = torch.Generator().manual_seed(6)
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    xi = [2 * torch.rand(T, B, generator=generator, dtype=torch.float64) for _ in range(rows)]
    for factors in xi:
        factors[0] = 1
        factors[3] = 0
    return [Full(), Chunked(3), Truncated(2), Truncated(4, every=3), Fixed(*xi)]


def judge(theirs: nn.RNNBase, data: Case, policy: Policy, agree: Agree, *, memory: str = "auto", **kw: Any) -> None:
    """The engine against the reference. kw: resets or lengths."""
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy, **kw)
    if "lengths" in kw:
        kw["packed"] = kw.pop("lengths")
    agree(measure(ours(theirs, gradient=policy, memory=memory), data, **kw).values(), expected.values(), str(policy))


# Policies are data


FORMS = {
    "full": Full(),
    "chunked:1": Chunked(1),
    "chunked:35": Chunked(35),
    "truncated:20": Truncated(20),
    "truncated:20/5": Truncated(20, every=5),
    "truncated:5/5": Truncated(5, every=5),
    "randomized:0.9": Randomized(0.9),
    "randomized:1.0": Randomized(1.0),
    "randomized:0.5,0.75,1.0": Randomized((0.5, 0.75, 1.0)),
    "randomized:mean=20,tail=4": Randomized.polynomial(mean=20),
    "randomized:mean=12.5,tail=3.5": Randomized.polynomial(mean=12.5, tail=3.5),
}


@pytest.mark.parametrize("text", FORMS)
def test_text_form_round_trip(text: str) -> None:
    assert parse(text) == FORMS[text]
    assert str(FORMS[text]) == text
    assert parse(f"  {text.upper()} ") == FORMS[text]


def test_parse_returns_a_policy_as_it_is() -> None:
    policy = Truncated(3)
    assert parse(policy) is policy


def test_every_is_one_unless_said() -> None:
    assert Truncated(4) == Truncated(4, every=1) == Truncated(4, 1)
    assert parse("truncated:4/1") == Truncated(4)
    assert Truncated(4) != Truncated(4, every=2)
    assert Chunked(4) != Truncated(4, every=4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "full:3",
        "chunked",
        "chunked:",
        "chunked:2.5",
        "chunked:2/1",
        "truncated:",
        "truncated:4/",
        "truncated:/4",
        "truncated:4/2/1",
        "randomized:",
        "randomized:p",
        "randomized:0.5,",
        "randomized:tail=4",
        "chunked:0",
        "chunked:-1",
        "truncated:0",
        "truncated:-2",
        "truncated:4/0",
        "truncated:4/5",
        "randomized:0",
        "randomized:1.5",
        "randomized:-0.1",
        "randomized:0.5,0",
        "randomized:nan",
        "randomized:mean=1",
        "randomized:mean=20,tail=2",
    ],
)
def test_bad_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"got"):
        parse(text)


@pytest.mark.parametrize("value", [None, 3, 0.9, ("full",), Full])
def test_parse_of_what_is_neither(value: object) -> None:
    with pytest.raises(TypeError, match="gradient must be"):
        parse(value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Chunked(0), "k"),
        (lambda: Chunked(-3), "k"),
        (lambda: Truncated(0), "window"),
        (lambda: Truncated(-1), "window"),
        (lambda: Truncated(4, every=0), "every"),
        (lambda: Truncated(4, every=-1), "every"),
        (lambda: Truncated(4, every=5), "every"),
        (lambda: Randomized(0), "p"),
        (lambda: Randomized(0.0), "p"),
        (lambda: Randomized(-0.5), "p"),
        (lambda: Randomized(1.0001), "p"),
        (lambda: Randomized(float("nan")), "p"),
        (lambda: Randomized((0.5, 0.0)), "p"),
        (lambda: Randomized((0.5, 1.5)), "p"),
        (lambda: Randomized(()), "p"),
        (lambda: Randomized.polynomial(mean=1.0), "mean"),
        (lambda: Randomized.polynomial(mean=float("inf")), "mean"),
        (lambda: Randomized.polynomial(mean=20, tail=2.0), "tail"),
        (lambda: PolynomialTail(0.5), "mean"),
    ],
)
def test_bad_value_names_argument(make: Callable[[], Policy], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must.*(got|lie)"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chunked(2.0),
        lambda: Chunked(True),
        lambda: Truncated("3"),
        lambda: Truncated(4, every=1.5),
        lambda: Randomized("0.5"),
        lambda: Randomized(None),
        lambda: Randomized(True),
    ],
)
def test_bad_type(make: Callable[[], Policy]) -> None:
    with pytest.raises(TypeError, match="must be"):
        make()


def test_policies_are_frozen_and_hashable() -> None:
    for policy in FORMS.values():
        assert len({policy, parse(str(policy))}) == 1
        with pytest.raises(FrozenInstanceError):
            policy.window = 3


BLOCKS = {
    "full": [(0, 0, 6)],
    "chunked:3": [(0, 0, 2), (3, 3, 5), (6, 6, 6)],
    "chunked:1": [(t, t, t) for t in range(7)],
    "chunked:7": [(0, 0, 6)],
    "chunked:8": [(0, 0, 6)],
    "truncated:1": [(t, t, t) for t in range(7)],
    "truncated:3": [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 3), (2, 4, 4), (3, 5, 5), (4, 6, 6)],
    "truncated:3/2": [(0, 0, 1), (1, 2, 3), (3, 4, 5), (4, 6, 6)],
    "truncated:3/3": [(0, 0, 2), (3, 3, 5), (4, 6, 6)],
    "truncated:5/4": [(0, 0, 3), (2, 4, 6)],
    "randomized:0.5": [(0, 0, 6)],
}


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_as_literals(text: str) -> None:
    assert parse(text).reach(7).blocks(7) == BLOCKS[text]


# The random factors


def test_constant_keep_probability() -> None:
    torch.manual_seed(7)
    expected = torch.rand(5, 4, dtype=torch.float64) < 0.8
    torch.manual_seed(7)
    xi = Randomized(0.8).draw(6, 4)
    torch.testing.assert_close(xi[0], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(xi[1:], expected.double() / 0.8)


def test_draws_differ_by_edge_and_lane_and_repeat_with_the_seed() -> None:
    torch.manual_seed(8)
    first, second = Randomized(0.5).draw(40, 30), Randomized(0.5).draw(40, 30)
    torch.manual_seed(8)
    again = Randomized(0.5).draw(40, 30)
    torch.testing.assert_close(first, again)
    for a, b in [(first, second), (first[:, 0], first[:, 1]), (first[1], first[2])]:
        assert not torch.equal(a, b)
    own = [Randomized(0.5, generator=torch.Generator().manual_seed(9)).draw(40, 30) for _ in range(2)]
    torch.testing.assert_close(*own)


def test_own_generator_leaves_torchs_alone() -> None:
    before = torch.get_rng_state()
    Randomized(0.5, generator=torch.Generator()).draw(5, 5)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_certain_edges_draw_nothing() -> None:
    before = torch.get_rng_state()
    assert Randomized(1.0).draw(5, 3) is None
    assert Randomized(0.5).draw(1, 3) is None
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize(("mean", "tail"), [(20, 4), (3, 4.5), (50, 5), (1.5, 6)])
def test_polynomial_tail_mean(mean: float, tail: float) -> None:
    """The mean piece length is the sum over n >= 0 of the probability of n kept edges in a row."""
    policy = PolynomialTail(mean, tail)
    N = 200_000
    kept = torch.tensor([policy.keep(d) for d in range(1, N)], dtype=torch.float64)
    survival = torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)])
    beyond = survival[-1] * N / (tail - 2)  # the integral of a tail n^(1-tail)
    torch.testing.assert_close(survival.sum() + beyond, torch.tensor(mean, dtype=torch.float64), rtol=1e-6, atol=0)
    slope = (survival[-1] / survival[N // 10]).log() / math.log(10)
    torch.testing.assert_close(slope, torch.tensor(1 - tail, dtype=torch.float64), rtol=1e-2, atol=0)


class Draws:
    """Every way to cut E edges, with its probability and its factors, from the definition of a keep probability."""

    def __init__(self, keep: Callable[[int], float], edges: int) -> None:
        self.patterns = list(itertools.product([True, False], repeat=edges))
        self.probability = torch.ones(len(self.patterns), dtype=torch.float64)
        self.xi = torch.ones(edges + 1, len(self.patterns), dtype=torch.float64)
        for i, pattern in enumerate(self.patterns):
            since = 1  # steps since the last cut
            for t, kept in enumerate(pattern, 1):
                p = keep(since)
                self.probability[i] *= p if kept else 1 - p
                self.xi[t, i] = 1 / p if kept else 0
                since = since + 1 if kept else 1


KEEPS = {
    "constant": Randomized(0.6),
    "by_distance": Randomized((0.5, 0.8, 0.9)),
    "short_list": Randomized((0.3, 0.7)),
    "polynomial": Randomized.polynomial(mean=3.0),
}
KEEP_BY_HAND: dict[str, Callable[[int], float]] = {
    "constant": lambda d: 0.6,
    "by_distance": lambda d: (0.5, 0.8, 0.9)[d - 1],
    "short_list": lambda d: 0.3 if d == 1 else 0.7,
    "polynomial": lambda d: 1 - 3 / (2 * 3.0 + d),
}


@pytest.mark.parametrize("name", KEEPS)
def test_weights_of_every_cut_pattern(name: str) -> None:
    draws = Draws(KEEP_BY_HAND[name], edges=3)
    uniform = torch.tensor(draws.patterns).logical_not().double().T * (1 - 2**-53)  # 0 keeps; almost 1 cuts
    torch.testing.assert_close(KEEPS[name].weights(uniform), draws.xi)
    torch.testing.assert_close(draws.probability.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close((draws.xi * draws.probability).sum(1), torch.ones(4, dtype=torch.float64))


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


@each_cell
@pytest.mark.parametrize(("net", "window", "every"), [(net, *pair) for net in NETS for pair in pairs(STEPS[net])])
def test_truncated(cell: str, net: str, window: int, every: int, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    memory = ("gates", "states")[(window + every) % 2]
    judge(theirs, case(theirs, STEPS[net]), Truncated(window, every=every), agree, memory=memory)


@each_cell
@each_net
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_chunked(cell: str, net: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T)
    for k in (1, 2, 3, 4, 6, 7, 8):
        judge(theirs, data, Chunked(k), agree, memory=memory)


@each_cell
@each_net
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_given_factors(cell: str, net: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    policy = some_policies(net, B=3)[-1]
    judge(theirs, case(theirs, T=T), policy, agree, memory=memory)
    assert isinstance(policy, Fixed)
    assert policy.calls == [(T, 3)] * len(policy.xi)


@each_cell
@each_net
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_resets(cell: str, net: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    for policy in some_policies(net, B=4):
        judge(theirs, data, policy, agree, memory=memory, resets=RESETS)


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
        for memory in ("gates", "states"):
            judge(theirs, data, policy, agree, memory=memory, lengths=LENGTHS)


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
    monkeypatch.setattr(walk, "SWEEP_SEQUENCES", 0)
    for policy in (Truncated(3), Truncated(4, every=3), Chunked(2)):
        window = policy.k if isinstance(policy, Chunked) else policy.window
        monkeypatch.setattr(walk, "SWEEP_VALUES", columns * window * 4 * len(theirs.weight_hh_l0))
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


# Randomized truncation


EXPECTATIONS = {  # T and net; every direction and layer of a bidirectional net draws for itself
    "one": (4, "one"),
    "two": (4, "two"),
    "three": (4, "three"),
    "bi": (4, "bi"),
    "bi_two": (3, "bi_two"),
}


@each_cell
@pytest.mark.parametrize("name", EXPECTATIONS)
@pytest.mark.parametrize("keep", KEEPS)
def test_expected_gradient_is_the_full_one(cell: str, name: str, keep: str, agree: Agree) -> None:
    """One lane per way to cut the edges, its losses weighted by its probability: the sum is the expectation."""
    steps, net = EXPECTATIONS[name]
    theirs = build(cell, I=2, H=3, **NETS[net])
    data = case(theirs, T=steps, B=1)
    draws = Draws(KEEP_BY_HAND[keep], edges=steps - 1)
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    ways = list(itertools.product(range(len(draws.patterns)), repeat=rows))
    probability = torch.stack([draws.probability[list(way)].prod() for way in ways])
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=torch.float64))
    lanes = len(ways)
    many = Case(
        data.x.expand(-1, lanes, -1),
        tuple(z.expand(-1, lanes, -1) for z in data.initial),
        data.dy * probability[:, None],
        tuple(dz * probability[:, None] for dz in data.dfinal),
    )
    policy = Fixed(*(draws.xi[:, [way[row] for way in ways]] for row in range(rows)))
    actual = measure(ours(theirs, gradient=policy), many)
    expected = measure(theirs, data)
    agree(actual.parameters, expected.parameters)
    agree(actual.x.sum(1, keepdim=True), expected.x)
    agree([z.sum(1, keepdim=True) for z in actual.initial], expected.initial)


@each_cell
@each_net
@pytest.mark.parametrize("keep", ["constant", "by_distance", "polynomial"])
def test_randomized_uses_its_own_draws(cell: str, net: str, keep: str, agree: Agree) -> None:
    """From torch's generator, one draw for a one-directional stack, else one for each layer and direction in turn."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T)
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    torch.manual_seed(11)
    drawn = Fixed(*(KEEPS[keep].draw(T, 3) for _ in range(rows)))
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, drawn)
    for memory in ("gates", "states"):
        torch.manual_seed(11)
        actual = measure(ours(theirs, gradient=KEEPS[keep], memory=memory), data)
        agree(actual.values(), expected.values())


@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_nothing_is_drawn_without_a_gradient(net: str) -> None:
    theirs = build("gru", **NETS[net])
    mine = ours(theirs, gradient=Randomized(0.5))
    data = case(theirs, T=T)
    before = torch.get_rng_state()
    with torch.no_grad():
        mine(data.x)
    torch.testing.assert_close(torch.get_rng_state(), before)


# Resets


def pieces(resets: list[bool]) -> Iterator[tuple[int, int]]:
    """First and last step of each sequence of a lane."""
    starts = [0, *(t for t, reset in enumerate(resets) if reset and t > 0), len(resets)]
    for first, after in itertools.pairwise(starts):
        yield first, after - 1


def separately(layer: Any, data: Case, resets: Tensor) -> Gradients:
    """Each lane cut at its resets and each piece run alone."""
    D = 2 if layer.bidirectional else 1
    x = data.x.clone().requires_grad_()
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    ys, finals = [], []
    for b in range(x.shape[1]):
        lane: list[Tensor] = []
        final = [torch.zeros_like(z[:, b]) for z in initial]
        for first, last in pieces(resets[:, b].tolist()):
            enter = [torch.zeros_like(z[:, b]) for z in initial]
            for mine, z in zip(enter, initial, strict=True):
                if first == 0 and not resets[0, b]:
                    mine[0::D] = z[0::D, b]
                if last == len(x) - 1 and D == 2:
                    mine[1::D] = z[1::D, b]
            y, hx = layer(x[first : last + 1, b : b + 1], as_hx(z[:, None] for z in enter))
            lane.append(y)
            for mine, z in zip(final, as_tuple(hx), strict=True):
                if last == len(x) - 1:
                    mine[0::D] = z[0::D, 0]
                if first == 0 and D == 2:
                    mine[1::D] = z[1::D, 0]
        ys.append(torch.cat(lane))
        finals.append(final)
    y = torch.cat(ys, 1)
    final = tuple(torch.stack(z, 1) for z in zip(*finals, strict=True))
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(
        [y, *final], [*parameters.values(), x, *initial], [data.dy, *data.dfinal], materialize_grads=True
    )
    n = len(parameters)
    return Gradients(y, final, dict(zip(parameters, grads, strict=False)), grads[n], grads[n + 1 :])


@each_cell
@each_net
def test_resets_equal_separate_sequences(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    agree(measure(ours(theirs), data, resets=RESETS).values(), separately(theirs, data, RESETS).values())


@each_cell
@each_net
@pytest.mark.parametrize("window", [1, 2, 4])
def test_resets_equal_separate_sequences_truncated(cell: str, net: str, window: int, agree: Agree) -> None:
    """With one loss a block, where the blocks begin does not depend on where the sequence does."""
    mine = ours(build(cell, **NETS[net]), gradient=Truncated(window))
    data = case(mine, T=T, B=4)
    agree(measure(mine, data, resets=RESETS).values(), separately(mine, data, RESETS).values())


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_resets_layouts(cell: str, net: str, agree: Agree) -> None:
    """Time first `[T, B]`, batch first `[B, T]`, unbatched `[T]`, not contiguous: the same result."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    expected = measure(ours(theirs), data, resets=RESETS)
    first = build(cell, batch_first=True, **NETS[net])
    agree(measure(ours(first), data, resets=RESETS.T.contiguous()).values(), expected.values())
    agree(measure(ours(first), data, resets=RESETS.T).values(), expected.values())
    for layer in (ours(theirs), ours(first)):
        y, final = layer(data.x[:, 2], as_hx(z[:, 2] for z in data.initial), resets=RESETS[:, 2])
        agree([y, as_tuple(final)], [expected.y[:, 2], tuple(z[:, 2] for z in expected.final)])


def test_no_resets_change_nothing(agree: Agree) -> None:
    theirs = build("lstm", num_layers=2, bidirectional=True)
    data = case(theirs, T=T)
    for policy in some_policies("bi_two", B=3):
        mine = ours(theirs, gradient=policy)
        agree(measure(mine, data, resets=torch.zeros(T, 3, dtype=torch.bool)).values(), measure(mine, data).values())


def test_a_reset_stops_nan_and_infinity(agree: Agree) -> None:
    """A state that overflowed is replaced by zero, not multiplied by it: nothing of it crosses, either way."""
    theirs = build("relu", I=2, H=3)
    data = case(theirs, T=T, B=1)
    x = data.x.clone()
    x[2] = float("inf")
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[3] = True
    y, _ = ours(theirs)(x, resets=resets)
    expected, _ = theirs(x[3:])
    agree(y[3:], expected)


def test_numbers_of_other_libraries() -> None:
    assert Truncated(np.int64(6), every=np.int32(3)) == Truncated(6, every=3)
    assert str(Chunked(np.int64(6))) == "chunked:6"
    assert str(Randomized(np.float64(0.5))) == "randomized:0.5"
    assert str(Randomized(1)) == "randomized:1.0"


@pytest.mark.parametrize("make", [lambda: Randomized(["a"]), lambda: Randomized("0.5"), lambda: Randomized(True)])
def test_probability_that_is_no_number(make: Callable[[], Policy]) -> None:
    with pytest.raises(TypeError, match="p must be a number"):
        make()


def test_generator_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None: got int"):
        Randomized(0.9, generator=5)
    with pytest.raises(TypeError, match="mean must be a number"):
        Randomized.polynomial("20")
