"""`bptt check --module`: right layers pass, and each planted fault is found where it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import bptt as package
from bptt.cli.audit import AuditResult, audit

from .command import bptt, error_of

MINE = """
import torch


class Mine(torch.nn.GRU):
    def forward(self, x, h=None):
        if isinstance(x, torch.nn.utils.rnn.PackedSequence):
            raise TypeError("no packed batches")
        y, h = super().forward(x, h)
        return y * 1.0001, h
"""
CPU = torch.device("cpu")


def audited(kind: Any, dtype: torch.dtype = torch.float64) -> dict[str, AuditResult]:
    return {row.case: row for row in audit(kind, CPU, dtype)}


class ForgetsTheStateGradient(torch.nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input, None if hx is None else (hx[0].detach(), hx[1]))


class LosesTheFinalCotangent(torch.nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        y, final = super().forward(input, hx)
        return y, final.detach()


class LastLane(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        dx = dx.clone()
        dx.select(-2, -1)[:] *= 1.001
        return dx


class LastLaneIsOff(torch.nn.RNN):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input if isinstance(input, PackedSequence) else LastLane.apply(input), hx)


class OtherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.nn.functional.dropout(torch.ones_like(x), 0.5)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * torch.nn.functional.dropout(torch.ones_like(dy), 0.5)


class DrawsAnotherMaskBackward(torch.nn.Module):
    """Two layers of torch.nn's parameters, and dropout between them whose backward pass draws anew."""

    mask: Any = OtherMask

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0, **more: Any):
        super().__init__()
        if more:
            raise TypeError(f"got an unexpected keyword argument {next(iter(more))!r}")
        self.layers, self.drops = [], dropout > 0
        for k in range(num_layers):
            layer = torch.nn.GRU(input_size if k == 0 else hidden_size, hidden_size)
            for name, parameter in list(layer.named_parameters()):
                own = name.replace("l0", f"l{k}")
                self.register_parameter(own, parameter)
            self.layers.append([layer])  # no child: its parameters are ours

    def forward(self, input: Any, hx: Any = None) -> Any:
        y, finals = input, []
        for k, (layer,) in enumerate(self.layers):
            y = type(self).mask.apply(y) if k and self.drops and self.training else y
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            given = {f"{name}_l0": getattr(self, f"{name}_l{k}") for name in names}
            y, final = torch.func.functional_call(layer, given, (y, None if hx is None else hx[k : k + 1].contiguous()))
            finals.append(final)
        return y, torch.cat(finals)


class FromAGeneratorOfItsOwn:
    generator = torch.Generator()

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=cls.generator, dtype=x.dtype) < 0.5) * 2


class CannotBeReplayed(DrawsAnotherMaskBackward):
    mask = FromAGeneratorOfItsOwn


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("home", [torch.nn, package.nn])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_right_layers(home: Any, name: str, dtype: str) -> None:
    rows = audited(getattr(home, name), getattr(torch, dtype))
    assert len(rows) >= 21
    for row in rows.values():
        assert not row.refused, row
        assert not row.wrong(dtype), row
        assert "y" in row.errors
    assert any(error > 0 for error in rows["dropout, packed"].errors.values())


def test_a_state_whose_gradient_is_dropped() -> None:
    rows = audited(ForgetsTheStateGradient)
    assert rows["one layer"].errors["h_0"] == float("inf")
    assert rows["one layer"].wrong("float64") == ["h_0"]
    assert rows["packed, two layers, both directions"].wrong("float64") == ["h_0"]
    assert not rows["no initial state given"].wrong("float64")


def test_cotangents_of_the_final_state_that_get_lost() -> None:
    rows = audited(LosesTheFinalCotangent)
    assert not rows["a loss on y alone"].wrong("float64")
    assert "x" in rows["one layer"].wrong("float64")
    assert rows["a loss on the final state alone"].refused or rows["a loss on the final state alone"].wrong("float64")


def test_a_lane_that_is_off() -> None:
    rows = audited(LastLaneIsOff)
    assert rows["one layer"].wrong("float64") == ["x"]
    assert rows["one layer"].errors["x"] < 1e-3
    assert not rows["packed"].wrong("float64")


def test_a_mask_that_differs_backward() -> None:
    rows = audited(DrawsAnotherMaskBackward)
    assert not rows["two layers"].wrong("float64")
    assert not rows["dropout, evaluated"].wrong("float64")
    wrong = rows["dropout"].wrong("float64")
    assert "x" in wrong
    assert "weight_ih_l0" in wrong
    assert "y" not in wrong
    assert "weight_ih_l1" not in wrong
    assert "bidirectional" in rows["both directions"].refused


def test_masks_that_no_seed_repeats() -> None:
    rows = audited(CannotBeReplayed)
    assert "two calls after the same torch.manual_seed draw different dropout masks" in rows["dropout"].refused
    assert not rows["two layers"].wrong("float64")


def test_the_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    audited(torch.nn.GRU)
    assert torch.equal(torch.rand(2), expected)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bptt(capsys, "check", "--module", "torch.nn.LSTM", "--dtype", "float32")
    assert result.status == 0, result.out
    assert "all agree" in result.out
    assert "torch.nn.LSTM on cpu, float32" in result.out
    (tmp_path / "mine_to_audit.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    result = bptt(capsys, "check", "--module", "mine_to_audit.Mine")
    assert result.status == 1, result.out
    assert re.search(r"one layer +1\.0e-04 !", result.out)
    assert re.search(r"17 of 17 cases disagree", result.out)
    assert "not audited: packed: TypeError: no packed batches" in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--module", "LSTM"], "--module must name a recurrent layer with torch.nn's call form, as torch.nn.LSTM: got"),
        (["--module", "no_such.LSTM"], "there is no module no_such, neither in"),
        (["--module", "torch.nn.NoSuch"], "'torch.nn' has no 'NoSuch'"),
        (["--module", "torch.relu"], "no subclass of torch.nn.Module"),
        (["--module", "torch.nn.Linear"], "Linear(3, 4) has {'weight': (4, 3), 'bias': (4,)}"),
        (["--module", "torch.nn.Conv2d"], "Conv2d(3, 4) raised TypeError"),
        (
            ["--module", "torch.nn.GRU", "--device", "abacus"],
            "device must be a torch device that is there: got 'abacus'",
        ),
        (["--module", "torch.nn.GRU", "--dtype", "float8"], "--dtype must be one of float64, float32: got 'float8'"),
        (["--device", "cpu"], "--device is for the layer that --module names: got 'cpu' without it"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(bptt(capsys, "check", *arguments))
