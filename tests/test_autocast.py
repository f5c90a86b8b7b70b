"""A layer under autocast: results of torch.nn's dtypes, and its numbers, with gradients of the dtypes of the leaves."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from functions import Agree, each_cell
from reference import NETS, as_hx, as_tuple, build, case, measure, ours
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import bptt
from bptt.nn import _autocast

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "relu, both ways": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
    "gru": ("GRU", {"num_layers": 2}),
    "lstm": ("LSTM", {}),
    "lstm, two both ways": ("LSTM", {"bidirectional": True, "num_layers": 2}),
    "lstm, projected": ("LSTM", {"proj_size": 3}),
}
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """(torch.nn's layer, ours) with the same weights."""
    name, options = KINDS[kind]
    theirs = getattr(nn, name)(5, 7, **options, dtype=dtype)
    layer = getattr(bptt.nn, name)(5, 7, **options, **settings, dtype=dtype)
    layer.load_state_dict(theirs.state_dict())
    return theirs, layer


def states_of(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(2)
    K = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or 7, 7)[: 1 + (layer.mode == "LSTM")]
    return [torch.randn(K, 3, size).to(dtype).requires_grad_() for size in sizes]


def found(layer: Any, x: Tensor, hx: list[Tensor] | None, packed: bool, autocast: torch.dtype | None) -> list[Tensor]:
    """y, the final state, and the gradient of everything."""
    leaf = x.detach().clone().requires_grad_()
    enabled = autocast is not None
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=enabled):
        y, final = layer(pack_padded_sequence(leaf, [6, 4, 1]) if packed else leaf, None if hx is None else as_hx(hx))
    y = y.data if isinstance(y, PackedSequence) else y
    results = (y, *as_tuple(final))
    loss = sum((i + 1) * r.float().square().sum() for i, r in enumerate(results))
    assert isinstance(loss, Tensor)
    return [*results, *torch.autograd.grad(loss, [leaf, *(hx or ()), *layer.parameters()])]


def distances(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes_and_numbers_of_torch(kind: str, packed: bool) -> None:
    """No further from the truth than torch.nn's, whose every operation rounds; but where that closes units."""
    torch.manual_seed(1)
    theirs, layer = pair(kind)
    for x_dtype, state in itertools.product(DTYPES, (None, *DTYPES)):
        x = torch.randn(6, 3, 5).to(x_dtype)
        hx = None if state is None else states_of(layer, state)
        wide = None if hx is None else [s.detach().float().requires_grad_() for s in hx]
        exact = found(layer, x.float(), wide, packed, None)
        own, of_torch = (found(each, x, hx, packed, torch.bfloat16) for each in (layer, theirs))
        assert [t.dtype for t in own] == [t.dtype for t in of_torch]
        assert max(distances(own, exact)) < (0.15 if "relu" in kind else 0.03)
        assert "relu" in kind or sum(distances(own, exact)) <= 1.1 * sum(distances(of_torch, exact))


@pytest.mark.parametrize("kind", KINDS)
def test_results_of_float32_are_those_without_autocast(kind: str) -> None:
    _, layer = pair(kind)
    x = torch.randn(6, 3, 5)
    for packed in (False, True):
        results = found(layer, x, None, packed, torch.bfloat16)
        if {t.dtype for t in results} == {torch.float32}:
            for a, b in zip(results, found(layer, x, None, packed, None), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("packed", [False, True])
def test_float16_walks_in_float32(kind: str, packed: bool) -> None:
    """Which its compiled walks have; results are rounded. torch's LSTM on dense input needs another processor."""
    _, layer = pair(kind)
    x = torch.randn(6, 3, 5)
    exact, low = found(layer, x, None, packed, None), found(layer, x, None, packed, torch.float16)
    wide = kind == "gru" or (kind == "lstm" and packed)
    assert {t.dtype for t in low[: 2 + (kind == "lstm")]} == {torch.float32 if wide else torch.float16}
    assert max(distances(low, exact)) < 2e-3
    with torch.autocast("cpu", torch.float16):
        assert "kernel 'cpu'" in bptt.explain(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_not_cast(kind: str) -> None:
    for kernel in ("auto", "fused", "eager"):
        theirs, layer = pair(kind, torch.float64, kernel=kernel)
        x = torch.randn(6, 3, 5).double()
        own, of_torch = (found(each, x, None, False, torch.bfloat16) for each in (layer, theirs))
        assert {t.dtype for t in own} == {torch.float64}
        assert max(distances(own, of_torch)) < 1e-12
        with torch.autocast("cpu", torch.bfloat16):
            for others in ((x.float(),), (x, as_hx(states_of(layer, torch.float32)))):
                with pytest.raises(RuntimeError, match="must be float64 under autocast if one of them is"):
                    layer(*others)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(
    ("policy", "memory"),
    [
        ("full", "states"),
        ("chunked:4", "gates"),
        ("truncated:5/2", "states"),
        ("randomized:0.7", "checkpoints:steps=4"),
    ],
)
def test_every_policy_and_memory(kind: str, policy: str, memory: str) -> None:
    """As of a layer of bfloat16 whose gradients are float32 in the end; and close to the float32 layer's."""
    layer = getattr(bptt.nn, kind)(5, 7, num_layers=2, gradient=policy, memory=memory)
    x, resets = torch.randn(9, 3, 5), torch.rand(9, 3) < 0.2
    for given in ({}, {"resets": resets}, {"lengths": torch.tensor([9, 2, 5])}):
        results = []
        for enabled in (True, False):
            torch.manual_seed(4)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y, _ = layer(x, **given)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))])
        low, exact = results
        assert low[0].dtype == (torch.float32 if kind == "GRU" else torch.bfloat16)
        assert {t.dtype for t in low[1:]} == {torch.float32}
        assert max(distances(low, exact)) < (1e-6 if kind == "GRU" else 0.03)


