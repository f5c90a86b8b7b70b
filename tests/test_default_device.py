"""Another default device changes nothing: what is given on the CPU is computed there, with the same numbers.

`meta` is the strictest one, since whatever strays there has no numbers.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from train.tiny import tiny, write_text

import bptt
from bptt import flow
from bptt.nn import init
from bptt.train import Lanes, RandomWindows, Sequential, Tokens, Trainer, Vocabulary, generate, prepare
from bptt.train.inspection import record_next

T, B, I, H = 9, 3, 2, 4
POLICIES = ["full", "chunked:4", "truncated:3", "truncated:5/2", "randomized:0.5", "randomized:0.4,0.9",
            "randomized:mean=4,tail=3", "adaptive:0.5,max=4"]  # fmt: skip
MEMORIES = ["gates", "states", "checkpoints", "checkpoints:steps=3", "checkpoints:bytes=2000"]
CLOCKED = ("seconds", "time", "cores", "layer", "tokens_per_second")
"""Fields that no two runs have in common, or that say where a thing is."""

LAYERS = {"rnn": bptt.nn.RNN, "gru": bptt.nn.GRU, "lstm": bptt.nn.LSTM}
FORMS = ["plain", "packed", "resets"]


@contextmanager
def within(way: str) -> Iterator[None]:
    """Another default device, by the `with` statement or the setting."""
    if way == "with":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def parts(value: Any) -> Iterator[Any]:
    """The tensors, arrays, numbers and words in a result."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, PackedSequence):
        value = (value.data, value.batch_sizes)
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.name not in CLOCKED]
        value = [getattr(value, name) for name in names]
    if isinstance(value, tuple | list):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Tensor | np.ndarray | int | float | str | None):
        yield value


def unchanged(prepare: Callable[[], Callable[[], Any]], way: str = "with") -> None:
    """What is prepared on the CPU gives the same within another default device."""
    torch.manual_seed(3)
    expected = list(parts(prepare()()))
    torch.manual_seed(3)
    run = prepare()
    with within(way):
        got = list(parts(run()))
    assert any(isinstance(value, Tensor | np.ndarray | float) for value in expected)
    assert all(value.device.type == "cpu" for value in got if isinstance(value, Tensor))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, Tensor | np.ndarray | float):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def layer_of(cell: str, **options: Any) -> Any:
    return LAYERS[cell](I, H, 2, **options)


def called(cell: str, form: str, **options: Any) -> Callable[[], Any]:
    """A training step of a layer."""
    layer, x = layer_of(cell, dropout=0.3, **options), torch.randn(T, B, I, requires_grad=True)
    given = {"resets": torch.rand(T, B) < 0.3} if form == "resets" else {}
    weight = torch.randn(T * B, 2 * H)
    input = pack_padded_sequence(x, torch.tensor([4, 9, 6]), enforce_sorted=False) if form == "packed" else x

    def step() -> Any:
        y, final = layer(input, **given)
        rows = (y.data if form == "packed" else y).flatten(0, -2)
        (rows * weight[: len(rows), : rows.shape[1]]).sum().backward()
        return y, final, x.grad, [p.grad for p in layer.parameters()]

    return step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", POLICIES)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_training_step(cell: str, gradient: str, form: str):
    for memory in MEMORIES:
        unchanged(lambda memory=memory: called(cell, form, gradient=gradient, memory=memory))


@pytest.mark.parametrize("way", ["with", "set"])
@pytest.mark.parametrize("kernel", ["eager", "cpu"])
@pytest.mark.parametrize("gradient", POLICIES)
@pytest.mark.parametrize("form", FORMS)
def test_both_directions_and_kernels(gradient: str, kernel: str, form: str, way: str):
    unchanged(lambda: called("gru", form, gradient=gradient, kernel=kernel, bidirectional=True), way)


def test_an_own_generator_gives_the_numbers_it_gives_elsewhere():
    def prepare() -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(5)
        policy = bptt.Randomized((0.5, 0.9), generator=generator)
        return lambda: [policy.draw(6, 2), policy.draw(6, 2), policy.weights(torch.full((3, 1), 0.7, device="cpu"))]

    unchanged(prepare)


def test_weights_of_xi_lie_where_the_numbers_do():
    assert bptt.Randomized((0.5, 0.9)).weights(torch.zeros(3, 2, device="meta")).device.type == "meta"


MASK = torch.arange(T)[:, None] < torch.tensor([T, 5, 7])


