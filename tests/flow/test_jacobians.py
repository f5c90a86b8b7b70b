"""Singular values of step Jacobians and of their products."""

from math import isqrt

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.equations import bounds
from bptt.flow._graded import Product, log_singular_values

from . import explicit
from .explicit import DOUBLE, LAYERS, layer_of

T, B, I = 7, 3, 3

each_layer = pytest.mark.parametrize("name", LAYERS)


def linear(W: Tensor) -> bptt.nn.RNN:
    layer = bptt.nn.RNN(1, len(W), nonlinearity="identity", dtype=DOUBLE)
    layer.weight_hh_l0.data = W.to(DOUBLE)
    return layer


def zeros(T: int, B: int = 1) -> Tensor:
    return torch.zeros(T, B, 1, dtype=DOUBLE)


def products_of(factors: list[Tensor]) -> Tensor:
    held = [Product.empty(factors[0])]
    for J in factors:
        held.append(held[-1].after(J))
    return log_singular_values(held)


def orthogonal(S: int) -> Tensor:
    return torch.linalg.qr(torch.randn(S, S, dtype=DOUBLE))[0]


@each_layer
def test_singular_values_of_every_step(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    J = explicit.jacobians(layer, x, torch.zeros(B, 4 + (layer.proj_size or 4) * (name[:4] == "lstm"), dtype=DOUBLE))
    expected = np.linalg.svd(J.numpy(), compute_uv=False)
    found = bptt.flow.jacobians(layer, x)
    assert_allclose(found.norm, expected[..., 0], rtol=1e-11)
    assert_allclose(found.smallest, expected[..., -1], rtol=1e-9, atol=1e-16)
    assert_array_equal(found.t, np.arange(T))
    assert found.layer == "layer 0"
    assert_array_equal(bptt.flow.jacobians(layer, x, every=3, lanes=2).norm, found.norm[::3, :2])


@each_layer
def test_short_products_against_plain_ones(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    J = explicit.jacobians(layer, x, torch.zeros(B, 4 + (layer.proj_size or 4) * (name[:4] == "lstm"), dtype=DOUBLE))
    found = bptt.flow.products(layer, x, start=2, lane=1)
    assert_array_equal(found.n, np.arange(T - 2))
    product = torch.eye(J.shape[-1], dtype=DOUBLE)
    for n in found.n:
        if n:
            product = J[2 + n, 1] @ product
        assert_allclose(found.singular[n], np.linalg.svd(product.numpy(), compute_uv=False), rtol=1e-8, atol=1e-14)
    assert_allclose(found.singular, np.exp(found.log_singular))
    assert (found.start, found.lane) == (2, 1)


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid", "identity"])
def test_bound_of_a_simple_rnn(name: str) -> None:
    layer, x = layer_of(name, hidden=6), torch.randn(T, B, I, dtype=DOUBLE)
    W = layer.weight_hh_l0.detach().numpy()
    steps, found = bptt.flow.jacobians(layer, x), bptt.flow.products(layer, x)
    assert steps.bound == pytest.approx(np.linalg.svd(W)[1][0] * {"sigmoid": 0.25}.get(name, 1.0), rel=1e-14)
    assert np.all(steps.norm <= steps.bound * (1 + 1e-12))
    assert_allclose(found.bound, [bounds.bound(W, name, n) for n in found.n], rtol=1e-12)
    assert np.all(found.singular[:, 0] <= found.bound * (1 + 1e-12))
    assert_allclose((found.beta_w, found.beta_h), (bounds.beta_w(W), bounds.BETA_H[name]))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_other_cells_have_no_such_bound(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    found = bptt.flow.products(layer, x)
    assert (bptt.flow.jacobians(layer, x).bound, found.bound, found.beta_w, found.beta_h) == (None,) * 4


def test_behind_the_end_of_a_lane_there_is_no_data() -> None:
    layer = layer_of("gru")
    packed = pack_sequence([torch.randn(n, I, dtype=DOUBLE) for n in (5, 2)])
    found = bptt.flow.jacobians(layer, packed)
    assert_array_equal(found.there, np.arange(5)[:, None] < [5, 2])
    assert_array_equal(np.isnan(found.norm), ~found.there)
    assert "not finite" not in bptt.flow.conclusion(found)
    short = bptt.flow.products(layer, packed, lane=1)
    assert_array_equal(short.n, [0, 1])  # as many as the lane has
    assert np.all(np.isfinite(short.log_singular))
    with pytest.raises(ValueError, match=r"steps must be 0\.\.1, what follows state 0: got 2"):
        bptt.flow.products(layer, packed, lane=1, steps=2)


def test_a_reset_is_told_apart_from_a_net_that_forgets() -> None:
    class Episodes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = bptt.nn.init.identity_(bptt.nn.RNN(I, 4, nonlinearity="identity"), 0.99)

        def forward(self, x: Tensor) -> Tensor:
            resets = torch.zeros(x.shape[:2], dtype=torch.bool)
            resets[10] = True
            return self.rnn(x, resets=resets)[0]

    recording = bptt.flow.record(Episodes(), torch.zeros(30, 2, I), lambda y: y.sum())
    found = bptt.flow.jacobians(recording)
    assert_array_equal(found.norm[10], 0)
    assert_array_equal(found.there, (np.arange(30) != 10)[:, None].repeat(2, 1))
    assert bptt.flow.conclusion(found).startswith("Every step contracts: |J_t| is at most 0.99")
    said = bptt.flow.conclusion(bptt.flow.products(recording))
    assert "The product of 9 Jacobians keeps lengths to within a factor of 2" in said
    assert said.endswith("then a reset ends the lane's memory, after 9 steps")


# Products whose singular values are known


def test_known_singular_values_of_1000_different_factors() -> None:
    """Q_n D_n Q_{n-1}' times ... times Q_1 D_1 Q_0': the diagonals multiply."""
    S, K = 10, 1000
    Q = [orthogonal(S) for _ in range(K + 1)]
    logs = torch.linspace(0.4, -1.4, S, dtype=DOUBLE) + 0.1 * torch.randn(K, S, dtype=DOUBLE)
    factors = [Q[t + 1] @ torch.diag(logs[t].exp()) @ Q[t].T for t in range(K)]
    expected = torch.cat([torch.zeros(1, S, dtype=DOUBLE), logs.cumsum(0)]).sort(-1, descending=True).values
    found = products_of(factors)
    assert torch.isfinite(found).all()
    assert expected[-1, -1] < -1300
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-10)


def test_product_of_orthogonal_matrices() -> None:
    found = products_of([orthogonal(8) for _ in range(200)])
    torch.testing.assert_close(found, torch.zeros(201, 8, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_integer_products_against_exact_arithmetic() -> None:
    """2 by 2: the squared singular values are the roots of s^2 - |P|_F^2 s + det(P)^2, in Python's integers."""
    random = np.random.default_rng(0)
    factors = random.integers(-9, 10, (300, 2, 2))
    factors = factors[np.abs(factors[:, 0, 0] * factors[:, 1, 1] - factors[:, 0, 1] * factors[:, 1, 0]) > 0]
    P = np.eye(2, dtype=int).astype(object)
    found = products_of([torch.tensor(J, dtype=DOUBLE) for J in factors])
    for n, J in enumerate(factors, 1):
        P = J.astype(object) @ P
        log_det = log_of(abs(int(P[0, 0] * P[1, 1] - P[0, 1] * P[1, 0])))
        square = int(sum(x * x for x in P.ravel()))
        gap = square * square - 4 * int(P[0, 0] * P[1, 1] - P[0, 1] * P[1, 0]) ** 2
        scale = 10**60
        root = isqrt(gap * scale * scale)
        largest = 0.5 * (log_of(square * scale + root) - np.log(2) - 60 * np.log(10))
        assert_allclose(found[n].numpy(), [largest, log_det - largest], rtol=1e-13, atol=1e-9)


def log_of(n: int) -> float:
    shift = max(0, n.bit_length() - 1000)
    return float(np.log(float(n >> shift))) + shift * float(np.log(2))


def test_powers_of_a_matrix_far_from_normal() -> None:
    """[[a, b], [0, a]]^n = [[a^n, n a^(n-1) b], [0, a^n]]: it grows first and vanishes later."""
    a, b = 0.5, 10.0
    found = bptt.flow.products(linear(torch.tensor([[a, b], [0, a]])), zeros(1001), steps=1000)
    assert np.isfinite(found.log_singular).all()
    for n in (1, 2, 10, 40):
        exact = np.array([[a**n, n * a ** (n - 1) * b], [0, a**n]])
        largest = np.linalg.svd(exact, compute_uv=False)[0]
        assert_allclose(found.log_singular[n, 0], np.log(largest), atol=1e-12)
    assert_allclose(found.log_singular.sum(1), 2 * found.n * np.log(a), atol=1e-9)
    assert found.singular[1, 0] > 10
    assert_allclose(found.log_singular[1000, 0], np.log(1000 * b / a) + 1000 * np.log(a), rtol=1e-7)


def test_singular_factors() -> None:
    diagonal = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=DOUBLE))
    found = products_of([diagonal, orthogonal(3), diagonal])
    assert_array_equal(found[1:, -1].exp() < 1e-15, True)
    torch.testing.assert_close(found[1, :2], torch.tensor([np.log(2.0), 0.0]))
    assert_array_equal(products_of([torch.zeros(3, 3, dtype=DOUBLE)] * 2)[1:].numpy(), -np.inf)


def test_growth_beyond_floats() -> None:
    found = bptt.flow.products(linear(10 * torch.eye(2)), zeros(501), steps=500)
    assert_allclose(found.log_singular, found.n[:, None] * np.log([10.0, 10.0]), atol=1e-10)
    assert_array_equal(found.singular[400], np.inf)
    assert found.bound[400] == np.inf


def test_what_is_not_finite_is_nan() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I, dtype=DOUBLE)
    x[3, 0] = torch.nan
    steps, found = bptt.flow.jacobians(layer, x), bptt.flow.products(layer, x)
    assert_array_equal(np.isnan(steps.norm), np.arange(T)[:, None] + np.array([0, -T, -T]) >= 3)
    assert_array_equal(np.isnan(found.log_singular).all(1), found.n >= 3)
    assert_array_equal(np.isnan(found.log_singular).any(1), found.n >= 3)


def test_products_of_steps() -> None:
    """The logistic map: J_t = r (1 - 2 s_{t-1})."""
    r, s = 3.7, torch.tensor(0.3, dtype=DOUBLE)
    chain = bptt.flow.steps(lambda s, _: (r * s * (1 - s), s), s, length=50)
    J = []
    for _ in range(50):
        J.append(r * (1 - 2 * s.item()))
        s = r * s * (1 - s)
    found = bptt.flow.products(chain)
    assert_allclose(found.log_singular[:, 0], np.cumsum([0, *np.log(np.abs(J))]), atol=1e-9)
    assert (found.layer, found.bound, len(found.n)) == ("carry", None, 51)
    assert_allclose(bptt.flow.jacobians(chain).norm[:, 0], np.abs(J), rtol=1e-12)
    assert_array_equal(bptt.flow.jacobians(chain).t, np.arange(1, 51))


def test_wrong_arguments() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I, dtype=DOUBLE)
    for wrong, words in (
        ({"start": 7}, "start must be a state that steps follow, 0..6: got 7"),
        ({"start": -1}, "start must be .* got -1"),
        ({"lane": 3}, "lane must be one of 0..2: got 3"),
        ({"start": 2, "steps": 5}, "steps must be 0..4, what follows state 2: got 5"),
        ({"layer": 1}, "layer must be one of 0..0: got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            bptt.flow.products(layer, x, **wrong)
    with pytest.raises(ValueError, match="every must be at least 1: got 0"):
        bptt.flow.jacobians(layer, x, every=0)
    with pytest.raises(ValueError, match="lanes must be at least 1: got 0"):
        bptt.flow.jacobians(layer, x, lanes=0)


@pytest.mark.parametrize(
    ("weights", "step", "product"),
    [
        (
            [1.0, 1.0],
            "|J_t| is 1 at every step: lengths are kept",
            "keeps lengths to within a factor of 2: its norm is 1",
        ),
        (
            [1.0, 0.5],
            "|J_t| is 1 at every step: no direction grows",
            "keeps its best direction to within a factor of 2",
        ),
        ([0.5, 0.1], "Every step contracts: |J_t| is at most 0.5", "vanishes: its norm is 1.86e-9"),
    ],
)
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_said_of_all_directions_holds_in_all(weights: list[float], step: str, product: str, every: int) -> None:
    layer = bptt.nn.RNN(1, 2, nonlinearity="identity", bias=False)
    layer.weight_hh_l0.data = torch.tensor(weights).diag()
    x = torch.zeros(30, 1, 1)
    some = "" if every == 1 else " (measured at 10 of the steps)"
    bound = f" (bound {max(weights):g})"
    assert bptt.flow.conclusion(bptt.flow.jacobians(layer, x, every=every)) == step + bound + some
    assert product in bptt.flow.conclusion(bptt.flow.products(layer, x))


def test_a_step_that_keeps_a_length_is_not_said_to_contract() -> None:
    """Orthogonal weights and relu: the units that are on make the norm 1 or less."""
    torch.manual_seed(0)
    layer = bptt.nn.init.orthogonal_(bptt.nn.RNN(2, 8, nonlinearity="relu"))
    found = bptt.flow.jacobians(layer, torch.randn(50, 2, 2))
    assert found.norm.max() > 1 - 1e-6 > found.norm.min()
    assert bptt.flow.conclusion(found).startswith("In no step does any direction grow: |J_t| is at most 1")
