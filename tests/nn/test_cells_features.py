"""What single cells of `bptt.nn.cells` promise beyond their formula: noise, Dale's law, spikes, stability, time."""

import math
from typing import Any

import pytest
import torch
from scan.loops import Agree, expected, measured
from torch import Tensor

import bptt
from bptt import Full
from bptt.nn import cells

from . import formulas
from .zoo import MASK, B, H, I, T

DOUBLE = torch.float64

# The leaky rate network


def test_noise_has_its_standard_deviation_and_is_drawn_in_train_mode_only(agree: Agree) -> None:
    cell = cells.LeakyRNN(I, H, noise=0.3, dtype=DOUBLE)
    x, u = torch.randn(B, I, dtype=DOUBLE), torch.randn(B, H, dtype=DOUBLE)
    quiet = cell.eval()(x, u)[1]
    agree(cells.LeakyRNN.forward(cell, x, u)[1], quiet)
    torch.manual_seed(3)
    noisy = cell.train()(x, u)[1]
    torch.manual_seed(3)
    agree(noisy, quiet + math.sqrt(2 * 0.2 * 0.3**2) * torch.randn(B, H, dtype=DOUBLE))


def test_a_scan_replays_the_noise(agree: Agree) -> None:
    cell = cells.LeakyRNN(I, H, noise=0.3, nonlinearity="tanh", dtype=DOUBLE)

    def step(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r, u = cell(x, u)
        return u, r

    xs = torch.randn(T, B, I, dtype=DOUBLE).requires_grad_()
    case = step, torch.randn(B, H, dtype=DOUBLE).requires_grad_(), xs, list(cell.parameters())
    torch.manual_seed(8)
    grads = measured(case, Full())
    agree(grads, expected(case, Full(), T, seed=8))


def test_dales_law_outlives_training() -> None:
    cell = cells.LeakyRNN(I, H, excitatory=0.6, mask=MASK)
    optimizer = torch.optim.SGD(cell.parameters(), lr=3.0)
    for _ in range(5):
        _, rates = bptt.scan(lambda u, x: cell(x, u)[::-1], cell.initial_state(B), torch.randn(T, B, I))
        optimizer.zero_grad()
        (rates - torch.randn(H)).square().mean().backward()
        optimizer.step()
    W = cell.recurrent_weight()
    assert (W[:, :3] >= 0).all()
    assert (W[:, 3:] <= 0).all()
    assert not W[~MASK].count_nonzero()
    assert (cell.weight_hh[MASK] < 0).any()  # of the parameter itself, no sign is asked


def test_excitation_and_inhibition_balance_at_the_start() -> None:
    W = cells.LeakyRNN(1, 500, excitatory=0.8).recurrent_weight().detach()
    excitation, inhibition = W[:, :400].sum(1).mean(), -W[:, 400:].sum(1).mean()
    assert 0.95 < float(excitation / inhibition) < 1.05


@pytest.mark.parametrize("excitatory", [0.0, 1.0])
def test_units_of_one_kind(excitatory: float) -> None:
    W = cells.LeakyRNN(1, 4, excitatory=excitatory).recurrent_weight()
    assert bool((W > 0).all()) == bool(excitatory)


# Spikes


def spike_kinds() -> dict[str, Any]:
    """The spike, its surrogate derivative, and the derivative of that."""
    return {
        "fast_sigmoid": (
            lambda v: cells.fast_sigmoid_spike(v, 4.0),
            lambda v: 1 / (1 + 4 * abs(v)) ** 2,
            lambda v: -8 * math.copysign(1, v) / (1 + 4 * abs(v)) ** 3,
        ),
        "triangle": (
            lambda v: cells.triangular_spike(v, 0.4),
            lambda v: 0.4 * max(0, 1 - abs(v)),
            lambda v: -0.4 * math.copysign(1, v) if abs(v) < 1 else 0.0,
        ),
    }


@pytest.mark.parametrize("name", spike_kinds())
def test_spikes_and_two_derivatives_of_their_surrogate(name: str, agree: Agree) -> None:
    spike, first, second = spike_kinds()[name]
    v = torch.tensor([-1.7, -0.6, -0.01, 0.01, 0.6, 1.7], dtype=DOUBLE, requires_grad=True)
    spikes, cotangent = spike(v), torch.randn(6, dtype=DOUBLE, requires_grad=True)
    agree(spikes, torch.tensor([0, 0, 0, 1, 1, 1], dtype=DOUBLE))
    (once,) = torch.autograd.grad(spikes, v, cotangent, create_graph=True)
    derivative = torch.tensor([first(a) for a in v.tolist()], dtype=DOUBLE)
    agree(once, cotangent * derivative)
    twice = torch.autograd.grad(once.sum(), (v, cotangent))
    agree(twice, (cotangent * torch.tensor([second(a) for a in v.tolist()], dtype=DOUBLE), derivative))
    agree(torch.func.vmap(torch.func.grad(spike))(v), derivative)
    assert not spike(torch.zeros(1)).item()


def test_cells_take_their_surrogates_width_and_height(agree: Agree) -> None:
    v = torch.tensor([0.6, 1.3, 1.9], dtype=DOUBLE, requires_grad=True)
    excess = v.detach() - 0.8
    lif = cells.LIF(I, H, threshold=0.8, slope=5.0)
    (grad,) = torch.autograd.grad(lif.spikes(v).sum(), v)
    agree(grad, 1 / (1 + 5 * excess.abs()) ** 2)
    a = torch.full((3,), 0.25, dtype=DOUBLE, requires_grad=True)
    alif = cells.ALIF(I, H, threshold=0.4, beta=1.6, height=0.5)
    spikes, B_t = alif.spikes(v, a)
    agree(B_t, torch.full((3,), 0.8, dtype=DOUBLE))
    triangle = 0.5 * (1 - (excess / 0.8).abs()).clamp(min=0)
    agree(torch.autograd.grad(spikes.sum(), (v, a)), (triangle / 0.8, -1.6 * triangle * v.detach() / 0.8**2))


def test_the_reset_may_pass_no_gradient() -> None:
    """Membranes above the threshold, of neurons that see one another by the reset alone."""
    v = torch.full((1, H), 1.1, dtype=DOUBLE, requires_grad=True)
    i = torch.zeros(1, H, dtype=DOUBLE)
    for detach, derivative in ((True, 0.0), (False, 1 / (1 + 25 * 0.1) ** 2)):
        cell = cells.LIF(I, H, recurrent=False, detach_reset=detach, dtype=DOUBLE)
        _, (new, _) = cell(torch.zeros(1, I, dtype=DOUBLE), (v, i))
        (grad,) = torch.autograd.grad(new.sum(), v)
        torch.testing.assert_close(grad, torch.full_like(grad, math.exp(-0.1) - derivative))


def test_adaptation_makes_a_constant_input_spike_more_and_more_rarely() -> None:
    counts = []
    for beta in (0.0, 1.8):
        cell = cells.ALIF(1, 1, bias=False, recurrent=False, beta=beta, threshold=0.1)
        torch.nn.init.constant_(cell.weight_ih, 1.0)
        _, spikes = bptt.scan(lambda s, x, cell=cell: cell(x, s)[::-1], cell.initial_state(1), torch.ones(400, 1, 1))
        counts.append([int(spikes[:100].sum()), int(spikes[-100:].sum())])
    (plain_first, plain_last), (first, last) = counts
    assert abs(plain_first - plain_last) <= 1
    assert last < first <= plain_first


# The sLSTM


def test_stabilised_gates_are_the_plain_ones(agree: Agree) -> None:
    """Equations 8 to 14, as they stand before the stabiliser."""
    cell = cells.SLSTM(I, H, forget="exp", dtype=DOUBLE)
    xs, state = torch.randn(T, B, I, dtype=DOUBLE), cell.initial_state(B)
    h = c = n = torch.zeros(B, H, dtype=DOUBLE)
    for x in xs:
        state = cell(x, state)
        gates = x @ cell.weight_ih.T + h @ cell.weight_hh.T + cell.bias
        i, f, z, o = gates.chunk(4, -1)
        c = f.exp() * c + i.exp() * z.tanh()
        n = f.exp() * n + i.exp()
        h = o.sigmoid() * c / n
        agree((state[0], state[1] * state[3].exp(), state[2] * state[3].exp()), (h, c, n))


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
def test_gates_beyond_the_range_of_float32(forget: str) -> None:
    cell = cells.SLSTM(I, H, forget=forget)
    with torch.no_grad():
        cell.bias[:H] = 300.0
        cell.bias[H : 2 * H] = 280.0
    xs = torch.randn(50, B, I).requires_grad_()
    _, ys = bptt.scan(lambda s, x: ((new := cell(x, s)), new[0]), cell.initial_state(B), xs)
    ys.sum().backward()
    assert ys.isfinite().all()
    assert xs.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in cell.parameters())


