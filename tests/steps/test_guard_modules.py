"""The guard of a step that reads modules and tensors: what is replaced, added or of another kind is found and named."""

import torch
from torch import Tensor, nn

from .guards import WHEN, guarded


def a_cell() -> nn.LSTMCell:
    return nn.LSTMCell(2, 3)


def test_the_training_flag() -> None:
    cell, net = a_cell(), nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
    guard = guarded(lambda h, x: (cell(net(x), h), x), *cell.parameters())
    cell.eval()
    assert guard.changed() == f"`cell.training` is False, and was True{WHEN}"
    cell.train()
    net[1][0].eval()
    assert guard.changed() == f"`net[1][0].training` is False, and was True{WHEN}"


def test_a_parameter_replaced_or_removed() -> None:
    cell = a_cell()
    weight = cell.weight_hh
    guard = guarded(lambda h, x: (cell(x, h), x), *cell.parameters())
    cell.weight_hh = nn.Parameter(torch.zeros(12, 3))
    assert guard.changed() == f"`cell.weight_hh` is another Parameter than{WHEN}"
    del cell.weight_hh
    assert guard.changed() == f"`cell` has 3 items, and had 4{WHEN}"
    cell.weight_hh = weight
    assert guard.changed() is not None, "in another order"


def test_what_a_parameter_is_like() -> None:
    cell = a_cell()
    guard = guarded(lambda h, x: (cell(x, h), x), *cell.parameters())
    with torch.no_grad():
        cell.weight_hh.zero_()
    assert guard.changed() is None, "a step of an optimiser"
    cell.weight_hh.requires_grad_(False)
    assert guard.changed() == f"`cell.weight_hh.requires_grad` is False, and was True{WHEN}"
    cell.weight_hh.requires_grad_(True)
    cell.weight_hh.data = torch.zeros(12, 4)
    assert guard.changed() == f"`cell.weight_hh.shape` is (12, 4), and was (12, 3){WHEN}"
    cell.weight_hh.data = torch.zeros(3, 12).t()
    assert guard.changed() == f"`cell.weight_hh.strides` is (1, 12), and was (3, 1){WHEN}"
    cell.double()
    assert guard.changed() == f"`cell.weight_ih.dtype` is torch.float64, and was torch.float32{WHEN}"


def test_a_hook_and_a_submodule() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    guard = guarded(lambda h, x: (h + net(x), x), *net.parameters())
    handle = net[0].register_forward_hook(lambda *_: None)
    assert guard.changed() == f"`net[0]._forward_hooks` has 1 item, and had 0{WHEN}"
    handle.remove()
    assert guard.changed() is None
    net[1] = nn.ReLU()
    assert guard.changed() == f"`net[1]` is a ReLU, and was a Tanh{WHEN}"


def test_plain_attributes_of_modules() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate, self.half, self.unread = 0.5, 1.0, 0
            self.norm = nn.LayerNorm(3)
            self.register_buffer("threshold", torch.ones(()))

        def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(h * self.rate * self.half - self.threshold) + x, h

    leaky = Leaky()
    guard = guarded(leaky, leaky.threshold, *leaky.parameters())
    assert None not in guard.paths
    leaky.unread = 1
    assert guard.changed() is None
    leaky.rate = 0.25
    assert guard.changed() == f"`step.rate` is 0.25, and was 0.5{WHEN}"
    leaky.rate = 0.5
    leaky.norm.eps = 1.0
    assert guard.changed() == f"`step.norm.eps` is 1.0, and was 1e-05{WHEN}"
    leaky.norm.eps = 1e-5
    leaky.threshold = torch.zeros(())
    assert guard.changed() == f"`step.threshold` is another Tensor than{WHEN}"


def test_a_method_of_a_class_above() -> None:
    class Above(nn.Module):
        rate = 0.5

        def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return h * self.decay, x

    class Below(Above):
        decay = 1.0

        def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(h, x)

    below = Below()
    guard = guarded(below)
    below.decay = 0.5
    assert guard.changed() == f"`step.decay` is 0.5, and was 1.0{WHEN}"


def test_only_what_the_step_reads_of_a_large_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head, self.steps_taken = a_cell(), nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps_taken += 1
            return self.head(x)

    model = Model()
    guard = guarded(lambda h, x: (model.cell(x, h), x), *model.cell.parameters())
    model.head.weight = nn.Parameter(torch.zeros(2, 3))
    model.steps_taken += 1
    assert guard.changed() is None
    model.cell = a_cell()
    assert guard.changed() == f"`model.cell` is another LSTMCell than{WHEN}"


def test_unreached_tensors() -> None:
    class Hiding:
        def __init__(self, weight: Tensor) -> None:
            self.__dict__["hidden weight"] = weight

    weight, seen = torch.zeros(3, 4), torch.zeros(2, requires_grad=True)
    hiding = Hiding(weight)
    guard = guarded(lambda h, x: (h @ vars(hiding)["hidden weight"] + seen, x), weight, seen, torch.ones(1))
    assert guard.paths[2] is None
    hiding = seen
    guard = guarded(lambda h, x: (h, x), weight)
    assert guard.paths == (None,)
    weight.resize_(2, 2)
    assert guard.changed() == f"the shape of a captured float32 tensor [3, 4] is (2, 2), and was (3, 4){WHEN}"


def test_a_flag_held_as_a_tensor() -> None:
    flag = torch.zeros((), dtype=torch.bool)
    guard = guarded(lambda h, x: (h if flag else x, x))
    flag.fill_(False)
    assert guard.changed() is None
    flag.fill_(True)
    assert guard.changed() == f"`flag` is True, and was False{WHEN}"


def test_parametrizations() -> None:
    net = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    guard = guarded(lambda h, x: (net(x) + h, x), *net.parameters())
    assert None not in guard.paths
    net.parametrizations.weight.original0.requires_grad_(False)
    assert guard.changed() == f"`net.parametrizations.weight.original0.requires_grad` is False, and was True{WHEN}"
