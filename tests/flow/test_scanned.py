"""Policies compared on a scan of any step: against closed forms, autograd with detach, and the same net as a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

import bptt
from bptt.equations import randomized
from bptt.flow import Comparison, Scanned, compare, conclusion, scanned
from bptt.flow._allocations import peak_bytes

F64 = torch.float64


def linear(a: float, T: int, loss: Callable[[Any, Any], Tensor], **options: Any) -> Scanned:
    """h_t = a h_{t-1} + b: dh_t/db is the sum of a^k over the steps that the gradient reaches."""
    b = torch.ones((), dtype=F64, requires_grad=True)

    def step(h: Tensor, _: None) -> tuple[Tensor, Tensor]:
        h = a * h + b
        return h, h

    return scanned(step, torch.zeros((), dtype=F64), loss=loss, length=T, **options)


def last(carry: Any, ys: Any) -> Tensor:
    return carry.sum()


def geometric(a: float, n: int) -> float:
    return sum(a**k for k in range(n))


def biases(found: Comparison) -> dict[str, float]:
    return {row.policy: row.bias for row in found.rows}


@pytest.mark.parametrize("a", [0.5, 0.9, -0.8])
def test_the_bias_of_a_linear_step_is_its_closed_form(a: float):
    T = 14
    windows = (1, 2, 5, 13)
    texts = [f"truncated:{k}" for k in windows] + [f"chunked:{k}" for k in windows]
    found = biases(compare(linear(a, T, last), policies=texts))
    full = geometric(a, T)
    for k in windows:
        assert_allclose(found[f"truncated:{k}"], abs(1 - geometric(a, k) / full), rtol=1e-12)
        reached = T - (T - 1) // k * k  # of the last chunk
        assert_allclose(found[f"chunked:{k}"], abs(1 - geometric(a, reached) / full), rtol=1e-12)
    assert found["full"] == 0


def test_losses_at_every_step():
    a, T, k = 0.7, 10, 3
    found = biases(compare(linear(a, T, lambda carry, ys: ys.sum()), policies=[f"truncated:{k}"]))
    full = sum(geometric(a, t + 1) for t in range(T))
    cut = sum(geometric(a, min(t + 1, k)) for t in range(T))
    assert_allclose(found[f"truncated:{k}"], 1 - cut / full, rtol=1e-12)


def test_the_variance_is_the_recursions_and_its_limit_shows():
    a, p, T = 0.7, 0.6, 10
    found = compare(linear(a, T, last), policies=[f"randomized:{p}"])
    row = found.rows[0]
    assert (row.exact, row.draws) == (True, 2 ** (T - 1))
    assert row.bias < 1e-12
    mean, moment = randomized.second_moments(np.ones((T, 1)), np.full((T, 1, 1), a), p)
    assert_allclose(row.variance, moment[-1, 0, 0] / mean[-1, 0] ** 2 - 1, rtol=1e-12)
    assert_allclose([found.contraction, found.critical_p], [a, a * a], rtol=1e-9)


@pytest.mark.parametrize("loss", [last, lambda carry, ys: ys.sum(), lambda carry, ys: ys[5] + carry])
def test_contraction_is_that_of_the_carry(loss: Callable[[Any, Any], Tensor]):
    assert_allclose(compare(linear(0.8, 40, loss), policies="full").contraction, 0.8, rtol=1e-9)


def looped(T: int = 9) -> tuple[Scanned, torch.nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """A block run T times with the input given each time, and a loss on what comes out last."""
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    x, target = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)

    def iterate(h: Tensor, _: Any) -> tuple[Tensor, None]:
        return h + 0.5 * block(torch.cat([h, x], -1)), None

    def loss(h: Tensor) -> Tensor:
        return (h - target).square().mean()

    of = scanned(iterate, torch.zeros_like(x), loss=lambda h, _: loss(h), length=T, gradient="truncated:4")
    return of, block, x, loss


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_a_looped_block_is_autograd_with_the_first_iterations_detached(k: int):
    T = 9
    of, block, x, loss = looped(T)
    found = compare(of, policies=["full", f"truncated:{k}"])

    def by_hand(k: int) -> Tensor:
        h = torch.zeros_like(x)
        for t in range(T):
            h = h.detach() if t <= T - k else h  # before the last k iterations, and between those before them
            h = h + 0.5 * block(torch.cat([h, x], -1))
        grads = torch.autograd.grad(loss(h), of.parameters)
        return torch.cat([g.flatten() for g in grads])

    full, cut = by_hand(T), by_hand(k)
    assert {id(p) for p in of.parameters} == {id(p) for p in block.parameters()}
    assert_allclose(found.full_norm, full.norm().item(), rtol=1e-12)
    assert_allclose(of.vector(bptt.Truncated(k)).numpy(), cut.numpy(), rtol=1e-10, atol=1e-14)
    assert_allclose(biases(found)[f"truncated:{k}"], ((cut - full).norm() / full.norm()).item(), rtol=1e-9)
    assert found.own == "truncated:4"
    assert found.trained_with is found.rows[-1 if k != 4 else 1]
    assert found.layer == "scan of looped.<locals>.iterate"
    assert (found.T, found.B) == (9, 3)


def test_a_looped_block_gets_a_sentence_and_a_picture():
    found = compare(looped()[0], policies=["full", "chunked:3"])
    assert all(row.bytes > 0 and row.time.samples >= 5 for row in found.rows)
    assert "full" in conclusion(found)
    pytest.importorskip("matplotlib")
    labels = [t.get_text() for t in bptt.plots.comparison(found).axes[0].get_yticklabels()]
    assert "truncated:4 *" in labels


@pytest.mark.parametrize("policy", ["chunked:3", "truncated:2", "truncated:4/2", "randomized:0.6"])
def test_a_scan_agrees_with_the_layer(policy: str):
    layer, x = bptt.nn.RNN(2, 3, dtype=F64), torch.randn(6, 1, 2, dtype=F64)
    W, R, b, c = layer.parameters()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ W.T + b + h @ R.T + c)
        return h, h

    of = scanned(step, torch.zeros(1, 3, dtype=F64), x, lambda h, ys: ys.pow(3).sum() + h.sum())
    one = compare(of, policies=[policy]).rows[0]
    recording = bptt.flow.record(Both(layer), x, lambda both: both[0].pow(3).sum() + both[1].sum())
    other = compare(recording, policies=[policy]).rows[0]
    assert (one.exact, one.draws) == (other.exact, other.draws)
    assert_allclose(
        [one.bias, one.variance, one.cosine], [other.bias, other.variance, other.cosine], rtol=1e-9, atol=1e-12
    )


class Both(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def test_every_lane_draws_for_itself():
    b = torch.ones((), dtype=F64, requires_grad=True)
    T, a, p = 4, 0.5, 0.7
    of = scanned(lambda h, _: (a * h + b, None), torch.zeros(2, dtype=F64), loss=last, length=T)
    row = compare(of, policies=[f"randomized:{p}"]).rows[0]
    assert (of.B, row.draws) == (2, 2 ** (2 * (T - 1)))
    mean, moment = randomized.second_moments(np.ones((T, 1)), np.full((T, 1, 1), a), p)
    one = moment[-1, 0, 0] - mean[-1, 0] ** 2
    assert_allclose(row.variance, 2 * one / (2 * mean[-1, 0]) ** 2, rtol=1e-10)


def test_a_long_scan_is_sampled():
    row = compare(linear(0.5, 60, last), policies=["randomized:0.8"], draws=300).rows[0]
    mean, variance = randomized.scalar_chain(0.5, 0.8)
    assert not row.exact
    assert abs(row.variance - variance / mean**2) < 4 * row.variance_error
    assert row.bias < 3 * row.bias_error


def test_the_random_numbers_of_a_step_are_the_same_under_every_policy():
    w = torch.randn(5, dtype=F64, requires_grad=True)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.nn.functional.dropout(torch.tanh(w * h + x), 0.5)
        return h, h

    state = torch.get_rng_state()
    of = scanned(step, torch.zeros(5, dtype=F64), torch.randn(8, 5, dtype=F64), lambda h, ys: ys.sum())
    drawn = torch.get_rng_state()
    found = compare(of, policies=["full", "truncated:8", "chunked:2"])
    assert found.rows[0].bias == 0
    assert found.rows[1].bias < 1e-14
    assert found.rows[2].bias > 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn)  # the x of the test
    assert w.grad is None


def test_leaves_beside_the_step_have_their_gradient_too():
    """What is learned before the scan, as an encoder or a first carry, is cut off by a window as well."""
    a, T = 0.5, 6
    first, scale = (torch.ones((), dtype=F64, requires_grad=True) for _ in range(2))
    of = scanned(lambda h, _: (a * h, None), first, loss=lambda h, _: scale * h, length=T)
    assert {id(p) for p in of.parameters} == {id(first), id(scale)}
    found = compare(of, policies=["truncated:3"])
    assert_allclose(found.full_norm, np.hypot(a**T, a**T), rtol=1e-12)
    assert_allclose(found.rows[0].bias, 1 / np.sqrt(2), rtol=1e-12)


def test_resets_and_memory_are_those_of_the_scan():
    a, T = 0.5, 12
    resets = torch.zeros(T, dtype=torch.bool)
    resets[8] = True  # four steps remain
    found = biases(compare(linear(a, T, last, resets=resets), policies=["truncated:4", "truncated:2"]))
    assert found["truncated:4"] == 0
    assert_allclose(found["truncated:2"], 1 - geometric(a, 2) / geometric(a, 4), rtol=1e-12)
    w = torch.ones(1000, dtype=F64, requires_grad=True)
    kept = {
        memory: compare(
            scanned(lambda h, _: (w * h, None), torch.ones(1000, dtype=F64), loss=last, length=64, memory=memory),
            policies="full",
        )
        for memory in ("states", "checkpoints:steps=8")
    }
    assert kept["checkpoints:steps=8"].rows[0].bytes < 0.6 * kept["states"].rows[0].bytes


def test_bad_arguments():
    h, w = torch.zeros(()), torch.ones((), requires_grad=True)
    step = lambda h, _: (w * h, h)  # noqa: E731
    with pytest.raises(TypeError, match=r"step must be a function of \(carry, x\): got int"):
        scanned(3, h, loss=last, length=4)
    with pytest.raises(TypeError, match=r"loss must be a function of \(final carry, ys\): got NoneType"):
        scanned(step, h, length=4)
    with pytest.raises(TypeError, match=r"loss must give a scalar tensor: got a tensor \[4\]"):
        scanned(step, h, loss=lambda h, ys: ys, length=4)
    with pytest.raises(TypeError, match=r"loss must give a scalar tensor: got float"):
        scanned(step, h, loss=lambda h, ys: 1.0, length=4)
    with pytest.raises(ValueError, match=r"loss must depend on a leaf tensor that requires a gradient"):
        scanned(lambda h, _: (h, h), h, loss=last, length=4)
    with pytest.raises(ValueError, match=r"xs and length must tell one number of steps"):
        scanned(step, h, loss=last)
    with pytest.raises(ValueError, match=r"gradient must be one of.*got 'half'"):
        scanned(step, h, loss=last, length=4, gradient="half")
    of = scanned(step, h, loss=last, length=4)
    with pytest.raises(ValueError, match=r"the full gradient must be finite and not 0"):
        compare(of)
    with pytest.raises(TypeError, match=r"batch and loss belong to a layer or a model"):
        compare(of, h)
    assert repr(of).startswith("Scanned(label='scan of test_bad_arguments.<locals>.<lambda>', own=Full(), T=4, B=1")


def test_bytes_are_those_of_the_steps_as_they_run():
    """What a compiled step allocates is counted in the compiled step, not in a replay of it."""
    w = torch.full((4,), 0.5, dtype=F64, requires_grad=True)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(w * h + x)
        return h, h

    def call() -> None:
        bptt.scan(step, torch.zeros(2, 4, dtype=F64), torch.zeros(30, 2, 4, dtype=F64), kernel="eager")[
            1
        ].sum().backward()

    call()
    assert peak_bytes(call) >= 30 * 2 * 4 * 8
