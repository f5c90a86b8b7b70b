"""torch.compile, torch.export and make_fx: a layer is one operator of the graph, forward and backward."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from functions import as_tuple
from functorch.compile import make_boxed_func
from reference import build, ours
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.utils.rnn import pack_sequence

import bptt
from bptt.engine import boundary, ops
from bptt.nn.call import Call, net_of, whole_tape

pytestmark = pytest.mark.slow

Agree = Callable[..., None]
I, H = 3, 5


@pytest.fixture(autouse=True)
def compiles_anew() -> Iterator[None]:
    """No test sees what another has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer: Any, *, backend: Any = "aot_eager", dynamic: bool | None = None) -> Any:
    return torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)


@dataclass
class Row:
    """A layer and a way to call it, each option at least once in the table."""

    cell: str
    layer: dict[str, Any]
    hx: bool = False
    resets: bool = False
    unbatched: bool = False
    frozen: tuple[str, ...] = field(default=())


RANDOM, TAILED = bptt.Randomized(0.7), bptt.Randomized.polynomial(4)

ROWS = {
    "rnn": Row("tanh", {}, hx=True, unbatched=True),
    "rnn_relu": Row(
        "relu", {"num_layers": 2, "bidirectional": True, "batch_first": True, "gradient": "chunked:3"}, hx=True
    ),
    "gru_bi": Row("gru", {"num_layers": 2, "bidirectional": True, "gradient": "truncated:4/2"}, resets=True),
    "gru_random": Row("gru", {"num_layers": 2, "gradient": RANDOM}, frozen=("weight_hh_l0", "bias_ih_l1")),
    "lstm_dropout": Row(
        "lstm", {"num_layers": 2, "dropout": 0.4, "bias": False, "memory": "states", "gradient": RANDOM}
    ),
    "lstm_proj": Row(
        "lstm_proj", {"num_layers": 2, "gradient": "truncated:3", "kernel": "eager"}, hx=True, resets=True
    ),
    "lstm_random": Row("lstm", {"bidirectional": True, "batch_first": True, "gradient": TAILED}, resets=True),
}


