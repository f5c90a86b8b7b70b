"""The chain of states, of a layer and of any step, against Jacobians by torch.func."""

import pytest
import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.flow._chain import LayerChain, jacobian
from bptt.flow._subjects import chain_of

from . import explicit
from .explicit import DOUBLE, LAYERS, layer_of

T, B, I, N = 6, 3, 3, 5

each_layer = pytest.mark.parametrize("name", LAYERS)


def states(layer: bptt.nn.RNN, rows: int = 1) -> tuple[Tensor, ...]:
    P, H = layer.proj_size or layer.hidden_size, layer.hidden_size
    h = torch.randn(rows, B, P, dtype=DOUBLE)
    return (h, torch.randn(rows, B, H, dtype=DOUBLE)) if layer.mode == "LSTM" else (h,)


def recorded(layer: bptt.nn.RNN, x: Tensor, initial: tuple[Tensor, ...], loss=None) -> bptt.flow.Recording:
    return bptt.flow.record(layer, (x, initial if len(initial) == 2 else initial[0]), loss)


def all_jacobians(chain) -> Tensor:
    return torch.stack([jacobian(chain, t) for t in chain.transitions])


@each_layer
def test_jacobians_of_a_layer(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    initial = states(layer)
    chain = LayerChain(recorded(layer, x, initial))
    expected = explicit.jacobians(layer, x, torch.cat(initial, -1)[0])
    assert (chain.name, chain.T, chain.B, chain.S, chain.transitions) == ("layer 0", T, B, expected.shape[-1], range(T))
    torch.testing.assert_close(all_jacobians(chain), expected, rtol=1e-12, atol=1e-14)
    rows = torch.randn(N, B, chain.S, dtype=DOUBLE)
    for t in range(T):
        torch.testing.assert_close(chain.pull(t, rows), torch.einsum("bij,nbi->nbj", expected[t], rows))
        torch.testing.assert_close(chain.push(t, rows), torch.einsum("bij,nbj->nbi", expected[t], rows))


@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
def test_reset_closes_the_edge(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0, 1] = resets[3, 0] = True

    class Episodes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, resets=resets)[0]

    chain = LayerChain(bptt.flow.record(Episodes(), x, lambda y: y.sum()))
    expected = explicit.jacobians(layer, x, torch.zeros(B, chain.S, dtype=DOUBLE), resets=resets)
    torch.testing.assert_close(all_jacobians(chain), expected, rtol=1e-12, atol=1e-14)
    assert not jacobian(chain, 3)[0].any()
    torch.testing.assert_close(torch.stack([chain.open(t) for t in range(T)]), ~resets)
    assert not chain.push(3, torch.ones(1, B, chain.S, dtype=DOUBLE))[0, 0].any()


@pytest.mark.parametrize("name", ["tanh", "lstm_proj"])
def test_layers_and_directions_of_a_stack(name: str) -> None:
    layer, x = layer_of(name, num_layers=2, bidirectional=True), torch.randn(T, B, I, dtype=DOUBLE)
    initial = states(layer, 4)
    recording = recorded(layer, x, initial)
    below, one = x, layer_of(name)
    s_0 = torch.cat(initial, -1)
    for k, suffix in enumerate(["_l0", "_l0_reverse"]):
        own = below.flip(0) if k % 2 else below
        expected = explicit.jacobians(layer, own, s_0[k], suffix)
        torch.testing.assert_close(all_jacobians(LayerChain(recording, k)), expected, rtol=1e-12, atol=1e-14)
    assert LayerChain(recording, 1).errors is None
    assert LayerChain(recording, 3).name == "layer 1 reversed"
    P = one.proj_size or one.hidden_size
    torch.testing.assert_close(LayerChain(recording, 3).errors[..., :P], recording.dy[..., P:].flip(0))


