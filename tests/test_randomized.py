"""Randomized truncation is unbiased, exactly, and reproducible."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from reference import NETS, Case, Fixed, build, case, gradients, measure, ours
from sweeps import Agree, T, each_cell, each_net

from bptt import Randomized
from bptt.policies import PolynomialTail

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


# The expectation


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
