"""`revert`: what comes back is torch.nn's, and what cannot is named."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from variants import KINDS, Agree

import bptt


@pytest.mark.parametrize("kind", KINDS)
def test_a_reverted_layer_is_torchs(kind: str) -> None:
    for training in (True, False):
        layer = getattr(bptt.nn, kind)(5, 4, 2, dropout=0.3, bidirectional=True, gradient="chunked:3").train(training)
        back = bptt.revert(layer)
        fresh = getattr(nn, kind)(5, 4, 2, dropout=0.3, bidirectional=True)
        assert type(back) is type(fresh)
        assert repr(back) == repr(fresh)
        assert vars(back).keys() == vars(fresh).keys()
        assert back.training is training
        assert all(a is b for a, b in zip(back.parameters(), layer.parameters(), strict=True))
        assert all(a is b for a, b in zip(back._flat_weights, back.parameters(), strict=True))


LATER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "at once": lambda layer: layer,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.half().to(torch.float32).float(),
    "torch.save": lambda layer: saved(layer),
    "load": lambda layer: (layer.load_state_dict({n: 2 * v for n, v in layer.state_dict().items()}), layer)[1],
    "assign": lambda layer: (
        layer.load_state_dict({n: 2 * v for n, v in layer.state_dict().items()}, assign=True),
        layer,
    )[1],
    "step": lambda layer: stepped(layer),
    "script": lambda layer: torch.jit.script(Caller(layer)),
    "quantised": lambda layer: torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.LSTM, nn.GRU})[0],
}


class Caller(nn.Module):
    """TorchScript chooses between the forms of forward where a layer is called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stepped(layer: nn.Module) -> nn.Module:
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(7, 3, 5))[0].sum().backward()
    optimiser.step()
    return layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript and quantize_dynamic are
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("how", LATER)
def test_a_reverted_layer_is_used_as_torchs(kind: str, how: str, agree: Agree) -> None:
    """torch calls its kernels with a list of weights that it keeps beside the parameters."""
    expected = getattr(nn, kind)(5, 4, 2)
    ours = getattr(bptt.nn, kind)(5, 4, 2, gradient="chunked:2", memory="checkpoints")
    ours.load_state_dict(expected.state_dict(), assign=True)
    ours(torch.zeros(7, 3, 5))
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.detach().clone())
    expected, actual = LATER[how](copy.deepcopy(expected)), LATER[how](bptt.revert(ours))
    x = torch.randn(7, 3, 5)
    agree(actual(x), expected(x), tolerance=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_reverted_layer_is_traced(agree: Agree) -> None:
    layer = bptt.revert(bptt.nn.LSTM(5, 4, gradient="chunked:2"))
    traced = torch.jit.trace(layer, torch.zeros(7, 3, 5))
    x = torch.randn(7, 3, 5)
    agree(traced(x), layer(x))


def test_what_torch_lacks_is_named() -> None:
    rnns = {name: bptt.nn.RNN(5, 4, nonlinearity=name) for name in ("tanh", "relu", "sigmoid", "identity")}
    model = nn.ModuleDict(rnns)
    with pytest.raises(ValueError, match=r"'sigmoid' \(RNN\) has nonlinearity='sigmoid'; 'identity' \(RNN\) has non"):
        bptt.revert(model)
    assert dict(model) == rnns
    with pytest.raises(ValueError, match=r"the model itself \(RNN\) has nonlinearity='identity'"):
        bptt.revert(rnns["identity"])


def test_revert_of_what_holds_no_layer_of_ours() -> None:
    for model in (nn.Linear(5, 4), nn.GRU(5, 4), nn.Sequential(nn.LSTMCell(5, 4))):
        assert bptt.revert(model) is model
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module: got str"):
        bptt.revert("model")
