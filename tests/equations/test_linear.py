"""Chapter 2: steps 1 to 4 of the linear RNN, by recursion, by powers, by eigenvalues, by torch."""

from __future__ import annotations

import numpy as np
import torch

from bptt.equations import linear, recurrence, rnn

from .numeric import Array, central, close, generator

T, D, H, Q = 6, 2, 3, 4


def case() -> dict[str, Array]:
    rng = generator()
    shapes = {"x": (T, D), "h_0": (H,), "W_hx": (H, D), "W_hh": (H, H), "W_qh": (Q, H), "y": (T, Q)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def gradients(c: dict[str, Array]) -> dict[str, Array]:
    h, o = linear.forward(c["x"], c["h_0"], c["W_hx"], c["W_hh"], c["W_qh"])
    dL_do = linear.output_errors(o - c["y"])
    lam = linear.state_adjoints(dL_do, c["W_hh"], c["W_qh"])
    dW_hx, dW_hh = linear.hidden_weights(lam, c["x"], h, c["h_0"])
    return {"dL_do": dL_do, "lam": lam, "W_qh": linear.output_weights(dL_do, h), "W_hx": dW_hx, "W_hh": dW_hh}


def test_weights_by_finite_differences() -> None:
    c = case()
    got = gradients(c)
    for name in ("W_hx", "W_hh", "W_qh"):

        def loss(z: Array, name: str = name) -> float:
            d = c | {name: z}
            _, o = linear.forward(d["x"], d["h_0"], d["W_hx"], d["W_hh"], d["W_qh"])
            return linear.mean_loss(o, d["y"])

        close(got[name], central(loss, c[name]), 1e-7)


def test_every_step_by_torch() -> None:
    c = case()
    z = {name: torch.from_numpy(value).requires_grad_() for name, value in c.items()}
    h, states, outputs = z["h_0"], [], []
    for t in range(T):
        h = z["W_hx"] @ z["x"][t] + z["W_hh"] @ h
        states.append(h)
        outputs.append(z["W_qh"] @ h)
    loss = sum(((o - y) ** 2).sum() / 2 for o, y in zip(outputs, z["y"], strict=True)) / T
    names = ["W_qh", "W_hx", "W_hh"]
    grads = torch.autograd.grad(loss, [*outputs, *states, *(z[name] for name in names)])
    got = gradients(c)
    close(got["dL_do"], np.array([g.numpy() for g in grads[:T]]))
    close(got["lam"], np.array([g.numpy() for g in grads[T : 2 * T]]))
    for name, g in zip(names, grads[2 * T :], strict=True):
        close(got[name], g.numpy())


def test_closed_forms_are_the_recursion() -> None:
    c = case()
    dL_do = gradients(c)["dL_do"]
    lam = linear.state_adjoints(dL_do, c["W_hh"], c["W_qh"])
    close(linear.state_adjoints_by_powers(dL_do, c["W_hh"], c["W_qh"]), lam)
    close(linear.state_adjoints_by_eigenvalues(dL_do, c["W_hh"], c["W_qh"]), lam)
    for t in range(T):  # the same sum with the textbook's index i, counted from 1
        i_form = sum(
            np.linalg.matrix_power(c["W_hh"].T, T - i) @ c["W_qh"].T @ dL_do[T + (t + 1) - i - 1]
            for i in range(t + 1, T + 1)
        )
        close(lam[t], i_form)


def test_it_is_the_identity_rnn() -> None:
    c = case()
    got = gradients(c)
    cell = rnn.RNN(c["W_hx"], c["W_hh"], np.zeros(H), np.zeros(H), "identity")
    e = (got["dL_do"] @ c["W_qh"])[:, None]
    same = recurrence.adjoint(cell, c["x"][:, None], c["h_0"][None], e)
    close(same["lambda"][:, 0], got["lam"])
    close(same["W_ih"], got["W_hx"])
    close(same["W_hh"], got["W_hh"])


def test_magnitude_of_eigenvalues_decides_not_their_sign() -> None:
    steps = 60
    dL_do = np.zeros((steps, 1))
    dL_do[-1] = 1
    for mu, explodes in ((-1.1, True), (1.1, True), (-0.9, False), (0.9, False)):
        lam = linear.state_adjoints(dL_do, np.array([[mu]]), np.eye(1))
        close(np.abs(lam[0]), np.array([abs(mu) ** (steps - 1)]))
        assert (np.abs(lam[0, 0]) > 100) == explodes
        assert (np.abs(lam[0, 0]) < 0.01) != explodes


def test_rotation_with_complex_eigenvalues_keeps_the_norm() -> None:
    angle = 0.3
    W = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    dL_do = np.zeros((200, 2))
    dL_do[-1] = [3, 4]
    close(np.linalg.norm(linear.state_adjoints(dL_do, W, np.eye(2)), axis=1), np.full(200, 5.0))


def test_the_loss_is_a_mean_and_the_other_notes_take_a_sum() -> None:
    c = case()
    _, o = linear.forward(c["x"], c["h_0"], c["W_hx"], c["W_hh"], c["W_qh"])
    close(linear.output_errors(o - c["y"]) * T, o - c["y"])
    close(np.array(linear.mean_loss(o, c["y"]) * T), np.array(np.sum((o - c["y"]) ** 2) / 2))
