"""What holds for texts holds for series and sequences: accumulation, the doctor, processes, flow and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import bptt
from torch.testing import assert_close

from bptt.train import NonFiniteError, Step, Trainer, fit, prepare, resume, start
from bptt.train.processes import ALONE

from .forked import forked
from .outcomes import assert_same, outcome, run_to
from .test_doctor import spoil_gradients, spoil_inputs, weights
from .tiny import of_task

TASKS = ("series", "classify")
EXACT = {"dtype": "float64", "optimiser": "sgd", "learning_rate": 0.5, "clip": 0}


@pytest.mark.parametrize("cell", ["lstm", "mgu"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_s_gradient_is_that_of_its_batches_by_predictions(tmp_path: Path, task: str, cell: str) -> None:
    config = of_task(tmp_path, task, cell=cell, accumulate=3, epochs=2, steps=None, **EXACT)
    t, twin = (Trainer(config, prepare(config)) for _ in range(2))
    assert t.batches.windows(0) % 3 == 1
    while not t.finished:
        epoch, first, state = t.epoch, t.index, t.carry
        twin.model.load_state_dict(t.model.state_dict())
        step = t.advance()
        loss, predictions = torch.zeros((), dtype=torch.float64), 0
        for index in range(first, min(first + 3, t.batches.windows(epoch))):
            batch = twin.batches.window(epoch, index)
            output = twin.model.train()(
                *twin.task.arguments(batch, None if batch.fresh else state, t.model.output.bias)
            )
            loss, state = loss + twin.task.loss(output, batch), output[1]
            if state is not None:
                state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            predictions += batch.tokens
        assert step.tokens == predictions
        assert step.nll == pytest.approx(float(loss.detach()), rel=1e-12)
        expected = torch.autograd.grad(loss / (3 * t.batches.full), list(twin.model.parameters()))
        assert_close([p.grad for p in t.model.parameters()], list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", "mgu"])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_skipped_steps_resumes_exactly(tmp_path: Path, task: str, cell: str) -> None:
    config = of_task(tmp_path, task, cell=cell, on_nonfinite="skip", dropout=0.2, batch=2)

    def spoilt(t: Trainer) -> Trainer:
        spoil_gradients(t, 1, 8)
        t.model.recurrent.register_forward_pre_hook(lambda module, args: spoil(t, args))
        return t

    def spoil(t: Trainer, args: Any) -> Any:
        whole = args[0] if isinstance(args[0], torch.Tensor) else args[0].data
        return (args[0] * torch.nan, *args[1:]) if t.step in (5, 10) and whole is args[0] else None

    def die(step: Step) -> None:
        if step.step == 11:
            raise KeyboardInterrupt

    whole, run = start(config, tmp_path / "whole")
    fit(spoilt(whole), run)
    first, parts = start(config, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(spoilt(first), parts, on_step=die)
    second, parts = resume(tmp_path / "parts")
    fit(spoilt(second), parts)
    assert 2 <= whole.skipped <= 4
    assert_same(outcome(parts.path), outcome(run.path))
    assert {line["step"] for line in run.findings() if line["kind"] == "nan"} >= {2, 9}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_stops_with_the_place_and_its_weights_stay(tmp_path: Path, task: str) -> None:
    config = of_task(tmp_path, task, batch=2, heldout=0.0)
    t, run = start(config, tmp_path / "run")
    before: list[Any] = []
    if task == "series":
        spoil_inputs(t, 3)
        message = "step 4: loss nan, .* forward: `recurrent`, step 4, lane 1: its input holds NaN; .* is kept"
    else:
        spoil_gradients(t, 3)
        message = "step 4: .* gradient norm nan: not finite; .*parameter gradient: `output`"
    with pytest.raises(NonFiniteError, match=message):
        fit(t, run, on_step=lambda _: before.__setitem__(slice(None), weights(t)))
    assert_close(weights(t), before, rtol=0, atol=0)
    assert [line["step"] for line in run.findings() if line["kind"] == "nan"] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_another_number_of_processes_can_go_on(tmp_path: Path, task: str) -> None:
    config = of_task(tmp_path, task, accumulate=2, **EXACT)
    expected = run_to(ALONE, tmp_path / "one", config, 9)
    forked(2, tmp_path, run_to, tmp_path / "many", config, 5)
    found = run_to(ALONE, tmp_path / "many", None, 9)
    assert_close(found["model"], expected["model"], rtol=1e-9, atol=1e-12)
    assert_close(found["carry"], expected["carry"], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_flow_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    fit(*start(of_task(tmp_path, "classify", cell="mgu", gradient="chunked:4"), run))
    told = bptt(capsys, "flow", run, "--steps", 4, "--lanes", 2)
    assert told.status == 0, told.err
    assert "run: mgu, 6 units, trained with gradient=chunked:4" in told.out
    assert (run / "flow" / "report.html").is_file()
    compared = bptt(capsys, "compare", run, "full", "truncated:2", "--repeats", 5, "--steps", 4, "--lanes", 2)
    assert compared.status == 0, compared.err
    assert "chunked:4 *" in compared.out
