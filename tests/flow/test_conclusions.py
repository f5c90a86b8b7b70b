"""What measurements say: the right conclusion, with the right numbers, for ordinary and odd data."""

import math
from dataclasses import replace

import measurements as made
import numpy as np
import pytest
from measurements import INF, NAN

import bptt
from bptt.equations.policies import edge_factors
from bptt.flow import conclusion, pairs, verdict
from bptt.flow._verdict import TOPICS
from bptt.flow.coarser import coarser
from bptt.flow.wording import exponential, half_life, number, percent

SAYS = {
    "vanishing": (made.lags(0.8), "Gradients vanish: half is lost every 3.11 steps; 90 % arises within 10 steps"),
    "vanishing at once": (made.lags(0.3), "Gradients vanish: each step keeps 30 %"),
    "exploding": (made.lags(1.1), "Gradients explode: on the way back they double every 7.27 steps"),
    "exploding fast": (made.lags(5.0), "Gradients explode: on the way back they grow 5-fold per step"),
    "steady": (made.lags(0.9999), "Gradients hold: they change by 0.01 % per step"),
    "slow, but long": (made.lags(0.995, K=2000), "Gradients vanish: half is lost every 138 steps"),
    "cut short": (
        made.lags(0.98, K=20, complete=False),
        "Gradients fade slowly: 68 % is left after 19 steps; 90 % arises within at least 17 steps (measured in 20",
    ),
    "the steepest layer": (made.lags(0.9, 0.5, 1.01), "layer 1: gradients vanish: each step keeps 50 %"),
    "no gradient": (made.lags_of([0.0, 0.0]), "No gradient flows"),
    "an end": (made.lags_of([1.0, 2.0, 0.0, 0.0]), "Gradients end at lag 1"),
    "overflow": (
        made.lags_of([1.0, 2.0, INF], 2.0),
        "Gradients explode: on the way back they grow 2-fold per step; they are not finite from lag 2 on",
    ),
    "one lag": (made.lags_of([1.0]), "Only lag 0 was measured"),
    "map": (made.lag_map(0.8), "90 % of what a loss sends back arises within 10 steps"),
    "map that grows": (made.lag_map(1.1, T=20), "What a loss sends back grows on its way: it ends 6.12 times as large"),
    "map of zeros": (replace(made.lag_map(), norm=np.zeros((1, 40, 40))), "No loss sends anything back"),
    "map with NaN": (
        replace(made.lag_map(), norm=np.full((1, 40, 40), NAN)),
        "100 % of what the losses send",
    ),
    "shares": (made.shares(0.8), "Lags 0 to 15 give dL/dW_hh to within 2.8 %"),
    "shares at lag 0": (made.shares(0.05), "Lag 0 alone gives dL/dW_hh to within 5 %"),
    "all shares": (made.shares(0.999), "All lags count: cut before lag 64, dL/dW_hh is 48 % off"),
    "contracting steps": (made.jacobians(0.5), "Every step contracts: |J_t| is at most 0.575 (bound 1.3)"),
    "some steps": (made.jacobians(1.0, bound=None), "|J_t| exceeds 1 at"),
    "product": (made.products(0.9), "The product of 60 Jacobians vanishes: its norm is 0.0018, at the end 0.9 a step"),
    "product that explodes": (made.products(30.0, 400), "explodes: its norm is 7.06e590, at the end 30 a step"),
    "product that is 0": (made.products(0.9, 0), "A product of no factors"),
    "spectrum inside": (
        made.spectrum(0.5),
        "0.5, inside the unit circle: powers of W_hh vanish, half is lost every",
    ),
    "spectrum outside": (made.spectrum(2.0), "outside the unit circle: powers of W_hh explode, doubling every 1 step"),
    "spectrum on": (made.spectrum(1.005), "on the unit circle: powers of W_hh neither vanish nor explode"),
    "gates' spectrum": (made.spectrum(0.9, 0.8, 1.2), "1.2 (gate n), outside the unit circle"),
    "cell path": (
        made.cell_path(0.97),
        "After 60 steps the cell path alone keeps 0.161, all paths together 0.161",
    ),
    "through h": (made.cell_path(0.97, through_h=9.0), "most passes through h"),
    "cancelled": (made.cell_path(0.97, through_h=0.1), "the paths through h cancel it"),
    "open gates": (made.gates(0.02, 0.1), "Little saturation: 12 % of the values of gate i lie at its ends, the most"),
    "saturated gates": (
        made.gates(0.1, 0.6),
        "70 % of the values of gate i lie at its ends, most at the upper one",
    ),
    "state": (made.gates(0.02, 0.1, names=("h",)), "12 % of the state's values lie at its ends"),
    "stable": (made.lyapunov(-0.05), "Stable: perturbations halve every 13.9 steps (largest exponent -0.05 ± 0.004"),
    "chaotic": (made.lyapunov(0.05), "Unstable: perturbations double every 13.9 steps in 2 directions"),
    "edge": (made.lyapunov(3e-4, error=3e-4), "At the edge"),
    "doubtful": (made.lyapunov(0.003), "Not settled: perturbations may grow or shrink (largest exponent 0.003 ± 0.004"),
    "policies": (
        made.comparison(),
        "chunked:35 takes 51 % of the time of full (2.6 ms against 5.1 ms; quartiles apart) and is 6 % off",
    ),
    "training": (
        made.records(),
        "Perplexity went from 35.5 to 5.08 in 2000 steps; held-out 5.96; 11 % of the",
    ),
}


