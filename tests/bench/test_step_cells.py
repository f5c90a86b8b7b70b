"""The steps of `STEP_CELLS`: right against their papers' equations, and through scan what a plain loop computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scan.loops import expected, floats, weighed
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bptt import Full, Truncated, nn, scan
from bptt.bench import STEP_CELLS, StepCell
from bptt.bench.step_cells import JAX_STEPS, over_time
from bptt.policies import Policy

T, B, H = 7, 3, 9
USUAL = ["lstm", "gru", "layer-norm-lstm", "leaky", "lif", "slstm", "cornn"]


@pytest.fixture(params=STEP_CELLS.values(), ids=STEP_CELLS.keys())
def cell(request: pytest.FixtureRequest) -> StepCell:
    return request.param


def sigmoid(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


def test_the_table():
    assert list(STEP_CELLS)[:7] == USUAL
    assert len(STEP_CELLS) == 17
    assert list(JAX_STEPS) == list(STEP_CELLS)
    assert all(cell.name == name and cell.source and cell.build.__doc__ for name, cell in STEP_CELLS.items())


@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
def test_scan_computes_what_a_loop_does(cell: StepCell, policy: Policy, agree: Callable[..., None]):
    step, carry, xs, captured = cell.make(B, H, torch.float64, T=T)
    carry, _ = step(carry, over_time(xs)[-1])  # from zero, nothing depends on an sLSTM's stabiliser
    carry, xs = (tree_map(lambda t: t.detach().clone().requires_grad_(), tree) for tree in (carry, xs))
    inputs = [*floats(carry), *floats(xs), *captured]
    final, ys = scan(step, carry, xs, gradient=policy)
    at, wanted = carry, []
    for x in over_time(xs):
        at, y = step(at, x)
        wanted.append(y)
    agree(ys.detach(), torch.stack(wanted).detach())
    agree(floats(tree_map(torch.detach, final)), floats(tree_map(torch.detach, at)))
    loss = torch.stack([*(weighed([y], t) for t, y in enumerate(ys)), weighed(floats(final), 1000)]).sum()
    got = torch.autograd.grad(loss, inputs, allow_unused=True)
    got = [torch.zeros_like(t) if g is None else g for g, t in zip(got, inputs, strict=True)]
    agree(got, expected((step, carry, xs, captured), policy, T))


def test_a_step_has_rows_of_its_own_and_no_state(cell: StepCell, agree: Callable[..., None]):
    step, carry, xs, _ = cell.make(B, H, torch.float64, T=2)
    first = over_time(xs)[0]
    before, y = step(carry, first)
    step(before, over_time(xs)[1])
    again, same = step(carry, first)
    agree(floats(again), floats(before))
    agree(same.detach(), y.detach())
    assert all(leaf.shape[0] == B for leaf in tree_leaves((carry, first, y)))
    changed = tree_map(lambda t: torch.cat((t[:1] + 1, t[1:])), carry)
    agree(step(changed, first)[1][1:].detach(), y[1:].detach())


def test_two_dtypes_hold_the_same_numbers(cell: StepCell):
    single, double = (cell.make(B, H, dtype, T=T) for dtype in (torch.float32, torch.float64))
    for one, other in zip(tree_leaves(single[1:]), tree_leaves(double[1:]), strict=True):
        assert (one.dtype, other.dtype) == (torch.float32, torch.float64)
        assert torch.equal(one.double(), other)
    assert not any(leaf.requires_grad for leaf in tree_leaves((single.carry, single.xs)))
    assert all(w.requires_grad and w.is_leaf for w in single.parameters)


def test_the_seed_decides_and_the_random_state_is_left_alone(cell: StepCell):
    state = torch.get_rng_state()
    one, same, other = (cell.make(2, 4, T=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    values = [torch.cat([leaf.flatten() for leaf in tree_leaves(problem.xs)]) for problem in (one, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (5, 19), (1, 32)])
def test_any_size(cell: StepCell, size: tuple[int, int]):
    step, carry, xs, parameters = cell.make(*size, T=2)
    for x in over_time(xs):
        carry, y = step(carry, x)
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"B": 0, "H": 4}, "B must be at least 1: got 0"),
        ({"B": 1, "H": -1}, "H must be at least 1: got -1"),
        ({"B": 1, "H": 4, "T": 0}, "T must be at least 1: got 0"),
        ({"B": 1, "H": 4, "dtype": torch.float16}, "dtype must be torch.float32 or torch.float64: got torch.float16"),
    ],
)
def test_bad_sizes(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        STEP_CELLS["gru"].make(**arguments)


@pytest.mark.parametrize("name", [cell.name for cell in STEP_CELLS.values() if cell.layer is not None])
def test_the_layer_computes_the_same(name: str, agree: Callable[..., None]):
    cell = STEP_CELLS[name]
    step, carry, xs, parameters = cell.make(B, H, torch.float64, T=T)
    kind: Any = nn.LAYERS[str(cell.layer)]
    layer = kind(H, H, dtype=torch.float64)
    layer.load_state_dict(dict(zip(layer.state_dict(), parameters, strict=True)))
    _, ys = scan(step, carry, xs)
    agree(ys.detach(), layer(xs)[0].detach())


def test_float32_and_float64_spike_alike():
    cell = STEP_CELLS["lif"]
    spikes = []
    for dtype in (torch.float32, torch.float64):
        step, carry, xs, _ = cell.make(16, 32, dtype, T=200)
        with torch.no_grad():
            spikes.append(scan(step, carry, xs)[1])
    assert torch.equal(spikes[0].double(), spikes[1])
    assert 0.05 < spikes[0].mean() < 0.5


def test_inputs_that_are_never_clear_of_a_jump(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bptt.bench.step_cells.cell.CLEAR", 10.0)
    with pytest.raises(RuntimeError, match=r"lif: no inputs clear of jumps in 100 drawings of \[3, 2, 4\]"):
        STEP_CELLS["lif"].make(2, 4, T=3)


# Against the equations, written again in NumPy


def numbers(name: str) -> tuple[Any, Any, Any, list[Any], Tensor]:
    """The step's carry and x as arrays, the parameters, and y of a second step, whose carry is not zero."""
    step, carry, xs, parameters = STEP_CELLS[name].make(B, H, torch.float64, T=2)
    first, second = over_time(xs)
    with torch.no_grad():
        carry, _ = step(carry, first)
        carry_after, y = step(carry, second)
    arrays = tree_map(lambda t: t.detach().numpy(), (carry, second, carry_after, parameters))
    return *arrays, y


