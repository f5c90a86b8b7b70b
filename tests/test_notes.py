"""What textbooks and notes on backpropagation through time describe, reached from the public API."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import bptt
from bptt.equations import linear, policies
from bptt.equations.rnn import SoftmaxNetwork

T, K, H = 9, 5, 4


@pytest.fixture
def network() -> SoftmaxNetwork:
    g = np.random.default_rng(0)
    return SoftmaxNetwork(U=0.5 * g.normal(size=(H, K)), V=g.normal(size=(K, H)), W=0.5 * g.normal(size=(H, H)))


def softmax_layer(network: SoftmaxNetwork, gradient: str) -> bptt.nn.RNN:
    layer = bptt.nn.RNN(K, H, bias=False, dtype=torch.float64, gradient=gradient)
    layer.load_state_dict({"weight_ih_l0": torch.tensor(network.U), "weight_hh_l0": torch.tensor(network.W)})
    return layer


@pytest.mark.parametrize("bptt_truncate", [0, 1, 3, T - 1, T + 2])
def test_two_loop_code_and_the_block_sweep(network: SoftmaxNetwork, bptt_truncate: int) -> None:
    """A softmax network with index input: the loop over losses around a loop back in time is `Truncated`."""
    g = np.random.default_rng(1)
    x, targets, s_0 = g.integers(0, K, T), g.integers(0, K, T), g.normal(size=H)
    expected = policies.two_loops(network, x, targets, s_0, bptt_truncate)

    layer = softmax_layer(network, f"truncated:{bptt_truncate + 1}")
    start = torch.tensor(s_0)[None].requires_grad_()
    V = torch.tensor(network.V, requires_grad=True)
    s, _ = layer(one_hot(torch.tensor(x), K).double(), start)
    cross_entropy(s @ V.T, torch.tensor(targets), reduction="sum").backward()

    actual = {"U": layer.weight_ih_l0.grad, "V": V.grad, "W": layer.weight_hh_l0.grad, "s_0": start.grad[0]}
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, torch.tensor(expected[name]), rtol=1e-10, atol=1e-12)


def test_linear_network_in_closed_form() -> None:
    """lambda_t by powers of W_hh', against `scan` over h_t = W_hx x_t + W_hh h_{t-1}, o_t = W_qh h_t, a mean over T."""
    g = np.random.default_rng(2)
    W_hx, W_hh, W_qh = g.normal(size=(H, 3)), 0.5 * g.normal(size=(H, H)), g.normal(size=(2, H))
    x, y = g.normal(size=(T, 3)), g.normal(size=(T, 2))
    weights = [torch.tensor(w, requires_grad=True) for w in (W_hx, W_hh, W_qh)]
    nudges = torch.zeros(T, H, dtype=torch.float64, requires_grad=True)  # added to h_t: their gradient is lambda_t

    def step(h: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = weights[0] @ inputs[0] + weights[1] @ h + inputs[1]
        return h, weights[2] @ h

    _, o = bptt.scan(step, torch.zeros(H, dtype=torch.float64), (torch.tensor(x), nudges))
    loss = 0.5 * (o - torch.tensor(y)).square().sum(1).mean()
    d_hx, d_hh, d_qh, adjoints = torch.autograd.grad(loss, [*weights, nudges])

    h, outputs = linear.forward(x, np.zeros(H), W_hx, W_hh, W_qh)
    dL_do = linear.output_errors(outputs - y)  # step 1
    lam = linear.state_adjoints_by_powers(dL_do, W_hh, W_qh)  # step 3
    expected = [*linear.hidden_weights(lam, x, h, np.zeros(H)), linear.output_weights(dL_do, h), lam]  # steps 4 and 2
    for gradient, by_hand in zip([d_hx, d_hh, d_qh, adjoints], expected, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(by_hand), rtol=1e-10, atol=1e-12)
