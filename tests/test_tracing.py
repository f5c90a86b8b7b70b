"""torch.jit, torch.fx, ONNX and what is built on them: the right numbers, or an error that says what to do."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import as_tuple
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.tensorboard import SummaryWriter

import bptt
from bptt.policies import Policy, Reach

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

I, H = 3, 5
SIZES = ((7, 2), (1, 1), (11, 4), (30, 3))
"""Steps and lanes: those of the trace, and others."""

CELLS: dict[str, Callable[..., Any]] = {
    "tanh": bptt.nn.RNN,
    "sigmoid": lambda *size, **kw: bptt.nn.RNN(*size, nonlinearity="sigmoid", **kw),
    "gru": bptt.nn.GRU,
    "lstm": bptt.nn.LSTM,
    "lstm_proj": lambda *size, **kw: bptt.nn.LSTM(*size, proj_size=2, **kw),
}

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"num_layers": 2, "gradient": "chunked:3", "memory": "states"},
    "truncated": {"num_layers": 2, "bidirectional": True, "gradient": "truncated:4/2"},
    "longer": {"gradient": "truncated:20", "batch_first": True, "bias": False},  # than the trace
    "checkpoints": {"num_layers": 2, "gradient": "truncated:4", "memory": "checkpoints:steps=3"},
    "both_ways": {"bidirectional": True, "gradient": "chunked:4", "memory": "checkpoints:bytes=2000"},
    "eager": {"num_layers": 2, "kernel": "eager"},
}


def layer_of(cell: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return CELLS[cell](I, H, dtype=torch.float64, **settings)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def results(f: Any, *inputs: Any, seed: int = 1) -> list[Tensor]:
    """All outputs of a module and its gradients, by the parameters' names."""
    torch.manual_seed(seed)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = f(*leaves)
    tensors = [t for part in out for t in as_tuple(part)] if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x.requires_grad] + [p for _, p in sorted(f.named_parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(sum(t.square().sum() for t in tensors), wanted)
    return [*(t.detach() for t in tensors), *gradients]


def sized(layer: Any, T: int, B: int) -> Tensor:
    return normal(B, T, I) if layer.batch_first else normal(T, B, I)


# torch.jit.trace


RECORDED = ("grad", "no_grad", "frozen")

TRACES = [(cell, "plain", recorded) for cell in CELLS for recorded in RECORDED] + [
    (cell, name, RECORDED[(i + j) % 3]) for i, cell in enumerate(CELLS) for j, name in enumerate(LAYERS) if j > 0
]
"""Every cell with every layer, each recorded in one of the ways."""


@pytest.mark.parametrize(("cell", "name", "recorded"), TRACES)
def test_a_trace_is_the_layer_at_any_size(cell: str, name: str, recorded: str) -> None:
    """The outputs and, however it was recorded, the policy's gradients; saved and loaded too."""
    layer = layer_of(cell, **LAYERS[name])
    layer.requires_grad_(recorded != "frozen")
    with torch.set_grad_enabled(recorded == "grad"):
        traced = torch.jit.trace(layer, sized(layer, *SIZES[0]))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for module in (layer, traced, loaded):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    for T, B in SIZES:
        x = sized(layer, T, B)
        expected = results(layer, x)
        for module in (traced, loaded):
            torch.testing.assert_close(results(module, x), expected)


def test_a_trace_holds_one_operator() -> None:
    traced = torch.jit.trace(layer_of("gru", num_layers=3), normal(7, 2, I))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert [kind for kind in kinds if kind.startswith("bptt::")] == ["bptt::stack_forward"]


class Full(nn.Module):
    """A model with everything that a forward call takes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor, resets: Tensor) -> Any:
        return self.layer(x, h, resets=resets)


@pytest.mark.parametrize(
    "settings", [{}, {"bidirectional": True, "gradient": "truncated:3"}, {"memory": "checkpoints:steps=2"}]
)
def test_a_trace_with_states_and_resets(settings: dict[str, Any]) -> None:
    layer = layer_of("gru", num_layers=2, **settings)

    def inputs(T: int, B: int) -> tuple[Tensor, ...]:
        return normal(T, B, I), normal(4 if layer.bidirectional else 2, B, H), torch.rand(T, B) < 0.3

    model = Full(layer)
    traced = torch.jit.trace(model, inputs(*SIZES[0]))
    for T, B in SIZES:
        given = inputs(T, B)
        torch.testing.assert_close(results(traced, *given), results(model, *given), rtol=0, atol=0)


class Packed(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y, (h, c) = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], h, c


@pytest.mark.parametrize("lengths", [[7, 7], [3, 7]])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True, "gradient": "truncated:3/2"}])
def test_a_trace_of_packed_sequences(settings: dict[str, Any], lengths: list[int]) -> None:
    """Recorded with equal lengths or not, of any lengths."""
    model = Packed(layer_of("lstm", num_layers=2, **settings))
    with warnings.catch_warnings():  # torch's own packing looks at a length
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (normal(7, 2, I), torch.tensor(lengths)))
    for other in ([7, 7], [2, 9, 5], [4]):
        given = normal(max(other), len(other), I), torch.tensor(other)
        torch.testing.assert_close(results(traced, *given), results(model, *given))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "randomized:0.6"},
        {"gradient": bptt.Randomized.polynomial(4), "bidirectional": True},
        {"dropout": 0.4},
    ],
)
def test_random_numbers_of_a_trace_are_drawn_at_every_call(settings: dict[str, Any]) -> None:
    layer = layer_of("gru", num_layers=2, **settings)
    traced = torch.jit.trace(layer, normal(7, 2, I), check_trace="dropout" not in settings)
    for T, B in SIZES:
        x = normal(T, B, I)
        torch.testing.assert_close(results(traced, x, seed=T), results(layer, x, seed=T), rtol=0, atol=0)


def test_second_derivatives_of_a_trace() -> None:
    layer, x = layer_of("lstm", gradient="chunked:2"), normal(5, 2, I)
    traced = torch.jit.trace(layer, x)

    def second(f: Any) -> tuple[Tensor, ...]:
        parameters = [p for _, p in sorted(f.named_parameters())]
        first = torch.autograd.grad(f(x)[0].square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    torch.testing.assert_close(second(traced), second(layer))


class Own(Policy):
    def reach(self, T: int) -> Reach:
        return Reach(T // 2, T // 2, stops_at_start=True)

    def __str__(self) -> str:
        return "half"


def refuses() -> Any:
    return pytest.raises(NotImplementedError, match=r"torch\.export.*bptt\.revert")


@pytest.mark.parametrize("policy", [Own(), bptt.Randomized(0.5, generator=torch.Generator())])
def test_a_policy_that_a_trace_cannot_hold(policy: Policy) -> None:
    with refuses():
        torch.jit.trace(layer_of("gru", gradient=policy), normal(7, 2, I))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes, before the refusal
def test_other_walks_are_not_recorded() -> None:
    layer = layer_of("gru")
    with refuses():
        torch.jit.trace(lambda x: bptt.gradients(layer, x, torch.ones(7, 2, H).double()).x, normal(7, 2, I))
    with refuses():
        torch.jit.trace(lambda x: torch.func.grad(lambda x: layer(x)[0].sum())(x), normal(7, 2, I))


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(I, I))

    def forward(self, x: Tensor) -> Tensor:
        return bptt.scan(lambda h, x: (torch.tanh(h @ self.w + x), h), torch.zeros_like(x[0]), x)[1]


def test_a_scan_is_refused_by_name() -> None:
    """A graph would hold its number of steps: torch.export looks at that, these do not."""
    for frozen in (False, True):
        model = Scan().requires_grad_(not frozen)
        with refuses():
            torch.jit.trace(model, normal(7, 2, I))
    with refuses():
        torch.fx.symbolic_trace(Scan())


def test_the_graph_of_a_scan_takes_any_lanes_but_one_number_of_steps() -> None:
    x, lanes = normal(7, 2, I), torch.export.Dim("B", min=2, max=64)
    cells = bptt.nn.cells.MGU(I, H), torch.nn.RNNCell(I, H)  # of which the second is called in vain first
    for model in (Scan(), *(bptt.nn.Recurrent(cell).double() for cell in cells)):
        with torch.no_grad():
            exported = torch.export.export(model, (x,), dynamic_shapes=({1: lanes},), strict=False).module()
            wider = normal(7, 5, I)
            torch.testing.assert_close(exported(wider), model(wider))
            with pytest.raises(NotImplementedError, match="number of steps is dynamic"):
                torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("T", max=64)},), strict=False)


# What is built on it


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = layer_of("lstm", num_layers=2, **settings)
        self.head = nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def test_tensorboard_draws_a_model(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(Model(gradient="chunked:3"), normal(7, 2, I))
    assert b"bptt::stack_forward" in next(tmp_path.iterdir()).read_bytes()


def test_a_graph_for_counters() -> None:
    """As fvcore asks for it."""
    graph, _ = torch.jit._get_trace_graph(Model(), (normal(7, 2, I),))
    assert "bptt::stack_forward" in [node.kind() for node in graph.nodes()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_onnx_is_refused_by_name(grad: bool) -> None:
    model = Model().eval().requires_grad_(grad)
    with pytest.raises(NotImplementedError, match=r"dynamo=True.*onnx_decompositions.*bptt\.revert"):
        torch.onnx.export(model, (normal(7, 2, I),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("cell", CELLS)
def test_script_is_refused_by_name(cell: str) -> None:
    for module in (layer_of(cell), nn.Sequential(layer_of(cell))):
        with refuses():
            torch.jit.script(module)


def test_export_under_checkpoints_is_refused_by_name() -> None:
    with refuses():
        torch.export.export(layer_of("gru", memory="checkpoints"), (normal(7, 2, I),), strict=False)


# torch.fx


class Reads(nn.Module):
    """A model whose input is its own and whose states are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer_of("lstm")
        self.register_buffer("x", normal(4, 2, I))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return self.layer(self.x, (h, c))[0]


def test_fx_makes_one_node_of_a_layer() -> None:
    """As of torch.nn's layers, and with the states and the resets."""
    model = Model(gradient="chunked:3")
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer", "head"]
    for T, B in SIZES:
        x = normal(T, B, I)
        torch.testing.assert_close(results(graph, x), results(model, x), rtol=0, atol=0)
    reads, given = Reads(), (normal(1, 2, H), normal(1, 2, H))
    torch.testing.assert_close(torch.fx.symbolic_trace(reads)(*given), reads(*given))
    full = Full(layer_of("gru"))
    inputs = normal(7, 2, I), normal(1, 2, H), torch.rand(7, 2) < 0.3
    torch.testing.assert_close(torch.fx.symbolic_trace(full)(*inputs), full(*inputs))


def test_fx_does_not_trace_into_a_layer() -> None:
    with refuses():
        torch.fx.symbolic_trace(layer_of("gru"))


# torch.export and AOTInductor


def exported(model: nn.Module, x: Tensor) -> Any:
    shape = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch.export's own calls
        return torch.export.export(model, (x,), dynamic_shapes=(shape,), strict=False)


@pytest.mark.parametrize("gradient", ["chunked:8", "truncated:9/2", "randomized:0.5"])
def test_an_exported_window_may_be_longer_than_the_sequence(gradient: str) -> None:
    layer = layer_of("lstm", gradient=gradient).eval()
    module = exported(layer, normal(7, 3, I)).module()
    for T in (3, 8, 30):
        x = normal(T, 4, I)
        torch.testing.assert_close(module(x), layer(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_ahead_of_time_compiled_layer_runs() -> None:
    """Called with none, with one and with several of what a layer holds besides its inputs."""
    model = nn.Sequential(
        Model(gradient="chunked:3"), CELLS["sigmoid"](2, I, dtype=torch.float64), Model(dropout=0.5)
    ).eval()
    model[1].register_forward_hook(lambda module, args, out: out[0])
    package = torch._inductor.aoti_compile_and_package(exported(model, normal(7, 3, I)))
    module = torch._inductor.aoti_load_package(package)
    for T, B in ((7, 3), (12, 2)):
        x = normal(T, B, I)
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x))
