"""Chapter 6, first half: the block sweep against sums over pairs, frozen states, two loops and forward mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bptt
from bptt.equations import chain, policies, recurrence, rnn

from .numeric import CELLS, Array, build, close, complex_step, data, generator, losses_of

T, B = 7, 2
ANALYTIC = [name for name in CELLS if name != "relu"]
BLOCKS = {
    "full": policies.blocks(T, T, T),
    "chunked:3": policies.chunks(T, 3),
    "truncated:3": policies.blocks(T, 3, 1),
    "truncated:3/3": policies.blocks(T, 3, 3),
    "truncated:4/3": policies.blocks(T, 4, 3),
    "truncated:1": policies.blocks(T, 1, 1),
}
RESETS = np.array([[0, 1], [0, 0], [1, 0], [0, 0], [1, 1], [0, 0], [0, 0]], dtype=bool)


def prepared(name: str) -> tuple[Any, Array, Array, Array]:
    cell = build(name)
    x, s_0, dy, ds_T = data(cell, T, B)
    return cell, x, s_0, recurrence.local_error(cell, dy, ds_T)


def random_xi() -> Array:
    xi = generator(4).choice([0.0, 1.6], size=(T, B))
    xi[0] = 1
    return xi


def frozen(cell: Any, x: Array, s_0: Array, e: Array, blocks: list[policies.Block], resets: Array | None) -> dict:
    """The definition: each block's loss, restarted at its earliest step from a state that is held constant."""
    states, _ = recurrence.run(cell, x, s_0, resets)
    out = {name: np.zeros_like(at) for name, (_, at) in losses_of(cell, x, s_0, e).items()}
    for earliest, first, last in blocks:
        steps = slice(earliest, last + 1)
        own = np.where((np.arange(T) >= first)[:, None, None], e, 0)[steps]
        cut = None if resets is None else resets[steps]

        def part(
            cell: Any,
            x: Array,
            s_0: Array,
            earliest: int = earliest,
            steps: slice = steps,
            own: Any = own,
            cut: Any = cut,
        ) -> Any:
            initial = s_0 if earliest == 0 else states[earliest - 1]
            return (recurrence.run(cell, x[steps], initial, cut)[0] * own).sum()

        out["x"] += complex_step(lambda z, part=part: part(cell, z, s_0), x)
        if earliest == 0:
            out["s_0"] += complex_step(lambda z, part=part: part(cell, x, z), s_0)
        for name, value in recurrence.weights(cell).items():
            out[name] += complex_step(lambda z, part=part, name=name: part(replace(cell, **{name: z}), x, s_0), value)
    return out


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm_proj"])
def test_a_block_sees_a_constant_before_its_earliest_step(name: str, blocks: str) -> None:
    cell, x, s_0, e = prepared(name)
    got = policies.sweep(cell, x, s_0, e, BLOCKS[blocks])
    for key, expected in frozen(cell, x, s_0, e, BLOCKS[blocks], None).items():
        close(got[key], expected)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_same_with_resets(blocks: str) -> None:
    cell, x, s_0, e = prepared("gru")
    got = policies.sweep(cell, x, s_0, e, BLOCKS[blocks], resets=RESETS)
    for key, expected in frozen(cell, x, s_0, e, BLOCKS[blocks], RESETS).items():
        close(got[key], expected)
    np.testing.assert_array_equal(got["s_0"][1], 0)


@pytest.mark.parametrize("name", CELLS)
def test_one_block_is_the_full_adjoint(name: str) -> None:
    cell, x, s_0, e = prepared(name)
    got = policies.sweep(cell, x, s_0, e, BLOCKS["full"])
    for key, expected in recurrence.adjoint(cell, x, s_0, e).items():
        close(got[key], expected)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", CELLS)
def test_sweep_is_the_sum_over_the_pairs_a_policy_admits(name: str, blocks: str) -> None:
    cell, x, s_0, e = prepared(name)
    got = policies.sweep(cell, x, s_0, e, BLOCKS[blocks])
    earliest = {t: block[0] for block in BLOCKS[blocks] for t in range(block[1], block[2] + 1)}
    S, weights = cell.state_size, recurrence.weights(cell)
    total = np.zeros(sum(w.size for w in weights.values()))
    ds_0 = np.zeros_like(s_0)
    for b in range(B):
        J, immediate = np.zeros((T, S, S)), np.zeros((T, S, total.size))
        for t in range(T):
            before = s_0[b] if t == 0 else got["states"][t - 1, b]
            _, J[t], parts = recurrence.partials(cell, x[t, b], before)
            immediate[t] = np.concatenate([part.reshape(S, -1) for part in parts.values()], axis=1)
        C = chain.pair_contributions(e[:, b], J, immediate)
        total += sum(C[t, k] for t in range(T) for k in range(earliest[t], t + 1))
        ds_0[b] = sum(e[t, b] @ chain.product(J, 0, t) @ J[0] for t in range(T) if earliest[t] == 0)
    close(np.concatenate([got[name].ravel() for name in weights]), total)
    close(got["s_0"], ds_0)