@each_layer
def test_errors_carried_back_are_the_gradient_of_the_initial_state(name: str) -> None:
    layer, x = layer_of(name), torch.randn(T, B, I, dtype=DOUBLE)
    initial = tuple(s.requires_grad_() for s in states(layer))
    weight = torch.randn(T, B, layer.proj_size or 4, dtype=DOUBLE)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer

        def forward(self, x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
            y, final = self.rnn(x, hx if len(hx) == 2 else hx[0])
            return (y, *(final if len(hx) == 2 else (final,)))

    def loss(out: tuple[Tensor, ...]) -> Tensor:
        return (out[0] * weight).sum() + sum(((i + 1) * s.square()).sum() for i, s in enumerate(out[1:]))

    expected = torch.autograd.grad(loss(Whole()(x, *initial)), initial)
    chain = LayerChain(bptt.flow.record(Whole(), (x, *initial), loss))
    lam = torch.zeros(1, B, chain.S, dtype=DOUBLE)
    for t in reversed(range(T)):
        lam = chain.pull(t, lam + chain.errors[t])
    torch.testing.assert_close(lam[0], torch.cat(expected, -1)[0], rtol=1e-10, atol=1e-12)


def test_padded_steps_are_closed() -> None:
    layer = layer_of("gru")
    packed = pack_sequence([torch.randn(n, I, dtype=DOUBLE) for n in (5, 2, 3)], enforce_sorted=False)
    chain = LayerChain(bptt.flow.record(layer, packed))
    for t in range(5):
        torch.testing.assert_close(chain.open(t), torch.tensor([True, t < 2, t < 3]))
        torch.testing.assert_close(jacobian(chain, t).flatten(1).any(1), chain.open(t))


# Any step


def lstm_step(layer, w_y: Tensor):
    def step(carry, x):
        h, c, count = carry
        s = torch.stack(
            [explicit.advance(layer, x_b, torch.cat([h_b, c_b])) for x_b, h_b, c_b in zip(x, h, c, strict=True)]
        )
        return (s[:, :4], s[:, 4:], count + 1), torch.tanh(h @ w_y) + x[:, :1]

    return step


@pytest.mark.parametrize("rows", ["independent", "coupled"])
def test_steps_against_the_layer(rows: str) -> None:
    layer, x = layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE)
    initial = states(layer)
    expected = explicit.jacobians(layer, x, torch.cat(initial, -1)[0])
    w_y = torch.randn(4, 1, dtype=DOUBLE, requires_grad=True)
    chain = bptt.flow.steps(
        lstm_step(layer, w_y), (initial[0][0], initial[1][0], 0), x, lambda ys: ys.square().sum(), rows=rows
    )
    got = all_jacobians(chain)
    if rows == "coupled":
        assert (chain.T, chain.B, chain.S, chain.transitions) == (T, 1, B * 8, range(1, T + 1))
        J = got[:, 0].reshape(T, 2, B, 4, 2, B, 4).permute(0, 2, 5, 1, 3, 4, 6).reshape(T, B, B, 8, 8)
        for a in range(B):
            for b in range(B):
                torch.testing.assert_close(J[:, a, b], expected[:, a] if a == b else torch.zeros(T, 8, 8, dtype=DOUBLE))
    else:
        assert (chain.T, chain.B, chain.S) == (T, B, 8)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        tangents = torch.randn(N, B, 8, dtype=DOUBLE)
        torch.testing.assert_close(chain.push(2, tangents), torch.einsum("bij,nbj->nbi", expected[1], tangents))


def test_errors_of_steps_carried_back_are_the_gradient_of_the_first_carry() -> None:
    layer, x = layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE)
    h, c = (s[0].requires_grad_() for s in states(layer))
    w_y = torch.randn(4, 1, dtype=DOUBLE)
    step = lstm_step(layer, w_y)

    def loss(ys: Tensor) -> Tensor:
        return ys.square().sum()

    expected = torch.autograd.grad(loss(bptt.scan(step, (h, c, 0), x)[1]), (h, c))
    chain = bptt.flow.steps(step, (h, c, 0), x, loss, rows="independent")
    lam = chain.errors[T - 1][None]
    for t in reversed(range(1, T)):
        lam = chain.pull(t, lam) + chain.errors[t - 1]
    torch.testing.assert_close(lam[0], torch.cat([expected[0], expected[1]], -1), rtol=1e-10, atol=1e-12)