def test_leaky_integrates_by_eulers_method():
    h, x, _, (W, U, b), y = numbers("leaky")
    np.testing.assert_allclose(y, h + 0.2 * (np.tanh(h @ W.T + x @ U.T + b) - h), rtol=1e-12)


def test_a_spike_resets_the_membrane():
    (v, s), x, (after, _), (W, R), y = numbers("lif")
    assert s.any()
    np.testing.assert_allclose(after, np.where(s > 0, 0, 0.8 * v) + x @ W.T + s @ R.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(y, after > 1)


def test_the_surrogate_is_a_fast_sigmoids_derivative():
    step, (v, s), xs, _ = STEP_CELLS["lif"].make(1, 4, torch.float64, T=1)
    x = xs[0].clone().requires_grad_()
    (v, _), spikes = step((v, s), x)
    [by_membrane] = torch.autograd.grad(spikes.sum(), v, retain_graph=True)
    torch.testing.assert_close(by_membrane, 1 / (1 + 5 * (v.detach() - 1).abs()) ** 2)


def test_slstm_without_its_stabiliser():
    """The stabiliser cancels: exponential gates as they stand give the same output."""
    step, carry, xs, (W, R, b) = STEP_CELLS["slstm"].make(B, H, torch.float64, T=4)
    W, R, b = (w.detach().numpy() for w in (W, R, b))
    h = c = n = np.zeros((B, H))
    for x in xs:
        carry, y = step(carry, x)
        z, i, f, o = np.split(x.numpy() @ W.T + b + h @ R.T, 4, axis=1)
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        np.testing.assert_allclose(y.detach(), h, rtol=1e-10)


def test_cornn_lem_and_ltc():
    (y0, z0), x, _, (W, V, U, b), y = numbers("cornn")
    z = z0 + 0.042 * (np.tanh(y0 @ W.T + z0 @ V.T + x @ U.T + b) - 2.7 * y0 - 4.7 * z0)
    np.testing.assert_allclose(y, y0 + 0.042 * z, rtol=1e-12)
    (y0, z0), x, _, (W, V, b, W_y), y = numbers("lem")
    (W_1, W_2, W_z), (V_1, V_2, V_z, V_y), (b_1, b_2, b_z, b_y) = np.split(W, 3), np.split(V, 4), np.split(b, 4)
    d_1, d_2 = 0.5 * sigmoid(y0 @ W_1.T + x @ V_1.T + b_1), 0.5 * sigmoid(y0 @ W_2.T + x @ V_2.T + b_2)
    z = (1 - d_1) * z0 + d_1 * np.tanh(y0 @ W_z.T + x @ V_z.T + b_z)
    np.testing.assert_allclose(y, (1 - d_2) * y0 + d_2 * np.tanh(z @ W_y.T + x @ V_y.T + b_y), rtol=1e-12)
    h, x, _, (W, U, b, A, t), y = numbers("ltc")
    tau = np.log1p(np.exp(t))
    for _ in range(3):
        f = sigmoid(h @ W.T + x @ U.T + b)
        h = (h + f * A / 3) / (1 + (1 / tau + f) / 3)
    np.testing.assert_allclose(y, h, rtol=1e-12)


def test_rk4_is_of_fourth_order(monkeypatch: pytest.MonkeyPatch):
    """Half the step of time, a sixteenth of the error."""
    ends = []
    for halvings in (2, 3, 7):
        monkeypatch.setattr("bptt.bench.step_cells.dynamics.RK4_DT", 2.0**-halvings)  # to time 1
        step, h, xs, _ = STEP_CELLS["rk4"].make(1, 4, torch.float64, T=1)
        with torch.no_grad():
            for _ in range(2**halvings):
                h, _ = step(h, xs[0])
        ends.append(h)
    ratio = (ends[0] - ends[2]).norm() / (ends[1] - ends[2]).norm()
    assert 14 < ratio < 18


def test_the_delta_rule_holds_what_it_was_last_told():
    """With beta 1 and no forgetting, the memory of a key is the value that came with it."""
    step, S, xs, (W, W_g, b_g) = STEP_CELLS["gated-delta"].make(2, 8, torch.float64, T=1)
    with torch.no_grad():
        W_g.zero_()
        b_g.fill_(40.0)
        W[:8] = W[8:16]  # ask for the key
        S = torch.randn_like(S)
        _, y = step(S, xs[0])
        value = torch.nn.functional.silu(xs[0] @ W[16:].T)
    torch.testing.assert_close(y, value)


def test_selective_by_unit_and_state():
    S, x, _, (W_d, b_d, W_BC, a, D), y = numbers("selective")
    d = np.log1p(np.exp(x @ W_d.T + b_d))
    BC = x @ W_BC.T
    expected_y = D * x
    for n in range(8):
        expected_y = expected_y + (np.exp(-np.exp(a[:, n]) * d) * S[:, :, n] + d * x * BC[:, [n]]) * BC[:, [8 + n]]
    np.testing.assert_allclose(y, expected_y, rtol=1e-10)


def test_the_filter_is_bayes_rule():
    """The update in information form: precisions add up."""
    (m, P), x, (m_after, P_after), (A, C, log_q, log_r), _ = numbers("kalman")
    F = 0.7 * np.eye(len(A)) + A
    for lane in range(B):
        prior = np.linalg.inv(F @ P[lane] @ F.T + np.diag(np.exp(log_q)))
        precision = prior + C.T @ np.diag(np.exp(-log_r)) @ C
        mean = np.linalg.solve(precision, prior @ F @ m[lane] + C.T @ (np.exp(-log_r) * x[lane]))
        np.testing.assert_allclose(P_after[lane], np.linalg.inv(precision), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(m_after[lane], mean, rtol=1e-9, atol=1e-12)


def test_attention_reads_the_states_that_match():
    step, carry, xs, (M, *_, W_c) = STEP_CELLS["attention"].make(2, 4, torch.float64, T=1)
    with torch.no_grad():
        M[:] = M[:, :1]  # all alike: whatever the weights, this is what is read
        (h, a), y = step(carry, xs[0])
    torch.testing.assert_close(y, torch.tanh(torch.cat((M[:, 0], h), 1) @ W_c.T).detach())
    assert a is y


def test_the_world_models_noise_is_scaled_by_its_deviation():
    step, carry, (us, noises), _ = STEP_CELLS["world-model"].make(2, 8, torch.float64, T=1)
    with torch.no_grad():
        outputs = [step(carry, (us[0], k * torch.ones_like(noises[0])))[1] for k in (0.0, 1.0, 2.0)]
    deviation = (outputs[1] - outputs[0])[:, 8:]
    assert (deviation > 0.1).all()
    torch.testing.assert_close(outputs[2][:, 8:], outputs[0][:, 8:] + 2 * deviation)
    assert torch.equal(outputs[1][:, :8], outputs[0][:, :8])


@pytest.mark.parametrize("name", ["layer-norm-lstm", "peephole-lstm", "conv-lstm"])
def test_kinds_of_lstm(name: str):
    (h, c), x, _, w, y = numbers(name)

    def norm(v: Any, a: Any, b: Any) -> Any:
        return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5) * a + b

    if name == "layer-norm-lstm":
        W_ih, W_hh, a_1, a_2, a_3, b_1, b_2, b_3 = w
        i, f, g, o = np.split(norm(x @ W_ih.T, a_1, b_1) + norm(h @ W_hh.T, a_2, b_2), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        np.testing.assert_allclose(y, sigmoid(o) * np.tanh(norm(c, a_3, b_3)), rtol=1e-10)
    elif name == "peephole-lstm":
        W, b, p_i, p_f, p_o = w
        i, f, g, o = np.split(np.concatenate((x, h), 1) @ W.T + b, 4, axis=1)
        c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
        np.testing.assert_allclose(y, sigmoid(o + p_o * c) * np.tanh(c), rtol=1e-12)
    else:
        W, b = w
        padded = np.pad(np.concatenate((x, h), 1), ((0, 0), (0, 0), (1, 1), (1, 1)))
        gates = sum(
            np.einsum("bchw,gc->bghw", padded[:, :, i : i + 4, j : j + 4], W[:, :, i, j])
            for i in range(3)
            for j in range(3)
        )
        i, f, g, o = np.split(gates + b[:, None, None], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        np.testing.assert_allclose(y, sigmoid(o) * np.tanh(c), rtol=1e-10)
