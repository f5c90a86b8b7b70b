"""Cells that the package does not know: formulas and a layer, registered, and everything runs on them.

The leaky RNN h_t = (1-a) h_{t-1} + a tanh(W_ih x + b_ih + W_hh h_{t-1} + b_hh), which has one gate and one state, and
an LSTM without an output gate, c_t = f c_{t-1} + i n, h_t = tanh(c_t), which has three gates and is no GRU, two
states and is not torch's LSTM, and its gates in an order of its own. torch has neither, and no kernel has a walk for
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import reference
import torch
from reference import Fixed, as_hx, case, measure
from torch import Tensor
from torch.nn.functional import linear

import bptt
from bptt import bench, plots, train
from bptt.bench.layers import layer_contest
from bptt.bench.short import inference_contest, short_contest
from bptt.bench.training import training_contest
from bptt.bench.windows import window_contest
from bptt.cells import CELLS, Cell, Pullback, Weights
from bptt.cells._cell import State
from bptt.flow import Finding
from bptt.kernels import KERNELS
from bptt.nn import LAYERS, init
from bptt.nn.layers import DropInLayer

LEAK = 0.3


class Leaky(Cell):
    name, mode = "leaky", "LEAKY"
    gate_names = tape_names = ("n",)
    activations = ("tanh",)

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        return torch.tanh(gx + linear(h, w.hh))

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        return ((1 - LEAK) * prev[0] + LEAK * gates,)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        return Pullback(LEAK * lam[0] * (1 - gates * gates), direct=(1 - LEAK) * lam[0])


class LeakyRNN(DropInLayer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LEAKY", *args, **kwargs)


class Open(Cell):
    name, mode = "open", "OPEN"
    gate_names = tape_names = ("n", "i", "f")
    activations = ("tanh", "sigmoid", "sigmoid")
    state_names = ("h", "c")
    keeps, admits = "f", "i"

    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        a_n, a_i, a_f = (gx + linear(h, w.hh)).chunk(3, -1)
        return torch.cat([torch.tanh(a_n), torch.sigmoid(a_i), torch.sigmoid(a_f)], -1)

    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        n, i, f = gates.chunk(3, -1)
        c = f * prev[1] + i * n
        return (torch.tanh(c), c)

    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        n, i, f = gates.chunk(3, -1)
        dc = lam[1] + lam[0] * (1 - state[0] * state[0])
        da = torch.cat([dc * i * (1 - n * n), dc * n * i * (1 - i), dc * prev[1] * f * (1 - f)], -1)
        return Pullback(da, carried=(dc * f,))


class OpenLSTM(DropInLayer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("OPEN", *args, **kwargs)


of_the_package = networks.step


def step(mode: str, w: dict[str, Tensor | None], x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The definitions once more, for autograd's plain loop."""
    if mode not in ("LEAKY", "OPEN"):
        return of_the_package(mode, w, x, state)
    h = state[0]
    a = linear(x, w["weight_ih"], w["bias_ih"]) + linear(h, w["weight_hh"], w["bias_hh"])
    if mode == "LEAKY":
        return ((1 - LEAK) * h + LEAK * torch.tanh(a),)
    n, i, f = a.chunk(3, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(n)
    return (torch.tanh(c), c)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cell, layer in ((Leaky(), LeakyRNN), (Open(), OpenLSTM)):
        monkeypatch.setitem(CELLS, cell.mode, cell)
        monkeypatch.setitem(LAYERS, cell.name, layer)
    monkeypatch.setattr(networks, "step", step)


each_cell = pytest.mark.parametrize("cell", ["leaky", "open"])

each_that_torch_lacks = pytest.mark.parametrize(
    "cell", [*(name for name, layer in LAYERS.items() if layer.torchs is None), "leaky", "open"]
)
"""With the package's own, which have nothing else to be held against."""

NETS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"num_layers": 2},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "no biases": {"bias": False},
}
POLICIES = [
    bptt.Full(),
    bptt.Chunked(3),
    bptt.Truncated(3),
    bptt.Truncated(4, every=2),
    Fixed(*(torch.randint(3, (7, 3), generator=torch.Generator().manual_seed(i)).double() for i in range(4))),
]


def build(cell: str, I: int = 5, H: int = 4, **options: Any) -> Any:
    return LAYERS[cell](I, H, **{"dtype": torch.float64, **options})  # type: ignore[arg-type]