@pytest.mark.parametrize("kernel", ["cpu", "fused", "eager"])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_every_kernel(kind: str, kernel: str) -> None:
    theirs, layer = pair(kind, kernel=kernel)
    x = torch.randn(6, 3, 5)
    own, of_torch = (found(each, x, None, False, torch.bfloat16) for each in (layer, theirs))
    assert [t.dtype for t in own] == [t.dtype for t in of_torch]
    assert max(distances(own, of_torch)) < 0.05


def test_second_derivatives() -> None:
    results = []
    layer = bptt.nn.LSTM(5, 7)
    x = torch.randn(6, 3, 5)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = layer(x)
        first = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()), create_graph=True)
        loss = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert {t.dtype for t in results[0]} == {torch.float32}
    assert max(distances(*results)) < 0.05


@each_cell
@pytest.mark.parametrize("hx", [None, torch.bfloat16, torch.float32])
def test_after_a_linear_layer(cell: str, hx: torch.dtype | None) -> None:
    """The linear layer hands on bfloat16, which reaches the initial state too where none is given."""
    layer = ours(build(cell, dtype=torch.float32, num_layers=2))
    linear = nn.Linear(3, 5)
    initial = None if hx is None else as_hx(s.to(hx) for s in case(layer).initial)
    z = torch.randn(7, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, final = layer(linear(z), initial)
        wide = cell == "gru" and hx == torch.float32
        assert y.dtype == as_tuple(final)[0].dtype == (torch.float32 if wide else torch.bfloat16)
    exact, _ = layer(linear(z), None if initial is None else as_hx(s.float() for s in as_tuple(initial)))
    grads = [torch.autograd.grad(r.float().square().sum(), [*layer.parameters(), linear.weight]) for r in (y, exact)]
    assert max(distances([y, *grads[0]], [exact, *grads[1]])) < (0.1 if cell == "relu" else 0.03)


def test_backward_inside_autocast(agree: Agree) -> None:
    layer = ours(build("lstm", dtype=torch.float32, num_layers=2))
    data = case(layer)
    expected = measure(layer, data)
    y, final = layer(data.x, as_hx(data.initial))
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
    agree({n: p.grad for n, p in layer.named_parameters()}, expected.parameters)


def test_disabled_inside(agree: Agree) -> None:
    layer, x = bptt.nn.LSTM(5, 7), torch.randn(6, 3, 5)

    class Wide(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y: Tensor = layer(x)[0]
            return y

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            agree(layer(x)[0], layer(x)[0])
            assert layer(x)[0].dtype == torch.float32
        assert Wide.apply(x.bfloat16()).dtype == torch.float32
        assert layer(x)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16):
        assert layer(x)[0].dtype == torch.float16


@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm_proj"])
def test_gradients_without_autograd(cell: str, net: str) -> None:
    """`bptt.gradients` has those of autograd, in the dtypes of what they are of."""
    layer = ours(build(cell, dtype=torch.float32, **NETS[net]))
    x = torch.randn(7, 3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
        own = bptt.gradients(layer, x, torch.ones_like(y))
        again = bptt.gradients(layer, x, torch.ones(y.shape))
    expected = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    for each in (own, again):
        assert {t.dtype for t in (each.x, *each.parameters.values())} == {torch.float32}
        assert max(distances([each.x, *each.parameters.values()], list(expected))) < 0.02


@pytest.mark.parametrize("pieces", [False, True])
def test_streamed(pieces: bool) -> None:
    layer, x = bptt.nn.LSTM(3, 4, gradient="chunked:5"), torch.randn(23, 2, 3)

    def loss(_: slice, y: Tensor) -> Tensor:
        seen.append(y.dtype)
        return y.float().square().sum()

    results, seen = [], list[torch.dtype]()
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(bptt.stream_gradients(layer, iter(x.split(4)) if pieces else x, loss))
    assert set(seen[: len(seen) // 2]) == {torch.bfloat16}
    low, exact = ([*r.parameters.values(), *r.hx] for r in results)
    assert {t.dtype for t in low} == {torch.float32}
    assert {t.dtype for t in results[0].final} == {torch.bfloat16}
    assert max(distances(low, exact)) < 0.03


def test_explain_tells_the_dtypes() -> None:
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert "for lstm, torch.bfloat16 on cpu" in bptt.explain(bptt.nn.LSTM(5, 7), x)
        packed = pack_padded_sequence(x, [6, 4, 1])
        assert "autocast makes results torch.float32\n" in bptt.explain(bptt.nn.LSTM(5, 7), packed)
        assert "autocast makes results torch.bfloat16\n" in bptt.explain(bptt.nn.GRU(5, 7), x.bfloat16())
        told = bptt.explain(bptt.nn.LSTM(5, 7, proj_size=3), x)
        assert "for lstm, torch.float32 on cpu" in told
        assert "autocast makes results torch.bfloat16, c torch.float32\n" in told
    assert "autocast" not in bptt.explain(bptt.nn.LSTM(5, 7), x)


# Layers of torch's cells


def looped(layer: Any, x: Tensor, hx: Any) -> list[Tensor]:
    """The outputs of a plain loop over the cells."""
    ys, states = [], [None] * len(layer.cells) if hx is None else [as_hx(s[k] for s in hx) for k in range(len(hx[0]))]
    for x_t in x:
        y = x_t
        for k, cell in enumerate(layer.cells):
            states[k] = cell(y, states[k])
            y = states[k][0] if isinstance(states[k], tuple) else states[k]
        ys.append(y)
    return ys


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("T", [5, 20])
def test_cells_of_torch(kind: Any, T: int) -> None:
    """As a plain loop over them under autocast, and compiled."""
    layer = bptt.nn.Recurrent([kind(5, 7), kind(7, 7)], gradient="truncated:4")
    count = 1 + (kind is nn.LSTMCell)
    for dtype, state in itertools.product(DTYPES, (None, *DTYPES)):
        x = torch.randn(T, 3, 5).to(dtype).requires_grad_()
        hx = None if state is None else [torch.randn(2, 3, 7).to(state).requires_grad_() for _ in range(count)]
        given = [x, *(hx or ()), *layer.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            y, final = layer(x, None if hx is None else as_hx(hx))
            expected = torch.stack(looped(layer, x, hx))
            if T == 20:
                assert "kernel 'interpreter'" in str(bptt.explain(layer, x))
        grads = torch.autograd.grad(y.float().square().sum(), given)
        exact, _ = layer(x.float(), None if hx is None else as_hx(s.float() for s in hx))
        assert {y.dtype, *(s.dtype for s in as_tuple(final))} == {expected.dtype}
        assert [g.dtype for g in grads] == [t.dtype for t in given]
        assert distances([y], [exact]) <= distances([expected], [exact])
        assert max(distances(list(grads), list(torch.autograd.grad(exact.square().sum(), given)))) < 0.02


def test_cells_of_torch_in_other_calls(agree: Agree) -> None:
    layer = bptt.nn.Recurrent([nn.GRUCell(5, 7), nn.GRUCell(5, 7)], bidirectional=True)
    x, resets = torch.randn(9, 3, 5), torch.rand(9, 3) < 0.3
    packed = pack_padded_sequence(x, [9, 4, 1])
    calls = [{"lengths": [9, 2, 5]}, {"resets": resets}, {"resets": resets, "reset_state": torch.randn(2, 3, 7)}]
    for given in calls:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x, **given)[0]
        agree(found, layer(x, **given)[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(packed)[0].data
        assert layer(x.bfloat16())[0].dtype == torch.bfloat16
        layer.kernel = "replay"
        assert layer(x)[0].dtype == torch.float32
    layer.kernel = "auto"
    agree(found, layer(packed)[0].data)


# The casts of weights


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many values the casts of weights have that were found."""
    made, own = list[int](), _autocast._Cast.forward

    def forward(ctx: Any, values: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        made.append(values[0].data_ptr())
        return own(ctx, values, *tensors)

    with monkeypatch.context() as patched:
        patched.setattr(_autocast._Cast, "forward", staticmethod(forward))
        yield made


def test_weights_are_cast_once_in_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = bptt.nn.LSTM(5, 7), torch.randn(6, 3, 5)
    with counted(monkeypatch) as made:
        with torch.autocast("cpu", torch.bfloat16):
            first = layer(x)[0]
            with torch.autocast("cpu", torch.bfloat16):
                (first + layer(x)[0]).float().sum().backward()
            with torch.no_grad():
                layer.weight_ih_l0.mul_(2)
            changed = layer(x)[0]
        assert made[0] == made[1] != made[2]
    for given in (torch.inference_mode, torch.no_grad):
        with given(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x)[0], changed, rtol=0, atol=0)
            layer.weight_ih_l0.data.mul_(1)
    layer.weight_ih_l0.data.mul_(2)  # which raises no version
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x)[0], changed)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert layer(x)[0].dtype == torch.bfloat16


def test_gradients_of_many_calls_add_up_in_float32() -> None:
    """A thousand equal ones: sums of bfloat16 would stand still at 256 of them."""
    layer = bptt.nn.RNN(1, 1, bias=False, nonlinearity="identity")
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        total = torch.stack([layer(torch.ones(1, 1, 1))[0].float() for _ in range(1000)]).sum()
    total.backward()
    assert layer.weight_ih_l0.grad.item() == 1000


def test_frozen_weights_and_no_gradient_at_all() -> None:
    layer, x = bptt.nn.GRU(5, 7), torch.randn(6, 3, 5).bfloat16()
    layer.weight_ih_l0.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)[0].float().sum().backward()
        assert layer.weight_ih_l0.grad is None
        assert layer.weight_hh_l0.grad.dtype == torch.float32
        for p in layer.parameters():
            p.requires_grad_(False)
        assert not layer(x)[0].requires_grad


def test_frozen_weights_that_change_without_a_version() -> None:
    """As those of a target network, which `.data` moves: torch keeps casts of leaves that require grad alone."""
    layer, x = bptt.nn.LSTM(5, 7).requires_grad_(False), torch.randn(6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        for p in layer.parameters():
            p.data.mul_(3)
        changed = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed, layer(x)[0])
