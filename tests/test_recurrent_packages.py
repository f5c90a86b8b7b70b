"""`bptt.nn.Recurrent` of the neurons and cells of other packages, as they come, where these are installed."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from sweeps import Agree
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bptt

T, B, I, H = 9, 5, 3, 4

pytestmark = pytest.mark.filterwarnings("ignore")


def package(name: str) -> Any:
    """The module, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return import_module(name)


class Timed(nn.Module):
    """A cell of ncps with the time that passes in a step, which it must be given."""

    def __init__(self, cell: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.cell, self.hidden_size = cell, hidden_size

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, h, 1.0)


def snntorch(name: str, **kw: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(package("snntorch"), name)(**kw)


def norse(name: str, *sizes: int) -> Callable[[], nn.Module]:
    return lambda: getattr(package("norse.torch"), name)(*sizes)


def ncp() -> Any:
    """A wiring of 8 neurons, 2 of which are outputs."""
    return package("ncps.wirings").AutoNCP(8, 2)


ZEROS = {H: torch.zeros(B, H), 8: torch.zeros(B, 8)}

CELLS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "leaky": (snntorch("Leaky", beta=0.9, learn_beta=True), "auto", None),
    "leaky_zero": (snntorch("Leaky", beta=0.9, reset_mechanism="zero"), "auto", None),
    "synaptic": (snntorch("Synaptic", alpha=0.8, beta=0.9), "auto", None),
    "alpha": (snntorch("Alpha", alpha=0.8, beta=0.7), "auto", None),
    "rleaky": (snntorch("RLeaky", beta=0.9, linear_features=I), "spread", None),
    "slstm": (snntorch("SLSTM", input_size=I, hidden_size=H), "auto", None),
    "ltc": (lambda: package("ncps.torch").LTCCell(ncp(), in_features=I), "auto", ZEROS[8]),
    "cfc": (lambda: Timed(package("ncps.torch").CfCCell(I, H), H), "auto", ZEROS[H]),
    "wired_cfc": (lambda: Timed(package("ncps.torch").WiredCfCCell(I, ncp()), 8), "auto", ZEROS[8]),
    "lif": (norse("LIFCell"), "auto", None),
    "lif_recurrent": (norse("LIFRecurrentCell", I, H), "auto", None),
    "lsnn": (norse("LSNNRecurrentCell", I, H), "auto", None),
    "adaptive": (norse("LIFAdExCell"), "auto", None),
}
"""How a cell is made, its form for `Recurrent`, and the state that a plain loop starts from."""


def loop(name: str, cell: nn.Module, state: Any, x: Tensor, chunk: int) -> tuple[Tensor, Any]:
    """A plain loop over the steps, which detaches the state every `chunk` steps."""
    ys = []
    for t, x_t in enumerate(x):
        if t and t % chunk == 0:
            state = torch.utils._pytree.tree_map(torch.Tensor.detach, state)
        if name in ("synaptic", "alpha", "rleaky", "slstm"):
            result = cell(x_t, *(state or ()))
            y, state = result[0], result if name == "rleaky" else result[1:]
        else:
            y, state = cell(x_t, state)
        ys.append(y)
    return torch.stack(ys), state


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("policy", "chunk"), [("full", T), ("chunked:4", 4)])
def test_as_they_come(name: str, policy: str, chunk: int, agree: Agree) -> None:
    make, form, start = CELLS[name]
    torch.manual_seed(0)
    cells = [make() for _ in (0, 1)]
    cells[1].load_state_dict(cells[0].state_dict())
    x = torch.randn(T, B, I) * 2
    layer = bptt.nn.Recurrent(cells[0], gradient=policy, form=form)
    found = []
    for run, cell in ((layer, cells[0]), (lambda x: loop(name, cells[1], start, x, chunk), cells[1])):
        leaf = x.clone().requires_grad_()
        y, state = run(leaf)
        states = tree_leaves(state)
        loss = y.sum() + sum(s.square().sum() for s in states)
        wanted = [leaf, *(p for p in cell.parameters() if p.requires_grad)]
        found.append([y, [s.reshape(s.shape[-2:]) for s in states], *torch.autograd.grad(loss, wanted)])
    agree(found[0], found[1])


@pytest.mark.parametrize("name", CELLS)
def test_windows_and_resets(name: str) -> None:
    """A loss at the last step reaches as far back as its window, and not behind a reset."""
    make, form, _ = CELLS[name]
    torch.manual_seed(0)
    x = (torch.rand(T, B, I) * 2).requires_grad_()
    layer = bptt.nn.Recurrent(make(), gradient="truncated:4", form=form)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[T - 2, 0] = True
    y, _ = layer(x, resets=resets)
    (g,) = torch.autograd.grad(y[-1].sum(), x)
    assert not g[: T - 4].any()
    assert not g[: T - 2, 0].any()
    assert g[T - 4 :, 1:].any()