@each_that_torch_lacks
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_memory_and_direction_is_what_autograd_says(cell: str, net: str, policy: Any, agree: Any):
    layer = build(cell, **NETS[net])
    of = case(layer)
    resets = torch.rand(7, 3) < 0.2
    for given in (None, resets):
        truth = reference.gradients(layer, of.x, of.initial, of.dy, of.dfinal, policy, resets=given).values()
        for kernel, memory in (("auto", "gates"), ("eager", "states"), ("auto", bptt.Checkpoints(steps=3))):
            layer.gradient, layer.kernel, layer.memory = policy, kernel, memory
            if isinstance(policy, Fixed):
                policy.calls.clear()
            agree(
                measure(layer, of, **({} if given is None else {"resets": given})).values(), truth, f"{kernel} {memory}"
            )


@each_that_torch_lacks
def test_packed_lanes(cell: str, agree: Any):
    layer = build(cell, **NETS["both ways"], gradient="truncated:3")
    of, lengths = case(layer), [4, 7, 1]
    for b, length in enumerate(lengths):
        of.x[length:, b] = of.dy[length:, b] = 0
    truth = reference.gradients(layer, of.x, of.initial, of.dy, of.dfinal, layer.gradient, lengths=lengths)
    agree(measure(layer, of, packed=lengths).values(), truth.values())


@each_that_torch_lacks
def test_gradients_and_a_stream_without_autograd(cell: str, agree: Any):
    layer = build(cell, gradient="truncated:4")
    of = case(layer)
    truth = reference.gradients(layer, of.x, of.initial, of.dy, of.dfinal, layer.gradient)
    found = bptt.gradients(layer, of.x, of.dy, as_hx(of.initial), as_hx(of.dfinal))
    agree((found.parameters, found.x, found.adjoints), (truth.parameters, truth.x, truth.adjoints))
    dy = iter(of.dy.split(3)[::-1])
    stream = bptt.stream_gradients(
        layer, of.x, lambda _, y: (y * next(dy)).sum(), as_hx(of.initial), memory="checkpoints:steps=3"
    )
    alone = bptt.gradients(layer, of.x, of.dy, as_hx(of.initial))
    agree(stream.parameters, alone.parameters)


@each_that_torch_lacks
def test_second_derivatives(cell: str):
    layer = build(cell, 2, 2)
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@each_cell
def test_a_kernel_without_a_walk_says_so(cell: str):
    layer, x = build(cell), torch.randn(7, 3, 5, dtype=torch.float64)
    assert f"kernel 'eager' for {cell}" in bptt.explain(layer, x)
    assert f"'cpu' cannot: it has no walk for {cell}" in bptt.explain(layer, x)
    assert "torch's own layer" not in bptt.explain(layer, x[:1])
    for name in set(KERNELS) - {"eager"}:
        layer.kernel = name
        reason = f"{'torch has no fused layer' if name == 'fused' else 'it has no walk'} for {cell}"
        with pytest.raises(RuntimeError, match=f"kernel='{name}' cannot run this layer: {reason}"):
            layer(x)
        with pytest.raises(RuntimeError, match=reason), torch.no_grad():
            layer(x)


@each_that_torch_lacks
def test_one_step_is_not_torchs(cell: str, agree: Any):
    layer = build(cell)
    of = case(layer, T=1)
    truth = reference.gradients(layer, of.x, of.initial, of.dy, of.dfinal, bptt.Full())
    agree(measure(layer, of).values(), truth.values())
    with torch.no_grad():
        agree(layer(of.x, as_hx(of.initial))[0], truth.y)


