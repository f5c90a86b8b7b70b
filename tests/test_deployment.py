"""torch.export in every form of a call, AOTInductor, and torch.nn's layers for TorchScript and quantisation."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import as_tuple
from torch import Tensor, nn

import bptt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

I, H = 3, 5
SIZES = ((2, 3), (12, 2), (3, 5))

ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {  # the layer, its settings, whether hx is given
    "tanh": ("RNN", {"gradient": "truncated:9"}, True),
    "identity": ("RNN", {"nonlinearity": "identity", "bias": False, "num_layers": 2}, False),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "gradient": "truncated:4/2"}, True),
    "gru_gates": ("GRU", {"bidirectional": True, "gradient": "chunked:3", "memory": "gates"}, False),
    "lstm": ("LSTM", {"num_layers": 3, "gradient": "chunked:4"}, False),
    "lstm_projected": ("LSTM", {"proj_size": 2, "bidirectional": True, "kernel": "eager"}, True),
}


class From(nn.Module):
    """A model whose first states are given."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *hx: Tensor) -> Any:
        return self.layer(x, hx[0] if len(hx) == 1 else hx)


class Ragged(nn.Module):
    """Two layers, the first on sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "gradient": "truncated:4/2"}
        self.first = bptt.nn.GRU(I, H, batch_first=True, dtype=torch.float64, **settings)
        self.second = bptt.nn.LSTM(2 * H, 4, proj_size=2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor, lengths: Tensor) -> Any:
        y, h = self.first(x, h, lengths=lengths)
        y, (h_2, c_2) = self.second(y)
        return y, h, h_2, c_2


def ragged(T: int, *lengths: int) -> tuple[Tensor, ...]:
    B = len(lengths)
    return torch.randn(B, T, I).double(), torch.randn(4, B, H).double(), torch.tensor(lengths)


def exported(model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, dynamic_shapes=shapes)


def dims() -> tuple[Any, Any]:
    return torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_an_exported_layer_is_the_layer_at_any_size(name: str) -> None:
    """Exported with gradients, of at least 2 steps and lanes, as torch.export asks of any size that may change."""
    kind, settings, given = ROWS[name]
    torch.manual_seed(0)
    layer = getattr(bptt.nn, kind)(I, H, dtype=torch.float64, **settings)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or H, H)[: layer.cell().states] if given else ()

    def inputs(T: int, B: int) -> tuple[Tensor, ...]:
        x = torch.randn(B, T, I) if layer.batch_first else torch.randn(T, B, I)
        return (x.double(), *(torch.randn(K, B, size).double() for size in sizes))

    T, B = dims()
    x = {0: B, 1: T} if layer.batch_first else {0: T, 1: B}
    model, shapes = (From(layer), (x, tuple({1: B} for _ in sizes))) if given else (layer, (x,))
    module = exported(model, inputs(7, 4), shapes).module()
    for size in SIZES:
        args = inputs(*size)
        expected = [t for part in model(*args) for t in as_tuple(part)]
        torch.testing.assert_close([t for part in module(*args) for t in as_tuple(part)], expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sequences_of_several_lengths_are_exported_and_compiled_ahead_of_time(tmp_path: Path) -> None:
    model, (T, B) = Ragged().eval(), dims()
    program = exported(model, ragged(7, 7, 2, 4), ({0: B, 1: T}, {1: B}, {0: B}))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for args in (ragged(7, 7, 2, 4), ragged(9, 5, 9), ragged(6, 3, 3)):
        with torch.no_grad():
            expected = model(*args)
            for module in (program.module(), compiled):
                torch.testing.assert_close(tuple(module(*args)), expected)


def test_sequences_of_several_lengths_are_recorded() -> None:
    model = Ragged()
    traced = torch.jit.trace(model, ragged(7, 7, 2, 4), check_trace=False)
    for args in (ragged(9, 5, 9), ragged(4, 1)):
        torch.testing.assert_close(traced(*args), model(*args))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = bptt.nn.GRU(I, H)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.layer(x, cu_seqlens=cu_seqlens)[0]


def test_flat_sequences_have_no_graph() -> None:
    args = torch.randn(5, I), torch.tensor([0, 2, 5])
    with pytest.raises(NotImplementedError, match="pass lengths="):
        exported(Flat(), args, None)
    with pytest.raises(NotImplementedError, match=r"cu_seqlens.*torch\.export"):
        torch.jit.trace(Flat(), args)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_reverted_model_is_quantised_and_scripted(kind: str) -> None:
    """Of a copy, since `revert` works in place; quantize_dynamic leaves a layer of ours as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(getattr(bptt.nn, kind)(16, 32, num_layers=2, bidirectional=True, gradient="chunked:8")).eval()
    plain = bptt.revert(copy.deepcopy(model))
    x = torch.randn(20, 3, 16)
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.LSTM, nn.GRU}, dtype=torch.qint8)
    assert "DynamicQuantized" in repr(quantised)
    with torch.no_grad():
        torch.testing.assert_close(quantised(x)[0], model(x)[0], rtol=0, atol=0.02)
        torch.testing.assert_close(torch.jit.script(plain)(x)[0], model(x)[0])
    assert type(model[0]) is getattr(bptt.nn, kind)