@pytest.mark.parametrize("name", SAYS)
def test_conclusion(name):
    measure, words = SAYS[name]
    assert words in conclusion(measure)


def test_the_map_names_the_losses_that_reach_least_and_farthest():
    T = 60
    measure = made.lag_map(0.5, T=T, K=20)
    norm = measure.norm.copy()
    norm[0, 30] = 0.95 ** np.arange(20)
    assert conclusion(replace(measure, norm=norm)).endswith("3 for the loss at step 19, at least 16 at step 30")


def test_training_that_turned():
    records = made.records(20)
    records[-1]["heldout_perplexity"] = 50.0
    assert "held-out 50, up from 7.97 at step 750" in conclusion(records)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match=r"^measure must"):
        conclusion(np.zeros(3))
    with pytest.raises(TypeError, match=r"^measures must"):
        verdict("lags")
    with pytest.raises(ValueError, match=r"^measures must"):
        verdict()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (-0.05, "-0.05"), (1e30, "1e30"), (4.25e-9, "4.25e-9"), (NAN, "NaN"), (99999.9, "100000")],
)
def test_number(value, text):
    assert number(value) == text


def test_numbers_beyond_floats():
    assert exponential(1000 * math.log(10) + math.log(2.5)) == "2.5e1000"
    assert exponential(-1000 * math.log(10)) == "1e-1000"
    assert exponential(-INF) == "0"
    assert percent(0.0999) == "10 %"
    np.testing.assert_allclose(0.93 ** half_life(0.93), 0.5)
    assert math.isnan(half_life(NAN))
    assert half_life(0.0) == 0


# The verdict


def test_each_kind_of_measurement_is_among_them():
    assert {type(measure) for measure, _ in SAYS.values()} >= set(TOPICS) - {list, tuple}


def test_verdict_begins_with_what_tells_most():
    said = verdict(made.gates(), made.lags(0.8), made.shares(), made.records())
    assert said.headline == conclusion(made.lags(0.8))
    assert [topic for topic, _ in said.findings] == ["by lag", "weights", "gates", "training"]
    assert all(text in str(said) for _, text in said.findings)


def test_verdict_speaks_of_every_layer():
    said = verdict(made.lags(0.8, 0.9))
    assert [text.split(":")[0] for _, text in said.findings] == ["layer 0", "layer 1"]


@pytest.mark.parametrize(
    ("gates", "remedy"),
    [(("h",), "orthogonal_"), (("r", "z", "n"), "chrono_(layer, longest)"), (("i", "f", "g", "o"), "forget_bias_")],
)
def test_vanishing_is_answered_for_the_cell(gates, remedy):
    advice = verdict(made.lags(0.8), made.gates(names=gates)).advice
    assert remedy in advice[0]
    assert advice[1].startswith("Losses farther than 20 steps")
    assert bptt.policies.parse(advice[1].split('"')[1]) == bptt.Truncated(21)


