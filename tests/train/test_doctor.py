"""The doctor in a training run: what is skipped, what is told, what is written down, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bptt.flow import Finding, by_lag, lag_map
from bptt.train import InputError, NonFiniteError, RunDirectory, Step, Trainer, fit, prepare, resume, start
from bptt.train.loop import TOO_MANY

from .tiny import tiny, write_text


def trainer(folder: Path, **options: object) -> Trainer:
    config = tiny(write_text(folder), **options)
    return Trainer(config, prepare(config))


def spoil_gradients(t: Trainer, *steps: int) -> None:
    """NaN in a gradient of these steps, counted from 0: forward and adjoints stay finite."""
    t.model.output.weight.register_hook(lambda grad: grad * math.nan if t.step in steps else grad)


def spoil_inputs(t: Trainer, *steps: int) -> None:
    """NaN in what goes into the recurrent layer in these steps, at step 4 of the window, lane 1."""

    def spoil(module: torch.nn.Module, args: Any) -> Any:
        if t.step not in steps or not t.model.training:
            return None
        x = args[0].clone()
        x[4, 1] = math.nan
        return x, *args[1:]

    t.model.recurrent.register_forward_pre_hook(spoil)


def weights(t: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in t.model.parameters()]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_training_is_the_same_with_the_doctor_and_without(tmp_path: Path, cell: str):
    options: dict[str, Any] = {"cell": cell, "layers": 2, "dropout": 0.3, "gradient": "randomized:0.7"}
    watched, alone = trainer(tmp_path, **options), trainer(tmp_path, **options)
    alone.doctor.remove()
    runs = []
    for t in (watched, alone):
        torch.manual_seed(5)
        losses = [(step.nll, t.record(heldout=step.step % 5 == 0).heldout_loss) for step in t.run()]
        runs.append((losses, weights(t), torch.get_rng_state()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1:], runs[1][1:], rtol=0, atol=0)


def test_a_run_stops_with_the_place_in_its_message_and_in_the_findings(tmp_path: Path):
    t, run = start(tiny(write_text(tmp_path)), tmp_path / "run")
    spoil_inputs(t, 8)
    before: list[Tensor] = []
    message = r"step 9: loss nan, .* not finite; forward: `recurrent`, step 4, lane 1: its input holds NaN; .* is kept"
    told: list[Finding] = []
    with pytest.raises(NonFiniteError, match=message):
        fit(
            t,
            run,
            on_step=lambda _: before.__setitem__(slice(None), weights(t)),
            on_finding=lambda _, f: told.append(f),
        )
    torch.testing.assert_close(weights(t), before, rtol=0, atol=0)
    [line] = run.findings()
    assert {name: line[name] for name in ("step", "kind", "module", "t", "lane", "value")} == {
        "step": 9,
        "kind": "nan",
        "module": "recurrent",
        "t": 4,
        "lane": 1,
        "value": "nan",
    }
    assert told == []  # the error has said it
    assert t.skipped == 0


@pytest.mark.parametrize("spoil", [spoil_gradients, spoil_inputs])
def test_a_skipped_step_changes_no_weight_and_the_state_to_carry_is_finite(tmp_path: Path, spoil: Any):
    t = trainer(tmp_path, on_nonfinite="skip", cell="lstm")
    spoil(t, 3, 4)
    for _ in range(3):
        t.advance()
    before, carry = weights(t), t.carry
    skipped = [t.advance(), t.advance()]
    assert [s.skipped for s in skipped] == [True, True]
    torch.testing.assert_close(weights(t), before, rtol=0, atol=0)
    assert (t.step, t.index, t.skipped, t.in_a_row) == (5, 5, 2, 2)
    assert isinstance(t.carry, tuple)
    assert all(bool(s.isfinite().all()) for s in t.carry)
    if spoil is spoil_inputs:  # that of the step before
        torch.testing.assert_close(t.carry, carry, rtol=0, atol=0)
    else:  # the forward pass was good
        state = carry
        with torch.no_grad():
            for index in (3, 4):
                _, state = t.model(t.batches.window(0, index).inputs, state)
        torch.testing.assert_close(t.carry, state)
    assert not t.advance().skipped
    assert (t.skipped, t.in_a_row) == (2, 0)
    assert [f.kind for f in t.take_findings()] == ["nan", "nan"]
    assert t.take_findings() == []


def test_a_record_is_over_the_steps_that_were_applied(tmp_path: Path):
    t = trainer(tmp_path, on_nonfinite="skip", epochs=1)
    spoil_inputs(t, 1, 3, 4)
    steps = [t.advance() for _ in range(3)]
    record = t.record(heldout=False)
    kept = [s for s in steps if not s.skipped]
    assert (record.steps, record.skipped) == (2, 1)
    assert record.loss == sum(s.nll for s in kept) / sum(s.tokens for s in kept)
    assert record.grad_norm == sum(s.grad_norm for s in kept) / 2
    t.advance()
    t.advance()
    record = t.record(heldout=True)
    assert (record.steps, record.skipped, record.loss, record.perplexity, record.grad_norm) == (0, 2, None, None, None)
    assert record.heldout_loss is not None
    assert record.horizon is None  # nothing to measure in a step that is not finite
    rest = list(t.run())
    kept += rest
    expected = math.exp(sum(s.nll for s in kept) / sum(s.tokens for s in kept))
    assert t.record(heldout=False).epoch_perplexity == pytest.approx(expected, rel=1e-12)


def test_too_many_in_a_row_stop_the_run(tmp_path: Path):
    t = trainer(tmp_path, on_nonfinite="skip")
    spoil_gradients(t, *range(2, 2 + TOO_MANY - 1), *range(12, 20))
    assert sum(t.advance().skipped for _ in range(12)) == TOO_MANY - 1
    t = trainer(tmp_path, on_nonfinite="skip")
    spoil_gradients(t, *range(2, 20))
    with pytest.raises(NonFiniteError, match=r"step 12, the 10th in a row: .* parameter gradient: `output`"):
        list(t.run())
    assert (t.step, t.skipped) == (11, TOO_MANY - 1)


@pytest.mark.parametrize("crash", [3, 12, 16])
def test_a_run_with_skipped_steps_resumes_exactly(tmp_path: Path, crash: int):
    """A step of each kind is skipped before and after the checkpoints, which fall after steps 7 and 14."""
    config = tiny(write_text(tmp_path), on_nonfinite="skip", dropout=0.2, cell="lstm")

    class CrashError(Exception):
        pass

    def spoilt(t: Trainer) -> Trainer:
        spoil_gradients(t, 1, 6, 7, 13)
        spoil_inputs(t, 5, 14, 15)
        return t

    def die(step: Step) -> None:
        if step.step == crash:
            raise CrashError

    whole, whole_run = start(config, tmp_path / "whole")
    fit(spoilt(whole), whole_run)
    first, run = start(config, tmp_path / "run")
    with pytest.raises(CrashError):
        fit(spoilt(first), run, on_step=die)
    second, run = resume(tmp_path / "run")
    fit(spoilt(second), run)
    assert (second.skipped, whole.skipped) == (7, 7)
    torch.testing.assert_close(run.weights(), whole_run.weights(), rtol=0, atol=0)
    assert run.findings() == whole_run.findings()
    assert [line["step"] for line in run.findings()] == [2, 6, 7, 8, 14, 15, 16]

    def timeless(run: RunDirectory) -> list[dict[str, Any]]:
        return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in run.metrics()]

    assert timeless(run) == timeless(whole_run)
    assert sum(m["skipped"] for m in run.metrics()) == 7


def test_the_horizon_is_that_of_the_last_window(tmp_path: Path):
    t = trainer(tmp_path, dtype="float64", batch=2)
    t.advance()
    [call] = [call for call in t.doctor._calls if call.recurrent]
    recording = call.recording()
    assert recording is not None
    expected = by_lag(lag_map(recording))
    record = t.record(heldout=True)
    assert record.horizon == int(expected.horizon_90[0])
    t.advance()
    assert t.record(heldout=False).horizon is None


@pytest.mark.parametrize("options", [{"batching": "random"}, {}, {"seq_length": 150}, {"epochs": 4}])
def test_an_ordinary_run_has_no_findings(tmp_path: Path, options: dict[str, Any]):
    t, run = start(tiny(write_text(tmp_path), **options), tmp_path / "run")
    fit(t, run)
    assert not [f for f in run.findings() if f["kind"] != "vanishing"]


def test_a_warning_is_written_once_and_not_again_after_a_resume(tmp_path: Path):
    """An RNN on windows of 60 forgets within a few steps."""
    options: dict[str, Any] = {"cell": "rnn", "seq_length": 60, "eval_every": 3, "save_every": 3, "learning_rate": 1e-4}
    first, run = start(tiny(write_text(tmp_path), steps=6, **options), tmp_path / "run")
    told: list[int] = []
    fit(first, run, on_finding=lambda step, finding: told.append(step))
    assert [(line["step"], line["kind"]) for line in run.findings()] == [(3, "vanishing")]
    assert told == [3]
    second, run = resume(tmp_path / "run", steps=12)
    fit(second, run, on_finding=lambda step, finding: told.append(step))
    assert told == [3]
    assert len(run.findings()) == 1


def test_a_run_that_stopped_can_go_on_by_skipping(tmp_path: Path):
    t, run = start(tiny(write_text(tmp_path)), tmp_path / "run")
    spoil_gradients(t, 9)
    with pytest.raises(NonFiniteError, match="step 10"):
        fit(t, run)
    t, run = resume(tmp_path / "run", on_nonfinite="skip")
    assert run.findings() == []  # it was behind the checkpoint
    spoil_gradients(t, 9)
    fit(t, run)
    assert (t.skipped, [line["step"] for line in run.findings()]) == (1, [10])


def test_checkpoints_from_before_the_doctor_can_be_read(tmp_path: Path):
    t = trainer(tmp_path)
    t.advance()
    state = t.state()
    del state["doctor"], state["skipped"]
    again = trainer(tmp_path)
    again.restore(state)
    assert (again.step, again.skipped) == (1, 0)


def test_a_new_run_keeps_no_old_findings(tmp_path: Path):
    text = write_text(tmp_path)
    t, run = start(tiny(text, on_nonfinite="skip", steps=3), tmp_path / "run")
    spoil_gradients(t, 1)
    fit(t, run)
    assert run.findings_file.exists()
    _, run = start(tiny(text), tmp_path / "run", overwrite=True)
    assert not run.findings_file.exists()
    run.findings_file.write_text("hello\n")
    with pytest.raises(InputError, match=r"findings\.jsonl has a line that is not JSON"):
        run.findings()
