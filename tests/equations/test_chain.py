"""Chapter 1, first half: shared factors, the recursion and its expansion, pairs, the nested example."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bptt.equations import chain

from .numeric import central, close, generator


def layers(n: int = 4) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = generator()
    sizes = [3, 4, 2, 5, 3][: n + 1]
    return (
        [rng.normal(size=(b, a)) for a, b in pairwise(sizes)],
        rng.normal(size=3),
        rng.normal(size=3),
    )


def recurrence(T: int = 6, H: int = 3, N: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = generator()
    return rng.normal(size=(T, H)), rng.normal(size=(T, H, H)), rng.normal(size=(T, H, N))


def test_perceptron_gradients_by_finite_differences() -> None:
    weights, x, target = layers()
    gradients, _ = chain.perceptron_gradients(weights, x, target)
    for i, W in enumerate(weights):

        def error(V: np.ndarray, i: int = i) -> float:
            z = chain.perceptron_forward([*weights[:i], V, *weights[i + 1 :]], x)[-1]
            return float(np.sum((z - target) ** 2) / 2)

        close(gradients[i], central(error, W), 1e-7)


def test_shared_factors_are_computed_once() -> None:
    weights, x, target = layers()
    shared, few = chain.perceptron_gradients(weights, x, target)
    unshared, many = chain.perceptron_gradients_unshared(weights, x, target)
    for a, b in zip(shared, unshared, strict=True):
        close(a, b)
    n = len(weights)
    assert (few, many) == (n - 1, n * (n - 1) // 2)


def test_update_descends() -> None:
    weights, x, target = layers()
    gradients, _ = chain.perceptron_gradients(weights, x, target)

    def error(w: list[np.ndarray]) -> float:
        return float(np.sum((chain.perceptron_forward(w, x)[-1] - target) ** 2) / 2)

    moved = [chain.update(W, g, 1e-3) for W, g in zip(weights, gradients, strict=True)]
    fall = 1e-3 * sum(float(np.sum(g * g)) for g in gradients)
    assert error(weights) - error(moved) == pytest.approx(fall, rel=1e-2)


def test_recursion_is_the_expanded_sum() -> None:
    _, J, b = recurrence()
    close(chain.by_recursion(b, J), chain.by_expansion(b, J))


def test_recursion_is_the_expanded_sum_for_scalars() -> None:
    rng = generator()
    b, c = rng.normal(size=5), rng.normal(size=5)
    a = chain.by_recursion(b.reshape(5, 1, 1), c.reshape(5, 1, 1)).ravel()
    expanded = [b[t] + sum(np.prod(c[i + 1 : t + 1]) * b[i] for i in range(t)) for t in range(5)]
    close(a, np.array(expanded))


def test_later_factors_stand_on_the_left() -> None:
    _, J, _ = recurrence()
    close(chain.product(J, 1, 4), J[4] @ J[3] @ J[2])
    np.testing.assert_array_equal(chain.product(J, 2, 2), np.eye(3))
    assert np.abs(chain.product(J, 1, 4) - J[2] @ J[3] @ J[4]).max() > 0.1


def test_pairs_add_up_to_the_gradient() -> None:
    e, J, b = recurrence()
    C = chain.pair_contributions(e, J, b)
    a = chain.by_recursion(b, J)
    close(C.sum((0, 1)), sum(e[t] @ a[t] for t in range(len(e))))
    for t in range(len(e)):
        close(C[t].sum(0), e[t] @ a[t])
        np.testing.assert_array_equal(C[t, t + 1 :], 0)
        for k in range(t + 1):
            close(C[t, k], e[t] @ chain.product(J, k, t) @ b[k])


def test_lags_add_up_to_the_gradient() -> None:
    C = chain.pair_contributions(*recurrence())
    S = chain.by_lag(C)
    close(S.sum(0), C.sum((0, 1)))
    close(S[0], sum(C[t, t] for t in range(len(C))))
    close(S[-1], C[-1, 0])


def test_nested_example_is_exact() -> None:
    assert chain.nested() == (1092984520681.0, 12926834988414.0)
    value, derivative = 1, 0
    for _ in range(4):
        value, derivative = (1 + 2 * value) ** 2, 2 * (1 + 2 * value) * (value + 2 * derivative)
    assert chain.nested() == (value, derivative)


def test_nested_example_by_expansion() -> None:
    value, b, J = 1.0, [], []
    for _ in range(4):
        b.append(2 * value * (1 + 2 * value))
        J.append(4 * (1 + 2 * value))
        value = (1 + 2 * value) ** 2
    a = chain.by_expansion(np.array(b).reshape(4, 1, 1), np.array(J).reshape(4, 1, 1))
    assert a[-1, 0, 0] == 12926834988414