# The others


def test_elapsed_time_of_each_row(agree: Agree) -> None:
    cell = cells.CfC(I, H, backbone=3, dtype=DOUBLE)
    x, h = torch.randn(B, I, dtype=DOUBLE), torch.randn(B, H, dtype=DOUBLE)
    elapsed = torch.tensor([0.0, 0.5, 1.0, 30.0], dtype=DOUBLE)
    p = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    rows = [formulas.cfc(cell, p, x[b].numpy(), (h[b].numpy(),), elapsed[b].item())[0] for b in range(B)]
    expected_rows = torch.stack([torch.from_numpy(row) for row in rows])
    agree(cell(x, h, elapsed), expected_rows)
    agree(cell(x[1], h[1], elapsed[1]), expected_rows[1])
    agree(cell(x, h, 0.5)[1], expected_rows[1])


def test_irregular_times_through_a_scan(agree: Agree) -> None:
    cell = cells.CfC(I, H, dtype=DOUBLE)
    xs = torch.randn(T, B, I, dtype=DOUBLE).requires_grad_(), torch.rand(T, B, dtype=DOUBLE).requires_grad_()
    case = lambda h, x: (cell(x[0], h, x[1]),) * 2, torch.zeros(B, H, dtype=DOUBLE, requires_grad=True), xs, []
    agree(measured(case, "truncated:3"), expected(case, bptt.Truncated(3), T))


def test_a_step_of_an_indrnn_has_a_diagonal_jacobian(agree: Agree) -> None:
    cell = cells.IndRNN(I, H, nonlinearity="tanh", dtype=DOUBLE)
    x, h = torch.randn(I, dtype=DOUBLE), torch.randn(H, dtype=DOUBLE)
    J = torch.func.jacrev(lambda h: cell(x, h))(h)
    agree(J, torch.diag(cell.weight_hh * (1 - cell(x, h) ** 2)))
    assert ((cell.weight_hh >= 0) & (cell.weight_hh < 1)).all()


def test_layer_normalisation_does_not_see_the_scale_of_weights(agree: Agree) -> None:
    cell = cells.LayerNormLSTM(I, H, eps=1e-30, dtype=DOUBLE)
    x, state = torch.randn(B, I, dtype=DOUBLE), (torch.randn(B, H, dtype=DOUBLE), torch.randn(B, H, dtype=DOUBLE))
    before = cell(x, state)
    with torch.no_grad():
        cell.weight_hh *= 7
        cell.weight_ih *= 0.2
    agree(cell(x, state), before)
    assert cell.gain_c.tolist() == [1.0] * H
    assert cell.bias.tolist() == [0.0] * 4 * H
