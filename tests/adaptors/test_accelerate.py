"""Accelerate itself: the policy and the doctor in a training loop, and in its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bptt.train import NonFiniteError

accelerate = pytest.importorskip("accelerate", reason="needs the extra accelerate")
adaptor = pytest.importorskip("bptt.adaptors.accelerate", reason="needs the extra accelerate", exc_type=ImportError)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(2, 3, batch_first=True, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def batches(*spoilt: int) -> list[torch.Tensor]:
    torch.manual_seed(2)
    made = [torch.randn(3, 8, 2, dtype=torch.float64) for _ in range(4)]
    for i in spoilt:
        made[i][1, 2] = torch.nan
    return made


def train(accelerator: Any, model: nn.Module, optimizer: Any, given: list[torch.Tensor]) -> None:
    for x in given:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()


def test_the_policy_is_set_and_kept(tmp_path: Path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = Sequence()
    adaptor.GradientPolicy("chunked:4").attach(accelerator, model)
    prepared, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    train(accelerator, prepared, optimizer, batches())
    assert str(model.rnn.gradient) == "chunked:4"
    model.rnn.gradient = "truncated:3"
    accelerator.save_state(str(tmp_path))

    again = accelerate.Accelerator(cpu=True)
    other = Sequence()
    adaptor.GradientPolicy("chunked:4").attach(again, other)
    again.prepare(other, torch.optim.Adam(other.parameters()))
    again.load_state(str(tmp_path))
    assert str(other.rnn.gradient) == "truncated:3"
    torch.testing.assert_close(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(("pieces", "spoilt"), [(1, 1), (2, 1), (2, 0)])
def test_the_doctor_leaves_a_step_out(tmp_path: Path, pieces: int, spoilt: int):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    model = Sequence()
    prepared, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
    doctor = adaptor.GradientDoctor("skip")
    doctor.attach(accelerator, prepared, optimizer)
    with pytest.warns(UserWarning, match="is left out: (forward: `rnn`|parameter gradient)"):
        train(accelerator, prepared, optimizer, batches(spoilt))
    assert doctor.skipped == 1
    doctor.end()
    expected = Sequence()
    plain = torch.optim.Adam(expected.parameters(), lr=0.1)
    kept = [[0], [2], [3]] if pieces == 1 else [[2, 3]]
    for group in kept:
        plain.zero_grad()
        for i in group:
            (expected(batches()[i]).square().mean() / pieces).backward()
        plain.step()
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    accelerator.save_state(str(tmp_path))
    other = adaptor.GradientDoctor("skip")
    again = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    fresh = Sequence()
    fresh, optimizer = again.prepare(fresh, torch.optim.Adam(fresh.parameters()))
    other.attach(again, fresh, optimizer)
    again.load_state(str(tmp_path))
    assert other.skipped == 1
    other.end()


def test_the_doctor_stops():
    accelerator = accelerate.Accelerator(cpu=True)
    model = Sequence()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    doctor = adaptor.GradientDoctor()
    doctor.attach(accelerator, prepared, optimizer)
    with pytest.raises(NonFiniteError, match="step 3: forward"):
        train(accelerator, prepared, optimizer, batches(2))
    doctor.end()