def test_steps_with_resets_and_leaves_of_any_shape() -> None:
    A = torch.randn(2, 2, 2, dtype=DOUBLE)
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[2, 1] = True
    carry = {"m": torch.randn(3, 2, 2, dtype=DOUBLE), "k": torch.arange(3)}

    def step(s, _):
        return {"m": torch.einsum("ijk,bjk->bik", A, s["m"].sin()), "k": s["k"] + 1}, s["m"].sum((1, 2))

    for rows in ("independent", "coupled"):
        chain = bptt.flow.steps(step, carry, length=4, resets=resets, rows=rows)
        s = carry["m"]
        for t in chain.transitions:
            J = jacrev(lambda m: step({"m": m, "k": 0}, None)[0]["m"])(s).reshape(3, 4, 3, 4)
            s = step({"m": s, "k": 0}, None)[0]["m"]
            if t < 4:
                J[resets[t]] = 0
                s = s.masked_fill(resets[t, :, None, None], 0)
            if rows == "coupled":
                torch.testing.assert_close(jacobian(chain, t)[0], J.reshape(12, 12))
            else:
                torch.testing.assert_close(jacobian(chain, t), torch.stack([J[b, :, b] for b in range(3)]))
                torch.testing.assert_close(chain.open(t), ~resets[t] if t < 4 else torch.ones(3, dtype=torch.bool))


class Doubled(torch.autograd.Function):
    """What vmap cannot take."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        assert not torch._C._functorch.is_batchedtensor(dy)
        return 2 * torch.from_numpy(dy.numpy())


def test_step_that_cannot_be_batched() -> None:
    chain = bptt.flow.steps(lambda s, _: (Doubled.apply(s), s), torch.ones(3, dtype=DOUBLE), length=2)
    torch.testing.assert_close(jacobian(chain, 1)[0], 2 * torch.eye(3, dtype=DOUBLE))


def test_random_step_is_replayed_and_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    chain = bptt.flow.steps(lambda s, _: (torch.dropout(s, 0.5, True), s), torch.ones(50, dtype=DOUBLE), length=1)
    J = jacobian(chain, 1)[0]
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(0)
    torch.testing.assert_close(jacobian(chain, 1)[0], J)
    assert set(J.diagonal().tolist()) == {0.0, 2.0}


def test_nothing_is_changed() -> None:
    layer, x = layer_of("lstm"), torch.randn(T, B, I, dtype=DOUBLE)
    before, random = [p.detach().clone() for p in layer.parameters()], torch.get_rng_state()
    chain = chain_of(layer, x)
    jacobian(chain, 1), chain.push(1, torch.ones(1, B, 8, dtype=DOUBLE)), chain.errors
    assert all(p.grad is None for p in layer.parameters())
    for p, b in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), b, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), random)


def test_chain_of_takes_what_there_is() -> None:
    layer, x = layer_of("gru").float(), torch.randn(T, B, I)
    chain = chain_of(bptt.flow.record(layer, x))
    assert (chain.dtype, chain.T) == (DOUBLE, T)
    assert chain_of(chain) is chain
    with pytest.raises(TypeError, match="a chain has its own"):
        chain_of(chain, x)
    with pytest.raises(ValueError, match=r"layer must be one of 0..0: got 1"):
        chain_of(layer, x, None, 1)
    with pytest.raises(TypeError, match="subject must be a layer, a model, a Recording, a scan or a chain: got int"):
        chain_of(3, x)


def test_wrong_steps() -> None:
    s = torch.ones(3, 2)
    with pytest.raises(ValueError, match="rows must be 'coupled' or 'independent': got 'auto'"):
        bptt.flow.steps(lambda s, _: (s, s), s, length=2, rows="auto")
    with pytest.raises(ValueError, match="floating-point tensor"):
        bptt.flow.steps(lambda s, _: (s, s), torch.arange(3), length=2)
    with pytest.raises(ValueError, match="mixes the rows"):
        bptt.flow.steps(lambda s, _: (s - s.mean(0), s), s, length=2, rows="independent")
    with pytest.raises(ValueError, match=r"needs floating-point tensors \[B, ...\]"):
        bptt.flow.steps(lambda s, _: (s, s), (s, torch.ones(())), length=2, rows="independent")
    with pytest.raises(TypeError, match="loss must give a scalar"):
        _ = bptt.flow.steps(lambda s, _: (s, s), s, None, lambda ys: ys, length=2).errors
    with pytest.raises(IndexError, match=r"t must be in 1..2"):
        bptt.flow.steps(lambda s, _: (s, s), s, length=2).pull(0, s[None])