class Model(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(H, 2)

    def forward(self, x: Any) -> Tensor:
        y = self.layer(x)[0]
        return self.head(y.data if isinstance(y, PackedSequence) else y)


def square(y: Any) -> Tensor:
    return (y.data if isinstance(y, PackedSequence) else y).square().mean()


def streamed(gradient: str, source: str, cell: str = "lstm") -> Callable[[], Any]:
    layer = LAYERS[cell](I, H, gradient=gradient)
    x = {"tensor": torch.randn(T, B, I), "array": np.ones((T, B, I), np.float32)}.get(source)
    pieces = [np.ones((4, B, I), np.float32), torch.randn(5, B, I)]
    given = {"resets": np.eye(T, B, dtype=bool)} if source == "array" else {}

    def run() -> Any:
        found = bptt.stream_gradients(layer, pieces if x is None else x, lambda steps, y: y.square().sum(), **given)
        return found.loss, found.parameters, found.hx, found.final

    return run


@pytest.mark.parametrize("source", ["tensor", "array", "pieces"])
@pytest.mark.parametrize("gradient", POLICIES)
def test_streams(gradient: str, source: str):
    unchanged(lambda: streamed(gradient, source))


def of_layer(function: Callable[..., Any], cell: str = "lstm", **options: Any) -> Callable[[], Any]:
    """A function of (layer, x) with errors of a fixed seed, of a model and a packed batch with a loss."""

    def prepare() -> Callable[[], Any]:
        layer, x = layer_of(cell, **options), torch.randn(T, B, I)
        packed = pack_padded_sequence(x, torch.tensor([4, 9, 6]), enforce_sorted=False)
        model = Model(LAYERS[cell](I, H, **options))
        return lambda: [function(layer, x), function(layer, packed), function(model, x, square),
                        function(model, packed, square)]  # fmt: skip

    return prepare


MEASURES: dict[str, Callable[[], Callable[[], Any]]] = {
    "survey": of_layer(lambda *of: flow.survey(*of, policies=["full", "chunked:3"])),
    "compare": lambda: _compared("chunked:4", "randomized:0.5", "adaptive:0.5,max=4"),
    "adapted": of_layer(lambda *of: flow.adapted(*of, policy=bptt.Adaptive(0.5, 8))),
    "adapt": of_layer(flow.adapt, gradient="adaptive:0.5,max=8"),
    "by_lag": of_layer(lambda *of: flow.by_lag(flow.lag_map(*of))),
    "spectrum": of_layer(lambda *of: flow.spectrum(of[0].layer if isinstance(of[0], Model) else of[0])),
    "pairs": lambda: lambda: [flow.pairs(bptt.policies.parse(policy), T) for policy in POLICIES],
    **{
        name: of_layer(getattr(flow, name))
        for name in ("record", "lag_map", "shares", "jacobians", "products", "lyapunov", "gates", "cell_path")
    },
}


def _compared(*policies: str) -> Callable[[], Any]:
    layer, x = bptt.nn.LSTM(I, H), torch.randn(12, B, I)  # too long for all cuts to be walked: they are sampled
    packed = pack_padded_sequence(x[:5], torch.tensor([5, 3, 2]))  # and here they are walked

    def run() -> Any:
        found = [flow.compare(layer, given, policies=policies, draws=3) for given in (x, packed)]
        rows = [dataclasses.replace(row, bytes=None) for one in found for row in one.rows]
        assert {row.exact for row in rows if "randomized" in row.policy} == {True, False}
        return rows, [(one.full_norm, one.contraction) for one in found]

    return run


@pytest.mark.parametrize("name", MEASURES)
def test_measurements(name: str):
    unchanged(MEASURES[name])


def watched() -> Callable[[], Any]:
    model, x = Model(bptt.nn.GRU(I, H, 2, dropout=0.2, gradient="randomized:0.5")), torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor([4, 9, 6]), enforce_sorted=False)

    def run() -> Any:
        found = []
        with flow.watch(model) as doctor:
            for batch in (x, packed):
                square(model(batch)).backward()
                found += [doctor.check(), doctor.examine()]
            with torch.no_grad():
                model.layer.weight_hh_l1[1, 2] = torch.nan
            model.zero_grad()
            square(model(x)).backward()
            found.append(doctor.check())
        return found, [p.grad for p in model.parameters()]

    return run


