"""The cells of `bptt.nn.cells`: against their papers' formulas in NumPy, and through `bptt.scan` against a loop."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scan.loops import Agree, expected, measured
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import bptt
from bptt import Chunked, Full, Truncated
from bptt.nn import cells
from bptt.policies import Policy

from .zoo import KINDS, MASK, SPIKING, B, H, I, T

each_kind = pytest.mark.parametrize("name", KINDS)


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def formula_of(name: str, cell: Any, xs: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs [T, B, H] and the final states [B, H]."""
    kind = KINDS[name]
    p = {key: value.detach().double().numpy() for key, value in cell.named_parameters()}
    if kind.options.get("mask") is not None:
        p["allowed"] = kind.options["mask"].numpy()
    outputs, finals = np.zeros((T, B, H)), [np.zeros((B, H)) for _ in range(kind.states)]
    for b in range(B):
        states = tuple(s[b].detach().double().numpy() for s in as_tuple(state))
        for t in range(T):
            outputs[t, b], states = kind.formula(cell, p, xs[t, b].double().numpy(), states)
        for final, s in zip(finals, states, strict=True):
            final[b] = s
    return torch.from_numpy(outputs), tuple(map(torch.from_numpy, finals))


def run(name: str, cell: Any, xs: Tensor, state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    step, outputs = KINDS[name].step(cell), []
    for x in xs:
        state, y = step(state, x)
        outputs.append(y)
    return torch.stack(outputs), as_tuple(state)


@pytest.mark.parametrize("bias", [True, False])
@each_kind
def test_the_papers_formula(name: str, bias: bool, agree: Agree) -> None:
    cell = KINDS[name].cell(bias=bias)
    xs, state = torch.randn(T, B, I, dtype=torch.float64), KINDS[name].state(B)
    outputs, states = formula_of(name, cell, xs, state)
    agree(run(name, cell, xs, state), (outputs, states))
    if name in SPIKING:
        assert 0.05 < outputs.mean() < 0.7


@each_kind
def test_from_the_first_state_in_float32(name: str, agree: Agree) -> None:
    cell = KINDS[name].cell(torch.float32)
    xs = torch.randn(T, B, I)
    state = cell.initial_state(B)
    agree(run(name, cell, xs, state), formula_of(name, cell, xs, state))
    assert all(s.dtype == torch.float32 for s in as_tuple(state))
    agree(KINDS[name].step(cell)(None, xs[0]), KINDS[name].step(cell)(state, xs[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("policy", [Full(), Truncated(3), Truncated(4, every=2), Chunked(2)], ids=str)
@each_kind
def test_scan_under_every_policy(name: str, policy: Policy, dtype: torch.dtype, agree: Agree) -> None:
    kind = KINDS[name]
    cell = kind.cell(dtype)
    xs = torch.randn(T, B, I, dtype=dtype).requires_grad_()
    case = kind.step(cell), kind.state(B, dtype=dtype, grad=True), xs, list(cell.parameters())
    grads = measured(case, policy)
    agree(grads, expected(case, policy, T), tolerance=None if dtype == torch.float64 else 1e-4)
    assert all(grad.count_nonzero() for grad in grads)


@each_kind
def test_resets_restart_from_the_first_state(name: str, agree: Agree) -> None:
    """It is zero, as the state that a scan resets to."""
    kind = KINDS[name]
    cell, xs = kind.cell(), torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    _, ys = bptt.scan(kind.step(cell), kind.state(B), xs, resets=resets)
    _, again = bptt.scan(kind.step(cell), cell.initial_state(B), xs[3:])
    agree(ys[3:], again)


@each_kind
def test_rows_are_independent_and_may_be_single(name: str, agree: Agree) -> None:
    kind = KINDS[name]
    cell, x, state = kind.cell(), torch.randn(B, I, dtype=torch.float64), kind.state(B)
    together = kind.step(cell)(state, x)
    agree(torch.func.vmap(kind.step(cell))(state, x), together)
    rows = tree_map(lambda s: s[1], state)
    agree(kind.step(cell)(rows, x[1]), tree_map(lambda s: s[1], together))
    single = as_tuple(cell.initial_state())
    assert [s.shape for s in single] == [(H,)] * kind.states
    assert len({id(s) for s in single}) == kind.states
    assert [s.shape for s in as_tuple(cell.initial_state(0))] == [(0, H)] * kind.states
    assert kind.step(cell)(cell.initial_state(0), x[:0])[1].shape == (0, H)


@pytest.mark.parametrize("rows", ["independent", "auto"])
@each_kind
def test_rows_are_independent_for_a_scan(name: str, rows: Any) -> None:
    kind = KINDS[name]
    cell, xs = kind.cell(), torch.randn(T, B, I, dtype=torch.float64)
    _, ys = bptt.scan(kind.step(cell), kind.state(B), xs, gradient="truncated:2", rows=rows)
    ys.sum().backward()
    assert cell.weight_ih.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does, itself
@each_kind
def test_a_compiler_takes_the_step_in_one_graph(name: str, agree: Agree) -> None:
    kind = KINDS[name]
    cell, x, state = kind.cell(), torch.randn(B, I, dtype=torch.float64), kind.state(B, grad=True)
    torch.compiler.reset()
    compiled = torch.compile(kind.step(cell), backend="aot_eager", fullgraph=True)
    inputs = [*as_tuple(state), *cell.parameters()]
    results = []
    for step in (compiled, kind.step(cell)):
        final, y = step(state, x)
        loss = y.square().sum() + sum(s.square().sum() for s in as_tuple(final))
        results.append((y, torch.autograd.grad(loss, inputs)))
    agree(*results)


@each_kind
def test_a_trace_of_one_step_and_its_gradient_holds_for_other_numbers(name: str, agree: Agree) -> None:
    kind = KINDS[name]
    cell = kind.cell()

    def products(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        final, y = kind.step(cell)(states if kind.states > 1 else states[0], x)
        loss = y.square().sum() + sum(s.square().sum() for s in as_tuple(final))
        return torch.autograd.grad(loss, [x, *states, *cell.parameters()])

    def inputs() -> list[Tensor]:
        return [torch.randn(B, I, dtype=torch.float64).requires_grad_(), *as_tuple(kind.state(B, grad=True))]

    graph = make_fx(products)(*inputs())
    for _ in range(3):
        new = inputs()
        agree(graph(*new), products(*new))


@each_kind
def test_a_cell_is_an_ordinary_module(name: str, agree: Agree) -> None:
    cell, x = KINDS[name].cell(), torch.randn(B, I, dtype=torch.float64)
    twin = KINDS[name].cell()
    twin.load_state_dict(cell.state_dict(), strict=True)
    for other in (twin, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        agree(other(x), cell(x))
    before = copy.deepcopy(cell.state_dict())
    cell.reset_parameters()
    for key, parameter in cell.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    assert all(p.is_meta for p in KINDS[name].make(I, H, device="meta").parameters())
    assert repr(cell).startswith(f"{type(cell).__name__}({I}, {H}")
    assert "bias=False" in repr(KINDS[name].cell(bias=False))


SHAPES = {
    "layer_norm_lstm": {
        "weight_ih": (4 * H, I),
        "weight_hh": (4 * H, H),
        "bias": (4 * H,),
        "gain_ih": (4 * H,),
        "gain_hh": (4 * H,),
        "gain_c": (H,),
        "bias_c": (H,),
    },
    "leaky_rnn_dale": {"weight_ih": (H, I), "weight_hh": (H, H), "bias": (H,), "mask": (H, H)},
    "leaky_rnn": {"weight_ih": (H, I), "weight_hh": (H, H), "bias": (H,)},
    "lif": {"weight_ih": (H, I), "weight_hh": (H, H), "bias": (H,)},
    "lif_feedforward": {"weight_ih": (H, I), "bias": (H,)},
    "alif": {"weight_ih": (H, I), "weight_hh": (H, H), "bias": (H,)},
    "slstm": {"weight_ih": (4 * H, I), "weight_hh": (4 * H, H), "bias": (4 * H,)},
    "mgu": {"weight_ih": (2 * H, I), "weight_hh": (2 * H, H), "bias": (2 * H,)},
    "cornn": {"weight_ih": (H, I), "weight_hh": (H, H), "bias": (H,), "weight_hz": (H, H)},
    "indrnn": {"weight_ih": (H, I), "weight_hh": (H,), "bias": (H,)},
    "cfc": {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H), "bias": (3 * H,)},
    "cfc_backbone": {
        "weight_ih": (7, I),
        "weight_hh": (7, H),
        "bias": (7,),
        "weight_heads": (3 * H, 7),
        "bias_heads": (3 * H,),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_parameters(name: str) -> None:
    with_bias, without = KINDS[name].cell().state_dict(), KINDS[name].cell(bias=False).state_dict()
    assert {key: tuple(value.shape) for key, value in with_bias.items()} == SHAPES[name]
    assert set(without) == {key for key in SHAPES[name] if not key.startswith("bias")}


# What is refused

REFUSED = {
    "input_size": (lambda: cells.MGU(0, 3), "input_size must be above 0: got 0"),
    "hidden_size": (lambda: cells.MGU(3, -1), "hidden_size must be above 0: got -1"),
    "eps": (lambda: cells.LayerNormLSTM(3, 4, eps=0.0), "eps must be above 0: got 0.0"),
    "dt": (lambda: cells.LeakyRNN(3, 4, dt=200.0), "dt must be at most tau=100.0, or the leak overshoots: got 200.0"),
    "noise": (lambda: cells.LeakyRNN(3, 4, noise=-1.0), "noise must be a standard deviation of 0 or more: got -1.0"),
    "excitatory": (lambda: cells.LeakyRNN(3, 4, excitatory=80), "excitatory must be a share from 0 to 1: got 80"),
    "mask": (lambda: cells.LeakyRNN(3, 4, mask=MASK), r"mask must be .* = \(4, 4\): got shape \(5, 5\)"),
    "nonlinearity": (lambda: cells.IndRNN(3, 4, nonlinearity="elu"), "must be one of 'relu', 'tanh', .*: got 'elu'"),
    "forget": (lambda: cells.SLSTM(3, 4, forget="tanh"), "forget must be one of 'sigmoid', 'exp': got 'tanh'"),
    "threshold": (lambda: cells.LIF(3, 4, threshold=0), "threshold must be above 0: got 0"),
    "tau_a": (lambda: cells.ALIF(3, 4, tau_a=float("nan")), "tau_a must be above 0: got nan"),
    "beta": (lambda: cells.ALIF(3, 4, beta=-1), "beta must be 0 or more: got -1"),
    "backbone": (lambda: cells.CfC(3, 4, backbone=-1), "backbone must be a number of units, or 0 for none: got -1"),
    "elapsed": (
        lambda: cells.CfC(3, 4)(torch.zeros(2, 3), None, torch.ones(3)),
        r"CfC: elapsed must be a number or \(2,\), as the rows of input: got shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


@each_kind
def test_inputs_and_states_that_do_not_fit(name: str) -> None:
    kind = KINDS[name]
    cell, x, state = kind.cell(), torch.zeros(B, I, dtype=torch.float64), kind.state(B)
    title = type(cell).__name__
    for wrong in (torch.zeros(B, I + 1), torch.zeros(T, B, I), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"{title}: input must be \[B, 3\] or \[3\], as input_size=3 says: got "):
            cell(wrong, state)
    states = as_tuple(state)
    last = cell.states[-1]
    for wrong in (torch.zeros(B, H + 1), torch.zeros(1, B, H)):
        new = (*states[:-1], wrong)
        with pytest.raises(
            ValueError, match=rf"{title}: {last} must be \[B, 5\] or \[5\], as hidden_size=5 says: got "
        ):
            cell(x, new if kind.states > 1 else wrong)
    words = rf"{title}: the state must be (one tensor|a tuple of {kind.states} tensors) \(.*{last}\): got "
    for wrong in ((*states, states[0]), states[0] if kind.states > 1 else states):
        with pytest.raises(ValueError, match=words):
            cell(x, wrong)
