"""`Watch.examine` of a `Recurrent`: how far the gradient of its state reaches, as a layer's of the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt.flow import Examination, Finding, watch

B, F, H = 3, 2, 5


def both(scale: float = 1.0) -> tuple[bptt.nn.GRU, bptt.nn.Recurrent]:
    """A layer and a `Recurrent` with the same weights."""
    layer, cell = bptt.nn.GRU(F, H), nn.GRUCell(F, H)
    with torch.no_grad():
        for mine, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
            mine.copy_(theirs.mul_(scale))
    return layer, bptt.nn.Recurrent(cell)


def examined(layer: nn.Module, x: Tensor, loss: Any, **kw: Any) -> tuple[Examination, list[Finding]]:
    told: list[Finding] = []
    model = nn.ModuleDict({"inner": layer})
    with watch(model, tell=told.append) as doctor:
        loss(model["inner"](x, **kw)).backward()
        state = torch.get_rng_state()
        found = doctor.examine()
        assert torch.equal(torch.get_rng_state(), state)
    return found, told


def test_the_lags_are_those_of_the_layer() -> None:
    x = torch.randn(16, B, F)
    layer, recurrent = both()
    for loss in (lambda out: out[0].square().sum(), lambda out: out[1].sum(), lambda out: out[0][3].sum()):
        (of_layer, _), (found, _) = examined(layer, x, loss), examined(recurrent, x, loss)
        assert found.horizon == of_layer.horizon
        assert found.lags["inner"].layers == ("carry",)
        np.testing.assert_allclose(found.lags["inner"].rate, of_layer.lags["inner"].rate, rtol=0.05)


@pytest.mark.parametrize(("scale", "kind"), [(0.3, "vanishing"), (1.3, "explosion")])
def test_what_vanishes_and_explodes_is_told(scale: float, kind: str) -> None:
    class Scaled(nn.Module):
        hidden_size = H

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(H) * scale)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h @ self.w + x

    loss = lambda out: out[0][-1].sum() if scale > 1 else out[0].sum()  # noqa: E731
    found, told = examined(bptt.nn.Recurrent(Scaled()), torch.zeros(60, B, H) + 1e-3, loss)
    assert [finding.kind for finding in told] == [kind]
    assert found.findings[0].module == "inner"
    assert abs(found.lags["inner"].rate[0] - scale) < 0.01


def test_resets_to_a_state_dropout_and_lengths() -> None:
    layer = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else F, H), 2, dropout=0.5)
    resets = torch.zeros(12, B, dtype=torch.bool)
    resets[5] = True
    kw = {"resets": resets, "reset_state": torch.randn(2, B, H), "lengths": [12, 7, 9]}
    found, _ = examined(layer, torch.randn(12, B, F), lambda out: out[0].sum(), **kw)
    assert found.horizon is not None
    assert found.lags["inner"].measured[0] <= 7


def test_a_bidirectional_one_and_one_without_a_loss_are_left_out() -> None:
    x = torch.randn(12, B, F)
    layer = bptt.nn.Recurrent(lambda n: nn.GRUCell(F, H), 1, bidirectional=True)
    assert examined(layer, x, lambda out: out[0].sum())[0].lags == {}
    _, recurrent = both()
    assert examined(recurrent, x, lambda out: (out[0] * 0).sum())[0].lags == {}
