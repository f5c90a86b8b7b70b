"""ONNX: a layer is the standard LSTM, GRU or RNN operator, and ONNX Runtime computes the layer's numbers with it."""

import io
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from reference import as_tuple
from torch import Tensor, nn

import bptt

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]

needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

I, H = 3, 5
SIZES = ((7, 3), (11, 2), (1, 1), (4, 6))
"""Steps and lanes: those of the export, and others."""

LAYERS: dict[str, dict[str, Any]] = {
    "tanh": {"gradient": "chunked:3"},
    "relu": {"num_layers": 2, "bidirectional": True},
    "sigmoid": {"bidirectional": True, "bias": False},
    "identity": {"bidirectional": True, "batch_first": True},
    "gru": {"num_layers": 2, "gradient": "randomized:0.6"},
    "gru_both_ways": {"num_layers": 2, "bidirectional": True, "batch_first": True, "gradient": "truncated:4/2"},
    "lstm": {"memory": "checkpoints"},
    "lstm_both_ways": {"num_layers": 2, "bidirectional": True, "bias": False, "kernel": "eager"},
    "lstm_projected": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
}


def layer_of(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = {"gru": bptt.nn.GRU, "lstm": bptt.nn.LSTM}.get(name.split("_")[0])
    settings = {**LAYERS[name], **settings}
    return bptt.nn.RNN(I, H, nonlinearity=name, **settings) if kind is None else kind(I, H, **settings)


class From(nn.Module):
    """A model whose first states are given."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *hx: Tensor) -> Any:
        return self.layer(x, hx[0] if len(hx) == 1 else hx)


def inputs(layer: Any, T: int, B: int) -> tuple[Tensor, ...]:
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or H, H)[: layer.cell().states]
    x = torch.randn(B, T, I) if layer.batch_first else torch.randn(T, B, I)
    return (x, *(torch.randn(K, B, size) for size in sizes))


def shapes(layer: Any, given: bool) -> tuple[Any, ...]:
    T, B = (torch.export.Dim(name, min=2) for name in "TB")
    x = {0: B, 1: T} if layer.batch_first else {0: T, 1: B}
    return (x, tuple({1: B} for _ in range(layer.cell().states))) if given else (x,)


def saved(model: Any, args: Any = (), **keywords: Any) -> tuple[Any, list[str]]:
    """(ONNX Runtime's session, the operators) of what torch.onnx.export makes."""
    import onnxruntime

    program = torch.onnx.export(model, args, dynamo=True, verbose=False, **keywords)
    file = io.BytesIO()
    program.save(file)
    kinds = [node.op_type for node in program.model.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"]), kinds


def computed(session: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    names = [place.name for place in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))]


def flat(out: Any) -> list[Tensor]:
    return [t for part in out for t in as_tuple(part)]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_onnx_runtime_agrees(name: str) -> None:
    """Of any steps and lanes; one operator for each layer, both directions in it."""
    layer = layer_of(name)
    model = From(layer)
    args = inputs(layer, *SIZES[0])
    session, kinds = saved(model, args, dynamic_shapes=shapes(layer, given=True))
    assert kinds == [layer.cell().name.upper()] * layer.num_layers
    for T, B in SIZES:
        given = inputs(layer, T, B)
        with torch.no_grad():
            expected = flat(model(*given))
        torch.testing.assert_close(computed(session, given), expected, rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["identity", "gru", "lstm_projected"])
def test_a_program_of_torch_export_is_decomposed(name: str) -> None:
    layer = layer_of(name).eval()
    with torch.no_grad():
        program = torch.export.export(layer, inputs(layer, 7, 3)[:1], dynamic_shapes=shapes(layer, given=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session, kinds = saved(program.run_decompositions(bptt.onnx_decompositions()))
        assert kinds == [layer.cell().name.upper()] * layer.num_layers
        x = inputs(layer, 12, 4)[0]
        torch.testing.assert_close(computed(session, (x,)), flat(layer(x)), rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.slow
def test_a_program_with_a_bptt_operator_is_refused() -> None:
    program = torch.export.export(layer_of("lstm", memory="auto"), (torch.randn(7, 3, I),))
    with pytest.raises(Exception, match=r"run_decompositions\(bptt\.onnx_decompositions\(\)\)"):
        torch.onnx.export(program, dynamo=True, verbose=False)


class Padded(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, lengths=lengths)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "gru_both_ways", "lstm_projected"])
def test_onnx_runtime_agrees_on_sequences_of_several_lengths(name: str) -> None:
    layer = layer_of(name)
    model, x = Padded(layer), shapes(layer, given=False)[0]
    lanes = x[0 if layer.batch_first else 1]
    args = inputs(layer, 7, 3)[0], torch.tensor([7, 2, 4])
    session, kinds = saved(model, args, dynamic_shapes=(x, {0: lanes}))
    assert kinds == [layer.cell().name.upper()] * layer.num_layers
    for lengths in ([7, 2, 4], [5, 9], [1, 1, 1, 3]):
        given = inputs(layer, 9, len(lengths))[0], torch.tensor(lengths)
        with torch.no_grad():
            expected = flat(model(*given))
        torch.testing.assert_close(computed(session, given), expected, rtol=1e-5, atol=1e-5)


class Resetting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = layer_of("gru")

    def forward(self, x: Tensor, resets: Tensor) -> Tensor:
        return self.layer(x, resets=resets)[0]


@needs_onnx
@pytest.mark.slow
def test_resets_are_refused() -> None:
    with pytest.raises(Exception, match="ONNX's operators have no resets"):
        torch.onnx.export(Resetting(), (torch.randn(7, 3, I), torch.rand(7, 3) < 0.3), dynamo=True, verbose=False)


def test_a_program_exported_with_gradients_is_decomposed() -> None:
    """What is kept for a backward pass has shapes alone."""
    for name in ("tanh", "gru", "lstm_both_ways"):
        layer = layer_of(name)
        program = torch.export.export(layer, (torch.randn(7, 3, I),)).run_decompositions(bptt.onnx_decompositions())
        targets = [str(node.target) for node in program.graph.nodes]
        assert sum("symbolic_multi_out" in target for target in targets) == layer.num_layers
        assert not [target for target in targets if "bptt" in target]
        with torch.no_grad():
            got, expected = flat(program.module()(torch.randn(7, 3, I))), flat(layer(torch.randn(7, 3, I)))
        assert [t.shape for t in got] == [t.shape for t in expected]
