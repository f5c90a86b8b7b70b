"""opacus itself: the gradient of each sample is the one that a loss of this sample alone gives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bptt

opacus = pytest.importorskip("opacus", reason="needs the extra opacus")
adaptor = pytest.importorskip("bptt.adaptors.opacus", reason="needs the extra opacus", exc_type=ImportError)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

T, B = 7, 3


class Model(nn.Module):
    """A layer whose output and final state are both read."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(4 * (2 if layer.bidirectional else 1), 2)
        self.double()

    def forward(self, x: Tensor, hx: Any = None, packed: bool = False, **options: Any) -> Tensor:
        batch_first = getattr(self.rnn, "layer", self.rnn).batch_first
        x = pack_padded_sequence(x, [4, T, 2], batch_first, enforce_sorted=False) if packed else x
        y, final = self.rnn(x, hx, **options)
        y = pad_packed_sequence(y, batch_first)[0] if packed else y
        states = [final] if isinstance(final, Tensor) else final
        return self.head(y).sum(1 if batch_first else 0) + sum(s.sin().sum((0, 2)) for s in states)[:, None]


@pytest.mark.parametrize("form", ["padded", "packed", "hx", "resets"])
@pytest.mark.parametrize("gradient", ["full", "truncated:3", "randomized:0.7"])
@pytest.mark.parametrize(
    ("cell", "both", "batch_first"), [("RNN", False, True), ("GRU", True, False), ("LSTM", True, True)]
)
def test_gradients_of_samples(cell: str, both: bool, batch_first: bool, gradient: str, form: str, agree: Any) -> None:
    torch.manual_seed(0)
    net: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dropout": 0.3} if both else {}
    plain = Model(getattr(bptt.nn, cell)(5, 4, batch_first=batch_first, gradient=gradient, **net))
    model = opacus.validators.ModuleValidator.fix_and_validate(plain)
    wrapped = opacus.GradSampleModule(model, batch_first=batch_first, loss_reduction="mean")
    shape, options = (B, T) if batch_first else (T, B), dict[str, Any]()
    if form == "hx":
        h = torch.randn(4 if both else 1, B, 4).double()
        options["hx"] = (h, h + 1) if cell == "LSTM" else h
    if form == "resets":
        options["resets"] = torch.rand(shape) < 0.3
    options["packed"] = form == "packed"
    x = torch.randn(*shape, 5).double()

    def pulled(net: nn.Module, samples: Tensor) -> None:
        torch.manual_seed(5)
        (net(x, **options).sin().sum(1) * samples).mean().backward()

    pulled(wrapped, torch.ones(B).double())
    for b, sample in enumerate(torch.eye(B).double()):
        plain.zero_grad()
        pulled(plain, B * sample)
        agree({n: p.grad_sample[b] for n, p in zip(dict(plain.named_parameters()), model.parameters(), strict=True)},
              {n: p.grad for n, p in plain.named_parameters()})  # fmt: skip


def test_training_with_privacy() -> None:
    torch.manual_seed(0)
    model = opacus.validators.ModuleValidator.fix(bptt.convert(Model(nn.GRU(5, 4, batch_first=True)), "chunked:3"))
    assert str(model.rnn.layer.gradient) == "chunked:3"
    before = copy.deepcopy(model.state_dict())
    data = torch.utils.data.TensorDataset(torch.randn(8, T, 5).double(), torch.randn(8, 2).double())
    loader, optimizer = torch.utils.data.DataLoader(data, batch_size=4), torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    for x, y in loader:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    after = model._module.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_its_state_is_the_layers() -> None:
    layer = bptt.nn.LSTM(5, 4)
    state = layer.state_dict()
    private = adaptor.PrivateLayer(layer)
    assert list(private.state_dict()) == list(state)
    other = nn.Sequential(adaptor.PrivateLayer(bptt.nn.LSTM(5, 4)))
    other.load_state_dict({f"0.{name}": value for name, value in state.items()})
    x = torch.randn(T, B, 5)
    torch.testing.assert_close(other(x)[0], private(x)[0])
    torch.testing.assert_close(copy.deepcopy(private)(x)[1], private(x)[1])
    with bptt.using(other, gradient="truncated:2"):
        assert str(other[0].layer.gradient) == "truncated:2"


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="PrivateLayer"):
        opacus.validators.ModuleValidator.validate(bptt.nn.GRU(5, 4), strict=True)
    with pytest.raises(TypeError, match="layer must be one of"):
        adaptor.PrivateLayer(nn.GRU(5, 4))
    with pytest.raises(ValueError, match="opacus needs a batch"):
        adaptor.PrivateLayer(bptt.nn.GRU(5, 4))(torch.zeros(T, 5))