@pytest.mark.parametrize("case", ["plain", "resets", "xi", "both"])
@pytest.mark.parametrize("name", CELLS)
def test_forward_mode_is_the_adjoint(name: str, case: str) -> None:
    cell, x, s_0, e = prepared(name)
    xi = random_xi() if case in ("xi", "both") else None
    resets = RESETS if case in ("resets", "both") else None
    got = policies.sweep(cell, x, s_0, e, BLOCKS["full"], xi, resets)
    for key, expected in policies.forward_mode(cell, x, s_0, e, xi, resets).items():
        close(got[key], expected)


@pytest.mark.parametrize("name", ANALYTIC)
def test_resets_by_differentiating_the_forward_pass(name: str) -> None:
    cell, x, s_0, e = prepared(name)
    got = policies.sweep(cell, x, s_0, e, BLOCKS["full"], resets=RESETS)
    for key, (function, at) in losses_of(cell, x, s_0, e, RESETS).items():
        close(got[key], complex_step(function, at))


def test_a_reset_starts_a_new_sequence() -> None:
    cell, x, s_0, e = prepared("lstm")
    resets = np.zeros((T, B), dtype=bool)
    resets[3] = True
    got = policies.sweep(cell, x, s_0, e, BLOCKS["full"], resets=resets)
    early = recurrence.adjoint(cell, x[:3], s_0, e[:3])
    late = recurrence.adjoint(cell, x[3:], np.zeros_like(s_0), e[3:])
    close(got["x"], np.concatenate([early["x"], late["x"]]))
    close(got["s_0"], early["s_0"])
    close(got["W_hh"], early["W_hh"] + late["W_hh"])


@pytest.mark.parametrize("length", [1, 2, 5, 7, 12])
def test_blocks_are_the_policies_own(length: int) -> None:
    def of(policy: bptt.policies.Policy) -> list[tuple[int, int, int]]:
        return policy.reach(length).blocks(length)

    assert of(bptt.Full()) == policies.blocks(length, length, length)
    for k in (1, 2, 3, 5, 9):
        assert of(bptt.Chunked(k)) == policies.chunks(length, k)
        for every in range(1, k + 1):
            if k < length:
                assert of(bptt.Truncated(k, every=every)) == policies.blocks(length, k, every)
            else:
                assert of(bptt.Truncated(k, every=every)) == policies.blocks(length, length, length)


def test_a_window_that_covers_everything_is_full() -> None:
    cell, x, s_0, e = prepared("gru")
    full = policies.sweep(cell, x, s_0, e, BLOCKS["full"])
    for every in (1, 2, 5, T):
        got = policies.sweep(cell, x, s_0, e, policies.blocks(T, T + 3, every))
        for key, expected in full.items():
            close(got[key], expected)


def test_chunked_is_detach_every_k_steps() -> None:
    cell, x, s_0, e = prepared("lstm")
    got = policies.sweep(cell, x, s_0, e, policies.chunks(T, 3))
    cut = np.ones((T, B))
    cut[3::3] = 0
    same = policies.sweep(cell, x, s_0, e, BLOCKS["full"], xi=cut)
    for key, expected in same.items():
        close(got[key], expected)


def test_chunked_and_truncated_differ_in_a_shorter_last_block_only() -> None:
    assert policies.chunks(6, 3) == policies.blocks(6, 3, 3)
    assert policies.chunks(7, 3)[:-1] == policies.blocks(7, 3, 3)[:-1]
    assert policies.chunks(7, 3)[-1] == (6, 6, 6)
    assert policies.blocks(7, 3, 3)[-1] == (4, 6, 6)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_chunked_sees_lag_d_from_a_share_1_minus_d_over_k_of_the_losses(k: int) -> None:
    earliest = {t: a for a, first, last in policies.chunks(12, k) for t in range(first, last + 1)}
    for d in range(6):
        seen = sum(t - d >= earliest[t] for t in range(12))
        assert seen / 12 == pytest.approx(max(0, 1 - d / k))


def softmax_case() -> tuple[rnn.SoftmaxNetwork, Array, Array, Array]:
    rng = generator()
    net = rnn.SoftmaxNetwork(rng.normal(size=(4, 6)), rng.normal(size=(6, 4)), rng.normal(size=(4, 4)))
    return net, rng.integers(0, 6, T), rng.integers(0, 6, T), rng.normal(size=4)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 9])
