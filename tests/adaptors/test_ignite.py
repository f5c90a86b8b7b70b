"""PyTorch-Ignite itself: the handlers in a run, and their state in its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bptt.train import NonFiniteError

pytest.importorskip("ignite", reason="needs the extra ignite")
adaptor = pytest.importorskip("bptt.adaptors.ignite", reason="needs the extra ignite", exc_type=ImportError)
engines = pytest.importorskip("ignite.engine")
handlers = pytest.importorskip("ignite.handlers")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def batches(*spoilt: int, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(2)
    made = [(torch.randn(3, 8, 2), torch.randn(3, 8, 3)) for _ in range(count)]
    for i in spoilt:
        made[i][0][1, 2] = torch.nan
    return made


def trainer(model: nn.Module, lr: float = 0.1) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return engines.create_supervised_trainer(model, optimizer, nn.functional.mse_loss), optimizer


def test_the_policy_is_set_and_kept(tmp_path: Path):
    model, policy = Sequence(), adaptor.GradientPolicy("chunked:4")
    engine, _ = trainer(model)
    policy.attach(engine, model)
    saver = handlers.Checkpoint(
        {"model": model, "policy": policy}, handlers.DiskSaver(str(tmp_path), require_empty=False)
    )
    engine.add_event_handler(engines.Events.COMPLETED, saver)
    engine.run(batches(), max_epochs=1)
    assert str(model.rnn.gradient) == "chunked:4"
    [path] = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)
    assert saved["policy"] == {"gradient": "chunked:4", "layers": {"rnn": "chunked:4"}}

    for given, kept in ((None, "chunked:4"), ("truncated:2", "chunked:4")):
        again, other = Sequence(), adaptor.GradientPolicy(given)
        resumed, _ = trainer(again)
        other.attach(resumed, again)
        handlers.Checkpoint.load_objects({"model": again, "policy": other}, checkpoint=saved)
        resumed.run(batches(), max_epochs=1)
        assert str(again.rnn.gradient) == kept


def test_the_doctor_leaves_a_step_out():
    model, expected = Sequence(), Sequence()
    engine, optimizer = trainer(model)
    doctor = adaptor.GradientDoctor("skip")
    doctor.attach(engine, model, optimizer)
    with pytest.warns(UserWarning, match="step 2 is left out: forward: `rnn`, step 2, lane 1: its input holds NaN"):
        engine.run(batches(1), max_epochs=1)
    assert doctor.skipped == 1
    alone, other = trainer(expected)
    alone.run([b for i, b in enumerate(batches()) if i != 1], max_epochs=1)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict())
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    later = adaptor.GradientDoctor("skip")
    later.load_state_dict(doctor.state_dict())
    assert (later.skipped, later.state_dict()) == (1, doctor.state_dict())


def test_the_doctor_stops():
    model = Sequence()
    engine, optimizer = trainer(model)
    doctor = adaptor.GradientDoctor()
    doctor.attach(engine, model, optimizer)
    with pytest.raises(NonFiniteError, match="step 3: forward"):
        engine.run(batches(2), max_epochs=1)
    engine, optimizer = trainer(model)
    doctor = adaptor.GradientDoctor("skip")
    doctor.attach(engine, model, optimizer)
    with pytest.raises(NonFiniteError, match="step 10, the 10th in a row"):
        engine.run(batches(*range(12), count=12), max_epochs=1)


def test_a_closure_is_refused():
    model = Sequence()
    optimizer = torch.optim.LBFGS(model.parameters())
    doctor = adaptor.GradientDoctor()
    doctor.follow(model, optimizer)
    with pytest.raises(TypeError, match=r"must be called without a closure.*got one for LBFGS"):
        optimizer.step(lambda: torch.zeros(()))
    doctor.end()