@each_cell
def test_the_layer_has_torchs_manners(cell: str):
    layer = build(cell, num_layers=2, gradient="chunked:4")
    assert str(layer) == f"{type(layer).__name__}(5, 4, num_layers=2, gradient=chunked:4)"
    assert layer.weight_hh_l1.shape == (4 * len(layer.cell().gate_names), 4)
    assert all(float(p.detach().abs().max()) <= 0.5 for p in layer.parameters())  # torch's: U(-1/sqrt(H), 1/sqrt(H))
    again = build(cell, num_layers=2)
    again.load_state_dict(layer.state_dict(), strict=True)
    with pytest.raises(ValueError, match="proj_size is for LSTM only, not for"):
        build(cell, proj_size=2)
    with pytest.raises(ValueError, match="proj_size is for LSTM only, not for"):
        LAYERS[cell](5, 4, 1, True, False, 0.0, False, 2)  # type: ignore[arg-type]
    one = [torch.zeros(1, 3, 4, dtype=torch.float64)] * layer.cell().states
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(2, 3, 4\)"):
        layer(torch.randn(7, 3, 5, dtype=torch.float64), as_hx(one))
    model = torch.nn.Sequential(layer)
    assert bptt.convert(model, gradient="full")[0] is layer  # type: ignore[index]
    assert str(layer.gradient) == "full"
    with pytest.raises(ValueError, match=rf"torch\.nn has LSTM, GRU, .* only: '0' \(.*\) has cell {cell}"):
        bptt.revert(model)
    assert bptt.plan(layer, T=100, B=2, memory="checkpoints:steps=10").segments == 10


def test_initialisers_go_by_what_a_cell_is():
    for cell in ("leaky", "open"):
        w = init.orthogonal_(build(cell)).weight_hh_l0[:4].detach()
        assert torch.allclose(w @ w.T, torch.eye(4, dtype=w.dtype))
    for gates, expected in zip(
        init.forget_bias_(build("open"), 2.0).bias_ih_l0.split(4)[1:], (False, True), strict=True
    ):
        assert bool((gates == 2).all()) == expected
    admits, keeps = init.chrono_(build("open"), 100).bias_ih_l0.split(4)[1:]
    assert keeps.min() >= 0
    assert torch.equal(admits, -keeps)
    assert init.identity_(build("leaky")).weight_hh_l0.detach().trace() == 4
    with pytest.raises(TypeError, match="forget_bias_ is for an LSTM"):
        init.forget_bias_(build("leaky"))
    with pytest.raises(TypeError, match="chrono_ is for an LSTM or a GRU: got LeakyRNN"):
        init.chrono_(build("leaky"), 100)
    with pytest.raises(TypeError, match="identity_ is for a simple RNN"):
        init.identity_(build("open"))


@each_that_torch_lacks
def test_a_compiled_call_is_the_layers(cell: str, agree: Any):
    """Compilers and tracers take the layer as one operator, whose text names the cell."""
    layer = build(cell)
    of = case(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(of.x)[0].square().sum(), layer.parameters()) for f in (compiled, layer))
    agree(found, expected)


@each_cell
def test_the_doctor_names_gate_and_step(cell: str):
    layer = build(cell)
    x = torch.randn(40, 3, 5, dtype=torch.float64)
    told: list[Finding] = []
    with bptt.flow.watch(layer, tell=told.append) as doctor:
        loss = layer(x * 1e3)[0].sum()
        loss.backward()
        assert doctor.check(loss) is None
        doctor.examine()
    saturated = {finding.gate for finding in told if finding.kind == "saturation"}
    assert saturated == {"leaky": {"n"}, "open": {"n", "i"}}[cell]  # of a forget gate the upper end is memory
    with torch.no_grad():
        layer.bias_ih_l0[-1] = torch.inf
        layer.weight_ih_l0[-1] = 0
        layer.weight_ih_l0[-1, 0] = torch.nan
    with bptt.flow.watch(layer) as doctor:
        loss = layer(x)[0].sum()
        loss.backward()
        diagnosis = doctor.check(loss)
    assert diagnosis is not None
    last = layer.cell().gate_names[-1]
    assert (diagnosis.findings[0].gate, diagnosis.findings[0].parameter) == (last, "weight_ih_l0")
    assert diagnosis.findings[0].step == 0


@each_cell
def test_everything_there_is_to_measure(cell: str):
    layer = build(cell)
    if cell == "leaky":
        init.radius_(layer, 2.0)
    found = bptt.flow.survey(layer, torch.randn(20, 3, 5, dtype=torch.float64), policies=["full", "chunked:4"])
    assert found.gates is not None
    assert found.spectrum is not None
    assert found.gates.names == found.spectrum.gates == layer.cell().gate_names
    assert found.gates.cell == layer.cell().mode
    assert (found.cell_path is None) == (cell == "leaky")
    assert found.products is not None
    assert found.products.bound is None  # |W_hh| bounds the step of a simple RNN, and this is none
    words = str(found.verdict)
    assert "simple RNN" not in words
    if "To learn over more" in words:
        assert ("chrono_" in words) == ("forget_bias_" in words) == (cell == "open")
    full, chunked = found.comparison.rows  # type: ignore[union-attr]
    assert full.bias == 0 < chunked.bias
    if cell == "leaky":
        with pytest.raises(TypeError, match="subject must hold an LSTM"):
            bptt.flow.cell_path(layer, torch.randn(5, 1, 5, dtype=torch.float64))