def test_two_loops_are_the_sweep_with_every_1(k: int) -> None:
    net, x, targets, s_0 = softmax_case()
    _, y = net.forward(x, s_0)
    cell = rnn.RNN(net.U, net.W, np.zeros(4), np.zeros(4))
    e = ((y - np.eye(6)[targets]) @ net.V)[:, None]
    swept = policies.sweep(cell, np.eye(6)[x][:, None], s_0[None], e, policies.blocks(T, k, 1))
    looped = policies.two_loops(net, x, targets, s_0, bptt_truncate=k - 1)
    close(looped["U"], swept["W_ih"])
    close(looped["W"], swept["W_hh"])
    np.testing.assert_allclose(looped["s_0"], swept["s_0"][0], rtol=1e-10, atol=1e-14)
    close(looped["V"], net.gradients(x, targets, s_0)["V"])


def test_two_loops_without_truncation_are_the_full_gradient() -> None:
    net, x, targets, s_0 = softmax_case()
    looped = policies.two_loops(net, x, targets, s_0, bptt_truncate=T)
    for name, expected in net.gradients(x, targets, s_0).items():
        close(looped[name], expected)


def test_two_loops_visit_bptt_truncate_plus_1_steps() -> None:
    net, x, targets, s_0 = softmax_case()
    x = np.arange(T) % 6  # a column of U for each of the six latest steps
    only_last = np.full(T, targets[0])
    for bptt_truncate in range(5):
        longer = policies.two_loops(net, x, only_last, s_0, bptt_truncate)["U"]
        shorter = policies.two_loops(net, x[:-1], only_last[:-1], s_0, bptt_truncate)["U"]
        touched = np.flatnonzero(np.abs(longer - shorter).max(0) > 1e-12)
        assert len(touched) == bptt_truncate + 1
        assert sorted(touched) == sorted(x[T - 1 - bptt_truncate :])


def test_xi_of_the_first_edge_must_be_1() -> None:
    with pytest.raises(ValueError, match=r"xi\[0\] must be 1"):
        policies.edge_factors(2, 1, xi=np.array([[0.0], [1.0]]))


X = generator(9).normal(size=6)
PLAIN = {
    "full": policies.blocks(6, 6, 6),
    "chunked:2": policies.chunks(6, 2),
    "truncated:3/2": policies.blocks(6, 3, 2),
}


@pytest.mark.parametrize("policy", PLAIN)
def test_first_and_second_derivative_along_the_graph(policy: str) -> None:
    """(6.21) and (6.22) against autograd through the layer, which differentiates its first gradient again."""
    layer = bptt.nn.RNN(1, 1, bias=False, gradient=policy, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight_hh_l0, 1.3)
    torch.nn.init.ones_(layer.weight_ih_l0)
    y, _ = layer(torch.tensor(X)[:, None, None], torch.full((1, 1, 1), 0.4, dtype=torch.float64))
    (first,) = torch.autograd.grad(y.pow(3).sum() / 3, layer.weight_hh_l0, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.weight_hh_l0)
    close(np.array([first.item(), second.item()]), np.array(policies.graph_derivatives(1.3, X, 0.4, PLAIN[policy])))


def test_the_exact_gradient_has_its_own_derivative() -> None:
    def first(w: float) -> float:
        return policies.graph_derivatives(w, X, 0.4, PLAIN["full"])[0]

    second = policies.graph_derivatives(1.3, X, 0.4, PLAIN["full"])[1]
    assert (first(1.3 + 1e-5) - first(1.3 - 1e-5)) / 2e-5 == pytest.approx(second, rel=1e-8)


def test_a_cut_graph_is_not_the_derivative_of_its_first_gradient() -> None:
    """What moves the states before a cut is held constant there."""

    def first(w: float) -> float:
        return policies.graph_derivatives(w, X, 0.4, PLAIN["chunked:2"])[0]

    second = policies.graph_derivatives(1.3, X, 0.4, PLAIN["chunked:2"])[1]
    assert abs((first(1.3 + 1e-5) - first(1.3 - 1e-5)) / 2e-5 - second) > 0.1 * abs(second)


@pytest.mark.parametrize("k", [1, 3])
def test_edge_factors_scale_every_order(k: int) -> None:
    """(6.20): factors of 0 at the edges into a chunk are the chunks."""
    xi = np.ones(6)
    xi[k::k] = 0
    cut = policies.graph_derivatives(1.3, X, 0.4, policies.blocks(6, 6, 6), xi)
    close(np.array(cut), np.array(policies.graph_derivatives(1.3, X, 0.4, policies.chunks(6, k))))