ENTRIES: dict[str, Callable[[], Callable[[], Any]]] = {
    "watch": watched,
    "gradients": lambda: _of(lambda layer, x: vars(bptt.gradients(layer, x, dy=x[..., :1].expand(T, B, H).clone()))),
    "plan": lambda: _of(lambda layer, x: [0.5, dataclasses.astuple(bptt.plan(layer, 50, B))[:4]]),
    "explain": lambda: _of(lambda layer, x: [0.5, str(bptt.explain(layer, x))]),
    "convert": lambda: _of(lambda layer, x: bptt.convert(torch.nn.LSTM(I, H, device="cpu"), "chunked:3")(x)),
    "forget_bias_": lambda: _of(lambda layer, x: init.forget_bias_(layer).state_dict()),
    "chrono_": lambda: _of(lambda layer, x: init.chrono_(layer, 20).state_dict()),
    "chrono_ drawn": lambda: _drawn(lambda layer, g: init.chrono_(layer, 20, generator=g)),
    "orthogonal_": lambda: _of(lambda layer, x: init.orthogonal_(layer).state_dict()),
    "orthogonal_ drawn": lambda: _drawn(lambda layer, g: init.orthogonal_(layer, generator=g)),
    "radius_": lambda: _of(lambda layer, x: init.radius_(layer, 0.9).state_dict(), bptt.nn.RNN),
    "identity_": lambda: _of(
        lambda layer, x: init.identity_(layer).state_dict(), lambda *a: bptt.nn.RNN(*a, nonlinearity="relu")
    ),
    "lanes": lambda: (
        lambda: [
            [tuple(w), w.fresh, w.tokens, w.total, w.place]
            for w in Lanes(
                [[1, 2, 3], (4, 5), np.arange(7), torch.arange(4, device="cpu")], 2, 3, shuffle=True, epochs=2
            )
        ]
    ),
    "tokens": lambda: (
        lambda: [tuple(w) for w in Lanes(Tokens(np.array([3, 1, 0, 4, 5, 6, 0, 2, 2]), separator=0), 1, 3)]
    ),
    "sequential": lambda: _texts(lambda ids: list(map(tuple, Sequential(ids, 3, 2)))),
    "random windows": lambda: _texts(lambda ids: [tuple(RandomWindows(ids, 3, 2, 1).window(1, i)) for i in range(3)]),
    "vocabulary": lambda: (
        lambda: [
            Vocabulary.build("abcab", "char").encode("abc"),
            Vocabulary.build(["a", "b"], "word").encode(["b", "a"]),
        ]
    ),
}


def _of(function: Callable[[Any, Tensor], Any], make: Any = bptt.nn.LSTM) -> Callable[[], Any]:
    layer, x = make(I, H), torch.randn(T, B, I)
    return lambda: function(layer, x)


def _drawn(function: Callable[[Any, torch.Generator], Any]) -> Callable[[], Any]:
    layer, generator = bptt.nn.LSTM(I, H), torch.Generator().manual_seed(2)
    return lambda: function(layer, generator).state_dict()


def _texts(function: Callable[[Tensor], Any]) -> Callable[[], Any]:
    ids = torch.arange(30)
    return lambda: function(ids)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries(name: str):
    unchanged(ENTRIES[name])


TRAINING = [
    {},
    {"documents": "lines", "accumulate": 2, "dropout": 0.2},
    {"batching": "random", "optimiser": "sgd", "gradient": "randomized:0.5", "layers": 2, "dropout": 0.2},
    {"gradient": "adaptive:0.5,max=5", "embedding": 0, "cell": "lstm", "memory": "checkpoints:bytes=100000"},
]


@pytest.mark.parametrize("options", TRAINING)
def test_training_and_sampling(options: dict[str, Any], tmp_path: Path):
    config = tiny(write_text(tmp_path, "the quick brown fox\njumps over\nthe lazy dog\n" * 20), **options)

    def run() -> Any:
        trainer = Trainer(config, prepare(config))
        steps = [dataclasses.replace(step, seconds=0.0) for step, _ in zip(trainer.run(), range(5), strict=False)]
        state = trainer.state()
        record = trainer.record(heldout=True)
        recorded = record_next(trainer)
        again = Trainer(config, prepare(config))
        again.restore(state)
        model, vocabulary = trainer.model.eval(), trainer.task.vocabulary
        drawn = list(generate(model, vocabulary, [1, 2], 20)) + list(generate(model, vocabulary, [], 5))
        return steps, state["optimiser"], state["carry"], recorded, record.loss, again.advance().nll, drawn

    unchanged(lambda: run)


FACTORIES = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted"),
    *("empty_quantized", "empty_strided", "eye", "fftfreq", "full", "hamming_window", "hann_window", "kaiser_window"),
    *("linspace", "logspace", "nested_tensor", "ones", "rand", "randint", "randn", "randperm", "range", "rfftfreq"),
    *("scalar_tensor", "sparse_bsc_tensor", "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor"),
    *("sparse_csc_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
"""What torch makes on the default device where none is named, by its own list."""

EXEMPT = {
    "bench": "layers and input are made together, on whatever device is the default one",
    "cli": "a process of its own, in which nobody sets a default device",
}
"""Rooms whose factory calls need name no device, and why."""

PACKAGE = Path(bptt.__file__).parent
ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} - EXEMPT.keys())


def of_torch(node: ast.expr) -> bool:
    """Whether an attribute is one of torch or its modules."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


def nameless(path: Path) -> Iterator[str]:
    """The factory calls of a file that name no device."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        attribute = isinstance(function, ast.Attribute) and function.attr in FACTORIES and of_torch(function)
        name = isinstance(function, ast.Name) and function.id in FACTORIES & taken
        if (attribute or name) and not any(keyword.arg in ("device", None) for keyword in node.keywords):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", ROOMS)
def test_factory_calls_name_their_device(room: str):
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    assert [call for path in files for call in nameless(path)] == []


def test_the_list_of_factories_is_torchs():
    from torch.utils._device import _device_constructors

    assert {function.__name__.removeprefix("fft_") for function in _device_constructors()} <= FACTORIES