def layer_of(row: Row, dtype: torch.dtype = torch.float64) -> Any:
    shape = {k: v for k, v in row.layer.items() if k not in ("gradient", "memory", "kernel")}
    settings = {k: v for k, v in row.layer.items() if k in ("gradient", "memory", "kernel")}
    layer = ours(build(row.cell, I, H, dtype=dtype, **shape), **settings)
    for name in row.frozen:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def call(row: Row, layer: Any, f: Any, T: int, B: int) -> dict[str, Tensor]:
    """What one call of `f`, the layer or a compiled one, gives: all outputs and all gradients."""
    torch.manual_seed(T)
    dtype = next(layer.parameters()).dtype
    lanes = () if row.unbatched else (B,)
    x = torch.randn(T, *lanes, I, dtype=dtype)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or H, H][: 2 if layer.mode == "LSTM" else 1]
    states = [torch.randn(K, *lanes, size, dtype=dtype).requires_grad_() for size in sizes] if row.hx else []
    resets = torch.rand(T, *lanes) < 0.3 if row.resets else None
    if layer.batch_first and lanes:
        x, resets = x.transpose(0, 1), None if resets is None else resets.t()
    x.requires_grad_()
    hx = None if not states else states[0] if len(states) == 1 else tuple(states)
    y, final = f(x, hx, resets=resets)
    out = {"y": y, **{f"final{i}": s for i, s in enumerate(as_tuple(final))}}
    given = {"x": x, **{f"initial{i}": s for i, s in enumerate(states)}}
    given |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
    loss = sum((o * torch.randn_like(o)).sum() for o in out.values())
    gradients = torch.autograd.grad(loss, list(given.values()))
    return {k: v.detach() for k, v in out.items()} | dict(zip([f"d_{k}" for k in given], gradients, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_a_compiled_layer_is_the_layer(name: str, agree: Agree) -> None:
    """One graph, of any T and B, for outputs and gradients; random numbers are drawn anew at every call."""
    row = ROWS[name]
    layer = layer_of(row)
    f = compiled(layer, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for T, B in ((7, 6), (11, 8)):  # no two sizes are equal, which a compiler would take for a rule
        agree(call(row, layer, f, T, B), call(row, layer, layer, T, B), f"{name}, T={T}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 1


def test_shapes_and_settings_may_change(agree: Agree) -> None:
    """Without dynamic=True the second shape is compiled anew; so is a policy, memory or kernel assigned later."""
    row = ROWS["lstm_proj"]
    layer = layer_of(row)
    f = compiled(layer)
    for T, B in ((7, 3), (9, 1)):
        agree(call(row, layer, f, T, B), call(row, layer, layer, T, B), f"T={T}, B={B}")
    layer.gradient, layer.memory, layer.kernel = "chunked:2", "states", "eager"
    agree(call(row, layer, f, 7, 3), call(row, layer, layer, 7, 3), "reassigned")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.rnn = bptt.nn.LSTM(I, H, num_layers=2, gradient="truncated:4/2")
        self.head = nn.Linear(H, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(tokens[:-1]))
        return nn.functional.cross_entropy(self.head(y).flatten(0, 1), tokens[1:].flatten())


def calls_of(graph: GraphModule) -> list[str]:
    """The names of our operators that a graph calls."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target.split(".")[1] for target in targets if target.startswith("bptt.")]


def test_a_model_trains_alike_and_holds_the_operators(agree: Agree) -> None:
    graphs: list[list[str]] = []

    def kept(graph: GraphModule, _: Any) -> Any:
        graphs.append(calls_of(graph))
        return make_boxed_func(graph)

    model, data = Model().double(), torch.randint(11, (3, 9, 2))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    losses = []
    for f in (model, compiled(model, backend=aot_autograd(fw_compiler=kept))):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for tokens in data:
            optimizer.zero_grad()
            loss = f(tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    agree(losses[3:], losses[:3])
    assert losses[0] > losses[2]
    assert graphs == [["stack_forward"], ["stack_backward"]]


def test_nothing_is_taped_without_a_gradient() -> None:
    sizes = []

    def kept(graph: GraphModule, _: Any) -> Any:
        node = next(node for node in graph.graph.nodes if "stack_forward" in str(node.target))
        sizes.append(len(node.meta["val"]))
        return make_boxed_func(graph)

    layer = layer_of(ROWS["gru_random"])
    with torch.no_grad():
        y, _ = compiled(layer, backend=aot_autograd(fw_compiler=kept))(torch.randn(7, 2, I).double())
    assert not y.requires_grad
    assert sizes == [2]  # the top layer's states, of which y is a part, and h_n


def test_random_numbers_are_in_the_graph_once_each() -> None:
    """Two directions draw twice, and each call anew: nothing is folded or merged."""
    seen: list[int] = []

    def kept(graph: GraphModule, _: Any) -> Any:
        seen.append(sum("rand" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    layer, x = layer_of(ROWS["lstm_random"]), torch.randn(9, 4, I).double()
    f = compiled(layer, backend=aot_autograd(fw_compiler=kept))
    first, second = (torch.autograd.grad(f(x)[0].sum(), layer.weight_hh_l0)[0] for _ in range(2))
    assert seen == [2, 0]
    assert (first - second).abs().max() > 0


def test_a_generator_breaks_the_graph(agree: Agree) -> None:
    """torch cannot put a generator into a graph; without fullgraph the values are right."""
    generator = torch.Generator()
    row = Row("gru", {"gradient": bptt.Randomized(0.5, generator=generator)})
    layer = layer_of(row)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(layer)(torch.randn(7, 2, I).double())
    results = []
    for f in (layer, torch.compile(layer, backend="eager")):
        generator.manual_seed(1)
        results.append(call(row, layer, f, 7, 2))
    agree(results[1], results[0])


# Whatever else autograd and torch do


def test_second_derivatives(agree: Agree) -> None:
    """They are the layer's where the operator is run as it is; a compiled backward is torch's, which has none."""
    layer, x = layer_of(ROWS["rnn"]), torch.randn(7, 2, I).double()

    def second(f: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(x)[0].square().sum(), layer.weight_hh_l0, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), list(layer.parameters()))

    agree(second(compiled(layer, backend="eager")), second(layer))
    with pytest.raises(RuntimeError, match="double backward"):
        second(compiled(layer))


def test_autocast(agree: Agree) -> None:
    row = ROWS["gru_bi"]
    layer = layer_of(row, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(call(row, layer, compiled(layer), 7, 3), call(row, layer, layer, 7, 3))


# torch.compile looks at the gradient of every tensor that enters a frame, and warns itself that y is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_packed_sequence_breaks_the_graph(agree: Agree) -> None:
    """Lengths are values, not shapes; what is around the layer is compiled."""
    layer = layer_of(Row("lstm", {"gradient": "chunked:2"}))
    packed = pack_sequence([torch.randn(n, I).double() for n in (5, 3, 2)])
    results = []
    for f in (layer, torch.compile(layer, backend="aot_eager")):
        y, _ = f(packed)
        results.append([y.data, *torch.autograd.grad(y.data.square().sum(), list(layer.parameters()))])
    agree(results[1], results[0])


# torch.compile itself makes an instance of an autograd.Function, and looks at the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_functional_gradient_inside(agree: Agree) -> None:
    """torch.func's transforms take the way without operators, compiled or not."""
    layer, x = layer_of(ROWS["rnn"]), torch.randn(2, 2, I).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].square().sum())
    agree(torch.compile(gradient, backend="aot_eager")(parameters), gradient(parameters))


def test_make_fx() -> None:
    layer, x = layer_of(ROWS["gru_bi"]), torch.randn(7, 2, I).double()

    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x)[0].square().sum(), layer.weight_hh_l0)[0]

    for mode in ("real", "symbolic"):
        graph = make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert calls_of(graph) == ["stack_forward", "stack_backward"]
        torch.testing.assert_close(graph(x), f(x))