@each_cell
def test_the_jacobian_is_autograds(cell: str, agree: Any):
    layer, x = build(cell), torch.randn(6, 1, 5, dtype=torch.float64)
    found = bptt.flow.jacobians(layer, x)
    w = {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters()}
    count = layer.cell().states
    s = torch.zeros(4 * count, dtype=torch.float64)

    def after(s: Tensor, t: int) -> Tensor:
        return torch.cat(step(layer.mode, w, x[t], s[None].chunk(count, 1)), 1)[0]

    for t in range(6):
        if t > 0:
            J = torch.autograd.functional.jacobian(lambda s, t=t: after(s, t), s)
            agree(torch.as_tensor(found.norm[list(found.t).index(t), 0]), torch.linalg.matrix_norm(J, 2))
        s = after(s, t)


@each_cell
def test_the_bench_times_it_against_a_loop(cell: str):
    case = bench.Case(cell, 5, 2, 3, 4)
    assert case.flop == 6 * 5 * 2 * len(CELLS[cell.upper()].gate_names) * 4 * 7
    for contest in (layer_contest(case), short_contest(case), inference_contest(case), training_contest(case)):
        assert {name: error < 1e-5 for name, (error, _) in contest.errors().items()} == {"bptt": True, "loop": True}
    [row] = bench.measure(bench.Selection(("layers",), (cell,), ((5, 2, 3, 4),), seconds=0.0, least=2), threads=1)
    assert row.wrong == []
    with pytest.raises(ValueError, match="case must be of a cell that the equations have"):
        window_contest(bench.Case(cell, 9, 1, 3, 4, "chunked:4"))


@each_cell
def test_it_trains(cell: str, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    config = train.Config(
        text=str(text), cell=cell, hidden=16, embedding=4, batch=4, seq_length=10, steps=30, threads=1, log_every=5,
        learning_rate=0.02, gradient="truncated:5",
    )  # fmt: skip
    trainer, run = train.start(config, tmp_path / "run")
    train.fit(trainer, run)
    perplexity = [record["perplexity"] for record in run.metrics() if record.get("perplexity") is not None]
    assert perplexity[-1] < 0.7 * perplexity[0]


def test_its_picture():
    assert plots.graph(T=2, cell="leaky").get_suptitle().startswith("One w_h acts at all 2 steps")
    with pytest.raises(ValueError, match=r"cell must be one of 'rnn', 'gru', 'lstm', .*'open': got 'elman'"):
        plots.graph(cell="elman")


def test_a_mode_that_no_cell_has():
    with pytest.raises(ValueError, match=r"mode must be one of 'RNN_TANH', .*'OPEN': got 'ELMAN'"):
        DropInLayer("ELMAN", 5, 4)


@pytest.mark.parametrize("name", ["leaky", "open", "sigmoid", "identity"])
def test_cudnn_is_not_asked_for_a_mode_that_it_lacks(name: str, monkeypatch: pytest.MonkeyPatch):
    """torch lays weights out for cuDNN whenever a layer moves, and cuDNN raises for an unknown mode."""
    layer = LAYERS[name](5, 4) if name in LAYERS else bptt.nn.RNN(5, 4, nonlinearity=name)  # type: ignore[arg-type]
    asked: list[str] = []
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda self: asked.append(self.mode))
    layer.double()
    bptt.nn.GRU(5, 4).double()
    assert set(asked) == {"GRU"}


def test_the_registry_holds_together():
    for mode, cell in CELLS.items():
        assert cell.mode == mode
        assert LAYERS[cell.name] is not None
        assert len(cell.activations) == len(cell.gate_names) == cell.gates_per_unit
        assert cell.tape_names in ((), (*cell.gate_names, *cell.tape_names[cell.gates_per_unit :]))
        for gate in (cell.keeps, cell.admits, cell.inner):
            assert gate is None or gate in cell.gate_names
        assert cell.inner in (None, cell.gate_names[-1])
