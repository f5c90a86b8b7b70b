"""Chapter 3: the simple RNN against torch and finite differences; the softmax network with index input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bptt.equations import recurrence, rnn

from .numeric import Array, build, central, close, complex_step, data, generator, losses_of, torch_gradients

KINDS = list(rnn.ACTIVATIONS)


@pytest.mark.parametrize("name", KINDS)
def test_every_gradient_by_finite_differences(name: str) -> None:
    cell = build(name)
    x, h_0, dy, dh_T = data(cell)
    got = rnn.adjoint(cell, x, h_0, dy, dh_T)
    e = recurrence.local_error(cell, dy, dh_T)
    for key, (function, at) in losses_of(cell, x, h_0, e).items():
        close(got["h_0" if key == "s_0" else key], central(function, at), 1e-7)
        close(got["h_0" if key == "s_0" else key], complex_step(function, at))


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_every_output_by_torch(name: str) -> None:
    cell = build(name, I=3, H=5)
    x, h_0, dy, dh_T = data(cell, T=7, B=3)
    expected = torch_gradients(name, cell, x, h_0, dy, dh_T)
    states, _ = recurrence.run(cell, x, h_0)
    close(states, expected.pop("y"))
    close(states[-1], expected.pop("final"))
    got = rnn.adjoint(cell, x, h_0, dy, dh_T)
    for key in expected:
        close(got["h_0" if key == "s_0" else key], expected[key])


@pytest.mark.parametrize("name", ["sigmoid", "identity"])
def test_what_torch_has_no_layer_for_by_autograd(name: str) -> None:
    cell = build(name)
    x, h_0, dy, dh_T = data(cell)
    phi = {"sigmoid": torch.sigmoid, "identity": torch.clone}[name]
    w = {key: torch.from_numpy(value).requires_grad_() for key, value in recurrence.weights(cell).items()}
    x_t, initial = torch.from_numpy(x).requires_grad_(), torch.from_numpy(h_0).requires_grad_()
    h, states = initial, []
    for t in range(len(x)):
        h = phi(x_t[t] @ w["W_ih"].T + w["b_ih"] + h @ w["W_hh"].T + w["b_hh"])
        states.append(h)
    loss = (torch.stack(states) * torch.from_numpy(dy)).sum() + (h * torch.from_numpy(dh_T)).sum()
    grads = torch.autograd.grad(loss, [x_t, initial, *w.values(), *states])
    got = rnn.adjoint(cell, x, h_0, dy, dh_T)
    for key, g in zip(["x", "h_0", *w], grads, strict=False):
        close(got[key], g.numpy())
    close(got["lambda"], np.array([g.numpy() for g in grads[2 + len(w) :]]))


def test_sigmoid_neither_overflows_nor_leaves_its_range() -> None:
    a = np.array([-1e4, -30.0, 0.0, 30.0, 1e4])
    close(rnn.sigmoid(a), torch.sigmoid(torch.from_numpy(a)).numpy())


def network(activation: str = "tanh", K: int = 6, H: int = 4) -> tuple[rnn.SoftmaxNetwork, Array, Array, Array]:
    rng = generator()
    net = rnn.SoftmaxNetwork(
        rng.normal(size=(H, K)), rng.normal(size=(K, H)), rng.normal(size=(H, H)), activation=activation
    )
    return net, np.array([3, 1, 0, 1, 5, 2]), np.array([1, 0, 1, 5, 2, 4]), rng.normal(size=H)


@pytest.mark.parametrize("activation", KINDS)
def test_softmax_network_by_finite_differences(activation: str) -> None:
    net, x, targets, s_0 = network(activation)
    got = net.gradients(x, targets, s_0)
    close(got["s_0"], central(lambda z: net.loss(x, targets, z), s_0), 1e-6)
    for name in "UVW":
        numeric = central(lambda z, name=name: replace(net, **{name: z}).loss(x, targets, s_0), getattr(net, name))
        close(got[name], numeric, 1e-6)


def test_softmax_network_by_torch() -> None:
    net, x, targets, s_0 = network()
    U, V, W, s = (torch.from_numpy(z).requires_grad_() for z in (net.U, net.V, net.W, s_0))
    loss, state = torch.zeros((), dtype=torch.float64), s
    for index, target in zip(x, targets, strict=True):
        state = torch.tanh(U[:, index] + W @ state)
        loss = loss - torch.log_softmax(V @ state, 0)[target]
    close(np.array(net.loss(x, targets, s_0)), loss.detach().numpy())
    got = net.gradients(x, targets, s_0)
    for name, g in zip(["U", "V", "W", "s_0"], torch.autograd.grad(loss, [U, V, W, s]), strict=True):
        close(got[name], g.numpy())


def test_softmax_network_has_one_output_for_each_input_and_sums_its_losses() -> None:
    net, x, targets, s_0 = network()
    s, y = net.forward(x, s_0)
    assert s.shape == (6, 4)
    assert y.shape == (6, 6)
    close(y.sum(1), np.ones(6))
    each = [-np.log(y[t, targets[t]]) for t in range(6)]
    assert net.loss(x, targets, s_0) == pytest.approx(sum(each), rel=1e-12)


def test_index_input_is_one_hot_input() -> None:
    net, x, targets, s_0 = network()
    s, y = net.forward(x, s_0)
    cell = rnn.RNN(net.U, net.W, np.zeros(4), np.zeros(4))
    one_hot = np.eye(6)[x][:, None]
    close(recurrence.run(cell, one_hot, s_0[None])[0][:, 0], s)
    e = ((y - np.eye(6)[targets]) @ net.V)[:, None]
    same, got = recurrence.adjoint(cell, one_hot, s_0[None], e), net.gradients(x, targets, s_0)
    close(same["W_ih"], got["U"])
    close(same["W_hh"], got["W"])
    close(same["s_0"][0], got["s_0"])