def test_export() -> None:
    layer = layer_of(Row("lstm", {"num_layers": 2, "gradient": "truncated:2"}))
    shape = {0: torch.export.Dim("T", min=3), 1: torch.export.Dim("B", min=2)}
    with warnings.catch_warnings():
        # torch.export copies tree specifications in a way that torch.utils._pytree has deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        exported = torch.export.export(layer, (torch.randn(7, 3, I).double(),), dynamic_shapes=(shape,), strict=False)
    assert calls_of(exported.graph_module) == ["stack_forward"]
    x = torch.randn(12, 4, I).double()
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_tensors_without_data() -> None:
    with FakeTensorMode():
        layer = bptt.nn.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=2, gradient="chunked:3")
        x = torch.randn(7, 4, I, requires_grad=True)
        y, (h, c) = layer(x)
        y.sum().backward()
    assert (y.shape, h.shape, c.shape) == ((7, 4, 4), (4, 4, 2), (4, 4, H))
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def test_an_eager_call_takes_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "OPERATORS", {ops.Stack: None})
    y, _ = bptt.nn.GRU(I, H)(torch.randn(7, 2, I))
    y.sum().backward()


# The operators by themselves


@pytest.mark.parametrize("name", ["gru_bi", "lstm_dropout", "lstm_proj"])
def test_the_operators_keep_torchs_rules(name: str) -> None:
    row = ROWS[name]
    layer = layer_of(row)
    x = torch.randn(7, 3, I).double()
    resets = torch.rand(7, 3) < 0.3 if row.resets else None
    made = Call.of(layer, x.transpose(0, 1) if layer.batch_first else x, None, resets)
    net = net_of(layer, made, layer.gradient, differentiated=True)
    layout = ops.text(net, whole_tape(layer, net).decided(made.tensors).memory)
    tensors = [*made.tensors, *ops.held(net)]
    for keep in (True, False):
        opcheck(torch.ops.bptt.stack_forward.default, (tensors, layout, keep))
    bare = [t.detach() for t in tensors]
    results = torch.ops.bptt.stack_forward(bare, layout, True)
    cotangents = [torch.randn_like(results[0]), *[None] * (net.outputs - 1)]
    needs = [i != 1 and i < len(made.tensors) for i in range(len(bare))]
    opcheck(torch.ops.bptt.stack_backward.default, (bare, layout, results, cotangents, needs))


def test_the_draw_keeps_torchs_rules() -> None:
    uniform = torch.rand(6, 3, dtype=torch.float64)
    policy = bptt.Randomized((0.5, 0.9))
    opcheck(torch.ops.bptt.draw.default, (uniform, str(policy)))
    torch.testing.assert_close(torch.ops.bptt.draw(uniform, str(policy)), policy.weights(uniform))


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_is_read_as_it_was_written(name: str) -> None:
    layer = layer_of(ROWS[name])
    x = torch.randn(4, 4, I).double()
    net = net_of(layer, Call.of(layer, x, None, None), layer.gradient, differentiated=False)
    layout = ops.text(net, "gates")
    read, memory = ops.plain(layout)
    assert memory == "gates"
    for part in ("cell", "kernel", "layers", "directions", "per_layer", "biased", "reach"):
        assert getattr(read, part) == getattr(net, part)
    assert ops.text(read, memory).split()[:-1] == layout.split()[:-1]