def test_advice_names_what_there_is():
    """Functions that a user is told to call exist."""
    for name in ("orthogonal_", "chrono_", "forget_bias_"):
        assert callable(getattr(bptt.nn.init, name))
    assert callable(bptt.flow.watch)


def test_exploding_is_answered():
    assert verdict(made.lags(1.2)).advice[0].startswith("Clip the gradient's norm")
    assert verdict(made.lyapunov(0.1)).advice[0].startswith("Clip the gradient's norm")
    assert "bptt.flow.watch" in verdict(made.lags_of([1.0, INF], 2.0)).advice[0]


def test_nothing_to_change():
    assert verdict(made.lags(0.9999), made.gates(0.0, 0.01)).advice == ()


def test_other_advice():
    assert "smaller initial weights" in verdict(made.gates(0.6, 0.1)).advice[0]
    assert 'gradient="chunked:35" saves 49 % of the time of full' in verdict(made.comparison()).advice[0]
    assert "finite variance" in verdict(made.comparison(critical_p=1.2, own="randomized:0.9")).advice[-1]
    assert len(verdict(made.comparison(critical_p=1.2)).advice) == 1  # whoever draws nothing need not know
    assert "raise clip" in verdict([r | {"clipped": 0.9} for r in made.records()]).advice[0]
    assert "radius 1.8" in verdict(made.spectrum(1.8)).advice[0]


# Pairs


@pytest.mark.parametrize("text", ["full", "chunked:3", "truncated:3", "truncated:4/2", "randomized:0.6"])
def test_pairs_are_those_of_the_sweep(text):
    """A scalar chain with J = 1: the gradient by loss and step, from the layer itself under the policy."""
    import torch

    T = 9
    policy = bptt.policies.parse(text)
    if isinstance(policy, bptt.Randomized):
        policy = bptt.Randomized(policy.p, generator=torch.Generator().manual_seed(5))
    rnn = bptt.nn.RNN(1, 1, nonlinearity="identity", bias=False, gradient=policy).double()
    with torch.no_grad():
        for weight in rnn.parameters():
            weight.fill_(1.0)
    found = np.zeros((T, T))
    for t in range(T):
        if isinstance(policy, bptt.Randomized):
            policy.generator.manual_seed(5)
        x = torch.zeros(T, 1, 1, dtype=torch.float64, requires_grad=True)
        rnn(x)[0][t].sum().backward()
        found[t] = x.grad[:, 0, 0]
    np.testing.assert_allclose(pairs(policy, T, seed=5), found)


def test_pairs_of_a_draw_are_products_of_its_factors():
    import torch

    xi = edge_factors(7, 1, bptt.Randomized(0.7, generator=torch.Generator().manual_seed(1)).draw(7, 1).numpy())[:, 0]
    weights = pairs(bptt.Randomized(0.7), 7, seed=1)
    expected = [[np.prod(xi[k + 1 : t + 1]) if k <= t else 0.0 for k in range(7)] for t in range(7)]
    np.testing.assert_allclose(weights, expected)
    with pytest.raises(ValueError, match=r"^T must"):
        pairs(bptt.Full(), 0)


def test_pairs_leave_the_global_generator_alone():
    import torch

    before = torch.get_rng_state()
    pairs(bptt.Randomized(0.5), 20)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_coarser_maps_are_means():
    measure = made.lag_map(0.9, T=100)
    t, lag, norm = coarser(measure, 0, 30)
    assert norm.shape == (25, 25)
    block = measure.norm[0, 40:44, 8:12]
    np.testing.assert_allclose(norm[10, 2], block.mean())
    np.testing.assert_allclose((t[10], lag[2]), (41.5, 9.5))
    assert np.isnan(norm[0, -1])
    same = coarser(measure, 0, 100)[2]
    np.testing.assert_array_equal(same, measure.norm[0])
